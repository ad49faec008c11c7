"""Every operator, native against reference, at the standard sizes: memory 128 x 20, one head, shifts -1..1."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ntm_fast
from ntm_fast import ops, reference

N, M, S, HIDDEN = 128, 20, 1, 100


def _weights(B: int) -> Tensor:
    return torch.randn(B, 1, N).softmax(-1)


def _memory(B: int) -> Tensor:
    """As it comes out of the step before: locations contiguous."""
    return torch.randn(B, M, N).transpose(1, 2)


def _head(B: int) -> list[Tensor]:
    key, shift = torch.tanh(torch.randn(B, 1, M)), torch.randn(B, 1, 2 * S + 1).softmax(-1)
    beta, gate, gamma = F.softplus(torch.randn(B, 1)), torch.rand(B, 1), 1 + F.softplus(torch.randn(B, 1))
    return [key, beta, gate, shift, gamma]


INPUTS: dict[str, Callable[[int], list[Tensor]]] = {
    "content_addressing": lambda B: [_memory(B), *_head(B)[:2]],
    "interpolate": lambda B: [_weights(B), _weights(B), torch.rand(B, 1)],
    "circular_shift": lambda B: [_weights(B), _head(B)[3]],
    "sharpen": lambda B: [_weights(B), _head(B)[4]],
    "address": lambda B: [_memory(B), _weights(B), *_head(B)],
    "erase_add_write": lambda B: [_memory(B), _weights(B), torch.rand(B, 1, M), torch.randn(B, 1, M)],
    "read": lambda B: [_memory(B), _weights(B)],
    "memory_step": lambda B: [_memory(B), _weights(B), _weights(B), torch.randn(B, reference.params_size(1, 1, M, S))],
    "lstm_gates": lambda B: [torch.randn(B, 4 * HIDDEN), torch.randn(B, HIDDEN)],
    "gru_gates": lambda B: [torch.randn(B, 3 * HIDDEN), torch.randn(B, 3 * HIDDEN), torch.randn(B, HIDDEN)],
}
OPTIONS = {"memory_step": {"shift_range": S}}
ENGINES = {"native": ops, "reference": reference}


def _forward(function: Callable, inputs: list[Tensor], options: dict) -> tuple[Tensor, ...]:
    outputs = function(*inputs, **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _both(function: Callable, inputs: list[Tensor], options: dict, grads: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = _forward(function, inputs, options)
    return (*outputs, *torch.autograd.grad(outputs, inputs, grads))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("B", (1, 32, 256))
@pytest.mark.parametrize("direction", ("forward", "forward+backward"))
@pytest.mark.parametrize("op", INPUTS)
def test_operator(benchmark, op: str, direction: str, B: int, engine: str) -> None:
    benchmark.group = f"{op} {direction} B={B}"
    options = OPTIONS.get(op, {})
    inputs = [x.requires_grad_() for x in INPUTS[op](B)]
    native, twin = getattr(ops, op), getattr(reference, op)
    grads = [torch.randn_like(y) for y in _forward(twin, inputs, options)]

    if engine == "native" and (answer := ntm_fast.explain()[op]) != "native":
        pytest.skip(answer)
    scale = torch.cat([grad.flatten() for grad in grads]).norm()
    for got, want in zip(_both(native, inputs, options, grads), _both(twin, inputs, options, grads)):
        # The gradient of a scalar is a sum that may cancel, to some ulp of what was summed.
        allowed = 1e-4 * want.norm() + 1e-6 * scale
        assert (got - want).norm() <= allowed, "native and reference disagree: nothing to compare the speed of"

    function = getattr(ENGINES[engine], op)
    if direction == "forward":
        with torch.no_grad():
            benchmark(_forward, function, inputs, options)
    else:
        benchmark(_both, function, inputs, options, grads)
