// SIMD vectors as wide as the variant's registers: folded to a number, rearranged, and read and written in part.
#pragma once

#include <cstring>
#include <utility>

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

// Half of v. A copy through memory would make the compiler keep the sums themselves in memory.
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

// v folded to one number by halves: f is a sum or a maximum of two vectors. The last 16 bytes stay a whole vector: for
// two numbers GCC would make a horizontal sum, which takes longer.
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

// In every block of 2 * Distance numbers its lower half plus its upper half: first a's sums, then b's
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

// The first count < W numbers at p, and 0 past them, by halves: for a loop GCC would call memcpy. AVX2, too, stores
// this way, because its masked stores are slow on some processors. Its masked loads are fast and have no branches, so
// the compiler fuses the same products and sums as for whole vectors.
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

}  // namespace ntm::cpu
