"""Training a machine on a task until it is solved: configuration, updates, validation, and the run folder."""

from __future__ import annotations

import math
import platform
import signal
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import Field, asdict, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Iterator

import torch

from .. import __version__, capabilities
from ..controllers import CONTROLLERS
from ..modules import ENGINES, MEMORY_INITS, FastNTM
from ..tasks import TASKS, Task
from .checkpoint import (
    Checkpoint,
    RunError,
    check_same,
    first_difference,
    load_checkpoint,
    optimizer_tensors,
    read_json,
    restore_model,
    restore_optimizer,
    save_checkpoint,
    write_json,
)
from .metrics import MetricsFile, Row, answer_loss, read_metrics, wrong_bits

SOLVED = 0.01  # bits a sequence, over VALIDATION_SEQUENCES fresh ones
VALIDATION_SEQUENCES = 1000
VALIDATE_BELOW = 1.0  # bits a sequence while training, above which validating would only confirm what is known
VALIDATION_BATCH = 25  # sequences of one length: 40 lengths in a whole validation
EVALUATION_SEQUENCES = 200  # for each length
SAVE_SECONDS = 30.0

CONFIG, CHECKPOINT, METRICS, SUMMARY = "config.json", "checkpoint.safetensors", "metrics.csv", "summary.json"
LEARNING_CURVE, MEMORY_PICTURE = "learning_curve.png", "memory.png"


class MissingExtra(ImportError):
    """A package that training needs is not installed; the text says how to install it."""


class DivergedError(RuntimeError):
    """Training met a NaN or an infinity and stopped before using it."""


class Interrupted(Exception):
    """A signal stopped the run, which has been saved and can go on."""


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes. Raises RunError naming the field that is wrong."""

    task: str = field(default="copy")
    task_options: dict[str, Any] = field(default_factory=dict)  # the fields of the task's class
    controller: str = _option("lstm", "controller", choices=tuple(CONTROLLERS))
    hidden_size: int = _option(100, "units of each controller layer", least=1)
    num_layers: int = _option(1, "controller layers", least=1)
    memory_locations: int = _option(128, "memory locations N", least=1)
    memory_width: int = _option(20, "memory width M", least=1)
    read_heads: int = _option(1, "read heads", least=1)
    write_heads: int = _option(1, "write heads", least=1)
    shift_range: int = _option(1, "locations that a head can move a step", least=0)
    memory_init: str = _option("constant", "initial memory", choices=MEMORY_INITS)
    optimizer: str = _option("rmsprop", "optimizer", choices=("rmsprop", "adam"))
    learning_rate: float = _option(3e-4, "learning rate", above=0)
    momentum: float = _option(0.9, "momentum of rmsprop", least=0)
    clip_grad: float = _option(10.0, "largest gradient; 0 switches clipping off", least=0)
    clip_grad_by: str = _option("norm", "clip the norm of all gradients, or each value", choices=("norm", "value"))
    batch_size: int = _option(8, "sequences of an update", least=1)
    max_sequences: int = _option(200_000, "stop, solved or not, after so many training sequences", least=1)
    validate_every: int = _option(500, "training sequences between two rows of metrics.csv", least=1)
    seed: int = _option(0, "decides every random draw", least=0)
    engine: str = _option("auto", "engine of FastNTM", choices=ENGINES)
    device: str = _option("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = _option("float32", "dtype", choices=("float32", "float64"))
    threads: int | None = _option(None, "CPU threads; by default as many as torch takes", least=1)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise RunError(f"task: got {self.task!r}, expected {_one_of(TASKS)}")
        if not isinstance(self.task_options, dict):
            raise RunError(f"task_options: got {self.task_options!r}, expected a dict")
        object.__setattr__(self, "task_options", asdict(make_task(self)))  # with the defaults: a run's are all written
        for option in self.options():
            _check_option(option, getattr(self, option.name))
        if self.seed >= 2**60:
            raise RunError(f"seed: got {self.seed}, expected less than 2**60")

    @classmethod
    def options(cls) -> tuple[Field, ...]:
        """The fields that are options of every task, with their help."""
        return tuple(option for option in fields(cls) if "help" in option.metadata)

    @classmethod
    def from_json(cls, path: Path) -> TrainConfig:
        """Read what :func:`train` wrote to ``config.json``. Raises RunError."""
        found = read_json(path)
        names = [option.name for option in fields(cls)]
        for name in found:
            if name not in names:
                raise RunError(f"{path}: got the unknown field {name!r}, expected {', '.join(names)}")
        try:
            return cls(**found)
        except RunError as error:
            raise RunError(f"{path}: {error}") from error


# What may change when a run goes on: none of these is part of what has been learned.
CHANGEABLE = ("max_sequences", "engine", "device", "threads")


def _one_of(names: Any) -> str:
    return "one of " + ", ".join(map(repr, names))


def _check_option(option: Field, value: Any) -> None:
    name, rule = option.name, option.metadata
    if option.default is None and value is None:
        return
    kind = int if option.default is None else type(option.default)
    if "choices" in rule:
        right, expected = value in rule["choices"], _one_of(rule["choices"])
    else:
        accepted = (int, float) if kind is float else kind
        right = isinstance(value, accepted) and not isinstance(value, bool)
        expected = {int: "an integer", float: "a number", str: "a string"}[kind]
        if "least" in rule:
            right, expected = right and rule["least"] <= value < math.inf, f"{expected} of at least {rule['least']}"
        if "above" in rule:
            right, expected = right and rule["above"] < value < math.inf, f"{expected} above {rule['above']}"
    if not right:
        raise RunError(f"{name}: got {value!r}, expected {expected}")


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


# --- what a configuration stands for ----------------------------------------------------------------------------------


def make_task(config: TrainConfig) -> Task:
    """The task, with its options. Raises RunError."""
    task = TASKS[config.task]
    names = [option.name for option in fields(task)]
    for name in config.task_options:
        if name not in names:
            raise RunError(f"task_options: got {name!r}, expected {_one_of(names)}")
    try:
        return task(**config.task_options)
    except (ValueError, TypeError) as error:
        raise RunError(str(error)) from error


def make_model(config: TrainConfig, task: Task) -> FastNTM:
    """The untrained machine: the same seed gives the same parameters on every device. Raises RunError."""
    device = _device(config.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_stream(config.seed, 0))
        try:
            model = FastNTM(
                task.input_size,
                task.output_size,
                config.hidden_size,
                num_layers=config.num_layers,
                controller=config.controller,
                memory_locations=config.memory_locations,
                memory_width=config.memory_width,
                read_heads=config.read_heads,
                write_heads=config.write_heads,
                shift_range=config.shift_range,
                memory_init=config.memory_init,
                engine=config.engine,
                dtype=getattr(torch, config.dtype),
            )
        except (ValueError, TypeError) as error:
            raise RunError(str(error)) from error
    model = model.to(device)
    probe = task.batch(1, _generator(config.seed, 0)).to(device, model.heads.weight.dtype)
    try:
        with torch.no_grad():
            model(probe.inputs)
    except RuntimeError as error:
        if str(error).startswith("engine="):  # the engine asked for cannot serve
            raise RunError(str(error)) from error
        raise
    return model


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("tensors there hold no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"device: got {name!r}, which torch {torch.__version__} cannot use: {reason}") from error
    return device


def _make_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        try:
            return torch.optim.Adam(model.parameters(), config.learning_rate, fused=True)
        except RuntimeError:  # not on this device, or not in this torch
            return torch.optim.Adam(model.parameters(), config.learning_rate, foreach=True)
    return torch.optim.RMSprop(
        model.parameters(), config.learning_rate, alpha=0.95, momentum=config.momentum, foreach=True
    )


def _stream(seed: int, stream: int) -> int:
    """A seed for one of a run's four independent streams: parameters, training, validation, evaluation."""
    return 4 * seed + stream


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(_stream(seed, stream))


@torch.no_grad()
def mean_error(
    model: FastNTM,
    task: Task,
    generator: torch.Generator,
    sequences: int,
    *,
    length: int | None = None,
    batch_size: int = VALIDATION_BATCH,
    give_up_at: float = math.inf,
) -> float:
    """The mean error in bits a sequence over ``sequences`` fresh ones, of ``length`` or as drawn for training.

    Stops early, with the mean over those seen, once the mean over all must come out at ``give_up_at`` or more.
    """
    weight = model.heads.weight
    wrong = seen = 0
    while seen < sequences and wrong < give_up_at * sequences:
        size = min(batch_size, sequences - seen)
        batch = task.batch(size, generator, length).to(weight.device, weight.dtype)
        outputs, _ = model(batch.inputs)
        wrong += int(wrong_bits(outputs, batch))
        seen += size
    return wrong / seen


def evaluate(
    model: FastNTM,
    task: Task,
    lengths: tuple[int, ...] | None = None,
    *,
    sequences: int = EVALUATION_SEQUENCES,
    seed: int = 0,
) -> dict[int, float]:
    """The error in bits a sequence at each length, by default the task's own, over ``sequences`` fresh ones each.

    The sequences of a length depend on ``seed`` alone, so that machines can be compared.
    """
    return {
        length: mean_error(model, task, _generator(seed, 3), sequences, length=length, batch_size=100)
        for length in lengths or task.evaluation_lengths
    }


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class _Progress:
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
    row_wrong_bits: int = 0
    row_grad_norm: float = 0.0


class _Run:
    """A model in training, with everything that is saved and restored."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.task = make_task(config)
        self.model = make_model(config, self.task)
        self.parameters = list(self.model.parameters())
        self.optimizer = _make_optimizer(config, self.model)
        self.training = _generator(config.seed, 1)
        self.validation = _generator(config.seed, 2)
        self.progress = _Progress()

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
        """Go back to the checkpoint. Raises CheckpointError, having changed nothing, where it is not of this run."""
        path = self.folder / CHECKPOINT
        checkpoint = load_checkpoint(path)
        check_same(path, _fixed(checkpoint.config), _fixed(asdict(self.config)))
        check_same(path, dict.fromkeys(checkpoint.progress), dict.fromkeys(asdict(self.progress)), "counter ")
        check_same(path, dict.fromkeys(checkpoint.generators), dict.fromkeys(("training", "validation")), "generator ")
        restore_model(path, checkpoint, self.model)
        restore_optimizer(path, checkpoint, self.model, self.optimizer)
        self.training.set_state(checkpoint.generators["training"])
        self.validation.set_state(checkpoint.generators["validation"])
        self.progress = _Progress(**checkpoint.progress)

    def update(self) -> None:
        """Train on one batch. Raises DivergedError, having changed nothing, where the loss or a gradient is NaN."""
        config, progress = self.config, self.progress
        before = self.training.get_state()
        batch = self.task.batch(config.batch_size, self.training)
        batch = batch.to(self.parameters[0].device, self.parameters[0].dtype)
        outputs, _ = self.model(batch.inputs)
        loss = answer_loss(outputs, batch)
        self.optimizer.zero_grad()
        loss.backward()
        limit = config.clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit if config.clip_grad_by == "norm" else math.inf)
        if config.clip_grad_by == "value" and config.clip_grad:
            torch.nn.utils.clip_grad_value_(self.parameters, limit)
        wrong = wrong_bits(outputs.detach(), batch)
        # Together, because on a GPU each of these waits for everything before it.
        loss_value, norm_value, wrong_value = torch.stack([loss.detach(), norm, wrong.to(loss.dtype)]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self.training.set_state(before)  # so that a resumed run meets the same batch
            raise DivergedError(
                f"loss {loss_value}, gradient norm {norm_value} after {progress.sequences:,} sequences: stopped "
                f"before this update, the state before it is saved"
            )
        self.optimizer.step()
        progress.updates += 1
        progress.sequences += config.batch_size
        progress.largest_grad_norm = max(progress.largest_grad_norm, norm_value)
        progress.row_updates += 1
        progress.row_loss += loss_value
        progress.row_wrong_bits += int(wrong_value)
        progress.row_grad_norm = max(progress.row_grad_norm, norm_value)

    def row(self) -> Row:
        """What happened since the last row, as a line of metrics.csv."""
        progress = self.progress
        sequences = progress.sequences - progress.row_sequences
        return Row(
            sequences=progress.sequences,
            seconds=progress.seconds,
            loss=progress.row_loss / progress.row_updates,
            bits_per_sequence=progress.row_wrong_bits / sequences,
            grad_norm=progress.row_grad_norm,
            sequences_per_second=sequences / max(progress.seconds - progress.row_seconds, 1e-9),
            validation=None,
        )

    def finish_row(self) -> Row:
        """Validate where it may be solved, and begin the next row."""
        row, progress = self.row(), self.progress
        if row.bits_per_sequence < VALIDATE_BELOW:
            progress.validation = mean_error(
                self.model, self.task, self.validation, VALIDATION_SEQUENCES, give_up_at=SOLVED
            )
            progress.solved = progress.validation < SOLVED
            row = row._replace(validation=progress.validation)
        progress.row_sequences, progress.row_seconds = progress.sequences, progress.seconds
        progress.row_updates = progress.row_wrong_bits = 0
        progress.row_loss = progress.row_grad_norm = 0.0
        return row


def train(config: TrainConfig, folder: str | Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train until solved, or until ``max_sequences``, and fill the run folder -> what summary.json says.

    The folder receives config.json, metrics.csv, checkpoint.safetensors, summary.json, learning_curve.png and
    memory.png. With ``resume`` it holds a run that was stopped, which goes on from its checkpoint exactly as if it had
    not been; of ``config`` only ``max_sequences``, ``engine``, ``device`` and ``threads`` may then differ. Unless
    ``quiet``, a progress bar shows on stderr.

    The first SIGINT or SIGTERM finishes the update under way, saves, and raises Interrupted; the second acts at once.

    Raises:
        RunError: the configuration, the folder or (as CheckpointError) the checkpoint cannot be used. Nothing has
            been changed.
        MissingExtra: tqdm, matplotlib or safetensors is not installed.
        DivergedError: a loss, a gradient or a parameter became NaN or infinite. The last good state has been saved.
    """
    require("tqdm", "matplotlib", "safetensors")
    with _torch_threads(config.threads):
        run = _Run(config, Path(folder))
        if resume:
            _reopen(run)
        else:
            _claim(run)
        _train(run, quiet)
        return _conclude(run)


def _claim(run: _Run) -> None:
    """Make the folder of a new run. Raises RunError where there is a run already, or nothing can be written."""
    folder = run.folder
    taken = [name for name in (CONFIG, CHECKPOINT, METRICS, SUMMARY) if (folder / name).exists()]
    if taken:
        raise RunError(
            f"{folder}: already holds a run ({', '.join(taken)}): go on with it by --resume, or choose another folder "
            f"by --out"
        )
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, asdict(run.config))
        run.save()


def _reopen(run: _Run) -> None:
    """Restore a run from its folder. Raises RunError, having changed nothing there, where it is not the same run."""
    path = run.folder / CONFIG
    difference = first_difference(_fixed(asdict(run.config)), _fixed(asdict(TrainConfig.from_json(path))))
    if difference is not None:
        name, got, expected = difference
        raise RunError(
            f"{name}: got {got}, expected {expected} as in {path}; when a run goes on only {', '.join(CHANGEABLE)} "
            f"may change"
        )
    run.load()
    with _writing(run.folder):
        write_json(path, asdict(run.config))


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration may not change when a run goes on."""
    flat = {**config, **config.get("task_options", {})}
    return {name: value for name, value in flat.items() if name not in (*CHANGEABLE, "task_options")}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder}: cannot be written to: {error.strerror or error}") from error


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


def _train(run: _Run, quiet: bool) -> None:
    """The loop over updates; leaves when the run is solved or long enough, its checkpoint saved."""
    from tqdm import tqdm

    config, progress = run.config, run.progress
    table = MetricsFile(run.folder / METRICS, keep=progress.row_sequences)
    bar = tqdm(
        desc=f"{config.task} {config.controller}",
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
                run.update()
            except DivergedError:
                run.save()
                raise
            progress.seconds = trained_before + time.monotonic() - started
            if progress.sequences - progress.row_sequences >= config.validate_every:
                row = run.finish_row()
                progress.seconds = trained_before + time.monotonic() - started
                metrics.append(row)
                bar.set_postfix_str(_describe(row), refresh=False)
            bar.update(min(config.batch_size, config.max_sequences - bar.n))  # tqdm drops a total that is exceeded
            if caught:
                run.save()
                raise Interrupted(f"stopped and saved after {progress.sequences:,} sequences")
            if time.monotonic() - saved > SAVE_SECONDS:
                run.save()
                saved = time.monotonic()
        run.save()
        if progress.row_updates:  # not in the checkpoint: a run that goes on from here completes this row instead
            metrics.append(run.row())


def _describe(row: Row) -> str:
    return f"loss {row.loss:.4f}, {row.bits_per_sequence:.3g} bits/seq, {row.sequences_per_second:,.0f} seq/s"


def _conclude(run: _Run) -> dict[str, Any]:
    """Evaluate, write summary.json and the pictures."""
    config, progress = run.config, run.progress
    solved, error = progress.solved, progress.validation
    if not solved:  # the last validation may be long ago or have been given up early
        error = mean_error(run.model, run.task, _generator(config.seed, 3), VALIDATION_SEQUENCES)
        solved = error < SOLVED
    errors = evaluate(run.model, run.task, sequences=EVALUATION_SEQUENCES, seed=config.seed)
    native = capabilities()
    summary = {
        "solved": solved,
        "sequences": progress.sequences,
        "updates": progress.updates,
        "seconds": round(progress.seconds, 3),
        "bits_per_sequence": error,
        "error_at_length": {str(length): value for length, value in errors.items()},
        "largest_grad_norm": progress.largest_grad_norm,
        "task": config.task,
        "controller": config.controller,
        "parameters": sum(parameter.numel() for parameter in run.parameters),
        "seed": config.seed,
        "engine": config.engine,
        "device": config.device,
        "threads": torch.get_num_threads(),
        "native": {"cpu": native["cpu"], "cuda": native["cuda"]},
        "versions": {"ntm_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_json(run.folder / SUMMARY, summary)
    draw(run.folder, run.config, run.model, run.task)
    return summary


def load_run(
    folder: str | Path, *, device: str | None = None, engine: str | None = None
) -> tuple[TrainConfig, FastNTM, Task]:
    """The configuration, the machine and the task of a run folder. Raises RunError."""
    require("safetensors")
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder, expected one that 'ntm-fast train' wrote")
    config = TrainConfig.from_json(folder / CONFIG)
    config = replace(config, device=device or config.device, engine=engine or config.engine)
    task = make_task(config)
    model = make_model(config, task)
    checkpoint = load_checkpoint(folder / CHECKPOINT)
    check_same(folder / CHECKPOINT, _fixed(checkpoint.config), _fixed(asdict(config)))
    restore_model(folder / CHECKPOINT, checkpoint, model)
    return config, model, task


def draw(
    folder: str | Path, config: TrainConfig, model: FastNTM, task: Task, *, length: int | None = None
) -> list[Path]:
    """Draw a run's learning curve and its machine at work on one sequence of ``length``, by default the longest that
    it was trained on -> the paths of the pictures. Raises RunError."""
    require("matplotlib")
    from .plots import learning_curve, memory_picture

    folder = Path(folder)
    try:
        rows = read_metrics(folder / METRICS)
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error
    name = {"feedforward": "feed-forward"}.get(config.controller, config.controller.upper())
    title = f"{config.task.capitalize()}, {name} controller"
    batch = task.batch(1, _generator(config.seed, 3), length or task.max_length)
    with _writing(folder):
        return [
            learning_curve(folder / LEARNING_CURVE, rows, title, solved=SOLVED),
            memory_picture(folder / MEMORY_PICTURE, model, batch, title),
        ]
