"""The pictures of a run: the learning curve, a model's answer to one sequence, and what its memory does meanwhile."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from torch import Tensor, nn

from ..modules import FastNTM
from ..tasks import Batch, Task
from .metrics import Row

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": "0.35",
    "axes.linewidth": 0.7,
    "xtick.color": "0.25",
    "ytick.color": "0.25",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 160,
}
_BLUE, _ORANGE, _GREY = "#2c5f8a", "#c8552b", "0.45"
_ACTIVE = 0.05  # a weight that makes its location worth showing


def learning_curve(path: Path, rows: list[Row], title: str, *, unit: str, solved: float) -> Path:
    """Draw error and gradient norm over training sequences; ``solved`` is the error at which a run stops -> path."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 4.6), layout="constrained")
        error, norm = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _error_panel(error, rows, unit, solved)
        error.set_title(title)
        _norm_panel(norm, rows)
        norm.set_xlabel("training sequences")
        norm.set_xlim(0, max([row.sequences for row in rows], default=1))
        norm.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        norm.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        figure.align_ylabels()
        for axes in (error, norm):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.92", lw=0.6)
            axes.set_axisbelow(True)
        figure.savefig(path)
    return path


def _error_panel(axes: Axes, rows: list[Row], unit: str, solved: float) -> None:
    axes.plot([row.sequences for row in rows], [row.error for row in rows], color=_BLUE, lw=1.4, label="training")
    checked = [(row.sequences, row.validation) for row in rows if row.validation is not None]
    if checked:
        axes.plot(*zip(*checked), "o", color=_ORANGE, ms=3.5, clip_on=False, zorder=3, label="validation")
    axes.axhline(solved, color=_GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
    axes.annotate(
        f"solved below {solved:g}",
        (0, solved),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color=_GREY,
        fontsize=8,
    )
    # Logarithmic, but with a place for the zero that everybody hopes to see.
    axes.set_yscale("symlog", linthresh=solved, linscale=0.6)
    highest = 2 * max([row.error for row in rows if math.isfinite(row.error)] + [100 * solved])
    axes.set_ylim(-solved / 4, highest)
    decades = range(math.ceil(math.log10(solved)), math.ceil(math.log10(highest)) + 1)
    axes.yaxis.set_major_locator(FixedLocator([0, *(10.0**decade for decade in decades)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel(f"error ({unit})")
    axes.legend(loc="upper right")


def _norm_panel(axes: Axes, rows: list[Row]) -> None:
    axes.plot([row.sequences for row in rows], [row.grad_norm or math.nan for row in rows], color=_BLUE, lw=1)
    axes.set_yscale("log")
    decades = [math.log10(row.grad_norm) for row in rows if row.grad_norm > 0] or [0]
    lowest = math.floor(min(decades))
    axes.set_ylim(10**lowest, 10 ** max(math.ceil(max(decades)), lowest + 1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("gradient norm,\nlargest")


class _Answer(NamedTuple):
    """One sequence, a model's answer to it, and what may be said of both; NaN where no answer is asked for."""

    inputs: Tensor  # (T, I)
    targets: Tensor  # (T, O)
    outputs: Tensor  # (T, O)
    text: str

    @classmethod
    def of(cls, task: Task, batch: Batch, outputs: Tensor, title: str) -> _Answer:
        """Of ``batch``'s only sequence."""
        inputs, targets, predictions = (
            tensor[:, 0].float().cpu() for tensor in (batch.inputs, batch.targets, task.predictions(outputs))
        )
        asked = batch.mask[:, 0].cpu()  # (T,)
        unasked = ~asked[:, None]
        error = float(task.errors(outputs, batch))
        text = f"{title}: {int(asked.sum())} steps to answer, error {error:.4g} {task.unit}"
        return cls(inputs, targets.masked_fill(unasked, math.nan), predictions.masked_fill(unasked, math.nan), text)


@torch.no_grad()
def answer_picture(path: Path, model: nn.Module, task: Task, batch: Batch, title: str) -> Path:
    """Draw the first sequence of ``batch``: inputs, targets and what the model answers -> path."""
    batch = _first_sequence(model, batch)
    outputs, _ = model(batch.inputs)
    answer = _Answer.of(task, batch, outputs, title)
    with rc_context(_STYLE):
        figure, axes = _panels([["inputs"], ["targets"], ["outputs"]], [1.0, 1.0, 1.0])
        _draw_answer(figure, axes, answer)
        _finish(figure, axes, answer.text)
        figure.savefig(path)
    return path


@torch.no_grad()
def memory_picture(path: Path, model: FastNTM, task: Task, batch: Batch, title: str) -> Path:
    """Draw what the machine does with the first sequence of ``batch``, as Figure 6 of Graves et al. (2014) -> path.

    Inputs, added vectors and write weights on the left; targets, outputs, vectors read and read weights on the right.
    Time runs to the right. Of the locations, those that a head ever looks at are shown.
    """
    batch = _first_sequence(model, batch)
    outputs, trace = model.trace(batch.inputs)
    answer = _Answer.of(task, batch, outputs, title)
    add, reads, write_weights, read_weights = (
        tensor[:, 0].float().cpu() for tensor in (trace.add, trace.reads, trace.write_weights, trace.read_weights)
    )  # (T, heads, M or N)
    writers, readers = add.shape[1], reads.shape[1]
    window = _visited(torch.cat([write_weights, read_weights], 1).amax((0, 1)))

    def side_by_side(left: str, right: str) -> list[list[str]]:
        return [
            [f"{left}{head}" if head < writers else ".", f"{right}{head}" if head < readers else "."]
            for head in range(max(writers, readers))
        ]

    vectors, weights = side_by_side("add", "read"), side_by_side("write weights", "read weights")
    heights = [0.8] * 2 + [1.15] * len(vectors) + [min(3.4, max(1.4, len(window) * 0.055))] * len(weights)
    with rc_context(_STYLE):
        figure, axes = _panels([["inputs", "targets"], ["inputs", "outputs"], *vectors, *weights], heights)
        _draw_answer(figure, axes, answer)
        reach = math.ceil(10 * max(float(add.abs().max()), float(reads.abs().max()), 0.1)) / 10
        _draw_vectors(figure, axes, "add", "Added vectors", add, reach)
        _draw_vectors(figure, axes, "read", "Vectors read", reads, reach)
        _draw_weights(figure, axes, "write weights", "Write weights", write_weights, window)
        _draw_weights(figure, axes, "read weights", "Read weights", read_weights, window)
        _finish(figure, axes, answer.text)
        figure.savefig(path)
    return path


def _first_sequence(model: nn.Module, batch: Batch) -> Batch:
    """The first sequence of ``batch``, where the model is."""
    weight = next(model.parameters())
    steps = len(batch.inputs) if batch.lengths is None else int(batch.lengths[0])
    first = Batch(batch.inputs[:steps, :1], batch.targets[:steps, :1], batch.mask[:steps, :1])
    return first.to(weight.device, weight.dtype)


def _panels(rows: list[Any], heights: list[float]) -> tuple[Figure, dict[str, Axes]]:
    layout = ConstrainedLayoutEngine(h_pad=0.05, w_pad=0.05, hspace=0.02, wspace=0.03)
    figure = Figure(figsize=(9.0, sum(heights) + 0.42 * len(heights) + 0.7), layout=layout)
    return figure, figure.subplot_mosaic(rows, height_ratios=heights, sharex=True)


def _draw_answer(figure: Figure, axes: dict[str, Axes], answer: _Answer) -> None:
    both = torch.cat([answer.targets, answer.outputs])
    image = _heatmap(axes["inputs"], answer.inputs, "Inputs", "channel", **_greys(answer.inputs))
    _colorbar(figure, image, [axes["inputs"]], "value", aspect=22)
    for name, values in (("targets", answer.targets), ("outputs", answer.outputs)):
        image = _heatmap(axes[name], values, name.capitalize(), "channel", **_greys(both))
        axes[name].set_facecolor("0.92")  # where no answer is asked for
    _colorbar(figure, image, [axes["targets"], axes["outputs"]], "value", aspect=22)


def _greys(values: Tensor) -> dict[str, Any]:
    """Colors from 0 to 1, or further where the values go further."""
    known = values[values.isfinite()].tolist()
    return {"cmap": "Greys", "vmin": min([0.0, *known]), "vmax": max([1.0, *known])}


def _draw_vectors(
    figure: Figure, axes: dict[str, Axes], name: str, title: str, values: Tensor, reach: float
) -> None:
    """values (T, heads, M)"""
    for head in range(values.shape[1]):
        cell, colors = axes[f"{name}{head}"], {"cmap": "PuOr_r", "vmin": -reach, "vmax": reach}
        image = _heatmap(cell, values[:, head], title + _number(head, values), "component", **colors)
        _colorbar(figure, image, [cell], "value")


def _draw_weights(
    figure: Figure, axes: dict[str, Axes], name: str, title: str, values: Tensor, window: list[int]
) -> None:
    """values (T, heads, N)"""
    for head in range(values.shape[1]):
        cell, colors = axes[f"{name}{head}"], {"cmap": "magma", "vmin": 0, "vmax": 1}
        image = _heatmap(cell, values[:, head][:, window], title + _number(head, values), "location", **colors)
        _label_locations(cell, window)
        _colorbar(figure, image, [cell], "weight")


def _number(head: int, values: Tensor) -> str:
    return f", head {head + 1}" if values.shape[1] > 1 else ""


def _finish(figure: Figure, axes: dict[str, Axes], text: str) -> None:
    """Label the time where an axis is at the bottom, and say above what is seen."""
    for cell in axes.values():
        place = cell.get_subplotspec()
        bottom = place is not None and place.is_last_row()
        cell.tick_params(labelbottom=bottom)
        if bottom:
            cell.set_xlabel("time step")
            cell.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def _visited(weights: Tensor) -> list[int]:
    """The shortest stretch of locations, on the circle, with all that matter and a margin: weights (N,)."""
    count = len(weights)
    used = (weights > _ACTIVE).nonzero().flatten().tolist()
    if not used:
        return list(range(count))
    gaps = [(after - before, after) for before, after in zip(used, [*used[1:], used[0] + count])]
    gap, first = max(gaps)
    length, margin = count - gap + 1, 2
    if length + 2 * margin >= count:
        return list(range(count))
    return [(first - margin + i) % count for i in range(length + 2 * margin)]


def _heatmap(axes: Axes, values: Tensor, title: str, label: str, **colors):
    """values (T, rows), the first row on top."""
    image = axes.imshow(values.T.numpy(), aspect="auto", interpolation="nearest", **colors)
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return image


def _label_locations(axes: Axes, window: list[int]) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(window) / step <= 9)
    places = [place for place, location in enumerate(window) if location % step == 0]
    axes.set_yticks(places, [str(window[place]) for place in places])


def _colorbar(figure: Figure, image, axes: list[Axes], label: str, aspect: float = 14) -> None:
    low, high = image.get_clim()
    ticks = [low, (low + high) / 2, high]
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, aspect=aspect, ticks=ticks, format="%.3g")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.set_label(label, fontsize=8)
