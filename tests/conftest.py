from __future__ import annotations

import pytest
import torch
from comparison import BACKENDS, KERNELS, Backend, required


def _usable(backend: Backend, monkeypatch) -> Backend:
    """Skips, with the reason, what this machine lacks, unless NTM_TEST_REQUIRE says that it must be there."""
    backend.activate(monkeypatch)
    reason = backend.missing()
    if reason and required(backend.name):
        pytest.fail(f"NTM_TEST_REQUIRE names {backend.name}, which cannot serve: {reason}")
    if reason:
        pytest.skip(f"{backend.name} cannot serve: {reason}")
    return backend


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request, monkeypatch) -> Backend:
    """Every native backend in turn."""
    return _usable(request.param, monkeypatch)


@pytest.fixture(params=KERNELS, ids=lambda backend: backend.name)
def kernels(request, monkeypatch) -> Backend:
    """Every build of every native backend in turn."""
    return _usable(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def _same_state_everywhere():
    """Seeded, and nothing that one test sets reaches another.

    One thread, unless a test asks for more: on tensors this small a second one only waits, on a busy machine for long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() is torch.float32
