"""The command line: ``ntm-fast train|eval|plot|info``. A thin shell over :mod:`ntm_fast.training`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any, Sequence

import torch

from . import __version__, capabilities, explain
from .tasks import TASKS
from .training import DivergedError, Interrupted, MissingExtra, RunError, TrainConfig, draw, evaluate, load_run, train

SOLVED, DIVERGED, BAD_USAGE, NOT_SOLVED, INTERRUPTED = 0, 1, 2, 3, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:
        self.exit(BAD_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _options(parser: argparse.ArgumentParser, options: Sequence[dataclasses.Field]) -> None:
    """An option for each dataclass field; those that are not given stay out of the result."""
    for option in options:
        kind = int if option.default is None else type(option.default)
        shown = "" if option.default is None else f" [{option.default}]"
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=kind,
            choices=option.metadata.get("choices"),
            metavar=None if "choices" in option.metadata else kind.__name__.upper(),
            help=option.metadata["help"] + shown,
            default=argparse.SUPPRESS,
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ntm-fast", description="Neural Turing Machines for PyTorch.")
    parser.add_argument("--version", action="version", version=f"ntm_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    training = commands.add_parser(
        "train",
        help="train a machine on a task until it is solved",
        description="Train until solved. Exit status: 0 solved, 3 not solved, 1 a NaN was met, 2 bad input, "
        "130 interrupted.",
    )
    tasks = training.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        one = tasks.add_parser(name, help=task.__doc__.strip().splitlines()[0], description=training.description)
        where = one.add_argument_group("run")
        where.add_argument("--out", metavar="FOLDER", type=Path, help="run folder [runs/TASK-CONTROLLER-seedSEED]")
        where.add_argument("--resume", metavar="FOLDER", type=Path, help="go on with the run in this folder")
        where.add_argument("--quiet", action="store_true", help="no progress bar")
        _options(one.add_argument_group("task"), dataclasses.fields(task))
        _options(one.add_argument_group("training"), TrainConfig.options())

    evaluation = commands.add_parser("eval", help="measure a trained machine's error at given lengths")
    evaluation.add_argument("run", metavar="RUN", type=Path, help="run folder")
    evaluation.add_argument("--lengths", metavar="N", type=int, nargs="+", help="lengths [the task's own]")
    evaluation.add_argument("--sequences", metavar="N", type=int, default=200, help="sequences of each length [200]")
    evaluation.add_argument("--device", help="[the run's]")
    evaluation.add_argument("--engine", help="[the run's]")
    evaluation.add_argument("--json", action="store_true", help="print JSON")

    plotting = commands.add_parser("plot", help="draw a run's pictures again")
    plotting.add_argument("run", metavar="RUN", type=Path, help="run folder")
    plotting.add_argument("--length", metavar="N", type=int, help="length of the sequence shown [longest trained on]")

    commands.add_parser("info", help="say what is installed, and what serves which device")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv``, by default the process's own arguments -> exit status."""
    try:
        arguments = vars(_parser().parse_args(argv))
    except SystemExit as exit:  # argparse has said why
        return exit.code or 0
    try:
        return _COMMANDS[arguments.pop("command")](**arguments)
    except (RunError, MissingExtra) as error:
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


def _train(task: str, out: Path | None, resume: Path | None, quiet: bool, **given: Any) -> int:
    task_options = {o.name: given.pop(o.name) for o in dataclasses.fields(TASKS[task]) if o.name in given}
    if resume is not None and out is not None:
        raise RunError(f"--out {out} and --resume {resume}: a run goes on in its own folder; expected one of the two")
    if resume is None:
        config = TrainConfig(task=task, task_options=task_options, **given)
        folder = out or Path("runs", f"{task}-{config.controller}-seed{config.seed}")
    else:
        folder = resume
        if not folder.is_dir():
            raise RunError(f"--resume: there is no folder {folder}, expected one that 'ntm-fast train' wrote")
        stored = TrainConfig.from_json(folder / "config.json")
        config = dataclasses.replace(
            stored, task=task, task_options={**stored.task_options, **task_options}, **given
        )
    try:
        summary = train(config, folder, resume=resume is not None, quiet=quiet)
    except Interrupted as error:
        return _complain(INTERRUPTED, f"{error}; go on with: ntm-fast train {task} --resume {folder}")
    verdict = "solved" if summary["solved"] else f"not solved within {config.max_sequences:,} sequences"
    print(
        f"{verdict}: {summary['bits_per_sequence']:.4g} bits a sequence over 1,000 fresh sequences, after training on "
        f"{summary['sequences']:,} in {_duration(summary['seconds'])}"
    )
    _print_errors(summary["error_at_length"])
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))}")
    return SOLVED if summary["solved"] else NOT_SOLVED


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _print_errors(errors: dict[Any, float]) -> None:
    print("length         " + "".join(f"{length:>9}" for length in errors))
    print("bits a sequence" + "".join(f"{error:>9.3g}" for error in errors.values()))


def _eval(
    run: Path, lengths: list[int] | None, sequences: int, device: str | None, engine: str | None, json: bool
) -> int:
    for name, values in (("--lengths", lengths or ()), ("--sequences", (sequences,))):
        for value in values:
            if value < 1:
                raise RunError(f"{name}: got {value}, expected at least 1")
    config, model, task = load_run(run, device=device, engine=engine)
    errors = evaluate(model, task, tuple(lengths) if lengths else None, sequences=sequences, seed=config.seed)
    if json:
        print(_json({"error_at_length": {str(length): error for length, error in errors.items()}}))
    else:
        _print_errors(errors)
    return 0


_json = json.dumps  # an option has the module's name


def _plot(run: Path, length: int | None) -> int:
    if length is not None and length < 1:
        raise RunError(f"--length: got {length}, expected at least 1")
    for path in draw(run, *load_run(run), length=length):
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


_COMMANDS = {"train": _train, "eval": _eval, "plot": _plot, "info": _info}
