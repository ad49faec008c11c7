// A head: its raw parameters activated, and its whole addressing composed from the stages.
#pragma once

#include "core/content.h"
#include "core/sharpen.h"
#include "core/shift.h"

namespace ntm {

// A head's activated parameters.
template <class T>
struct Head {
    const T* key;    // [M]
    const T* shift;  // [K]
    T beta, gate, gamma;
};

// What the stages of a head's addressing leave for each other and for the backward, in scratch.
template <class T>
struct Addressing {
    T* cosine;        // [N]
    T* inverse_norm;  // [N]  1 / B_i
    T* content;       // [N]
    T* gated;         // ring
    T* shifted;       // [N]

    static constexpr Index scratch(Index N, Index K) { return 4 * (N + 16) + ring_size(N, K) + 16; }
    template <class Given = std::nullptr_t>
    NTM_FN Addressing(Arena<T>& arena, Index N, Index K, Given norms = nullptr /*Norms<T>* or nullptr*/)
        : cosine(arena.take(N)),
          inverse_norm(arena.take(N)),
          content(arena.take(N)),
          gated(arena.take(ring_size(N, K)) + K / 2),
          shifted(arena.take(N)) {
        if constexpr (present<Given>) inverse_norm = norms->inverse;
    }
};

// Everything before sharpening. cosines(norm) stands for cosine(); norm is the key's, and is returned.
template <class Team, class Cosines, class T = typename Team::Real>
NTM_FN T focus(const Team& team, Index N, Index M, Index K, T eps, Cosines&& cosines, const T* previous /*[N]*/,
               const Head<T>& head, const Addressing<T>& at) {
    const T norm = key_norm(team, M, eps, head.key);
    cosines(norm);
    content_weights(team, N, head.beta, at.cosine, at.content);
    interpolate(team, N, at.content, previous, head.gate, at.gated);
    close_ring(team, N, K, at.gated);
    circular_shift(team, N, K, at.gated, head.shift, at.shifted);
    return norm;
}

template <class Team, class Cosines, class T = typename Team::Real>
NTM_FN void address_by(const Team& team, Index N, Index M, Index K, T eps, Cosines&& cosines, const T* previous,
                       const Head<T>& head, const Addressing<T>& at, T* weights /*[N]*/) {
    focus(team, N, M, K, eps, cosines, previous, head, at);
    sharpen(team, N, at.shifted, head.gamma, weights);
}

// If norms are given, at must have been made with them.
template <class Team, class Given = std::nullptr_t, class T = typename Team::Real>
NTM_FN void address(const Team& team, Index N, Index M, Index K, T eps, const T* memory /*[M, N]*/, const T* previous,
                    const Head<T>& head, const Addressing<T>& at, T* weights /*[N]*/,
                    Given norms = nullptr /*Norms<T>* or nullptr*/) {
    auto cosines = [&](T norm) NTM_INLINE {
        with_norms(norms, [&](auto known) NTM_INLINE {
            cosine<known>(team, N, M, eps, norm, memory, head.key, at.cosine, at.inverse_norm);
        });
    };
    address_by(team, N, M, K, eps, cosines, previous, head, at, weights);
}

// Where the gradients of a head's activated parameters go.
template <class T>
struct HeadGrads {
    T* key;    // [M]
    T* beta;   // [1]
    T* gate;   // [1]
    T* shift;  // [K]
    T* gamma;  // [1]
};

constexpr Index address_backward_scratch(Index N, Index K) { return ring_size(N, K) + 16; }

// Starts from the gradient of the weights, and overwrites it. grad_memory becomes grad_after plus the gradient that
// comes through this head; grad_after may be grad_memory itself, or nullptr for 0. If the head also reads the memory
// with these weights, grad_reads is the gradient of what it read.
template <class Team, class After, class Reads, class Given = std::nullptr_t, class T = typename Team::Real>
NTM_FN void address_backward(const Team& team, Index N, Index M, Index K, T eps, const T* memory, const T* previous,
                             const Head<T>& head, const T* weights /*[N]*/, T* grad_weights /*[N], overwritten*/,
                             Reads grad_reads /*[M] or nullptr*/, After grad_after /*[M, N] or nullptr*/,
                             T* grad_memory /*[M, N]*/, T* grad_previous /*[N]*/, const HeadGrads<T>& grads,
                             const Addressing<T>& at, Arena<T> arena /*of address_backward_scratch*/,
                             Given norms = nullptr /*Norms<T>* or nullptr*/) {
    T* grad_shifted = arena.take(ring_size(N, K)) + K / 2;
    auto cosines = [&](T norm) NTM_INLINE {
        with_norms(norms, [&](auto known) NTM_INLINE {
            cosine<known>(team, N, M, eps, norm, memory, head.key, at.cosine, at.inverse_norm, grad_reads,
                          grad_weights);
        });
    };
    const T norm = focus(team, N, M, K, eps, cosines, previous, head, at);
    sharpen_backward(team, N, at.shifted, head.gamma, weights, grad_weights, grad_shifted, grads.gamma);
    close_ring(team, N, K, grad_shifted);
    circular_shift_backward(team, N, K, at.gated, head.shift, grad_shifted, grad_weights, grads.shift);
    interpolate_backward(team, N, at.content, previous, head.gate, grad_weights, grad_weights, grad_previous,
                         grads.gate);
    content_backward(team, N, M, norm, memory, head.key, head.beta, at.content, at.cosine, at.inverse_norm,
                     grad_weights, grad_after, grad_memory, grads.key, grads.beta, grad_reads, weights);
}

// k = tanh(k^) or k^, after the clamp
template <class Team, class T = typename Team::Real>
NTM_FN void activate_vector(const Team& team, Index M, T clip, bool tanh, const T* raw, T* out) {
    using Math = typename Team::Math;
    team.tiles(M, [&](auto tile) NTM_INLINE {
        const auto x = clamp<Math>(tile.load(raw), clip);
        tile.store(out, tanh ? Math::tanh(x) : x);
    });
}

// grad, the activated vector's gradient, becomes the raw one's.
template <class Team, class T = typename Team::Real>
NTM_FN void activate_vector_backward(const Team& team, Index M, T clip, bool tanh, const T* raw, const T* activated,
                                     T* grad) {
    using Math = typename Team::Math;
    team.tiles(M, [&](auto tile) NTM_INLINE {
        const auto y = tile.load(activated), g = tile.load(grad);
        tile.store(grad, clamp_backward<Math>(tile.load(raw), clip, tanh ? g * (1 - y * y) : g));
    });
}

// The K + 3 raw parameters that follow a head's key (beta, g, s (K), gamma), each activated by softplus and by sigmoid.
// beta, g and gamma are picked from them. Activating the whole vector costs as much as one number.
template <class T>
struct Scalars {
    T *positive, *squashed;  // [K + 3]  softplus, sigmoid
};

// A head's raw parameters lie in the order k (M), beta, g, s (K), gamma.
template <class Team, class T = typename Team::Real>
NTM_PASS void activate_head(const Team& team, Index M, Index K, T clip, bool key_tanh, const T* raw, T* key /*[M]*/,
                            const Scalars<T>& scalars) {
    using Math = typename Team::Math;
    activate_vector(team, M, clip, key_tanh, raw, key);
    team.tiles(K + 3, [&](auto tile) NTM_INLINE {
        const auto x = clamp<Math>(tile.load(raw + M), clip);
        tile.store(scalars.positive, softplus<Math>(x));
        tile.store(scalars.squashed, sigmoid<Math>(x));
    });
}

template <class Team, class T = typename Team::Real>
NTM_PASS void activate_shift(const Team& team, Index M, Index K, T clip, const T* raw, T* shift /*[K]*/) {
    using Math = typename Team::Math;
    const T scale = T(log2_e);
    softmax(team, K, [&](auto tile) NTM_INLINE { return scale * clamp<Math>(tile.load(raw + M + 2), clip); },
            scale * clip, shift);
}

template <class T>
NTM_FN HeadGrads<T> head_grads(Index M, Index K, T* grad_raw) {
    return {grad_raw, grad_raw + M, grad_raw + M + 1, grad_raw + M + 2, grad_raw + M + 2 + K};
}

// grads, of the activated parameters, become those of the raw ones.
template <class Team, class T = typename Team::Real>
NTM_PASS void activate_head_backward(const Team& team, Index M, Index K, T clip, bool key_tanh, const T* raw,
                                     const Head<T>& head, const Scalars<T>& scalars, const HeadGrads<T>& grads) {
    using Math = typename Team::Math;
    team.sync();
    activate_vector_backward(team, M, clip, key_tanh, raw, head.key, grads.key);
    const T mean = dot(team, K, head.shift, grads.shift);
    team.tiles(K, [&](auto tile) NTM_INLINE {
        const auto g = tile.load(head.shift) * (tile.load(grads.shift) - mean);
        tile.store(grads.shift, clamp_backward<Math>(tile.load(raw + M + 2), clip, g));
    });
    team.one([&]() NTM_INLINE {
        // the derivative of softplus is sigmoid
        *grads.beta = clamp_backward<Math>(raw[M], clip, *grads.beta * scalars.squashed[0]);
        *grads.gate = clamp_backward<Math>(raw[M + 1], clip, *grads.gate * head.gate * (1 - head.gate));
        *grads.gamma = clamp_backward<Math>(raw[M + 2 + K], clip, *grads.gamma * scalars.squashed[K + 2]);
    });
}

// A write head's raw erase and add vectors lie one after the other, e (M), a (M).
template <class Team, class T = typename Team::Real>
NTM_PASS void activate_write(const Team& team, Index M, T clip, bool add_tanh, const T* raw, T* erase /*[M]*/,
                             T* add /*[M]*/) {
    using Math = typename Team::Math;
    team.tiles(M, [&](auto tile) NTM_INLINE { tile.store(erase, sigmoid<Math>(clamp<Math>(tile.load(raw), clip))); });
    activate_vector(team, M, clip, add_tanh, raw + M, add);
}

template <class Team, class T = typename Team::Real>
NTM_PASS void activate_write_backward(const Team& team, Index M, T clip, bool add_tanh, const T* raw, const T* erase,
                                      const T* add, T* grad) {
    using Math = typename Team::Math;
    team.tiles(M, [&](auto tile) NTM_INLINE {
        const auto e = tile.load(erase);
        tile.store(grad, clamp_backward<Math>(tile.load(raw), clip, tile.load(grad) * e * (1 - e)));
    });
    activate_vector_backward(team, M, clip, add_tanh, raw + M, add, grad + M);
}

}  // namespace ntm
