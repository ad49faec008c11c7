from __future__ import annotations

import pytest
import torch
import torch.utils.deterministic
from helpers import sequences
from helpers.backends import BACKENDS, CUDA_ON_HOST, Backend, usable
from helpers.poison import poison_sequences


@pytest.fixture(params=[*BACKENDS, CUDA_ON_HOST], ids=lambda backend: backend.name)
def backend(request, monkeypatch) -> Backend:
    """Every native backend, and the CUDA kernels on the host: unlike the CPU's, they may ask for a workspace."""
    return usable(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def _on_its_device(request, monkeypatch) -> None:
    for name in {"kernels", "backend"} & set(request.fixturenames):
        monkeypatch.setattr(sequences, "DEVICE", request.getfixturevalue(name).device)


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory is full of NaN. What the kernels of sequences get lies between guards, too."""
    poison = poison_sequences(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield poison
    torch.use_deterministic_algorithms(False)
