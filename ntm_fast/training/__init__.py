"""Training a machine on a task: :func:`train` fills a run folder; the rest reads one."""

from .checkpoint import CheckpointError, RunError
from .loop import (
    DivergedError,
    Interrupted,
    MissingExtra,
    TrainConfig,
    draw,
    evaluate,
    load_run,
    mean_error,
    train,
)
from .metrics import answer_loss, wrong_bits

__all__ = [
    "CheckpointError",
    "DivergedError",
    "Interrupted",
    "MissingExtra",
    "RunError",
    "TrainConfig",
    "answer_loss",
    "draw",
    "evaluate",
    "load_run",
    "mean_error",
    "train",
    "wrong_bits",
]
