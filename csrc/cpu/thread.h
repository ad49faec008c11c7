// The CPU's Team: one thread, whose tiles are SIMD vectors as wide as the variant's registers.
//
// The elementary functions are branch-free polynomials, because calls to libm decide the speed otherwise: a softmax
// of 128 locations takes ten times longer with them. Coefficients are least-maximum fits of our own, summed in pairs,
// because a pass over a few vectors waits for its longest chain; tests check them against double over the whole range.
// Compensated sums rely on being compiled without -fassociative-math.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include <unistd.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/team.h"

namespace ntm::cpu {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

template <class T, int W>
struct VectorOf {
    typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Vector = typename VectorOf<T, W>::type;

template <class T>
constexpr int lanes = register_bytes / sizeof(T);

template <class T, class F>
inline Vector<T, lanes<T>> map(Vector<T, lanes<T>> x, F f) {
    for (int i = 0; i < lanes<T>; ++i) x[i] = f(x[i]);
    return x;
}

template <class T>
struct Math;

template <>
struct Math<float> {
    using V = Vector<float, lanes<float>>;
    using I = Vector<std::int32_t, lanes<float>>;
    static constexpr float tiny = std::numeric_limits<float>::min();
    static constexpr float infinity = std::numeric_limits<float>::infinity();

    NTM_FN static float select(bool mask, float a, float b) { return mask ? a : b; }
    NTM_FN static V select(I mask, V a, V b) { return mask ? a : b; }

    // One instruction each, which GCC does not find; unmasked, GCC 12 warns of itself.
#if defined(__AVX512F__)
    NTM_FN static V max(V a, V b) { return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
    NTM_FN static V min(V a, V b) { return (V)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif defined(__AVX__)
    NTM_FN static V max(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
    NTM_FN static V min(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
    NTM_FN static V max(V a, V b) { return (V)_mm_max_ps((__m128)a, (__m128)b); }
    NTM_FN static V min(V a, V b) { return (V)_mm_min_ps((__m128)a, (__m128)b); }
#else
    NTM_FN static V max(V a, V b) { return a > b ? a : b; }
    NTM_FN static V min(V a, V b) { return a < b ? a : b; }
#endif

    // Left to the compiler, which of two products is rounded first would not be everywhere the same.
#if defined(__AVX512F__)
    NTM_FN static V multiply_add(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__)
    NTM_FN static V multiply_add(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
    NTM_FN static V multiply_add(V a, V b, V c) { return a * b + c; }
#endif

    NTM_FN static V sqrt(V x) {
        float lane[lanes<float>];
        std::memcpy(lane, &x, sizeof x);
        for (float& value : lane) value = std::sqrt(value);
        std::memcpy(&x, lane, sizeof x);
        return x;
    }

    static constexpr float rounder = 0x1.8p23f;  // what is added to it is rounded to a whole number, in its last bits

    // p 2^n, where n comes with rounder added. Without AVX-512, -127 makes 0 and 128 infinity, and none is beyond them:
    // exponentials below 2^-126.5 vanish, and above 2^127.5 they overflow.
#if defined(__AVX512DQ__)
    static constexpr float vanishing = -104.0f;  // whose exponential is 0
    NTM_FN static V scale(V p, V n) { return (V)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)(n - rounder)); }
#else
    static constexpr float vanishing = -88.0f;
    NTM_FN static V scale(V p, V n) { return p * (V)(((I)n << 23) + (127 << 23)); }
#endif

    // e^x = 2^n (1 + p), n whole; it comes with rounder added
    struct Power {
        V n, p;
    };
    NTM_FN static Power power(V x) {
        const V rounded = x * 0x1.715476p+0f + rounder, n = rounded - rounder;
        const V r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // x - n log 2, in two parts
        const V square = r * r;
        const V high = 0.0013814538f * r + 0.008368745f, low = 0.04166839f * r + 0.16666521f;
        return {rounded, ((high * square + low) * r + 0.49999994f) * square + r};
    }

    NTM_FN static V exp(V x) {
        x = max(V{} + vanishing, x);
        x = min(V{} + 89.0f, x);  // overflows to infinity
        const auto [n, p] = power(x);
        return scale(p + 1.0f, n);
    }

    // 2^n 2^r, where n is whole
    NTM_FN static V exp2(V x) {
#if defined(__AVX512DQ__)
        const V r = (V)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 0x09);  // x - n, from 0 to 1; where x is infinite 0
        const V square = r * r;
        const V high = (0.00021612919f * r + 0.0012467845f) * square + (0.0096754516f * r + 0.05548528f);
        const V p = (high * square + (0.24022931f * r + 0.69314706f)) * r + 1.0f;
        return (V)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);
#else
        x = max(V{} - 127.0f, x);
        x = min(V{} + 128.0f, x);
        const V n = x + rounder, r = x - (n - rounder), square = r * r;  // r from -0.5 to 0.5
        const V high = (0.00015353362f * r + 0.0013398875f) * square + (0.009618437f * r + 0.055503324f);
        const V p = (high * square + (0.24022648f * r + 0.6931472f)) * r + 1.0f;
        return scale(p, n);
#endif
    }

    // for normal, positive x: 2^n (1 + f), 1 + f from 0.75 to 1.5
    NTM_FN static V log2(V x) {
#if defined(__AVX512F__)
        const V whole = (V)_mm512_maskz_getexp_ps(0xffff, (__m512)x);
        const V m = (V)_mm512_maskz_getmant_ps(0xffff, (__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
        const V n = select(m < 1.0f, whole + 1.0f, whole), f = m - 1.0f;
#else
        const I exponent = ((I)x - 0x3f400000) >> 23;  // of 0.75
        const V n = __builtin_convertvector(exponent, V), f = (V)((I)x - (exponent << 23)) - 1.0f;
#endif
        const V square = f * f, fourth = square * square;
        const V p7 = 0.07806572f * f - 0.17422922f, p5 = 0.21632472f * f - 0.24272363f;
        const V p3 = 0.28819153f * f - 0.36057591f, p1 = 0.48090208f * f - 0.72134846f;
        const V p = (p7 * square + p5) * fourth + (p3 * square + p1);
        const V y = f * (f * p + 1.44269502f) + n;
#if defined(__AVX512F__)
        return y;
#else
        return select(x < infinity, y, x);  // infinity and NaN stay
#endif
    }

    // for normal, positive x
    NTM_FN static V log(V x) {
        const I offset = (I)x - 0x3f3504f3;  // of sqrt(1/2): leaves a mantissa in [sqrt(1/2), sqrt(2))
        const I exponent = offset >> 23;
        const V f = (V)((I)x - (exponent << 23)) - 1.0f;
        const V n = __builtin_convertvector(exponent, V);
        const V square = f * f, fourth = square * square;
        const V p6 = 0.1276155f - 0.0763443f * f, p4 = 0.14201762f - 0.13160194f * f;
        const V p2 = 0.20001227f - 0.16623357f * f, p0 = 0.3333333f - 0.25000823f * f;
        const V p = (p6 * square + p4) * fourth + (p2 * square + p0);
        const V low = p * (square * f) - (0.5f * square - n * 0x1.7f7d1cp-20f);
        return select(x < infinity, (low + f) + n * 0x1.62e4p-1f, x);  // infinity and NaN stay
    }

    // for 0 <= u <= 1: log(1 + u) with what the rounding of 1 + u lost given back
    NTM_FN static V log1p(V u) {
        const V w = 1.0f + u;
        return log(w) + (u - (w - 1.0f)) / w;
    }

    NTM_FN static V tanh(V x) {
        const I sign = (I)x & std::numeric_limits<std::int32_t>::min();
        const V magnitude = min(V{} + 10.0f, (V)((I)x ^ sign));  // beyond, the answer is 1
        const auto [n, p] = power(2.0f * magnitude);
        const V two_n = scale(V{} + 1.0f, n), e = two_n * p + (two_n - 1.0f);  // e^(2|x|) - 1
        return (V)((I)(e / (e + 2.0f)) ^ sign);
    }

    NTM_FN static float exp(float x) { return exp(V{} + x)[0]; }
    NTM_FN static float log(float x) { return log(V{} + x)[0]; }
    NTM_FN static float log1p(float x) { return log1p(V{} + x)[0]; }
    NTM_FN static float tanh(float x) { return tanh(V{} + x)[0]; }
    NTM_FN static float sqrt(float x) { return std::sqrt(x); }
};

// float64 is there to check gradients with: libm, lane by lane.
template <>
struct Math<double> {
    using V = Vector<double, lanes<double>>;
    using I = Vector<std::int64_t, lanes<double>>;
    static constexpr double tiny = std::numeric_limits<double>::min();
    static constexpr double infinity = std::numeric_limits<double>::infinity();

    static double select(bool mask, double a, double b) { return mask ? a : b; }
    NTM_FN static V select(I mask, V a, V b) { return mask ? a : b; }
    NTM_FN static V max(V a, V b) { return a > b ? a : b; }
    NTM_FN static V min(V a, V b) { return a < b ? a : b; }
#if defined(__AVX512F__)
    NTM_FN static V multiply_add(V a, V b, V c) { return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(__FMA__)
    NTM_FN static V multiply_add(V a, V b, V c) { return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
    NTM_FN static V multiply_add(V a, V b, V c) { return a * b + c; }
#endif

    static double exp(double x) { return std::exp(x); }
    static double log1p(double x) { return std::log1p(x); }
    static double tanh(double x) { return std::tanh(x); }
    static double sqrt(double x) { return std::sqrt(x); }
    NTM_FN static V exp(V x) { return map<double>(x, [](double y) { return std::exp(y); }); }
    NTM_FN static V exp2(V x) { return map<double>(x, [](double y) { return std::exp2(y); }); }
    NTM_FN static V log2(V x) { return map<double>(x, [](double y) { return std::log2(y); }); }
    NTM_FN static V log1p(V x) { return map<double>(x, [](double y) { return std::log1p(y); }); }
    NTM_FN static V tanh(V x) { return map<double>(x, [](double y) { return std::tanh(y); }); }
    NTM_FN static V sqrt(V x) { return map<double>(x, [](double y) { return std::sqrt(y); }); }
};

// Half of v. Copied out through memory instead, it would make the compiler keep the sums themselves in memory.
template <int Begin, class T, int W, int... I>
NTM_FN Vector<T, W / 2> half(Vector<T, W> v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (Begin + I)...);
}

template <class T, int W, int... I>
NTM_FN Vector<T, 2 * W> joined(Vector<T, W> low, Vector<T, W> high, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(low, high, I...);
}

template <int Distance, class T, int W, int... I>
NTM_FN Vector<T, W> crossed(Vector<T, W> v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I ^ Distance)...);
}

// v folded to one number by halves: f is a sum or a maximum of two vectors. The last 16 bytes stay a whole vector:
// of two numbers GCC would make a horizontal sum, which takes longer.
template <class T, int W, int Distance = W / 2, class F>
NTM_FN T fold(Vector<T, W> v, F f) {
    if constexpr (Distance == 0) {
        return v[0];
    } else if constexpr (sizeof v > 16) {
        constexpr auto lanes = std::make_integer_sequence<int, W / 2>{};
        return fold<T, W / 2>(f(half<0, T, W>(v, lanes), half<W / 2, T, W>(v, lanes)), f);
    } else {
        return fold<T, W, Distance / 2>(f(v, crossed<Distance, T, W>(v, std::make_integer_sequence<int, W>{})), f);
    }
}

// Of what is added at Distance in a and in b, blocks of twice that, the sums: a's in the lower half, b's in the upper
template <int Distance, class T, int W, int... J>
NTM_FN Vector<T, W> added(Vector<T, W> a, Vector<T, W> b, std::integer_sequence<int, J...>) {
    constexpr auto place = [](int j) {
        return j / (W / 2) * W + j % (W / 2) / Distance * 2 * Distance + j % Distance;
    };
    return __builtin_shufflevector(a, b, place(J)...) + __builtin_shufflevector(a, b, (place(J) + Distance)...);
}

// Four vectors' sums, each in the order of fold(), in half as many operations
template <class T, int W>
NTM_FN void sum_four(const Vector<T, W> (&v)[4], T (&sums)[4]) {
    constexpr auto all = std::make_integer_sequence<int, W>{};
    const auto a = added<W / 2, T, W>(v[0], v[1], all), b = added<W / 2, T, W>(v[2], v[3], all);
    auto x = added<W / 4, T, W>(a, b, all);
    if constexpr (W > 8) x += crossed<W / 8, T, W>(x, all);
    if constexpr (W > 4) x += crossed<1, T, W>(x, all);
    unroll<4>([&](auto k) NTM_INLINE { sums[k] = x[k * (W / 4)]; });
}

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

// The first count < W numbers at p, and 0 past them, by halves: GCC would call memcpy for a loop. AVX2's masked stores,
// too, take many times as long on some processors; its masked loads do not, and without branches the same products and
// sums are fused before and after them as everywhere.
template <int W, class T>
NTM_FN Vector<T, W> load_first(const T* p, int count) {
    if constexpr (W == 2) {
        return count ? Vector<T, W>{*p} : Vector<T, W>{};
    } else {
        constexpr int H = W / 2;
        const auto rest = load_first<H>(p + (count & H), count & (H - 1));
        Vector<T, H> low = rest, high{};
        if (count & H) {
            std::memcpy(&low, p, sizeof low);
            high = rest;
        }
        return joined<T, H>(low, high, std::make_integer_sequence<int, W>{});
    }
}
template <int W, class T>
NTM_FN void store_first(T* p, Vector<T, W> v, int count) {
    if constexpr (W == 2) {
        if (count) *p = v[0];
    } else {
        constexpr int H = W / 2;
        constexpr auto all = std::make_integer_sequence<int, H>{};
        Vector<T, H> rest = half<0, T, W>(v, all);
        if (count & H) {
            std::memcpy(p, &rest, sizeof rest);
            p += H;
            rest = half<H, T, W>(v, all);
        }
        store_first<H>(p, rest, count & (H - 1));
    }
}

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

// Whether what a tile of elements has fetched ahead for its next step, some 48 KB, is best fetched to the first-level
// cache: measured, with 48 KB it is, with 32 KB it crowds out what is worked on. So it is where nobody tells the size.
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

    // Four tiles at a time share what f loads for a row, and their sums need not wait for themselves.
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
