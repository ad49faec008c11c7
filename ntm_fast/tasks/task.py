"""What every task is: batches of sequences drawn from an explicit generator, and the lengths to evaluate at."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Sequences with their answers; T steps, B sequences, I and O the task's ``input_size`` and ``output_size``."""

    inputs: Tensor  # (T, B, I)
    targets: Tensor  # (T, B, O), bits as 0 and 1; 0 where the mask is False
    mask: Tensor  # (T, B), bool: the steps whose outputs are the answer

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move to ``device`` and cast inputs and targets to ``dtype``."""
        return Batch(self.inputs.to(device, dtype), self.targets.to(device, dtype), self.mask.to(device))


class Task(Protocol):
    """A task is a dataclass whose fields are its options; they become options of ``ntm-fast train NAME``."""

    name: ClassVar[str]
    evaluation_lengths: ClassVar[tuple[int, ...]]  # what a trained machine is evaluated at
    max_length: int  # the longest trained on

    @property
    def input_size(self) -> int: ...

    @property
    def output_size(self) -> int: ...

    def batch(self, batch_size: int, generator: torch.Generator, length: int | None = None) -> Batch:
        """Draw ``batch_size`` sequences of one length, itself drawn as for training unless it is given.

        Every draw comes from ``generator``, a CPU generator: the same state gives the same batch.
        """
        ...
