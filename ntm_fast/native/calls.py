"""Calls of the native operators: sizes and options first, then addresses, in the order that the binding tells."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple, Sequence

import torch

from . import build, parts

_DEVICE_FAILED = "ntm_fast: kernel "  # how csrc/cuda/launch.h begins the text of CUDA's own errors
_refusals: dict[tuple, str | None] = {}


class Signature(NamedTuple):
    """What a native operator takes, by name, after the launch: csrc/operators.h."""

    scalars: tuple[str, ...]  # sizes and options
    tensors: tuple[str, ...]  # addresses


@functools.cache
def signature(operator: str) -> Signature:
    """Raises Missing where there is no binding, KeyError where there is no such operator."""
    return Signature(*build.extension().signature(operator))


def call(operator: str, like: torch.Tensor, scalars: Sequence[Any], addresses: Sequence[int]) -> None:
    """Run a native operator on the device and in the dtype of ``like``."""
    is_double = like.dtype is torch.float64
    if like.is_cuda:
        part, index = parts.part("cuda"), like.get_device()
        launch = 0, index, torch._C._cuda_getCurrentRawStream(index)
    else:
        part, index = parts.part("cpu"), 0
        launch = torch.get_num_threads(), 0, 0
    if part.reason is not None:
        raise RuntimeError(f"ntm_fast: no native {operator} on {like.device.type}: {part.reason}")
    extension, workspace = build.extension(), 0
    if part.bounded:
        needed = getattr(extension, f"{operator}_workspace")(part.id, is_double, index, *scalars)
        if needed:  # freed on return; only later work on this stream gets it
            room = like.new_empty(needed, dtype=torch.uint8)
            workspace = room.data_ptr()
    getattr(extension, operator)(part.id, is_double, *launch, workspace, *scalars, *addresses)


def refusal(operator: str, device: torch.device, is_double: bool, scalars: Sequence[Any]) -> str | None:
    """Why the device cannot run a native operator of these sizes, asked without running it; None when it can."""
    part = parts.part(device.type)
    key = operator, device.type, device.index, is_double, *scalars
    if key not in _refusals:
        _refusals[key] = None
        try:
            workspace = getattr(build.extension(), f"{operator}_workspace")
            workspace(part.id, is_double, device.index or 0, *scalars)
        except RuntimeError as error:
            if _DEVICE_FAILED in str(error):  # not about the sizes
                del _refusals[key]
                raise
            _refusals[key] = str(error)
    return _refusals[key]


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """For a backward, which may be called in autocast: native kernels need the dtypes that they expect."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
