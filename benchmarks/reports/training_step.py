"""Measure the standard job (shared/job.py) by engine, and make the README's tables and picture of what was measured.

    python benchmarks/run.py training_step             measure; print the tables; write
                                                       benchmarks/results/training_step.json
    python benchmarks/run.py training_step --readme    put the tables of the last measurement into README.md, between
                                                       <!-- benchmark:begin --> and <!-- benchmark:end -->
    python benchmarks/run.py training_step --plot      draw docs/images/speed.png from the last measurement

Of each controller and batch size: a training step and forward only (under no_grad); of each controller: streaming, one
step a call at B = 1. Engines take turns, so that a change in the machine's mood reaches all of them; outputs, loss and
every gradient are checked against the reference first.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from shared.job import (
    CONTROLLERS,
    ENGINES,
    TorchCallsAround,
    answers,
    check_stream,
    compare,
    copy_batch,
    forward_only,
    make,
    stream,
    training_step,
)
from shared.timing import (
    BLUE,
    DARK,
    LIGHT_BLUE,
    LIGHT_ORANGE,
    ORANGE,
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

RESULTS = ROOT / "benchmarks" / "results" / "training_step.json"
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "images" / "speed.png"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
TRAINING, FORWARD = "training step", "forward"
TITLES = {
    "sequence": "**`FastNTM`**, sequence engine",
    "step": "`FastNTM`, step engine",
    "compiled reference": "plain PyTorch, each step under `torch.compile`",
    "reference": "plain PyTorch, eager",
    "no memory": "`nn.{0}(100)` + Linear, no memory at all",
}
SHORT_TITLES = {  # name, colour and line style in the picture
    "reference": ("plain PyTorch, eager", ORANGE, "-"),
    "compiled reference": ("plain PyTorch, torch.compile", LIGHT_ORANGE, "-"),
    "step": ("FastNTM, step engine", LIGHT_BLUE, "-"),
    "sequence": ("FastNTM, sequence engine", BLUE, "-"),
    "no memory": ("nn.{0}, no memory at all", DARK, (0, (4, 2.5))),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "run.py training_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--controllers", nargs="+", choices=CONTROLLERS, default=list(CONTROLLERS), help="[both]")
    parser.add_argument("--batch-sizes", type=count, nargs="+", default=[1, 32, 256], metavar="B", help="[1 32 256]")
    parser.add_argument(
        "--seconds", type=seconds, default=10.0, help="time for each controller, batch size and measurement [10]"
    )
    parser.add_argument("--threads", type=count, help="torch's threads [torch's own choice]")
    parser.add_argument("--compile", action="store_true", help="also the reference under torch.compile: minutes more")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="JSON", help=f"[{show(RESULTS)}]")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="?",
        const=README,
        metavar="PAGE",
        help=f"measure nothing; put the tables of --results into this page [{show(README)}]",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        nargs="?",
        const=PICTURE,
        metavar="PNG",
        help=f"measure nothing; draw the picture of --results [{show(PICTURE)}]",
    )
    options = parser.parse_args(arguments)
    try:
        if options.plot or options.readme:
            report = load(options.results, "job", "milliseconds", "streaming_milliseconds")
            # The picture first: the page shows it once it is there.
            if options.plot:
                plot(options.plot, report)
            if options.readme:
                insert(options.readme, page(report, options.readme.resolve().parent))
            return 0
        report = measure(options)
        save(options.results, report)
    except (OSError, ValueError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{tables(report)}\n\n{ratios(report)}")
    print(f"\nwritten to {show(options.results)}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    insist_on_sequence()
    names = [name for name in ENGINES if options.compile or name != "compiled reference"]
    report: dict[str, Any] = {
        "job": "copy, memory 128x20, 1 read and 1 write head, controller of 100, T=41, 9 inputs, 8 outputs; RMSprop",
        **circumstances(),
        "milliseconds": {},
        "streaming_milliseconds": {},
    }
    for controller in dict.fromkeys(options.controllers):
        of_controller: dict[str, dict] = {TRAINING: {}, FORWARD: {}}
        for batch_size in sorted(set(options.batch_sizes)):
            batch = copy_batch(batch_size)
            models = {name: make(controller, name) for name in names}
            wanted = answers(models["reference"], batch)
            for name in names:
                if name not in ("reference", "no memory"):
                    compare(name, answers(models[name], batch), wanted)
            # Forward first: a training step changes its model.
            for what, function in ((FORWARD, forward_only), (TRAINING, training_step)):
                times = take_turns({name: function(models[name], batch) for name in names}, options.seconds)
                found = of_controller[what][str(batch_size)] = {name: summary(times[name]) for name in names}
                tell(f"{controller}, {what}, B={batch_size}", found, 1, "ms")
        report["milliseconds"][controller] = of_controller
        found = report["streaming_milliseconds"][controller] = measure_stream(controller, options.seconds)
        tell(f"{controller}, streaming", found, 1e3, "us")
    return report


@torch.no_grad()
def measure_stream(controller: str, seconds: float) -> dict[str, dict[str, float]]:
    batch = copy_batch(1)
    models = {name: make(controller, name) for name in ("sequence", "step", "reference", "no memory")}
    for name in ("sequence", "step"):
        check_stream(name, models[name], batch)
    functions = {name: stream(model, batch[0]) for name, model in models.items()}
    functions["torch calls around"] = stream(TorchCallsAround(models["sequence"]), batch[0])
    return {name: summary(times) for name, times in take_turns(functions, seconds).items()}


def tell(title: str, found: dict[str, dict[str, float]], factor: float, unit: str) -> None:
    medians = (f"{name} {factor * times['median']:.3g} {unit}" for name, times in found.items())
    print(f"{title}: " + ", ".join(medians), file=sys.stderr)


def medians_of(report: dict[str, Any], controller: str, what: str) -> dict[str, dict[str, float]]:
    """engine -> batch size -> milliseconds, engines in the order of the table."""
    found = report["milliseconds"][controller][what]
    names = [name for name in TITLES if name in next(iter(found.values()))]
    return {name: {b: engines[name]["median"] for b, engines in found.items()} for name in names}


def tables(report: dict[str, Any]) -> str:
    """Training steps of the first controller in full; a row or a line for everything else."""
    first, *others = report["milliseconds"]
    medians = medians_of(report, first, TRAINING)
    sizes = list(medians["no memory"])
    lines = [
        f"| {first.upper()} controller: ms per training step | " + " | ".join(f"B = {b}" for b in sizes) + " |",
        "|---" + "|---:" * len(sizes) + "|",
    ]
    for name, times in medians.items():
        cells = [f"{times[b]:.3g} ({factor(times[b] / medians['no memory'][b])})" for b in sizes]
        if name == "sequence":
            cells = [f"**{cell}**" for cell in cells]
        lines.append(f"| {TITLES[name].format(first.upper())} | " + " | ".join(cells) + " |")
    lines += ["", f"In brackets, here and below: times the cost of `nn.{first.upper()}`."]
    rest = [(controller, what) for controller in report["milliseconds"] for what in (TRAINING, FORWARD)][1:]
    lines += ["", "| sequence engine, ms | " + " | ".join(f"B = {b}" for b in sizes) + " | faster than eager |"]
    lines += ["|---" + "|---:" * (len(sizes) + 1) + "|"]
    for controller, what in rest:
        medians = medians_of(report, controller, what)
        ours, bare, eager = (medians[name] for name in ("sequence", "no memory", "reference"))
        cells = [f"{ours[b]:.3g} ({factor(ours[b] / bare[b])})" for b in sizes]
        cells.append(" / ".join(factor(eager[b] / ours[b]) for b in sizes))
        against = "" if controller == first else f" (brackets: `nn.{controller.upper()}`)"
        what = "forward only, `no_grad`" if what == FORWARD else what
        lines.append(f"| {controller.upper()}, {what}{against} | " + " | ".join(cells) + " |")
    lines += ["", streaming(report["streaming_milliseconds"])]
    kinds = (found for of_controller in report["milliseconds"].values() for found in of_controller.values())
    repeats = min(times["repeats"] for found in kinds for engines in found.values() for times in engines.values())
    lines += ["", f"Medians of at least {repeats} repeats that take turns. {where(report)}"]
    return "\n".join(lines)


def ratios(report: dict[str, Any]) -> str:
    """How many times as fast the sequence engine is as each other, of everything measured."""
    lines = ["Others' time / sequence engine's:"]
    for controller, of_controller in report["milliseconds"].items():
        for what in of_controller:
            medians = medians_of(report, controller, what)
            for name, times in medians.items():
                if name != "sequence":
                    each = ", ".join(f"B={b} {t / medians['sequence'][b]:.3g}" for b, t in times.items())
                    lines.append(f"  {controller}, {what}, {name}: {each}")
    return "\n".join(lines)


def factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def streaming(found: dict[str, dict[str, dict[str, float]]]) -> str:
    parts = []
    for controller, engines in found.items():
        call, around, bare = (1e3 * engines[name]["median"] for name in ("sequence", "torch calls around", "no memory"))
        parts.append(
            f"{call:.0f} us with {'an' if controller == 'lstm' else 'a'} {controller.upper()}, {call - around:.0f} us "
            f"above the torch calls around it (`nn.{controller.upper()}` + Linear: {bare:.0f} us)"
        )
    return f"Streaming, one step a call at B = 1, the state carried, `no_grad`: {'; '.join(parts)}."


def page(report: dict[str, Any], folder: Path) -> str:
    """The tables, and the picture where there is one, for a page in ``folder``."""
    if not PICTURE.exists():
        return tables(report)
    link = Path(os.path.relpath(PICTURE, folder)).as_posix()
    return f"{tables(report)}\n\n![milliseconds of a training step over the batch size, by engine]({link})"


def insert(path: Path, text: str) -> None:
    content = path.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise ValueError(f"{path}: expected one {BEGIN} and after it one {END}")
    before, rest = content.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def plot(path: Path, report: dict[str, Any]) -> None:
    """Milliseconds of a training step over the batch size, a panel for each controller."""
    controllers = list(report["milliseconds"])
    figure = new_figure(1.6 + 3.6 * len(controllers), 3.7)
    from matplotlib import rc_context

    with rc_context(STYLE):
        axes = figure.subplots(1, len(controllers), sharey=True, squeeze=False)[0]
        names: dict[str, Any] = {}
        for ax, controller in zip(axes, controllers):
            medians = medians_of(report, controller, TRAINING)
            for name in (name for name in SHORT_TITLES if name in medians):
                _, colour, dashes = SHORT_TITLES[name]
                sizes, times = zip(*((int(b), t) for b, t in medians[name].items()))
                ours = name == "sequence"
                names[name], *_ = ax.plot(
                    sizes,
                    times,
                    marker="o",
                    color=colour,
                    ls=dashes,
                    lw=2.2 if ours else 1.4,
                    ms=5.5 if ours else 4,
                    mec="white",
                    mew=0.6,
                    zorder=4 if ours else 3,
                    clip_on=False,
                )
            ax.set(xscale="log", yscale="log", xlabel="batch size B")
            ax.set_title(f"{controller.upper()} controller")
            log_ticks(ax, sizes)
            ax.grid(True, which="major")
            ax.set_axisbelow(True)
        axes[0].set_ylabel("ms per training step")
        rnns = " / nn.".join(controller.upper() for controller in controllers)
        figure.legend(
            list(names.values()), [SHORT_TITLES[name][0].format(rnns) for name in names], loc="outside right center"
        )
        figure.suptitle(
            "Training step of copy: memory 128 x 20, controller of 100, T = 41", x=0.01, ha="left", fontsize=10.5
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)

