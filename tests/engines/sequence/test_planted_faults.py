"""Faults are planted in the native calls of sequences, and the comparison finds each."""

from __future__ import annotations

import ctypes
from typing import Any, Callable, Sequence

import pytest
import torch
from helpers.backends import Backend
from helpers.native_calls import intercept
from helpers.poison import Poison
from helpers.sequences import Case, check
from torch import Tensor

from ntm_fast import native

Values = dict[str, Any]  # what a native function is called with, by name: csrc/operators.h


def _swap(a: str, b: str) -> Callable[[Values], Values]:
    return lambda values: {**values, a: values[b], b: values[a]}


def _put(name: str, value: Any) -> Callable[[Values], Values]:
    return lambda values: {**values, name: value}


FORWARD, BACKWARD = "ntm_sequence", "ntm_sequence_backward"
BEFORE_CALL = {
    "a wrong every": (BACKWARD, _put("every", 3)),
    "memories kept at other steps": (FORWARD, _put("every", 3)),
    "an LSTM's hidden state for its cell": (BACKWARD, _swap("initial_hidden", "initial_cell")),
    "the first memory for the last": (BACKWARD, lambda values: {**values, "final_memory": values["initial_memory"]}),
    "read for write weights": (BACKWARD, _swap("trail_read_weights", "trail_write_weights")),
    "read for write weights, initially": (BACKWARD, _swap("initial_read_weights", "initial_write_weights")),
    "one initial state for all": (FORWARD, _put("shared", True)),
    "one initial state for all, on the way back": (BACKWARD, _put("shared", True)),
    "no gradient of the final state": (BACKWARD, _put("grad_final_memory", 0)),
    "gradients in: read for write weights": (BACKWARD, _swap("grad_final_read_weights", "grad_final_write_weights")),
    "gradients out: read for write weights": (
        BACKWARD,
        _swap("grad_initial_read_weights", "grad_initial_write_weights"),
    ),
    "state in: read for write weights": (FORWARD, _swap("initial_read_weights", "initial_write_weights")),
    "state in: hidden for cell": (FORWARD, _swap("initial_hidden", "initial_cell")),
    "no lengths": (FORWARD, _put("order", 0)),
    "no lengths on the way back": (BACKWARD, _put("order", 0)),
    "no lengths for the weights": ("ntm_sequence_weight_gradients", _put("order", 0)),
}
AFTER_CALL = {  # one number of the tensor is changed by a thousandth
    "grad_params": (BACKWARD, "grad_params"),
    "grad_x": (BACKWARD, "grad_x"),
    "grad of the initial cell": (BACKWARD, "grad_initial_cell"),
    "grad of the initial hidden state": (BACKWARD, "grad_initial_hidden"),
    "grad of the initial reads": (BACKWARD, "grad_initial_reads"),
    "grad of the initial memory": (BACKWARD, "grad_initial_memory"),
    "an activated parameter": (FORWARD, "trail_active"),
    "a feature": (FORWARD, "trail_features"),
    "an output": (FORWARD, "outputs"),
    "the final memory": (FORWARD, "final_memory"),
    "a cell": (FORWARD, "trail_cell"),
    "the gradient of an input": (BACKWARD, "grad_inputs"),
}
# The native loop of the CPU alone makes these.
ONLY_ON_THE_CPU = "an activated parameter", "an output", "the gradient of an input", "no lengths for the weights"


@pytest.mark.parametrize("fault", (None, *BEFORE_CALL, *AFTER_CALL))
def test_planted_faults_are_found(backend: Backend, poison: Poison, monkeypatch, fault: str | None) -> None:
    if backend.device != "cpu":
        pytest.skip("faults are planted at addresses that this process can reach")
    if fault in ONLY_ON_THE_CPU and backend.name != "native_cpu":
        pytest.skip("a CUDA kernel leaves none")

    def wrong(call: Callable, called: str, like: Tensor, scalars: Sequence, addresses: Sequence) -> None:
        names = native.signature(called)
        values = dict(zip(names.scalars, scalars)) | dict(zip(names.tensors, addresses))
        if called == BEFORE_CALL.get(fault, (None,))[0]:
            values = BEFORE_CALL[fault][1](values)
        call(called, like, [values[name] for name in names.scalars], [values[name] for name in names.tensors])
        if called == AFTER_CALL.get(fault, (None,))[0]:
            number = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}[like.dtype]
            number.from_address(values[AFTER_CALL[fault][1]]).value *= 1.001

    intercept(monkeypatch, wrong)
    case = Case(checkpoint=2, lengths=(2, 7, 5) if fault and "lengths" in fault else None)
    if fault is None:
        check(case, backend, poison)
        return
    with pytest.raises(AssertionError):
        check(case, backend, poison)
