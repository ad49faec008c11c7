"""Runs from beginning to end: exact repetition and resumption, signals, solving, clipping, NaN."""

import json
import math
import signal
from dataclasses import replace

import pytest
import torch
from helpers.training import EASY, SMALL, assert_same_run, generator, stop_at, tensors, with_model

from ntm_fast.tasks import CopyTask, answer_loss
from ntm_fast.training import DivergedError, Interrupted, load_run, loop, mean_error, train
from ntm_fast.training.checkpoint import load_checkpoint
from ntm_fast.training.metrics import read_metrics
from ntm_fast.training.run import Run


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
    monkeypatch.setattr(CopyTask, "validate_below", 100.0)  # after every row
    train(SMALL, tmp_path, quiet=True)
    assert all(row.validation is not None for row in read_metrics(tmp_path / "metrics.csv")[:-1])
    mine, other = tensors(tmp_path), tensors(uninterrupted)
    assert all(mine[name].equal(other[name]) for name in mine.keys() - {"validation"})
    assert not mine["validation"].equal(other["validation"])


def test_solves(tmp_path):
    summary = train(EASY, tmp_path, quiet=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["solved"] is True and summary["error"] < 0.01
    assert summary["sequences"] < 20_000 and summary["sequences"] == 16 * summary["updates"]
    assert summary["seconds"] > 0 and set(summary["error_at_length"]) == {"2", "5"}
    assert (summary["task"], summary["model"], summary["controller"], summary["seed"]) == ("copy", "ntm", "lstm", 3)
    assert summary["unit"] == "bits a sequence"
    assert summary["versions"]["torch"] == torch.__version__
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows[-1].sequences == summary["sequences"] and rows[-1].validation == summary["error"]
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
    assert config.task_options == {"bits": 1, "min_length": 1, "max_length": 1, "mixed_lengths": False}
    assert mean_error(model, task, generator(9), 500) < 0.02


@pytest.mark.parametrize("controller", ["gru", "feedforward"])
def test_other_controllers_and_float64(tmp_path, controller):
    config = replace(
        with_model(SMALL, controller=controller, num_layers=2, read_heads=2), dtype="float64", max_sequences=40
    )
    summary = train(config, tmp_path, quiet=True)
    assert summary["solved"] is False and summary["sequences"] == 40
    assert tensors(tmp_path)["heads.weight"].dtype == torch.float64


def test_sequences_of_different_lengths_in_a_batch(tmp_path):
    """They train, are interrupted, and go on to the same end."""
    config = replace(SMALL, task_options={"bits": 2, "max_length": 3, "mixed_lengths": True})
    train(config, tmp_path / "whole", quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 11, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run", quiet=True)
    train(config, tmp_path / "run", resume=True, quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    _, model, task = load_run(tmp_path / "run")
    assert task.batch(9, generator(1)).lengths.unique().tolist() == [3, 5, 7]
    assert 0 <= mean_error(model, task, generator(9), 20) <= 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda(tmp_path):
    config = replace(with_model(SMALL, engine="auto"), device="cuda")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(config, tmp_path, quiet=True)
    assert train(config, tmp_path, resume=True, quiet=True)["sequences"] == 160
    assert train(replace(config, device="cpu"), tmp_path, resume=True, quiet=True)["sequences"] == 160


@pytest.mark.parametrize("by", ["norm", "value"])
def test_clipping(tmp_path, monkeypatch, by):
    run = Run(replace(SMALL, clip_grad=1e-3, clip_grad_by=by), tmp_path)
    loop.update(run)
    gradients = torch.cat([parameter.grad.flatten() for parameter in run.parameters])
    size = gradients.norm() if by == "norm" else gradients.abs().max()
    assert size.item() == pytest.approx(1e-3, rel=1e-3)
    assert run.progress.largest_grad_norm > 0.01, "the norm is taken before clipping"
    free = Run(replace(SMALL, clip_grad=0, clip_grad_by=by), tmp_path)
    loop.update(free)
    gradients = torch.cat([parameter.grad.flatten() for parameter in free.parameters])
    assert gradients.norm().item() == pytest.approx(free.progress.largest_grad_norm, rel=1e-5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_it_is_used(tmp_path, uninterrupted, where):
    count = 0

    def poisoned(task, logits, batch):
        nonlocal count
        count += 1
        loss = answer_loss(logits, batch)
        if count < 12:
            return loss
        if where == "loss":
            return loss * math.nan
        return loss + (loss - loss.detach()).clamp_min(0).sqrt() * 0  # finite, with an infinite derivative times zero

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CopyTask, "loss", poisoned)
        with pytest.raises(DivergedError, match="after 44 sequences"):
            train(SMALL, tmp_path, quiet=True)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").progress["sequences"] == 44
    train(SMALL, tmp_path, resume=True, quiet=True)
    assert_same_run(tmp_path, uninterrupted)


def test_no_checkpoint_with_nan(tmp_path, monkeypatch):
    original = Run.save

    def save(self):
        if self.progress.updates == 40:
            with torch.no_grad():
                self.model.heads.weight[0, 0] = math.inf
        original(self)

    monkeypatch.setattr(Run, "save", save)
    with pytest.raises(DivergedError, match="heads.weight holds a NaN or an infinity after 160 sequences"):
        train(SMALL, tmp_path, quiet=True)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").progress["sequences"] == 0
