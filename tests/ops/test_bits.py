"""Neither the number of threads nor the rest of the batch changes a bit."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import Backend
from helpers.cases import OPERATORS, Case, evaluate, on

from ntm_fast import ops


@pytest.mark.parametrize("op", OPERATORS)
def test_results_depend_neither_on_threads_nor_on_the_rest_of_the_batch(kernels: Backend, op: str) -> None:
    for case in (Case(op, B=9, N=100, M=20, H=2, R=2, W=2), Case(op, B=5, N=517, M=33, R=2, dtype=torch.float64)):
        _same_bits(case, kernels)


def _same_bits(case: Case, kernels: Backend) -> None:
    op = case.op
    inputs, grads = case.tensors()
    function = getattr(ops, op)
    together = evaluate(function, *on(kernels.device, inputs, case, grads))
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        again = evaluate(function, *on(kernels.device, inputs, case, grads))
        for name in together:
            assert torch.equal(again[name], together[name]), f"{op}: {name} differs with {threads} threads"
    for b in (0, 2, case.B - 1):
        one, grad = ({n: x[b : b + 1] for n, x in tensors.items()} for tensors in (inputs, grads))
        alone = evaluate(function, *on(kernels.device, one, case, grad))
        for name in together:
            assert torch.equal(alone[name][0], together[name][b]), f"{op}: {name}[{b}] differs when alone"
