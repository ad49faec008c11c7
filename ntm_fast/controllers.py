"""The controllers: LSTM, GRU and feed-forward networks behind one protocol.

Parameters carry the names and layouts of ``nn.LSTM`` and ``nn.GRU``, so weights load from and into them. A controller
is bound once per sequence and then called once per step with one tuple of state tensors (B, hidden) per layer.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layers = list[tuple[Tensor, ...]]
Step = Callable[[Tensor, Layers], tuple[Tensor, Layers]]


class Controller(nn.Module):
    """Recurrent layers over [x, r]: input (B, input_size) -> hidden (B, hidden_size)."""

    gates: int  # rows of a weight matrix, in units of hidden_size
    state_names: tuple[str, ...]

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        empty = lambda *shape: nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))  # noqa: E731
        rows = self.gates * hidden_size
        for layer in range(num_layers):
            columns = hidden_size if layer else input_size
            self.register_parameter(f"weight_ih_l{layer}", empty(rows, columns))
            if self.state_names:
                self.register_parameter(f"weight_hh_l{layer}", empty(rows, hidden_size))
            self.register_parameter(f"bias_ih_l{layer}", empty(rows))
            if self.state_names:
                self.register_parameter(f"bias_hh_l{layer}", empty(rows))
        for name in self.state_names:
            self.register_parameter(f"initial_{name}", empty(num_layers, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)  # nn.LSTM's and nn.GRU's own
        for name, parameter in self.named_parameters():
            if name.startswith("initial"):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def initial_state(self, batch_size: int) -> tuple[Tensor, ...]:
        """The learned initial state, each (layers, B, hidden)."""
        return tuple(
            getattr(self, f"initial_{name}").unsqueeze(1).expand(-1, batch_size, -1) for name in self.state_names
        )

    def unpack(self, state: tuple[Tensor, ...]) -> Layers:
        """State tensors (layers, B, hidden) -> for each layer, its tensors (B, hidden)."""
        return [tuple(tensor[layer] for tensor in state) for layer in range(self.num_layers)]

    def pack(self, layers: Layers) -> tuple[Tensor, ...]:
        """The inverse of :meth:`unpack`."""
        return tuple(torch.stack(tensors) for tensors in zip(*layers))

    def weights(self) -> list[Tensor]:
        """The weights and biases, layer by layer, in the order in which :meth:`bind` takes them."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.state_names else ("weight_ih", "bias_ih")
        return [getattr(self, f"{name}_l{layer}") for layer in range(self.num_layers) for name in names]

    def bind(self, weights: list[Tensor], kernels: ModuleType) -> Step:
        """The step function over :meth:`weights`; ``kernels`` is :mod:`ops` or :mod:`reference`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


def by_layer(weights: list[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    """The weights of each layer, ``count`` of them, out of those of all."""
    return [tuple(weights[start : start + count]) for start in range(0, len(weights), count)]


class LSTM(Controller):
    """``nn.LSTM``, one step at a time."""

    gates = 4
    state_names = ("hidden", "cell")

    def bind(self, weights: list[Tensor], kernels: ModuleType) -> Step:
        joined = []
        for weight_ih, weight_hh, bias_ih, bias_hh in by_layer(weights, 4):
            joined.append((torch.cat([weight_ih, weight_hh], 1), bias_ih + bias_hh))  # one product a step

        def step(x: Tensor, layers: Layers) -> tuple[Tensor, Layers]:
            new_layers = []
            for (weight, bias), (hidden, cell) in zip(joined, layers):
                gates = F.linear(torch.cat([x, hidden], 1), weight, bias)
                x, cell = kernels.lstm_gates(gates, cell)
                new_layers.append((x, cell))
            return x, new_layers

        return step


class GRU(Controller):
    """``nn.GRU``, one step at a time: the reset gate applies after the product."""

    gates = 3
    state_names = ("hidden",)

    def bind(self, weights: list[Tensor], kernels: ModuleType) -> Step:
        weights = by_layer(weights, 4)

        def step(x: Tensor, layers: Layers) -> tuple[Tensor, Layers]:
            new_layers = []
            for (weight_ih, weight_hh, bias_ih, bias_hh), (hidden,) in zip(weights, layers):
                x = kernels.gru_gates(F.linear(x, weight_ih, bias_ih), F.linear(hidden, weight_hh, bias_hh), hidden)
                new_layers.append((x,))
            return x, new_layers

        return step


class FeedForward(Controller):
    """Layers of tanh units: what the machine remembers is in its memory alone."""

    gates = 1
    state_names = ()

    def bind(self, weights: list[Tensor], kernels: ModuleType) -> Step:
        weights = by_layer(weights, 2)

        def step(x: Tensor, layers: Layers) -> tuple[Tensor, Layers]:
            for weight, bias in weights:
                x = torch.tanh(F.linear(x, weight, bias))
            return x, layers

        return step


CONTROLLERS: dict[str, type[Controller]] = {"lstm": LSTM, "gru": GRU, "feedforward": FeedForward}
