// Writing and reading. core/element.h tells what an operator is.
#pragma once

#include "core/read.h"
#include "core/write.h"

namespace ntm {

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

}  // namespace ntm
