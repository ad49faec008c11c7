// The gradients of a sequence's weights.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>

#include "core/sequence.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "operators.h"

namespace ntm::cpu {
namespace {

constexpr Size gradient_rows = 128;  // at a time: their gradients stay in the second-level cache

// The gradients of a sequence's weights, from what forward and backward wrote. Every thread has a share of the outputs
// of every weight, so that the order of a sum does not depend on the number of threads.
template <class T>
struct WeightGradients {
    SequenceSizes s;
    SequenceOrder order;
    const T* inputs;
    SequenceState<const T> initial;
    SequenceTrail<const T> trail;
    const T* grad_outputs;
    SequenceGrads<const T> grads;
    SequenceState<const T> grad_initial;
    SequenceState<T> sum;
    T* const* grad_weights;
    Size share, shares;
    T* sums;  // scratch

    Size rows() const { return s.T * s.B; }  // one for every step and element

    // A thread's outputs of the widest weight, times the most numbers that an output is fed.
    static Size scratch(const SequenceSizes& s, Size shares) {
        const Size outputs = (std::max<Size>({s.gates(), s.step.params(), s.O}) / lanes<T> / shares + 2) * lanes<T>;
        return outputs * (std::max<Size>(s.I + s.read_size(), s.H) + s.H + 1);
    }

    void all() const {
        T* const* to = grad_weights;
        for (Size l = 0; l < s.L; ++l, to += 4) of_layer(l, to);
        gradients(s.step.params(), grads.params, [&](Size n) { return Two{hidden(s.L - 1, n), ones()}; },
                  {{to[0], s.H}, {to[1], 1}});
        if (s.shared) of_initial_state();
        gradients(s.O, grad_outputs, [&](Size n) { return Two{features(n), ones()}; },
                  {{to[2], s.features()}, {to[3], 1}});
    }

private:
    using Two = std::array<Columns<T>, 2>;
    static constexpr T one = 1;

    // What outputs were fed, from row n on
    static Columns<T> ones() { return {&one, 0, 1}; }  // what a bias is fed
    Columns<T> features(Size n) const { return {trail.features + n * s.features(), s.features(), s.features()}; }
    Columns<T> hidden(Size l, Size n) const {
        if (l + 1 < s.L) return {trail.hidden + (l * rows() + n) * s.H, s.H, s.H};
        return {trail.features + n * s.features(), s.features(), s.H};
    }
    Columns<T> hidden_before(Size l, Size n) const {
        if (n >= s.B) return hidden(l, n - s.B);
        const TileState<const T> start = initial_of(s, initial, n);
        return {start.hidden + l * start.span * s.H, s.shared ? 0 : s.H, s.H};
    }
    Columns<T> reads_before(Size n) const {
        const Size F = s.read_size();
        if (n < s.B) return {initial_of(s, initial, n).reads, s.shared ? 0 : F, F};
        return {trail.features + (n - s.B) * s.features() + s.H, s.features(), F};
    }

    Size first_of(Size outputs, Size share) const {
        return std::min(outputs, (outputs + lanes<T> - 1) / lanes<T> * share / shares * lanes<T>);
    }

    // Calls f(n, end) for the rows of all steps that elements took, some at a time. What they were fed lies in equal
    // distances: the first step was fed the initial state, so its rows are apart.
    template <class F>
    void each_rows(F f) const {
        auto parts = [&](Size n, Size end) {
            for (; n < end; n += gradient_rows) f(n, std::min(end, n + gradient_rows));
        };
        const Size whole = order.length(s.B - 1);  // steps that all elements took
        Index taking = s.B;
        parts(0, std::min(whole, Size(1)) * s.B);
        parts(s.B, whole * s.B);
        for (Size t = whole; t < s.T && taking > 0; ++t) {
            taking = order.taking(t, 0, taking);
            parts(t * s.B, t * s.B + taking);
        }
    }

    struct Target {
        T* grad;  // [outputs, columns]
        Size columns;
    };
    // The gradients of all weights of some outputs. grad: of the outputs; fed(n): what they were fed, from row n on.
    template <class Fed>
    void gradients(Size outputs, const T* grad, Fed fed, std::initializer_list<Target> targets) const {
        const Size first = first_of(outputs, share), count = first_of(outputs, share + 1) - first;
        Size columns = 0;
        for (const Target& target : targets) columns += target.columns;
        std::fill_n(sums, columns * count, T(0));
        each_rows([&](Size n, Size end) {
            add_weight_gradient(end - n, count, grad + n * outputs + first, outputs, fed(n), sums);
        });
        const T* from = sums;
        for (const Target& target : targets) {
            T* to = target.grad + first * target.columns;
            transpose(target.columns, count, from, count, to, target.columns);
            from += target.columns * count;
        }
    }

    void of_layer(Size l, T* const* to) const {
        const Size G = s.gates(), H = s.H, I = l ? H : s.I, R = l ? 0 : s.read_size();
        const T* dx = l ? grads.upper_x + (l - 1) * rows() * G : grads.x;
        auto below = [&](Size n) { return l ? hidden(l - 1, n) : Columns<T>{inputs + n * s.I, s.I, s.I}; };
        auto reads = [&](Size n) { return l ? Columns<T>{} : reads_before(n); };
        if (s.products() == 2) {
            using Three = std::array<Columns<T>, 3>;
            gradients(G, dx, [&](Size n) { return Three{below(n), reads(n), ones()}; }, {{to[0], I + R}, {to[2], 1}});
            gradients(G, grads.y + l * rows() * G, [&](Size n) { return Two{hidden_before(l, n), ones()}; },
                      {{to[1], H}, {to[3], 1}});
        } else {
            using Four = std::array<Columns<T>, 4>;
            gradients(G, dx, [&](Size n) { return Four{below(n), reads(n), hidden_before(l, n), ones()}; },
                      {{to[0], I + R}, {to[1], H}, {to[2], 1}});
            const Size first = first_of(G, share);
            std::copy_n(to[2] + first, first_of(G, share + 1) - first, to[3] + first);
        }
    }

    // One initial state for all elements: its gradient is the sum of theirs.
    void of_initial_state() const {
        auto sum_up = [&](Size size, const T* of_elements /*[B, size]*/, T* to) {
            const Size first = first_of(size, share), count = first_of(size, share + 1) - first;
            std::fill_n(to + first, count, T(0));
            add_weight_gradient(s.B, count, of_elements + first, size, std::array<Columns<T>, 1>{ones()}, to + first);
        };
        sum_up(s.memory(), grad_initial.memory, sum.memory);
        sum_up(s.step.R * s.step.N, grad_initial.read_weights, sum.read_weights);
        sum_up(s.step.W * s.step.N, grad_initial.write_weights, sum.write_weights);
        sum_up(s.read_size(), grad_initial.reads, sum.reads);
        for (Size l = 0; l < s.L; ++l) {
            sum_up(s.H, grad_initial.hidden + l * s.B * s.H, sum.hidden + l * s.H);
            if (s.has_cell()) sum_up(s.H, grad_initial.cell + l * s.B * s.H, sum.cell + l * s.H);
        }
    }
};

template <class T>
Error ntm_sequence_weight_gradients(Launch launch, SequenceSizes s, const Index* order, const T* inputs,
                                    SequenceState<const T> initial, SequenceTrail<const T> trail,
                                    const T* grad_outputs, SequenceGrads<const T> grads,
                                    SequenceState<const T> grad_initial, SequenceState<T> sum,
                                    T* const* grad_weights) {
    if (is_too_large(s, true)) return too_large;
    if (launch.needed) return nullptr;
    const Size shares = launch.threads, cost = s.T * s.B * s.gates() / shares;
    return parallel<T>(shares, cost, WeightGradients<T>::scratch(s, shares), launch, [=](auto, Size share, T* scratch) {
        WeightGradients<T>{s,     {order, s}, inputs, initial,      trail, grad_outputs,
                           grads, grad_initial, sum,   grad_weights, share, shares,       scratch}
            .all();
    });
}

}  // namespace
}  // namespace ntm::cpu
