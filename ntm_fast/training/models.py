"""The models that can be trained, by name: each a dataclass of its options that builds the module."""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..modules import FastNTM
from ..registry import look_up
from ..spec import MachineOptions


class Model(Protocol):
    """A model is a frozen dataclass whose fields are its options (:func:`ntm_fast.spec.option`): they become options
    of ``ntm-fast train TASK --model NAME``. One with the rule ``changeable=True`` may change when a run goes on.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str:
        """A word: run folders are named by it."""
        ...

    @property
    def title(self) -> str:
        """What pictures call it."""
        ...

    def build(self, input_size: int, output_size: int, *, dtype: torch.dtype) -> nn.Module:
        """The untrained module, on the CPU: its ``forward`` takes inputs (T, B, I) and returns outputs (T, B, O) and
        a state, which training does not look at. Where a task's sequences differ in length, it also takes ``lengths``,
        as :class:`FastNTM` does. Random numbers come from torch's global generator, which is seeded.
        """
        ...


@dataclass(frozen=True)
class NTM(MachineOptions):
    """:class:`FastNTM`."""

    @property
    def name(self) -> str:
        return self.controller

    @property
    def title(self) -> str:
        name = {"feedforward": "feed-forward"}.get(self.controller, self.controller.upper())
        return f"{name} controller"

    def build(self, input_size: int, output_size: int, *, dtype: torch.dtype) -> FastNTM:
        return FastNTM(input_size, output_size, dtype=dtype, **asdict(self))


MODELS: dict[str, type[Model]] = {"ntm": NTM}


def find_model(name: str) -> type[Model]:
    """The model of that name: one of ``MODELS``, or a user's own as ``module:Class``. Raises ValueError or TypeError.
    """
    return look_up("model", name, MODELS, Model)
