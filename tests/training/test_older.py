"""Runs written before there were models to choose from are loaded, evaluated, drawn and gone on with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.training import SMALL, assert_same_run, copied, rows, tensors

from ntm_fast.tasks import CopyTask
from ntm_fast.training import draw, evaluate, load_run, train
from ntm_fast.training.checkpoint import load_checkpoint, save_checkpoint
from ntm_fast.training.older import upgrade_config

OLD = Path(__file__).parent / "run_before_models"  # SMALL as version 0.1.0 trained it, stopped after 76 sequences


@pytest.fixture
def old(tmp_path):
    return copied(OLD, tmp_path / "old")


def test_load_evaluate_draw(old):
    config, model, task = load_run(old)
    assert config.model == "ntm" and config.model_options == SMALL.model_options
    assert task == CopyTask(bits=2, max_length=3)
    # What that version said of it, of 200 sequences each.
    assert evaluate(model, task, (10, 20), seed=3) == pytest.approx({10: 8.955, 20: 18.8}, abs=0.05)
    assert [path.name for path in draw(old, config, model, task, length=3)] == ["learning_curve.png", "memory.png"]
    assert load_run(old, engine="step")[0].model_options["engine"] == "step"


def test_go_on(old, uninterrupted):
    """The numbers of another processor may differ in their last digits; the draws may not."""
    train(SMALL, old, resume=True, quiet=True)
    mine, today = tensors(old), tensors(uninterrupted)
    for name, tensor in today.items():
        if tensor.dtype is torch.uint8:  # the state of a generator
            assert mine[name].equal(tensor), name
        else:
            torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert [row.sequences for row in rows(old)] == [row.sequences for row in rows(uninterrupted)]
    assert json.loads((old / "config.json").read_text())["model"] == "ntm"


def written_as_before(folder):
    """Put a run of today into the words of version 0.1.0."""
    config = json.loads((folder / "config.json").read_text())
    of_the_time = json.loads((OLD / "config.json").read_text())
    flat = {**config, **config["model_options"]}
    assert upgrade_config(of_the_time)["model_options"].keys() <= config["model_options"].keys()
    flat = {name: flat[name] for name in of_the_time}
    (folder / "config.json").write_text(json.dumps(flat))
    path = folder / "checkpoint.safetensors"
    checkpoint = load_checkpoint(path)
    progress = {{"row_error": "row_wrong_bits"}.get(name, name): value for name, value in checkpoint.progress.items()}
    assert progress.keys() == load_checkpoint(OLD / "checkpoint.safetensors").progress.keys()
    save_checkpoint(path, checkpoint._replace(config=flat, progress=progress))
    metrics = folder / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("loss,error", "loss,bits_per_sequence"))
    assert metrics.read_text().splitlines()[0] == (OLD / "metrics.csv").read_text().splitlines()[0]


def test_go_on_bit_for_bit(tmp_path, uninterrupted):
    train(replace(SMALL, max_sequences=76), tmp_path, quiet=True)
    written_as_before(tmp_path)
    train(SMALL, tmp_path, resume=True, quiet=True)
    assert_same_run(tmp_path, uninterrupted)
