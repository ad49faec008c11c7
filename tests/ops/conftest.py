from __future__ import annotations

import pytest
from helpers.backends import BACKENDS, CUDA_ON_HOST, Backend, usable


@pytest.fixture(params=[*BACKENDS, CUDA_ON_HOST], ids=lambda backend: backend.name)
def backend(request, monkeypatch) -> Backend:
    """Every native backend, and the CUDA kernels on the host: unlike the CPU's, they may ask for a workspace."""
    return usable(request.param, monkeypatch)
