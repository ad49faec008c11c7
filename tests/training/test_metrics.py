"""metrics.csv."""

import csv

import pytest

from ntm_fast.training.metrics import MetricsFile, Row, read_metrics


def test_metrics_file(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [Row(16 * n, n / 3, 0.1 * n, 1.0, 2.5, 16.0, None if n % 2 else 0.25) for n in range(1, 4)]
    file = MetricsFile(path)
    for row in rows:
        file.append(row)
    file.close()
    with open(path, newline="") as text:
        assert next(csv.reader(text))[:6] == [
            "sequences", "seconds", "loss", "error", "grad_norm", "sequences_per_second",
        ]  # fmt: skip
    read = read_metrics(path)
    assert [row.sequences for row in read] == [16, 32, 48] and [row.validation for row in read] == [None, 0.25, None]
    assert [row.loss for row in read] == pytest.approx([row.loss for row in rows], rel=1e-8)
    path.write_text(path.read_text()[:-20])  # cut off, as by a power failure
    MetricsFile(path, keep=32).close()
    assert read_metrics(path) == read[:2]
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="expected the columns sequences"):
        read_metrics(path)
