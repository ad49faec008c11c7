"""Tensors that the native code hands out, and the layouts of tensors: csrc/tensors.h."""

from __future__ import annotations

import functools
import math
import struct
from typing import Any

import torch

from . import build, parts

POOLED = 1 << 15  # about so many numbers: from here malloc asks the system

Layout = tuple[int | None, bytes]  # the CPU's part in use, and the layouts of tensors, to compare


def empty(
    like: torch.Tensor, shapes: tuple[tuple[int, ...], ...], returned: bool = False
) -> list[torch.Tensor]:
    """Uninitialised tensors of the device and dtype of ``like``; on the CPU in one call, and large ones from the pool.
    ``returned``: small ones are torch's own, because a user may resize what he gets.

    A training step takes some forty tensors, each of which torch makes in 1.5 us. Without the pool it would also get
    their memory from the system anew, at a page fault every 4 KB (csrc/pool.h).
    """
    pools = like.is_cpu and type(like) is torch.Tensor and parts.available("cpu")
    is_double = like.dtype is torch.float64
    if pools and not returned:
        made = build.extension().empty_as(_contiguous(shapes, is_double), POOLED)
        if made is not None:
            return made[0]

    def one(shape: tuple[int, ...]) -> torch.Tensor:
        if pools and math.prod(shape) >= POOLED:
            return torch.from_dlpack(build.extension().pooled(shape, is_double))
        return like.new_empty(shape)

    return [one(shape) for shape in shapes]


@functools.lru_cache(maxsize=1024)
def _contiguous(shapes: tuple[tuple[int, ...], ...], is_double: bool) -> bytes:
    """The layouts of contiguous tensors, as the binding writes them."""
    found = b""
    for shape in shapes:
        strides = [math.prod(shape[index + 1 :]) for index in range(len(shape))]
        found += struct.pack(f"=2i{2 * len(shape)}q", len(shape), 64 if is_double else 32, *shape, *strides)
    return found


def layouts(tensors: tuple[Any, ...]) -> tuple[Layout, list[int]] | None:
    """The CPU's part in use and the layouts of these tensors, to compare with others', and their addresses.

    None where something is no plain float32 or float64 tensor on the CPU, before torch 2.10, or without the part.
    """
    part = parts.part("cpu")
    if part.reason is not None or part.bounded:
        return None
    found = build.extension().layouts(tensors)
    return None if found is None else ((part.id, found[0]), found[1])


def empty_as(layout: Layout) -> tuple[list[torch.Tensor], list[int]]:
    """Uninitialised tensors with the layouts of others, as :func:`layouts` gave them, and their addresses."""
    return build.extension().empty_as(layout[1], POOLED)


def release_pool() -> int:
    """Give the main memory that is kept for the next training step back to the system; returns how many bytes."""
    return build.extension().release_pool() if parts.available("cpu") else 0
