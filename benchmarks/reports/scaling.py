"""What a training step of the sequence engine costs over T, B, N and M, and the memory that long sequences take.

    python benchmarks/run.py scaling            measure, then write benchmarks/results/scaling.json, docs/scaling.md
                                                and docs/images/scaling.png
    python benchmarks/run.py scaling --draw     the page and the picture again, from the last measurement
    python benchmarks/run.py scaling --quick    a smoke run of seconds, into a folder of its own

One size at a time is varied around the standard job (shared/job.py); the sizes of one table take turns. Memory is that
of a fresh process for each point.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ntm_fast.sequence import kept_every

from shared.job import HIDDEN, STEPS, answers, compare, copy_batch, make, training_step
from shared.timing import (
    BLUE,
    ROOT,
    STYLE,
    circumstances,
    count,
    insist_on_sequence,
    load,
    log_ticks,
    new_figure,
    save,
    seconds,
    show,
    summary,
    take_turns,
    where,
)

STANDARD = {"T": STEPS, "B": 32, "N": 128, "M": 20}
NAMES = {"T": "time steps T", "B": "batch size B", "N": "memory locations N", "M": "memory width M"}
SWEEPS = {
    "T": (10, 41, 100, 300, 1000),
    "B": (1, 4, 32, 128, 512, 1024),
    "N": (32, 128, 512, 1024, 2048, 4096),
    "M": (8, 20, 32, 64, 128),
}
QUICK_SWEEPS = {"T": (10, 41), "B": (1, 8), "N": (32, 128), "M": (8, 20)}
LONG, QUICK_LONG, LONG_BATCH = (100, 1000, 10_000), (20, 100), 16
ROUNDS = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "run.py scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=seconds, default=20.0, help="time for each of the four tables [20]")
    parser.add_argument("--threads", type=count, help="torch's threads [torch's own choice]")
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="where to write [this repository]")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="a smoke run; without --root into a new folder")
    what.add_argument("--draw", action="store_true", help="measure nothing; page and picture only")
    what.add_argument("--long", type=count, metavar="T", help=argparse.SUPPRESS)  # the process of one point
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.long:
            print(json.dumps(train_long(options.long, options.seconds)))
            return 0
        root = options.root or (Path(tempfile.mkdtemp(prefix="ntm-fast-scaling-")) if options.quick else ROOT)
        results, page, picture = (
            root / name for name in ("benchmarks/results/scaling.json", "docs/scaling.md", "docs/images/scaling.png")
        )
        if options.draw:
            report = load(results, "job", "sweeps", "long")
        else:
            report = measure(options)
            save(results, report)
        plot(picture, report)
        page.write_text(text(report))
    except (OSError, ValueError, AssertionError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {show(results)}, {show(page)} and {show(picture)}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    insist_on_sequence()
    batch = copy_batch(STANDARD["B"])
    compare(
        "sequence",
        answers(make("lstm", "sequence"), batch),
        answers(make("lstm", "reference"), batch),
    )
    report: dict[str, Any] = {
        "job": f"training step of copy, memory {STANDARD['N']}x{STANDARD['M']}, LSTM controller of {HIDDEN}, "
        f"T={STANDARD['T']}, B={STANDARD['B']}, unless varied; RMSprop",
        "quick": options.quick,
        **circumstances(),
        "sweeps": {},
    }
    time_of_table = min(options.seconds, 0.5) if options.quick else options.seconds
    # Before the large jobs of this process, lest the machine be short of memory.
    report["long"] = measure_long(options)
    for name, values in (QUICK_SWEEPS if options.quick else SWEEPS).items():
        sizes = {str(value): {**STANDARD, name: value} for value in values}
        steps = {value: training_step(model_for(of), copy_batch(of["B"], of["T"])) for value, of in sizes.items()}
        times = take_turns(steps, time_of_table)
        report["sweeps"][name] = {
            value: {**summary(times[value]), "memory_kept_every": kept(of)} for value, of in sizes.items()
        }
        medians = (f"{value}: {found['median']:.3g} ms" for value, found in report["sweeps"][name].items())
        print(f"{name} = " + ", ".join(medians), file=sys.stderr)
    return report


def model_for(sizes: dict[str, int]) -> torch.nn.Module:
    return make("lstm", "sequence", memory_locations=sizes["N"], memory_width=sizes["M"])


def kept(sizes: dict[str, int]) -> int:
    """Every how many steps memory_checkpoint="auto" keeps a memory: it explains a bend in a curve."""
    return kept_every("auto", sizes["T"], 4 * sizes["B"] * sizes["N"] * sizes["M"])


def measure_long(options: argparse.Namespace) -> dict[str, Any]:
    """T -> time and peak memory of a training step; a fresh process for each point and round."""
    points = QUICK_LONG if options.quick else LONG
    found: dict[int, list[dict[str, float]]] = {steps: [] for steps in points}
    for _ in range(1 if options.quick else ROUNDS):
        for steps in points:
            found[steps].append(in_fresh_process(steps, 0.1 if options.quick else 2.0))
    report = {}
    for steps, rounds in found.items():
        report[str(steps)] = {
            "median": statistics.median(one["milliseconds"] for one in rounds),
            "peak_mib": max(one["peak_mib"] for one in rounds),
            "memory_kept_every": kept({**STANDARD, "T": steps, "B": LONG_BATCH}),
            "rounds": len(rounds),
        }
        print(f"T={steps}, B={LONG_BATCH}: {report[str(steps)]}", file=sys.stderr)
    return report


def in_fresh_process(steps: int, seconds: float) -> dict[str, float]:
    program = ROOT / "benchmarks" / "run.py"
    command = [sys.executable, str(program), "scaling", "--long", str(steps), "--seconds", str(seconds)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def train_long(steps: int, seconds: float) -> dict[str, float]:
    """The process of one point: milliseconds of a training step, and its peak memory above the imports."""
    # One small step first: torch imports some of itself, and starts its threads, only when they are used.
    training_step(model_for(STANDARD), copy_batch(1, 3))()
    before = peak_bytes()
    step = training_step(model_for(STANDARD), copy_batch(LONG_BATCH, steps))
    step()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return {"milliseconds": statistics.median(times), "peak_mib": (peak_bytes() - before) / 2**20}


def peak_bytes() -> int:
    """The most memory that this process has had. (ru_maxrss would include what its parent had when starting it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def growth(values: list[int], times: list[float]) -> list[float]:
    """The exponents between neighbours: 1 where the cost grows in proportion."""
    pairs = list(zip(values, times))
    return [math.log(t1 / t0) / math.log(v1 / v0) for (v0, t0), (v1, t1) in zip(pairs, pairs[1:])]


def text(report: dict[str, Any]) -> str:
    """The page."""
    standard = ", ".join(f"{name} = {value}" for name, value in STANDARD.items())
    lines = [
        "# Scaling",
        "",
        "What a training step of the sequence engine costs (forward, loss, backward, RMSprop) when one size at a time "
        f"departs from the standard job: copy, an LSTM controller of {HIDDEN}, {standard}. Growth is the exponent "
        "between a column and the one before: 1 where the cost grows in proportion, less where fixed costs still show. "
        'K: `memory_checkpoint="auto"` keeps the memory of every K-th step and writes those between again, which '
        "costs time too.",
        "",
        "![milliseconds of a training step over T, B, N and M](images/scaling.png)",
    ]
    for name, found in report["sweeps"].items():
        values, times = [int(value) for value in found], [point["median"] for point in found.values()]
        per_step = [
            1e3 * t / (value if name == "T" else STANDARD["T"]) / (value if name == "B" else STANDARD["B"])
            for value, t in zip(values, times)
        ]
        lines += [
            "",
            f"| {NAMES[name]} | " + " | ".join(f"{value:,}" for value in values) + " |",
            "|---" + "|---:" * len(values) + "|",
            "| ms per training step | " + " | ".join(f"{t:.3g}" for t in times) + " |",
            "| us per time step and sequence | " + " | ".join(f"{t:.3g}" for t in per_step) + " |",
            "| growth | | " + " | ".join(f"{exponent:.2f}" for exponent in growth(values, times)) + " |",
            "| K | " + " | ".join(str(point["memory_kept_every"]) for point in found.values()) + " |",
        ]
    lines += [
        "",
        f"Long sequences at B = {LONG_BATCH}, each in a fresh process; the peak is what training adds to the imports.",
        "",
        "| T | ms per training step | us per time step | relative | peak, MiB | K |",
        "|---:" * 6 + "|",
    ]
    per_step = {steps: 1e3 * point["median"] / int(steps) for steps, point in report["long"].items()}
    for steps, point in report["long"].items():
        relative = per_step[steps] / next(iter(per_step.values()))
        lines.append(
            f"| {int(steps):,} | {point['median']:.4g} | {per_step[steps]:.3g} | {relative:.2f}x | "
            f"{point['peak_mib']:.0f} | {point['memory_kept_every']} |"
        )
    kinds = [point["repeats"] for found in report["sweeps"].values() for point in found.values()]
    rounds = min(point["rounds"] for point in report["long"].values())
    lines += [
        "",
        f"Medians of at least {min(kinds)} repeats that take turns; of long sequences, of {rounds} processes in turn. "
        f"{where(report)} Written by `python benchmarks/run.py scaling`.",
    ]
    if report["quick"]:
        lines.insert(2, "From a smoke run (`--quick`): these figures mean nothing.\n")
    return "\n".join(lines) + "\n"


def plot(path: Path, report: dict[str, Any]) -> None:
    figure = new_figure(9.6, 3.0)
    from matplotlib import rc_context

    with rc_context(STYLE):
        axes = figure.subplots(1, len(report["sweeps"]), sharey=True)
        for ax, (name, found) in zip(axes, report["sweeps"].items()):
            values, times = [int(value) for value in found], [point["median"] for point in found.values()]
            # In proportion, from the largest size back.
            guide = [times[-1] * value / values[-1] for value in values]
            ax.plot(values, guide, color="0.6", lw=1, ls=(0, (4, 2.5)), label="in proportion")
            ax.plot(values, times, "o-", color=BLUE, lw=1.8, ms=4.5, mec="white", mew=0.6, label="measured", zorder=3)
            ax.set(xscale="log", yscale="log", xlabel=NAMES[name])
            log_ticks(ax, values)
            ax.grid(True, which="major")
            ax.set_axisbelow(True)
        axes[0].set_ylabel("ms per training step")
        axes[0].legend(loc="upper left")
        standard = ", ".join(f"{name} = {value}" for name, value in STANDARD.items())
        figure.suptitle(f"One size varied, the others {standard}", x=0.01, ha="left", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)

