"""Checkpoints and folders that cannot be used are refused, and nothing is changed."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.training import SMALL, files, with_model

from ntm_fast.training import CheckpointError, RunError, load_run, train
from ntm_fast.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    restore_model,
    save_checkpoint,
    write_atomically,
)


def change(folder, edit):
    path = folder / "checkpoint.safetensors"
    checkpoint = load_checkpoint(path)
    edit(checkpoint)
    save_checkpoint(path, checkpoint)


def assert_refused(folder, *texts, config=SMALL):
    before = files(folder)
    with pytest.raises(RunError) as caught:
        train(replace(config, max_sequences=1000), folder, resume=True, quiet=True)
    for text in texts:
        assert text in str(caught.value), caught.value
    assert files(folder) == before, "something was overwritten"
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
    train(replace(with_model(SMALL, hidden_size=6), max_sequences=4), tmp_path / "other", quiet=True)
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


def test_infinite_buffers_and_tied_weights(tmp_path):
    """A mask may hold infinities, and two names may be one parameter."""
    model = torch.nn.Module()
    model.first = torch.nn.Linear(2, 2)
    model.second = model.first
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, Checkpoint(model.state_dict(), {}, {}, {}, {}))
    with torch.no_grad():
        expected = model.first.weight.clone()
        model.first.weight.zero_()
    restore_model(path, load_checkpoint(path), model)
    assert model.second.weight.equal(expected) and model.mask[1] == -math.inf


def test_folder_with_a_run_is_refused(run_folder):
    before = files(run_folder)
    with pytest.raises(RunError, match="already holds a run"):
        train(SMALL, run_folder, quiet=True)
    assert files(run_folder) == before


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written to: Not a directory"):
        train(SMALL, tmp_path / "file" / "run", quiet=True)
