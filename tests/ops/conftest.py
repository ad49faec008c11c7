from __future__ import annotations

import pytest
from helpers.backends import BACKENDS, CUDA_ON_HOST, Backend, usable


@pytest.fixture(params=[*BACKENDS, CUDA_ON_HOST], ids=lambda backend: backend.name)
def backend(request, monkeypatch) -> Backend:
    """The torch side too, for it tells kernels of both kinds apart: those of CUDA may ask for a workspace."""
    return usable(request.param, monkeypatch)
