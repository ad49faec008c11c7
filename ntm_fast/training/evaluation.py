"""How well a model does on fresh sequences."""

from __future__ import annotations

import math
from typing import Iterable

import torch
from torch import nn

from ..tasks import Case, Task, axis_values
from .config import EVALUATION, stream_generator

VALIDATION_BATCH = 25  # sequences that share what a batch draws once: copy meets 40 lengths in a whole validation
EVALUATION_SEQUENCES = 200  # of each case
EVALUATION_BATCH = 100


@torch.no_grad()
def mean_error(
    model: nn.Module,
    task: Task,
    generator: torch.Generator,
    sequences: int,
    *,
    batch_size: int = VALIDATION_BATCH,
    give_up_at: float = math.inf,
    **case: int,
) -> float:
    """The mean error over ``sequences`` fresh ones, in the task's unit.

    ``case`` fixes axes of the task (copy: ``length=10``); the others are drawn as for training. Stops early, with the
    mean over the sequences seen, once the mean over all must come out at ``give_up_at`` or more.
    """
    weight = next(model.parameters())
    training = model.training
    model.eval()
    try:
        error, seen = 0.0, 0
        while seen < sequences and error < give_up_at * sequences:
            size = min(batch_size, sequences - seen)
            batch = task.batch(size, generator, **case).to(weight.device, weight.dtype)
            outputs, _ = batch.through(model)
            error += float(task.errors(outputs, batch))
            seen += size
    finally:
        model.train(training)
    return error / seen


def evaluate(
    model: nn.Module,
    task: Task,
    cases: Iterable[Case] | None = None,
    *,
    sequences: int = EVALUATION_SEQUENCES,
    seed: int = 0,
) -> dict[Case, float]:
    """The mean error in each case, by default the task's own, over ``sequences`` fresh ones each.

    A case has a value for each of ``task.axes``, and is that value where there is one axis: ``(10, 20)`` are two
    lengths of copy. The sequences of a case depend on ``seed`` alone, so that models can be compared.
    """
    return {
        case: mean_error(
            model,
            task,
            stream_generator(seed, EVALUATION),
            sequences,
            batch_size=EVALUATION_BATCH,
            **axis_values(task, case),
        )
        for case in (task.cases if cases is None else cases)
    }


def errors_key(task: Task) -> str:
    """Under what JSON has the errors by case: for copy ``"error_at_length"``."""
    return "_".join(["error_at", *task.axes])


def by_name(task: Task, errors: dict[Case, float]) -> dict[str, float]:
    """Errors by case as JSON has them: the name of a case is its values, joined by commas."""
    return {",".join(map(str, axis_values(task, case).values())): error for case, error in errors.items()}
