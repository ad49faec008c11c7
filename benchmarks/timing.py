"""Timing by turns, what was measured where, and the options that the scripts share."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

import torch

import ntm_fast

ROOT = Path(__file__).resolve().parent.parent

# Of every picture; the colours are those of a run's pictures.
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": "0.35",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "0.25",
    "ytick.color": "0.25",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 160,
}
BLUE, LIGHT_BLUE, ORANGE, LIGHT_ORANGE, DARK = "#2c5f8a", "#86aed0", "#c8552b", "#e0a184", "0.2"


def count(text: str) -> int:
    """The type of an option that is a positive number of something."""
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number of seconds")
    return value


def take_turns(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds per call of each function, in rounds; a turn is about as long for each of them.

    In turns, so that a change in the machine's mood reaches all of them.
    """
    calls = {}
    for name, function in functions.items():
        for _ in range(3):  # warm-up: allocations, compilation
            function()
        start = time.perf_counter()
        function()
        calls[name] = max(1, round(0.1 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append(1e3 * (time.perf_counter() - start) / calls[name])
    return times


def summary(times: list[float]) -> dict[str, float]:
    """What is kept of a function's repeats."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    kept = {"median": median, "quartile_1": low, "quartile_3": high, "min": min(times)}
    return {**{name: float(f"{value:.4g}") for name, value in kept.items()}, "repeats": len(times)}


def circumstances() -> dict[str, Any]:
    found = ntm_fast.capabilities()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "ntm_fast": ntm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": (found["build"] or {}).get("cxx"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": found["cpu"],
    }


def where(report: dict[str, Any]) -> str:
    """One line for below a table."""
    return (
        f"{report['cpu']}, threads: {report['threads']}, {report['kernels']} kernels, torch {report['torch']}, "
        f"float32, {report['date'][:10]}, commit {report['commit']}."
    )


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit measured, with a + when what is measured differs from it; None outside of a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "ntm_fast", "csrc", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def insist_on_sequence() -> None:
    """Raises ValueError where the native sequence engine is missing: there is nothing to measure then."""
    reason = ntm_fast.ops.why_not_native(torch.device("cpu"), torch.float32, "ntm_sequence")
    if reason:
        raise ValueError(f"the sequence engine cannot serve: {reason}")


def load(path: Path, *keys: str) -> dict[str, Any]:
    """A report that a script has written; ``keys`` are what it must have."""
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file; measure first") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    missing = [key for key in keys if not isinstance(report, dict) or not report.get(key)]
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}: not a report of this script; measure again")
    return report


def save(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def show(path: Path) -> Path:
    """The path as one would type it."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def new_figure(width: float, height: float) -> Any:
    """An empty picture. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def log_ticks(ax: Any, values: list[int]) -> None:
    """Ticks at the values measured, as far as there is room for them, and at 1, 2, 5, 10, ... milliseconds."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    room = 0.15 * math.log(max(values) / min(values))
    shown = [values[-1]]
    for value in reversed(values):
        if math.log(shown[-1] / value) >= room:
            shown.append(value)
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    ax.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=20))
    ax.yaxis.set_minor_formatter(NullFormatter())
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
