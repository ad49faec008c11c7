"""What is measured while training: the loss, the error in bits per sequence, and the table they are written to."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..tasks import Batch
from .checkpoint import write_atomically


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean binary cross-entropy, in nats a bit, over the answers: logits (T, B, O) -> scalar."""
    loss = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none")
    mask = batch.mask.unsqueeze(-1)
    # where, not a product: what is outside the answer must not matter even if it is infinite
    return loss.where(mask, 0).sum() / (mask.sum() * logits.shape[-1])


def wrong_bits(logits: Tensor, batch: Batch) -> Tensor:
    """The number of wrongly answered bits, over all sequences of the batch: logits (T, B, O) -> integer scalar.

    A bit is answered 1 where its logit is positive and 0 elsewhere; NaN is always wrong.
    """
    right = (logits > 0).where(batch.targets > 0.5, logits <= 0)
    return (~right & batch.mask.unsqueeze(-1)).sum()


class Row(NamedTuple):
    """One line of ``metrics.csv``: what happened since the line before."""

    sequences: int  # trained on since the beginning
    seconds: float  # since the beginning, validation included
    loss: float  # mean over the updates, nats a bit
    bits_per_sequence: float  # mean error while training; all training sequences are fresh
    grad_norm: float  # the largest before clipping
    sequences_per_second: float
    validation: float | None  # error in bits a sequence over fresh sequences; rough where it was given up early


class MetricsFile:
    """``metrics.csv``, one line at a time."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        """Open ``path``, keeping only the lines of the first ``keep`` sequences: a run goes on from its checkpoint,
        which may be older than the last line."""
        rows = [row for row in read_metrics(path) if row.sequences <= keep] if keep and path.exists() else []
        lines = [",".join(texts) for texts in (Row._fields, *map(_texts, rows))]
        write_atomically(path, ("\n".join(lines) + "\n").encode())
        self._file = open(path, "a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def append(self, row: Row) -> None:
        self._writer.writerow(_texts(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _texts(row: Row) -> list[str]:
    texts = row._asdict()
    for name in ("loss", "bits_per_sequence", "grad_norm", "validation"):
        texts[name] = "" if texts[name] is None else f"{texts[name]:.9g}"
    texts["seconds"] = f"{row.seconds:.3f}"
    texts["sequences_per_second"] = f"{row.sequences_per_second:.1f}"
    return [str(text) for text in texts.values()]


def read_metrics(path: Path) -> list[Row]:
    """The lines of a ``metrics.csv``. Raises ValueError where it is not one."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != Row._fields:
        raise ValueError(f"{path}: expected the columns {', '.join(Row._fields)}")
    try:
        return [
            Row(int(row[0]), *(float(x) if x else None for x in row[1:]))
            for row in rows[1:]
            if len(row) == len(Row._fields)  # the last line may have been cut off
        ]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
