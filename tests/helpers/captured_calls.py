"""Calls of the step engine with captured graphs, and the same calls without graphs."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor

from helpers.machines import CLOSE, flat, make, some
from ntm_fast import FastNTM, NTMState
from ntm_fast.engines import graphs

FIRST = graphs.CAPTURED_AT  # the call that is captured
CALLS = FIRST + 2


@contextlib.contextmanager
def without_graphs():
    recorders = dict(graphs.RECORDERS)
    graphs.RECORDERS.clear()
    try:
        yield
    finally:
        graphs.RECORDERS.update(recorders)


def captured() -> list:
    return [kind.captured for kind in graphs._kinds.values() if kind.captured]


def some_state(ntm: FastNTM, seed: int) -> NTMState:
    """A state of two sequences, made of leaves."""
    return ntm.initial_state(2).detach().map(lambda x: some(*x.shape, seed=seed).softmax(-1).requires_grad_())


def train(ntm: FastNTM, inputs: Tensor, state: NTMState | None = None) -> list[Tensor]:
    """Outputs, final state, and the gradients of all that requires one: the very tensors returned, no copies."""
    outputs, final = ntm(inputs, state)
    results = [outputs, *flat(final)]
    loss = sum((x * some(*x.shape, dtype=x.dtype, seed=40 + i)).sum() for i, x in enumerate(results))
    leaves = [x for x in (*ntm.parameters(), inputs, *(flat(state) if state else [])) if x.requires_grad]
    return [*results, *(x for x in torch.autograd.grad(loss, leaves, allow_unused=True) if x is not None)]


def check(needs_inputs: bool = True, given: bool = False, close: dict = CLOSE, **options: Any) -> None:
    """Each call has other inputs and parameters; and what an earlier call returned stays as it was."""
    ntm = make(engine="step", **{"memory_init": "learned", **options})
    twin, held = copy.deepcopy(ntm), []
    for call in range(CALLS):
        inputs = some(5, 2, 3, seed=call, dtype=ntm.heads.weight.dtype).requires_grad_(needs_inputs)
        state = some_state(ntm, seed=call) if given else None
        found = train(ntm, inputs, state)
        with without_graphs():
            wanted = train(twin, inputs, state)
        torch.testing.assert_close(found, wanted, **close)
        held.append((found, wanted))
        with torch.no_grad():
            for index, (a, b) in enumerate(zip(ntm.parameters(), twin.parameters())):
                a.add_(0.1 * some(*a.shape, dtype=a.dtype, seed=50 + index))
                b.copy_(a)
    for found, wanted in held:
        torch.testing.assert_close(found, wanted, **close)


def warm(ntm: FastNTM, calls: int = FIRST) -> None:
    """Make that many training steps, all of one kind."""
    for call in range(calls):
        train(ntm, some(5, 2, 3, seed=90 + call).requires_grad_())


def forward(ntm: FastNTM, seed: int) -> tuple[Tensor, Tensor, NTMState]:
    inputs = some(5, 2, 3, seed=seed).requires_grad_()
    return inputs, *ntm(inputs)


def gradient(inputs: Tensor, outputs: Tensor, final: NTMState, **options: Any) -> Tensor:
    return torch.autograd.grad(outputs.square().sum() + final.memory.square().sum(), inputs, **options)[0]


def expected(ntm: FastNTM, seed: int) -> Tensor:
    with without_graphs():
        return gradient(*forward(ntm, seed))
