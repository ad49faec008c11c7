"""One training step of the standard job, by engine, and what it costs with no memory at all."""

from __future__ import annotations

import pytest
import torch
from job import check_agreement, copy_batch, make, training_step

from ntm_fast import ops


@pytest.mark.parametrize("engine", ("step", "reference", "nn.LSTM"))
@pytest.mark.parametrize("B", (1, 32, 256))
def test_training_step(benchmark, B: int, engine: str) -> None:
    benchmark.group = f"training step B={B}"
    reason = ops.why_not_native(torch.device("cpu"), torch.float32)
    if engine == "step" and reason:
        pytest.skip(reason)
    batch = copy_batch(B)
    check_agreement(engine, batch)
    benchmark(training_step(make(engine), batch))
