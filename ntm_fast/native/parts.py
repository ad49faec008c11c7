"""The native parts: one for the CPU, one for CUDA. Each serves, or says why it does not."""

from __future__ import annotations

import functools
import os
import re
import warnings
from typing import Any, Callable, NamedTuple

import torch

from . import build
from .build import Missing

# The CPU's variants, best first: the variant's name, its file, the level that the processor must reach.
VARIANTS = (
    ("x86-64-v4", "ntm_cpu_v4.so", 4),
    ("x86-64-v3", "ntm_cpu_v3.so", 3),
    ("baseline", "ntm_cpu_baseline.so", 1),
)


class Part(NamedTuple):
    """A native part, or why there is none."""

    id: int | None  # of the loaded backend, for the binding
    name: str | None  # of the CPU variant, or the CUDA architectures
    reason: str | None  # why it does not serve; None when it does
    takes_ends: bool = True  # its ntm_sequence multiplies inputs and outputs itself
    bounded: bool = False  # it works in memory of a limited size: ask for the workspace before a call


def described(backend: int, reason: str | None = None) -> Part:
    """A loaded backend as it describes itself."""
    return Part(backend, reason=reason, **build.extension().describe(backend))


@functools.cache
def cpu() -> Part:
    """The best variant that was built and that this processor runs, or the one that NTM_CPU names."""
    wanted = os.environ.get("NTM_CPU") or None
    names = [name for name, _, _ in VARIANTS]
    try:
        if wanted == "off":
            raise Missing("switched off by NTM_CPU=off")
        if wanted and wanted not in names:
            raise Missing(f"NTM_CPU={wanted}: must be {', '.join(reversed(names))} or off")
        level, built = build.extension().cpu_level(), build.found().record["cpu"]
        for name, file, needed in VARIANTS:
            if wanted in (None, name) and name in built and needed <= level:
                build.share_openmp()
                return described(build.load(file))
        why = "was not built" if wanted not in built else "needs instructions that this processor lacks"
        raise Missing(f"NTM_CPU={wanted}: this variant {why}")
    except Missing as missing:
        return Part(None, None, str(missing))


@functools.cache
def cuda() -> Part:
    """The CUDA part. Without a driver or a device it is loaded all the same, and has a reason."""
    try:
        extension, record = build.extension(), build.found().record
        if not record["cuda"]:
            raise Missing(record["cuda_reason"])
        backend = build.load("ntm_cuda.so")
    except Missing as missing:
        return Part(None, None, str(missing))
    found = described(backend)
    if torch.version.cuda is None:
        return found._replace(reason=f"this torch ({torch.__version__}) has no CUDA")
    return found._replace(reason=extension.problem(backend) or no_device(found.name or ""))


def no_device(architectures: str) -> str | None:
    """Why no device that torch sees can run programs for these architectures; None when one can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    devices = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    for architecture in architectures.split(";"):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-virtual)?", architecture)
        assert match is not None, architecture
        major, minor, special, ptx = match.groups()
        for device in devices:
            # PTX runs on everything later, a cubin on later minors of its own major, code for 90a on 9.0 alone.
            later = device >= (int(major), int(minor)) and (ptx or device[0] == int(major))
            if device == (int(major), int(minor)) if special else later:
                return None
    found = ", ".join(f"{major}.{minor}" for major, minor in devices)
    return (
        f"ntm_fast was built for the architectures {architectures}, the devices are {found}: install it again with "
        f"TORCH_CUDA_ARCH_LIST={devices[0][0]}.{devices[0][1]}"
    )


PARTS: dict[str, Callable[[], Part]] = {"cpu": cpu, "cuda": cuda}
_reasons: dict[tuple[str, bool, str], str | None] = {}
_warned: set[str] = set()


def part(device_type: str) -> Part:
    """The part for such devices; one with a reason where there is none."""
    if device_type in PARTS:
        return PARTS[device_type]()
    return Part(None, None, f"there are native kernels for cpu and cuda, not for {device_type}")


def why_not(device_type: str, is_double: bool, operator: str) -> str | None:
    """Why no native kernel serves the operator on such devices, in float64 or float32; None when one does."""
    key = (device_type, is_double, operator)
    if key not in _reasons:
        found = part(device_type)
        _reasons[key] = found.reason
        if found.reason is None and not build.extension().serves(found.id, is_double, operator):
            _reasons[key] = f"there is no {device_type} kernel for {operator} yet"
    return _reasons[key]


def available(device_type: str) -> bool:
    """Whether there is a native part that can serve tensors on such devices."""
    return part(device_type).reason is None


def bounded(device_type: str) -> bool:
    """Whether the part for such devices works in memory of a limited size, which a machine can be too large for."""
    return part(device_type).bounded


def capabilities() -> dict[str, Any]:
    """What native parts there are.

    ``cpu`` is the name of the CPU variant in use or None, ``cuda`` the architectures that the CUDA part was built for
    or None. ``cpu_reason`` and ``cuda_reason`` say why a part does not serve, and are None where it does; a CUDA part
    that was built may still lack a driver or a device. ``build`` is what the build recorded, None without a build.
    """
    said: dict[str, Any] = {}
    for device_type in PARTS:
        found = part(device_type)
        said |= {device_type: found.name, f"{device_type}_reason": found.reason}
    built = build.find()
    return said | {"build": None if isinstance(built, Missing) else {**built.record, "folder": str(built.folder)}}


def warn_once(device_type: str) -> None:
    """Warn, once a process, that the reference serves such devices because a native part is missing."""
    if device_type in _warned or device_type not in PARTS or available(device_type):
        return
    _warned.add(device_type)
    warnings.warn(
        f"ntm_fast has no native {device_type.upper()} part in use and computes with its slower PyTorch reference: "
        f"{part(device_type).reason}",
        RuntimeWarning,
        stacklevel=2,
    )
