// The CPU's Team: one thread, whose tiles are SIMD vectors.
#pragma once

#include <cstring>

#include <unistd.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/team.h"
#include "cpu/elementary.h"
#include "cpu/vector.h"

namespace ntm::cpu {

// A whole vector of contiguous elements.
template <class T>
struct FullTile {
    using V = Vector<T, lanes<T>>;
    Index begin;

    NTM_FN V load(const T* p) const {
        V v;
        std::memcpy(&v, p + begin, sizeof v);
        return v;
    }
    NTM_FN void store(T* p, V v) const { std::memcpy(p + begin, &v, sizeof v); }
    NTM_FN static V only(V v, T) { return v; }
};

// The last elements of an array whose size is no multiple of the vector's; lanes past the end load as 0.
template <class T>
struct TailTile {
    using V = Vector<T, lanes<T>>;
    Index begin;
    int count;

    NTM_FN V load(const T* p) const {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4)
            return (V)_mm512_maskz_loadu_ps(mask(), p + begin);
        else
            return (V)_mm512_maskz_loadu_pd(mask(), p + begin);
#elif defined(__AVX__)
        if constexpr (sizeof(T) == 4)
            return (V)_mm256_maskload_ps(p + begin, (__m256i)mask());
        else
            return (V)_mm256_maskload_pd(p + begin, (__m256i)mask());
#else
        return load_first<lanes<T>>(p + begin, count);
#endif
    }
    NTM_FN void store(T* p, V v) const {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4)
            _mm512_mask_storeu_ps(p + begin, mask(), (__m512)v);
        else
            _mm512_mask_storeu_pd(p + begin, mask(), (__m512d)v);
#else
        store_first<lanes<T>>(p + begin, v, count);
#endif
    }
    NTM_FN V only(V v, T fill) const {
        for (int i = 0; i < lanes<T>; ++i) v[i] = i < count ? v[i] : fill;
        return v;
    }

private:
#if defined(__AVX512F__)
    unsigned mask() const { return (1u << count) - 1; }
#elif defined(__AVX__)
    NTM_FN auto mask() const {
        typename Math<T>::I place{};
        for (int i = 0; i < lanes<T>; ++i) place[i] = i;
        return place < count;
    }
#endif
};

// Whether to fetch ahead to the first-level cache. A tile fetches some 48 KB for its next step. Measured: that is best
// if this cache has 48 KB; if it has 32 KB, they crowd out what is worked on. An unknown size counts as large.
inline const bool large_first_cache = [] {
#ifdef _SC_LEVEL1_DCACHE_SIZE
    const long size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    return size <= 0 || size >= 48 << 10;
#else
    return true;
#endif
}();

template <class T>
struct Thread {
    using Real = T;
    using V = Vector<T, lanes<T>>;
    using Math = cpu::Math<T>;

    template <class F>
    NTM_FN void tiles(Index n, F&& f) const {
        Index i = 0;
        for (; i + lanes<T> <= n; i += lanes<T>) f(FullTile<T>{i});
        if (i < n) f(TailTile<T>{i, static_cast<int>(n - i)});
    }

    template <int S, class F, class G>
    NTM_FN void rows(Index m, Index n, F&& f, G&& done) const {
        chunks<4 / S>(m, [&](auto block) NTM_INLINE { rows_of<S>(block, n, f, done); });
    }

    // Four tiles at a time share what f loads for a row, and no sum waits for its own last addition.
    template <int S, class F, class G>
    NTM_FN void columns(Index m, Index n, F&& f, G&& done) const {
        constexpr int block = 4 * lanes<T>;
        Index first = 0;
        for (; first + block <= n; first += block) {
            auto tile = [=](Index i) NTM_INLINE { return FullTile<T>{first + i * lanes<T>}; };
            V sums[4][S] = {};
            for (Index i = 0; i < m; ++i) unroll<4>([&](auto k) NTM_INLINE { f(i, tile(k), sums[k]); });
            unroll<4>([&](auto k) NTM_INLINE { done(tile(k), sums[k]); });
        }
        tiles(n - first, [&](auto tile) NTM_INLINE {
            V sums[S] = {};
            tile.begin += first;
            for (Index i = 0; i < m; ++i) f(i, tile, sums);
            done(tile, sums);
        });
    }

    template <class F>
    NTM_FN void each(Index n, F&& f) const {
        for (Index i = 0; i < n; ++i) f(i);
    }
    template <class F>
    NTM_FN void one(F&& f) const {
        f();
    }

    NTM_FN T sum(V v) const {
        return fold<T, lanes<T>>(v, [](auto a, auto b) NTM_INLINE { return a + b; });
    }
    NTM_FN T max(V v) const {
        return fold<T, lanes<T>>(v, [](auto a, auto b) NTM_INLINE { return a > b ? a : b; });
    }
    NTM_FN void sync() const {}
    NTM_FN void ahead(Size n, const T* p) const {
        constexpr Size line = 64 / sizeof(T);
        if (large_first_cache)
            for (Size i = 0; i < n; i += line) __builtin_prefetch(p + i);
        else
            for (Size i = 0; i < n; i += line) __builtin_prefetch(p + i, 0, 2);  // to the second-level cache alone
    }

    static constexpr bool alone = true, staged = false;  // the cache does it
    NTM_FN static const T* in(Arena<T>&, const T* p, Index) { return p; }
    NTM_FN static T* out(Arena<T>&, T* p, Index) { return p; }
    NTM_FN static void put(Index, const T*, T*) {}

private:
    template <int S, int Count, class F, class G>
    NTM_FN void rows_of(Chunk<Count> block, Index n, F&& f, G&& done) const {
        V sums[Count][S] = {};
        tiles(n, [&](auto tile) NTM_INLINE { f(block, tile, sums); });
        T totals[Count * S];
        if constexpr (Count * S == 4 && lanes<T> >= 4)
            sum_four<T, lanes<T>>({sums[0][0], sums[1 / S][1 % S], sums[2 / S][2 % S], sums[3 / S][3 % S]}, totals);
        else
            unroll<Count * S>([&](auto i) NTM_INLINE { totals[i] = sum(sums[i / S][i % S]); });
        unroll<Count>([&](auto k) NTM_INLINE { done(block.first + k, totals + k * S); });
    }
};

}  // namespace ntm::cpu
