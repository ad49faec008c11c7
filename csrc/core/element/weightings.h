// Operators on weightings alone, one head of one batch element each. core/element.h tells what an operator is.
#pragma once

#include "core/sharpen.h"
#include "core/shift.h"

namespace ntm {

// A ring with a copy of x, [N]
template <class Team, class T = typename Team::Real>
NTM_FN T* ring_of(const Team& team, Arena<T>& arena, Size N, Size K, const T* x) {
    T* ring = arena.take(ring_size(N, K)) + K / 2;
    copy(team, N, x, ring);
    close_ring(team, N, K, ring);
    return ring;
}

template <class T>
struct Interpolate {
    using Real = T;
    static constexpr const char* name = "interpolate";
    Size B, H, N;
    const T *content, *previous, *gate;
    T* gated;

    constexpr Size items() const { return B * H; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return 3 * N; }
    constexpr Size scratch(bool) const { return 0; }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size i, Arena<T>) const {
        interpolate(team, N, content + i * N, previous + i * N, gate[i], gated + i * N);
    }
};

template <class T>
struct InterpolateBackward {
    using Real = T;
    static constexpr const char* name = "interpolate_backward";
    Size B, H, N;
    const T *content, *previous, *gate, *grad_gated;
    T *grad_content, *grad_previous, *grad_gate;

    constexpr Size items() const { return B * H; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return 5 * N; }
    constexpr Size scratch(bool) const { return 0; }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size i, Arena<T>) const {
        interpolate_backward(team, N, content + i * N, previous + i * N, gate[i], grad_gated + i * N,
                             grad_content + i * N, grad_previous + i * N, grad_gate + i);
    }
};

template <class T>
struct CircularShift {
    using Real = T;
    static constexpr const char* name = "circular_shift";
    Size B, H, N, K;
    const T *weights, *shift;
    T* shifted;

    constexpr Size items() const { return B * H; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return K * N; }
    constexpr Size scratch(bool staged) const { return room(ring_size(N, K)) + staged * room(K); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size i, Arena<T> arena) const {
        const T* s = team.in(arena, shift + i * K, K);
        const T* ring = ring_of(team, arena, N, K, weights + i * N);
        circular_shift(team, N, K, ring, s, shifted + i * N);
    }
};

template <class T>
struct CircularShiftBackward {
    using Real = T;
    static constexpr const char* name = "circular_shift_backward";
    Size B, H, N, K;
    const T *weights, *shift, *grad_shifted;
    T *grad_weights, *grad_shift;

    constexpr Size items() const { return B * H; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return 2 * K * N; }
    constexpr Size scratch(bool staged) const { return 2 * room(ring_size(N, K)) + staged * room(K); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size i, Arena<T> arena) const {
        const T* s = team.in(arena, shift + i * K, K);
        const T* ring = ring_of(team, arena, N, K, weights + i * N);
        const T* grad_ring = ring_of(team, arena, N, K, grad_shifted + i * N);
        circular_shift_backward(team, N, K, ring, s, grad_ring, grad_weights + i * N, grad_shift + i * K);
    }
};

template <class T>
struct Sharpen {
    using Real = T;
    static constexpr const char* name = "sharpen";
    Size B, H, N;
    const T *weights, *gamma;
    T* sharpened;

    constexpr Size items() const { return B * H; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return 8 * N; }
    constexpr Size scratch(bool staged) const { return staged * room(N); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size i, Arena<T> arena) const {
        T* out = team.out(arena, sharpened + i * N, N);
        sharpen(team, N, weights + i * N, gamma[i], out);
        team.sync();
        team.put(N, out, sharpened + i * N);
    }
};

template <class T>
struct SharpenBackward {
    using Real = T;
    static constexpr const char* name = "sharpen_backward";
    Size B, H, N;
    const T *weights, *gamma, *sharpened, *grad_sharpened;
    T *grad_weights, *grad_gamma;

    constexpr Size items() const { return B * H; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return 8 * N; }
    constexpr Size scratch(bool staged) const { return staged * room(N, N); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size i, Arena<T> arena) const {
        const T *w = team.in(arena, sharpened + i * N, N), *dw = team.in(arena, grad_sharpened + i * N, N);
        team.sync();
        sharpen_backward(team, N, weights + i * N, gamma[i], w, dw, grad_weights + i * N, grad_gamma + i);
    }
};

}  // namespace ntm
