// The memory step of all heads. core/element.h tells what an operator is.
#pragma once

#include "core/step.h"

namespace ntm {

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

}  // namespace ntm
