// softmax over the locations, the last stage of content addressing and of sharpening.
#pragma once

#include "core/scalar.h"

namespace ntm {

// The largest of all z(tile)
template <class Team, class F, class T = typename Team::Real>
NTM_FN T highest(const Team& team, Index N, F&& z) {
    using Math = typename Team::Math;
    typename Team::V top = typename Team::V{} - Math::infinity;
    team.tiles(N, [&](auto tile) NTM_INLINE {
        const auto x = tile.only(z(tile), -Math::infinity);
        top = Math::max(x, top);
    });
    return team.max(top);
}

// out_i = e^(scale x_i - bound), whose sum it returns; out may be x.
template <class Team, class T = typename Team::Real>
NTM_FN T exponentials(const Team& team, Index N, T scale, const T* x /*[N]*/, T bound, T* out /*[N]*/) {
    typename Team::V total{};
    team.tiles(N, [&](auto tile) NTM_INLINE {
        const auto e = Team::Math::exp(scale * tile.load(x) - bound);
        tile.store(out, e);
        total += tile.only(e, T(0));
    });
    return team.sum(total);
}

// x /= total
template <class Team, class T = typename Team::Real>
NTM_FN void divide(const Team& team, Index N, T total, T* x /*[N]*/) {
    const T inverse = 1 / total;
    team.tiles(N, [&](auto tile) NTM_INLINE { tile.store(x, inverse * tile.load(x)); });
}

// out_i = e^(scale x_i) / sum_j e^(scale x_j); out may be x. No scale x_i is above bound but by rounding, and the
// highest so close to it that e^(scale x_i - bound) is a normal number.
template <class Team, class T = typename Team::Real>
NTM_FN void softmax(const Team& team, Index N, T scale, const T* x /*[N]*/, T bound, T* out /*[N]*/) {
    divide(team, N, exponentials(team, N, scale, x, bound, out), out);
}

// The product w . dw that the gradient dz_i = w_i (dw_i - w . dw) of a softmax w needs.
template <class Team, class T = typename Team::Real>
NTM_FN T dot(const Team& team, Index N, const T* w /*[N]*/, const T* dw /*[N]*/) {
    typename Team::V total{};
    team.tiles(N, [&](auto tile) NTM_INLINE { total += tile.only(tile.load(w) * tile.load(dw), T(0)); });
    return team.sum(total);
}

}  // namespace ntm
