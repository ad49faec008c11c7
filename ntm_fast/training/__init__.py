"""Training a model on a task: :func:`train` fills a run folder; the rest reads one."""

from ..tasks import answer_loss, wrong_bits
from .checkpoint import CheckpointError, RunError
from .config import TrainConfig
from .evaluation import evaluate, mean_error
from .loop import Interrupted, train
from .models import MODELS, NTM, Model, find_model
from .run import DivergedError, MissingExtra, draw, load_run

__all__ = [
    "MODELS",
    "NTM",
    "CheckpointError",
    "DivergedError",
    "Interrupted",
    "MissingExtra",
    "Model",
    "RunError",
    "TrainConfig",
    "answer_loss",
    "draw",
    "evaluate",
    "find_model",
    "load_run",
    "mean_error",
    "train",
    "wrong_bits",
]
