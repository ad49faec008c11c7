"""NaN in gives NaN out, and infinities do not become plausible numbers."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import Backend
from helpers.cases import OPERATORS, SHAPES, Case, evaluate, on

from ntm_fast import ops, reference


@pytest.mark.parametrize("op", OPERATORS)
def test_nan_in_nan_out(kernels: Backend, op: str) -> None:
    """Where the reference gives NaN, so does the native operator. The rest of the batch stays as it was, to the bit."""
    case = Case(op, B=3, N=17, M=5, H=2, R=2, W=2)
    clean_inputs, clean_grads = case.tensors()
    clean = evaluate(getattr(ops, op), *on(kernels.device, clean_inputs, case, clean_grads))
    for target in (*clean_inputs, *clean_grads):
        for place in (0, -1):
            inputs, grads = case.tensors()
            poisoned = inputs[target] if target in inputs else grads[target]
            poisoned[1].view(-1)[place] = torch.nan
            with kernels.serves(op, f"{op}_backward"):
                actual = evaluate(getattr(ops, op), *on(kernels.device, inputs, case, grads))
            expected = evaluate(getattr(reference, op), inputs, case.keywords(), grads)
            assert any(x.isnan().any() for x in expected.values())
            for name, want in expected.items():
                where = f"{op}, NaN in {target}[1] at {place}: {name}"
                missed = want.isnan() & ~actual[name].cpu().isnan()
                assert not missed.any(), f"{where} is a number where the reference says NaN: {missed.nonzero()[:3]}"
                for b in (0, 2):
                    assert torch.equal(actual[name][b], clean[name][b]), f"{where}[{b}] is affected"


@pytest.mark.parametrize("op", OPERATORS)
def test_infinities_do_not_become_plausible_numbers(kernels: Backend, op: str) -> None:
    case = Case(op, B=2, N=17, M=5, H=2, R=2, W=2)
    for target in SHAPES[op][0]:
        inputs, grads = case.tensors()
        inputs[target][1].view(-1)[0] = torch.inf
        actual = evaluate(getattr(ops, op), *on(kernels.device, inputs, case, grads))
        expected = evaluate(getattr(reference, op), inputs, case.keywords(), grads)
        for name in SHAPES[op][1]:
            wrong = expected[name].isnan() & actual[name].cpu().isfinite()
            assert not wrong.any(), f"{op}, infinite {target}: {name} is a number where the reference says NaN"
