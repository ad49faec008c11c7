"""The copy task, what is measured, and runs: exact resumption, damaged checkpoints, NaN, folders, pictures."""

import csv
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from ntm_fast import FastNTM
from ntm_fast.tasks import TASKS, Batch, CopyTask
from ntm_fast.training import (
    CheckpointError,
    DivergedError,
    Interrupted,
    RunError,
    TrainConfig,
    answer_loss,
    evaluate,
    load_run,
    loop,
    mean_error,
    train,
    wrong_bits,
)
from ntm_fast.training.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from ntm_fast.training.metrics import MetricsFile, Row, read_metrics

SMALL = TrainConfig(
    task_options={"bits": 2, "max_length": 3},
    hidden_size=8,
    memory_locations=8,
    memory_width=4,
    batch_size=4,
    learning_rate=3e-3,
    validate_every=30,  # not a multiple of the batch: rows end between updates
    max_sequences=160,
    seed=3,
    engine="reference",
    threads=1,
)
EASY = replace(
    SMALL, task_options={"bits": 1, "max_length": 1}, batch_size=16, validate_every=160, max_sequences=20_000
)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C works, though a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _short_evaluation(monkeypatch):
    monkeypatch.setattr(loop, "EVALUATION_SEQUENCES", 2)
    monkeypatch.setattr(CopyTask, "evaluation_lengths", (2, 5))
    monkeypatch.setattr(loop, "draw", lambda *args, **kwargs: [])  # what draws has tests of its own


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the copy task ----------------------------------------------------------------------------------------------------


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
        assert all(map(torch.equal, batch, again))
        lengths.append(len(batch.inputs) // 2)
    counts = [lengths.count(length) for length in range(2, 7)]
    assert sum(counts) == 400 and min(counts) > 50, counts
    before = torch.get_rng_state()
    task.batch(3, one)
    assert torch.get_rng_state().equal(before), "a draw came from the global generator"


def test_copy_refuses():
    for options, name in (
        ({"bits": 0}, "bits: got 0"),
        ({"min_length": 0}, "min_length: got 0"),
        ({"min_length": 5, "max_length": 4}, "max_length: got 4, expected an integer of at least 5"),
        ({"bits": 1.5}, "bits: got 1.5"),
    ):
        with pytest.raises(ValueError, match=name):
            CopyTask(**options)
    with pytest.raises(ValueError, match="batch_size"):
        CopyTask().batch(0, generator())


# --- what is measured -------------------------------------------------------------------------------------------------


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
    assert oracle.seen == loop.VALIDATION_BATCH
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


def test_metrics_file(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [Row(16 * n, n / 3, 0.1 * n, 1.0, 2.5, 16.0, None if n % 2 else 0.25) for n in range(1, 4)]
    file = MetricsFile(path)
    for row in rows:
        file.append(row)
    file.close()
    with open(path, newline="") as text:
        assert next(csv.reader(text))[:6] == [
            "sequences", "seconds", "loss", "bits_per_sequence", "grad_norm", "sequences_per_second",
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


# --- a run from beginning to end --------------------------------------------------------------------------------------


def tensors(folder):
    checkpoint = load_checkpoint(folder / "checkpoint.safetensors")
    return {**checkpoint.model, **checkpoint.optimizer, **checkpoint.generators}


def assert_same_run(one, other):
    """Bit for bit: parameters, optimizer, generators, counters, and what metrics.csv says but for times."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].equal(second[name]), name
    progress = [load_checkpoint(folder / "checkpoint.safetensors").progress for folder in (one, other)]
    for name in progress[0].keys() - {"seconds", "row_seconds"}:
        assert progress[0][name] == progress[1][name], name
    rows = [
        [row._replace(seconds=0, sequences_per_second=0) for row in read_metrics(folder / "metrics.csv")]
        for folder in (one, other)
    ]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw", lambda *args, **kwargs: [])
        train(SMALL, folder, quiet=True)
    return folder


def stop_at(monkeypatch, update, action):
    """Do ``action`` after that many updates."""
    original, count = loop._Run.update, 0

    def patched(self):
        nonlocal count
        original(self)
        count += 1
        if count == update:
            action()

    monkeypatch.setattr(loop._Run, "update", patched)


def test_repeats_exactly(tmp_path, uninterrupted):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(SMALL, tmp_path, quiet=True)
    assert_same_run(tmp_path, uninterrupted)
    assert torch.get_rng_state().equal(before), "training touched the global generator"
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_interrupted_and_resumed(tmp_path, uninterrupted, optimizer, number):
    config = replace(SMALL, optimizer=optimizer)
    whole = uninterrupted
    if optimizer != SMALL.optimizer:
        whole = tmp_path / "whole"
        train(config, whole, quiet=True)
    folder = tmp_path / "run"
    for update, sequences in ((11, 44), (3, 56), (1, 60)):  # within a row, again, and at the end of one
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, update, lambda: signal.raise_signal(number))
            with pytest.raises(Interrupted, match=f"after {sequences} sequences"):
                train(config, folder, resume=sequences > 44, quiet=True)
        assert not (folder / "summary.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(config, folder, resume=True, quiet=True)
    assert_same_run(folder, whole)


def test_second_signal_acts_at_once(tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_at(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, tmp_path, quiet=True)


def test_killed_after_an_old_checkpoint(tmp_path, uninterrupted):
    """Lines of metrics.csv later than the checkpoint are written again, not twice."""

    def die():
        raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 30, die)
        with pytest.raises(ZeroDivisionError):
            train(SMALL, tmp_path, quiet=True)
    assert len(read_metrics(tmp_path / "metrics.csv")) > 0
    train(SMALL, tmp_path, resume=True, quiet=True)
    assert_same_run(tmp_path, uninterrupted)


def test_longer_than_planned(tmp_path, uninterrupted):
    train(replace(SMALL, max_sequences=76), tmp_path, quiet=True)  # ends within a row
    assert read_metrics(tmp_path / "metrics.csv")[-1].sequences == 76
    train(SMALL, tmp_path, resume=True, quiet=True)
    assert_same_run(tmp_path, uninterrupted)
    assert json.loads((tmp_path / "config.json").read_text())["max_sequences"] == 160


def test_validation_does_not_disturb_training(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setattr(loop, "VALIDATE_BELOW", 100.0)  # after every row
    train(SMALL, tmp_path, quiet=True)
    assert all(row.validation is not None for row in read_metrics(tmp_path / "metrics.csv")[:-1])
    mine, other = tensors(tmp_path), tensors(uninterrupted)
    assert all(mine[name].equal(other[name]) for name in mine.keys() - {"validation"})
    assert not mine["validation"].equal(other["validation"])


def test_solves(tmp_path):
    summary = train(EASY, tmp_path, quiet=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["solved"] is True and summary["bits_per_sequence"] < 0.01
    assert summary["sequences"] < 20_000 and summary["sequences"] == 16 * summary["updates"]
    assert summary["seconds"] > 0 and set(summary["error_at_length"]) == {"2", "5"}
    assert (summary["task"], summary["controller"], summary["seed"]) == ("copy", "lstm", 3)
    assert summary["versions"]["torch"] == torch.__version__
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows[-1].sequences == summary["sequences"] and rows[-1].validation == summary["bits_per_sequence"]
    assert max(row.grad_norm for row in rows) == pytest.approx(summary["largest_grad_norm"], rel=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "metrics.csv", "summary.json", "checkpoint.safetensors",
    }  # fmt: skip
    weights = tensors(tmp_path)
    again = train(EASY, tmp_path, resume=True, quiet=True)  # nothing is left to do
    assert again["sequences"] == summary["sequences"]
    assert all(tensors(tmp_path)[name].equal(weights[name]) for name in weights)
    config, model, task = load_run(tmp_path)
    assert config == EASY and task == CopyTask(bits=1, max_length=1)
    assert config.task_options == {"bits": 1, "min_length": 1, "max_length": 1}
    assert mean_error(model, task, generator(9), 500) < 0.02


@pytest.mark.parametrize("controller", ["gru", "feedforward"])
def test_other_controllers_and_float64(tmp_path, controller):
    config = replace(SMALL, controller=controller, dtype="float64", num_layers=2, read_heads=2, max_sequences=40)
    summary = train(config, tmp_path, quiet=True)
    assert summary["solved"] is False and summary["sequences"] == 40
    assert tensors(tmp_path)["heads.weight"].dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda(tmp_path):
    config = replace(SMALL, device="cuda", engine="auto")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(config, tmp_path, quiet=True)
    assert train(config, tmp_path, resume=True, quiet=True)["sequences"] == 160
    assert train(replace(config, device="cpu"), tmp_path, resume=True, quiet=True)["sequences"] == 160


@pytest.mark.parametrize("by", ["norm", "value"])
def test_clipping(tmp_path, monkeypatch, by):
    run = loop._Run(replace(SMALL, clip_grad=1e-3, clip_grad_by=by), tmp_path)
    run.update()
    gradients = torch.cat([parameter.grad.flatten() for parameter in run.parameters])
    size = gradients.norm() if by == "norm" else gradients.abs().max()
    assert size.item() == pytest.approx(1e-3, rel=1e-3)
    assert run.progress.largest_grad_norm > 0.01, "the norm is taken before clipping"
    free = loop._Run(replace(SMALL, clip_grad=0, clip_grad_by=by), tmp_path)
    free.update()
    gradients = torch.cat([parameter.grad.flatten() for parameter in free.parameters])
    assert gradients.norm().item() == pytest.approx(free.progress.largest_grad_norm, rel=1e-5)


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_it_is_used(tmp_path, uninterrupted, where):
    count = 0

    def poisoned(logits, batch):
        nonlocal count
        count += 1
        loss = answer_loss(logits, batch)
        if count < 12:
            return loss
        if where == "loss":
            return loss * math.nan
        return loss + (loss - loss.detach()).clamp_min(0).sqrt() * 0  # finite, with an infinite derivative times zero

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "answer_loss", poisoned)
        with pytest.raises(DivergedError, match="after 44 sequences"):
            train(SMALL, tmp_path, quiet=True)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").progress["sequences"] == 44
    train(SMALL, tmp_path, resume=True, quiet=True)
    assert_same_run(tmp_path, uninterrupted)


def test_no_checkpoint_with_nan(tmp_path, monkeypatch):
    original = loop._Run.save

    def save(self):
        if self.progress.updates == 40:
            with torch.no_grad():
                self.model.heads.weight[0, 0] = math.inf
        original(self)

    monkeypatch.setattr(loop._Run, "save", save)
    with pytest.raises(DivergedError, match="heads.weight holds a NaN or an infinity after 160 sequences"):
        train(SMALL, tmp_path, quiet=True)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").progress["sequences"] == 0


# --- checkpoints that cannot be used ----------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    folder.mkdir()
    for path in uninterrupted.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change(folder, edit):
    path = folder / "checkpoint.safetensors"
    checkpoint = load_checkpoint(path)
    edit(checkpoint)
    save_checkpoint(path, checkpoint)


def assert_refused(folder, *texts, config=SMALL):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunError) as caught:
        train(replace(config, max_sequences=1000), folder, resume=True, quiet=True)
    for text in texts:
        assert text in str(caught.value), caught.value
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "something was overwritten"
    return caught.value


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, -1])
def test_truncated(run_folder, keep):
    path = run_folder / "checkpoint.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert isinstance(assert_refused(run_folder, str(path), "damaged or cut off"), CheckpointError)
    with pytest.raises(CheckpointError):
        load_run(run_folder)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "group, name", [("model", "controller.weight_hh_l0"), ("optimizer", "heads.bias.square_avg")]
)
def test_nan_in_checkpoint(run_folder, group, name, value):
    change(run_folder, lambda checkpoint: getattr(checkpoint, group)[name].view(-1)[7].fill_(value))
    assert_refused(run_folder, f"{group} {name} holds 1 values that are NaN or infinite")


def test_checkpoint_of_another_model(run_folder):
    def widen(checkpoint):
        checkpoint.model["heads.weight"] = torch.zeros(3, 5)

    change(run_folder, widen)
    assert_refused(run_folder, "another model", "parameter heads.weight: got shape (3, 5) float32, expected shape (")
    change(run_folder, lambda checkpoint: checkpoint.model.pop("heads.weight"))
    assert_refused(run_folder, "parameter heads.weight: got nothing, expected shape (")


def test_optimizer_of_another_model(run_folder):
    def swap(checkpoint):
        checkpoint.optimizer["nobody.square_avg"] = checkpoint.optimizer.pop("heads.bias.square_avg")

    change(run_folder, swap)
    assert_refused(run_folder, "nobody.square_avg belongs to no parameter")


def test_checkpoint_of_another_run(run_folder, tmp_path):
    train(replace(SMALL, hidden_size=6, max_sequences=4), tmp_path / "other", quiet=True)
    (run_folder / "checkpoint.safetensors").write_bytes((tmp_path / "other" / "checkpoint.safetensors").read_bytes())
    assert_refused(run_folder, "another model", "hidden_size: got 6, expected 8")


def test_not_a_checkpoint(run_folder):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, run_folder / "checkpoint.safetensors")
    assert_refused(run_folder, "not a checkpoint of ntm_fast")
    (run_folder / "checkpoint.safetensors").unlink()
    assert_refused(run_folder, "there is no such file")


def test_resume_with_another_configuration(run_folder):
    assert_refused(run_folder, "batch_size: got 5, expected 4 as in", config=replace(SMALL, batch_size=5))
    fewer = {"bits": 1, "max_length": 3}
    assert_refused(run_folder, "bits: got 1, expected 2", config=replace(SMALL, task_options=fewer))
    (run_folder / "config.json").write_text('{"hidden": 3}')
    assert_refused(run_folder, "unknown field 'hidden'")
    (run_folder / "config.json").write_text("{")
    assert_refused(run_folder, "config.json: cannot be read")


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args):
        raise OSError("no")

    monkeypatch.setattr("ntm_fast.training.checkpoint.os.replace", fail)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# --- folders and configurations ---------------------------------------------------------------------------------------


def test_folder_with_a_run_is_refused(run_folder):
    before = {path.name: path.read_bytes() for path in run_folder.iterdir()}
    with pytest.raises(RunError, match="already holds a run"):
        train(SMALL, run_folder, quiet=True)
    assert {path.name: path.read_bytes() for path in run_folder.iterdir()} == before


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written to: Not a directory"):
        train(SMALL, tmp_path / "file" / "run", quiet=True)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"task": "juggle"}, "task: got 'juggle', expected one of 'copy'"),
        ({"task_options": {"balls": 3}}, "task_options: got 'balls', expected one of 'bits'"),
        ({"task_options": {"bits": 0}}, "bits: got 0, expected an integer of at least 1"),
        ({"controller": "rnn"}, "controller: got 'rnn', expected one of 'lstm', 'gru', 'feedforward'"),
        ({"hidden_size": 0}, "hidden_size: got 0, expected an integer of at least 1"),
        ({"hidden_size": 2.5}, "hidden_size: got 2.5"),
        ({"learning_rate": math.nan}, "learning_rate: got nan, expected a number above 0"),
        ({"learning_rate": math.inf}, "learning_rate: got inf"),
        ({"clip_grad": -1.0}, "clip_grad: got -1.0"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**60}, "seed: got 1152921504606846976"),
        ({"threads": 0}, "threads: got 0"),
        ({"shift_range": 4}, "shift_range: got 4, whose 9 shifts do not fit memory_locations = 8"),
        ({"device": "teapot"}, "device: got 'teapot'"),
        ({"device": "meta"}, "device: got 'meta'"),
    ],
)
def test_bad_configuration(tmp_path, changes, text):
    with pytest.raises(RunError) as caught:
        train(replace(SMALL, **changes), tmp_path / "run", quiet=True)
    assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_engine_that_cannot_serve(tmp_path, monkeypatch):
    monkeypatch.setattr("ntm_fast.ops.why_not_native", lambda *args: "the kernels are on holiday")
    with pytest.raises(RunError, match="engine='step' cannot serve: the kernels are on holiday"):
        train(replace(SMALL, engine="step"), tmp_path / "run", quiet=True)


# --- pictures ---------------------------------------------------------------------------------------------------------


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
    assert is_picture(memory_picture(tmp_path / "memory.png", model, CopyTask(bits=2).batch(2, generator(), 4), "Copy"))


@pytest.mark.parametrize("count", [0, 1, 30])
def test_learning_curve(tmp_path, count):
    from ntm_fast.training.plots import learning_curve

    rows = [Row(100 * (n + 1), n, 0.5, 30 / (n + 1) ** 2, n, 1.0, 0.0 if n > 20 else None) for n in range(count)]
    assert is_picture(learning_curve(tmp_path / "curve.png", rows, "Copy", solved=0.01))


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


# --- imports ----------------------------------------------------------------------------------------------------------


def test_the_library_does_not_import_training():
    code = (
        "import sys, ntm_fast; "
        "found = [n for n in sys.modules if n.startswith(('ntm_fast.tasks', 'ntm_fast.training', 'ntm_fast.cli', "
        "'matplotlib', 'safetensors'))]; assert not found, found; "
        "import ntm_fast.training, ntm_fast.cli; "
        "found = [n for n in sys.modules if n.split('.')[0] in ('matplotlib', 'safetensors')]; "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
