// The weights of a sequence, packed for its products.
#pragma once

#include <array>
#include <vector>

#include "core/sequence.h"
#include "cpu/parallel.h"
#include "cpu/product.h"

namespace ntm::cpu {
namespace {

// A weight to multiply by: packed; or, if it is used only once, as it is stored, in columns side by side
template <class T>
struct SequenceWeight {
    const T* packed;
    std::array<Columns<T>, 2> stored;
};

// The weights of a whole sequence, for one direction, and its biases. Forward, one step of one element is not packed.
template <class T>
struct PackedSequence {
    const Scratch<T, 1> storage;
    std::vector<LayerWeights<T, SequenceWeight<T>>> layers;
    SequenceWeights<T, SequenceWeight<T>> weights;

    static Size size(Size inputs, Size outputs, bool backward) {
        return backward ? packed_size<T>(outputs, inputs) : packed_size<T>(inputs, outputs);
    }
    static Size size(const SequenceSizes& s, bool backward, bool to_inputs) {
        const Size G = s.gates();
        Size total = room(size(s.H, s.step.params(), backward), size(s.features(), s.O, backward),
                          to_inputs ? size(s.I, G, backward) : 0);
        for (Size l = 0; l < s.L; ++l) {
            const Size fed = (backward || l ? 0 : s.I) + s.fed(l);
            total += s.products() == 2 ? room(size(fed, G, backward), size(s.H, G, backward))
                                       : room(size(fed + s.H, G, backward), G);
        }
        return total;
    }

    // to_inputs: backward, for the gradient of the inputs too.
    PackedSequence(const SequenceSizes& s, const T* const* raw, bool backward, bool to_inputs)
        : storage(size(s, backward, to_inputs)) {
        if (!storage.get()) return;
        const Size G = s.gates(), P = s.step.params();
        Arena<T> arena{storage.get()};
        auto take = [&](Size outputs, Columns<T> one, Columns<T> beside = {}) -> SequenceWeight<T> {
            const std::array<Columns<T>, 2> stored = {one, beside};
            if (!backward && s.T * s.B == 1) return {nullptr, stored};
            const Size inputs = one.count + beside.count;
            T* packed = arena.take(size(inputs, outputs, backward));
            Size first = 0;
            for (const auto& [weight, stride, count] : stored) {
                if (backward)
                    pack(outputs, count, weight, stride, first, packed);
                else
                    pack_transposed(outputs, count, weight, stride, inputs, first, packed);
                first += count;
            }
            if (backward) pad(outputs, inputs, packed);
            return {packed, stored};
        };
        SequenceWeight<T> inputs{};
        if (to_inputs) inputs = take(G, {raw[0], s.I + s.read_size(), s.I});
        for (Size l = 0; l < s.L; ++l, raw += 4) {
            const Size I = l ? 0 : s.I, skipped = backward ? I : 0;
            const Columns<T> fed = {raw[0] + skipped, I + s.fed(l), I - skipped + s.fed(l)};
            const Columns<T> hidden = {raw[1], s.H, s.H};
            if (s.products() == 2) {
                const SequenceWeight<T> own = take(G, fed);
                layers.push_back({own, take(G, hidden), raw[2], raw[3]});
            } else {
                T* bias = arena.take(G);
                for (Size i = 0; i < G; ++i) bias[i] = raw[2][i] + raw[3][i];
                layers.push_back({take(G, fed, hidden), {}, bias, nullptr});
            }
        }
        const SequenceWeight<T> heads = take(P, {raw[0], s.H, s.H});
        weights = {layers.data(), heads, raw[1], take(s.O, {raw[2], s.features(), s.features()}), raw[3],
                   inputs};
    }
};

}  // namespace
}  // namespace ntm::cpu
