// The whole sequence, backward. core/sequence.h tells what a Crew is.
#pragma once

#include "core/sequence/layout.h"

namespace ntm {

// How a tile's scratch is used on the way back. Each is [E, ...]; inner and dreads are one per slot. Names with a d in
// front are gradients.
//
// A staged crew keeps the gradients of the gates and of the raw head parameters aside, here, and copies here what it
// reads more than once. Other crews work where these are.
template <class T>
struct SequenceBackwardFrame {
    T *inner, *dreads;       // a memory step's scratch and the gradient of what it read
    T *dhidden, *dbelow;     // of a layer's hidden state and of that of the layer below; they take turns
    T* joined;               // of what was joined for a layer's product
    T* dfeatures;
    T* norms;                // of the memories' rows, from one step to the one before
    T *dx, *dy, *dparams;    // aside
    T *params, *read_weights, *write_weights, *memories;  // fetched; the last three for two steps that take turns
    TileState<T> grad;

    static constexpr Size scratch(const SequenceSizes& s, Size E, const SequenceStaging& g) {
        const Size G = s.gates(), P = s.step.params(), RN = s.step.R * s.step.N, WN = s.step.W * s.step.N;
        const bool one = s.products() == 1;
        return g.slots * room(s.step.backward_scratch()) + g.slots * room(s.read_size()) + room(E * s.H, E * s.H) +
               room(one ? E * s.widest() : 0, g.takes_ends * E * s.features(), g.staged ? 0 : E * s.step.N) +
               g.staged * room(E * G, one ? 0 : E * G, E * P, E * P, 2 * E * RN, 2 * E * WN) +
               g.holds_state * TileState<T>::scratch(s, E, g.holds_memory) +
               g.holds_memory * room(2 * E * s.memory());
    }

    template <class Crew>
    NTM_FN SequenceBackwardFrame(const Crew& crew, const SequenceSizes& s, Size E, bool ordered,
                                 const TileState<T>& place) {
        constexpr bool aside = Crew::staged;
        const Size G = s.gates(), P = s.step.params();
        const bool one = s.products() == 1;
        Arena<T> arena{crew.scratch()};
        inner = arena.take(Crew::slots(E) * room(s.step.backward_scratch()));
        dreads = arena.take(Crew::slots(E) * room(s.read_size()));
        dhidden = arena.take(E * s.H);
        dbelow = arena.take(E * s.H);
        joined = arena.take(one ? E * s.widest() : 0);
        dfeatures = arena.take(Crew::takes_ends * E * s.features());
        norms = arena.take(Crew::staged ? 0 : E * s.step.N);
        dx = arena.take(aside * E * G);
        dy = arena.take(aside * !one * E * G);
        dparams = arena.take(aside * E * P);
        params = arena.take(aside * E * P);
        read_weights = arena.take(aside * 2 * E * s.step.R * s.step.N);
        write_weights = arena.take(aside * 2 * E * s.step.W * s.step.N);
        memories = arena.take(Crew::holds_memory * 2 * E * s.memory());
        grad = hold(crew, arena, s, E, ordered, place);
    }
};

// sequence_backward()'s arguments and its phases, which all work on step t and the elements that took it.
template <class Crew, class Weight, class T = typename Crew::Real>
struct SequenceBackwardPass : ElementSizes {
    using Frame = SequenceBackwardFrame<T>;
    static constexpr bool aside = Crew::staged;

    const Crew& crew;
    const SequenceSizes& s;
    const StepOptions& o;
    const Size first;
    const Index tile;  // elements
    const SequenceOrder order;
    const SequenceWeights<T, Weight>& w;
    const SequenceState<const T>& initial;
    const T* const final_memory;
    const SequenceTrail<const T>& trail;
    const T* const grad_outputs;
    const SequenceState<const T>& grad_final;
    const SequenceState<T>& grad;
    const SequenceGrads<T>& out;
    T* const grad_inputs;
    T* const segment;

    const Frame laid_once = laid(tile);
    Index t = order.length(first) - 1;
    Index normed = 0;  // of so many, the first, frame().norms belong to the memories that step t left
    // Step t is in the segment of steps from begin to end. Memory number `kept` is the one before step begin; number 0
    // is the initial one.
    Index kept = t / s.every, begin = kept * s.every, end = t + 1;

    NTM_FN SequenceBackwardPass(const Crew& crew, const SequenceSizes& s, const StepOptions& o, Size first, Index tile,
                                const Index* order, const SequenceWeights<T, Weight>& w,
                                const SequenceState<const T>& initial, const T* final_memory,
                                const SequenceTrail<const T>& trail, const T* grad_outputs,
                                const SequenceState<const T>& grad_final, const SequenceState<T>& grad,
                                const SequenceGrads<T>& out, T* grad_inputs, T* segment)
        : ElementSizes(s), crew(crew), s(s), o(o), first(first), tile(tile), order{order, s}, w(w),
          initial(initial), final_memory(final_memory), trail(trail), grad_outputs(grad_outputs),
          grad_final(grad_final), grad(grad), out(out), grad_inputs(grad_inputs), segment(segment) {}

    NTM_FN void run() {
        begin_grad();
        for (; t >= 0; --t) {
            if (t < begin) end = begin, begin -= s.every, --kept;
            if (t + 1 == end) rewrite_segment();
            if constexpr (Crew::takes_ends) through_outputs();
            through_steps();
            crew.sync();
            multiply_heads();
            crew.sync();
            for (Index l = s.L - 1; l >= 0; --l) {
                through_gates(l);
                crew.sync();
                if constexpr (Crew::takes_ends)
                    if (l == 0 && grad_inputs) through_inputs();
                multiply_layer(l);
                crew.sync();
                hand_on(l);
                // The layer below has rows of another length: its writes may meet another element's old row.
                crew.sync();
            }
        }
        end_grad();
    }

    // Of the tile's elements so many took step t: they are the first.
    NTM_FN Index taking() const { return order.taking(crew.again(t), first, tile); }

    // --- where things are ---

    NTM_FN Frame laid(Size elements) const { return Frame(crew, s, elements, order.lengths, tile_of(s, grad, first)); }
    // Laid out once; by a staged crew anew at every call, because a GPU is short of registers for so many pointers.
    NTM_FN decltype(auto) frame() const {
        if constexpr (Crew::staged)
            return laid(crew.again(tile));
        else
            return (laid_once);
    }

    NTM_FN T* inner_of(const Frame& f, Index slot) const {
        return f.inner + slot * room(s.step.backward_scratch());
    }
    NTM_FN T* dparams_out() const { return at(s, out.params, P, 0, t, first); }
    NTM_FN T* dparams_of(const Frame& f) const { return aside ? f.dparams : dparams_out(); }
    NTM_FN const T* dfeatures_of(const Frame& f, Index e) const {
        if (Crew::takes_ends) return f.dfeatures + e * (H + F);
        return at(s, grad_outputs, H + F, 0, t, first + e);
    }
    NTM_FN T* dx_out(Index l) const {
        return l ? at(s, out.upper_x, G, l - 1, t, first) : at(s, out.x, G, 0, t, first);
    }
    NTM_FN T* dy_out(Index l) const { return at(s, out.y, G, l, t, first); }
    NTM_FN T* dx_of(const Frame& f, Index l) const { return aside ? f.dx : dx_out(l); }
    NTM_FN T* dy_of(const Frame& f, Index l) const { return aside ? f.dy : dy_out(l); }
    // The gradient of a layer's hidden state after step t. It takes turns with that of the layer below.
    NTM_FN T* dhidden_of(const Frame& f, Index l) const { return (s.L - 1 - l) % 2 ? f.dbelow : f.dhidden; }
    // The gradient of what a layer was fed: the reads, or the layer below's hidden state.
    NTM_FN T* dfed_of(const Frame& f, Index l) const {
        return !l ? f.grad.reads : (s.L - 1 - l) % 2 ? f.dhidden : f.dbelow;
    }

    // The gradients of the memory of the tile's element e, and of its whole state.
    NTM_FN T* dmemory_of(const Frame& f, Index e) const {
        return Crew::holds_memory ? f.grad.memory + e * MN : grad.memory + order.number(first + e) * MN;
    }
    NTM_FN TileState<T> grad_of(const Frame& f, Index e) const {
        TileState<T> own = f.grad.element(s, e);
        own.memory = dmemory_of(f, e);
        return own;
    }

    NTM_FN TileState<const T> start_of(Index e) const { return initial_of(s, initial, order.number(first + e)); }
    // The memory that element e found at a step of this segment, or at the next one's first.
    NTM_FN const T* memory_before(Index step, Index e) const {
        const Size p = first + e;
        if (step == 0) return start_of(e).memory;
        if (step == begin || step == end) return trail.memory + ((kept - (step == begin)) * s.B + p) * MN;
        return segment + (e * s.every + step - begin) * MN;
    }

    // Whether step t was the last that element e took.
    NTM_FN bool is_last(Index e) const { return t + 1 == order.length(first + e); }

    // place is in an array with n numbers for every element and step: fetches those of `back` steps before.
    template <class Team>
    NTM_FN void fetch_earlier(const Team& team, Size n, const T* place, Index back) const {
        if (t >= back) team.ahead(n, place - back * s.B * n);
    }

    // --- the phases ---

    NTM_FN void begin_grad() const {
        crew.elements(tile, [&](const auto& team, Index e, Index) NTM_INLINE {
            copy_state(team, s, grad_final.memory != nullptr, tile_of(s, grad_final, order.number(first + e)),
                       grad_of(frame(), e));
        });
    }

    NTM_FN void end_grad() const {
        crew.elements(tile, [&](const auto& team, Index e, Index) NTM_INLINE {
            if (Crew::staged || order.lengths)
                copy_state(team, s, true, as_const(grad_of(frame(), e)), tile_of(s, grad, order.number(first + e)));
            for (Index step = order.length(first + e); step < s.T; ++step) clear_step(team, step, first + e);
        });
    }

    // What a step leaves to the caller, who may make weight gradients of it, is 0 where an element did not take it.
    template <class Team>
    NTM_FN void clear_step(const Team& team, Index step, Size b) const {
        if constexpr (Crew::takes_ends) {
            if (grad_inputs) clear(team, s.I, at(s, grad_inputs, s.I, 0, step, b));
        } else {
            for (Index l = 0; l < s.L; ++l) {
                clear(team, G, l ? at(s, out.upper_x, G, l - 1, step, b) : at(s, out.x, G, 0, step, b));
                if (s.products() == 2) clear(team, G, at(s, out.y, G, l, step, b));
            }
            clear(team, P, at(s, out.params, P, 0, step, b));
        }
    }

    // Writes the segment's memories again, from the weights that were kept, up to the one that an element's last step
    // in it finds.
    NTM_FN void rewrite_segment() const {
        crew.elements(order.taking(begin, first, tile), [&](const auto& team, Index e, Index slot) NTM_INLINE {
            const Index own_end = order.length(first + e), last = (own_end < end ? own_end : end) - 1;
            for (Index step = begin; step < last; ++step) {
                const T* weights = at(s, trail.write_weights, WN, 0, step, first + e);
                Arena<T> arena{inner_of(frame(), slot)};
                const Activated<T> active =
                    place_active(arena, s.step, left_active<Crew>(s, trail, step, first + e));
                if constexpr (Crew::staged)
                    active.write_vectors(team, s.step, o, at(s, trail.params, P, 0, step, first + e));
                else if (step + 1 < last)  // the next erase and add vectors
                    team.ahead(2 * s.step.W * s.step.M, active.erase + s.B * s.step.active());
                if (step + 1 < last) team.ahead(WN, weights + s.B * WN);
                team.sync();
                write(team, s.step.W, s.step.N, s.step.M, memory_before(step, e), weights, active.erase, active.add,
                      segment + (e * s.every + step + 1 - begin) * MN);
                team.sync();
            }
        });
    }

    // The features' gradient, through the output layer.
    NTM_FN void through_outputs() const {
        const Frame& f = frame();
        crew.elements(taking(), [&](const auto& team, Index e, Index) NTM_INLINE {
            clear(team, H + F, f.dfeatures + e * (H + F));
            fetch_earlier(team, s.O, at(s, grad_outputs, s.O, 0, t, first + e), 1);
        });
        crew.product(taking(), s.O, H + F, at(s, grad_outputs, s.O, 0, t, first), w.output, f.dfeatures);
    }

    // What a step found and what it left.
    struct Record {
        const T *memory, *new_memory, *read_weights, *new_read_weights, *write_weights, *new_write_weights, *params;
    };

    NTM_FN Record record_of(Index e) const {
        const Size b = first + e;
        const TileState<const T> start = start_of(e);
        return {memory_before(t, e),
                is_last(e) ? final_memory + order.number(b) * MN : memory_before(t + 1, e),
                t ? at(s, trail.read_weights, RN, 0, t - 1, b) : start.read_weights,
                at(s, trail.read_weights, RN, 0, t, b),
                t ? at(s, trail.write_weights, WN, 0, t - 1, b) : start.write_weights,
                at(s, trail.write_weights, WN, 0, t, b),
                at(s, trail.params, P, 0, t, b)};
    }

    template <class Team>
    NTM_FN void fetch_earlier_record(const Team& team, const Record& r, Index e) const {
        fetch_earlier(team, RN, r.new_read_weights, 2);  // this step reads those of the one before, too
        fetch_earlier(team, WN, r.new_write_weights, 2);
        fetch_earlier(team, P, r.params, 1);
        fetch_earlier(team, P, dparams_out() + e * P, 1);
        if constexpr (!Crew::staged)
            fetch_earlier(team, s.step.active(), left_active<Crew>(s, trail, t, first + e), 1);
        if (t == begin && kept > 1) team.ahead(MN, trail.memory + ((kept - 2) * s.B + first + e) * MN);
    }

    // Copies of a record, in a staged crew's scratch.
    template <class Team>
    NTM_FN void fetch_record(const Team& team, const Frame& f, Index e, Record& r) const {
        auto fetch = [&](T* to, const T*& from, Index n) NTM_INLINE {
            team.put(n, from, to + e * n);
            from = to + e * n;
        };
        const bool last = is_last(e);
        // Two steps take turns: what this step left was fetched before, as what the next step found.
        auto fetch_both = [&](T* two, Index n, const T*& found, const T*& left) NTM_INLINE {
            T* place = two + (t + 1) % 2 * tile * n;
            if (last) fetch(place, left, n);
            left = place + e * n;
            fetch(two + t % 2 * tile * n, found, n);
        };
        if constexpr (Crew::holds_memory) fetch_both(f.memories, MN, r.memory, r.new_memory);
        fetch_both(f.read_weights, RN, r.read_weights, r.new_read_weights);
        fetch_both(f.write_weights, WN, r.write_weights, r.new_write_weights);
        fetch(f.params, r.params, P);
    }

    // The memory steps of all elements.
    NTM_FN void through_steps() {
        crew.elements(taking(), [&](const auto& team, Index e, Index slot) NTM_INLINE {
            const Frame& f = frame();
            Record r = record_of(e);
            fetch_earlier_record(team, r, e);
            if constexpr (aside) fetch_record(team, f, e, r);
            T* dreads = f.dreads + slot * room(F);
            team.tiles(F, [&](auto tile) NTM_INLINE {
                tile.store(dreads, tile.load(dfeatures_of(f, e) + H) + tile.load(f.grad.reads + e * F));
            });
            copy(team, H, dfeatures_of(f, e), f.dhidden + e * H);
            team.sync();
            through_step(team, f, e, slot, r, dreads);
        });
    }

    template <class Team>
    NTM_FN void through_step(const Team& team, const Frame& f, Index e, Index slot, const Record& r,
                             const T* dreads) {
        T *dmemory = dmemory_of(f, e), *dread_weights = f.grad.read_weights + e * RN;
        T* dwrite_weights = f.grad.write_weights + e * WN;
        auto step = [&](auto norms) NTM_INLINE {
            memory_step_backward(team, s.step, o, r.memory, r.read_weights, r.write_weights, r.params, r.new_memory,
                                 r.new_read_weights, r.new_write_weights, dreads, dmemory, dread_weights,
                                 dwrite_weights, dmemory, dread_weights, dwrite_weights, dparams_of(f) + e * P,
                                 inner_of(f, slot), left_active<Crew>(s, trail, t, first + e), norms);
        };
        if constexpr (Crew::staged) {
            step(nullptr);
        } else {
            Norms<T> norms = {f.norms + e * s.step.N, e < normed};
            step(&norms);
            if (e + 1 == taking()) normed = norms.known ? e + 1 : 0;
        }
    }

    NTM_FN void multiply_heads() const {
        const Frame& f = frame();
        crew.product(taking(), P, H, dparams_of(f), w.heads, f.dhidden);
    }

    // Back through a layer's gates; sets to 0 what its products will be added to.
    NTM_FN void through_gates(Index l) const {
        const Index K = s.fed(l);
        crew.elements(taking(), [&](const auto& team, Index e, Index) NTM_INLINE {
            const Frame& f = frame();
            T *dhidden = dhidden_of(f, l) + e * H, *from_after = f.grad.hidden_of(s, l) + e * H;
            team.tiles(H, [&](auto tile) NTM_INLINE {
                tile.store(dhidden, tile.load(dhidden) + tile.load(from_after));
            });
            gates_backward(team, f, l, e, dhidden);
            if (s.products() == 2)
                clear(team, K, dfed_of(f, l) + e * K);
            else
                clear(team, K + H, f.joined + e * (K + H));
        });
    }

    // The only place where backward asks for the kind of controller. Replaces the gradient of the state after t by that
    // of the state before t, without the part that goes through products.
    template <class Team>
    NTM_FN void gates_backward(const Team& team, const Frame& f, Index l, Index e, const T* dhidden) const {
        const Size b = first + e;
        const TileState<const T> start = start_of(e);
        const T* x = l ? at(s, trail.upper_x, G, l - 1, t, b) : at(s, trail.x, G, 0, t, b);
        T* dx = dx_of(f, l) + e * G;
        fetch_earlier(team, G, x, 1);
        if (s.controller == Controller::gru) {
            const bool last = l + 1 == s.L;
            const T* hidden = !t     ? start.hidden_of(s, l)
                              : last ? at(s, trail.features, H + F, 0, t - 1, b)
                                     : at(s, trail.hidden, H, l, t - 1, b);
            const T* y = at(s, trail.y, G, l, t, b);
            fetch_earlier(team, G, y, 1);
            if (t > 1) team.ahead(H, hidden - s.B * (last ? H + F : H));
            gru_gates_backward<true>(team, H, x, y, hidden, dhidden, dx, dy_of(f, l) + e * G,
                                     f.grad.hidden_of(s, l) + e * H);
        } else {
            const T* cell = t ? at(s, trail.cell, H, l, t - 1, b) : start.cell_of(s, l);
            const T* new_cell = at(s, trail.cell, H, l, t, b);
            T* dcell = f.grad.cell_of(s, l) + e * H;
            fetch_earlier(team, H, new_cell, 2);
            lstm_gates_backward<true>(team, H, x, cell, new_cell, dhidden, dcell, dx, dcell);
        }
    }

    // The inputs' gradient, from that of the first layer's gates.
    NTM_FN void through_inputs() const {
        T* rows = at(s, grad_inputs, s.I, 0, t, first);
        crew.elements(taking(), [&](const auto& team, Index e, Index) NTM_INLINE { clear(team, s.I, rows + e * s.I); });
        crew.product(taking(), G, s.I, dx_of(frame(), 0), w.inputs, rows);
    }

    NTM_FN void multiply_layer(Index l) const {
        const LayerWeights<T, Weight>& layer = w.layers[l];
        const Frame& f = frame();
        each_product(s, [&](bool second) NTM_INLINE {
            crew.product(taking(), G, second ? H : s.fed(l) + s.joined_hidden(), second ? dy_of(f, l) : dx_of(f, l),
                         second ? layer.hidden : layer.fed,
                         second                ? f.grad.hidden_of(s, l)
                         : s.products() == 2 ? dfed_of(f, l)
                                             : f.joined);
        });
    }

    // Takes a layer's gradients to where they belong.
    NTM_FN void hand_on(Index l) const {
        const Index K = s.fed(l);
        crew.elements(taking(), [&](const auto& team, Index e, Index) NTM_INLINE {
            const Frame& f = frame();
            team.put(G, dx_of(f, l) + e * G, dx_out(l) + e * G);
            if (s.products() == 2) {
                team.put(G, dy_of(f, l) + e * G, dy_out(l) + e * G);
            } else {
                const T* joined = f.joined + e * (K + H);
                copy(team, K, joined, dfed_of(f, l) + e * K);
                copy(team, H, joined + K, f.grad.hidden_of(s, l) + e * H);
            }
            if (l == 0) team.put(P, dparams_of(f) + e * P, dparams_out() + e * P);
        });
    }
};

// Takes the gradients of elements first .. first + E - 1 back through all steps. order: as in
// SequenceOrder.
//
// initial is the state before the first step; its reads are not used. grad_outputs is [T, B, O] or, if the crew does
// not take the ends, the features' gradient, [T, B, H + R M]. grad_final is the gradient of the final state, all 0 if
// its memory is nullptr; grad becomes that of the initial one. grad_inputs may be nullptr; only a crew that takes the
// ends uses it. Memories that were not kept are written again, one segment between two kept ones at a time, in
// `segment`: sequence_segment() numbers for this tile alone.
template <class Crew, class Weight, class T = typename Crew::Real>
NTM_FN void sequence_backward(const Crew& crew, const SequenceSizes& s, const StepOptions& o, Size first, Index E,
                              const Index* order, const SequenceWeights<T, Weight>& w,
                              const SequenceState<const T>& initial, const T* final_memory /*[B, M, N]*/,
                              const SequenceTrail<const T>& trail, const T* grad_outputs,
                              const SequenceState<const T>& grad_final, const SequenceState<T>& grad,
                              const SequenceGrads<T>& out, T* grad_inputs /*[T, B, I]*/, T* segment) {
    SequenceBackwardPass<Crew, Weight>(crew, s, o, first, E, order, w, initial, final_memory, trail, grad_outputs,
                                       grad_final, grad, out, grad_inputs, segment)
        .run();
}

}  // namespace ntm
