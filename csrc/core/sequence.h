// A whole sequence: the controller, the heads and the memory through all T steps, for a tile of batch elements that
// stays in cache or in shared memory. What is not recurrent is left outside: the inputs' share of the first layer's
// gates comes in, and the gradients of the gates and of the raw head parameters go out, to become weight gradients in
// one product.
//
// The Team here is one of several: it works together on the controller's products, and each of its teams on elements of
// its own. It provides
//
//   sync(), staged       as in team.h
//   product(E, K, C, in, packed, out)
//                        out[e, c] += sum_k in[e, k] weight[k, c], rows contiguous, weight packed
//   elements(E, f)       calls f(own, e, room) for every element, shared out over teams, own, that team.h describes;
//                        room is a number less than rooms(E) that no two of them have at once
//   holds_memory         whether memories, too, are copied to scratch where it is staged
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

// Of the Team, what its scratch depends on.
struct SequenceStaging {
    bool staged, holds_memory;
    Size rooms;
};

// The state of a tile's elements, and how many elements a layer has where it lies.
template <class T>
struct TileState : SequenceState<T> {
    Size span;

    static constexpr Size scratch(const SequenceSizes& s, Size E, bool holds_memory) {
        return room(holds_memory * E * s.memory(), E * s.step.R * s.step.N, E * s.step.W * s.step.N, E * s.read_size(),
                    s.L * E * s.H, s.gru ? 0 : s.L * E * s.H);
    }
};

// In place: elements first on of a whole batch's state.
template <class T>
NTM_FN TileState<T> tile_of(const SequenceSizes& s, const SequenceState<T>& all, Size first) {
    return {{all.memory + first * s.memory(), all.read_weights + first * s.step.R * s.step.N,
             all.write_weights + first * s.step.W * s.step.N, all.reads + first * s.read_size(),
             all.hidden + first * s.H, all.cell + first * s.H},
            s.B};
}

// In scratch, where the team is staged; else in place.
template <class Team, class T>
NTM_FN TileState<T> hold(const Team&, Arena<T>& arena, const SequenceSizes& s, Size E, const TileState<T>& place) {
    if constexpr (!Team::staged) return place;
    T* memory = Team::holds_memory ? arena.take(E * s.memory()) : place.memory;
    T *read_weights = arena.take(E * s.step.R * s.step.N), *write_weights = arena.take(E * s.step.W * s.step.N);
    T *reads = arena.take(E * s.read_size()), *hidden = arena.take(s.L * E * s.H);
    return {{memory, read_weights, write_weights, reads, hidden, s.gru ? nullptr : arena.take(s.L * E * s.H)}, E};
}

// Element e's whole state, from one tile to another.
template <class Team, class T>
NTM_FN void copy_state(const Team& team, const SequenceSizes& s, Size e, const TileState<const T>& from,
                       const TileState<T>& to) {
    auto part = [&](Size size, const T* source, T* target) NTM_INLINE {
        if (source + e * size != target + e * size) copy(team, size, source + e * size, target + e * size);
    };
    part(s.memory(), from.memory, to.memory);
    part(s.step.R * s.step.N, from.read_weights, to.read_weights);
    part(s.step.W * s.step.N, from.write_weights, to.write_weights);
    part(s.read_size(), from.reads, to.reads);
    for (Size l = 0; l < s.L; ++l) {
        part(s.H, from.hidden + l * from.span * s.H, to.hidden + l * to.span * s.H);
        if (!s.gru) part(s.H, from.cell + l * from.span * s.H, to.cell + l * to.span * s.H);
    }
}
template <class T>
NTM_FN TileState<const T> as_const(const TileState<T>& state) {
    return {{state.memory, state.read_weights, state.write_weights, state.reads, state.hidden, state.cell}, state.span};
}

// Where the piece of elements first on of a [L, T, B, size] array lies.
template <class T>
NTM_FN T* at(const SequenceSizes& s, T* array, Size size, Size layer, Size t, Size first) {
    return array + ((layer * s.T + t) * s.B + first) * size;
}

// What comes in as x, and what every step leaves behind.
template <class T>
struct SequenceTrail {
    T* x;              // [T, B, gates]    comes in as the inputs' product, goes out as the first layer's gates, active
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

constexpr Size sequence_scratch(const SequenceSizes& s, Size E, bool keep, const SequenceStaging& g) {
    const Size G = s.gates(), inner = g.rooms * room(s.step.forward_scratch());
    return inner + room(s.gru ? 0 : E * s.widest()) +
           (g.staged || !keep) * room(E * G, s.gru ? E * G : 0, E * s.step.params()) +
           g.staged * TileState<char>::scratch(s, E, g.holds_memory);
}

// Elements first .. first + E - 1 through all steps, from the initial state to the final one.
template <class Team, class T = typename Team::Real>
NTM_FN void sequence(const Team& team, const SequenceSizes& s, const StepOptions& o, Size first, Size E, bool keep,
                     const SequenceWeights<T>& w, const SequenceState<const T>& initial, const SequenceState<T>& final,
                     const SequenceTrail<T>& trail, T* scratch /*of sequence_scratch*/) {
    Arena<T> arena{scratch};
    const Size B = s.B, H = s.H, G = s.gates(), F = s.read_size(), P = s.step.params(), MN = s.memory();
    const Size RN = s.step.R * s.step.N, WN = s.step.W * s.step.N, inner_size = room(s.step.forward_scratch());
    T *inner = arena.take(Team::rooms(E) * inner_size), *joined = arena.take(s.gru ? 0 : E * s.widest());
    // What a layer works on lies in the trail, or where that is too far off or nobody wants it, in scratch.
    const bool aside = Team::staged || !keep;
    T *x_aside = arena.take(aside * E * G), *y_aside = arena.take(aside * s.gru * E * G);
    T* params_aside = arena.take(aside * E * P);
    const TileState<T> place = tile_of(s, final, first), state = hold(team, arena, s, E, place);
    auto leave = [&](const auto& own, Size n, const T* from, T* to) NTM_INLINE {
        if (keep && from != to) copy(own, n, from, to);
    };
    team.elements(E, [&](const auto& own, Size e, Size) NTM_INLINE {
        copy_state(own, s, e, tile_of(s, initial, first), state);
    });
    for (Size t = 0; t < s.T; ++t) {
        for (Size l = 0; l < s.L; ++l) {
            const LayerWeights<T> layer = w.layers[l];
            T* x_kept = l ? at(s, trail.upper_x, G, l - 1, t, first) : at(s, trail.x, G, 0, t, first);
            T* y_kept = at(s, trail.y, G, l, t, first);
            T *x = aside ? x_aside : x_kept, *y = aside ? y_aside : y_kept;
            const Size K = s.fed(l);
            T *fed = l ? state.hidden + (l - 1) * state.span * H : state.reads, *hidden = state.hidden + l * state.span * H;
            team.elements(E, [&](const auto& own, Size e, Size) NTM_INLINE {
                own.sync();
                if (keep && l == 0 && t && t % s.every == 0)
                    copy(own, MN, state.memory + e * MN, trail.memory + ((t / s.every - 1) * B + first + e) * MN);
                if (l)
                    copy(own, G, layer.bias_x, x + e * G);
                else
                    own.tiles(G, [&](auto tile) NTM_INLINE {
                        tile.store(x + e * G, tile.load(x_kept + e * G) + tile.load(layer.bias_x));
                    });
                if (s.gru) {
                    copy(own, G, layer.bias_y, y + e * G);
                } else {
                    copy(own, K, fed + e * K, joined + e * (K + H));
                    copy(own, H, hidden + e * H, joined + e * (K + H) + K);
                }
            });
            team.sync();
            if (s.gru) {
                team.product(E, K, G, fed, layer.fed, x);
                team.product(E, H, G, hidden, layer.hidden, y);
            } else {
                team.product(E, K + H, G, joined, layer.fed, x);
            }
            team.sync();
            team.elements(E, [&](const auto& own, Size e, Size) NTM_INLINE {
                if (s.gru) {
                    gru_gates(own, H, x + e * G, y + e * G, hidden + e * H, hidden + e * H, x + e * G);
                    leave(own, G, y + e * G, y_kept + e * G);
                } else {
                    T* cell = state.cell + (l * state.span + e) * H;
                    lstm_gates(own, H, x + e * G, cell, hidden + e * H, cell, x + e * G);
                    leave(own, H, cell, at(s, trail.cell, H, l, t, first + e));
                }
                leave(own, G, x + e * G, x_kept + e * G);
                if (l + 1 < s.L) {
                    leave(own, H, hidden + e * H, at(s, trail.hidden, H, l, t, first + e));
                } else {
                    copy(own, H, hidden + e * H, at(s, trail.features, H + F, 0, t, first + e));
                    copy(own, P, w.heads_bias, (aside ? params_aside : at(s, trail.params, P, 0, t, first)) + e * P);
                }
            });
        }
        T* params_kept = at(s, trail.params, P, 0, t, first);
        T* params = aside ? params_aside : params_kept;
        team.sync();
        team.product(E, H, P, state.hidden + (s.L - 1) * state.span * H, w.heads, params);
        team.sync();
        team.elements(E, [&](const auto& own, Size e, Size room) NTM_INLINE {
            T *rw = state.read_weights + e * RN, *ww = state.write_weights + e * WN, *reads = state.reads + e * F;
            T* memory = state.memory + e * MN;
            memory_step(own, s.step, o, memory, rw, ww, params + e * P, reads, memory, rw, ww,
                        inner + room * inner_size);
            own.sync();
            copy(own, F, reads, at(s, trail.features, H + F, 0, t, first + e) + H);
            leave(own, P, params + e * P, params_kept + e * P);
            leave(own, RN, rw, at(s, trail.read_weights, RN, 0, t, first + e));
            leave(own, WN, ww, at(s, trail.write_weights, WN, 0, t, first + e));
        });
    }
    if constexpr (Team::staged)
        team.elements(E, [&](const auto& own, Size e, Size) NTM_INLINE {
            own.sync();
            copy_state(own, s, e, as_const(state), place);
        });
}

// What goes out of the backward beside the gradients of the initial state.
template <class T>
struct SequenceGrads {
    T* x;        // [T, B, gates]
    T* upper_x;  // [L-1, T, B, gates]
    T* y;        // [L, T, B, gates]  GRU
    T* params;   // [T, B, P]
};

constexpr Size sequence_backward_scratch(const SequenceSizes& s, Size E, const SequenceStaging& g) {
    const Size G = s.gates(), P = s.step.params(), RN = s.step.R * s.step.N, WN = s.step.W * s.step.N;
    return g.rooms * room(s.step.backward_scratch()) + g.rooms * room(s.read_size()) + room(E * s.H, E * s.H) +
           room(s.gru ? 0 : E * s.widest()) +
           g.staged * (room(E * G, s.gru ? E * G : 0, E * P, E * P, E * RN, E * WN) +
                       TileState<char>::scratch(s, E, g.holds_memory)) +
           g.holds_memory * room(2 * E * s.memory());
}

// Of memories written again: [E, every, M, N], where not every one was kept
constexpr Size sequence_segment(const SequenceSizes& s, Size E) { return s.every == 1 ? 0 : E * s.every * s.memory(); }

// initial: the state before the first step, whose reads are not needed. out.x, upper_x and y may be those of trail.
// grad_final is the gradient of the final state, grad becomes that of the initial one. Memories between the kept ones
// are written again, from the kept weights, a segment at a time.
template <class Team, class T = typename Team::Real>
NTM_FN void sequence_backward(const Team& team, const SequenceSizes& s, const StepOptions& o, Size first, Size E,
                              const SequenceWeights<T>& w, const SequenceState<const T>& initial,
                              const T* final_memory /*[B, M, N]*/, const SequenceTrail<const T>& trail,
                              const T* grad_features /*[T, B, H + R M]*/, const SequenceState<const T>& grad_final,
                              const SequenceState<T>& grad, const SequenceGrads<T>& out,
                              T* scratch /*of sequence_backward_scratch*/, T* segment /*of sequence_segment*/) {
    const Size B = s.B, H = s.H, G = s.gates(), F = s.read_size(), P = s.step.params(), MN = s.memory();
    const Size RN = s.step.R * s.step.N, WN = s.step.W * s.step.N, inner_size = room(s.step.backward_scratch());
    const Size rooms = Team::rooms(E), read_room = room(F);
    Arena<T> arena{scratch};
    T *inner = arena.take(rooms * inner_size), *dr = arena.take(rooms * read_room);
    T *dh = arena.take(E * H), *next = arena.take(E * H), *joined = arena.take(s.gru ? 0 : E * s.widest());
    constexpr bool aside = Team::staged;
    T *dx_aside = arena.take(aside * E * G), *dy_aside = arena.take(aside * s.gru * E * G);
    T *dparams_aside = arena.take(aside * E * P), *params_aside = arena.take(aside * E * P);
    T *rw_aside = arena.take(aside * E * RN), *ww_aside = arena.take(aside * E * WN);
    [[maybe_unused]] T* memories = arena.take(Team::holds_memory * 2 * E * MN);
    const TileState<T> place = tile_of(s, grad, first), dstate = hold(team, arena, s, E, place);

    team.elements(E, [&](const auto& own, Size e, Size) NTM_INLINE {
        copy_state(own, s, e, tile_of(s, grad_final, first), dstate);
    });

    // The memory before step t
    auto memory_before = [&](Size t, Size segment_begin, Size e) NTM_INLINE -> const T* {
        const Size b = first + e;
        if (t == s.T) return final_memory + b * MN;
        if (t == 0) return initial.memory + b * MN;
        if (t % s.every == 0) return trail.memory + ((t / s.every - 1) * B + b) * MN;
        return segment + (e * s.every + t - segment_begin) * MN;
    };
    auto rewrite = [&](Size begin, Size end) NTM_INLINE {
        team.elements(E, [&](const auto& own, Size e, Size room) NTM_INLINE {
            for (Size t = begin; t + 1 < end; ++t) {
                Arena<T> of_step{inner + room * inner_size};
                const Activated<T> active(of_step, s.step);
                active.write_vectors(own, s.step, o, at(s, trail.params, P, 0, t, first + e));
                own.sync();
                write(own, s.step.W, s.step.N, s.step.M, memory_before(t, begin, e),
                      at(s, trail.write_weights, WN, 0, t, first + e), active.erase, active.add,
                      segment + (e * s.every + t + 1 - begin) * MN);
                own.sync();
            }
        });
    };

    for (Size t = s.T - 1, begin = s.T; t >= 0; --t) {
        if (t < begin) {
            const Size end = begin;
            begin = t / s.every * s.every;
            rewrite(begin, end);
        }
        T* dparams_kept = at(s, out.params, P, 0, t, first);
        T* dparams = aside ? dparams_aside : dparams_kept;
        team.elements(E, [&](const auto& own, Size e, Size room) NTM_INLINE {
            const Size b = first + e;
            const T* earlier_rw = t ? at(s, trail.read_weights, RN, 0, t - 1, b) : initial.read_weights + b * RN;
            const T* earlier_ww = t ? at(s, trail.write_weights, WN, 0, t - 1, b) : initial.write_weights + b * WN;
            // What a staged team reads more than once: fetched, of the memories one, as the other was the last step's.
            auto fetch = [&](T* to, const T* from, Size n) NTM_INLINE -> const T* {
                own.put(n, from, to + e * n);
                return aside ? to + e * n : from;
            };
            const T *before = memory_before(t, begin, e), *after = memory_before(t + 1, begin, e);
            if constexpr (Team::holds_memory) {
                if (t + 1 == s.T) after = fetch(memories + (t + 1) % 2 * E * MN, after, MN);
                else after = memories + ((t + 1) % 2 * E + e) * MN;
                before = fetch(memories + t % 2 * E * MN, before, MN);
            }
            const T* params = fetch(params_aside, at(s, trail.params, P, 0, t, b), P);
            const T* rw = fetch(rw_aside, at(s, trail.read_weights, RN, 0, t, b), RN);
            const T* ww = fetch(ww_aside, at(s, trail.write_weights, WN, 0, t, b), WN);
            T *dmemory = dstate.memory + e * MN, *dr_own = dr + room * read_room;
            T *drw = dstate.read_weights + e * RN, *dww = dstate.write_weights + e * WN;
            const T* dfeatures = at(s, grad_features, H + F, 0, t, b);
            own.tiles(F, [&](auto tile) NTM_INLINE {
                tile.store(dr_own, tile.load(dfeatures + H) + tile.load(dstate.reads + e * F));
            });
            own.sync();
            memory_step_backward(own, s.step, o, before, earlier_rw, earlier_ww, params, after, rw, ww, dr_own, dmemory,
                                 drw, dww, dmemory, drw, dww, dparams + e * P, inner + room * inner_size);
            copy(own, H, dfeatures, dh + e * H);
        });
        team.sync();
        team.product(E, P, H, dparams, w.heads, dh);
        team.sync();
        for (Size l = s.L - 1; l >= 0; --l) {
            const LayerWeights<T> layer = w.layers[l];
            const Size K = s.fed(l);
            T *dhidden = dstate.hidden + l * dstate.span * H, *dcell = dstate.cell + l * dstate.span * H;
            T* dx_kept = l ? at(s, out.upper_x, G, l - 1, t, first) : at(s, out.x, G, 0, t, first);
            T* dy_kept = at(s, out.y, G, l, t, first);
            T *dx = aside ? dx_aside : dx_kept, *dy = aside ? dy_aside : dy_kept;
            T* below = l ? next : dstate.reads;
            team.elements(E, [&](const auto& own, Size e, Size) NTM_INLINE {
                const Size b = first + e;
                const T* x = l ? at(s, trail.upper_x, G, l - 1, t, b) : at(s, trail.x, G, 0, t, b);
                own.sync();
                own.tiles(H, [&](auto tile) NTM_INLINE {
                    tile.store(dh + e * H, tile.load(dh + e * H) + tile.load(dhidden + e * H));
                });
                if (s.gru) {
                    const T* hidden = !t            ? initial.hidden + (l * B + b) * H
                                      : l + 1 < s.L ? at(s, trail.hidden, H, l, t - 1, b)
                                                    : at(s, trail.features, H + F, 0, t - 1, b);
                    gru_gates_backward<true>(own, H, x, at(s, trail.y, G, l, t, b), hidden, dh + e * H, dx + e * G,
                                             dy + e * G, dhidden + e * H);
                    clear(own, K, below + e * K);
                } else {
                    const T* cell = t ? at(s, trail.cell, H, l, t - 1, b) : initial.cell + (l * B + b) * H;
                    lstm_gates_backward<true>(own, H, x, cell, at(s, trail.cell, H, l, t, b), dh + e * H,
                                              dcell + e * H, dx + e * G, dcell + e * H);
                    clear(own, K + H, joined + e * (K + H));
                }
            });
            team.sync();
            if (s.gru) {
                team.product(E, G, H, dy, layer.hidden, dhidden);
                team.product(E, G, K, dx, layer.fed, below);
            } else {
                team.product(E, G, K + H, dx, layer.fed, joined);
            }
            team.sync();
            team.elements(E, [&](const auto& own, Size e, Size) NTM_INLINE {
                own.put(G, dx + e * G, dx_kept + e * G);
                if (s.gru) {
                    own.put(G, dy + e * G, dy_kept + e * G);
                } else {
                    copy(own, K, joined + e * (K + H), below + e * K);
                    copy(own, H, joined + e * (K + H) + K, dhidden + e * H);
                }
                if (l == 0) own.put(P, dparams + e * P, dparams_kept + e * P);
            });
            T* const spent = dh;
            dh = next;
            next = spent;
        }
    }
    if constexpr (Team::staged)
        team.elements(E, [&](const auto& own, Size e, Size) NTM_INLINE {
            own.sync();
            copy_state(own, s, e, as_const(dstate), place);
        });
}

}  // namespace ntm
