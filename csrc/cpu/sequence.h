// Whole sequences: a thread takes a tile of elements through all steps.
#pragma once

#include <algorithm>

#include "core/sequence.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/weights.h"
#include "operators.h"

namespace ntm::cpu {
namespace {

// Memories of an element that a step works on: forward one; backward those before and after the step, and the gradient.
constexpr Size forward_memories = 1, backward_memories = 3;

// Elements of a tile, which share a pass over the weights: fewer if their memories would not fit the second-level
// cache; one if its own fill that cache, unless the weights are larger than a memory.
template <class T>
constexpr Size sequence_tile(const SequenceSizes& s, Size memories) {
    const Size bytes = s.memory() * sizeof(T);
    if (memories * bytes > (768 << 10) && s.memory() > Size(s.L) * s.gates() * s.widest()) return 1;
    return bytes > (16 << 10) ? 4 : 8;
}

// A Crew of one thread, which does it all (core/sequence.h).
template <class T>
struct ThreadCrew {
    using Real = T;
    static constexpr bool staged = false, takes_ends = true, holds_memory = false;
    static constexpr Size slots(Size) { return 1; }

    T* own;

    T* scratch() const { return own; }
    static Index again(Index n) { return n; }
    void sync() const {}
    void product(Size E, Size K, Size C, const T* in, const SequenceWeight<T>& weight, T* out) const {
        if (weight.packed)
            cpu::product(E, K, C, in, weight.packed, out);
        else
            product_unpacked(C, in, weight.stored, out);
    }
    template <class F>
    NTM_FN void elements(Size E, F&& f) const {
        for (Index e = 0; e < E; ++e) f(Thread<T>{}, e, Index(0));
    }
};
constexpr SequenceStaging staging(bool ordered) { return {false, true, ordered, false, 1}; }

// Calls f(crew, first, count) for tiles of the batch, of at most `most` elements and nearly the same size, the same
// number of tiles for every thread. Where there is an order, the longest come first: a thread that is done takes the
// next tile, so that all end at about the same time.
template <class T, class F>
Error sequence_tiles(const SequenceSizes& s, const Index* order, Size most, Size scratch, const Launch& launch, F f) {
    if (s.B == 0) return nullptr;
    const Size threads = std::min<Size>(launch.threads, s.B);
    const Size per_thread = (s.B + threads - 1) / threads;
    const Size tiles = std::min(s.B, threads * ((per_thread + most - 1) / most));
    auto tile = [=](auto, Size i, T* own) {
        const Size first = s.B * i / tiles, end = s.B * (i + 1) / tiles;
        f(ThreadCrew<T>{own}, first, end - first);
    };
    return parallel<T>(tiles, grain, scratch, launch, tile, order ? Deal::in_turn : Deal::in_equal_shares);
}

template <class T>
Error ntm_sequence(Launch launch, SequenceSizes s, StepOptions o, int keep, const T* const* weights,
                   const Index* order, const T* inputs, T* outputs, SequenceState<const T> initial,
                   SequenceState<T> final, SequenceTrail<T> trail) {
    if (is_too_large(s, false)) return too_large;
    if (launch.needed) return nullptr;
    const PackedSequence<T> packed(s, weights, false, false);
    if (!packed.storage.get()) return out_of_memory;
    const Size E = std::min(s.B, sequence_tile<T>(s, forward_memories));
    const Size scratch = SequenceFrame<T>::scratch(s, E, keep != 0, staging(order));
    return sequence_tiles<T>(s, order, E, scratch, launch, [&](auto crew, Size first, Size count) {
        sequence(crew, s, o, first, count, order, keep != 0, packed.weights, inputs, outputs, initial, final, trail);
    });
}

template <class T>
Error ntm_sequence_backward(Launch launch, SequenceSizes s, StepOptions o, const T* const* weights,
                            const Index* order, SequenceState<const T> initial, const T* final_memory,
                            SequenceTrail<const T> trail, const T* grad_outputs, SequenceState<const T> grad_final,
                            SequenceState<T> grad, SequenceGrads<T> out, T* grad_inputs) {
    if (is_too_large(s, true)) return too_large;
    if (launch.needed) return nullptr;
    const PackedSequence<T> packed(s, weights, true, grad_inputs);
    if (!packed.storage.get()) return out_of_memory;
    const Size E = std::min(s.B, sequence_tile<T>(s, backward_memories));
    const Size scratch = SequenceBackwardFrame<T>::scratch(s, E, staging(order));
    const Size all_scratch = scratch + sequence_segment(s, E);
    return sequence_tiles<T>(s, order, E, all_scratch, launch, [&](auto crew, Size first, Size count) {
        sequence_backward(crew, s, o, first, count, order, packed.weights, initial, final_memory, trail, grad_outputs,
                          grad_final, grad, out, grad_inputs, crew.scratch() + scratch);
    });
}

}  // namespace
}  // namespace ntm::cpu
