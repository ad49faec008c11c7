"""Measure one training step of the standard job (see job.py) by engine, and write the table of the README from it.

    python benchmarks/report.py                      measure, print the table, write benchmarks/results/*.json
    python benchmarks/report.py --readme README.md   put the table of the last measurement into a file, between
                                                     <!-- benchmark:begin --> and <!-- benchmark:end -->

Engines take turns, so that a change in the machine's mood reaches all of them; agreement is checked first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch
from job import ENGINES, check_agreement, copy_batch, make, training_step

import ntm_fast

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "training_step.json"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
TITLES = {
    "step": "`FastNTM`, step engine",
    "reference": "reference: plain PyTorch, eager",
    "compiled reference": "reference, each step under `torch.compile`",
    "nn.LSTM": "`nn.LSTM(100)` + Linear: no memory at all",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 256], metavar="B")
    parser.add_argument("--seconds", type=float, default=20.0, help="time spent on each batch size (default: 20)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--compile", action="store_true", help="also the reference under torch.compile: minutes more")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"the JSON file (default: {RESULTS})")
    parser.add_argument("--readme", type=Path, help="measure nothing; put the table of --results into this file")
    options = parser.parse_args(arguments)
    try:
        if options.readme:
            report = json.loads(options.results.read_text())
            insert(options.readme, table(report))
            return 0
        report = measure(options)
    except (OSError, ValueError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(report))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.results}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    reason = ntm_fast.ops.why_not_native(torch.device("cpu"), torch.float32)
    if reason:
        raise ValueError(f"the step engine cannot serve: {reason}")
    names = [name for name in ENGINES if options.compile or name != "compiled reference"]
    report = {**circumstances(), "milliseconds": {}}
    for batch_size in options.batch_sizes:
        torch.manual_seed(batch_size)
        batch = copy_batch(batch_size)
        for name in names:
            check_agreement(name, batch)
        steps = {name: training_step(make(name), batch) for name in names}
        report["milliseconds"][str(batch_size)] = take_turns(steps, options.seconds)
        medians = {name: statistics.median(times) for name, times in report["milliseconds"][str(batch_size)].items()}
        print(f"B={batch_size}: " + ", ".join(f"{n} {ms:.3g} ms" for n, ms in medians.items()), file=sys.stderr)
    return report


def take_turns(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds per call of each function, in rounds; a turn is about as long for each of them."""
    calls = {}
    for name, step in steps.items():
        for _ in range(3):  # warm-up: allocations, compilation
            step()
        start = time.perf_counter()
        step()
        calls[name] = max(1, round(0.1 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                step()
            times[name].append(1e3 * (time.perf_counter() - start) / calls[name])
    return times


def circumstances() -> dict[str, Any]:
    return {
        "job": "one training step: copy, memory 128x20, LSTM 100, T=41, 9 inputs, 8 outputs, RMSprop, float32",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "ntm_fast": ntm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": ntm_fast.capabilities()["cpu"],
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit measured, with a + when files differ from it; None outside of a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(report: dict[str, Any]) -> str:
    """Medians in milliseconds, and how many times as long as the step engine each other takes."""
    sizes = list(report["milliseconds"])
    medians = {b: {n: statistics.median(t) for n, t in report["milliseconds"][b].items()} for b in sizes}
    lines = [
        "| ms per training step | " + " | ".join(f"B={b}" for b in sizes) + " |",
        "|---" * (1 + len(sizes)) + "|",
    ]
    for name in (name for name in TITLES if name in medians[sizes[0]]):
        cells = []
        for b in sizes:
            ratio = medians[b][name] / medians[b]["step"]
            cells.append(f"{medians[b][name]:.3g}" + (f" ({ratio:.2g}x)" if name != "step" else ""))
        lines.append(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    repeats = min(len(times) for b in sizes for times in report["milliseconds"][b].values())
    where = f"{report['cpu']}, threads: {report['threads']}, {report['kernels']} kernels, torch {report['torch']}"
    lines += [
        "",
        f"Medians of at least {repeats} repeats that take turns; in brackets, the ratio to the step engine. "
        f"{where}, {report['date'][:10]}.",
    ]
    return "\n".join(lines)


def insert(path: Path, text: str) -> None:
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{path}: expected one {BEGIN} and after it one {END}")
    before, rest = page.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    sys.exit(main())
