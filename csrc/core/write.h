// All erases, then all adds: M'_i = M_i prod_h(1 - w_hi e_h) + sum_h w_hi a_h.
//
// For a head that is Alone the loop over the other heads is not compiled: a CPU has better use for its registers.
#pragma once

#include "core/content.h"

namespace ntm {

// What is written in place of x, a tile of row m. first: the first head's weights of that tile.
template <bool Alone, class Team, class Tile, class T = typename Team::Real, class V = typename Team::V>
NTM_FN V written_row(const Team&, const Tile& tile, Index H, Index N, Index M, Index m, V x, V first,
                     const T* weights, const T* erase, const T* add) {
    V keep = 1 - first * erase[m], sum = first * add[m];
    if constexpr (!Alone)
        for (Index h = 1; h < H; ++h) {
            const V w = tile.load(weights + h * N);
            keep *= 1 - w * erase[h * M + m];
            sum += w * add[h * M + m];
        }
    return Team::Math::multiply_add(x, keep, sum);
}

template <bool Alone, class Team, class T = typename Team::Real>
NTM_PASS void write_heads(const Team& team, Index H, Index N, Index M, const T* memory /*[M, N]*/,
                          const T* weights /*[H, N]*/, const T* NTM_RESTRICT erase /*[H, M]*/,
                          const T* NTM_RESTRICT add /*[H, M]*/, T* written /*[M, N]*/) {
    using V = typename Team::V;
    chunks<4>(M, [&](auto block) NTM_INLINE {
        team.tiles(N, [&](auto tile) NTM_INLINE {
            const V first = tile.load(weights);
            V x[block.count];
            unroll<block.count>([&](auto k) NTM_INLINE { x[k] = tile.load(memory + (block.first + k) * N); });
            unroll<block.count>([&](auto k) NTM_INLINE {
                const Index m = block.first + k;
                tile.store(written + m * N,
                           written_row<Alone>(team, tile, H, N, M, m, x[k], first, weights, erase, add));
            });
        });
    });
}

template <class Team, class T = typename Team::Real>
NTM_FN void write(const Team& team, Index H, Index N, Index M, const T* memory, const T* weights, const T* erase,
                  const T* add, T* written) {
    if constexpr (!Team::staged)
        if (H == 1) return write_heads<true>(team, 1, N, M, memory, weights, erase, add, written);
    write_heads<false>(team, H, N, M, memory, weights, erase, add, written);
}

// write(), and the cosines to a key and the norms of what it writes: the memory comes from cache once for both.
template <bool Alone, class Team, class T = typename Team::Real>
NTM_PASS void write_heads_cosine(const Team& team, Index H, Index N, Index M, const T* memory, const T* weights,
                                 const T* NTM_RESTRICT erase, const T* NTM_RESTRICT add, T* written, T eps, T key_norm,
                                 const T* NTM_RESTRICT key /*[M]*/, T* cosine /*[N]*/, T* inverse_norm /*[N]*/) {
    auto row = [&](Index m, auto tile) NTM_INLINE {
        const auto x = tile.load(memory + m * N);
        const auto y = written_row<Alone>(team, tile, H, N, M, m, x, tile.load(weights), weights, erase, add);
        tile.store(written + m * N, y);
        return y;
    };
    cosine_of_rows<false>(team, N, M, eps, key_norm, row, key, cosine, inverse_norm, nullptr, static_cast<T*>(nullptr));
}

template <class Team, class T = typename Team::Real>
NTM_FN void write_cosine(const Team& team, Index H, Index N, Index M, const T* memory, const T* weights, const T* erase,
                         const T* add, T* written, T eps, T key_norm, const T* key, T* cosine, T* inverse_norm) {
    auto pass = H == 1 ? write_heads_cosine<true, Team> : write_heads_cosine<false, Team>;
    pass(team, H, N, M, memory, weights, erase, add, written, eps, key_norm, key, cosine, inverse_norm);
}

// One head's part of write_backward: dw_h += dM (a_h - M e_h others), de_h = -sum dM M w_h others, da_h = sum dM w_h,
// where others = prod_{h' != h} (1 - w_h' e_h'). The last head also writes grad_memory, dM multiplied by all the
// erases.
template <bool Alone, class Team, class T = typename Team::Real>
NTM_PASS void write_head_backward(const Team& team, Index h, Index H, Index N, Index M, const T* memory,
                                  const T* weights, const T* NTM_RESTRICT erase, const T* NTM_RESTRICT add,
                                  const T* grad_written, T* grad_memory, T* grad_weights /*[N], added*/,
                                  T* grad_erase /*[M]*/, T* grad_add /*[M]*/) {
    using V = typename Team::V;
    const bool last = Alone || h + 1 == H;
    team.template rows<2>(
        M, N,
        [&](auto block, auto tile, auto& sums) NTM_INLINE {
            const V w = tile.load(weights + h * N);
            V dw = tile.load(grad_weights), x[block.count], after[block.count];
            unroll<block.count>([&](auto k) NTM_INLINE {
                x[k] = tile.load(memory + (block.first + k) * N);
                after[k] = tile.load(grad_written + (block.first + k) * N);
            });
            unroll<block.count>([&](auto k) NTM_INLINE {
                const Index m = block.first + k;
                V others = V{} + 1;
                if constexpr (!Alone)
                    for (Index other = 0; other < H; ++other)
                        if (other != h) others *= 1 - tile.load(weights + other * N) * erase[other * M + m];
                const V dM = after[k], kept = x[k] * others;
                const T e = erase[h * M + m];
                dw += dM * (add[h * M + m] - kept * e);
                sums[k][0] += dM * kept * w;
                sums[k][1] += dM * w;
                if (last) tile.store(grad_memory + m * N, dM * others * (1 - w * e));
            });
            tile.store(grad_weights, dw);
        },
        [&](Index m, const T* sum) NTM_INLINE {
            grad_erase[m] = -sum[0];
            grad_add[m] = sum[1];
        });
}

// grad_memory, the gradient of the memory before the write, may be grad_written itself; grad_weights is added to. Head
// h's gradients of erase and add begin at h * stride.
template <class Team, class T = typename Team::Real>
NTM_FN void write_backward(const Team& team, Index H, Index N, Index M, const T* memory /*[M, N]*/,
                           const T* weights /*[H, N]*/, const T* erase /*[H, M]*/, const T* add /*[H, M]*/,
                           const T* grad_written /*[M, N]*/, T* grad_memory /*[M, N]*/, T* grad_weights /*[H, N]*/,
                           T* grad_erase, T* grad_add, Index stride) {
    if constexpr (!Team::staged)
        if (H == 1)
            return write_head_backward<true>(team, 0, 1, N, M, memory, weights, erase, add, grad_written, grad_memory,
                                             grad_weights, grad_erase, grad_add);
    for (Index h = 0; h < H; ++h)
        write_head_backward<false>(team, h, H, N, M, memory, weights, erase, add, grad_written, grad_memory,
                                   grad_weights + h * N, grad_erase + h * stride, grad_add + h * stride);
}

}  // namespace ntm
