// The controller's small products, [E, K] x [K, C] with E at most a tile of batch elements: blocked for registers, with
// the weight packed into panels that are read front to back.
//
// The order in which an output's terms are added depends on nothing but K, so that an element's answers do not depend
// on the others in its tile.
#pragma once

#include <algorithm>

#include "cpu/thread.h"

namespace ntm::cpu {

template <class T>
constexpr int panel_width = 2 * lanes<T>;

template <class T>
constexpr Size packed_size(Size K, Size C) {
    return (C + panel_width<T> - 1) / panel_width<T> * panel_width<T> * K;
}

// weight[k, c] is at k * stride_k + c * stride_c. Panel p holds columns p * panel_width on, row by row, 0 past C.
template <class T>
inline void pack(Size K, Size C, const T* weight, Size stride_k, Size stride_c, T* packed) {
    constexpr Size width = panel_width<T>;
    for (Size begin = 0; begin < C; begin += width, packed += width * K) {
        const Size columns = std::min(width, C - begin);
        const T* from = weight + begin * stride_c;
        if (columns < width) std::fill_n(packed, width * K, T(0));
        if (stride_c == 1)
            for (Size k = 0; k < K; ++k) std::copy_n(from + k * stride_k, columns, packed + k * width);
        else  // along the rows of what is stored, for the sake of the reads
            for (Size c = 0; c < columns; ++c)
                for (Size k = 0; k < K; ++k) packed[k * width + c] = from[k * stride_k + c * stride_c];
    }
}

// R rows by Q panels
template <int R, int Q, class T>
NTM_FN void product_block(Size K, Size C, Index begin, const T* in, const T* packed, T* out) {
    using V = Vector<T, lanes<T>>;
    constexpr int width = panel_width<T>;
    V sums[R][2 * Q] = {};
    const T* panel = packed + begin * K;
    for (Size k = 0; k < K; ++k) {
        V weight[2 * Q];
        unroll<2 * Q>([&](auto q) NTM_INLINE {
            weight[q] = FullTile<T>{0}.load(panel + q / 2 * width * K + k * width + q % 2 * lanes<T>);
        });
        unroll<R>([&](auto r) NTM_INLINE {
            const T x = in[r * K + k];
            unroll<2 * Q>([&](auto q) NTM_INLINE { sums[r][q] += x * weight[q]; });
        });
    }
    unroll<R>([&](auto r) NTM_INLINE {
        unroll<2 * Q>([&](auto q) NTM_INLINE {
            const Index c = begin + q * lanes<T>;
            T* row = out + r * C;
            if (c + lanes<T> <= C) {
                const FullTile<T> tile{c};
                tile.store(row, tile.load(row) + sums[r][q]);
            } else if (c < C) {
                const TailTile<T> tile{c, static_cast<int>(C - c)};
                tile.store(row, tile.load(row) + sums[r][q]);
            }
        });
    });
}

// out[e, c] += sum_k in[e, k] weight[k, c]
template <class T>
inline void product(Size E, Size K, Size C, const T* in, const T* packed, T* out) {
    constexpr int width = panel_width<T>;
    Size e = 0;
    for (; e + 4 <= E; e += 4)
        for (Index c = 0; c < C; c += width) product_block<4, 1>(K, C, c, in + e * K, packed, out + e * C);
    for (; e < E; ++e) {  // one row: several panels at once, or each sum would wait for the one before it
        Index c = 0;
        for (; c + 4 * width <= C + width - 1; c += 4 * width)
            product_block<1, 4>(K, C, c, in + e * K, packed, out + e * C);
        for (; c < C; c += width) product_block<1, 1>(K, C, c, in + e * K, packed, out + e * C);
    }
}

}  // namespace ntm::cpu
