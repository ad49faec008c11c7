"""What a run computes is decided by its configuration, and a wrong one is refused before anything is written."""

import math
from dataclasses import asdict, fields, replace

import pytest
import torch
from helpers.training import SMALL, with_model

from ntm_fast.spec import StepOptions
from ntm_fast.training import MODELS, NTM, RunError, TrainConfig, train
from ntm_fast.training.config import changeable, fixed, make_model, make_task


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"task": "juggle"}, "task: got 'juggle', expected one of 'copy' or 'module:Class'"),
        ({"task_options": {"balls": 3}}, "task_options: got 'balls', expected one of 'bits'"),
        ({"task_options": {"bits": 0}}, "bits: got 0, expected an int of at least 1"),
        ({"model_options": {"controller": "rnn"}}, "controller: got 'rnn', expected one of 'lstm', 'gru'"),
        ({"model_options": {"hidden_size": 0}}, "hidden_size: got 0, expected an int of at least 1"),
        ({"model_options": {"hidden_size": 2.5}}, "hidden_size: got 2.5"),
        ({"model": "abacus"}, "model: got 'abacus', expected one of 'ntm' or 'module:Class'"),
        ({"model_options": {"beads": 3}}, "model_options: got 'beads', expected one of 'shift_range'"),
        ({"model_options": {"read_first": 2}}, "read_first: got 2, expected a bool"),
        ({"model_options": {"clip": 0}}, "clip: got 0, expected a number above 0 or None"),
        ({"model_options": 3}, "model_options: got 3, expected a dict"),
        ({"learning_rate": math.nan}, "learning_rate: got nan, expected a number above 0"),
        ({"learning_rate": math.inf}, "learning_rate: got inf"),
        ({"clip_grad": -1.0}, "clip_grad: got -1.0"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**60}, "seed: got 1152921504606846976"),
        ({"threads": 0}, "threads: got 0"),
        ({"model_options": {"shift_range": 64}}, "shift_range: got 64, whose 129 shifts do not fit memory_locations"),
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
    monkeypatch.setattr("ntm_fast.engines.choose.why_not_native", lambda *args: "the kernels are on holiday")
    with pytest.raises(RunError, match="engine='step' cannot serve: the kernels are on holiday"):
        train(with_model(SMALL, engine="step"), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("name", ["controller", "bits", "nonsense"])
def test_options_of_task_and_model_have_their_places(name):
    with pytest.raises(TypeError, match=f"got {name}, which is no option of training: .*model_options="):
        TrainConfig(**{name: 3})
    with pytest.raises(TypeError, match=f"got {name}, which is no option of training"):
        replace(SMALL, **{name: 3})


def test_defaults_are_written():
    config = TrainConfig()
    assert config.task_options == {"bits": 8, "min_length": 1, "max_length": 20, "mixed_lengths": False}
    assert config.model_options == asdict(NTM()) and MODELS[config.model] is NTM
    assert {one.name for one in fields(StepOptions)} < config.model_options.keys()


def test_what_may_change_when_a_run_goes_on():
    assert set(changeable(SMALL)) == {"max_sequences", "device", "threads", "engine"}
    assert {"task", "model", "bits", "hidden_size", "learning_rate"} < fixed(SMALL).keys()
    assert not {"engine", "task_options", "model_options"} & fixed(SMALL).keys()


def test_step_options_reach_the_machine():
    given = {"read_first": True, "key_activation": "identity", "add_activation": "identity", "clip": None}
    config = with_model(SMALL, **given)
    model = make_model(config, make_task(config))
    assert {name: getattr(model, name) for name in given} == given
    assert torch.get_default_dtype() is torch.float32
