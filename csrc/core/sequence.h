// A whole sequence: the controller, the heads and the memory through all T steps, for a tile of batch elements that
// stays in cache or in shared memory. What is not recurrent is left outside: the gradients of the gates and of the raw
// head parameters go out, to become weight gradients in one product, and the inputs' share of the first layer's gates
// may come in from one, as the output layer may be one behind.
//
// The Team here is one of several: it works together on the controller's products, and each of its teams on elements of
// its own. It provides
//
//   sync(), staged       as in team.h
//   product(E, K, C, in, weight, out)
//                        out[e, c] += sum_k in[e, k] weight[k, c], rows contiguous; a weight is what its launcher
//                        makes of one, mostly packed
//   elements(E, f)       calls f(own, e, room) for every element, shared out over teams, own, that team.h describes;
//                        room is a number less than rooms(E) that no two of them have at once
//   takes_ends           whether it multiplies what is not recurrent too: the inputs, beside what else feeds the first
//                        layer, and the features, which become outputs; it is a single thread then
//   holds_memory         whether memories, too, are copied to scratch where it is staged
//   scratch()            where the tile's scratch begins
//   again(n)             n, from which is computed anew what follows: else a GPU would keep it in registers from phase
//                        to phase
#pragma once

#include "core/controller.h"
#include "core/step.h"

namespace ntm {

// T steps, B elements, I inputs, O outputs, L layers of H units. The step's sizes are those of one memory.
struct SequenceSizes {
    Index T;
    Size B;
    Index I, O, L, H;
    int gru;  // else LSTM
    StepSizes step;
    Index every;  // a memory is kept before every such step, counted from 0; step 0 has its own
    int shared;   // the initial state is one for all elements: in place of B, its sizes have 1

    static constexpr const char* names = "T B I O L H gru step every shared";

    constexpr Index gates() const { return (gru ? 3 : 4) * H; }
    constexpr Index read_size() const { return step.R * step.M; }
    constexpr Index fed(Index layer) const { return layer ? H : read_size(); }
    constexpr Index widest() const { return (L > 1 && H > read_size() ? H : read_size()) + H; }  // of what is joined
    constexpr Index features() const { return H + read_size(); }
    constexpr Size memory() const { return step.memory(); }
    constexpr Size initial(Size b) const { return shared ? 0 : b; }  // whose initial state element b has
};

// Weights of a layer, for the direction in which they are used, and the biases.
template <class T, class Weight = const T*>
struct LayerWeights {
    Weight fed;       // forward: fed -> gates, backward: gates -> fed; for an LSTM [fed, hidden] in place of fed. In
                      // front of what else feeds the first layer forward, the inputs, where the team takes them.
    Weight hidden;    // GRU: hidden -> gates, gates -> hidden
    const T* bias_x;  // [gates]
    const T* bias_y;  // [gates]; GRU
};

template <class T, class Weight = const T*>
struct SequenceWeights {
    const LayerWeights<T, Weight>* layers;  // [L]
    Weight heads;                           // H -> P, backward: P -> H
    const T* heads_bias;                    // [P]
    Weight output;                          // features -> O, backward: O -> features; where the team takes the ends
    const T* output_bias;                   // [O]
};

template <class T>
struct SequenceState {
    T* memory;         // [B, M, N]
    T* read_weights;   // [B, R, N]
    T* write_weights;  // [B, W, N]
    T* reads;          // [B, R M]
    T* hidden;         // [L, B, H]
    T* cell;           // [L, B, H]; LSTM

    static constexpr const char* names = "memory read_weights write_weights reads hidden cell";
};

// Of the Team, what its scratch depends on.
struct SequenceStaging {
    bool staged, takes_ends, holds_memory;
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

// The initial state of element b, in place
template <class T>
NTM_FN TileState<const T> initial_of(const SequenceSizes& s, const SequenceState<const T>& initial, Size b) {
    TileState<const T> own = tile_of(s, initial, s.initial(b));
    if (s.shared) own.span = 1;
    return own;
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

// Element e's whole state becomes that of an element of another tile, or 0 where there is none.
template <class Team, class T>
NTM_FN void copy_state(const Team& team, const SequenceSizes& s, bool some, Size element,
                       const TileState<const T>& from, Size e, const TileState<T>& to) {
    auto part = [&](Size size, const T* source, T* target) NTM_INLINE {
        source += element * size, target += e * size;
        if (!some)
            clear(team, size, target);
        else if (source != target)
            copy(team, size, source, target);
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
    T* x;              // [T, B, gates]    the first layer's gates, active; comes in as the inputs' product where the
                       //                  team does not take them
    T* upper_x;        // [L-1, T, B, gates]  the other layers'
    T* y;              // [L, T, B, gates]  GRU: the hidden states' products; an LSTM's are in x
    T* hidden;         // [L-1, T, B, H]    of the layers below the last
    T* cell;           // [L, T, B, H]      LSTM
    T* params;         // [T, B, P]
    T* features;       // [T, B, H + R M]   the last layer's hidden state, and the reads; always left where the team
                       //                   does not take the ends
    T* read_weights;   // [T, B, R, N]
    T* write_weights;  // [T, B, W, N]
    T* memory;         // [(T-1) / every, B, M, N]
    T* active;         // [T, B, active()]  the heads' parameters, active; where the team is not staged

    static constexpr const char* names =
        "x upper_x y hidden cell params features read_weights write_weights memory active";
};

// Where a step's activated parameters of element b are left for the backward. A team that is staged leaves none.
template <class Team, class T>
NTM_FN auto left_active(const SequenceSizes& s, const SequenceTrail<T>& trail, Size t, Size b) {
    if constexpr (Team::staged)
        return nullptr;
    else
        return at(s, trail.active, s.step.active(), 0, t, b);
}

// The products of a layer: an LSTM's one, of what it is fed and its hidden state together, or a GRU's two, second: of
// the hidden state. In a loop, so that they are compiled once.
template <class F>
NTM_FN void for_gates(bool gru, F&& product) {
    NTM_ROLLED
    for (int part = 0; part < 1 + gru; ++part) product(part == 1);
}

// What make(E) lays out, to be called for it: laid out once or, where the team is staged, anew at every call.
template <class Team, class Make>
NTM_FN auto laid_out(const Team& team, Size E, Make make) {
    if constexpr (Team::staged)
        return [=]() NTM_INLINE { return make(team.again(E)); };
    else
        return [frame = make(E)]() NTM_INLINE -> const auto& { return frame; };
}

// Where a tile's scratch is what on the way forward. What a layer works on lies in the trail, or aside, in scratch,
// where that is too far off or nobody wants it after.
template <class T>
struct SequenceFrame {
    T *inner, *joined, *x, *y, *params, *features, *active, *norms;
    TileState<T> state;

    static constexpr Size scratch(const SequenceSizes& s, Size E, bool keep, const SequenceStaging& g) {
        const Size G = s.gates();
        return g.rooms * room(s.step.forward_scratch()) + room(E * row(s, g.takes_ends), g.staged ? 0 : E * s.step.N) +
               (g.staged || !keep) *
                   room(E * G, s.gru ? E * G : 0, E * s.step.params(), g.takes_ends * E * s.features(),
                        g.staged ? 0 : s.step.active()) +
               g.staged * TileState<T>::scratch(s, E, g.holds_memory);
    }

    // The most that is joined for a layer's product
    static constexpr Size row(const SequenceSizes& s, bool takes_ends) {
        if (s.gru) return takes_ends ? s.I + s.read_size() : 0;
        return takes_ends * s.I + s.widest();
    }

    template <class Team>
    NTM_FN SequenceFrame(const Team& team, const SequenceSizes& s, Size E, bool aside, const TileState<T>& place) {
        Arena<T> arena{team.scratch()};
        inner = arena.take(Team::rooms(E) * room(s.step.forward_scratch()));
        joined = arena.take(E * row(s, Team::takes_ends));
        x = arena.take(aside * E * s.gates());
        y = arena.take(aside * s.gru * E * s.gates());
        params = arena.take(aside * E * s.step.params());
        features = arena.take(aside * Team::takes_ends * E * s.features());
        active = arena.take(Team::staged ? 0 : aside * s.step.active());
        norms = arena.take(Team::staged ? 0 : E * s.step.N);
        state = hold(team, arena, s, E, place);
    }
};

// Elements first .. first + E - 1 through all steps, from the initial state to the final one.
template <class Team, class Weight, class T = typename Team::Real>
NTM_FN void sequence(const Team& team, const SequenceSizes& s, const StepOptions& o, Size first, Index E, bool keep,
                     const SequenceWeights<T, Weight>& w, const T* inputs /*[T, B, I]*/, T* outputs /*[T, B, O]*/,
                     const SequenceState<const T>& initial, const SequenceState<T>& final,
                     const SequenceTrail<T>& trail) {
    const Size B = s.B;
    const Index H = s.H, G = s.gates(), F = s.read_size(), P = s.step.params(), MN = s.memory();
    const Index RN = s.step.R * s.step.N, WN = s.step.W * s.step.N;
    const bool aside = Team::staged || !keep;
    const auto frame = laid_out(team, E, [&](Size n) NTM_INLINE {
        return SequenceFrame<T>(team, s, n, aside, tile_of(s, final, first));
    });
    Index t = 0;
    // Of what every step finds or leaves behind, n numbers for every element: the next step's place is fetched ahead.
    auto passed = [&](const auto& own, Size n, const T* place) NTM_INLINE {
        if (t + 1 < s.T) own.ahead(n, place + B * n);
    };
    auto left = [&](const auto& own, Size n, const T* place) NTM_INLINE {
        if (keep) passed(own, n, place);
    };
    auto leave = [&](const auto& own, Size n, const T* from, T* to) NTM_INLINE {
        if (keep && from != to) copy(own, n, from, to);
        left(own, n, to);
    };
    team.elements(E, [&](const auto& own, Index e, Index) NTM_INLINE {
        copy_state(own, s, true, 0, initial_of(s, initial, first + e), e, frame().state);
    });
    // Whether the norms of the memories that a step finds are known: of all elements alike, one thread's in turn.
    static_assert(Team::staged || Team::takes_ends);
    [[maybe_unused]] bool normed = false;
    for (; t < s.T; ++t) {
        auto params_of = [&](const SequenceFrame<T>& f) NTM_INLINE {
            return aside ? f.params : at(s, trail.params, P, 0, t, first);
        };
        auto features_of = [&](const SequenceFrame<T>& f, Index e) NTM_INLINE {
            if (Team::takes_ends && aside) return f.features + e * (H + F);
            return at(s, trail.features, H + F, 0, t, first + e);
        };
        for (Index l = 0; l < s.L; ++l) {
            const LayerWeights<T, Weight>& layer = w.layers[l];
            const bool takes = Team::takes_ends && l == 0, joins = takes || !s.gru;
            const Index I = takes ? s.I : 0, K = I + s.fed(l);
            auto x_kept = [&]() NTM_INLINE {
                return l ? at(s, trail.upper_x, G, l - 1, t, first) : at(s, trail.x, G, 0, t, first);
            };
            auto y_kept = [&]() NTM_INLINE { return at(s, trail.y, G, l, t, first); };
            auto x_of = [&](const SequenceFrame<T>& f) NTM_INLINE { return aside ? f.x : x_kept(); };
            auto y_of = [&](const SequenceFrame<T>& f) NTM_INLINE { return aside ? f.y : y_kept(); };
            auto fed_of = [&](const SequenceFrame<T>& f) NTM_INLINE {
                return l ? f.state.hidden + (l - 1) * f.state.span * H : f.state.reads;
            };
            auto hidden_of = [&](const SequenceFrame<T>& f) NTM_INLINE {
                return f.state.hidden + l * f.state.span * H;
            };
            team.elements(E, [&](const auto& own, Index e, Index) NTM_INLINE {
                const SequenceFrame<T>& f = frame();
                T* x = x_of(f) + e * G;
                own.sync();
                const Index every = team.again(s.every);
                auto kept = [&](Index n) NTM_INLINE { return trail.memory + ((n - 1) * B + first + e) * MN; };
                if (keep && l == 0 && t && t % every == 0)
                    copy(own, MN, f.state.memory + e * MN, kept(t / every));
                if (keep && l == 0 && t + 1 < s.T && (t + 1) % every == 0) own.ahead(MN, kept((t + 1) / every));
                if (l || takes)
                    copy(own, G, layer.bias_x, x);
                else
                    own.tiles(G, [&](auto tile) NTM_INLINE {
                        tile.store(x, tile.load(x_kept() + e * G) + tile.load(layer.bias_x));
                    });
                T* joined = f.joined + e * (s.gru ? K : K + H);
                if (takes) {
                    const T* met = at(s, inputs, I, 0, t, first + e);
                    copy(own, I, met, joined);
                    passed(own, I, met);
                }
                if (joins) copy(own, K - I, fed_of(f) + e * (K - I), joined + I);
                if (s.gru)
                    copy(own, G, layer.bias_y, y_of(f) + e * G);
                else
                    copy(own, H, hidden_of(f) + e * H, joined + K);
            });
            team.sync();
            {
                const SequenceFrame<T>& f = frame();
                for_gates(s.gru, [&](bool second) NTM_INLINE {
                    team.product(E, !s.gru ? K + H : second ? H : K, G,
                                 second ? hidden_of(f) : joins ? f.joined : fed_of(f),
                                 second ? layer.hidden : layer.fed, second ? y_of(f) : x_of(f));
                });
            }
            team.sync();
            team.elements(E, [&](const auto& own, Index e, Index) NTM_INLINE {
                const SequenceFrame<T>& f = frame();
                T *x = x_of(f) + e * G, *active = keep ? x_kept() + e * G : x, *hidden = hidden_of(f) + e * H;
                left(own, G, active);
                if (s.gru) {
                    T* y = y_of(f) + e * G;
                    gru_gates(own, H, x, y, hidden, hidden, active);
                    leave(own, G, y, y_kept() + e * G);
                } else {
                    T* cell = f.state.cell + (l * f.state.span + e) * H;
                    lstm_gates(own, H, x, cell, hidden, cell, active);
                    leave(own, H, cell, at(s, trail.cell, H, l, t, first + e));
                }
                if (l + 1 < s.L) {
                    leave(own, H, hidden, at(s, trail.hidden, H, l, t, first + e));
                } else {
                    copy(own, H, hidden, features_of(f, e));
                    left(own, H + F, features_of(f, e));
                    copy(own, P, w.heads_bias, params_of(f) + e * P);
                }
            });
        }
        team.sync();
        {
            const SequenceFrame<T>& f = frame();
            team.product(E, H, P, f.state.hidden + (s.L - 1) * f.state.span * H, w.heads, params_of(f));
        }
        team.sync();
        team.elements(E, [&](const auto& own, Index e, Index room) NTM_INLINE {
            {
                const SequenceFrame<T>& f = frame();
                T *memory = f.state.memory + e * MN, *rw = f.state.read_weights + e * RN;
                T* ww = f.state.write_weights + e * WN;
                T* inner = f.inner + room * ntm::room(s.step.forward_scratch());
                auto step = [&](auto left, auto norms) NTM_INLINE {
                    memory_step(own, s.step, o, memory, rw, ww, params_of(f) + e * P, f.state.reads + e * F, memory, rw,
                                ww, inner, left, norms);
                };
                if constexpr (Team::staged) {
                    step(nullptr, nullptr);
                } else {
                    Norms<T> norms = {f.norms + e * s.step.N, normed};
                    T* active = keep ? left_active<Team>(s, trail, t, first + e) : f.active;
                    left(own, s.step.active(), active);
                    step(active, &norms);
                    if (e + 1 == E) normed = norms.known;
                }
            }
            own.sync();
            const SequenceFrame<T>& f = frame();
            copy(own, F, f.state.reads + e * F, features_of(f, e) + H);
            if constexpr (Team::takes_ends) {
                T* output = at(s, outputs, s.O, 0, t, first + e);
                copy(own, s.O, w.output_bias, output);
                passed(own, s.O, output);
            }
            leave(own, P, params_of(f) + e * P, at(s, trail.params, P, 0, t, first + e));
            leave(own, RN, f.state.read_weights + e * RN, at(s, trail.read_weights, RN, 0, t, first + e));
            leave(own, WN, f.state.write_weights + e * WN, at(s, trail.write_weights, WN, 0, t, first + e));
        });
        if constexpr (Team::takes_ends)
            team.product(E, H + F, s.O, features_of(frame(), 0), w.output, at(s, outputs, s.O, 0, t, first));
    }
    if constexpr (Team::staged)
        team.elements(E, [&](const auto& own, Index e, Index) NTM_INLINE {
            copy_state(own, s, true, e, as_const(frame().state), e, tile_of(s, final, first));
        });
}

// What goes out of the backward beside the gradients of the initial state.
template <class T>
struct SequenceGrads {
    T* x;        // [T, B, gates]
    T* upper_x;  // [L-1, T, B, gates]
    T* y;        // [L, T, B, gates]  GRU
    T* params;   // [T, B, P]

    static constexpr const char* names = "x upper_x y params";
};

// As SequenceFrame, on the way back. The gradients of the gates and of the raw head parameters are worked on aside
// where the team is staged, and there it fetches what it reads more than once.
template <class T>
struct SequenceBackwardFrame {
    T *inner, *dr, *dh, *next, *joined, *features, *norms;
    T *dx, *dy, *dparams, *params;
    T *read_weights, *write_weights, *memories;  // of two steps in turn
    TileState<T> grad;

    static constexpr Size scratch(const SequenceSizes& s, Size E, const SequenceStaging& g) {
        const Size G = s.gates(), P = s.step.params(), RN = s.step.R * s.step.N, WN = s.step.W * s.step.N;
        return g.rooms * room(s.step.backward_scratch()) + g.rooms * room(s.read_size()) + room(E * s.H, E * s.H) +
               room(s.gru ? 0 : E * s.widest(), g.takes_ends * E * s.features(), g.staged ? 0 : E * s.step.N) +
               g.staged * (room(E * G, s.gru ? E * G : 0, E * P, E * P, 2 * E * RN, 2 * E * WN) +
                           TileState<T>::scratch(s, E, g.holds_memory)) +
               g.holds_memory * room(2 * E * s.memory());
    }

    template <class Team>
    NTM_FN SequenceBackwardFrame(const Team& team, const SequenceSizes& s, Size E, const TileState<T>& place) {
        constexpr bool aside = Team::staged;
        const Size G = s.gates(), P = s.step.params();
        Arena<T> arena{team.scratch()};
        inner = arena.take(Team::rooms(E) * room(s.step.backward_scratch()));
        dr = arena.take(Team::rooms(E) * room(s.read_size()));
        dh = arena.take(E * s.H);
        next = arena.take(E * s.H);
        joined = arena.take(s.gru ? 0 : E * s.widest());
        features = arena.take(Team::takes_ends * E * s.features());
        norms = arena.take(Team::staged ? 0 : E * s.step.N);
        dx = arena.take(aside * E * G);
        dy = arena.take(aside * s.gru * E * G);
        dparams = arena.take(aside * E * P);
        params = arena.take(aside * E * P);
        read_weights = arena.take(aside * 2 * E * s.step.R * s.step.N);
        write_weights = arena.take(aside * 2 * E * s.step.W * s.step.N);
        memories = arena.take(Team::holds_memory * 2 * E * s.memory());
        grad = hold(team, arena, s, E, place);
    }
};

// Of memories written again: [E, every, M, N], where not every one was kept
constexpr Size sequence_segment(const SequenceSizes& s, Size E) { return s.every == 1 ? 0 : E * s.every * s.memory(); }

// initial: the state before the first step, whose reads are not needed. out.x, upper_x and y may be those of trail.
// grad_outputs is [T, B, O] or, where the team does not take the ends, the features' gradient, [T, B, H + R M].
// grad_final is the gradient of the final state, all 0 where its memory is nullptr; grad becomes that of the initial
// one. Memories between the kept ones are written again, from the kept weights, a segment at a time.
template <class Team, class Weight, class T = typename Team::Real>
NTM_FN void sequence_backward(const Team& team, const SequenceSizes& s, const StepOptions& o, Size first, Index E,
                              const SequenceWeights<T, Weight>& w, const SequenceState<const T>& initial,
                              const T* final_memory /*[B, M, N]*/, const SequenceTrail<const T>& trail,
                              const T* grad_outputs, const SequenceState<const T>& grad_final,
                              const SequenceState<T>& grad, const SequenceGrads<T>& out,
                              T* segment /*of sequence_segment*/) {
    using Frame = SequenceBackwardFrame<T>;
    const Size B = s.B;
    const Index H = s.H, G = s.gates(), F = s.read_size(), P = s.step.params(), MN = s.memory();
    const Index RN = s.step.R * s.step.N, WN = s.step.W * s.step.N;
    constexpr bool aside = Team::staged;
    const auto frame =
        laid_out(team, E, [&](Size n) NTM_INLINE { return Frame(team, s, n, tile_of(s, grad, first)); });
    auto inner_of = [&](const Frame& f, Index room) NTM_INLINE {
        return f.inner + room * ntm::room(s.step.backward_scratch());
    };
    team.elements(E, [&](const auto& own, Index e, Index) NTM_INLINE {
        copy_state(own, s, grad_final.memory != nullptr, e, tile_of(s, grad_final, first), e, frame().grad);
    });
    // Step t's segment, begin to end: before its first step memory number `kept` was kept, 0 being the initial one.
    Index kept = (s.T - 1) / s.every, begin = kept * s.every, end = s.T;
    auto memory_before = [&](Index step, Index e) NTM_INLINE -> const T* {
        const Size b = first + e;
        if (step == s.T) return final_memory + b * MN;
        if (step == 0) return initial.memory + s.initial(b) * MN;
        if (step == begin || step == end) return trail.memory + ((kept - (step == begin)) * B + b) * MN;
        return segment + (e * s.every + step - begin) * MN;
    };
    Index t = s.T - 1;
    [[maybe_unused]] bool normed = false;  // whether the norms of the memories that a step leaves are known
    // Of what every step finds, n numbers for every element: those of so many steps back are fetched ahead.
    auto left = [&](const auto& own, Size n, const T* place, Index back) NTM_INLINE {
        if (t >= back) own.ahead(n, place - back * B * n);
    };
    for (; t >= 0; --t) {
        auto dparams_kept = [&]() NTM_INLINE { return at(s, out.params, P, 0, t, first); };
        auto dparams_of = [&](const Frame& f) NTM_INLINE { return aside ? f.dparams : dparams_kept(); };
        auto dfeatures_of = [&](const Frame& f, Index e) NTM_INLINE -> const T* {
            if (Team::takes_ends) return f.features + e * (H + F);
            return at(s, grad_outputs, H + F, 0, t, first + e);
        };
        if (t < begin) end = begin, begin -= s.every, --kept;
        if (t + 1 == end)
            team.elements(E, [&](const auto& own, Index e, Index room) NTM_INLINE {
                for (Index again = begin; again < t; ++again) {
                    Arena<T> arena{inner_of(frame(), room)};
                    const Activated<T> active =
                        place_active(arena, s.step, left_active<Team>(s, trail, again, first + e));
                    if constexpr (Team::staged)
                        active.write_vectors(own, s.step, o, at(s, trail.params, P, 0, again, first + e));
                    else if (again + 1 < t)  // the next e and a
                        own.ahead(2 * s.step.W * s.step.M, active.erase + B * s.step.active());
                    if (again + 1 < t) own.ahead(WN, at(s, trail.write_weights, WN, 0, again + 1, first + e));
                    own.sync();
                    write(own, s.step.W, s.step.N, s.step.M, memory_before(again, e),
                          at(s, trail.write_weights, WN, 0, again, first + e), active.erase, active.add,
                          segment + (e * s.every + again + 1 - begin) * MN);
                    own.sync();
                }
            });
        if constexpr (Team::takes_ends) {
            const Frame& f = frame();
            team.elements(E, [&](const auto& own, Index e, Index) NTM_INLINE {
                clear(own, H + F, f.features + e * (H + F));
                left(own, s.O, at(s, grad_outputs, s.O, 0, t, first + e), 1);
            });
            team.product(E, s.O, H + F, at(s, grad_outputs, s.O, 0, t, first), w.output, f.features);
        }
        team.elements(E, [&](const auto& own, Index e, Index room) NTM_INLINE {
            const Frame& f = frame();
            const Size b = first + e;
            auto fetch = [&](T* to, const T* from, Index n) NTM_INLINE -> const T* {
                own.put(n, from, to + e * n);
                return aside ? to + e * n : from;
            };
            // Of what a step finds and leaves, n numbers each: what this one leaves was fetched as what the next finds.
            auto fetch_both = [&](T* two, Index n, const T*& before, const T*& after) NTM_INLINE {
                T* place = two + (t + 1) % 2 * E * n;
                if (t + 1 == s.T) fetch(place, after, n);
                after = place + e * n;
                before = fetch(two + t % 2 * E * n, before, n);
            };
            const T *before = memory_before(t, e), *after = memory_before(t + 1, e);
            const TileState<const T> start = initial_of(s, initial, b);
            const T* earlier_rw = t ? at(s, trail.read_weights, RN, 0, t - 1, b) : start.read_weights;
            const T* earlier_ww = t ? at(s, trail.write_weights, WN, 0, t - 1, b) : start.write_weights;
            const T *rw = at(s, trail.read_weights, RN, 0, t, b), *ww = at(s, trail.write_weights, WN, 0, t, b);
            left(own, RN, rw, 2);  // this step reads those of the one before, too
            left(own, WN, ww, 2);
            left(own, P, at(s, trail.params, P, 0, t, b), 1);
            left(own, P, dparams_kept() + e * P, 1);
            if constexpr (!Team::staged) left(own, s.step.active(), left_active<Team>(s, trail, t, b), 1);
            if (t == begin && kept > 1) own.ahead(MN, trail.memory + ((kept - 2) * B + b) * MN);
            if constexpr (Team::holds_memory) fetch_both(f.memories, MN, before, after);
            if constexpr (aside) {
                fetch_both(f.read_weights, RN, earlier_rw, rw);
                fetch_both(f.write_weights, WN, earlier_ww, ww);
            }
            const T* params = fetch(f.params, at(s, trail.params, P, 0, t, b), P);
            T* dr = f.dr + room * ntm::room(F);
            own.tiles(F, [&](auto tile) NTM_INLINE {
                tile.store(dr, tile.load(dfeatures_of(f, e) + H) + tile.load(f.grad.reads + e * F));
            });
            copy(own, H, dfeatures_of(f, e), f.dh + e * H);
            own.sync();
            T *dmemory = f.grad.memory + e * MN, *drw = f.grad.read_weights + e * RN;
            T* dww = f.grad.write_weights + e * WN;
            auto step = [&](auto norms) NTM_INLINE {
                memory_step_backward(own, s.step, o, before, earlier_rw, earlier_ww, params, after, rw, ww, dr, dmemory,
                                     drw, dww, dmemory, drw, dww, dparams_of(f) + e * P, inner_of(f, room),
                                     left_active<Team>(s, trail, t, b), norms);
            };
            if constexpr (Team::staged) {
                step(nullptr);
            } else {
                Norms<T> norms = {f.norms + e * s.step.N, normed};
                step(&norms);
                if (e + 1 == E) normed = norms.known;
            }
        });
        team.sync();
        {
            const Frame& f = frame();
            team.product(E, P, H, dparams_of(f), w.heads, f.dh);
        }
        team.sync();
        for (Index l = s.L - 1; l >= 0; --l) {
            const LayerWeights<T, Weight>& layer = w.layers[l];
            const Index K = s.fed(l);
            auto dx_kept = [&]() NTM_INLINE {
                return l ? at(s, out.upper_x, G, l - 1, t, first) : at(s, out.x, G, 0, t, first);
            };
            auto dy_kept = [&]() NTM_INLINE { return at(s, out.y, G, l, t, first); };
            auto dx_of = [&](const Frame& f) NTM_INLINE { return aside ? f.dx : dx_kept(); };
            auto dy_of = [&](const Frame& f) NTM_INLINE { return aside ? f.dy : dy_kept(); };
            auto dhidden_of = [&](const Frame& f) NTM_INLINE { return f.grad.hidden + l * f.grad.span * H; };
            // A layer's hands the layer below its dh, in the other of two places.
            auto dh_of = [&](const Frame& f) NTM_INLINE { return (s.L - 1 - l) % 2 ? f.next : f.dh; };
            auto below_of = [&](const Frame& f) NTM_INLINE {
                return !l ? f.grad.reads : (s.L - 1 - l) % 2 ? f.dh : f.next;
            };
            team.elements(E, [&](const auto& own, Index e, Index) NTM_INLINE {
                const Frame& f = frame();
                const Size b = first + e;
                const T* x = l ? at(s, trail.upper_x, G, l - 1, t, b) : at(s, trail.x, G, 0, t, b);
                const TileState<const T> start = initial_of(s, initial, b);
                T *dh = dh_of(f) + e * H, *dx = dx_of(f) + e * G, *dhidden = dhidden_of(f) + e * H;
                left(own, G, x, 1);
                own.tiles(H, [&](auto tile) NTM_INLINE { tile.store(dh, tile.load(dh) + tile.load(dhidden)); });
                if (s.gru) {
                    const T* hidden = !t            ? start.hidden + l * start.span * H
                                      : l + 1 < s.L ? at(s, trail.hidden, H, l, t - 1, b)
                                                    : at(s, trail.features, H + F, 0, t - 1, b);
                    left(own, G, at(s, trail.y, G, l, t, b), 1);
                    if (t > 1) own.ahead(H, hidden - B * (l + 1 < s.L ? H : H + F));
                    gru_gates_backward<true>(own, H, x, at(s, trail.y, G, l, t, b), hidden, dh, dx, dy_of(f) + e * G,
                                             dhidden);
                    clear(own, K, below_of(f) + e * K);
                } else {
                    const T* cell = t ? at(s, trail.cell, H, l, t - 1, b) : start.cell + l * start.span * H;
                    T* dcell = f.grad.cell + (l * f.grad.span + e) * H;
                    left(own, H, at(s, trail.cell, H, l, t, b), 2);
                    lstm_gates_backward<true>(own, H, x, cell, at(s, trail.cell, H, l, t, b), dh, dcell, dx, dcell);
                    clear(own, K + H, f.joined + e * (K + H));
                }
            });
            team.sync();
            {
                const Frame& f = frame();
                for_gates(s.gru, [&](bool second) NTM_INLINE {
                    team.product(E, G, !s.gru ? K + H : second ? H : K, second ? dy_of(f) : dx_of(f),
                                 second ? layer.hidden : layer.fed,
                                 !s.gru ? f.joined : second ? dhidden_of(f) : below_of(f));
                });
            }
            team.sync();
            team.elements(E, [&](const auto& own, Index e, Index) NTM_INLINE {
                const Frame& f = frame();
                own.put(G, dx_of(f) + e * G, dx_kept() + e * G);
                if (s.gru) {
                    own.put(G, dy_of(f) + e * G, dy_kept() + e * G);
                } else {
                    const T* joined = f.joined + e * (K + H);
                    copy(own, K, joined, below_of(f) + e * K);
                    copy(own, H, joined + K, dhidden_of(f) + e * H);
                }
                if (l == 0) own.put(P, dparams_of(f) + e * P, dparams_kept() + e * P);
            });
            // The layer below has rows of another length: one may lie where another element's was.
            team.sync();
        }
    }
    if constexpr (Team::staged)
        team.elements(E, [&](const auto& own, Index e, Index) NTM_INLINE {
            copy_state(own, s, true, e, as_const(frame().grad), e, tile_of(s, grad, first));
        });
}

}  // namespace ntm
