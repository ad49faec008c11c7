"""Fresh outputs full of NaN between guards: what is never written, or written beside, is found."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ntm_fast import ops


class Poison:
    """Stands in for ``ops._empty``: fresh outputs are full of NaN, between guards that nobody may touch."""

    GUARD, SENTINEL = 64, 777.0  # 64 elements keep an allocation's alignment

    def __init__(self) -> None:
        self.original = ops._empty
        self.blocks: list[Tensor] = []
        self.results: list[Tensor] = []

    def __call__(self, like: Tensor, letters: str, dims: dict[str, int]) -> Tensor:
        result = self.original(like, letters, dims)
        if type(like) is not Tensor:  # a fake
            return result
        block = like.new_full((result.numel() + 2 * self.GUARD,), self.SENTINEL)
        block[self.GUARD : self.GUARD + result.numel()] = torch.nan
        self.blocks.append(block)
        self.results.append(like.new_empty(0).set_(block.untyped_storage(), self.GUARD, result.shape, result.stride()))
        return self.results[-1]

    def check(self) -> None:
        for block in self.blocks:
            guards = torch.cat([block[: self.GUARD], block[-self.GUARD :]])
            assert bool((guards == self.SENTINEL).all()), "wrote outside of an output"
        self.blocks.clear()


@contextlib.contextmanager
def poisoned():
    poison = Poison()
    ops._empty = poison
    try:
        yield poison
    finally:
        ops._empty = poison.original
