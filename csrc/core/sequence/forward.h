// The whole sequence, forward. core/sequence.h tells what a Crew is.
#pragma once

#include "core/sequence/layout.h"

namespace ntm {

// How a tile's scratch is used on the way forward. Each is [E, ...]; inner is one per slot.
//
// What a layer and the heads compute lies in the trail; or aside, here, if the crew is staged (the trail is too far
// off) or if nothing is kept.
template <class T>
struct SequenceFrame {
    T* inner;         // a memory step's scratch
    T* joined;        // rows to be multiplied: inputs, what the layer is fed, hidden state
    T *x, *y;         // a layer's products, later its activated gates
    T *params, *features, *active;
    T* norms;         // of the memories' rows, from one step to the next
    TileState<T> state;

    static constexpr Size scratch(const SequenceSizes& s, Size E, bool keep, const SequenceStaging& g) {
        const Size G = s.gates();
        return g.slots * room(s.step.forward_scratch()) + room(E * row(s, g.takes_ends), g.staged ? 0 : E * s.step.N) +
               (g.staged || !keep) *
                   room(E * G, s.products() == 2 ? E * G : 0, E * s.step.params(), g.takes_ends * E * s.features(),
                        g.staged ? 0 : s.step.active()) +
               g.holds_state * TileState<T>::scratch(s, E, g.holds_memory);
    }

    // The longest row that is joined for a layer's product
    static constexpr Size row(const SequenceSizes& s, bool takes_ends) {
        if (s.products() == 2) return takes_ends ? s.I + s.read_size() : 0;
        return takes_ends * s.I + s.widest();
    }

    template <class Crew>
    NTM_FN SequenceFrame(const Crew& crew, const SequenceSizes& s, Size E, bool aside, bool ordered,
                         const TileState<T>& place) {
        Arena<T> arena{crew.scratch()};
        inner = arena.take(Crew::slots(E) * room(s.step.forward_scratch()));
        joined = arena.take(E * row(s, Crew::takes_ends));
        x = arena.take(aside * E * s.gates());
        y = arena.take(aside * (s.products() == 2) * E * s.gates());
        params = arena.take(aside * E * s.step.params());
        features = arena.take(aside * Crew::takes_ends * E * s.features());
        active = arena.take(Crew::staged ? 0 : aside * s.step.active());
        norms = arena.take(Crew::staged ? 0 : E * s.step.N);
        state = hold(crew, arena, s, E, ordered, place);
    }
};

// sequence()'s arguments and its phases, which all work on step t and the elements that take it.
template <class Crew, class Weight, class T = typename Crew::Real>
struct SequencePass : ElementSizes {
    using Frame = SequenceFrame<T>;

    const Crew& crew;
    const SequenceSizes& s;
    const StepOptions& o;
    const Size first;
    const Index tile;  // elements
    const SequenceOrder order;
    const bool keep;
    const SequenceWeights<T, Weight>& w;
    const T* const inputs;
    T* const outputs;
    const SequenceState<const T>& initial;
    const SequenceState<T>& final;
    const SequenceTrail<T>& trail;

    const bool aside = Crew::staged || !keep;
    const Frame laid_once = laid(tile);
    Index t = 0;
    Index E = tile;       // of the tile's elements so many take step t: they are the first
    bool normed = false;  // whether frame().norms belong to the memories; the same for all elements

    NTM_FN SequencePass(const Crew& crew, const SequenceSizes& s, const StepOptions& o, Size first, Index tile,
                        const Index* order, bool keep, const SequenceWeights<T, Weight>& w, const T* inputs,
                        T* outputs, const SequenceState<const T>& initial, const SequenceState<T>& final,
                        const SequenceTrail<T>& trail)
        : ElementSizes(s), crew(crew), s(s), o(o), first(first), tile(tile), order{order, s}, keep(keep),
          w(w), inputs(inputs), outputs(outputs), initial(initial), final(final), trail(trail) {}

    NTM_FN void run() {
        begin();
        for (; t < s.T; ++t) {
            E = order.taking(t, first, E);
            if (E == 0) break;
            for (Index l = 0; l < s.L; ++l) {
                feed_layer(l);
                crew.sync();
                multiply_layer(l);
                crew.sync();
                update_layer(l);
            }
            crew.sync();
            multiply_heads();
            crew.sync();
            step_memories();
            if constexpr (Crew::takes_ends)
                crew.product(E, H + F, s.O, features_of(frame(), 0), w.output, at(s, outputs, s.O, 0, t, first));
        }
        end();
    }

    // --- where things are ---

    NTM_FN Frame laid(Size elements) const {
        return Frame(crew, s, elements, aside, order.lengths, tile_of(s, final, first));
    }
    // Laid out once; by a staged crew anew at every call, because a GPU is short of registers for so many pointers.
    NTM_FN decltype(auto) frame() const {
        if constexpr (Crew::staged)
            return laid(crew.again(tile));
        else
            return (laid_once);
    }

    NTM_FN T* kept_x(Index l) const {
        return l ? at(s, trail.upper_x, G, l - 1, t, first) : at(s, trail.x, G, 0, t, first);
    }
    NTM_FN T* kept_y(Index l) const { return at(s, trail.y, G, l, t, first); }
    NTM_FN T* x_of(const Frame& f, Index l) const { return aside ? f.x : kept_x(l); }
    NTM_FN T* y_of(const Frame& f, Index l) const { return aside ? f.y : kept_y(l); }
    NTM_FN T* params_of(const Frame& f) const { return aside ? f.params : at(s, trail.params, P, 0, t, first); }
    NTM_FN T* features_of(const Frame& f, Index e) const {
        if (Crew::takes_ends && aside) return f.features + e * (H + F);
        return at(s, trail.features, H + F, 0, t, first + e);
    }
    NTM_FN T* fed_of(const Frame& f, Index l) const { return l ? f.state.hidden_of(s, l - 1) : f.state.reads; }
    // The memory of the tile's element e, and its whole state.
    NTM_FN T* memory_of(const Frame& f, Index e) const {
        return Crew::holds_memory ? f.state.memory + e * MN : final.memory + order.number(first + e) * MN;
    }
    NTM_FN TileState<T> state_of(const Frame& f, Index e) const {
        TileState<T> own = f.state.element(s, e);
        own.memory = memory_of(f, e);
        return own;
    }
    NTM_FN T* kept_memory(Index number, Index e) const { return trail.memory + ((number - 1) * s.B + first + e) * MN; }

    // Inputs that stand in front of what a layer is fed.
    NTM_FN Index inputs_of(Index l) const { return Crew::takes_ends && l == 0 ? s.I : 0; }
    // Whether what a layer is fed is copied, to be joined with other numbers for a single product.
    NTM_FN bool joins(Index l) const { return (Crew::takes_ends && l == 0) || s.products() == 1; }

    // place is in an array with n numbers for every element and step: fetches the next step's.
    template <class Team>
    NTM_FN void fetch_next(const Team& team, Size n, const T* place) const {
        if (t + 1 < s.T) team.ahead(n, place + s.B * n);
    }
    // The same of the trail, where it is kept.
    template <class Team>
    NTM_FN void fetch_next_kept(const Team& team, Size n, const T* place) const {
        if (keep) fetch_next(team, n, place);
    }
    // Leaves n numbers in the trail.
    template <class Team>
    NTM_FN void leave(const Team& team, Size n, const T* from, T* to) const {
        if (keep && from != to) copy(team, n, from, to);
        fetch_next_kept(team, n, to);
    }

    // --- the phases ---

    NTM_FN void begin() const {
        crew.elements(tile, [&](const auto& team, Index e, Index) NTM_INLINE {
            copy_state(team, s, true, initial_of(s, initial, order.number(first + e)), state_of(frame(), e));
        });
    }

    NTM_FN void end() const {
        crew.elements(tile, [&](const auto& team, Index e, Index) NTM_INLINE {
            if (Crew::staged || order.lengths)
                copy_state(team, s, true, as_const(state_of(frame(), e)),
                           tile_of(s, final, order.number(first + e)));
            for (Index step = order.length(first + e); step < s.T; ++step) clear_step(team, step, first + e);
        });
    }

    // What a step leaves to the caller is 0 where an element does not take it.
    template <class Team>
    NTM_FN void clear_step(const Team& team, Index step, Size b) const {
        if constexpr (Crew::takes_ends) {
            clear(team, s.O, at(s, outputs, s.O, 0, step, b));
        } else {
            clear(team, H + F, at(s, trail.features, H + F, 0, step, b));
            if (keep)
                for (Index l = 0; l + 1 < s.L; ++l) clear(team, H, at(s, trail.hidden, H, l, step, b));
        }
    }

    // The memory that a step finds is left in the trail at every s.every-th step.
    template <class Team>
    NTM_FN void leave_memory(const Team& team, const Frame& f, Index e) const {
        const Index every = crew.again(s.every);
        if (keep && t && t % every == 0) copy(team, MN, memory_of(f, e), kept_memory(t / every, e));
        if (keep && t + 1 < s.T && (t + 1) % every == 0) team.ahead(MN, kept_memory((t + 1) / every, e));
    }

    // Puts the biases where the layer's products will be added, and joins the rows that will be multiplied.
    NTM_FN void feed_layer(Index l) const {
        const LayerWeights<T, Weight>& layer = w.layers[l];
        const bool takes_inputs = Crew::takes_ends && l == 0;
        const Index I = inputs_of(l), K = s.fed(l);
        crew.elements(E, [&](const auto& team, Index e, Index) NTM_INLINE {
            const Frame& f = frame();
            T* x = x_of(f, l) + e * G;
            team.sync();
            if (l == 0) leave_memory(team, f, e);
            if (l || takes_inputs)
                copy(team, G, layer.bias_x, x);
            else
                team.tiles(G, [&](auto tile) NTM_INLINE {
                    tile.store(x, tile.load(kept_x(l) + e * G) + tile.load(layer.bias_x));
                });
            T* row = f.joined + e * (I + K + s.joined_hidden());
            if (takes_inputs) {
                const T* input = at(s, inputs, I, 0, t, first + e);
                copy(team, I, input, row);
                fetch_next(team, I, input);
            }
            if (joins(l)) copy(team, K, fed_of(f, l) + e * K, row + I);
            if (s.products() == 2)
                copy(team, G, layer.bias_y, y_of(f, l) + e * G);
            else
                copy(team, H, f.state.hidden_of(s, l) + e * H, row + I + K);
        });
    }

    NTM_FN void multiply_layer(Index l) const {
        const LayerWeights<T, Weight>& layer = w.layers[l];
        const Frame& f = frame();
        each_product(s, [&](bool second) NTM_INLINE {
            crew.product(E, second ? H : inputs_of(l) + s.fed(l) + s.joined_hidden(), G,
                         second ? f.state.hidden_of(s, l) : joins(l) ? f.joined : fed_of(f, l),
                         second ? layer.hidden : layer.fed, second ? y_of(f, l) : x_of(f, l));
        });
    }

    // The only place where forward asks for the kind of controller: gates, hidden and cell state.
    template <class Team>
    NTM_FN void activate_gates(const Team& team, const Frame& f, Index l, Index e) const {
        T *x = x_of(f, l) + e * G, *active = keep ? kept_x(l) + e * G : x, *hidden = f.state.hidden_of(s, l) + e * H;
        fetch_next_kept(team, G, active);
        if (s.controller == Controller::gru) {
            T* y = y_of(f, l) + e * G;
            gru_gates(team, H, x, y, hidden, hidden, active);
            leave(team, G, y, kept_y(l) + e * G);
        } else {
            T* cell = f.state.cell_of(s, l) + e * H;
            lstm_gates(team, H, x, cell, hidden, cell, active);
            leave(team, H, cell, at(s, trail.cell, H, l, t, first + e));
        }
    }

    NTM_FN void update_layer(Index l) const {
        crew.elements(E, [&](const auto& team, Index e, Index) NTM_INLINE {
            const Frame& f = frame();
            activate_gates(team, f, l, e);
            const T* hidden = f.state.hidden_of(s, l) + e * H;
            if (l + 1 < s.L) {
                leave(team, H, hidden, at(s, trail.hidden, H, l, t, first + e));
            } else {
                copy(team, H, hidden, features_of(f, e));
                fetch_next_kept(team, H + F, features_of(f, e));
                copy(team, P, w.heads_bias, params_of(f) + e * P);
            }
        });
    }

    NTM_FN void multiply_heads() const {
        const Frame& f = frame();
        crew.product(E, H, P, f.state.hidden_of(s, s.L - 1), w.heads, params_of(f));
    }

    NTM_FN void step_memories() {
        crew.elements(E, [&](const auto& team, Index e, Index slot) NTM_INLINE {
            step_memory(team, e, slot);
            team.sync();
            leave_step(team, e);
        });
    }

    template <class Team>
    NTM_FN void step_memory(const Team& team, Index e, Index slot) {
        const Frame& f = frame();
        T *memory = memory_of(f, e), *read_weights = f.state.read_weights + e * RN;
        T* write_weights = f.state.write_weights + e * WN;
        T* inner = f.inner + slot * room(s.step.forward_scratch());
        auto step = [&](auto active, auto norms) NTM_INLINE {
            memory_step(team, s.step, o, memory, read_weights, write_weights, params_of(f) + e * P,
                        f.state.reads + e * F, memory, read_weights, write_weights, inner, active, norms);
        };
        if constexpr (Crew::staged) {
            step(nullptr, nullptr);
        } else {
            Norms<T> norms = {f.norms + e * s.step.N, normed};
            T* active = keep ? left_active<Crew>(s, trail, t, first + e) : f.active;
            fetch_next_kept(team, s.step.active(), active);
            step(active, &norms);
            if (e + 1 == E) normed = norms.known;
        }
    }

    template <class Team>
    NTM_FN void leave_step(const Team& team, Index e) const {
        const Frame& f = frame();
        copy(team, F, f.state.reads + e * F, features_of(f, e) + H);
        if constexpr (Crew::takes_ends) {
            T* output = at(s, outputs, s.O, 0, t, first + e);
            copy(team, s.O, w.output_bias, output);
            fetch_next(team, s.O, output);
        }
        leave(team, P, params_of(f) + e * P, at(s, trail.params, P, 0, t, first + e));
        leave(team, RN, f.state.read_weights + e * RN, at(s, trail.read_weights, RN, 0, t, first + e));
        leave(team, WN, f.state.write_weights + e * WN, at(s, trail.write_weights, WN, 0, t, first + e));
    }
};

// Takes elements first .. first + E - 1 through all steps, from the initial state to the final one. order: the lengths
// of a SequenceOrder, or nullptr. keep: the trail is left for the backward. A crew that does not take the ends uses
// neither inputs nor outputs.
template <class Crew, class Weight, class T = typename Crew::Real>
NTM_FN void sequence(const Crew& crew, const SequenceSizes& s, const StepOptions& o, Size first, Index E,
                     const Index* order, bool keep, const SequenceWeights<T, Weight>& w,
                     const T* inputs /*[T, B, I]*/, T* outputs /*[T, B, O]*/, const SequenceState<const T>& initial,
                     const SequenceState<T>& final, const SequenceTrail<T>& trail) {
    static_assert(Crew::staged || Crew::takes_ends);  // normed is a single thread's
    SequencePass<Crew, Weight>(crew, s, o, first, E, order, keep, w, inputs, outputs, initial, final, trail).run();
}

}  // namespace ntm
