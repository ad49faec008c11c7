from __future__ import annotations

import contextlib

import pytest
import torch
from helpers.backends import BACKENDS, KERNELS, Backend, usable
from helpers.machines import skip_without_sequence

from ntm_fast.engines import graphs


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request, monkeypatch) -> Backend:
    """Every native backend in turn."""
    return usable(request.param, monkeypatch)


@pytest.fixture(params=KERNELS, ids=lambda backend: backend.name)
def kernels(request, monkeypatch) -> Backend:
    """Every build of every native backend in turn."""
    return usable(request.param, monkeypatch)


@pytest.fixture
def made_on_the_backend(request):
    """Modules and tensors are made on the backend's device, and engines that it does not have are skipped."""
    device = request.getfixturevalue("backend").device if "backend" in request.fixturenames else "cpu"
    if device != "cpu" and "sequence" in request.node.callspec.params.values():
        skip_without_sequence(device)
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _same_state_everywhere():
    """Every test starts with the same seed, one thread and no captured graphs.

    One thread, unless a test asks for more: these tensors are so small that a second thread would only wait.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    graphs.clear()
    yield
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() is torch.float32
