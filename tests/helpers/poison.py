"""Fresh memory full of NaN between guards: a number that is never written, or written outside of its tensor, is found.

Stands in for what the operators take their outputs and buffers from.
"""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch
from torch import Tensor

from ntm_fast import native
from ntm_fast.ops import contract

GUARD, SENTINEL = 64, 777.0  # with 64 elements in front, a tensor is aligned as an allocation is


class Poison:
    """The poisoned tensors handed out since the last check."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []  # each a tensor's memory with a guard before and behind it
        self.results: list[Tensor] = []

    def fresh(self, like: Tensor, shape: tuple[int, ...], stride: tuple[int, ...] | None = None) -> Tensor:
        """A tensor of NaN, of ``like``'s dtype and device; contiguous where no strides are given."""
        count = torch.Size(shape).numel()
        block = like.new_full((count + 2 * GUARD,), SENTINEL)
        block[GUARD : GUARD + count].view(torch.uint8).fill_(0xFF)  # NaN, in any dtype
        result = block[GUARD : GUARD + count].view(shape)
        if stride is not None:
            result = like.new_empty(0).set_(block.untyped_storage(), GUARD, shape, stride)
        self.blocks.append(block)
        self.results.append(result)
        return result

    def check(self, *, all_written: bool = False) -> None:
        """Assert that nobody wrote outside of a tensor and, if ``all_written``, that every number was written."""
        for index, (block, result) in enumerate(zip(self.blocks, self.results)):
            what = f"buffer {index}, {tuple(result.shape)}"
            guards = torch.cat([block[:GUARD], block[-GUARD:]])
            assert bool((guards == SENTINEL).all()), f"wrote outside of {what}"
            if all_written:
                assert not result.isnan().any(), f"{int(result.isnan().sum())} numbers of {what} were never written"
        self.blocks.clear()
        self.results.clear()


_current: list[Poison] = []


def handed_out() -> list[Tensor]:
    """The poisoned outputs of operators since the last check, in the order in which they were taken."""
    return _current[-1].results


@contextlib.contextmanager
def poisoned_operators() -> Iterator[Poison]:
    """Inside the block, the outputs of operators are poisoned."""
    poison, right = Poison(), contract.empty

    def empty(like: Tensor, letters: str, dims: dict[str, int]) -> Tensor:
        result = right(like, letters, dims)
        fake = type(like) is not Tensor
        return result if fake else poison.fresh(like, tuple(result.shape), result.stride())

    contract.empty = empty
    _current.append(poison)
    try:
        yield poison
    finally:
        _current.pop()
        contract.empty = right


def poison_sequences(monkeypatch) -> Poison:
    """From now on, what the sequence engine allocates is poisoned."""
    poison = Poison()
    poisoned = lambda like, shapes, returned=False: [poison.fresh(like, shape) for shape in shapes]  # noqa: E731
    monkeypatch.setattr(native, "empty", poisoned)
    return poison
