// softmax over the N locations (content addressing, sharpening) or over the K shifts. It takes powers of 2, which need
// fewer operations than powers of e: callers that want powers of e multiply by log2(e) where that costs least.
#pragma once

#include "core/scalar.h"

namespace ntm {

constexpr double log2_e = 1.4426950408889634, log_2 = 0.6931471805599453;

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

// out_i = 2^(z_i - bound); returns their sum. z(tile) may read out.
template <class Team, class F, class T = typename Team::Real>
NTM_FN T exponentials(const Team& team, Index N, F&& z, T bound, T* out /*[N]*/) {
    typename Team::V total{};
    team.tiles(N, [&](auto tile) NTM_INLINE {
        const auto e = Team::Math::exp2(z(tile) - bound);
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

// out_i = 2^z_i / sum_j 2^z_j, where no z_i is further from 0 than most. If that is at most 60, exponentials and their
// sums are far from float32's limits. The highest z_i is looked for only beyond that, and for a single location, so
// that its weight is exactly 1.
template <class Team, class F, class T = typename Team::Real>
NTM_FN void softmax(const Team& team, Index N, F&& z, T most, T* out /*[N]*/) {
    const T bound = most <= 60 && N > 1 ? T(0) : highest(team, N, z);
    divide(team, N, exponentials(team, N, z, bound, out), out);
}

// w . dw, which the gradient of a softmax w needs: dz_i = w_i (dw_i - w . dw)
template <class Team, class T = typename Team::Real>
NTM_FN T dot(const Team& team, Index N, const T* w /*[N]*/, const T* dw /*[N]*/) {
    typename Team::V total{};
    team.tiles(N, [&](auto tile) NTM_INLINE { total += tile.only(tile.load(w) * tile.load(dw), T(0)); });
    return team.sum(total);
}

}  // namespace ntm
