"""The command line: ``ntm-fast train|eval|plot|info``. A thin shell over :mod:`ntm_fast.training`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import sys
from pathlib import Path
from typing import Any, Callable, NoReturn, Sequence

import torch

from . import __version__, capabilities, explain
from .spec import option_type
from .tasks import TASKS, Case, Task, axis_values, find_task
from .training import (
    MODELS,
    DivergedError,
    Interrupted,
    MissingExtra,
    RunError,
    TrainConfig,
    draw,
    evaluate,
    load_run,
    train,
)
from .training.config import make_model_options, make_task, option_groups
from .training.evaluation import by_name, errors_key
from .training.run import CONFIG, load_config

SOLVED, DIVERGED, BAD_USAGE, NOT_SOLVED, INTERRUPTED = 0, 1, 2, 3, 130
_STATUS = "Train until solved. Exit status: 0 solved, 3 not solved, 1 a NaN was met, 2 bad input, 130 interrupted."


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _words(option: dataclasses.Field[Any]) -> dict[str, Any]:
    """How argparse reads an option and explains it."""
    kind, choices = option_type(option), option.metadata.get("choices")
    default = {"True": "yes", "False": "no", "None": "none"}.get(str(option.default), option.default)
    words: dict[str, Any] = {"help": f"{option.metadata.get('help', '')} [{default}]".strip().replace("%", "%%")}
    if kind is bool:
        return {**words, "action": argparse.BooleanOptionalAction}
    if option.default is None or "optional" in option.metadata:
        return {**words, "type": _or_none(kind), "metavar": f"{kind.__name__.upper()}|none"}
    return {**words, "type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}


def _or_none(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = f"{kind.__name__} or none"  # in argparse's errors
    return read


def _add_options(parser: argparse._ArgumentGroup, options: Sequence[dataclasses.Field[Any]]) -> None:
    """An option for each dataclass field; those that are not given stay out of the result."""
    for option in options:
        parser.add_argument(_flag(option.name), **_words(option), default=argparse.SUPPRESS)


def _parser(argv: Sequence[str]) -> _Parser:
    """The parser for ``argv``: which options there are depends on the task, the model or the run that it names.

    Raises RunError where these cannot be found.
    """
    parser = _Parser(prog="ntm-fast", description="Neural Turing Machines for PyTorch.")
    parser.add_argument("--version", action="version", version=f"ntm_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = argv[0] if argv else None
    training = commands.add_parser("train", help="train a model on a task until it is solved", description=_STATUS)
    _add_tasks(training, argv[1:] if command == "train" else ())
    task = _task_of_run(argv[1:]) if command in ("eval", "plot") else None

    of_the_task = "With RUN, --help also shows the options of the run's task."
    evaluation = commands.add_parser("eval", help="measure a trained model's error", epilog=of_the_task)
    evaluation.add_argument("run", metavar="RUN", type=Path, help="run folder")
    evaluation.add_argument("--sequences", metavar="N", type=int, default=200, help="sequences of each case [200]")
    evaluation.add_argument("--device", help="[the run's]")
    evaluation.add_argument("--engine", help="of an NTM [the run's]")
    evaluation.add_argument("--json", action="store_true", help="print JSON")

    plotting = commands.add_parser("plot", help="draw a run's pictures again", epilog=of_the_task)
    plotting.add_argument("run", metavar="RUN", type=Path, help="run folder")
    for axis in task.axes if task is not None else ():
        evaluation.add_argument(_plural(axis), metavar="N", type=int, nargs="+", dest=axis, help="[the task's own]")
        plotting.add_argument(_flag(axis), metavar="N", type=int, help=f"{axis} of the sequence shown [the task's own]")

    commands.add_parser("info", help="say what is installed, and what serves which device")
    return parser


def _add_tasks(training: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """The tasks of ``ntm-fast train``: those of the registry, and the user's own that ``argv`` names."""
    tasks = training.add_subparsers(
        title="tasks", description="or one of your own: module:Class", dest="task", required=True, metavar="TASK"
    )
    model = _named_model(argv)
    for name in {**TASKS, **({argv[0]: None} if argv and ":" in argv[0] else {})}:
        groups = option_groups(name, model)
        first_line = (find_task(name).__doc__ or "").strip().splitlines()[0]
        one = tasks.add_parser(name, help=first_line, description=_STATUS, allow_abbrev=False)
        where = one.add_argument_group("run")
        where.add_argument("--out", metavar="FOLDER", type=Path, help="run folder [runs/TASK-MODEL-seedSEED]")
        where.add_argument("--resume", metavar="FOLDER", type=Path, help="go on with the run in this folder")
        where.add_argument("--quiet", action="store_true", help="no progress bar")
        where.add_argument("--model", default=model, help=f"one of {', '.join(MODELS)}, or module:Class [{model}]")
        for group, options in groups.items():
            _add_options(one.add_argument_group(group), options)


def _named_model(argv: Sequence[str]) -> str:
    """The model that ``argv`` names, or that of the run that it resumes."""
    words = _Parser(prog="ntm-fast train", add_help=False, allow_abbrev=False)
    words.add_argument("--model")
    words.add_argument("--resume", type=Path)
    named, _ = words.parse_known_args(argv)
    if named.model is None and named.resume is not None and (named.resume / CONFIG).is_file():
        return load_config(named.resume).model
    return named.model or "ntm"


def _task_of_run(argv: Sequence[str]) -> Task | None:
    """The task of the run folder among the words of ``argv``; None where there is none."""
    folders = [Path(word) for word in argv if (Path(word) / CONFIG).is_file()]
    return make_task(load_config(folders[0])) if folders else None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plural(axis: str) -> str:
    return _flag(axis) if axis.endswith("s") else f"{_flag(axis)}s"


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    parser = _parser(argv)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        if "run" in arguments:
            load_config(arguments.run)  # where there is no run there is no task whose options would be known
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return vars(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv``, by default the process's own arguments -> exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = _parse(argv)
        return _COMMANDS[arguments.pop("command")](**arguments)
    except SystemExit as exit:  # argparse has said why
        return int(exit.code or 0)
    except (RunError, MissingExtra, argparse.ArgumentError) as error:
        return _complain(BAD_USAGE, error)
    except DivergedError as error:
        return _complain(DIVERGED, error)
    except torch.cuda.OutOfMemoryError as error:
        return _complain(BAD_USAGE, str(error).splitlines()[0])
    except OSError as error:  # a full disk, a folder that vanished
        return _complain(BAD_USAGE, error)
    except KeyboardInterrupt:
        return _complain(INTERRUPTED, "interrupted")


def _complain(status: int, text: object) -> int:
    print(f"ntm-fast: {' '.join(str(text).split())}", file=sys.stderr)
    return status


def _train(task: str, out: Path | None, resume: Path | None, quiet: bool, model: str, **given: Any) -> int:
    if resume is not None and out is not None:
        raise RunError(f"--out {out} and --resume {resume}: a run goes on in its own folder; expected one of the two")
    stored = None if resume is None else _stored(resume, task, model)
    config = _config(task, model, given, stored)
    folder = resume or out or Path("runs", _run_name(config))
    try:
        summary = train(config, folder, resume=resume is not None, quiet=quiet)
    except Interrupted as error:
        return _complain(INTERRUPTED, f"{error}; go on with: ntm-fast train {task} --resume {folder}")
    verdict = "solved" if summary["solved"] else f"not solved within {config.max_sequences:,} sequences"
    print(
        f"{verdict}: {summary['error']:.4g} {summary['unit']} over 1,000 fresh sequences, after training on "
        f"{summary['sequences']:,} in {_duration(summary['seconds'])}"
    )
    made = make_task(config)
    _print_errors(made, summary[errors_key(made)])
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))}")
    return SOLVED if summary["solved"] else NOT_SOLVED


def _stored(folder: Path, task: str, model: str) -> TrainConfig:
    """The configuration of the run to go on with. Raises RunError where it is of another task or model."""
    if not folder.is_dir():
        raise RunError(f"--resume: there is no folder {folder}, expected one that 'ntm-fast train' wrote")
    stored = load_config(folder)
    for name, got, expected in (("task", task, stored.task), ("model", model, stored.model)):
        if got != expected:
            raise RunError(f"{name}: got {got!r}, expected {expected!r} as in {folder / CONFIG}")
    return stored


def _config(task: str, model: str, given: dict[str, Any], stored: TrainConfig | None) -> TrainConfig:
    """The configuration that the options ``given`` make, on top of the stored one of a run that goes on."""
    groups = option_groups(task, model)
    split = {
        group: {one.name: given[one.name] for one in options if one.name in given} for group, options in groups.items()
    }
    if stored is None:
        stored = TrainConfig(task=task, model=model, task_options=split["task"], model_options=split["model"])
    return dataclasses.replace(
        stored,
        task_options={**stored.task_options, **split["task"]},
        model_options={**stored.model_options, **split["model"]},
        **split["training"],
    )


def _run_name(config: TrainConfig) -> str:
    return f"{make_task(config).name}-{make_model_options(config).name}-seed{config.seed}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _print_errors(task: Task, errors: dict[str, float]) -> None:
    """A row for each axis, then the errors, by their names in summary.json."""
    rows = [(axis, [name.split(",")[number] for name in errors]) for number, axis in enumerate(task.axes)]
    rows.append((task.unit, [f"{error:.3g}" for error in errors.values()]))
    width = max(len(label) for label, _ in rows)
    for label, cells in rows:
        print(f"{label:<{width}}" + "".join(f"{cell:>9}" for cell in cells))


def _at_least_1(name: str, values: Sequence[int]) -> None:
    for value in values:
        if value < 1:
            raise RunError(f"{name}: got {value}, expected at least 1")


def _eval(
    run: Path, sequences: int, device: str | None, engine: str | None, json: bool, **given: list[int] | None
) -> int:
    """``given``: the values of the task's axes, of which every combination is a case."""
    _at_least_1("--sequences", [sequences])
    for axis, values in given.items():
        _at_least_1(_plural(axis), values or ())
    config, model, task = load_run(run, device=device, engine=engine)
    cases: list[Case] | None = None
    if any(given.values()):
        shown = axis_values(task, task.shown)
        cases = list(itertools.product(*(given[axis] or [shown[axis]] for axis in task.axes)))
    errors = by_name(task, evaluate(model, task, cases, sequences=sequences, seed=config.seed))
    if json:
        print(_json({errors_key(task): errors}))
    else:
        _print_errors(task, errors)
    return 0


_json = json.dumps  # an option has the module's name


def _plot(run: Path, **given: int | None) -> int:
    """``given``: the values of the task's axes."""
    case = {axis: value for axis, value in given.items() if value is not None}
    for axis, value in case.items():
        _at_least_1(_flag(axis), [value])
    config, model, task = load_run(run)
    for path in draw(run, config, model, task, **case):
        print(path)
    return 0


def _info() -> int:
    native = capabilities()
    print(f"ntm_fast  {__version__}")
    print(f"torch     {torch.__version__}, {torch.get_num_threads()} CPU threads")
    print(f"python    {platform.python_version()} on {platform.machine()} {platform.system()}")
    for device in ("cpu", "cuda"):
        name, reason = native[device], native[f"{device}_reason"]
        label = {"cpu": "variant", "cuda": "architectures"}[device]
        parts = [f"{label} {name}" if name else "", f"not in use: {reason}" if reason else ""]
        print(f"{device:<10}{'; '.join(filter(None, parts))}")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    for index, gpu in enumerate(gpus):
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        print(f"gpu {index:<6}{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}")
    if not gpus:
        print("gpu       none that torch sees")
    for key, value in (native.get("build") or {}).items():
        if value is not None and key not in ("cpu_reason", "cuda_reason"):
            print(f"build     {key}: {', '.join(value) if isinstance(value, list) else value}")
    for device in ["cpu"] + (["cuda"] if gpus else []):
        served = explain(device)
        by_native = [name for name, backend in served.items() if backend == "native"]
        print(f"{device + ' ops':<10}native: {', '.join(by_native) or 'none'}")
        others = [name for name in served if name not in by_native]
        if others and by_native:
            print(f"{'':<10}by the reference: {', '.join(others)}")
    return 0


_COMMANDS: dict[str, Callable[..., int]] = {"train": _train, "eval": _eval, "plot": _plot, "info": _info}
