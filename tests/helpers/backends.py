"""The native backends under test, and which of their functions a test calls."""

from __future__ import annotations

import contextlib
import functools
import os

import pytest
import torch
from cuda_on_host import build

import ntm_fast
from helpers import native_calls
from helpers.cases import OPERATORS
from ntm_fast import _native


class Backend:
    """A native backend under test. Another one is one more entry in BACKENDS, and every test runs on it."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device

    def missing(self) -> str | None:
        """Why it cannot be tested here; None when it can."""
        answers = [ntm_fast.explain(self.device, dtype) for dtype in (torch.float32, torch.float64)]
        reasons = {answer[op] for answer in answers for op in OPERATORS}
        return ", ".join(sorted(reasons - {"native"})) or None

    def activate(self, monkeypatch) -> None:
        """Make the operators use this backend for tensors on ``device``; nothing to do where they do so anyway."""

    def kernels(self) -> str | None:
        """The name of the native backend that must serve."""
        return ntm_fast.capabilities()[self.device]

    @contextlib.contextmanager
    def serves(self, *expected: str):
        """Within, exactly these native functions are called, in this order, and those of this backend."""
        with native_calls.recorded() as calls:
            yield
        wanted = [(name, self.kernels()) for name in expected]
        assert calls == wanted, f"{self.name}: the native functions called were {calls}, expected {wanted}"


class CPUVariant(Backend):
    """One build of the CPU's kernels, whichever of them this machine would choose."""

    def __init__(self, name: str) -> None:
        super().__init__(f"native_cpu_{name}", "cpu")
        self.variant = name

    @functools.cached_property
    def part(self) -> native_calls.Part:
        for name, file, level in _native._VARIANTS:
            if (
                name == self.variant
                and name in _native._build().record["cpu"]
                and level <= _native._extension().cpu_level()
            ):
                return native_calls.Part(_native._load(file), name, None)
        return native_calls.Part(None, None, f"the CPU variant {self.variant} was not built or does not run here")

    def missing(self) -> str | None:
        return super().missing() or self.part.reason

    def activate(self, monkeypatch) -> None:
        native_calls.serve_by(monkeypatch, self.part)

    def kernels(self) -> str:
        return self.variant


class CUDAOnHost(Backend):
    """The CUDA kernels, compiled by g++ for tensors on the CPU: see cuda_on_host."""

    def __init__(self) -> None:
        super().__init__("cuda_on_host", "cpu")

    @functools.cached_property
    def part(self) -> native_calls.Part:
        try:
            _native._extension()
        except _native._Missing as missing:
            return native_calls.Part(None, None, str(missing))
        reason = build.missing()
        if reason:
            return native_calls.Part(None, None, reason)
        library = build.compiled(tuple(sorted(build.CSRC.glob("cuda/*.cu"))), "backend.so")
        return native_calls.Part(_native._extension().load(str(library)), self.name, None, cuda=True)

    def missing(self) -> str | None:
        return self.part.reason

    def activate(self, monkeypatch) -> None:
        native_calls.serve_by(monkeypatch, self.part)

    def kernels(self) -> str:
        return self.name


# The torch side of the operators is tested on each of BACKENDS, the numbers on each of KERNELS.
BACKENDS = [Backend("native_cpu", "cpu"), Backend("cuda", "cuda")]
CUDA_ON_HOST = CUDAOnHost()
KERNELS = [
    *BACKENDS,
    *(CPUVariant(name) for name, _, _ in _native._VARIANTS if name != ntm_fast.capabilities()["cpu"]),
    CUDA_ON_HOST,
]


def required(name: str) -> bool:
    """Whether the environment says that this backend must be there: NTM_TEST_REQUIRE=native_cpu,..."""
    return name in os.environ.get("NTM_TEST_REQUIRE", "").split(",")


def usable(backend: Backend, monkeypatch) -> Backend:
    """Skips, with the reason, what this machine lacks, unless NTM_TEST_REQUIRE says that it must be there."""
    backend.activate(monkeypatch)
    reason = backend.missing()
    if reason and required(backend.name):
        pytest.fail(f"NTM_TEST_REQUIRE names {backend.name}, which cannot serve: {reason}")
    if reason:
        pytest.skip(f"{backend.name} cannot serve: {reason}")
    return backend
