"""Timing by turns, what was measured where, and the options that the scripts share."""

from __future__ import annotations

import argparse
import datetime
import gc
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
from ntm_fast.ops.serving import why_not_native

ROOT = Path(__file__).resolve().parents[2]

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


class HostClock:
    """Times work on the CPU."""

    device, graphs = "cpu", False
    cache = 1 << 12  # bytes; what is to come from memory must rotate among more. Here there are only smoke runs.

    def milliseconds(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The work without the launches, to be called any number of times. The CPU has none."""
        return work

    def peak(self, work: Callable[[], Any]) -> tuple[Any, int | None]:
        """What the work returns, and the most bytes allocated meanwhile, which only a device tells."""
        return work(), None


class DeviceClock:
    """Times work on the current CUDA device, by its own events."""

    device, graphs = "cuda", True

    def __init__(self) -> None:
        self.cache = torch.cuda.get_device_properties().L2_cache_size
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds(self, work: Callable[[], Any]) -> float:
        self.start.record()
        work()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)

    def peak(self, work: Callable[[], Any]) -> tuple[Any, int | None]:
        """What the work returns, and the most bytes allocated meanwhile beyond those before."""
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The work as a CUDA graph; what it works on lives as long."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up at their first uses, which cannot be captured
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A stream of its own: torch 2.11 to 2.13 drop cuBLAS's workspace with a graph from under others of its stream.
        with torch.cuda.graph(graph, stream=stream):
            kept = work, work()

        def replay() -> Any:
            graph.replay()
            return kept[1]

        return replay


def take_turns(
    functions: dict[str, Callable[[], Any]],
    seconds: float,
    clock: HostClock | DeviceClock = HostClock(),
    turn: float = 0.1,
) -> dict[str, list[float]]:
    """Milliseconds per call of each function, in rounds of turns of about ``turn`` seconds for each of them.

    In turns, so that a change in the machine's mood reaches all of them.
    """
    calls = {}
    for name, function in functions.items():
        for _ in range(3):  # warm-up: allocations, compilation
            function()
        calls[name] = max(1, round(1e3 * turn / clock.milliseconds(function)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():

            def repeat(function=function, count=calls[name]) -> None:
                for _ in range(count):
                    function()

            times[name].append(clock.milliseconds(repeat) / calls[name])
    return times


def summary(times: list[float]) -> dict[str, float]:
    """What is kept of a function's repeats."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    kept = {"median": median, "quartile_1": low, "quartile_3": high, "min": min(times)}
    return {**{name: float(f"{value:.4g}") for name, value in kept.items()}, "repeats": len(times)}


def circumstances(device: str = "cpu") -> dict[str, Any]:
    found = ntm_fast.capabilities()
    build = found["build"] or {}
    known = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "ntm_fast": ntm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": build.get("cxx"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": found["cpu"],
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties()
        known |= {
            "gpu": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": gpu.L2_cache_size,
            "memory_bytes": gpu.total_memory,
            "driver": driver(),
            "cuda": torch.version.cuda,
            "nvcc": build.get("nvcc"),
            "architectures": found["cuda"],
        }
    return known


def driver() -> str | None:
    """The version of the NVIDIA driver, where nvidia-smi is there to say it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def where(report: dict[str, Any]) -> str:
    """One line for below a table."""
    if "gpu" in report:
        return (
            f"{report['gpu']}, compute capability {report['compute_capability']}, {report['multiprocessors']} "
            f"multiprocessors, {report['l2_bytes'] / 2**20:.0f} MiB of L2, driver {report['driver']}, kernels for "
            f"{report['architectures']} by {report['nvcc']}, torch {report['torch']} with CUDA {report['cuda']}, "
            f"{report['cpu']}, float32, {report['date'][:10]}, commit {report['commit']}."
        )
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
    reason = why_not_native(torch.device("cpu"), torch.float32, "ntm_sequence")
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
    write(path, json.dumps(report, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """All of it or nothing: who is cut short while writing leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    os.replace(new, path)


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
