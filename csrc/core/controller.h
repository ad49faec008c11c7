// The controllers: what tells their kinds apart, and the elementwise part of each, as nn.LSTM and nn.GRU define it.
//
// Forward may leave the activated gates behind, even in the place of what they come from, so that the backward need not
// activate them once more.
#pragma once

#include "core/scalar.h"

namespace ntm {

enum class Controller : int { lstm, gru };

// Gates of a hidden unit.
constexpr Index gates(Controller kind) { return kind == Controller::gru ? 3 : 4; }

// Products of a layer at a step: one, of what it is fed and its hidden state together; or two, one of each, where the
// gates need them apart (a GRU's reset gate acts on the hidden state's product alone).
constexpr int products(Controller kind) { return kind == Controller::gru ? 2 : 1; }

// Whether a layer has a cell state beside its hidden state.
constexpr bool has_cell(Controller kind) { return kind == Controller::lstm; }

template <class V>
struct LSTMGateValues {
    V i, f, g, o;
};

template <class Tile, class T>
NTM_FN auto lstm_gates_at(const Tile& tile, Index H, const T* active /*[4H]*/) {
    using V = decltype(tile.load(active));
    return LSTMGateValues<V>{tile.load(active), tile.load(active + H), tile.load(active + 2 * H),
                             tile.load(active + 3 * H)};
}

template <class Math, class Tile, class T>
NTM_FN auto activated_lstm(const Tile& tile, Index H, const T* gates /*[4H]*/) {
    using V = decltype(tile.load(gates));
    return LSTMGateValues<V>{sigmoid<Math>(tile.load(gates)), sigmoid<Math>(tile.load(gates + H)),
                             Math::tanh(tile.load(gates + 2 * H)), sigmoid<Math>(tile.load(gates + 3 * H))};
}

// c' = sigmoid(f) c + sigmoid(i) tanh(g),  h' = sigmoid(o) tanh(c'). A single thread that leaves the activated gates
// behind activates them in passes of their own: one tile's whole chain of operations is so long that the processor
// could not begin the next tile's beside it.
template <class Team, class Left = std::nullptr_t, class T = typename Team::Real>
NTM_PASS void lstm_gates(const Team& team, Index H, const T* gates /*[4H]: i, f, g, o*/, const T* cell /*[H]*/,
                         T* hidden /*[H]*/, T* new_cell /*[H]*/, Left activated = nullptr /*[4H] or nullptr*/) {
    using Math = typename Team::Math;
    auto update = [&](auto tile, auto gate) NTM_INLINE {
        const auto c = gate.f * tile.load(cell) + gate.i * gate.g;
        tile.store(new_cell, c);
        tile.store(hidden, gate.o * Math::tanh(c));
    };
    if constexpr (Team::alone && present<Left>) {
        auto sigmoids = [&](Index n, Index first) NTM_INLINE {
            team.tiles(n, [&](auto tile) NTM_INLINE {
                tile.store(activated + first, sigmoid<Math>(tile.load(gates + first)));
            });
        };
        sigmoids(2 * H, 0);
        team.tiles(H, [&](auto tile) NTM_INLINE {
            tile.store(activated + 2 * H, Math::tanh(tile.load(gates + 2 * H)));
        });
        sigmoids(H, 3 * H);
        team.tiles(H, [&](auto tile) NTM_INLINE { update(tile, lstm_gates_at(tile, H, activated)); });
    } else {
        team.tiles(H, [&](auto tile) NTM_INLINE {
            const auto gate = activated_lstm<Math>(tile, H, gates);
            update(tile, gate);
            if constexpr (present<Left>) {
                tile.store(activated, gate.i);
                tile.store(activated + H, gate.f);
                tile.store(activated + 2 * H, gate.g);
                tile.store(activated + 3 * H, gate.o);
            }
        });
    }
}

// Activated: the gates are, already.
template <bool Activated = false, class Team, class T = typename Team::Real>
NTM_PASS void lstm_gates_backward(const Team& team, Index H, const T* gates, const T* cell, const T* new_cell,
                                  const T* grad_hidden, const T* grad_new_cell, T* grad_gates /*[4H]*/,
                                  T* grad_cell /*[H]*/) {
    using Math = typename Team::Math;
    using V = typename Team::V;
    team.tiles(H, [&](auto tile) NTM_INLINE {
        LSTMGateValues<V> gate;
        if constexpr (Activated)
            gate = lstm_gates_at(tile, H, gates);
        else
            gate = activated_lstm<Math>(tile, H, gates);
        const auto [i, f, g, o] = gate;
        const auto c = Math::tanh(tile.load(new_cell)), dh = tile.load(grad_hidden);
        const auto dc = tile.load(grad_new_cell) + dh * o * (1 - c * c);
        tile.store(grad_gates, dc * g * i * (1 - i));
        tile.store(grad_gates + H, dc * tile.load(cell) * f * (1 - f));
        tile.store(grad_gates + 2 * H, dc * i * (1 - g * g));
        tile.store(grad_gates + 3 * H, dh * c * o * (1 - o));
        tile.store(grad_cell, dc * f);
    });
}

template <class V>
struct GRUGateValues {
    V r, z, n;
};

// n = tanh(i_n + r h_n)
template <class Math, class Tile, class V, class T>
NTM_FN V gru_candidate(const Tile& tile, Index H, const T* x /*[3H]*/, const T* y /*[3H]*/, V r) {
    return Math::tanh(tile.load(x + 2 * H) + r * tile.load(y + 2 * H));
}

template <class Math, class Tile, class T>
NTM_FN auto activated_gru(const Tile& tile, Index H, const T* x /*[3H]*/, const T* y /*[3H]*/) {
    using V = decltype(tile.load(x));
    const V r = sigmoid<Math>(tile.load(x) + tile.load(y));
    return GRUGateValues<V>{r, sigmoid<Math>(tile.load(x + H) + tile.load(y + H)),
                            gru_candidate<Math>(tile, H, x, y, r)};
}

// h' = (1 - z) n + z h, where x and y are the products of the input and of the hidden state, with their biases. In
// passes as lstm_gates() is.
template <class Team, class Left = std::nullptr_t, class T = typename Team::Real>
NTM_PASS void gru_gates(const Team& team, Index H, const T* x /*[3H]: r, z, n*/, const T* y /*[3H]*/,
                        const T* hidden /*[H]*/, T* new_hidden /*[H]*/, Left activated = nullptr /*[3H] or nullptr*/) {
    using Math = typename Team::Math;
    auto update = [&](auto tile, auto z, auto n) NTM_INLINE {
        tile.store(new_hidden, Math::multiply_add(1 - z, n, z * tile.load(hidden)));
        if constexpr (present<Left>) tile.store(activated + 2 * H, n);
    };
    if constexpr (Team::alone && present<Left>) {
        team.tiles(2 * H, [&](auto tile) NTM_INLINE {
            tile.store(activated, sigmoid<Math>(tile.load(x) + tile.load(y)));
        });
        team.tiles(H, [&](auto tile) NTM_INLINE {
            const auto n = gru_candidate<Math>(tile, H, x, y, tile.load(activated));
            update(tile, tile.load(activated + H), n);
        });
    } else {
        team.tiles(H, [&](auto tile) NTM_INLINE {
            const auto [r, z, n] = activated_gru<Math>(tile, H, x, y);
            update(tile, z, n);
            if constexpr (present<Left>) {
                tile.store(activated, r);
                tile.store(activated + H, z);
            }
        });
    }
}

// Activated: x has the activated gates in place of the product.
template <bool Activated = false, class Team, class T = typename Team::Real>
NTM_PASS void gru_gates_backward(const Team& team, Index H, const T* x, const T* y, const T* hidden,
                                 const T* grad_new_hidden, T* grad_x /*[3H]*/, T* grad_y /*[3H]*/,
                                 T* grad_hidden /*[H]*/) {
    using Math = typename Team::Math;
    using V = typename Team::V;
    team.tiles(H, [&](auto tile) NTM_INLINE {
        GRUGateValues<V> gate;
        if constexpr (Activated)
            gate = {tile.load(x), tile.load(x + H), tile.load(x + 2 * H)};
        else
            gate = activated_gru<Math>(tile, H, x, y);
        const auto [r, z, n] = gate;
        const auto y_n = tile.load(y + 2 * H), dh = tile.load(grad_new_hidden);
        const auto dn = dh * (1 - z) * (1 - n * n);
        const auto dr = dn * y_n * r * (1 - r);
        const auto dz = dh * (tile.load(hidden) - n) * z * (1 - z);
        tile.store(grad_x, dr);
        tile.store(grad_y, dr);
        tile.store(grad_x + H, dz);
        tile.store(grad_y + H, dz);
        tile.store(grad_x + 2 * H, dn);
        tile.store(grad_y + 2 * H, dn * r);
        tile.store(grad_hidden, dh * z);
    });
}

}  // namespace ntm
