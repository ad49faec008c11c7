"""The standard job by engine, as training step, forward only and streamed, and what it costs with no memory at all."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from ntm_fast.ops.serving import why_not_native
from shared.job import (
    CONTROLLERS,
    TorchCallsAround,
    answers,
    check_stream,
    compare,
    copy_batch,
    forward_only,
    make,
    stream,
    training_step,
)

FUNCTIONS = {"training step": training_step, "forward": forward_only}


@functools.cache
def _wanted(controller: str, B: int) -> dict[str, Tensor]:
    return answers(make(controller, "reference"), copy_batch(B))


@functools.cache
def _check(controller: str, engine: str, B: int) -> None:
    compare(engine, answers(make(controller, engine), copy_batch(B)), _wanted(controller, B))


def _model(controller: str, engine: str, B: int) -> nn.Module:
    """Skips where the engine cannot serve."""
    native = {"sequence": "ntm_sequence", "step": "memory_step"}.get(engine)
    if native and (reason := why_not_native(torch.device("cpu"), torch.float32, native)):
        pytest.skip(reason)
    if native:
        _check(controller, engine, B)
    return make(controller, engine)


@pytest.mark.parametrize("engine", ("sequence", "step", "reference", "no memory"))
@pytest.mark.parametrize("B", (1, 32, 256))
@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_sequence(benchmark, controller: str, what: str, B: int, engine: str) -> None:
    benchmark.group = f"{controller} {what} B={B}"
    benchmark(FUNCTIONS[what](_model(controller, engine, B), copy_batch(B)))


@pytest.mark.parametrize("engine", ("sequence", "step", "torch calls around", "no memory"))
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_streaming(benchmark, controller: str, engine: str) -> None:
    benchmark.group = f"{controller} streaming, a step at B=1"
    batch = copy_batch(1)
    if engine == "torch calls around":
        function = stream(TorchCallsAround(make(controller, "reference")), batch[0])
    else:
        model = _model(controller, engine, 1)
        if engine != "no memory":
            check_stream(engine, model, batch)
        function = stream(model, batch[0])
    with torch.no_grad():
        benchmark(function)
