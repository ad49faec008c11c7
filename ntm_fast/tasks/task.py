"""What a task is: batches drawn from an explicit generator, a loss, an error with its unit, and what to evaluate."""

from __future__ import annotations

from dataclasses import Field
from typing import Any, Callable, ClassVar, NamedTuple, Protocol, Union

import torch
from torch import Tensor

Case = Union[int, tuple[int, ...]]
"""What is fixed of an evaluation: a value for each of the task's axes, or the value itself where there is one axis."""


class Batch(NamedTuple):
    """Sequences with their answers; T steps, B sequences, I and O the task's ``input_size`` and ``output_size``."""

    inputs: Tensor  # (T, B, I)
    targets: Tensor  # (T, B, O); 0 where the mask is False
    mask: Tensor  # (T, B), bool: the steps whose outputs are the answer
    lengths: Tensor | None = None  # (B,), integers: the steps of each sequence; None: all take T

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move to ``device`` and cast inputs and targets to ``dtype``. Lengths stay on the CPU, where they are
        checked."""
        inputs, targets = self.inputs.to(device, dtype), self.targets.to(device, dtype)
        return Batch(inputs, targets, self.mask.to(device), self.lengths)

    def through(self, model: Callable[..., Any]) -> Any:
        """What a model gives for it, with ``lengths`` as an argument where sequences differ in length."""
        return model(self.inputs) if self.lengths is None else model(self.inputs, lengths=self.lengths)


class Task(Protocol):
    """A task is a frozen dataclass whose fields are its options (:func:`ntm_fast.spec.option`): they become options
    of ``ntm-fast train NAME``. What is a property here may be a plain attribute of the class: ``name = "copy"``.

    Where the answers are bits, :class:`~ntm_fast.tasks.BitTask` has the loss, the error and its unit.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str:
        """A word: run folders and pictures are named by it."""
        ...

    @property
    def axes(self) -> tuple[str, ...]:
        """In what sequences differ: names of arguments of :meth:`batch`, integers of at least 1."""
        ...

    @property
    def unit(self) -> str:
        """Of the error, which is a mean over sequences: ``"bits a sequence"``."""
        ...

    @property
    def solved_below(self) -> float:
        """The error below which the task is solved, above 0."""
        ...

    @property
    def validate_below(self) -> float:
        """The error in training above which to validate would only confirm what is known."""
        ...

    @property
    def cases(self) -> tuple[Case, ...]:
        """What a trained model is evaluated at. A task without axes has one case, ``()``."""
        ...

    @property
    def shown(self) -> Case:
        """The case that is drawn: usually the hardest that is trained on."""
        ...

    @property
    def input_size(self) -> int: ...

    @property
    def output_size(self) -> int: ...

    def batch(self, batch_size: int, generator: torch.Generator, *args: Any, **kwargs: Any) -> Batch:
        """Draw ``batch_size`` sequences. Every axis is an argument, drawn as for training where it is not given.

        Every draw comes from ``generator``, a CPU generator: the same state gives the same batch.
        """
        ...

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """What training minimises: outputs (T, B, O) -> scalar."""
        ...

    def errors(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The error of each sequence, which is at least 0, summed over the batch: outputs (T, B, O) -> scalar.

        Validation ends as soon as the sum so far is too large, so no sequence may take from it.
        """
        ...

    def predictions(self, outputs: Tensor) -> Tensor:
        """Outputs as they compare with targets, for pictures: (T, B, O) -> (T, B, O)."""
        ...


def axis_values(task: Task, case: Case) -> dict[str, int]:
    """``case`` as arguments of ``task.batch``. Raises ValueError where it does not have a value for each axis."""
    values = case if isinstance(case, tuple) else (case,)
    if len(values) != len(task.axes):
        raise ValueError(f"case: got {case!r}, expected a value for each of ({', '.join(task.axes)})")
    return dict(zip(task.axes, values))
