// A whole sequence: the controller, the heads and the memory through all T steps, for a tile of batch elements that
// stays in cache. What is not recurrent is left outside: the inputs' share of the first layer's gates comes in, and the
// gradients of the gates and of the raw head parameters go out, to become weight gradients in one product.
//
// Beyond what team.h names, the Team here provides
//   product(E, K, C, in, packed, out)   out[e, c] += sum_k in[e, k] weight[k, c], rows contiguous, weight packed
#pragma once

#include "core/controller.h"
#include "core/step.h"

namespace ntm {

// T steps, B elements, I inputs, L layers of H units. The step's sizes are those of one memory.
struct SequenceSizes {
    Size T, B, I, L, H;
    int gru;  // else LSTM
    StepSizes step;
    Size every;  // a memory is kept before every such step, counted from 0; step 0 has its own

    constexpr Size gates() const { return (gru ? 3 : 4) * H; }
    constexpr Size read_size() const { return step.R * step.M; }
    constexpr Size fed(Size layer) const { return layer ? H : read_size(); }
    constexpr Size joined(Size layer) const { return fed(layer) + H; }
    constexpr Size widest() const { return (L > 1 && H > read_size() ? H : read_size()) + H; }  // of what is joined
    constexpr Size memory() const { return step.M * step.N; }
};

// Weights of a layer: packed for the direction in which they are used, and the biases.
template <class T>
struct LayerWeights {
    const T* fed;     // forward: fed -> gates, backward: gates -> fed; for an LSTM [fed, hidden] in place of fed
    const T* hidden;  // GRU: hidden -> gates, gates -> hidden
    const T* bias_x;  // [gates]
    const T* bias_y;  // [gates]; GRU
};

template <class T>
struct SequenceWeights {
    const LayerWeights<T>* layers;  // [L]
    const T* heads;                 // packed: H -> P, backward: P -> H
    const T* heads_bias;            // [P]
};

template <class T>
struct SequenceState {
    T* memory;         // [B, M, N]
    T* read_weights;   // [B, R, N]
    T* write_weights;  // [B, W, N]
    T* reads;          // [B, R M]
    T* hidden;         // [L, B, H]
    T* cell;           // [L, B, H]; LSTM
};

// The elements' whole state, from one to another.
template <class Team, class T>
NTM_FN void copy_state(const Team& team, const SequenceSizes& s, Size first, Size E,
                       const SequenceState<const T>& from, const SequenceState<T>& to) {
    auto part = [&](Size size, const T* source, T* target) NTM_INLINE {
        copy(team, E * size, source + first * size, target + first * size);
    };
    part(s.memory(), from.memory, to.memory);
    part(s.step.R * s.step.N, from.read_weights, to.read_weights);
    part(s.step.W * s.step.N, from.write_weights, to.write_weights);
    part(s.read_size(), from.reads, to.reads);
    for (Size l = 0; l < s.L; ++l) {
        part(s.H, from.hidden + l * s.B * s.H, to.hidden + l * s.B * s.H);
        if (!s.gru) part(s.H, from.cell + l * s.B * s.H, to.cell + l * s.B * s.H);
    }
    team.sync();
}

// Where an element's piece of a [L, slots, B, size] array lies.
template <class T>
NTM_FN T* at(T* array, Size slots, Size B, Size size, Size layer, Size slot, Size b) {
    return array + ((layer * slots + slot) * B + b) * size;
}

// What comes in as x, and what every step leaves behind.
template <class T>
struct SequenceTrail {
    T* x;              // [T, B, gates]    comes in as the inputs' product, goes out as all that feeds the first layer
    T* upper_x;        // [L-1, T, B, gates]  the other layers'
    T* y;              // [L, T, B, gates]  GRU: the hidden states' products; an LSTM's are in x
    T* hidden;         // [L-1, T, B, H]    of the layers below the last
    T* cell;           // [L, T, B, H]      LSTM
    T* params;         // [T, B, P]
    T* features;       // [T, B, H + R M]   the last layer's hidden state, and the reads
    T* read_weights;   // [T, B, R, N]
    T* write_weights;  // [T, B, W, N]
    T* memory;         // [(T-1) / every, B, M, N]
};

constexpr Size sequence_scratch(const SequenceSizes& s, Size E, bool keep) {
    const Size of_step = (s.L - 1) * (s.gates() + s.H) + s.L * (s.gru ? s.gates() : s.H) + s.step.params();
    return s.step.forward_scratch() + E * s.widest() + 32 + (keep ? 0 : E * of_step + 80);
}

// Elements first .. first + E - 1 through all steps, from the initial state to the final one, state.
template <class Team, class T = typename Team::Real>
NTM_FN void sequence(const Team& team, const SequenceSizes& s, const StepOptions& o, Size first, Size E, bool keep,
                     const SequenceWeights<T>& w, const SequenceState<const T>& initial, const SequenceState<T>& state,
                     SequenceTrail<T> trail, T* scratch /*of sequence_scratch*/) {
    Arena<T> arena{scratch};
    T *inner = arena.take(s.step.forward_scratch()), *joined = arena.take(E * s.widest());
    const Size B = s.B, H = s.H, G = s.gates(), F = s.read_size(), P = s.step.params(), MN = s.memory();
    const Size RN = s.step.R * s.step.N, WN = s.step.W * s.step.N;
    // Where the trail has T steps of all elements, or one step of these, over and over.
    const Size slots = keep ? s.T : 1, width = keep ? B : E, base = keep ? first : 0;
    if (!keep) {
        trail.upper_x = arena.take((s.L - 1) * E * G);
        trail.hidden = arena.take((s.L - 1) * E * H);
        (s.gru ? trail.y : trail.cell) = arena.take(s.L * E * (s.gru ? G : H));
        trail.params = arena.take(E * P);
    }
    copy_state(team, s, first, E, initial, state);
    for (Size t = 0; t < s.T; ++t) {
        const Size slot = keep ? t : 0;
        if (keep && t && t % s.every == 0)
            copy(team, E * MN, state.memory + first * MN, trail.memory + ((t / s.every - 1) * B + first) * MN);
        const T* fed = state.reads + first * F;
        for (Size l = 0; l < s.L; ++l) {
            const LayerWeights<T>& layer = w.layers[l];
            T* x = l ? at(trail.upper_x, slots, width, G, l - 1, slot, base) : trail.x + (t * B + first) * G;
            T* hidden = state.hidden + (l * B + first) * H;
            auto new_hidden = [&](Size e) {
                return l + 1 < s.L ? at(trail.hidden, slots, width, H, l, slot, base + e)
                                   : trail.features + (t * B + first + e) * (H + F);
            };
            for (Size e = 0; e < E; ++e) {
                T* own = x + e * G;
                if (l)
                    copy(team, G, layer.bias_x, own);
                else
                    team.tiles(G, [&](auto tile) NTM_INLINE {
                        tile.store(own, tile.load(own) + tile.load(layer.bias_x));
                    });
            }
            const Size K = s.fed(l);
            if (s.gru) {
                team.product(E, K, G, fed, layer.fed, x);
                T* y = at(trail.y, slots, width, G, l, slot, base);
                for (Size e = 0; e < E; ++e) copy(team, G, layer.bias_y, y + e * G);
                team.product(E, H, G, hidden, layer.hidden, y);
                for (Size e = 0; e < E; ++e)
                    gru_gates(team, H, x + e * G, y + e * G, hidden + e * H, new_hidden(e));
            } else {
                for (Size e = 0; e < E; ++e) {
                    copy(team, K, fed + e * K, joined + e * (K + H));
                    copy(team, H, hidden + e * H, joined + e * (K + H) + K);
                }
                team.sync();
                team.product(E, K + H, G, joined, layer.fed, x);
                T* cell = state.cell + (l * B + first) * H;
                T* new_cell = at(trail.cell, slots, width, H, l, slot, base);
                for (Size e = 0; e < E; ++e)
                    lstm_gates(team, H, x + e * G, cell + e * H, new_hidden(e), new_cell + e * H);
                copy(team, E * H, new_cell, cell);
            }
            for (Size e = 0; e < E; ++e) copy(team, H, new_hidden(e), hidden + e * H);
            fed = hidden;
        }
        T* params = trail.params + (slot * width + base) * P;
        for (Size e = 0; e < E; ++e) copy(team, P, w.heads_bias, params + e * P);
        team.product(E, H, P, fed, w.heads, params);
        for (Size e = 0; e < E; ++e) {
            const Size b = first + e;
            T *rw = state.read_weights + b * RN, *ww = state.write_weights + b * WN, *reads = state.reads + b * F;
            T* memory = state.memory + b * MN;
            memory_step(team, s.step, o, memory, rw, ww, params + e * P, reads, memory, rw, ww, inner);
            copy(team, F, reads, trail.features + (t * B + b) * (H + F) + H);
            if (keep) {
                copy(team, RN, rw, trail.read_weights + (t * B + b) * RN);
                copy(team, WN, ww, trail.write_weights + (t * B + b) * WN);
            }
        }
    }
}

// What goes out of the backward beside the gradients of the initial state.
template <class T>
struct SequenceGrads {
    T* x;        // [T, B, gates]
    T* upper_x;  // [L-1, T, B, gates]
    T* y;        // [L, T, B, gates]  GRU
    T* params;   // [T, B, P]
};

constexpr Size sequence_backward_scratch(const SequenceSizes& s, Size E) {
    const Size memories = s.every == 1 ? 0 : E * s.every * s.memory();
    return s.step.backward_scratch() + 2 * E * s.H + E * s.widest() + s.read_size() + 80 + memories;
}

// initial: the state before the first step, whose reads are not needed. out.x, upper_x and y may be those of trail.
// grad_final is the gradient of the final state, grad becomes that of the initial one. Memories between the kept ones
// are written again, from the kept weights, a segment at a time.
template <class Team, class T = typename Team::Real>
NTM_FN void sequence_backward(const Team& team, const SequenceSizes& s, const StepOptions& o, Size first, Size E,
                              const SequenceWeights<T>& w, const SequenceState<const T>& initial,
                              const T* final_memory /*[B, M, N]*/, const SequenceTrail<const T>& trail,
                              const T* grad_features /*[T, B, H + R M]*/, const SequenceState<const T>& grad_final,
                              const SequenceState<T>& grad, const SequenceGrads<T>& out, T* scratch) {
    const Size B = s.B, H = s.H, G = s.gates(), F = s.read_size(), P = s.step.params(), MN = s.memory();
    const Size RN = s.step.R * s.step.N, WN = s.step.W * s.step.N;
    Arena<T> arena{scratch};
    T *inner = arena.take(s.step.backward_scratch()), *dh = arena.take(E * H), *next = arena.take(E * H);
    T *joined = arena.take(E * s.widest()), *dr = arena.take(F), *segment = arena.next;

    copy_state(team, s, first, E, grad_final, grad);

    // The memory before step t
    auto memory_before = [&](Size t, Size segment_begin, Size e) -> const T* {
        const Size b = first + e;
        if (t == s.T) return final_memory + b * MN;
        if (t == 0) return initial.memory + b * MN;
        if (t % s.every == 0) return trail.memory + ((t / s.every - 1) * B + b) * MN;
        return segment + (e * s.every + t - segment_begin) * MN;
    };
    auto rewrite = [&](Size begin, Size end) {
        for (Size t = begin; t + 1 < end; ++t)
            for (Size e = 0; e < E; ++e) {
                Arena<T> own{inner};
                const Activated<T> active(own, s.step);
                active.write_vectors(team, s.step, o, trail.params + (t * B + first + e) * P);
                team.sync();
                write(team, s.step.W, s.step.N, s.step.M, memory_before(t, begin, e),
                      trail.write_weights + (t * B + first + e) * WN, active.erase, active.add,
                      segment + (e * s.every + t + 1 - begin) * MN);
            }
    };

    for (Size t = s.T - 1, begin = s.T; t >= 0; --t) {
        if (t < begin) {
            const Size end = begin;
            begin = t / s.every * s.every;
            rewrite(begin, end);
        }
        T* dparams = out.params + (t * B + first) * P;
        for (Size e = 0; e < E; ++e) {
            const Size b = first + e;
            const T* earlier_rw = t ? trail.read_weights + ((t - 1) * B + b) * RN : initial.read_weights + b * RN;
            const T* earlier_ww = t ? trail.write_weights + ((t - 1) * B + b) * WN : initial.write_weights + b * WN;
            team.tiles(F, [&](auto tile) NTM_INLINE {
                tile.store(dr, tile.load(grad_features + (t * B + b) * (H + F) + H) + tile.load(grad.reads + b * F));
            });
            memory_step_backward(team, s.step, o, memory_before(t, begin, e), earlier_rw, earlier_ww,
                                 trail.params + (t * B + b) * P, memory_before(t + 1, begin, e),
                                 trail.read_weights + (t * B + b) * RN, trail.write_weights + (t * B + b) * WN,
                                 dr, grad.memory + b * MN, grad.read_weights + b * RN,
                                 grad.write_weights + b * WN, grad.memory + b * MN, grad.read_weights + b * RN,
                                 grad.write_weights + b * WN, dparams + e * P, inner);
        }
        for (Size e = 0; e < E; ++e) copy(team, H, grad_features + (t * B + first + e) * (H + F), dh + e * H);
        team.product(E, P, H, dparams, w.heads, dh);
        for (Size l = s.L - 1; l >= 0; --l) {
            const LayerWeights<T>& layer = w.layers[l];
            T* dhidden = grad.hidden + (l * B + first) * H;
            T* dx = l ? at(out.upper_x, s.T, B, G, l - 1, t, first) : at(out.x, s.T, B, G, 0, t, first);
            const T* x = l ? at(trail.upper_x, s.T, B, G, l - 1, t, first) : at(trail.x, s.T, B, G, 0, t, first);
            team.tiles(E * H, [&](auto tile) NTM_INLINE { tile.store(dh, tile.load(dh) + tile.load(dhidden)); });
            const Size K = s.fed(l);
            T* below = l ? next : grad.reads + first * F;
            if (s.gru) {
                T* dy = at(out.y, s.T, B, G, l, t, first);
                const T* y = at(trail.y, s.T, B, G, l, t, first);
                for (Size e = 0; e < E; ++e) {
                    const T* hidden = !t            ? initial.hidden + (l * B + first + e) * H
                                      : l + 1 < s.L ? at(trail.hidden, s.T, B, H, l, t - 1, first + e)
                                                    : trail.features + ((t - 1) * B + first + e) * (H + F);
                    gru_gates_backward(team, H, x + e * G, y + e * G, hidden, dh + e * H, dx + e * G, dy + e * G,
                                       dhidden + e * H);
                }
                team.product(E, G, H, dy, layer.hidden, dhidden);
                clear(team, E * K, below);
                team.product(E, G, K, dx, layer.fed, below);
            } else {
                const T* cell = t ? at(trail.cell, s.T, B, H, l, t - 1, first) : initial.cell + (l * B + first) * H;
                const T* new_cell = at(trail.cell, s.T, B, H, l, t, first);
                T* dcell = grad.cell + (l * B + first) * H;
                for (Size e = 0; e < E; ++e)
                    lstm_gates_backward(team, H, x + e * G, cell + e * H, new_cell + e * H, dh + e * H, dcell + e * H,
                                        dx + e * G, dcell + e * H);
                clear(team, E * (K + H), joined);
                team.sync();
                team.product(E, G, K + H, dx, layer.fed, joined);
                team.sync();
                for (Size e = 0; e < E; ++e) {
                    copy(team, K, joined + e * (K + H), below + e * K);
                    copy(team, H, joined + e * (K + H) + K, dhidden + e * H);
                }
            }
            T* const spent = dh;
            dh = next;
            next = spent;
        }
    }
}

}  // namespace ntm
