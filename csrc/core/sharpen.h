// Sharpening in log space: w = softmax(gamma log max(ws, tiny)), which sums to one however large gamma is.
#pragma once

#include "core/softmax.h"

namespace ntm {

// max(ws, tiny), whose logarithm is finite
template <class Math, class V>
NTM_FN V raised(V shifted) {
    return Math::max(Math::tiny + V{}, shifted);
}

// The softmax of gamma log ws needs a bound near the highest exponent. ws sums to one, so no logarithm is above 0 and
// the highest is not far below: the bound is 0. The highest is looked for only if the sum shows that nearly all
// exponentials vanished or that ws did not sum to one, and for a single location, so that its weight is exactly 1.
template <class Team, class T = typename Team::Real>
NTM_PASS void sharpen(const Team& team, Index N, const T* shifted, T gamma, T* sharpened) {
    using Math = typename Team::Math;
    auto log = [&](auto tile) NTM_INLINE {
        const auto l = Math::log2(raised<Math>(tile.load(shifted)));
        tile.store(sharpened, l);
        return gamma * l;
    };
    team.tiles(N, log);
    auto z = [&](auto tile) NTM_INLINE { return gamma * tile.load(sharpened); };
    T total = exponentials(team, N, z, T(0), sharpened);
    if (N == 1 || !(total > T(1e-12) && total < T(1e12)))
        total = exponentials(team, N, z, highest(team, N, log), sharpened);
    divide(team, N, total, sharpened);
}

// q_i = w_i (dw_i - w.dw);  dgamma = sum q_i l_i;  dws_i = gamma q_i / ws_i, or 0 if ws_i was raised to tiny
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
        const V r = raised<Math>(ws);
        along_gamma += tile.only(q * Math::log2(r), T(0));
        tile.store(grad_shifted, Math::select(ws < Math::tiny, V{}, gamma * (q / r)));
    });
    const T total = T(log_2) * team.sum(along_gamma);
    team.one([&]() NTM_INLINE { *grad_gamma = total; });
}

}  // namespace ntm
