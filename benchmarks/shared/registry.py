"""What each operator is measured with: one function for each, by the operator's name.

To add an operator, add a function here. The suite test_operators.py, the report gpu and its small run find it by name.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ntm_fast import reference


class Sizes(NamedTuple):
    """The standard job's, unless said otherwise."""

    B: int
    N: int = 128
    M: int = 20
    heads: int = 1  # of each kind
    S: int = 1
    hidden: int = 100


class Head(NamedTuple):
    """One head's parameters, after their activations."""

    key: Tensor  # (B, H, M)
    beta: Tensor  # (B, H)
    gate: Tensor  # (B, H)
    shift: Tensor  # (B, H, 2S+1)
    gamma: Tensor  # (B, H)


INPUTS: dict[str, Callable[[Sizes], list[Tensor]]] = {}


def operator(function: Callable[[Sizes], list[Tensor]]) -> Callable[[Sizes], list[Tensor]]:
    """Register the function that makes the inputs of the operator of its name."""
    INPUTS[function.__name__] = function
    return function


def _each(s: Sizes, *shape: int) -> Tensor:
    return torch.randn(s.B, s.heads, *shape)


def _weights(s: Sizes) -> Tensor:
    return _each(s, s.N).softmax(-1)


def _memory(s: Sizes) -> Tensor:
    """As it comes out of the step before: locations contiguous."""
    return torch.randn(s.B, s.M, s.N).transpose(1, 2)


def _head(s: Sizes) -> Head:
    key, shift = torch.tanh(_each(s, s.M)), _each(s, 2 * s.S + 1).softmax(-1)
    beta, gate, gamma = F.softplus(_each(s)), torch.sigmoid(_each(s)), 1 + F.softplus(_each(s))
    return Head(key, beta, gate, shift, gamma)


@operator
def content_addressing(s: Sizes) -> list[Tensor]:
    memory, head = _memory(s), _head(s)
    return [memory, head.key, head.beta]


@operator
def interpolate(s: Sizes) -> list[Tensor]:
    return [_weights(s), _weights(s), _head(s).gate]


@operator
def circular_shift(s: Sizes) -> list[Tensor]:
    return [_weights(s), _head(s).shift]


@operator
def sharpen(s: Sizes) -> list[Tensor]:
    return [_weights(s), _head(s).gamma]


@operator
def address(s: Sizes) -> list[Tensor]:
    return [_memory(s), _weights(s), *_head(s)]


@operator
def erase_add_write(s: Sizes) -> list[Tensor]:
    erase, add = torch.sigmoid(_each(s, s.M)), _each(s, s.M)
    return [_memory(s), _weights(s), erase, add]


@operator
def read(s: Sizes) -> list[Tensor]:
    return [_memory(s), _weights(s)]


@operator
def memory_step(s: Sizes) -> list[Tensor]:
    params = torch.randn(s.B, reference.params_size(s.heads, s.heads, s.M, s.S))
    return [_memory(s), _weights(s), _weights(s), params]


@operator
def lstm_gates(s: Sizes) -> list[Tensor]:
    gates, cell = torch.randn(s.B, 4 * s.hidden), torch.randn(s.B, s.hidden)
    return [gates, cell]


@operator
def gru_gates(s: Sizes) -> list[Tensor]:
    of_inputs, of_hidden = torch.randn(s.B, 3 * s.hidden), torch.randn(s.B, 3 * s.hidden)
    return [of_inputs, of_hidden, torch.randn(s.B, s.hidden)]


OPERATORS = tuple(INPUTS)
