"""Copy (Graves et al. 2014, section 4.1): see a sequence of random bits, then write it down from memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .task import Batch


@dataclass(frozen=True)
class CopyTask:
    """Sequences of ``length`` random vectors of ``bits`` bits, to be repeated after a delimiter.

    A sequence has T = 2 ``length`` + 1 steps and ``bits`` + 1 input channels: the vectors on the first ``bits``
    channels, then one step with only the last channel set, the delimiter, then zeros while the machine answers. The
    targets of the last ``length`` steps are the vectors; only those count.

    Raises ValueError for a length below 1, ``max_length`` below ``min_length`` or no bits.
    """

    bits: int = field(default=8, metadata={"help": "bits of a vector"})
    min_length: int = field(default=1, metadata={"help": "shortest training sequence, in vectors"})
    max_length: int = field(default=20, metadata={"help": "longest training sequence, in vectors"})

    name: ClassVar[str] = "copy"
    evaluation_lengths: ClassVar[tuple[int, ...]] = (10, 20, 30, 50, 100)

    def __post_init__(self) -> None:
        for option, least in (("bits", 1), ("min_length", 1), ("max_length", self.min_length)):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{option}: got {value!r}, expected an integer of at least {least}")

    @property
    def input_size(self) -> int:
        return self.bits + 1

    @property
    def output_size(self) -> int:
        return self.bits

    def batch(self, batch_size: int, generator: torch.Generator, length: int | None = None) -> Batch:
        """Draw ``batch_size`` sequences of ``length`` vectors, or of a length uniform in ``min_length..max_length``."""
        if length is None:
            length = int(torch.randint(self.min_length, self.max_length + 1, (), generator=generator))
        if length < 1 or batch_size < 1:
            raise ValueError(f"length and batch_size: got {length} and {batch_size}, expected at least 1")
        vectors = torch.randint(0, 2, (length, batch_size, self.bits), generator=generator, dtype=torch.float32)
        steps = 2 * length + 1
        inputs = torch.zeros(steps, batch_size, self.input_size)
        inputs[:length, :, : self.bits] = vectors
        inputs[length, :, self.bits] = 1
        targets = torch.zeros(steps, batch_size, self.output_size)
        targets[length + 1 :] = vectors
        mask = torch.zeros(steps, batch_size, dtype=torch.bool)
        mask[length + 1 :] = True
        return Batch(inputs, targets, mask)
