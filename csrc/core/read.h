// r = sum_i w_i M_i
#pragma once

#include "core/team.h"

namespace ntm {

template <class Team, class T = typename Team::Real>
NTM_FN void read(const Team& team, Size N, Size M, const T* memory /*[M, N]*/, const T* weights /*[N]*/,
                 T* reads /*[M]*/) {
    team.template rows<1>(
        M, N,
        [&](auto block, auto tile, auto& sums) NTM_INLINE {
            const auto w = tile.load(weights);
            unroll<block.count>([&](auto k) NTM_INLINE {
                sums[k][0] += w * tile.load(memory + (block.first + k) * N);
            });
        },
        [&](Size m, const T* sum) NTM_INLINE { reads[m] = sum[0]; });
}

// dw_i = M_i.dr;  dM_i += w_i dr
template <class Team, class T = typename Team::Real>
NTM_FN void read_backward(const Team& team, Size N, Size M, const T* memory /*[M, N]*/, const T* weights /*[N]*/,
                          const T* grad_reads /*[M]*/, T* grad_memory /*[M, N], added*/, T* grad_weights /*[N]*/) {
    using V = typename Team::V;
    team.tiles(N, [&](auto tile) NTM_INLINE {
        const V w = tile.load(weights);
        V sum{};
        for (Size m = 0; m < M; ++m) {
            T* dM = grad_memory + m * N;
            sum += grad_reads[m] * tile.load(memory + m * N);
            tile.store(dM, tile.load(dM) + grad_reads[m] * w);
        }
        tile.store(grad_weights, sum);
    });
}

}  // namespace ntm
