from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from helpers.graphs_on_host import HostRecorder

from ntm_fast import graphs, recurrence


@pytest.fixture(autouse=True)
def _where_the_backend_computes(request, monkeypatch):
    """On the CPU the emulation serves; what is made is made on the backend's device."""
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
    """Of every StepTape that is made, and captured or run kernel by kernel, whether it keeps what backward needs."""
    made: list = []

    class Counted(recurrence.StepTape):
        def __init__(self, controller, options, keep, tensors):
            made.append(keep)
            super().__init__(controller, options, keep, tensors)

    monkeypatch.setattr(recurrence, "StepTape", Counted)
    return made
