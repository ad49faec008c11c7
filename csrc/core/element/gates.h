// The controllers' gates. core/element.h tells what an operator is.
#pragma once

#include "core/controller.h"

namespace ntm {

template <class T>
struct LSTMGates {
    using Real = T;
    static constexpr const char* name = "lstm_gates";
    Size B, H;
    const T *gates, *cell;
    T *hidden, *new_cell;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return H; }
    constexpr Size cost() const { return 20 * H; }
    constexpr Size scratch(bool) const { return 0; }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T>) const {
        lstm_gates(team, H, gates + 4 * b * H, cell + b * H, hidden + b * H, new_cell + b * H);
    }
};

template <class T>
struct LSTMGatesBackward {
    using Real = T;
    static constexpr const char* name = "lstm_gates_backward";
    Size B, H;
    const T *gates, *cell, *new_cell, *grad_hidden, *grad_new_cell;
    T *grad_gates, *grad_cell;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return H; }
    constexpr Size cost() const { return 20 * H; }
    constexpr Size scratch(bool) const { return 0; }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T>) const {
        lstm_gates_backward(team, H, gates + 4 * b * H, cell + b * H, new_cell + b * H, grad_hidden + b * H,
                            grad_new_cell + b * H, grad_gates + 4 * b * H, grad_cell + b * H);
    }
};

template <class T>
struct GRUGates {
    using Real = T;
    static constexpr const char* name = "gru_gates";
    Size B, H;
    const T *input_gates, *hidden_gates, *hidden;
    T* new_hidden;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return H; }
    constexpr Size cost() const { return 20 * H; }
    constexpr Size scratch(bool) const { return 0; }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T>) const {
        gru_gates(team, H, input_gates + 3 * b * H, hidden_gates + 3 * b * H, hidden + b * H, new_hidden + b * H);
    }
};

template <class T>
struct GRUGatesBackward {
    using Real = T;
    static constexpr const char* name = "gru_gates_backward";
    Size B, H;
    const T *input_gates, *hidden_gates, *hidden, *grad_new_hidden;
    T *grad_input_gates, *grad_hidden_gates, *grad_hidden;

    constexpr Size items() const { return B; }
    constexpr Size width() const { return H; }
    constexpr Size cost() const { return 20 * H; }
    constexpr Size scratch(bool) const { return 0; }

    template <class Team>
    NTM_FN void operator()(const Team& team, Size b, Arena<T>) const {
        gru_gates_backward(team, H, input_gates + 3 * b * H, hidden_gates + 3 * b * H, hidden + b * H,
                           grad_new_hidden + b * H, grad_input_gates + 3 * b * H, grad_hidden_gates + 3 * b * H,
                           grad_hidden + b * H);
    }
};

}  // namespace ntm
