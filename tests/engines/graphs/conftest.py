from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from helpers.graphs_on_host import HostRecorder

from ntm_fast.engines import graphs, step


@pytest.fixture(autouse=True)
def _where_the_backend_computes(request, monkeypatch):
    """Modules and tensors are made on the backend's device. On the CPU an emulation of graphs serves."""
    names = {"backend", "kernels"} & set(request.fixturenames)
    device = request.getfixturevalue(*names).device if names else "cpu"
    if device == "cpu":
        monkeypatch.setitem(graphs.RECORDERS, "cpu", HostRecorder)
        HostRecorder.replays = 0
    monkeypatch.setattr(graphs, "_warned", False)
    with torch.device(device) if device != "cpu" else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="ntm_fast")
        yield


@pytest.fixture
def tapes(monkeypatch) -> list:
    """One entry for each StepTape that is made: whether it keeps what backward needs."""
    made: list = []

    class Counted(step.StepTape):
        def __init__(self, options, keep, row):
            made.append(keep)
            super().__init__(options, keep, row)

    monkeypatch.setattr(step, "StepTape", Counted)
    return made
