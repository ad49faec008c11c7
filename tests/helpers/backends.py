"""The native backends under test."""

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
from ntm_fast import native
from ntm_fast.native import build as native_build
from ntm_fast.native import parts


class Backend:
    """A native backend under test. Every test runs on each entry of BACKENDS."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device

    def missing(self) -> str | None:
        """Why it cannot be tested here; None when it can."""
        answers = [ntm_fast.explain(self.device, dtype) for dtype in (torch.float32, torch.float64)]
        reasons = {answer[op] for answer in answers for op in OPERATORS}
        return ", ".join(sorted(reasons - {"native"})) or None

    def activate(self, monkeypatch) -> None:
        """Make the operators use this backend for tensors on ``device``. This one serves there without help."""

    def kernels(self) -> str | None:
        """The name of the native backend that must serve."""
        return ntm_fast.capabilities()[self.device]

    @contextlib.contextmanager
    def serves(self, *expected: str):
        """Assert that inside the block exactly these native functions are called, in this order, on this backend."""
        with native_calls.recorded() as calls:
            yield
        wanted = [(name, self.kernels()) for name in expected]
        assert calls == wanted, f"{self.name}: the native functions called were {calls}, expected {wanted}"


class CPUVariant(Backend):
    """One build of the CPU's kernels, even if this machine would choose another."""

    def __init__(self, name: str) -> None:
        super().__init__(f"native_cpu_{name}", "cpu")
        self.variant = name

    @functools.cached_property
    def part(self) -> native.Part:
        for name, file, level in parts.VARIANTS:
            if (
                name == self.variant
                and name in native_build.found().record["cpu"]
                and level <= native_build.extension().cpu_level()
            ):
                return parts.described(native_build.load(file))
        return native.Part(None, None, f"the CPU variant {self.variant} was not built or does not run here")

    def missing(self) -> str | None:
        return super().missing() or self.part.reason

    def activate(self, monkeypatch) -> None:
        native_calls.serve_by(monkeypatch, self.part)

    def kernels(self) -> str:
        return self.variant


class CUDAOnHost(Backend):
    """The CUDA kernels, compiled by g++ to work on tensors of the CPU: see tests/cuda_on_host."""

    def __init__(self) -> None:
        super().__init__("cuda_on_host", "cpu")

    @functools.cached_property
    def part(self) -> native.Part:
        try:
            native_build.extension()
        except native.Missing as missing:
            return native.Part(None, None, str(missing))
        reason = build.missing()
        if reason:
            return native.Part(None, None, reason)
        library = build.compiled(tuple(sorted(build.CSRC.glob("cuda/*.cu"))), "backend.so")
        return parts.described(native_build.extension().load(str(library)))

    def missing(self) -> str | None:
        return self.part.reason

    def activate(self, monkeypatch) -> None:
        native_calls.serve_by(monkeypatch, self.part)

    def kernels(self) -> str | None:
        return self.part.name


# Numbers are tested on each of KERNELS. What only PyTorch's side decides is tested on each of BACKENDS.
BACKENDS = [Backend("native_cpu", "cpu"), Backend("cuda", "cuda")]
CUDA_ON_HOST = CUDAOnHost()
KERNELS = [
    *BACKENDS,
    *(CPUVariant(name) for name, _, _ in parts.VARIANTS if name != ntm_fast.capabilities()["cpu"]),
    CUDA_ON_HOST,
]


def required(name: str) -> bool:
    """Whether the environment says that this backend must be there: NTM_TEST_REQUIRE=native_cpu,..."""
    return name in os.environ.get("NTM_TEST_REQUIRE", "").split(",")


def usable(backend: Backend, monkeypatch) -> Backend:
    """Activate the backend. Where it cannot serve, the test is skipped, or fails if NTM_TEST_REQUIRE names it."""
    backend.activate(monkeypatch)
    reason = backend.missing()
    if reason and required(backend.name):
        pytest.fail(f"NTM_TEST_REQUIRE names {backend.name}, which cannot serve: {reason}")
    if reason:
        pytest.skip(f"{backend.name} cannot serve: {reason}")
    return backend
