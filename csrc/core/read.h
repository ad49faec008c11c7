// r = sum_i w_i M_i
#pragma once

#include "core/team.h"

namespace ntm {

template <class Team, class T = typename Team::Real>
NTM_PASS void read(const Team& team, Index N, Index M, const T* memory /*[M, N]*/, const T* weights /*[N]*/,
                   T* reads /*[M]*/) {
    team.template rows<1>(
        M, N,
        [&](auto block, auto tile, auto& sums) NTM_INLINE {
            const auto w = tile.load(weights);
            unroll<block.count>([&](auto k) NTM_INLINE {
                sums[k][0] += w * tile.load(memory + (block.first + k) * N);
            });
        },
        [&](Index m, const T* sum) NTM_INLINE { reads[m] = sum[0]; });
}

// dw_i = M_i.dr, and grad_memory becomes grad_after plus w_i dr; grad_after may be grad_memory itself, or nullptr for
// 0.
template <class Team, class After, class T = typename Team::Real>
NTM_PASS void read_backward(const Team& team, Index N, Index M, const T* memory /*[M, N]*/, const T* weights /*[N]*/,
                            const T* grad_reads /*[M]*/, After grad_after /*[M, N] or nullptr*/,
                            T* grad_memory /*[M, N]*/, T* grad_weights /*[N]*/) {
    using V = typename Team::V;
    team.tiles(N, [&](auto tile) NTM_INLINE {
        const V w = tile.load(weights);
        V sum{};
        chunks<4>(M, [&](auto block) NTM_INLINE {
            V x[block.count], dM[block.count] = {};
            unroll<block.count>([&](auto k) NTM_INLINE {
                x[k] = tile.load(memory + (block.first + k) * N);
                if constexpr (present<After>) dM[k] = tile.load(grad_after + (block.first + k) * N);
            });
            unroll<block.count>([&](auto k) NTM_INLINE {
                const Index m = block.first + k;
                sum += grad_reads[m] * x[k];
                tile.store(grad_memory + m * N, dM[k] + grad_reads[m] * w);
            });
        });
        tile.store(grad_weights, sum);
    });
}

}  // namespace ntm
