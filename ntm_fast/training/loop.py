"""The training loop: updates, validation, signals, the progress bar, and what is written at the end."""

from __future__ import annotations

import math
import platform
import signal
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch

from .. import __version__, capabilities
from .checkpoint import write_json
from .config import EVALUATION, TrainConfig, make_model_options, stream_generator
from .evaluation import EVALUATION_SEQUENCES, by_name, errors_key, evaluate, mean_error
from .metrics import MetricsFile, Row
from .run import METRICS, SUMMARY, DivergedError, Run, claim, draw, reopen, require

VALIDATION_SEQUENCES = 1000
SAVE_SECONDS = 30.0


class Interrupted(Exception):
    """A signal stopped the run, which has been saved and can go on."""


def train(config: TrainConfig, folder: str | Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train until solved, or until ``max_sequences``, and fill the run folder -> what summary.json says.

    The folder receives config.json, metrics.csv, checkpoint.safetensors, summary.json, learning_curve.png and
    memory.png (of a model that is no :class:`FastNTM`: answer.png). With ``resume`` it holds a run that was stopped,
    which goes on from its checkpoint exactly as if it had not been; of ``config`` only ``max_sequences``, ``device``,
    ``threads`` and, of the model's options, ``engine`` may then differ. Unless ``quiet``, a progress bar shows on
    stderr.

    The first SIGINT or SIGTERM finishes the update under way, saves, and raises Interrupted; the second acts at once.

    Raises:
        RunError: the configuration, the folder or (as CheckpointError) the checkpoint cannot be used. Nothing has
            been changed.
        MissingExtra: tqdm, matplotlib or safetensors is not installed.
        DivergedError: a loss, a gradient or a parameter became NaN or infinite. The last good state has been saved.
    """
    require("tqdm", "matplotlib", "safetensors")
    with _torch_threads(config.threads):
        run = Run(config, Path(folder))
        if resume:
            reopen(run)
        else:
            claim(run)
        _train(run, quiet)
        return _conclude(run)


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM instead of letting it act; the second acts as it did before."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield caught
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, frame: Any) -> None:
        caught.append(number)
        restore()

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def _train(run: Run, quiet: bool) -> None:
    """The loop over updates; leaves when the run is solved or long enough, its checkpoint saved."""
    from tqdm import tqdm

    config, progress = run.config, run.progress
    table = MetricsFile(run.folder / METRICS, keep=progress.row_sequences)
    bar = tqdm(
        desc=f"{run.task.name} {make_model_options(config).name}",
        total=config.max_sequences,
        initial=min(progress.sequences, config.max_sequences),
        disable=quiet,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        bar_format="{desc} |{bar:10}| {n:,.0f}/{total:,.0f} {elapsed}{postfix}",
    )
    with bar, closing(table) as metrics, _caught_signals() as caught:
        started = saved = time.monotonic()
        trained_before = progress.seconds
        while not progress.solved and progress.sequences < config.max_sequences:
            try:
                update(run)
            except DivergedError:
                run.save()
                raise
            progress.seconds = trained_before + time.monotonic() - started
            if progress.sequences - progress.row_sequences >= config.validate_every:
                row = _finish_row(run)
                progress.seconds = trained_before + time.monotonic() - started
                metrics.append(row)
                bar.set_postfix_str(_describe(row, run.task.unit), refresh=False)
            bar.update(min(config.batch_size, config.max_sequences - bar.n))  # tqdm drops a total that is exceeded
            if caught:
                run.save()
                raise Interrupted(f"stopped and saved after {progress.sequences:,} sequences")
            if time.monotonic() - saved > SAVE_SECONDS:
                run.save()
                saved = time.monotonic()
        run.save()
        if progress.row_updates:  # not in the checkpoint: a run that goes on from here completes this row instead
            metrics.append(_row(run))


def _describe(row: Row, unit: str) -> str:
    return f"loss {row.loss:.4f}, {row.error:.3g} {unit}, {row.sequences_per_second:,.0f} seq/s"


def update(run: Run) -> None:
    """Train on one batch. Raises DivergedError, having changed nothing, where the loss or a gradient is NaN."""
    config, progress = run.config, run.progress
    before = run.training.get_state()
    batch = run.task.batch(config.batch_size, run.training).to(run.parameters[0].device, run.parameters[0].dtype)
    outputs, _ = batch.through(run.model)
    loss = run.task.loss(outputs, batch)
    run.optimizer.zero_grad()
    loss.backward()
    limit = config.clip_grad or math.inf
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, limit if config.clip_grad_by == "norm" else math.inf)
    if config.clip_grad_by == "value" and config.clip_grad:
        torch.nn.utils.clip_grad_value_(run.parameters, limit)
    error = run.task.errors(outputs.detach(), batch)
    # Together, because on a GPU each of these waits for everything before it.
    loss_value, norm_value, error_value = torch.stack([loss.detach(), norm, error.to(loss.dtype)]).tolist()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        run.training.set_state(before)  # so that a resumed run meets the same batch
        raise DivergedError(
            f"loss {loss_value}, gradient norm {norm_value} after {progress.sequences:,} sequences: stopped "
            f"before this update, the state before it is saved"
        )
    run.optimizer.step()
    progress.updates += 1
    progress.sequences += config.batch_size
    progress.largest_grad_norm = max(progress.largest_grad_norm, norm_value)
    progress.row_updates += 1
    progress.row_loss += loss_value
    progress.row_error += error_value
    progress.row_grad_norm = max(progress.row_grad_norm, norm_value)


def _row(run: Run) -> Row:
    """What happened since the last row, as a line of metrics.csv."""
    progress = run.progress
    sequences = progress.sequences - progress.row_sequences
    return Row(
        sequences=progress.sequences,
        seconds=progress.seconds,
        loss=progress.row_loss / progress.row_updates,
        error=progress.row_error / sequences,
        grad_norm=progress.row_grad_norm,
        sequences_per_second=sequences / max(progress.seconds - progress.row_seconds, 1e-9),
        validation=None,
    )


def _finish_row(run: Run) -> Row:
    """Validate where the task may be solved, and begin the next row."""
    row, progress, task = _row(run), run.progress, run.task
    if row.error < task.validate_below:
        progress.validation = mean_error(
            run.model, task, run.validation, VALIDATION_SEQUENCES, give_up_at=task.solved_below
        )
        progress.solved = progress.validation < task.solved_below
        row = row._replace(validation=progress.validation)
    progress.row_sequences, progress.row_seconds = progress.sequences, progress.seconds
    progress.row_updates = 0
    progress.row_loss = progress.row_error = progress.row_grad_norm = 0.0
    return row


def _conclude(run: Run) -> dict[str, Any]:
    """Evaluate, write summary.json and the pictures."""
    config, progress, task = run.config, run.progress, run.task
    solved, error = progress.solved, progress.validation
    if not solved:  # the last validation may be long ago or have been given up early
        error = mean_error(run.model, task, stream_generator(config.seed, EVALUATION), VALIDATION_SEQUENCES)
        solved = error < task.solved_below
    errors = evaluate(run.model, task, sequences=EVALUATION_SEQUENCES, seed=config.seed)
    native = capabilities()
    summary = {
        "solved": solved,
        "sequences": progress.sequences,
        "updates": progress.updates,
        "seconds": round(progress.seconds, 3),
        "error": error,
        "unit": task.unit,
        errors_key(task): by_name(task, errors),
        "largest_grad_norm": progress.largest_grad_norm,
        "task": config.task,
        "model": config.model,
        "parameters": sum(parameter.numel() for parameter in run.parameters),
        "seed": config.seed,
        "device": config.device,
        "threads": torch.get_num_threads(),
        "native": {"cpu": native["cpu"], "cuda": native["cuda"]},
        "versions": {"ntm_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    options = {**config.task_options, **config.model_options}
    summary.update({name: value for name, value in options.items() if name not in summary})
    write_json(run.folder / SUMMARY, summary)
    draw(run.folder, config, run.model, task)
    return summary
