// The elementary functions of vectors, and of single numbers.
//
// Those in float32 are branch-free polynomials: with calls to libm, a softmax of 128 locations takes ten times longer.
// The coefficients are least-maximum fits of our own. They are summed in pairs, because a pass over a few vectors waits
// for its longest chain of operations. Tests check the functions against double over the whole range.
// Compensated sums must be compiled without -fassociative-math, which would optimise the compensation away.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/vector.h"

namespace ntm::cpu {

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

    // One instruction each, which GCC does not find by itself. AVX-512 in masked form: GCC 12 warns of the other.
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

    // Says which of two products is rounded first: the compiler would not choose the same one everywhere.
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

    // for 0 <= u <= 1: log(1 + u), corrected for the rounding of 1 + u
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

}  // namespace ntm::cpu
