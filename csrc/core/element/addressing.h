// Content addressing and the whole addressing of a head. core/element.h tells what an operator is.
#pragma once

#include "core/head.h"

namespace ntm {

template <class T>
struct ContentAddressing {
    using Real = T;
    static constexpr const char* name = "content_addressing";
    Size B, H, N, M;
    double eps;
    const T *memory, *key, *beta;
    T* content;

    constexpr Size items() const { return B * H; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return N * M; }
    constexpr Size scratch(bool staged) const { return room(N, N) + staged * room(M, N); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size i, Arena<T> arena) const {
        T *cosines = arena.take(N), *inverse_norm = arena.take(N), *out = team.out(arena, content + i * N, N);
        const T* k = team.in(arena, key + i * M, M);
        team.sync();
        const T norm = key_norm(team, M, T(eps), k);
        cosine(team, N, M, T(eps), norm, memory + i / H * M * N, k, cosines, inverse_norm);
        content_weights(team, N, beta[i], cosines, out);
        team.sync();
        team.put(N, out, content + i * N);
    }
};

template <class T>
struct ContentAddressingBackward {
    using Real = T;
    static constexpr const char* name = "content_addressing_backward";
    Size B, H, N, M;
    double eps;
    const T *memory, *key, *beta, *content, *grad_content;
    T *grad_memory, *grad_key, *grad_beta;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return H * N * M; }
    constexpr Size scratch(bool staged) const { return room(N, N, N) + staged * room(M * N, H * M); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T> arena) const {
        T *cosines = arena.take(N), *inverse_norm = arena.take(N), *grad = arena.take(N);
        const T* memory_b = team.in(arena, memory + b * M * N, M * N);
        const T* keys = team.in(arena, key + b * H * M, H * M);
        T* dM = grad_memory + b * M * N;
        team.sync();
        auto head = [&](Size h, auto grad_after) NTM_INLINE {
            const Size i = b * H + h;
            const T* k = keys + h * M;
            const T norm = key_norm(team, M, T(eps), k);
            cosine(team, N, M, T(eps), norm, memory_b, k, cosines, inverse_norm);
            copy(team, N, grad_content + i * N, grad);
            content_backward(team, N, M, norm, memory_b, k, beta[i], content + i * N, cosines, inverse_norm, grad,
                             grad_after, dM, grad_key + i * M, grad_beta + i);
        };
        head(0, nullptr);
        for (Size h = 1; h < H; ++h) head(h, static_cast<const T*>(dM));
    }
};

template <class T>
struct Address {
    using Real = T;
    static constexpr const char* name = "address";
    Size B, H, N, M, K;
    double eps;
    const T *memory, *previous, *key, *beta, *gate, *shift, *gamma;
    T* weights;

    constexpr Size items() const { return B * H; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return N * M; }
    constexpr Size scratch(bool staged) const { return Addressing<T>::scratch(N, K) + staged * room(M, K, N); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size i, Arena<T> arena) const {
        const Addressing<T> at(arena, N, K);
        const T *k = team.in(arena, key + i * M, M), *s = team.in(arena, shift + i * K, K);
        T* out = team.out(arena, weights + i * N, N);
        team.sync();
        const Head<T> head = {k, s, beta[i], gate[i], gamma[i]};
        address(team, N, M, K, T(eps), memory + i / H * M * N, previous + i * N, head, at, out);
        team.sync();
        team.put(N, out, weights + i * N);
    }
};

template <class T>
struct AddressBackward {
    using Real = T;
    static constexpr const char* name = "address_backward";
    Size B, H, N, M, K;
    double eps;
    const T *memory, *previous, *key, *beta, *gate, *shift, *gamma, *weights, *grad_weights;
    T *grad_memory, *grad_previous, *grad_key, *grad_beta, *grad_gate, *grad_shift, *grad_gamma;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return 3 * H * N * M; }
    constexpr Size scratch(bool staged) const {
        return Addressing<T>::scratch(N, K) + address_backward_scratch(N, K) + room(N) +
               staged * room(M * N, H * M, H * K);
    }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T> arena) const {
        const Addressing<T> at(arena, N, K);
        T* grad = arena.take(N);
        const T* memory_b = team.in(arena, memory + b * M * N, M * N);
        const T *keys = team.in(arena, key + b * H * M, H * M), *shifts = team.in(arena, shift + b * H * K, H * K);
        T* dM = grad_memory + b * M * N;
        team.sync();
        auto through_head = [&](Size h, auto grad_after) NTM_INLINE {
            const Size i = b * H + h;
            const Head<T> head = {keys + h * M, shifts + h * K, beta[i], gate[i], gamma[i]};
            const HeadGrads<T> grads = {grad_key + i * M, grad_beta + i, grad_gate + i, grad_shift + i * K,
                                        grad_gamma + i};
            copy(team, N, grad_weights + i * N, grad);
            address_backward(team, N, M, K, T(eps), memory_b, previous + i * N, head, weights + i * N, grad, nullptr,
                             grad_after, dM, grad_previous + i * N, grads, at, arena);
            team.sync();
        };
        through_head(0, nullptr);
        for (Size h = 1; h < H; ++h) through_head(h, static_cast<const T*>(dM));
    }
};

}  // namespace ntm
