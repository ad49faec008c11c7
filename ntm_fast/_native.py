"""Finds and loads the native parts, and says of each that is missing why.

Nothing here raises at import: without a native part the reference serves. NTM_CPU=baseline|x86-64-v3|x86-64-v4 forces
one CPU variant, NTM_CPU=off none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch  # before any native part: its OpenMP runtime is the one that serves both
from torch.torch_version import TorchVersion

_HERE = Path(__file__).resolve().parent
# Best first: the variant's name, its file, the level that the processor must reach.
_VARIANTS = (
    ("x86-64-v4", "ntm_cpu_v4.so", 4),
    ("x86-64-v3", "ntm_cpu_v3.so", 3),
    ("baseline", "ntm_cpu_baseline.so", 1),
)


class _Missing(Exception):
    """A native part cannot serve; the text is the reason."""


class _Build(NamedTuple):
    folder: Path
    record: dict[str, Any]  # what setup.py wrote into _build.json


class _Part(NamedTuple):
    id: int | None  # of the loaded backend, for the binding
    name: str | None  # of the CPU variant, or the CUDA architectures
    reason: str | None  # why it does not serve; None when it does
    cuda: bool = False  # built from csrc/cuda: may ask for room on the device


def sources_digest(tree: Path) -> str:
    """Of everything in a source tree that is compiled; as setup.py's, which cannot import this package."""
    files = sorted(path for path in (tree / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


@functools.cache
def _build() -> _Build | _Missing:
    """This package's own build. A source tree without one borrows that of an installed copy of the same sources."""
    if (_HERE / "_build.json").exists():
        return _Build(_HERE, json.loads((_HERE / "_build.json").read_text()))
    sources = sources_digest(_HERE.parent)
    folders = [Path(path, __package__) for path in sys.path if Path(path, __package__, "_build.json").exists()]
    others = [_Build(folder, json.loads((folder / "_build.json").read_text())) for folder in folders]
    for build in others:
        if build.record["sources"] == sources:
            return build
    if others:
        return _Missing(
            f"ntm_fast was imported from the source tree {_HERE.parent}, and the copy installed in {others[0].folder} "
            f"was built from other sources (version {others[0].record['version']}): run 'pip install .' again"
        )
    return _Missing(
        f"ntm_fast was imported from {_HERE}, where nothing has been built: run 'pip install .' in its source tree"
    )


@functools.cache
def _extension() -> Any:
    """The binding; raises _Missing where there is none."""
    build = _build()
    if isinstance(build, _Missing):
        raise build
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = build.folder / f"_C{suffix}"
        if path.exists():
            spec = importlib.util.spec_from_file_location(f"{__package__}._C", path)
            module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except ImportError as error:
                raise _Missing(f"{path} does not load: {error}") from error
            # Earlier torches have none of their own, though some other package may have given them one.
            if TorchVersion(torch.__version__) >= (2, 10) and hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
                module.exchange_with(torch.Tensor.__dlpack_c_exchange_api__, *PLAIN)
            return module
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    built_for = f"ntm_fast in {build.folder} was built for Python {build.record['python']}, and this is Python {python}"
    raise _Missing(build.record["cpu_reason"] or built_for)


def _load(file: str) -> int:
    try:
        return _extension().load(str(_build().folder / file))
    except RuntimeError as error:
        raise _Missing(f"{file} does not load: {error}") from error


def _share_openmp() -> None:
    """Offer torch's OpenMP runtime to what is loaded next, so that the process has one pool of threads.

    The CPU variants are not linked with a runtime. Wheels carry theirs under many names: libgomp.so.1,
    libgomp-a34b3233.so.1, libiomp5.so.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # no /proc: not Linux
        return
    mapped = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
    mapped = sorted(path for path in mapped if re.search(r"/lib(gomp|i?omp)\d*\b[^/]*\.so[^/]*$", path))
    home = str(Path(torch.__file__).parent)  # .../torch, beside which wheel repair puts .../torch.libs
    of_torch = [path for path in mapped if path.startswith((f"{home}/", f"{home}.libs/"))]
    for path in [*of_torch, *mapped][:1]:
        ctypes.CDLL(path, mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD)
    if not mapped:  # a torch without OpenMP
        try:
            ctypes.CDLL("libgomp.so.1", mode=os.RTLD_GLOBAL)
        except OSError as error:
            raise _Missing(f"there is no OpenMP runtime: {error}") from error


@functools.cache
def _cpu() -> _Part:
    wanted = os.environ.get("NTM_CPU") or None
    names = [name for name, _, _ in _VARIANTS]
    try:
        if wanted == "off":
            raise _Missing("switched off by NTM_CPU=off")
        if wanted and wanted not in names:
            raise _Missing(f"NTM_CPU={wanted}: must be {', '.join(reversed(names))} or off")
        level, built = _extension().cpu_level(), _build().record["cpu"]
        for name, file, needed in _VARIANTS:
            if wanted in (None, name) and name in built and needed <= level:
                _share_openmp()
                return _Part(_load(file), name, None)
        why = "was not built" if wanted not in built else "needs instructions that this processor lacks"
        raise _Missing(f"NTM_CPU={wanted}: this variant {why}")
    except _Missing as missing:
        return _Part(None, None, str(missing))


@functools.cache
def _cuda() -> _Part:
    try:
        extension, record = _extension(), _build().record
        if not record["cuda"]:
            raise _Missing(record["cuda_reason"])
        backend = _load("ntm_cuda.so")
    except _Missing as missing:
        return _Part(None, None, str(missing))
    name = extension.describe(backend)["name"]
    if torch.version.cuda is None:
        reason = f"this torch ({torch.__version__}) has no CUDA"
    else:
        reason = extension.problem(backend) or _no_device(name)
    return _Part(backend, name, reason, cuda=True)


def _no_device(architectures: str) -> str | None:
    """Why no device that torch sees can run programs for these architectures; None when one can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    devices = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    for architecture in architectures.split(";"):
        major, minor, special, ptx = re.fullmatch(r"(\d+)(\d)([af]?)(-virtual)?", architecture).groups()
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


_PARTS = {"cpu": _cpu, "cuda": _cuda}
_reasons: dict[tuple[str, bool, str], str | None] = {}
_refusals: dict[tuple, str | None] = {}
_DEVICE_FAILED = "ntm_fast: kernel "  # so begins what csrc/cuda/launch.h says of CUDA's own errors
_warned: set[str] = set()
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))  # tensors of other classes may mean more than what they hold
POOLED = 1 << 15  # numbers from which, about, the C library asks the system


def why_not(device_type: str, is_double: bool, operator: str) -> str | None:
    """Why no native kernel serves the operator on such devices, in float64 or float32; None when one does."""
    key = (device_type, is_double, operator)
    if key not in _reasons:
        if device_type not in _PARTS:
            _reasons[key] = f"there are native kernels for cpu and cuda, not for {device_type}"
        else:
            part = _PARTS[device_type]()
            _reasons[key] = part.reason
            if part.reason is None and not _extension().serves(part.id, is_double, operator):
                _reasons[key] = f"there is no {device_type} kernel for {operator} yet"
    return _reasons[key]


def call(operator: str, like: torch.Tensor, *values: Any) -> None:
    """Run a native operator with these sizes, options and addresses, on the device and in the dtype of ``like``."""
    if like.is_cuda:
        part = _cuda()
        index = like.get_device()
        launch = (0, index, torch._C._cuda_getCurrentRawStream(index))
    else:
        part = _cpu()
        launch = (torch.get_num_threads(), 0, 0)
    if part.reason is not None:
        raise RuntimeError(f"ntm_fast: no native {operator} on {like.device.type}: {part.reason}")
    extension, is_double = _extension(), like.dtype is torch.float64
    workspace = 0
    if part.cuda:
        scalars = values[: len(extension.signature(operator)[0])]
        needed = getattr(extension, f"{operator}_workspace")(part.id, is_double, launch[1], *scalars)
        if needed:  # given back on return: to what is queued behind, on this stream
            room = like.new_empty(needed, dtype=torch.uint8)
            workspace = room.data_ptr()
    getattr(extension, operator)(part.id, is_double, *launch, workspace, *values)


def refusal(operator: str, device_type: str, index: int | None, is_double: bool, *scalars: Any) -> str | None:
    """Why the CUDA device cannot run a native operator of these sizes, asked without running it; None when it can.

    ``scalars``: the sizes and options, as for :func:`call`.
    """
    key = (operator, device_type, index, is_double, *scalars)
    if key not in _refusals:
        workspace = getattr(_extension(), f"{operator}_workspace")
        _refusals[key] = None
        try:
            workspace(_PARTS[device_type]().id, is_double, index or 0, *scalars)
        except RuntimeError as error:
            if _DEVICE_FAILED in str(error):  # which says nothing of the sizes
                del _refusals[key]
                raise
            _refusals[key] = str(error)
    return _refusals[key]


def limited(device_type: str) -> bool:
    """Whether the native part for such devices runs in shared memory, whose limit sizes can meet."""
    return device_type in _PARTS and _PARTS[device_type]().cuda


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """For a backward, which may be called in autocast: what goes to native kernels must be what they take it for."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def step_sizes(
    memory: torch.Tensor, read_weights: torch.Tensor, write_weights: torch.Tensor, shift_range: int
) -> tuple[int, ...]:
    """memory_step's sizes as the native code takes them: B, R, W, N, M, 2S+1."""
    return read_weights.shape[0], read_weights.shape[1], write_weights.shape[1], *memory.shape[1:], 2 * shift_range + 1


def step_scalars(
    read_first: bool, key_activation: str, add_activation: str, clip: float | None, eps: float
) -> tuple[Any, ...]:
    """memory_step's other options as the native code takes them."""
    return read_first, key_activation == "tanh", add_activation == "tanh", math.inf if clip is None else clip, eps


def empty(like: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised tensor of the device and dtype of ``like``; on the CPU, if it is large, from the pool.

    A training step would otherwise get all its memory from the system anew, at a page fault every 4 KB (csrc/pool.h).
    """
    if math.prod(sizes) >= POOLED and like.is_cpu and type(like) is torch.Tensor and _cpu().reason is None:
        return torch.from_dlpack(_extension().pooled(sizes, like.dtype is torch.float64))
    return like.new_empty(*sizes)  # torch takes numbers in a third less time than a tuple of them


def layouts(tensors: tuple[Any, ...]) -> tuple[tuple[int, bytes], list[int]] | None:
    """The CPU's part in use and how these tensors lie, to compare with others', and their addresses.

    None where something is no plain float32 or float64 tensor on the CPU, before torch 2.10, or without the part.
    """
    part = _cpu()
    if part.reason is not None or part.cuda:
        return None
    found = _extension().layouts(tensors)
    return found and ((part.id, found[0]), found[1])


def empty_as(layout: tuple[int, bytes]) -> tuple[list[torch.Tensor], list[int]]:
    """Uninitialised tensors that lie as :func:`layouts` said of others, and their addresses."""
    return _extension().empty_as(layout[1], POOLED)


def release_pool() -> int:
    """Give the main memory that is kept for the next training step back to the system; returns how many bytes."""
    return _extension().release_pool() if _cpu().reason is None else 0


def available(device_type: str) -> bool:
    """Whether there is a native part that can serve tensors on such devices."""
    return device_type in _PARTS and _PARTS[device_type]().reason is None


def capabilities() -> dict[str, Any]:
    """What native parts there are.

    ``cpu`` is the name of the CPU variant in use or None, ``cuda`` the architectures that the CUDA part was built for
    or None. ``cpu_reason`` and ``cuda_reason`` say why a part does not serve, and are None where it does; a CUDA part
    that was built may still lack a driver or a device. ``build`` is what the build recorded, None without a build.
    """
    build = _build()
    return {
        "cpu": _cpu().name,
        "cpu_reason": _cpu().reason,
        "cuda": _cuda().name,
        "cuda_reason": _cuda().reason,
        "build": None if isinstance(build, _Missing) else {**build.record, "folder": str(build.folder)},
    }


def warn_once(device_type: str) -> None:
    """Warn, once a process, that the reference serves such devices because a native part is missing."""
    if device_type in _warned or device_type not in _PARTS or available(device_type):
        return
    _warned.add(device_type)
    warnings.warn(
        f"ntm_fast has no native {device_type.upper()} part in use and computes with its slower PyTorch reference: "
        f"{_PARTS[device_type]().reason}",
        RuntimeWarning,
        stacklevel=2,
    )


# torch.compile asks these while it traces, and takes the answers as they are.
for _function in (why_not, available, warn_once, refusal, limited):
    _function._dynamo_marked_constant = True
