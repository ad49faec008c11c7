"""The controllers' parameters: LSTM, GRU and feed-forward networks; :mod:`ntm_fast.reference` says what they compute.

Parameters carry the names and layouts of ``nn.LSTM`` and ``nn.GRU``, so weights load from and into them.
"""

from __future__ import annotations

import math
from typing import Iterable

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..spec import CONTROLLERS, layers_in_row, layers_stacked


def parameters(module: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """``[module.name, ...]`` without the search of :class:`nn.Module`, which a streamed step would notice."""
    own = module._parameters  # parametrized weights are not in it
    return [own[name] if name in own else getattr(module, name) for name in names]  # type: ignore[misc]


class Controller(nn.Module):
    """Layers over [x, r], of ``kind`` ``"lstm"``, ``"gru"`` or ``"feedforward"``: input_size in, hidden_size out."""

    def __init__(
        self,
        kind: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.input_size, self.hidden_size, self.num_layers = kind, input_size, hidden_size, num_layers

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        spec = CONTROLLERS[kind]
        self.state_names = spec.state
        self.weight_names = [f"{name}_l{layer}" for layer in range(num_layers) for name in spec.weights]
        rows = spec.gates * hidden_size
        for layer in range(num_layers):
            columns = {"weight_ih": hidden_size if layer else input_size, "weight_hh": hidden_size}
            for name in spec.weights:
                shape = (rows, columns[name]) if name in columns else (rows,)
                self.register_parameter(f"{name}_l{layer}", empty(*shape))
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

    def initial_state(self) -> tuple[Tensor, ...]:
        """The learned initial state, each (layers, hidden)."""
        return tuple(parameters(self, [f"initial_{name}" for name in self.state_names]))

    def weights(self) -> list[Tensor]:
        """The weights and biases, layer by layer, as :func:`ops.ntm_sequence` takes them."""
        return parameters(self, self.weight_names)

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step: x (B, input_size), state each (layers, B, hidden) -> the last layer's hidden state, the state.

        The engines compute the same from the weights. They call this where hooks or a subclass must see the call.
        """
        step = reference.controller_step(ops, self.kind, self.weights())
        hidden, new = step(x, layers_in_row(state))
        return hidden, layers_stacked(new, len(state))

    def extra_repr(self) -> str:
        return f"{self.kind!r}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
