"""The mean error over fresh sequences."""

import torch
from helpers.training import generator
from torch import nn

from ntm_fast import FastNTM
from ntm_fast.tasks import CopyTask
from ntm_fast.training import evaluate, mean_error
from ntm_fast.training.evaluation import VALIDATION_BATCH


class Oracle(nn.Module):
    """Copies, except that it answers every bit of every ``wrong_every``-th sequence the wrong way."""

    def __init__(self, wrong_every=None):
        super().__init__()
        self.heads = nn.Linear(1, 1)
        self.wrong_every, self.seen = wrong_every, 0

    def forward(self, inputs):
        length = len(inputs) // 2
        outputs = torch.cat([torch.zeros(length + 1, *inputs.shape[1:]), inputs[:length]])[..., :-1] - 0.5
        for index in range(inputs.shape[1]):
            self.seen += 1
            if self.wrong_every and self.seen % self.wrong_every == 0:
                outputs[:, index] *= -1
        return outputs, None


def test_mean_error():
    task = CopyTask()
    assert mean_error(Oracle(), task, generator(), 60) == 0
    assert mean_error(Oracle(10), task, generator(), 100, length=4) == 4 * 8 / 10
    oracle = Oracle()
    mean_error(oracle, task, generator(), 60)
    assert oracle.seen == 60


def test_mean_error_gives_up():
    oracle = Oracle(1)
    assert mean_error(oracle, CopyTask(), generator(), 1000, length=2, give_up_at=0.01) == 16
    assert oracle.seen == VALIDATION_BATCH
    almost = Oracle(200)  # 5 sequences of 1000, 8 bits each
    assert mean_error(almost, CopyTask(), generator(), 1000, length=1, give_up_at=0.05) == 0.04
    assert almost.seen == 1000


def test_evaluate_repeats():
    torch.manual_seed(0)
    model = FastNTM(3, 2, 8, memory_locations=8, memory_width=4, engine="reference")
    task = CopyTask(bits=2)
    first = evaluate(model, task, (1, 4), sequences=20)
    assert first == evaluate(model, task, (1, 4), sequences=20) and set(first) == {1, 4}
    assert first[4] == evaluate(model, task, (4,), sequences=20)[4]
    assert first != evaluate(model, task, (1, 4), sequences=20, seed=1)


class Mood(Oracle):
    """Answers wrongly while it is in training, as dropout may make it."""

    def forward(self, inputs):
        outputs, state = super().forward(inputs)
        return -outputs if self.training else outputs, state


def test_not_in_training():
    model = Mood()
    assert mean_error(model, CopyTask(), generator(), 10) == 0 and model.training
    model.eval()
    assert mean_error(model, CopyTask(), generator(), 10) == 0 and not model.training
