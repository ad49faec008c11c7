"""Tensors that the native code hands out, and the layouts of tensors: csrc/tensors.h."""

from __future__ import annotations

import math
from typing import Any, Sequence

import torch

from . import build, parts

POOLED = 1 << 15  # about so many numbers: from here malloc asks the system

Layout = tuple[int | None, bytes]  # the CPU's part in use, and the layouts of tensors, to compare


def empty(like: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """An uninitialised tensor of the device and dtype of ``like``; on the CPU, if it is large, from the pool.

    A training step would otherwise get all its memory from the system anew, at a page fault every 4 KB (csrc/pool.h).
    """
    if math.prod(sizes) >= POOLED and like.is_cpu and type(like) is torch.Tensor and parts.available("cpu"):
        return torch.from_dlpack(build.extension().pooled(sizes, like.dtype is torch.float64))
    return like.new_empty(*sizes)  # torch takes numbers in a third less time than a tuple of them


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
