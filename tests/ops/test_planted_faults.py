"""Faults are planted in native results, and the comparison finds each."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from helpers import poison
from helpers.backends import Backend
from helpers.cases import OPERATORS, SHAPES, Case
from helpers.comparison import check
from helpers.native_calls import intercept
from torch import Tensor

from ntm_fast import native
from ntm_fast.ops import serving


def _one_element(x: Tensor) -> None:
    flat = x[1].flatten()
    flat[flat.abs().argmax()] *= 1.01
    x[1] = flat.view(x[1].shape)


FAULTS = {
    "scaled": lambda x: x.mul_(1.001),
    "one element": _one_element,
    "one of the batch": lambda x: x[1].mul_(1.001),
    "sign": lambda x: x.neg_(),
    "order": lambda x: x.copy_(x.flip(1).clone()),
    "unwritten": lambda x: x[-1, -1].fill_(torch.nan),
    "overrun": lambda x: x.as_strided((1,), (1,), x.storage_offset() + x.numel()).zero_(),
    "underrun": lambda x: x.as_strided((1,), (1,), x.storage_offset() - 1).zero_(),
}


def _expect_found(case: Case, backend: Backend, monkeypatch, fault) -> None:
    """Run ``fault(name, like)`` after each native call. The comparison must then fail."""

    def wrong(call: Callable, name: str, like: Tensor, *values: Any) -> None:
        call(name, like, *values)
        fault(name, like)

    with monkeypatch.context() as patch:
        intercept(patch, wrong)
        with pytest.raises(AssertionError):
            check(case, backend)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", OPERATORS)
def test_planted_faults_are_found(backend: Backend, monkeypatch, op: str, fault: str) -> None:
    """Each output and each gradient is made a little wrong in turn."""
    case = Case(op, B=3, N=17, M=5, H=2, R=2, W=2)
    check(case, backend)
    for name, results in ((op, SHAPES[op][1]), (f"{op}_backward", SHAPES[op][0])):
        for index in range(len(results)):

            def plant(called: str, like: Tensor, name=name, index=index, count=len(results)) -> None:
                if called == name:
                    FAULTS[fault](poison.handed_out()[-count:][index])

            _expect_found(case, backend, monkeypatch, plant)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_modified_input_is_found(backend: Backend, monkeypatch, op: str) -> None:
    for name in (op, f"{op}_backward"):
        plant = lambda called, like, name=name: like.neg_() if called == name else None  # noqa: E731
        _expect_found(Case(op), backend, monkeypatch, plant)


def test_a_silent_fallback_is_found(backend: Backend, monkeypatch) -> None:
    monkeypatch.setattr(serving, "why_not_native", lambda *_: "planted")
    monkeypatch.setattr(native, "warn_once", lambda *_: None)
    with pytest.raises(AssertionError, match="were"):
        check(Case("read"), backend)
