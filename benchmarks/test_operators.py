"""Every operator, native against reference, at the standard sizes: memory 128 x 20, one head, shifts -1..1."""

from __future__ import annotations

import pytest
import torch

import ntm_fast
from ntm_fast import ops, reference
from shared.operators import both, check, inputs, options, outputs_of
from shared.registry import OPERATORS, Sizes

ENGINES = {"native": ops, "reference": reference}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("B", (1, 32, 256))
@pytest.mark.parametrize("direction", ("forward", "forward+backward"))
@pytest.mark.parametrize("op", OPERATORS)
def test_operator(benchmark, op: str, direction: str, B: int, engine: str) -> None:
    benchmark.group = f"{op} {direction} B={B}"
    keywords = options(op, Sizes(B))
    leaves = [x.requires_grad_() for x in inputs(op, Sizes(B))]
    native, twin = getattr(ops, op), getattr(reference, op)
    grads = [torch.randn_like(y) for y in outputs_of(twin, *leaves, **keywords)]

    if engine == "native" and (answer := ntm_fast.explain()[op]) != "native":
        pytest.skip(answer)
    check(both(native, leaves, keywords, grads), both(twin, leaves, keywords, grads), grads)

    function = getattr(ENGINES[engine], op)
    if direction == "forward":
        with torch.no_grad():
            benchmark(outputs_of, function, *leaves, **keywords)
    else:
        benchmark(both, function, leaves, keywords, grads)
