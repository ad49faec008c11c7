// softmax over the locations, the last stage of content addressing and of sharpening.
#pragma once

#include "core/scalar.h"

namespace ntm {

// out_i = e^(scale x_i) / sum_j e^(scale x_j); out may be x
template <class Team, class T = typename Team::Real>
NTM_FN void softmax(const Team& team, Index N, T scale, const T* x /*[N]*/, T* out /*[N]*/) {
    using Math = typename Team::Math;
    using V = typename Team::V;
    V top = V{} - Math::infinity;
    team.tiles(N, [&](auto tile) NTM_INLINE {
        const V z = tile.only(scale * tile.load(x), -Math::infinity);
        top = Math::select(z > top, z, top);
    });
    const T highest = team.max(top);
    V total{};
    team.tiles(N, [&](auto tile) NTM_INLINE {
        const V e = Math::exp(scale * tile.load(x) - highest);
        tile.store(out, e);
        total += tile.only(e, T(0));
    });
    const T scaled = 1 / team.sum(total);
    team.tiles(N, [&](auto tile) NTM_INLINE { tile.store(out, scaled * tile.load(out)); });
}

// The product w . dw that the gradient dz_i = w_i (dw_i - w . dw) of a softmax w needs.
template <class Team, class T = typename Team::Real>
NTM_FN T dot(const Team& team, Index N, const T* w /*[N]*/, const T* dw /*[N]*/) {
    typename Team::V total{};
    team.tiles(N, [&](auto tile) NTM_INLINE { total += tile.only(tile.load(w) * tile.load(dw), T(0)); });
    return team.sum(total);
}

}  // namespace ntm
