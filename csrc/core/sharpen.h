// Sharpening in log space: w = softmax(gamma log max(ws, tiny)), which sums to one however large gamma is.
#pragma once

#include "core/softmax.h"

namespace ntm {

template <class Team, class T = typename Team::Real>
NTM_PASS void sharpen(const Team& team, Index N, const T* shifted, T gamma, T* sharpened) {
    using Math = typename Team::Math;
    const T bound = highest(team, N, [&](auto tile) NTM_INLINE {
        const auto w = tile.load(shifted);
        const auto l = Math::log(Math::select(w < Math::tiny, Math::tiny + typename Team::V{}, w));
        tile.store(sharpened, l);
        return gamma * l;
    });
    softmax(team, N, gamma, sharpened, bound, sharpened);
}

// q_i = w_i (dw_i - w.dw);  dgamma = sum q_i l_i;  dws_i = gamma q_i / ws_i where ws_i was not raised to tiny
template <class Team, class T = typename Team::Real>
NTM_PASS void sharpen_backward(const Team& team, Index N, const T* shifted, T gamma, const T* sharpened,
                               const T* grad_sharpened, T* grad_shifted, T* grad_gamma /*[1]*/) {
    using Math = typename Team::Math;
    using V = typename Team::V;
    const T mean = dot(team, N, sharpened, grad_sharpened);
    V along_gamma{};
    team.tiles(N, [&](auto tile) NTM_INLINE {
        const V ws = tile.load(shifted);
        const V q = tile.load(sharpened) * (tile.load(grad_sharpened) - mean);
        const V raised = Math::select(ws < Math::tiny, Math::tiny + V{}, ws);
        along_gamma += tile.only(q * Math::log(raised), T(0));
        tile.store(grad_shifted, Math::select(ws < Math::tiny, V{}, gamma * (q / raised)));
    });
    const T total = team.sum(along_gamma);
    team.one([&]() NTM_INLINE { *grad_gamma = total; });
}

}  // namespace ntm
