"""``metrics.csv``: what is measured while training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from .checkpoint import write_atomically
from .older import upgrade_columns


class Row(NamedTuple):
    """One line of ``metrics.csv``: what happened since the line before."""

    sequences: int  # trained on since the beginning
    seconds: float  # since the beginning, validation included
    loss: float  # mean over the updates
    error: float  # mean over the training sequences, all of which are fresh; in the task's unit
    grad_norm: float  # the largest before clipping
    sequences_per_second: float
    validation: float | None  # mean error over other fresh sequences; rough where validation was given up early


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
    texts: dict[str, object] = row._asdict()
    for name in ("loss", "error", "grad_norm", "validation"):
        texts[name] = "" if texts[name] is None else f"{texts[name]:.9g}"
    texts["seconds"] = f"{row.seconds:.3f}"
    texts["sequences_per_second"] = f"{row.sequences_per_second:.1f}"
    return [str(text) for text in texts.values()]


def read_metrics(path: Path) -> list[Row]:
    """The lines of a ``metrics.csv``, of this or an earlier version. Raises ValueError where it is not one."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(upgrade_columns(rows[0])) != Row._fields:
        raise ValueError(f"{path}: expected the columns {', '.join(Row._fields)}")
    try:
        return [
            Row._make([int(row[0]), *map(float, row[1:-1]), float(row[-1]) if row[-1] else None])
            for row in rows[1:]
            if len(row) == len(Row._fields)  # the last line may have been cut off
        ]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
