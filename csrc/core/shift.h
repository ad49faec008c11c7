// Interpolation with the previous weighting, and the circular shift.
//
// A ring is an array of N locations with S more on either side, which repeat those of the other end. So every shift is
// a contiguous load. Pointers to a ring point to location 0.
#pragma once

#include "core/team.h"

namespace ntm {

constexpr Index ring_size(Index N, Index K) { return N + K - 1; }

// Fills the S locations on either side.
template <class Team, class T = typename Team::Real>
NTM_FN void close_ring(const Team& team, Index N, Index K, T* ring) {
    const Index S = K / 2;
    team.sync();
    team.each(S, [&](Index i) NTM_INLINE {
        ring[i - S] = ring[N + i - S];
        ring[N + i] = ring[i];
    });
    team.sync();
}

// wg = g wc + (1-g) w_prev, of vectors or of numbers
template <class V, class T>
NTM_FN V blend(V content, V previous, T gate) {
    return gate * content + (1 - gate) * previous;
}

template <class Team, class T = typename Team::Real>
NTM_PASS void interpolate(const Team& team, Index N, const T* content, const T* previous, T gate, T* gated) {
    team.tiles(N, [&](auto tile) NTM_INLINE {
        tile.store(gated, blend(tile.load(content), tile.load(previous), gate));
    });
}

// dg, dwc and dw_prev from dwg; grad_content may be grad_gated
template <class Team, class T = typename Team::Real>
NTM_PASS void interpolate_backward(const Team& team, Index N, const T* content, const T* previous, T gate,
                                   const T* grad_gated, T* grad_content, T* grad_previous, T* grad_gate /*[1]*/) {
    using V = typename Team::V;
    V along_gate{};
    team.tiles(N, [&](auto tile) NTM_INLINE {
        const V grad = tile.load(grad_gated);
        along_gate += tile.only(grad * (tile.load(content) - tile.load(previous)), T(0));
        tile.store(grad_previous, (1 - gate) * grad);
        tile.store(grad_content, gate * grad);
    });
    const T total = team.sum(along_gate);
    team.one([&]() NTM_INLINE { *grad_gate = total; });
}

// ws_i = sum_j s_j wg_(i-j)
template <class Team, class T = typename Team::Real>
NTM_PASS void circular_shift(const Team& team, Index N, Index K, const T* gated /*ring*/, const T* shift /*[K]*/,
                             T* shifted /*[N]*/) {
    const Index S = K / 2;
    team.tiles(N, [&](auto tile) NTM_INLINE {
        typename Team::V sum{};
        for (Index j = 0; j < K; ++j) sum += shift[j] * tile.load(gated + S - j);
        tile.store(shifted, sum);
    });
}

// ds_j = sum_i dws_i wg_(i-j),  dwg_i = sum_j s_j dws_(i+j)
template <class Team, class T = typename Team::Real>
NTM_PASS void circular_shift_backward(const Team& team, Index N, Index K, const T* gated /*ring*/,
                                      const T* shift /*[K]*/, const T* grad_shifted /*ring*/,
                                      T* grad_gated /*[N]*/, T* grad_shift /*[K]*/) {
    const Index S = K / 2;
    team.template rows<1>(
        K, N,
        [&](auto block, auto tile, auto& sums) NTM_INLINE {
            const auto grad = tile.load(grad_shifted);
            unroll<block.count>([&](auto k) NTM_INLINE {
                sums[k][0] += grad * tile.load(gated + S - (block.first + k));
            });
        },
        [&](Index j, const T* sum) NTM_INLINE { grad_shift[j] = sum[0]; });
    team.tiles(N, [&](auto tile) NTM_INLINE {
        typename Team::V sum{};
        for (Index j = 0; j < K; ++j) sum += shift[j] * tile.load(grad_shifted + j - S);
        tile.store(grad_gated, sum);
    });
}

}  // namespace ntm
