"""Pictures are drawn, of every shape of machine and of runs of any length."""

import pytest
import torch
from helpers.training import generator

from ntm_fast import FastNTM
from ntm_fast.tasks import CopyTask
from ntm_fast.training.metrics import Row


def is_picture(path):
    from matplotlib.image import imread

    pixels = imread(path)
    return path.read_bytes().startswith(b"\x89PNG") and pixels.shape[1] > 800 and pixels.std() > 0.05


@pytest.mark.parametrize("readers, writers", [(1, 1), (1, 3), (2, 1)])
def test_memory_picture(tmp_path, readers, writers):
    from ntm_fast.training.plots import memory_picture

    model = FastNTM(
        3, 2, 8, memory_locations=16, memory_width=4, read_heads=readers, write_heads=writers, engine="reference"
    )
    task = CopyTask(bits=2)
    assert is_picture(memory_picture(tmp_path / "memory.png", model, task, task.batch(2, generator(), 4), "Copy"))


def test_answer_picture(tmp_path):
    from ntm_fast.training.plots import answer_picture

    task = CopyTask(bits=2)
    model = Answers(3, 2)
    assert is_picture(answer_picture(tmp_path / "answer.png", model, task, task.batch(2, generator(), 4), "Copy"))


class Answers(torch.nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs), None


@pytest.mark.parametrize("solved", [0.01, 3.0])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_learning_curve(tmp_path, count, solved):
    from ntm_fast.training.plots import learning_curve

    rows = [Row(100 * (n + 1), n, 0.5, 30 / (n + 1) ** 2, n, 1.0, 0.0 if n > 20 else None) for n in range(count)]
    assert is_picture(learning_curve(tmp_path / "curve.png", rows, "Copy", unit="bits", solved=solved))


def test_visited_locations():
    from ntm_fast.training.plots import _visited

    def window(*used):
        weights = torch.zeros(20)
        weights[list(used)] = 1
        return _visited(weights)

    assert window(5, 8) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert window(19, 1) == [17, 18, 19, 0, 1, 2, 3]
    assert window(7) == [5, 6, 7, 8, 9]
    assert window() == list(range(20))
    assert window(*range(0, 20, 3)) == list(range(20))
