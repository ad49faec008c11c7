"""Copy (Graves et al. 2014, section 4.1): see a sequence of random bits, then write it down from memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..spec import option
from .bits import BitTask
from .task import Batch


@dataclass(frozen=True)
class CopyTask(BitTask):
    """Sequences of ``length`` random vectors of ``bits`` bits, to be repeated after a delimiter.

    A sequence has T = 2 ``length`` + 1 steps and ``bits`` + 1 input channels: the vectors on the first ``bits``
    channels, then one step with only the last channel set, the delimiter, then zeros while the machine answers. The
    targets of the last ``length`` steps are the vectors; only those count.

    All sequences of a batch have one length, as published, unless ``mixed_lengths`` gives each its own.

    Raises ValueError or TypeError for a length below 1, ``max_length`` below ``min_length`` or no bits.
    """

    bits: int = option(8, "bits of a vector", least=1)
    min_length: int = option(1, "shortest training sequence, in vectors", least=1)
    max_length: int = option(20, "longest training sequence, in vectors", least=1)
    mixed_lengths: bool = option(False, "draw a length for each sequence, not one for a batch")

    name = "copy"
    axes = ("length",)
    cases = (10, 20, 30, 50, 100)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < self.min_length:
            raise ValueError(f"max_length: got {self.max_length}, expected at least min_length = {self.min_length}")

    @property
    def shown(self) -> int:
        """The longest trained on."""
        return self.max_length

    @property
    def input_size(self) -> int:
        return self.bits + 1

    @property
    def output_size(self) -> int:
        return self.bits

    def batch(self, batch_size: int, generator: torch.Generator, length: int | None = None) -> Batch:
        """Draw ``batch_size`` sequences of ``length`` vectors, or of a length uniform in ``min_length..max_length``."""
        if batch_size < 1 or length is not None and length < 1:
            raise ValueError(f"length and batch_size: got {length} and {batch_size}, expected at least 1")
        mixed = self.mixed_lengths and length is None
        if length is None:
            size = (batch_size,) if mixed else ()
            lengths = torch.randint(self.min_length, self.max_length + 1, size, generator=generator)
        else:
            lengths = torch.tensor(length)
        lengths, longest = lengths.expand(batch_size), int(lengths.max())
        vectors = torch.randint(0, 2, (longest, batch_size, self.bits), generator=generator, dtype=torch.float32)
        t = torch.arange(2 * longest + 1).unsqueeze(1)
        shown, answered = t < lengths, (t > lengths) & (t <= 2 * lengths)
        inputs = torch.zeros(len(t), batch_size, self.input_size)
        inputs[:longest, :, : self.bits] = vectors.where(shown[:longest].unsqueeze(-1), 0)
        inputs[lengths, torch.arange(batch_size), self.bits] = 1
        place = (t - lengths - 1).clamp(0, longest - 1).unsqueeze(-1)
        targets = vectors.gather(0, place.expand(-1, -1, self.bits)).where(answered.unsqueeze(-1), 0)
        return Batch(inputs, targets, answered, 2 * lengths + 1 if mixed else None)
