// One memory step of one batch element: every head addresses, the write heads write, the read heads read.
#pragma once

#include "core/head.h"
#include "core/read.h"
#include "core/write.h"

namespace ntm {

// The options of a step.
struct StepOptions {
    int read_first = 0;  // read heads address and read M_{t-1} instead of M_t
    int key_tanh = 1;    // key activation: tanh, else identity
    int add_tanh = 1;    // add activation: tanh, else identity
    double clip = 20.0;  // raw parameters are clamped to +-clip; infinity switches it off
    double eps = 1e-8;   // added, squared, to the squared norms of the cosine

    // The members' names in Python. Every struct that comes from Python has such a list.
    static constexpr const char* names = "read_first key_tanh add_tanh clip eps";
};

// R read and W write heads, N locations, M width, K = 2S+1 shifts.
struct StepSizes {
    Size B;
    Index R, W, N, M, K;

    static constexpr const char* names = "B R W N M K";

    // Raw parameters of one head, and of one element: read heads, write heads, then e and a of every write head.
    constexpr Index head() const { return M + K + 3; }
    constexpr Index write_params() const { return (R + W) * head(); }  // where e and a begin
    constexpr Index params() const { return write_params() + 2 * W * M; }

    constexpr Size memory() const { return Size(M) * N; }

    // The number of a step's activated parameters, of all heads.
    constexpr Index active() const { return (R + W) * (M + K + 2 * (K + 3)) + 2 * W * M; }

    // Scratch of one element. Maybe more than an arena takes, but a simple sum: a GPU recomputes it and needs no
    // register.
    constexpr Size forward_scratch() const {
        return Size(active()) + 6 * 16 + Addressing<float>::scratch(N, K);
    }
    constexpr Size backward_scratch() const {
        return forward_scratch() + address_backward_scratch(N, K) + (N + 16) + Size(W) * (N + 16);
    }
};

// Every head's activated parameters. All are activated before anything else is done, because none depends on another.
template <class T>
struct Activated {
    T* key;              // [R+W, M]
    T* shift;            // [R+W, K]
    Scalars<T> scalars;  // [R+W, K+3]
    T* erase;            // [W, M]
    T* add;              // [W, M]

    // take(n) gives a place for n of these numbers.
    template <class Take>
    NTM_FN Activated(const StepSizes& s, Take&& take)
        : key(take((s.R + s.W) * s.M)),
          shift(take((s.R + s.W) * s.K)),
          scalars{take((s.R + s.W) * (s.K + 3)), take((s.R + s.W) * (s.K + 3))},
          erase(take(s.W * s.M)),
          add(take(s.W * s.M)) {}

    template <class Team>
    NTM_FN void activate(const Team& team, const StepSizes& s, const StepOptions& o, const T* params) const {
        for (Index h = 0; h < s.R + s.W; ++h) {
            const T* raw = params + h * s.head();
            activate_head(team, s.M, s.K, T(o.clip), o.key_tanh, raw, key + h * s.M, of(s, h));
            activate_shift(team, s.M, s.K, T(o.clip), raw, shift + h * s.K);
        }
        write_vectors(team, s, o, params);
        team.sync();
    }

    // e and a of every write head
    template <class Team>
    NTM_FN void write_vectors(const Team& team, const StepSizes& s, const StepOptions& o, const T* params) const {
        const T* raw = params + s.write_params();
        for (Index h = 0; h < s.W; ++h)
            activate_write(team, s.M, T(o.clip), o.add_tanh, raw + 2 * h * s.M, erase + h * s.M, add + h * s.M);
    }

    NTM_FN Head<T> head(const StepSizes& s, Index h) const {
        const Scalars<T> own = of(s, h);
        return {key + h * s.M, shift + h * s.K, own.positive[0], own.squashed[1], 1 + own.positive[s.K + 2]};
    }

    NTM_FN Scalars<T> of(const StepSizes& s, Index h) const {
        const Index first = h * (s.K + 3);
        return {scalars.positive + first, scalars.squashed + first};
    }
};

// Places the activated parameters at `given`, or in the arena if that is nullptr.
template <class T, class Given>
NTM_FN Activated<T> place_active(Arena<T>& arena, const StepSizes& s, Given given) {
    T* next = nullptr;
    if constexpr (present<Given>) next = const_cast<T*>(given);  // where it is const, nobody writes to it
    return Activated<T>(s, [&](Index count) NTM_INLINE {
        if constexpr (!present<Given>) return arena.take(count);
        next += count;
        return next - count;
    });
}

// Calls both, in the order asked for. It is a loop so that each is compiled once.
template <class Reads, class Writes>
NTM_FN void in_order(bool reads_first, Reads&& reads, Writes&& writes) {
    NTM_ROLLED
    for (int turn = 0; turn < 2; ++turn) {
        if (reads_first == (turn == 0))
            reads();
        else
            writes();
    }
}

// new_memory may be memory, and the new weights may be the old ones. left: a place for the activated parameters,
// active() numbers, which the backward can use; nullptr: they take scratch. norms: in, memory's if known; out,
// new_memory's if a head addressed it; nullptr if the caller keeps none.
template <class Team, class Left = std::nullptr_t, class Given = std::nullptr_t, class T = typename Team::Real>
NTM_FN void memory_step(const Team& team, const StepSizes& s, const StepOptions& o,
                        const T* memory,                                   // [M, N]
                        const T* read_weights, const T* write_weights,     // [R, N], [W, N]
                        const T* params,                                   // [P]
                        T* reads, T* new_memory,                           // [R, M], [M, N]
                        T* new_read_weights, T* new_write_weights,         // [R, N], [W, N]
                        T* scratch, Left left = nullptr, Given norms = nullptr) {
    Arena<T> arena{scratch};
    const Activated<T> active = place_active(arena, s, left);
    const Addressing<T> at(arena, s.N, s.K, norms);
    const Index N = s.N, M = s.M, K = s.K;
    const T eps = T(o.eps);
    // A single thread writes in the same pass in which the first read head computes its cosines to what is written.
    const bool writes_late = Team::alone && !o.read_first && s.R > 0;
    auto read_all = [&](const T* source) NTM_INLINE {
        for (Index h = 0; h < s.R; ++h) {
            const Head<T> head = active.head(s, h);
            const T* before = read_weights + h * N;
            if (writes_late && h == 0) {
                if constexpr (Team::alone) {
                    auto cosines = [&](T norm) NTM_INLINE {
                        write_cosine(team, s.W, N, M, memory, new_write_weights, active.erase, active.add, new_memory,
                                     eps, norm, head.key, at.cosine, at.inverse_norm);
                    };
                    address_by(team, N, M, K, eps, cosines, before, head, at, new_read_weights);
                    if constexpr (present<Given>) norms->known = true;
                }
            } else {
                address(team, N, M, K, eps, source, before, head, at, new_read_weights + h * N, norms);
            }
            read(team, N, M, source, new_read_weights + h * N, reads + h * M);
        }
    };
    auto write_all = [&]() NTM_INLINE {
        for (Index h = 0; h < s.W; ++h) {
            const Head<T> head = active.head(s, s.R + h);
            address(team, N, M, K, eps, memory, write_weights + h * N, head, at, new_write_weights + h * N, norms);
        }
        if (!writes_late)
            write(team, s.W, N, M, memory, new_write_weights, active.erase, active.add, new_memory);
        if constexpr (present<Given>) norms->known = false;
    };
    active.activate(team, s, o, params);
    in_order(o.read_first, [&]() NTM_INLINE { read_all(o.read_first ? memory : new_memory); }, write_all);
}

// Recomputes what lies between the inputs and the outputs, and walks back. grad_memory may be grad_new_memory, and the
// gradients of the weights may be those of the new weights. left: the activated parameters, as forward left them, or
// nullptr. norms: in, new_memory's if known; out, memory's; nullptr if the caller keeps none.
template <class Team, class Left = std::nullptr_t, class Given = std::nullptr_t, class T = typename Team::Real>
NTM_FN void memory_step_backward(const Team& team, const StepSizes& s, const StepOptions& o, const T* memory,
                                 const T* read_weights, const T* write_weights, const T* params, const T* new_memory,
                                 const T* new_read_weights, const T* new_write_weights, const T* grad_reads,
                                 const T* grad_new_memory, const T* grad_new_read_weights,
                                 const T* grad_new_write_weights, T* grad_memory, T* grad_read_weights,
                                 T* grad_write_weights, T* grad_params, T* scratch, Left left = nullptr,
                                 Given norms = nullptr) {
    Arena<T> arena{scratch};
    const Activated<T> active = place_active(arena, s, left);
    const Addressing<T> at(arena, s.N, s.K, norms);
    T* grad_focus = arena.take(s.N);
    T* grad_written = arena.take(s.W * s.N);
    const Index N = s.N, M = s.M, K = s.K;
    const T clip = T(o.clip), eps = T(o.eps);

    // dM is the gradient of M_t on its way back to M_{t-1}. After the first pass over it, it is in grad_memory.
    const T* dM = grad_new_memory;
    auto through_head = [&](Index h, const T* source, const T* previous, const T* weights, T* grad_weights,
                            auto grad_read, T* grad_previous) NTM_INLINE {
        const Head<T> head = active.head(s, h);
        const HeadGrads<T> grads = head_grads(M, K, grad_params + h * s.head());
        address_backward(team, N, M, K, eps, source, previous, head, weights, grad_weights, grad_read, dM,
                         grad_memory, grad_previous, grads, at, arena, norms);
        dM = grad_memory;
        activate_head_backward(team, M, K, clip, o.key_tanh, params + h * s.head(), head, active.of(s, h), grads);
    };
    auto through_reads = [&](const T* source) NTM_INLINE {
        for (Index h = 0; h < s.R; ++h) {
            copy(team, N, grad_new_read_weights + h * N, grad_focus);
            through_head(h, source, read_weights + h * N, new_read_weights + h * N, grad_focus, grad_reads + h * M,
                         grad_read_weights + h * N);
        }
    };
    auto through_writes = [&]() NTM_INLINE {
        if constexpr (present<Given>) norms->known = false;
        for (Index h = 0; h < s.W; ++h) copy(team, N, grad_new_write_weights + h * N, grad_written + h * N);
        T* grad_erase = grad_params + s.write_params();  // e and a of a head lie one after the other: a stride of 2M
        write_backward(team, s.W, N, M, memory, new_write_weights, active.erase, active.add, dM, grad_memory,
                       grad_written, grad_erase, grad_erase + M, 2 * M);
        dM = grad_memory;
        team.sync();
        for (Index h = 0; h < s.W; ++h) {
            const Index at_write = s.write_params() + 2 * h * M;
            activate_write_backward(team, M, clip, o.add_tanh, params + at_write, active.erase + h * M,
                                    active.add + h * M, grad_params + at_write);
            through_head(s.R + h, memory, write_weights + h * N, new_write_weights + h * N, grad_written + h * N,
                         nullptr, grad_write_weights + h * N);
        }
    };
    if constexpr (!present<Left>) active.activate(team, s, o, params);
    in_order(!o.read_first, [&]() NTM_INLINE { through_reads(o.read_first ? memory : new_memory); }, through_writes);
}

}  // namespace ntm
