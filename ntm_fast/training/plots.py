"""The pictures of a run: the learning curve, and where the heads look while the machine works."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from torch import Tensor

from ..modules import FastNTM
from ..tasks import Batch
from .metrics import Row, wrong_bits

_STYLE = {
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


def learning_curve(path: Path, rows: list[Row], title: str, *, solved: float) -> Path:
    """Draw error and gradient norm over training sequences; ``solved`` is the error at which a run stops -> path."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 4.6), layout="constrained")
        error, norm = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        sequences = [row.sequences for row in rows]
        error.plot(sequences, [row.bits_per_sequence for row in rows], color=_BLUE, lw=1.4, label="training")
        checked = [row for row in rows if row.validation is not None]
        if checked:
            error.plot(
                [row.sequences for row in checked],
                [row.validation for row in checked],
                "o",
                color=_ORANGE,
                ms=3.5,
                clip_on=False,
                zorder=3,
                label="validation",
            )
        error.axhline(solved, color=_GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
        error.annotate(
            f"solved below {solved:g}",
            (0, solved),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            color=_GREY,
            fontsize=8,
        )
        # Logarithmic, but with a place for the zero that everybody hopes to see.
        error.set_yscale("symlog", linthresh=solved, linscale=0.6)
        highest = max([row.bits_per_sequence for row in rows], default=1)
        error.set_ylim(-solved / 4, 2 * max(highest, 1))
        error.yaxis.set_major_locator(FixedLocator([0, *(10.0**e for e in range(-2, 4))]))
        error.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        error.set_ylabel("error (bits per sequence)")
        error.set_title(title)
        error.legend(loc="upper right")
        norm.plot(sequences, [row.grad_norm or math.nan for row in rows], color=_BLUE, lw=1)
        norm.set_yscale("log")
        decades = [math.log10(row.grad_norm) for row in rows if row.grad_norm > 0] or [0]
        norm.set_ylim(10 ** math.floor(min(decades)), 10 ** max(math.ceil(max(decades)), math.floor(min(decades)) + 1))
        norm.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        norm.set_ylabel("gradient norm,\nlargest")
        norm.set_xlabel("training sequences")
        norm.set_xlim(0, max(sequences, default=1))
        norm.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        norm.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        figure.align_ylabels()
        for axes in (error, norm):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.92", lw=0.6)
            axes.set_axisbelow(True)
        figure.savefig(path)
    return path


@torch.no_grad()
def memory_picture(path: Path, model: FastNTM, batch: Batch, title: str) -> Path:
    """Draw what the machine does with the first sequence of ``batch``, as Figure 6 of Graves et al. (2014) -> path.

    Inputs, added vectors and write weights on the left; targets, outputs, vectors read and read weights on the right.
    Time runs to the right. Of the locations, those that a head ever looks at are shown.
    """
    weight = model.heads.weight
    batch = Batch(*(tensor[:, :1] for tensor in batch))
    moved = batch.to(weight.device, weight.dtype)
    outputs, trace = model.trace(moved.inputs)
    wrong = int(wrong_bits(outputs, moved))
    answered = batch.mask[:, 0]  # (T,)
    answer = outputs[:, 0].sigmoid().float().cpu()
    outside = float("nan")
    targets = batch.targets[:, 0].masked_fill(~answered[:, None], outside)
    answer = answer.masked_fill(~answered[:, None], outside)
    add, reads, write_weights, read_weights = (
        tensor[:, 0].float().cpu() for tensor in (trace.add, trace.reads, trace.write_weights, trace.read_weights)
    )  # (T, heads, M or N)
    heads = max(add.shape[1], reads.shape[1])
    window = _visited(torch.cat([write_weights, read_weights], 1).amax((0, 1)))
    width, shown = add.shape[2], len(window)

    rows = [["inputs", "targets"], ["inputs", "outputs"]]
    rows += [[f"add{h}" if h < add.shape[1] else ".", f"read{h}" if h < reads.shape[1] else "."] for h in range(heads)]
    rows += [
        [f"write weights{h}" if h < add.shape[1] else ".", f"read weights{h}" if h < reads.shape[1] else "."]
        for h in range(heads)
    ]
    heights = [0.8, 0.8, *[1.15] * heads, *[min(3.4, max(1.4, shown * 0.055))] * heads]
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.0, sum(heights) + 0.42 * len(heights) + 0.7), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.05, w_pad=0.05, hspace=0.02, wspace=0.03)
        axes = figure.subplot_mosaic(rows, height_ratios=heights, sharex=True)
        bits = {"cmap": "Greys", "vmin": 0, "vmax": 1}
        image = _heatmap(axes["inputs"], batch.inputs[:, 0], "Inputs", "channel", **bits)
        _heatmap(axes["targets"], targets, "Targets", "bit", **bits)
        _heatmap(axes["outputs"], answer, "Outputs", "bit", **bits)
        _colorbar(figure, image, [axes["inputs"]], "bit", aspect=22)
        _colorbar(figure, image, [axes["targets"], axes["outputs"]], "probability", aspect=22)
        for name in ("targets", "outputs"):
            axes[name].set_facecolor("0.92")  # where no answer is asked for

        def side(name: str, title: str, values: Tensor, options: dict) -> None:
            for head in range(values.shape[1]):
                number = f", head {head + 1}" if values.shape[1] > 1 else ""
                vectors = values.shape[2] == width and "weights" not in name
                label = "component" if vectors else "location"
                data = values[:, head] if vectors else values[:, head][:, window]
                cell = axes[f"{name}{head}"]
                image = _heatmap(cell, data, title + number, label, **options)
                if not vectors:
                    _label_locations(cell, window)
                _colorbar(figure, image, [cell], "value" if vectors else "weight")

        reach = math.ceil(10 * max(float(add.abs().max()), float(reads.abs().max()), 0.1)) / 10
        vector_colors = {"cmap": "PuOr_r", "vmin": -reach, "vmax": reach}
        weight_colors = {"cmap": "magma", "vmin": 0, "vmax": 1}
        side("add", "Added vectors", add, vector_colors)
        side("read", "Vectors read", reads, vector_colors)
        side("write weights", "Write weights", write_weights, weight_colors)
        side("read weights", "Read weights", read_weights, weight_colors)
        for cell in axes.values():
            bottom = cell.get_subplotspec().is_last_row()
            cell.tick_params(labelbottom=bottom)
            if bottom:
                cell.set_xlabel("time step")
                cell.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        total = int(answered.sum()) * targets.shape[1]
        verdict = f"{title}: {int(answered.sum())} vectors to answer, {wrong} of {total} bits wrong"
        figure.suptitle(verdict, x=0.01, ha="left", fontsize=11)
        figure.savefig(path)
    return path


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
