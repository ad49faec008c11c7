// What a sequence's arrays hold, and which part of them belongs to a tile. core/sequence.h tells what a Crew is.
#pragma once

#include "core/controller.h"
#include "core/step.h"

namespace ntm {

// T steps, B elements, I inputs, O outputs, L layers of H units. The step's sizes are those of one memory.
struct SequenceSizes {
    Index T;
    Size B;
    Index I, O, L, H;
    Controller controller;
    StepSizes step;
    Index every;  // the memory before steps every, 2 every, ... is kept; the one before step 0 is the initial state's
    int shared;   // all elements have one initial state: the B of its arrays is 1

    static constexpr const char* names = "T B I O L H controller step every shared";

    constexpr Index gates() const { return ntm::gates(controller) * H; }
    constexpr int products() const { return ntm::products(controller); }
    constexpr bool has_cell() const { return ntm::has_cell(controller); }
    // Units of a layer's hidden state that are joined to what the layer is fed, for a single product of both.
    constexpr Index joined_hidden() const { return products() == 1 ? H : 0; }

    constexpr Index read_size() const { return step.R * step.M; }
    constexpr Index fed(Index layer) const { return layer ? H : read_size(); }  // by the step; inputs not counted
    constexpr Index widest() const { return (L > 1 && H > read_size() ? H : read_size()) + H; }  // fed and hidden
    constexpr Index features() const { return H + read_size(); }
    constexpr Size memory() const { return step.memory(); }
    constexpr Size initial(Size b) const { return shared ? 0 : b; }  // the index of element b's initial state
};

// Elements may take fewer than T steps. Then a batch is worked on in order of length, the longest element first: those
// of a tile end nearly together, and those that still take steps are the tile's first. Arrays over time, [T, B, ...],
// are in this order; states are in the batch's own. A step that an element does not take leaves its state as it is.
struct SequenceOrder {
    const Index* lengths;  // [2, B]: in this order how many steps an element takes, and its number in the batch; or
                           // nullptr: all take T, and the order is the batch's own
    const SequenceSizes& s;

    NTM_FN Index length(Size p) const { return lengths ? lengths[p] : s.T; }
    NTM_FN Size number(Size p) const { return lengths ? lengths[s.B + p] : p; }
    // How many of the n elements from first on take step t.
    NTM_FN Index taking(Index t, Size first, Index n) const {
        if (lengths)
            while (n > 0 && lengths[first + n - 1] <= t) --n;
        return n;
    }
};

// Numbers of one element.
struct ElementSizes {
    Index H, G;    // hidden units and gates of a layer
    Index F, P;    // reads, raw head parameters
    Index MN;      // memory
    Index RN, WN;  // read and write weights

    NTM_FN explicit ElementSizes(const SequenceSizes& s)
        : H(s.H), G(s.gates()), F(s.read_size()), P(s.step.params()), MN(s.memory()), RN(s.step.R * s.step.N),
          WN(s.step.W * s.step.N) {}
};

// A layer's weights, for one direction, and its biases. [from -> to] is written here for forward; backward goes the
// other way.
template <class T, class Weight = const T*>
struct LayerWeights {
    Weight fed;       // [fed -> gates], or, if there is one product, [fed, hidden -> gates]. Forward, if the crew takes
                      // the ends, the first layer's begins with the inputs.
    Weight hidden;    // [hidden -> gates], where there are two products
    const T* bias_x;  // [gates]
    const T* bias_y;  // [gates], where there are two products
};

template <class T, class Weight = const T*>
struct SequenceWeights {
    const LayerWeights<T, Weight>* layers;  // [L]
    Weight heads;                           // [H -> P]
    const T* heads_bias;                    // [P]
    Weight output;                          // [features -> O], where the crew takes the ends
    const T* output_bias;                   // [O], likewise
    Weight inputs;                          // [I -> gates], likewise, for the gradient of the inputs
};

// The state before or after a step; the caller owns the arrays.
template <class T>
struct SequenceState {
    T* memory;         // [B, M, N]
    T* read_weights;   // [B, R, N]
    T* write_weights;  // [B, W, N]
    T* reads;          // [B, R M]
    T* hidden;         // [L, B, H]
    T* cell;           // [L, B, H], where the controller has one

    static constexpr const char* names = "memory read_weights write_weights reads hidden cell";
};

// What forward leaves to backward. The caller owns the arrays, forward fills them, backward reads them; it may write
// the gradients of x, upper_x and y over them. If forward keeps nothing, only x and features are used, and only by a
// crew that does not take the ends.
template <class T>
struct SequenceTrail {
    T* x;              // [T, B, gates]       the first layer's gates, activated. Before forward, if the crew does not
                       //                     take the ends, the inputs' product, which the caller has put here.
    T* upper_x;        // [L-1, T, B, gates]  the other layers' gates, activated
    T* y;              // [L, T, B, gates]    the hidden states' products, where they are products of their own
    T* hidden;         // [L-1, T, B, H]      hidden states of the layers below the last
    T* cell;           // [L, T, B, H]        where the controller has one
    T* params;         // [T, B, P]           raw head parameters
    T* features;       // [T, B, H + R M]     the last layer's hidden state, and the reads. If the crew does not take
                       //                     the ends, they are always left: the caller makes the outputs of them.
    T* read_weights;   // [T, B, R, N]
    T* write_weights;  // [T, B, W, N]
    T* memory;         // [(T-1) / every, B, M, N]
    T* active;         // [T, B, active()]    the activated head parameters; not used by a staged crew

    static constexpr const char* names =
        "x upper_x y hidden cell params features read_weights write_weights memory active";
};

// What the backward writes beside the gradients of the initial state.
template <class T>
struct SequenceGrads {
    T* x;        // [T, B, gates]       of the first layer's gates; may be the trail's x
    T* upper_x;  // [L-1, T, B, gates]  of the other layers'; may be the trail's upper_x
    T* y;        // [L, T, B, gates]    of the hidden states' products; may be the trail's y
    T* params;   // [T, B, P]           of the raw head parameters

    static constexpr const char* names = "x upper_x y params";
};

// The size of a segment's memories that backward writes again, [E, every, M, N]; 0 where all of them were kept.
constexpr Size sequence_segment(const SequenceSizes& s, Size E) { return s.every == 1 ? 0 : E * s.every * s.memory(); }

// Where the rows of elements first, first + 1, ... begin in a [L, T, B, size] array.
template <class T>
NTM_FN T* at(const SequenceSizes& s, T* array, Size size, Size layer, Size t, Size first) {
    return array + ((layer * s.T + t) * s.B + first) * size;
}

// Where a step's activated parameters of element b are left for the backward; a staged crew leaves none.
template <class Crew, class T>
NTM_FN auto left_active(const SequenceSizes& s, const SequenceTrail<T>& trail, Size t, Size b) {
    if constexpr (Crew::staged)
        return nullptr;
    else
        return at(s, trail.active, s.step.active(), 0, t, b);
}

// What the size of a crew's scratch depends on. holds_state: a tile's states are worked on in scratch, but for the
// memories, which are there if holds_memory.
struct SequenceStaging {
    bool staged, takes_ends, holds_state, holds_memory;
    Size slots;
};

// The state of a tile's elements: [elements, ...], and for every layer [L, span, H], where the tile's come first.
template <class T>
struct TileState : SequenceState<T> {
    Size span;

    static constexpr Size scratch(const SequenceSizes& s, Size E, bool holds_memory) {
        return room(holds_memory * E * s.memory(), E * s.step.R * s.step.N, E * s.step.W * s.step.N, E * s.read_size(),
                    s.L * E * s.H, s.has_cell() ? s.L * E * s.H : 0);
    }

    NTM_FN T* hidden_of(const SequenceSizes& s, Index l) const { return this->hidden + l * span * s.H; }
    NTM_FN T* cell_of(const SequenceSizes& s, Index l) const { return this->cell + l * span * s.H; }
    NTM_FN TileState element(const SequenceSizes& s, Size e) const {
        return {{this->memory + e * s.memory(), this->read_weights + e * s.step.R * s.step.N,
                 this->write_weights + e * s.step.W * s.step.N, this->reads + e * s.read_size(),
                 this->hidden + e * s.H, this->cell + e * s.H},
                span};
    }
};

// The part of a whole batch's state that begins with element first, where it is.
template <class T>
NTM_FN TileState<T> tile_of(const SequenceSizes& s, const SequenceState<T>& all, Size first) {
    return TileState<T>{all, s.B}.element(s, first);
}

// The initial state of element b, where it is.
template <class T>
NTM_FN TileState<const T> initial_of(const SequenceSizes& s, const SequenceState<const T>& initial, Size b) {
    TileState<const T> own = tile_of(s, initial, s.initial(b));
    if (s.shared) own.span = 1;
    return own;
}

// Where a tile's state is worked on: a staged crew takes scratch for it. So do others if there is an order, for the
// places of the tile's states lie apart then; else they work where these are.
template <class Crew, class T>
NTM_FN TileState<T> hold(const Crew&, Arena<T>& arena, const SequenceSizes& s, Size E, bool ordered,
                         const TileState<T>& place) {
    if (!Crew::staged && !ordered) return place;
    T* memory = Crew::holds_memory ? arena.take(E * s.memory()) : place.memory;
    T *read_weights = arena.take(E * s.step.R * s.step.N), *write_weights = arena.take(E * s.step.W * s.step.N);
    T *reads = arena.take(E * s.read_size()), *hidden = arena.take(s.L * E * s.H);
    T* cell = s.has_cell() ? arena.take(s.L * E * s.H) : nullptr;
    return {{memory, read_weights, write_weights, reads, hidden, cell}, E};
}

template <class T>
NTM_FN TileState<const T> as_const(const TileState<T>& state) {
    return {{state.memory, state.read_weights, state.write_weights, state.reads, state.hidden, state.cell}, state.span};
}

// The whole state of an element becomes that of another, or 0 where none is given.
template <class Team, class T>
NTM_FN void copy_state(const Team& team, const SequenceSizes& s, bool given, const TileState<const T>& from,
                       const TileState<T>& to) {
    auto part = [&](Size size, const T* source, T* target) NTM_INLINE {
        if (!given)
            clear(team, size, target);
        else if (source != target)
            copy(team, size, source, target);
    };
    part(s.memory(), from.memory, to.memory);
    part(s.step.R * s.step.N, from.read_weights, to.read_weights);
    part(s.step.W * s.step.N, from.write_weights, to.write_weights);
    part(s.read_size(), from.reads, to.reads);
    for (Size l = 0; l < s.L; ++l) {
        part(s.H, from.hidden_of(s, l), to.hidden_of(s, l));
        if (s.has_cell()) part(s.H, from.cell_of(s, l), to.cell_of(s, l));
    }
}

// Calls product(second) for every product of a layer: first of what it is fed, with its hidden state joined if there is
// only this product; then, second, of its hidden state. It is a loop so that the product is compiled once.
template <class F>
NTM_FN void each_product(const SequenceSizes& s, F&& product) {
    const int count = s.products();
    NTM_ROLLED
    for (int i = 0; i < count; ++i) product(i == 1);
}

}  // namespace ntm
