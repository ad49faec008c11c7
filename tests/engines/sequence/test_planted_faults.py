"""Faults planted in the calls of the native functions: the comparison finds each."""

from __future__ import annotations

import ctypes
from typing import Any, Callable

import pytest
import torch
from helpers.backends import Backend
from helpers.native_calls import intercept
from helpers.poison import Poison
from helpers.sequences import Case, check
from torch import Tensor


def _address(values: tuple, like: Tensor, index: int) -> ctypes._SimpleCData:
    number = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}[like.dtype]
    return number.from_address(values[index])


def _swap(a: int, b: int) -> Callable:
    def change(values: list) -> None:
        values[a], values[b] = values[b], values[a]

    return change


def _put(index: int, value: Any) -> Callable:
    def change(values: list) -> None:
        values[index] = value

    return change


# Where things are among what the native functions are called with: T, B, I, O, L, H, gru, the step's sizes (B, R, W, N,
# M, 2S+1), every, shared, the step's options, then (forward) keep, and tensors.
EVERY, SHARED = 13, 14
BEFORE_CALL = {
    "a wrong every": ("ntm_sequence_backward", _put(EVERY, 3)),
    "memories kept at other steps": ("ntm_sequence", _put(EVERY, 3)),
    "an LSTM's hidden state for its cell": ("ntm_sequence_backward", _swap(-31, -30)),
    "the first memory for the last": ("ntm_sequence_backward", lambda values: _put(-29, values[-35])(values)),
    "read for write weights": ("ntm_sequence_backward", _swap(-21, -20)),
    "read for write weights, initially": ("ntm_sequence_backward", _swap(-34, -33)),
    "one initial state for all": ("ntm_sequence", _put(SHARED, True)),
    "one initial state for all, on the way back": ("ntm_sequence_backward", _put(SHARED, True)),
    "no gradient of the final state": ("ntm_sequence_backward", _put(-16, 0)),
    "gradients in: read for write weights": ("ntm_sequence_backward", _swap(-15, -14)),
    "gradients out: read for write weights": ("ntm_sequence_backward", _swap(-9, -8)),
    "state in: read for write weights": ("ntm_sequence", _swap(-22, -21)),
    "state in: hidden for cell": ("ntm_sequence", _swap(-19, -18)),
}
AFTER_CALL = {  # one number, by a thousandth
    "grad_params": ("ntm_sequence_backward", -1),
    "grad_x": ("ntm_sequence_backward", -4),
    "grad of the initial cell": ("ntm_sequence_backward", -5),
    "grad of the initial hidden state": ("ntm_sequence_backward", -6),
    "grad of the initial reads": ("ntm_sequence_backward", -7),
    "grad of the initial memory": ("ntm_sequence_backward", -10),
    "an activated parameter": ("ntm_sequence", -1),
    "a feature": ("ntm_sequence", -5),
    "an output": ("ntm_sequence", -24),
    "the final memory": ("ntm_sequence", -17),
    "a cell": ("ntm_sequence", -7),
}
ONLY_ON_THE_CPU = "an activated parameter", "an output"  # are the native loop's own


@pytest.mark.parametrize("fault", (None, *BEFORE_CALL, *AFTER_CALL))
def test_planted_faults_are_found(backend: Backend, poison: Poison, monkeypatch, fault: str | None) -> None:
    if backend.device != "cpu":
        pytest.skip("faults are planted at addresses that this process can reach")
    if fault in ONLY_ON_THE_CPU and backend.name != "native_cpu":
        pytest.skip("a CUDA kernel leaves none")

    def wrong(call: Callable, called: str, like: Tensor, *values: Any) -> None:
        values = list(values)
        if called == BEFORE_CALL.get(fault, (None,))[0]:
            BEFORE_CALL[fault][1](values)
        call(called, like, *values)
        if called == AFTER_CALL.get(fault, (None,))[0]:
            _address(values, like, AFTER_CALL[fault][1]).value *= 1.001

    intercept(monkeypatch, wrong)
    case = Case(checkpoint=2)
    if fault is None:
        check(case, backend, poison)
        return
    with pytest.raises(AssertionError):
        check(case, backend, poison)
