"""A user's program, never run: mypy and pyright check it against the package's types (see .ci/run).

``assert_type`` fails where a type is lost on the way, as it is where something returns Any. A line with a
``type: ignore`` is a mistake that must be found: both checkers complain about an ignore that ignores nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import ntm_fast
from ntm_fast import FastNTM, NTMCell, NTMState, NTMTrace, ops


def train_a_step(inputs: Tensor, targets: Tensor) -> float:
    ntm = FastNTM(
        9,
        8,
        hidden_size=100,
        num_layers=1,
        controller="lstm",
        memory_locations=128,
        memory_width=20,
        read_heads=1,
        write_heads=1,
        shift_range=1,
        memory_init="constant",
        read_first=False,
        clip=20.0,
        engine="auto",
        batch_first=False,
        device="cpu",
        dtype=torch.float32,
    )
    optimiser = torch.optim.RMSprop(ntm.parameters(), lr=3e-4, momentum=0.9)
    state = ntm.initial_state(batch_size=inputs.shape[1])
    assert_type(state, NTMState)
    logits, state = ntm(inputs, state)
    assert_type(logits, Tensor)
    assert_type(state, NTMState)
    logits, state = ntm(inputs, state.detach())
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def stream(cell: NTMCell, inputs: Tensor) -> list[Tensor]:
    state: NTMState | None = None
    outputs = []
    for x in inputs:
        y, state = cell(x, state)
        assert_type(y, Tensor)
        assert_type(state, NTMState)
        outputs.append(y)
    return outputs


def look(ntm: FastNTM, inputs: Tensor) -> Tensor:
    outputs, trace = ntm.trace(inputs)
    assert_type(outputs, Tensor)
    assert_type(trace, NTMTrace)
    assert_type(trace.gate, Tensor)
    return trace.read_weights


def recombine(memory: Tensor, previous: Tensor, key: Tensor, scalars: Tensor, shift: Tensor, params: Tensor) -> Tensor:
    content = ops.content_addressing(memory, key, scalars, eps=1e-8)
    assert_type(content, Tensor)
    weights = ops.sharpen(ops.circular_shift(ops.interpolate(content, previous, scalars), shift), 1 + scalars)
    assert_type(weights, Tensor)
    step = ops.memory_step(memory, weights, weights, params, shift_range=1)
    assert_type(step, tuple[Tensor, Tensor, Tensor, Tensor])
    reads, memory, _, _ = step
    return reads + ops.read(memory, weights)


def move(state: NTMState) -> NTMState:
    assert_type(state.memory, Tensor)
    assert_type(state.controller, tuple[Tensor, ...])
    assert_type(state.detach(), NTMState)
    return state.to(dtype=torch.float64)


def ask() -> str:
    assert_type(ntm_fast.available("cuda"), bool)
    assert_type(ntm_fast.explain("cpu", torch.float32), dict[str, str])
    return ntm_fast.__version__


def mistakes(memory: Tensor, weights: Tensor) -> None:
    FastNTM(9, 8, hiden_size=100)  # type: ignore[call-arg]
    FastNTM(9, 8, hidden_size="100")  # type: ignore[arg-type]
    NTMCell(9)  # type: ignore[call-arg]
    ops.read(memory, weights, eps=1e-8)  # type: ignore[call-arg]
    ops.memory_step(memory, weights, weights, weights)  # type: ignore[call-arg]
