// The CPU launchers: parallel over the batch, and over the heads where these do not meet in a gradient. Compiled once
// per variant.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "core/sequence.h"
#include "cpu/product.h"
#include "cpu/thread.h"
#include "operators.h"

namespace ntm::cpu {
namespace {

constexpr Size grain = 8192;  // touched numbers that are worth a thread: some microseconds

// Calls f(team, i, scratch) for every item; cost is the numbers an item touches, scratch those it needs for itself.
template <class T, class F>
Error parallel(Size items, Size cost, Size scratch, const Launch& launch, F f) {
    if (items == 0) return nullptr;
    const Size threads = std::max<Size>(1, std::min({Size(launch.threads), items, items * cost / grain}));
    const Size piece = (scratch + 15) / 16 * 16;
    struct Aligned {
        void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    const std::unique_ptr<T[], Aligned> memory(
        static_cast<T*>(::operator new[](threads * piece * sizeof(T), std::align_val_t(64), std::nothrow)));
    if (!memory) return "ntm_fast: out of memory for the scratch of the CPU kernels";
    // One copy of the code, whether one thread runs it or several: in two, the compiler may fuse different products and
    // sums, and the answers would depend on the number of threads.
    auto share = [&](Size thread) __attribute__((noinline, noclone)) {
        T* own = memory.get() + thread * piece;
        for (Size i = items * thread / threads; i < items * (thread + 1) / threads; ++i) f(Thread<T>{}, i, own);
    };
    if (threads == 1) {
        share(0);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (Size thread = 0; thread < threads; ++thread) share(thread);
    }
    return nullptr;
}

template <class T>
Error content_addressing(Size B, Size H, Size N, Size M, double eps, const T* memory, const T* key, const T* beta,
                         T* content, Launch launch) {
    return parallel<T>(B * H, N * M, 2 * (N + 16), launch, [=](auto team, Size i, T* scratch) {
        Arena<T> arena{scratch};
        T *cosines = arena.take(N), *inverse_norm = arena.take(N);
        const T norm = key_norm(team, M, T(eps), key + i * M);
        cosine(team, N, M, T(eps), norm, memory + i / H * M * N, key + i * M, cosines, inverse_norm);
        softmax(team, N, beta[i], cosines, content + i * N);
    });
}

template <class T>
Error content_addressing_backward(Size B, Size H, Size N, Size M, double eps, const T* memory, const T* key,
                                  const T* beta, const T* content, const T* grad_content, T* grad_memory, T* grad_key,
                                  T* grad_beta, Launch launch) {
    return parallel<T>(B, H * N * M, 3 * (N + 16), launch, [=](auto team, Size b, T* scratch) {
        Arena<T> arena{scratch};
        T *cosines = arena.take(N), *inverse_norm = arena.take(N), *grad = arena.take(N);
        T* dM = grad_memory + b * M * N;
        std::fill_n(dM, M * N, T(0));
        for (Size i = b * H; i < (b + 1) * H; ++i) {
            const T norm = key_norm(team, M, T(eps), key + i * M);
            cosine(team, N, M, T(eps), norm, memory + b * M * N, key + i * M, cosines, inverse_norm);
            std::copy_n(grad_content + i * N, N, grad);
            content_backward(team, N, M, norm, memory + b * M * N, key + i * M, beta[i], content + i * N, cosines,
                             inverse_norm, grad, dM, dM, grad_key + i * M, grad_beta + i);
        }
    });
}

template <class T>
Error interpolate(Size B, Size H, Size N, const T* content, const T* previous, const T* gate, T* gated,
                  Launch launch) {
    return parallel<T>(B * H, 3 * N, 0, launch, [=](auto team, Size i, T*) {
        ntm::interpolate(team, N, content + i * N, previous + i * N, gate[i], gated + i * N);
    });
}

template <class T>
Error interpolate_backward(Size B, Size H, Size N, const T* content, const T* previous, const T* gate,
                           const T* grad_gated, T* grad_content, T* grad_previous, T* grad_gate, Launch launch) {
    return parallel<T>(B * H, 5 * N, 0, launch, [=](auto team, Size i, T*) {
        ntm::interpolate_backward(team, N, content + i * N, previous + i * N, gate[i], grad_gated + i * N,
                                  grad_content + i * N, grad_previous + i * N, grad_gate + i);
    });
}

// A copy of x, [N], as a ring
template <class Team, class T>
T* ring_of(const Team& team, Arena<T>& arena, Size N, Size K, const T* x) {
    T* ring = arena.take(ring_size(N, K)) + K / 2;
    std::copy_n(x, N, ring);
    close_ring(team, N, K, ring);
    return ring;
}

template <class T>
Error circular_shift(Size B, Size H, Size N, Size K, const T* weights, const T* shift, T* shifted, Launch launch) {
    return parallel<T>(B * H, K * N, ring_size(N, K) + 16, launch, [=](auto team, Size i, T* scratch) {
        Arena<T> arena{scratch};
        const T* ring = ring_of(team, arena, N, K, weights + i * N);
        ntm::circular_shift(team, N, K, ring, shift + i * K, shifted + i * N);
    });
}

template <class T>
Error circular_shift_backward(Size B, Size H, Size N, Size K, const T* weights, const T* shift, const T* grad_shifted,
                              T* grad_weights, T* grad_shift, Launch launch) {
    return parallel<T>(B * H, 2 * K * N, 2 * (ring_size(N, K) + 16), launch, [=](auto team, Size i, T* scratch) {
        Arena<T> arena{scratch};
        const T* ring = ring_of(team, arena, N, K, weights + i * N);
        const T* grad_ring = ring_of(team, arena, N, K, grad_shifted + i * N);
        ntm::circular_shift_backward(team, N, K, ring, shift + i * K, grad_ring, grad_weights + i * N,
                                     grad_shift + i * K);
    });
}

template <class T>
Error sharpen(Size B, Size H, Size N, const T* weights, const T* gamma, T* sharpened, Launch launch) {
    return parallel<T>(B * H, 8 * N, 0, launch, [=](auto team, Size i, T*) {
        ntm::sharpen(team, N, weights + i * N, gamma[i], sharpened + i * N);
    });
}

template <class T>
Error sharpen_backward(Size B, Size H, Size N, const T* weights, const T* gamma, const T* sharpened,
                       const T* grad_sharpened, T* grad_weights, T* grad_gamma, Launch launch) {
    return parallel<T>(B * H, 8 * N, 0, launch, [=](auto team, Size i, T*) {
        ntm::sharpen_backward(team, N, weights + i * N, gamma[i], sharpened + i * N, grad_sharpened + i * N,
                              grad_weights + i * N, grad_gamma + i);
    });
}

template <class T>
Error address(Size B, Size H, Size N, Size M, Size K, double eps, const T* memory, const T* previous, const T* key,
              const T* beta, const T* gate, const T* shift, const T* gamma, T* weights, Launch launch) {
    return parallel<T>(B * H, N * M, Addressing<T>::scratch(N, K), launch, [=](auto team, Size i, T* scratch) {
        Arena<T> arena{scratch};
        const Addressing<T> at(arena, N, K);
        const Head<T> head = {key + i * M, shift + i * K, beta[i], gate[i], gamma[i]};
        ntm::address(team, N, M, K, T(eps), memory + i / H * M * N, previous + i * N, head, at, weights + i * N);
    });
}

template <class T>
Error address_backward(Size B, Size H, Size N, Size M, Size K, double eps, const T* memory, const T* previous,
                       const T* key, const T* beta, const T* gate, const T* shift, const T* gamma, const T* weights,
                       const T* grad_weights, T* grad_memory, T* grad_previous, T* grad_key, T* grad_beta,
                       T* grad_gate, T* grad_shift, T* grad_gamma, Launch launch) {
    const Size scratch_size = Addressing<T>::scratch(N, K) + address_backward_scratch(N, K) + N + 16;
    return parallel<T>(B, 3 * H * N * M, scratch_size, launch, [=](auto team, Size b, T* scratch) {
        Arena<T> arena{scratch};
        const Addressing<T> at(arena, N, K);
        T *grad = arena.take(N), *dM = grad_memory + b * M * N;
        std::fill_n(dM, M * N, T(0));
        for (Size i = b * H; i < (b + 1) * H; ++i) {
            const Head<T> head = {key + i * M, shift + i * K, beta[i], gate[i], gamma[i]};
            const HeadGrads<T> grads = {grad_key + i * M, grad_beta + i, grad_gate + i, grad_shift + i * K,
                                        grad_gamma + i};
            std::copy_n(grad_weights + i * N, N, grad);
            ntm::address_backward(team, N, M, K, T(eps), memory + b * M * N, previous + i * N, head, weights + i * N,
                                  grad, static_cast<const T*>(nullptr), dM, dM, grad_previous + i * N, grads, at,
                                  arena);
        }
    });
}

template <class T>
Error erase_add_write(Size B, Size H, Size N, Size M, const T* memory, const T* weights, const T* erase, const T* add,
                      T* written, Launch launch) {
    return parallel<T>(B, H * N * M, 0, launch, [=](auto team, Size b, T*) {
        ntm::write(team, H, N, M, memory + b * M * N, weights + b * H * N, erase + b * H * M, add + b * H * M,
                   written + b * M * N);
    });
}

template <class T>
Error erase_add_write_backward(Size B, Size H, Size N, Size M, const T* memory, const T* weights, const T* erase,
                               const T* add, const T* grad_written, T* grad_memory, T* grad_weights, T* grad_erase,
                               T* grad_add, Launch launch) {
    return parallel<T>(B, 3 * H * N * M, 0, launch, [=](auto team, Size b, T*) {
        std::fill_n(grad_weights + b * H * N, H * N, T(0));
        ntm::write_backward(team, H, N, M, memory + b * M * N, weights + b * H * N, erase + b * H * M,
                            add + b * H * M, grad_written + b * M * N, grad_memory + b * M * N,
                            grad_weights + b * H * N, grad_erase + b * H * M, grad_add + b * H * M, M);
    });
}

template <class T>
Error read(Size B, Size H, Size N, Size M, const T* memory, const T* weights, T* reads, Launch launch) {
    return parallel<T>(B * H, N * M, 0, launch, [=](auto team, Size i, T*) {
        ntm::read(team, N, M, memory + i / H * M * N, weights + i * N, reads + i * M);
    });
}

template <class T>
Error read_backward(Size B, Size H, Size N, Size M, const T* memory, const T* weights, const T* grad_reads,
                    T* grad_memory, T* grad_weights, Launch launch) {
    return parallel<T>(B, 2 * H * N * M, 0, launch, [=](auto team, Size b, T*) {
        std::fill_n(grad_memory + b * M * N, M * N, T(0));
        for (Size i = b * H; i < (b + 1) * H; ++i)
            ntm::read_backward(team, N, M, memory + b * M * N, weights + i * N, grad_reads + i * M,
                               grad_memory + b * M * N, grad_weights + i * N);
    });
}

template <class T>
Error memory_step(StepSizes s, StepOptions o, const T* memory, const T* read_weights, const T* write_weights,
                  const T* params, T* reads, T* new_memory, T* new_read_weights, T* new_write_weights, Launch launch) {
    const Size MN = s.M * s.N, RN = s.R * s.N, WN = s.W * s.N, RM = s.R * s.M, P = s.params();
    return parallel<T>(s.B, 3 * (s.R + s.W) * MN, s.forward_scratch(), launch, [=](auto team, Size b, T* scratch) {
        ntm::memory_step(team, s, o, memory + b * MN, read_weights + b * RN, write_weights + b * WN, params + b * P,
                         reads + b * RM, new_memory + b * MN, new_read_weights + b * RN, new_write_weights + b * WN,
                         scratch);
    });
}

template <class T>
Error memory_step_backward(StepSizes s, StepOptions o, const T* memory, const T* read_weights, const T* write_weights,
                           const T* params, const T* new_memory, const T* new_read_weights,
                           const T* new_write_weights, const T* grad_reads, const T* grad_new_memory,
                           const T* grad_new_read_weights, const T* grad_new_write_weights, T* grad_memory,
                           T* grad_read_weights, T* grad_write_weights, T* grad_params, Launch launch) {
    const Size MN = s.M * s.N, RN = s.R * s.N, WN = s.W * s.N, RM = s.R * s.M, P = s.params();
    return parallel<T>(s.B, 8 * (s.R + s.W) * MN, s.backward_scratch(), launch, [=](auto team, Size b, T* scratch) {
        ntm::memory_step_backward(team, s, o, memory + b * MN, read_weights + b * RN, write_weights + b * WN,
                                  params + b * P, new_memory + b * MN, new_read_weights + b * RN,
                                  new_write_weights + b * WN, grad_reads + b * RM, grad_new_memory + b * MN,
                                  grad_new_read_weights + b * RN, grad_new_write_weights + b * WN,
                                  grad_memory + b * MN, grad_read_weights + b * RN, grad_write_weights + b * WN,
                                  grad_params + b * P, scratch);
    });
}

template <class T>
Error lstm_gates(Size B, Size H, const T* gates, const T* cell, T* hidden, T* new_cell, Launch launch) {
    return parallel<T>(B, 20 * H, 0, launch, [=](auto team, Size b, T*) {
        ntm::lstm_gates(team, H, gates + 4 * b * H, cell + b * H, hidden + b * H, new_cell + b * H);
    });
}

template <class T>
Error lstm_gates_backward(Size B, Size H, const T* gates, const T* cell, const T* new_cell, const T* grad_hidden,
                          const T* grad_new_cell, T* grad_gates, T* grad_cell, Launch launch) {
    return parallel<T>(B, 20 * H, 0, launch, [=](auto team, Size b, T*) {
        ntm::lstm_gates_backward(team, H, gates + 4 * b * H, cell + b * H, new_cell + b * H, grad_hidden + b * H,
                                 grad_new_cell + b * H, grad_gates + 4 * b * H, grad_cell + b * H);
    });
}

template <class T>
Error gru_gates(Size B, Size H, const T* x, const T* y, const T* hidden, T* new_hidden, Launch launch) {
    return parallel<T>(B, 20 * H, 0, launch, [=](auto team, Size b, T*) {
        ntm::gru_gates(team, H, x + 3 * b * H, y + 3 * b * H, hidden + b * H, new_hidden + b * H);
    });
}

template <class T>
Error gru_gates_backward(Size B, Size H, const T* x, const T* y, const T* hidden, const T* grad_new_hidden, T* grad_x,
                         T* grad_y, T* grad_hidden, Launch launch) {
    return parallel<T>(B, 20 * H, 0, launch, [=](auto team, Size b, T*) {
        ntm::gru_gates_backward(team, H, x + 3 * b * H, y + 3 * b * H, hidden + b * H, grad_new_hidden + b * H,
                                grad_x + 3 * b * H, grad_y + 3 * b * H, grad_hidden + b * H);
    });
}

constexpr Size sequence_tile = 8;  // elements that share a pass over the weights

// A thread with the product that a sequence needs
template <class T>
struct SequenceThread : Thread<T> {
    void product(Size E, Size K, Size C, const T* in, const T* packed, T* out) const {
        cpu::product(E, K, C, in, packed, out);
    }
};

// The weights of a whole sequence, packed for one direction
template <class T>
struct PackedSequence {
    std::vector<T> storage;
    std::vector<LayerWeights<T>> layers;
    SequenceWeights<T> weights;

    PackedSequence(const SequenceSizes& s, const T* raw, bool backward) {
        const Size G = s.gates(), P = s.step.params();
        auto size = [&](Size inputs, Size outputs) {
            return backward ? packed_size<T>(outputs, inputs) : packed_size<T>(inputs, outputs);
        };
        Size total = size(s.H, P);
        for (Size l = 0; l < s.L; ++l)
            total += s.gru ? size(s.fed(l), G) + size(s.H, G) : size(s.joined(l), G);
        storage.resize(total);
        T* next = storage.data();
        // A weight is stored [outputs, inputs], as torch does.
        auto take = [&](Size inputs, Size outputs) {
            T* packed = next;
            if (backward)
                pack(outputs, inputs, raw, inputs, 1, packed);
            else
                pack(inputs, outputs, raw, 1, inputs, packed);
            next += size(inputs, outputs);
            raw += inputs * outputs;
            return packed;
        };
        for (Size l = 0; l < s.L; ++l) {
            const T* fed = take(s.gru ? s.fed(l) : s.joined(l), G);
            const T* hidden = s.gru ? take(s.H, G) : nullptr;
            layers.push_back({fed, hidden, raw, raw + G});
            raw += 2 * G;
        }
        const T* heads = take(s.H, P);
        weights = {layers.data(), heads, raw};
    }
};

// Calls f(team, first, count, scratch) for tiles of the batch, of nearly the same size, as many on every thread.
template <class T, class F>
Error sequence_tiles(const SequenceSizes& s, Size scratch, const Launch& launch, F f) {
    if (s.B == 0) return nullptr;
    const Size threads = std::min<Size>(launch.threads, s.B);
    const Size per_thread = (s.B + threads - 1) / threads;
    const Size tiles = std::min(s.B, threads * ((per_thread + sequence_tile - 1) / sequence_tile));
    return parallel<T>(tiles, grain, scratch, launch, [=](auto, Size i, T* own) {
        const Size first = s.B * i / tiles, end = s.B * (i + 1) / tiles;
        f(SequenceThread<T>{}, first, end - first, own);
    });
}

template <class T>
Error sequence(SequenceSizes s, StepOptions o, int keep, const T* weights, T* memory, T* read_weights,
               T* write_weights, T* reads, T* hidden, T* cell, T* x, T* y, T* lower_hidden, T* all_cell, T* params,
               T* features, T* all_read_weights, T* all_write_weights, T* all_memory, Launch launch) {
    const PackedSequence<T> packed(s, weights, false);
    const SequenceState<T> state = {memory, read_weights, write_weights, reads, hidden, cell};
    const SequenceTrail<T> trail = {x,        y,                lower_hidden,      all_cell,  params,
                                    features, all_read_weights, all_write_weights, all_memory};
    const Size scratch_size = sequence_scratch(s, std::min(s.B, sequence_tile));
    return sequence_tiles<T>(s, scratch_size, launch, [&](auto team, Size first, Size count, T* scratch) {
        ntm::sequence(team, s, o, first, count, keep != 0, packed.weights, state, trail, scratch);
    });
}

template <class T>
Error sequence_backward(SequenceSizes s, StepOptions o, const T* weights, const T* memory, const T* read_weights,
                        const T* write_weights, const T* hidden, const T* cell, const T* final_memory, const T* x,
                        const T* y, const T* lower_hidden, const T* all_cell, const T* params, const T* features,
                        const T* all_read_weights, const T* all_write_weights, const T* all_memory,
                        const T* grad_features, T* grad_memory, T* grad_read_weights,
                        T* grad_write_weights, T* grad_state_reads, T* grad_state_hidden, T* grad_state_cell,
                        T* grad_x, T* grad_y, T* grad_params, Launch launch) {
    const PackedSequence<T> packed(s, weights, true);
    const SequenceState<const T> initial = {memory, read_weights, write_weights, nullptr, hidden, cell};
    const SequenceTrail<const T> trail = {x,        y,                lower_hidden,      all_cell,  params,
                                          features, all_read_weights, all_write_weights, all_memory};
    const SequenceState<T> grad = {grad_memory,      grad_read_weights, grad_write_weights,
                                   grad_state_reads, grad_state_hidden, grad_state_cell};
    const SequenceGrads<T> out = {grad_x, grad_y, grad_params};
    const Size scratch_size = sequence_backward_scratch(s, std::min(s.B, sequence_tile));
    return sequence_tiles<T>(s, scratch_size, launch, [&](auto team, Size first, Size count, T* scratch) {
        ntm::sequence_backward(team, s, o, first, count, packed.weights, initial, final_memory, trail,
                               grad_features, grad, out, scratch);
    });
}

template <class T>
constexpr Operators<T> operators() {
    return {content_addressing<T>, content_addressing_backward<T>,
            interpolate<T>,        interpolate_backward<T>,
            circular_shift<T>,     circular_shift_backward<T>,
            sharpen<T>,            sharpen_backward<T>,
            address<T>,            address_backward<T>,
            erase_add_write<T>,    erase_add_write_backward<T>,
            read<T>,               read_backward<T>,
            memory_step<T>,        memory_step_backward<T>,
            lstm_gates<T>,         lstm_gates_backward<T>,
            gru_gates<T>,          gru_gates_backward<T>,
            sequence<T>,           sequence_backward<T>};
}

const Backend backend = {NTM_VARIANT, operators<float>(), operators<double>()};

}  // namespace
}  // namespace ntm::cpu

extern "C" const ntm::Backend* ntm_backend() { return &ntm::cpu::backend; }
