// What every operator does for one of its items: a batch element, or one head of it where heads do not meet in a
// gradient. Launchers share the items out over teams.
//
// The members are the parameters of the operator's entry in operators.h, in its order, and
//
//   items()          how many there are
//   width()          the numbers that the widest tiles() of an item goes over
//   cost()           the numbers that an item touches
//   scratch(staged)  the scratch of an item, in numbers, with what a staged team keeps there
//   team(team, i, arena)   does the work
#pragma once

#include "core/controller.h"
#include "core/step.h"

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

template <class T>
struct EraseAddWrite {
    using Real = T;
    static constexpr const char* name = "erase_add_write";
    Size B, H, N, M;
    const T *memory, *weights, *erase, *add;
    T* written;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return H * N * M; }
    constexpr Size scratch(bool staged) const { return staged * room(H * M, H * M); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T> arena) const {
        const T *e = team.in(arena, erase + b * H * M, H * M), *a = team.in(arena, add + b * H * M, H * M);
        team.sync();
        write(team, H, N, M, memory + b * M * N, weights + b * H * N, e, a, written + b * M * N);
    }
};

template <class T>
struct EraseAddWriteBackward {
    using Real = T;
    static constexpr const char* name = "erase_add_write_backward";
    Size B, H, N, M;
    const T *memory, *weights, *erase, *add, *grad_written;
    T *grad_memory, *grad_weights, *grad_erase, *grad_add;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return 3 * H * N * M; }
    constexpr Size scratch(bool staged) const { return staged * room(H * M, H * M, H * N, H * N); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T> arena) const {
        const T *e = team.in(arena, erase + b * H * M, H * M), *a = team.in(arena, add + b * H * M, H * M);
        const T* w = team.in(arena, weights + b * H * N, H * N);
        T* dw = team.out(arena, grad_weights + b * H * N, H * N);
        clear(team, H * N, dw);
        team.sync();
        write_backward(team, H, N, M, memory + b * M * N, w, e, a, grad_written + b * M * N, grad_memory + b * M * N,
                       dw, grad_erase + b * H * M, grad_add + b * H * M, M);
        team.sync();
        team.put(H * N, dw, grad_weights + b * H * N);
    }
};

template <class T>
struct Read {
    using Real = T;
    static constexpr const char* name = "read";
    Size B, H, N, M;
    const T *memory, *weights;
    T* reads;

    constexpr Size items() const { return B * H; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return N * M; }
    constexpr Size scratch(bool staged) const { return staged * room(N); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size i, Arena<T> arena) const {
        const T* w = team.in(arena, weights + i * N, N);
        team.sync();
        read(team, N, M, memory + i / H * M * N, w, reads + i * M);
    }
};

template <class T>
struct ReadBackward {
    using Real = T;
    static constexpr const char* name = "read_backward";
    Size B, H, N, M;
    const T *memory, *weights, *grad_reads;
    T *grad_memory, *grad_weights;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return N; }
    constexpr Size cost() const { return 2 * H * N * M; }
    constexpr Size scratch(bool staged) const { return staged * room(H * M); }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T> arena) const {
        const T* dr = team.in(arena, grad_reads + b * H * M, H * M);
        T* dM = grad_memory + b * M * N;
        team.sync();
        auto head = [&](Size h, auto grad_after) NTM_INLINE {
            const Size i = b * H + h;
            read_backward(team, N, M, memory + b * M * N, weights + i * N, dr + h * M, grad_after, dM,
                          grad_weights + i * N);
        };
        head(0, nullptr);
        for (Size h = 1; h < H; ++h) head(h, static_cast<const T*>(dM));
    }
};

template <class T>
struct MemoryStep {
    using Real = T;
    static constexpr const char* name = "memory_step";
    StepSizes s;
    StepOptions o;
    const T *memory, *read_weights, *write_weights, *params;
    T *reads, *new_memory, *new_read_weights, *new_write_weights;

    constexpr Size items() const { return s.B; }
    constexpr Size width() const { return s.N; }
    constexpr Size cost() const { return 3 * (s.R + s.W) * s.memory(); }
    constexpr Size scratch(bool staged) const {
        return room(s.forward_scratch()) + staged * room(s.memory(), s.params(), s.R * s.N, s.W * s.N);
    }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T> arena) const {
        const Size MN = s.memory(), RN = s.R * s.N, WN = s.W * s.N, RM = s.R * s.M, P = s.params();
        T* own = arena.take(s.forward_scratch());
        const T *before = team.in(arena, memory + b * MN, MN), *raw = team.in(arena, params + b * P, P);
        // A staged memory is rewritten where it is.
        T* after = Team::staged ? const_cast<T*>(before) : new_memory + b * MN;
        T* rw = team.out(arena, new_read_weights + b * RN, RN);
        T* ww = team.out(arena, new_write_weights + b * WN, WN);
        team.sync();
        memory_step(team, s, o, before, read_weights + b * RN, write_weights + b * WN, raw, reads + b * RM, after, rw,
                    ww, own);
        team.sync();
        team.put(MN, after, new_memory + b * MN);
        team.put(RN, rw, new_read_weights + b * RN);
        team.put(WN, ww, new_write_weights + b * WN);
    }
};

template <class T>
struct MemoryStepBackward {
    using Real = T;
    static constexpr const char* name = "memory_step_backward";
    StepSizes s;
    StepOptions o;
    const T *memory, *read_weights, *write_weights, *params, *new_memory, *new_read_weights, *new_write_weights;
    const T *grad_reads, *grad_new_memory, *grad_new_read_weights, *grad_new_write_weights;
    T *grad_memory, *grad_read_weights, *grad_write_weights, *grad_params;

    constexpr Size items() const { return s.B; }
    constexpr Size width() const { return s.N; }
    constexpr Size cost() const { return 8 * (s.R + s.W) * s.memory(); }
    constexpr Size scratch(bool staged) const {
        const Size MN = s.memory(), P = s.params();
        return room(s.backward_scratch()) + staged * room(MN, MN, MN, P, P, s.R * s.N, s.W * s.N, s.R * s.M);
    }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T> arena) const {
        const Size MN = s.memory(), RN = s.R * s.N, WN = s.W * s.N, RM = s.R * s.M, P = s.params();
        T* own = arena.take(s.backward_scratch());
        const T *before = team.in(arena, memory + b * MN, MN), *after = team.in(arena, new_memory + b * MN, MN);
        // The gradient of a staged memory changes where it is.
        const T* grad_after = team.in(arena, grad_new_memory + b * MN, MN);
        T* dM = Team::staged ? const_cast<T*>(grad_after) : grad_memory + b * MN;
        const T *raw = team.in(arena, params + b * P, P), *dr = team.in(arena, grad_reads + b * RM, RM);
        const T* rw = team.in(arena, new_read_weights + b * RN, RN);
        const T* ww = team.in(arena, new_write_weights + b * WN, WN);
        T* grad_raw = team.out(arena, grad_params + b * P, P);
        team.sync();
        memory_step_backward(team, s, o, before, read_weights + b * RN, write_weights + b * WN, raw, after, rw, ww, dr,
                             grad_after, grad_new_read_weights + b * RN, grad_new_write_weights + b * WN, dM,
                             grad_read_weights + b * RN, grad_write_weights + b * WN, grad_raw, own);
        team.sync();
        team.put(MN, dM, grad_memory + b * MN);
        team.put(P, grad_raw, grad_params + b * P);
    }
};

template <class T>
struct LSTMGates {
    using Real = T;
    static constexpr const char* name = "lstm_gates";
    Size B, H;
    const T *gates, *cell;
    T *hidden, *new_cell;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return H; }
    constexpr Size cost() const { return 20 * H; }
    constexpr Size scratch(bool) const { return 0; }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T>) const {
        lstm_gates(team, H, gates + 4 * b * H, cell + b * H, hidden + b * H, new_cell + b * H);
    }
};

template <class T>
struct LSTMGatesBackward {
    using Real = T;
    static constexpr const char* name = "lstm_gates_backward";
    Size B, H;
    const T *gates, *cell, *new_cell, *grad_hidden, *grad_new_cell;
    T *grad_gates, *grad_cell;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return H; }
    constexpr Size cost() const { return 20 * H; }
    constexpr Size scratch(bool) const { return 0; }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T>) const {
        lstm_gates_backward(team, H, gates + 4 * b * H, cell + b * H, new_cell + b * H, grad_hidden + b * H,
                            grad_new_cell + b * H, grad_gates + 4 * b * H, grad_cell + b * H);
    }
};

template <class T>
struct GRUGates {
    using Real = T;
    static constexpr const char* name = "gru_gates";
    Size B, H;
    const T *input_gates, *hidden_gates, *hidden;
    T* new_hidden;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return H; }
    constexpr Size cost() const { return 20 * H; }
    constexpr Size scratch(bool) const { return 0; }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T>) const {
        gru_gates(team, H, input_gates + 3 * b * H, hidden_gates + 3 * b * H, hidden + b * H, new_hidden + b * H);
    }
};

template <class T>
struct GRUGatesBackward {
    using Real = T;
    static constexpr const char* name = "gru_gates_backward";
    Size B, H;
    const T *input_gates, *hidden_gates, *hidden, *grad_new_hidden;
    T *grad_input_gates, *grad_hidden_gates, *grad_hidden;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return H; }
    constexpr Size cost() const { return 20 * H; }
    constexpr Size scratch(bool) const { return 0; }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T>) const {
        gru_gates_backward(team, H, input_gates + 3 * b * H, hidden_gates + 3 * b * H, hidden + b * H,
                           grad_new_hidden + b * H, grad_input_gates + 3 * b * H, grad_hidden_gates + 3 * b * H,
                           grad_hidden + b * H);
    }
};

}  // namespace ntm
