// The controller's small products, [E, K] x [K, C] with E at most a tile of batch elements: blocked for registers, with
// the weight packed into panels that are read front to back.
//
// The order in which an output's terms are added depends on nothing but K, so that an element's answers do not depend
// on the others in its tile.
#pragma once

#include <algorithm>

#include "cpu/thread.h"

namespace ntm::cpu {

// Vectors of a panel: enough that multiply-adds do not wait for each other, with as many rows as row_blocks() takes.
// AVX-512 has 32 registers for their sums, others 16.
constexpr int panel_vectors = register_bytes == 64 ? 2 : 3;

template <class T>
constexpr int panel_width = panel_vectors * lanes<T>;

template <class T>
constexpr Size packed_size(Size K, Size C) {
    return (C + panel_width<T> - 1) / panel_width<T> * panel_width<T> * K;
}

// Columns of a matrix: count numbers of every row, a row every stride numbers
template <class T>
struct Columns {
    const T* first;
    Size stride, count;
};

// Two ways to mix two vectors, each a single instruction. in_turns interleaves groups of Size numbers within every 16
// bytes, from the lower or the Upper halves: of a0 a1 a2 a3 and b0 b1 b2 b3 it makes a0 b0 a1 b1 or a2 b2 a3 b3, with
// Size 2 a0 a1 b0 b1. every_other takes the even or the Odd 16 bytes of a, then those of b.
template <int Size, bool Upper, class T, int... J>
NTM_FN Vector<T, lanes<T>> in_turns(Vector<T, lanes<T>> a, Vector<T, lanes<T>> b, std::integer_sequence<int, J...>) {
    constexpr int Q = 16 / sizeof(T);
    return __builtin_shufflevector(
        a, b, (J / Size % 2 * lanes<T> + J / Q * Q + Upper * Q / 2 + J % Q / (2 * Size) * Size + J % Size)...);
}
template <bool Odd, class T, int... J>
NTM_FN Vector<T, lanes<T>> every_other(Vector<T, lanes<T>> a, Vector<T, lanes<T>> b, std::integer_sequence<int, J...>) {
    constexpr int Q = 16 / sizeof(T);
    return __builtin_shufflevector(a, b, ((J / Q * 2 + Odd) * Q + J % Q)...);
}

// rows[i][j] becomes rows[j][i].
template <class T>
NTM_FN void transpose(Vector<T, lanes<T>> (&rows)[lanes<T>]) {
    constexpr int Q = 16 / sizeof(T), G = lanes<T> / Q;  // numbers in 16 bytes, and such groups in a vector
    constexpr auto all = std::make_integer_sequence<int, lanes<T>>{};
    auto turns = [&](auto size, int i, int j) NTM_INLINE {
        const auto low = in_turns<size, false, T>(rows[i], rows[j], all);
        rows[j] = in_turns<size, true, T>(rows[i], rows[j], all);
        rows[i] = low;
    };
    auto parted = [&](int i, int j) NTM_INLINE {
        const auto even = every_other<false, T>(rows[i], rows[j], all);
        rows[j] = every_other<true, T>(rows[i], rows[j], all);
        rows[i] = even;
    };
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    unroll<G>([&](auto g) NTM_INLINE {  // Q x Q numbers, in every 16 bytes
        constexpr int i = g * Q;
        turns(one, i, i + 1);
        if constexpr (Q == 4) {
            turns(one, i + 2, i + 3);
            turns(two, i, i + 2);
            turns(two, i + 1, i + 3);
            std::swap(rows[i + 1], rows[i + 2]);
        }
    });
    unroll<Q>([&](auto c) NTM_INLINE {  // G x G of these
        if constexpr (G == 2) parted(c, Q + c);
        if constexpr (G == 4) {
            parted(c, Q + c);
            parted(2 * Q + c, 3 * Q + c);
            parted(c, 2 * Q + c);
            parted(Q + c, 3 * Q + c);
        }
    });
}

// Calls f(v, j, vector) for every column j of a matrix and every constant v < Vectors. vector has the column's numbers
// in rows begin + v * lanes on, one row a lane, 0 past the last row. Rows are stride numbers apart.
template <int Vectors = 1, class T, class F>
NTM_FN void across(Size rows, Size begin, Size columns, const T* from, Size stride, F&& f) {
    using V = Vector<T, lanes<T>>;
    Thread<T>{}.tiles(columns, [&](auto tile) NTM_INLINE {
        unroll<Vectors>([&](auto v) NTM_INLINE {
            V block[lanes<T>];
            const Size row = begin + v * lanes<T>;
            const T* first = from + row * stride;
            if (row + lanes<T> <= rows)
                unroll<lanes<T>>([&](auto i) NTM_INLINE { block[i] = tile.load(first + i * stride); });
            else
                unroll<lanes<T>>([&](auto i) NTM_INLINE {
                    block[i] = row + i < rows ? tile.load(first + i * stride) : V{};
                });
            constexpr bool full = std::is_same_v<decltype(tile), FullTile<T>>;
            transpose<T>(block);
            unroll<lanes<T>>([&](auto j) NTM_INLINE {
                if (full || tile.begin + j < columns) f(v, tile.begin + j, block[j]);
            });
        });
    });
}

// to[j, i] = from[i, j]; a row every stride numbers
template <class T>
inline void transpose(Size rows, Size columns, const T* from, Size from_stride, T* to, Size to_stride) {
    Thread<T>{}.tiles(rows, [&](auto tile) NTM_INLINE {
        across(rows, tile.begin, columns, from, from_stride,
               [&](auto, Size j, auto column) NTM_INLINE { tile.store(to + j * to_stride, column); });
    });
}

// Packs a weight [K, C]: panel p holds columns p * panel_width on, row by row, 0 past C. It is stored [rows, columns],
// rows stride numbers apart. Here it is stored transposed, C = rows: its columns are k = first on.
template <class T>
inline void pack_transposed(Size rows, Size columns, const T* from, Size stride, Size K, Size first, T* packed) {
    for (Size begin = 0; begin < (rows + panel_width<T> - 1) / panel_width<T> * panel_width<T>; begin += lanes<T>) {
        T* to = packed + begin / panel_width<T> * panel_width<T> * K + begin % panel_width<T> + first * panel_width<T>;
        across(rows, begin, columns, from, stride,
               [&](auto, Size k, auto column) NTM_INLINE { FullTile<T>{0}.store(to + k * panel_width<T>, column); });
    }
}

// The same for a weight that is not stored transposed, K = rows: its columns are c = first on.
template <class T>
inline void pack(Size rows, Size columns, const T* from, Size stride, Size first, T* packed) {
    for (Size c = first, end; c < first + columns; c = end) {  // the part of each panel that these columns fill
        const Size place = c % panel_width<T>;
        end = std::min(c - place + panel_width<T>, first + columns);
        T* to = packed + (c - place) * rows + place;
        const T* piece = from + c - first;
        for (Size k = 0; k < rows; ++k) copy(Thread<T>{}, end - c, piece + k * stride, to + k * panel_width<T>);
    }
}

// 0 past the last of C columns
template <class T>
inline void pad(Size K, Size C, T* packed) {
    const Size place = C % panel_width<T>;
    if (place == 0) return;
    T* panel = packed + (C - place) * K;
    for (Size k = 0; k < K; ++k) std::fill_n(panel + k * panel_width<T> + place, panel_width<T> - place, T(0));
}

// row[c ...] += sum, up to column C
template <class T>
NTM_FN void add_to(T* row, Index c, Size C, Vector<T, lanes<T>> sum) {
    if (c + lanes<T> <= C) {
        const FullTile<T> tile{c};
        tile.store(row, tile.load(row) + sum);
    } else if (c < C) {
        const TailTile<T> tile{c, static_cast<int>(C - c)};
        tile.store(row, tile.load(row) + sum);
    }
}

// R rows by W vectors, column begin first: out[r, c] += sum_k in(r, k) weight[k, c]. weight_of(k, v) is the v-th vector
// of row k.
template <int R, int W, class T, class In, class Weight>
NTM_FN void product_block(Size K, Size C, Index begin, In&& in, Weight&& weight_of, T* out) {
    using V = Vector<T, lanes<T>>;
    V sums[R][W] = {};
    for (Size k = 0; k < K; ++k) {
        V weight[W];
        unroll<W>([&](auto v) NTM_INLINE { weight[v] = weight_of(k, v); });
        unroll<R>([&](auto r) NTM_INLINE {
            const T x = in(r, k);
            unroll<W>([&](auto v) NTM_INLINE { sums[r][v] += x * weight[v]; });
        });
    }
    unroll<R>([&](auto r) NTM_INLINE {
        unroll<W>([&](auto v) NTM_INLINE { add_to<T>(out + r * C, begin + v * lanes<T>, C, sums[r][v]); });
    });
}

// Calls f(rows, first) for blocks of rows that make up 0..n, as large as the registers allow; rows is a constant.
template <class F>
NTM_FN void row_blocks(Size n, F&& f) {
    Size first = 0;
    auto blocks = [&](auto rows) NTM_INLINE {
        for (; first + rows <= n; first += rows) f(rows, first);
    };
    if constexpr (register_bytes == 64) blocks(std::integral_constant<int, 8>{});
    blocks(std::integral_constant<int, 4>{});
    blocks(std::integral_constant<int, 3>{});
    blocks(std::integral_constant<int, 2>{});
    blocks(std::integral_constant<int, 1>{});
}

// out[e, c] += sum_k in[e, k] weight[k, c]. A single row takes 4 panels at a time and two rows take 2, so that no
// addition waits for the one before it; then one panel at a time, and at the end only the vectors that have columns.
template <class T>
inline void product(Size E, Size K, Size C, const T* in, const T* packed, T* out) {
    row_blocks(E, [&](auto rows, Size e) NTM_INLINE {
        auto at = [K, own = in + e * K](Size r, Size k) NTM_INLINE { return own[r * K + k]; };
        Index c = 0;
        auto blocks = [&](auto vectors, Index begun) NTM_INLINE {
            for (; c + begun * lanes<T> < C; c += vectors * lanes<T>) {
                const T* panel = packed + c * K;
                auto weight = [=](Size k, auto v) NTM_INLINE {
                    constexpr int width = panel_width<T>, V = panel_vectors;
                    return FullTile<T>{0}.load(panel + v / V * width * K + k * width + v % V * lanes<T>);
                };
                product_block<rows, vectors>(K, C, c, at, weight, out + e * C);
            }
        };
        constexpr int V = panel_vectors;
        if constexpr (rows == 1) blocks(std::integral_constant<int, 4 * V>{}, 3 * V);
        if constexpr (rows == 2) blocks(std::integral_constant<int, 2 * V>{}, V);
        unroll<V>([&](auto less) NTM_INLINE { blocks(std::integral_constant<int, V - less>{}, V - less - 1); });
    });
}

// out[c] += sum_k in[k] weight[c, k], of weights as they are stored, side by side, not packed. The sums are those of
// product(), in the same order. Narrow vectors take three sums in turns: one alone would wait for its last addition.
template <class T, class Weights>
inline void product_unpacked(Size C, const T* in, const Weights& weights, T* out) {
    constexpr int vectors = register_bytes == 64 ? 1 : 3;
    for (Index c = 0; c < C; c += vectors * lanes<T>) {
        Vector<T, lanes<T>> sums[vectors] = {};
        const T* x = in;
        for (const Columns<T>& columns : weights) {
            across<vectors>(C, c, columns.count, columns.first, columns.stride,
                            [&](auto v, Size k, auto column) NTM_INLINE { sums[v] += x[k] * column; });
            x += columns.count;
        }
        unroll<vectors>([&](auto v) NTM_INLINE { add_to<T>(out, c + v * lanes<T>, C, sums[v]); });
    }
}

// Adds to the gradient of a weight, transposed: sums[c, g] += sum_n fed[n, c] x[n, g]. fed is several matrices side by
// side; x has the gradients of the outputs, rows stride numbers apart. Vectors go along x, because gates fill them
// better than what is fed does, and neither has to be packed.
template <class T, class Fed>
inline void add_weight_gradient(Size N, Size outputs, const T* x, Size stride, const Fed& fed, T* sums) {
    Size all_columns = 0;
    for (const Columns<T>& columns : fed) all_columns += columns.count;
    auto grow = [&](auto vectors, Index first, auto x_of) NTM_INLINE {
        T* out = sums;
        // Each block fetches ahead a share of what comes next: rows are too far apart for the processor to foresee
        // them, and all at once would wait for each other. Next are the vectors of x beside these, and N more rows of
        // what is fed.
        const Size after = std::min<Size>(first + vectors * lanes<T>, outputs);
        const T* next = after < outputs ? x + after : x + N * stride;
        const Size fed_from = N + N * first / outputs, fed_to = N + N * after / outputs;
        Size done = 0, fetched = 0;
        for (const Columns<T>& columns : fed) {
            row_blocks(columns.count, [&](auto rows, Size c) NTM_INLINE {
                done += rows;
                for (; fetched < N * done / all_columns; ++fetched)
                    for (Size v = 0; v < panel_width<T>; v += 64 / sizeof(T))
                        __builtin_prefetch(next + fetched * stride + v);
                const T* own = columns.first + c;
                const Size step = columns.stride;
                for (Size n = fed_from; n < fed_to; ++n) __builtin_prefetch(own + n * step);
                auto at = [=](Size r, Size n) NTM_INLINE { return own[n * step + r]; };
                product_block<rows, vectors>(N, outputs, first, at, x_of, out + c * outputs);
            });
            out += columns.count * outputs;
        }
    };
    Index g = 0;
    unroll<panel_vectors - 1>([&](auto less) NTM_INLINE {
        constexpr int vectors = panel_vectors - less;
        for (; g + vectors * lanes<T> <= outputs; g += vectors * lanes<T>)
            grow(std::integral_constant<int, vectors>{}, g, [=](Size n, Index v) NTM_INLINE {
                return FullTile<T>{g + v * lanes<T>}.load(x + n * stride);
            });
    });
    Thread<T>{}.tiles(outputs - g, [&](auto tile) NTM_INLINE {
        const T* own = x + g;
        grow(std::integral_constant<int, 1>{}, g + tile.begin,
             [=](Size n, Index) NTM_INLINE { return tile.load(own + n * stride); });
    });
}

}  // namespace ntm::cpu
