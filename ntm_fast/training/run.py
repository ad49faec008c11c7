"""A run and its folder: what is saved and restored, claiming a new folder, opening one again, drawing its pictures."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Iterator

import torch
from torch import nn

from ..tasks import Task, axis_values
from .checkpoint import (
    Checkpoint,
    RunError,
    check_same,
    first_difference,
    load_checkpoint,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
    save_checkpoint,
    write_json,
)
from .config import (
    EVALUATION,
    TRAINING,
    VALIDATION,
    TrainConfig,
    changeable,
    fixed,
    make_model,
    make_model_options,
    make_task,
    stream_generator,
)
from .metrics import read_metrics
from .older import upgrade_progress

CONFIG, CHECKPOINT, METRICS, SUMMARY = "config.json", "checkpoint.safetensors", "metrics.csv", "summary.json"
LEARNING_CURVE, MEMORY_PICTURE, ANSWER_PICTURE = "learning_curve.png", "memory.png", "answer.png"


class MissingExtra(ImportError):
    """A package that training needs is not installed; the text says how to install it."""


class DivergedError(RuntimeError):
    """Training met a NaN or an infinity and stopped before using it."""


def require(*packages: str) -> None:
    """Raise MissingExtra naming the packages that cannot be imported."""
    missing = []
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtra(f'{" and ".join(missing)} {verb} not installed: pip install "ntm-fast[train]"')


@dataclass
class Progress:
    """Where a run is: counters, and the sums of the row of metrics.csv under way."""

    updates: int = 0
    sequences: int = 0
    seconds: float = 0.0
    largest_grad_norm: float = 0.0
    solved: bool = False
    validation: float | None = None  # the last one
    row_sequences: int = 0  # where the last row ended
    row_seconds: float = 0.0
    row_updates: int = 0
    row_loss: float = 0.0
    row_error: float = 0.0
    row_grad_norm: float = 0.0


class Run:
    """A model in training, with everything that is saved and restored."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.task = make_task(config)
        self.model = make_model(config, self.task)
        self.parameters = list(self.model.parameters())
        self.optimizer = _make_optimizer(config, self.model)
        self.training = stream_generator(config.seed, TRAINING)
        self.validation = stream_generator(config.seed, VALIDATION)
        self.progress = Progress()

    def save(self) -> None:
        """Write the checkpoint, unless it would hold a NaN: then raise, and leave the last one."""
        optimizer = optimizer_tensors(self.model, self.optimizer)
        for name, tensor in (*self.model.named_parameters(), *optimizer.items()):
            if not tensor.isfinite().all():
                raise DivergedError(
                    f"{name} holds a NaN or an infinity after {self.progress.sequences:,} sequences; "
                    f"{self.folder / CHECKPOINT} still holds the last good state"
                )
        save_checkpoint(
            self.folder / CHECKPOINT,
            Checkpoint(
                model=self.model.state_dict(),
                optimizer=optimizer,
                generators={"training": self.training.get_state(), "validation": self.validation.get_state()},
                config=asdict(self.config),
                progress=asdict(self.progress),
            ),
        )

    def load(self) -> None:
        """Go back to the checkpoint. Raises RunError, having changed nothing, where it is not of this run."""
        path = self.folder / CHECKPOINT
        checkpoint = _load_checkpoint(path, self.config)
        progress = upgrade_progress(checkpoint.progress)
        check_same(path, dict.fromkeys(progress), dict.fromkeys(asdict(self.progress)), "counter ")
        check_same(path, dict.fromkeys(checkpoint.generators), dict.fromkeys(("training", "validation")), "generator ")
        restore_model(path, checkpoint, self.model)
        restore_optimizer(path, checkpoint, self.model, self.optimizer)
        self.training.set_state(checkpoint.generators["training"])
        self.validation.set_state(checkpoint.generators["validation"])
        self.progress = Progress(**progress)


def _make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        try:
            return torch.optim.Adam(model.parameters(), config.learning_rate, fused=True)
        except RuntimeError:  # not on this device, or not in this torch
            return torch.optim.Adam(model.parameters(), config.learning_rate, foreach=True)
    return torch.optim.RMSprop(
        model.parameters(), config.learning_rate, alpha=0.95, momentum=config.momentum, foreach=True
    )


def _load_checkpoint(path: Path, config: TrainConfig) -> Checkpoint:
    """The checkpoint of a run. Raises RunError where it cannot be read, or is of a run with another configuration."""
    checkpoint = load_checkpoint(path)
    check_same(path, fixed(TrainConfig.from_dict(path, checkpoint.config)), fixed(config))
    return checkpoint


def claim(run: Run) -> None:
    """Make the folder of a new run. Raises RunError where there is a run already, or nothing can be written."""
    folder = run.folder
    taken = [name for name in (CONFIG, CHECKPOINT, METRICS, SUMMARY) if (folder / name).exists()]
    if taken:
        raise RunError(
            f"{folder}: already holds a run ({', '.join(taken)}): go on with it by --resume, or choose another folder "
            f"by --out"
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, asdict(run.config))
        run.save()


def reopen(run: Run) -> None:
    """Restore a run from its folder. Raises RunError, having changed nothing there, where it is not the same run."""
    path = run.folder / CONFIG
    difference = first_difference(fixed(run.config), fixed(TrainConfig.from_json(path)))
    if difference is not None:
        name, got, expected = difference
        raise RunError(
            f"{name}: got {got}, expected {expected} as in {path}; when a run goes on only "
            f"{', '.join(changeable(run.config))} may change"
        )
    run.load()
    with writing(run.folder):
        write_json(path, asdict(run.config))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises RunError in the place of an OSError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder}: cannot be written to: {error.strerror or error}") from error


def load_config(folder: Path) -> TrainConfig:
    """The configuration of a run folder. Raises RunError."""
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder, expected one that 'ntm-fast train' wrote")
    return TrainConfig.from_json(folder / CONFIG)


def load_run(
    folder: str | Path, *, device: str | None = None, engine: str | None = None
) -> tuple[TrainConfig, nn.Module, Task]:
    """The configuration, the model and the task of a run folder, on another device or, for an NTM, with another engine
    where these are given. Raises RunError."""
    require("safetensors")
    folder = Path(folder)
    config = load_config(folder)
    model_options = {**config.model_options, **({} if engine is None else {"engine": engine})}
    config = replace(config, device=device or config.device, model_options=model_options)
    task = make_task(config)
    model = make_model(config, task)
    restore_model(folder / CHECKPOINT, _load_checkpoint(folder / CHECKPOINT, config), model)
    return config, model, task


def draw(folder: str | Path, config: TrainConfig, model: nn.Module, task: Task, **case: int) -> list[Path]:
    """Draw a run's learning curve, and its model at work on one sequence -> the paths of the pictures.

    ``case`` fixes axes of the task (copy: ``length=10``); the others are those of ``task.shown``. Of an NTM the picture
    shows the memory too. Raises RunError.
    """
    require("matplotlib")
    from ..modules import FastNTM
    from .plots import answer_picture, learning_curve, memory_picture

    folder = Path(folder)
    try:
        rows = read_metrics(folder / METRICS)
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error
    title = f"{task.name.capitalize()}, {make_model_options(config).title}"
    batch = task.batch(1, stream_generator(config.seed, EVALUATION), **{**axis_values(task, task.shown), **case})
    with writing(folder):
        curve = learning_curve(folder / LEARNING_CURVE, rows, title, unit=task.unit, solved=task.solved_below)
        if isinstance(model, FastNTM):
            return [curve, memory_picture(folder / MEMORY_PICTURE, model, task, batch, title)]
        return [curve, answer_picture(folder / ANSWER_PICTURE, model, task, batch, title)]
