"""The names that the package exports, and the defaults that signatures show."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import ntm_fast
from ntm_fast import FastNTM, NTMCell, ops, reference
from ntm_fast.spec import STEP_OPTIONS, NTMConfig


def test_public_names() -> None:
    for name in (
        "FastNTM",
        "NTMCell",
        "NTMState",
        "NTMTrace",
        "available",
        "capabilities",
        "explain",
        "ops",
        "reference",
    ):
        assert name in ntm_fast.__all__ and hasattr(ntm_fast, name)
    assert {"cpu", "cuda"} <= set(ntm_fast.capabilities())


@pytest.mark.parametrize(
    "function",
    [
        *(FastNTM, NTMCell, ops.memory_step, ops.ntm_sequence, reference.memory_step, reference.ntm_sequence),
        *(ops.content_addressing, ops.address, reference.content_addressing, reference.address),
        reference.head_parameters,
    ],
    ids=lambda function: f"{function.__module__}.{function.__name__}",
)
def test_defaults_are_those_of_the_specification(function) -> None:
    """A signature shows them to a reader; spec.py says what they are."""
    options = {own.name: own for own in dataclasses.fields(NTMConfig)}
    found = inspect.signature(function).parameters
    compared = [name for name in found if name in options and found[name].default is not inspect.Parameter.empty]
    assert compared
    for name in compared:
        assert found[name].default == options[name].default, name
    if function in (FastNTM, NTMCell):
        assert options.keys() - {"batch_first"} <= found.keys()
    elif "step" in function.__name__ or "sequence" in function.__name__:
        assert STEP_OPTIONS.keys() <= found.keys()
