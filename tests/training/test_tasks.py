"""The copy task, what bits are measured by, and the cases of a task."""

import math

import pytest
import torch
from helpers.training import generator

from ntm_fast.tasks import TASKS, Batch, CopyTask, answer_loss, axis_values, wrong_bits


def test_copy_by_hand():
    batch = CopyTask(bits=2).batch(1, generator(5), length=3)
    a, b, c = batch.targets[4:, 0].tolist()
    assert batch.inputs[:, 0].tolist() == [[*a, 0], [*b, 0], [*c, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert batch.targets[:4].eq(0).all()
    assert batch.mask[:, 0].tolist() == [False] * 4 + [True] * 3
    assert batch.mask.dtype == torch.bool and batch.inputs.dtype == torch.float32


def test_copy_standard_job():
    task = TASKS["copy"]()
    batch = task.batch(32, generator(), length=20)
    assert (task.input_size, task.output_size, task.name) == (9, 8, "copy")
    assert batch.inputs.shape == (41, 32, 9) and batch.targets.shape == (41, 32, 8) and batch.mask.shape == (41, 32)
    assert batch.inputs[:20, :, :8].equal(batch.targets[21:])
    assert batch.inputs.unique().tolist() == [0, 1]
    assert 0.45 < batch.targets[21:].mean() < 0.55
    assert batch.targets[21:, 0].ne(batch.targets[21:, 1]).any(), "sequences of a batch must differ"


def test_copy_draws():
    task = CopyTask(min_length=2, max_length=6)
    one, other = generator(1), generator(1)
    lengths = []
    for _ in range(400):
        batch, again = task.batch(1, one), task.batch(1, other)
        assert all(map(torch.equal, batch[:3], again[:3])) and batch.lengths is None
        lengths.append(len(batch.inputs) // 2)
    counts = [lengths.count(length) for length in range(2, 7)]
    assert sum(counts) == 400 and min(counts) > 50, counts
    before = torch.get_rng_state()
    task.batch(3, one)
    assert torch.get_rng_state().equal(before), "a draw came from the global generator"


def test_copy_of_mixed_lengths():
    """Each sequence is what it would be alone, then nothing."""
    task = CopyTask(min_length=2, max_length=6, mixed_lengths=True)
    one = generator(1)
    met = set()
    for _ in range(20):
        batch = task.batch(7, one)
        met |= set(batch.lengths.tolist())
        for b, steps in enumerate(batch.lengths.tolist()):
            length = steps // 2
            inputs, targets, mask = (x[:, b] for x in batch[:3])
            assert inputs[:length, :8].equal(targets[length + 1 : steps]) and inputs[length].tolist() == [0] * 8 + [1]
            assert mask.tolist() == [length < t < steps for t in range(len(mask))]
            assert not inputs[length + 1 :].any() and inputs[:, 8].count_nonzero() == 1
            assert not targets[~mask].any()
    assert met == {2 * length + 1 for length in range(2, 7)}
    assert task.batch(7, one, length=4).lengths is None
    # The published draw is what it was before there was a choice.
    again = CopyTask(min_length=2, max_length=6).batch(7, generator(1))
    length = int(torch.randint(2, 7, (), generator=generator(1)))
    assert len(again.inputs) == 2 * length + 1


def test_copy_refuses():
    for options, name in (
        ({"bits": 0}, "bits: got 0"),
        ({"min_length": 0}, "min_length: got 0"),
        ({"min_length": 5, "max_length": 4}, "max_length: got 4, expected at least min_length = 5"),
        ({"bits": 1.5}, "bits: got 1.5"),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            CopyTask(**options)
    with pytest.raises(ValueError, match="batch_size"):
        CopyTask().batch(0, generator())


def hand_made():
    """Two sequences of three steps, two bits; the answer is the last two steps of one, the last of the other."""
    logits = torch.tensor([[[9.0, 9.0], [9.0, 9.0]], [[1.0, -1.0], [9.0, 9.0]], [[0.0, 2.0], [-3.0, 0.5]]])
    targets = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    mask = torch.tensor([[False, False], [True, False], [True, True]])
    return logits, Batch(torch.zeros(3, 2, 1), targets, mask)


def test_wrong_bits_by_hand():
    logits, batch = hand_made()
    # Of the first sequence one bit is wrong (-1 for 1; a logit of 0 answers 0), of the second both.
    assert wrong_bits(logits, batch) == 3
    logits[2, 0, 0] = math.nan  # would answer 0, which is right
    assert wrong_bits(logits, batch) == 4


def test_answer_loss_by_hand():
    logits, batch = hand_made()
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = (softplus(-1) + softplus(1) + math.log(2) + softplus(-2) + softplus(3) + softplus(0.5)) / 6
    assert answer_loss(logits, batch).item() == pytest.approx(expected, rel=1e-6)


def test_outside_the_answer_nothing_counts():
    logits, batch = hand_made()
    expected = answer_loss(logits, batch)
    logits[0] = math.inf
    logits.requires_grad_()
    loss = answer_loss(logits, batch)
    loss.backward()
    assert loss == expected
    assert logits.grad[0].eq(0).all() and logits.grad[1, 1].eq(0).all()


def test_axis_values():
    assert axis_values(CopyTask(), 7) == axis_values(CopyTask(), (7,)) == {"length": 7}
    with pytest.raises(ValueError, match=r"case: got \(7, 2\), expected a value for each of \(length\)"):
        axis_values(CopyTask(), (7, 2))
