"""Bad options, inputs, states and parameters: the error names the argument, what it was, what it must be."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.cases import OTHER_OPTIONS
from helpers.machines import CLOSE, ENGINE_CONTROLLERS, SIZES, flat, make, skip_without_sequence, some
from torch import Tensor, nn

from ntm_fast import FastNTM, NTMCell, NTMState, ops
from ntm_fast.spec import NTMConfig

pytestmark = pytest.mark.usefixtures("made_on_the_backend")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        *(
            ({name: 0}, ValueError, (name, "0", "at least 1"))
            for name in (
                "input_size", "output_size", "hidden_size", "num_layers", "memory_locations", "memory_width",
                "read_heads", "write_heads",
            )
        ),
        ({"input_size": -3}, ValueError, ("input_size", "-3")),
        ({"shift_range": -1}, ValueError, ("shift_range", "-1")),
        ({"shift_range": 4}, ValueError, ("shift_range", "4", "memory_locations", "7", "at most 3")),
        ({"hidden_size": 2.0}, TypeError, ("hidden_size", "2.0", "int")),
        ({"hidden_size": "5"}, TypeError, ("hidden_size", "'5'", "int")),
        ({"read_heads": True}, TypeError, ("read_heads", "True", "int")),
        ({"shift_range": None}, TypeError, ("shift_range", "None", "int")),
        ({"controller": "LSTM"}, ValueError, ("controller", "'LSTM'", "'lstm'", "'gru'", "'feedforward'")),
        ({"controller": None}, ValueError, ("controller", "None")),
        ({"controller": []}, ValueError, ("controller", "[]")),
        ({"memory_init": "zeros"}, ValueError, ("memory_init", "'zeros'", "'constant'", "'learned'", "'random'")),
        ({"key_activation": "relu"}, ValueError, ("key_activation", "'relu'", "'tanh'", "'identity'")),
        ({"add_activation": "relu"}, ValueError, ("add_activation", "'relu'", "'tanh'", "'identity'")),
        ({"engine": "fast"}, ValueError, ("engine", "'fast'", "'auto'", "'sequence'", "'step'", "'reference'")),
        ({"memory_checkpoint": 0}, ValueError, ("memory_checkpoint", "0", "at least 1")),
        ({"memory_checkpoint": -1}, ValueError, ("memory_checkpoint", "-1", "at least 1")),
        ({"memory_checkpoint": "some"}, ValueError, ("memory_checkpoint", "'some'", "'auto'", "'all'")),
        ({"memory_checkpoint": 1.5}, TypeError, ("memory_checkpoint", "1.5", "int")),
        ({"memory_checkpoint": True}, TypeError, ("memory_checkpoint", "True", "int")),
        ({"memory_checkpoint": None}, TypeError, ("memory_checkpoint", "None", "int")),
        ({"clip": 0}, ValueError, ("clip", "0")),
        ({"clip": -1.0}, ValueError, ("clip", "-1.0")),
        ({"clip": float("nan")}, ValueError, ("clip", "nan")),
        ({"clip": "20"}, TypeError, ("clip", "'20'")),
        ({"dtype": torch.int32}, TypeError, ("dtype", "int32", "float")),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_named(options: dict, error: type, words: tuple) -> None:
    for cls in (FastNTM, NTMCell):
        with pytest.raises(error) as caught:
            cls(**{**SIZES, **options})
        for word in words:
            assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ([[1.0, 2.0, 3.0]], TypeError, ("inputs", "list", "Tensor")),
        (torch.zeros(2, 2, 4), ValueError, ("inputs", "(2, 2, 4)", "3")),
        (torch.zeros(2, 2, 0), ValueError, ("inputs", "(2, 2, 0)", "3")),
        (torch.zeros(3), ValueError, ("inputs", "(3,)", "3 dim")),
        (torch.zeros(()), ValueError, ("inputs", "()", "3 dim")),
        (torch.zeros(1, 2, 2, 3), ValueError, ("inputs", "(1, 2, 2, 3)", "3 dim")),
        (torch.zeros(0, 2, 3), ValueError, ("inputs", "time")),
        (torch.zeros(0, 3), ValueError, ("inputs", "time")),
        (torch.zeros(2, 2, 3, dtype=torch.float64), TypeError, ("inputs", "float64", "float32")),
        (torch.zeros(2, 2, 3, dtype=torch.int64), TypeError, ("inputs", "int64", "float32")),
        (torch.zeros(2, 2, 3, device="meta"), ValueError, ("inputs", "meta", "cpu")),
    ],
    ids=lambda x: str(tuple(x.shape)) if isinstance(x, Tensor) else None,
)
def test_bad_inputs_are_named(inputs, error: type, words: tuple) -> None:
    ntm = make(dtype=torch.float32)
    for run in (ntm, ntm.trace):
        with pytest.raises(error) as caught:
            run(inputs)
        for word in words:
            assert word in str(caught.value), str(caught.value)
    if not isinstance(inputs, Tensor) or inputs.dim() not in (1, 2):
        with pytest.raises((TypeError, ValueError), match="inputs"):
            make(NTMCell, dtype=torch.float32)(inputs)


def test_bad_states_are_named() -> None:
    ntm, cell = make(dtype=torch.float32), make(NTMCell, dtype=torch.float32)
    good = ntm.initial_state(2).detach()
    cases = [
        (tuple(good), TypeError, ("state", "tuple", "NTMState")),
        (good.memory, TypeError, ("state", "Tensor", "NTMState")),
        (ntm.initial_state(3), ValueError, ("state.memory", "(3, 7, 2)", "(2, 7, 2)")),
        (
            good._replace(read_weights=good.read_weights[:, :1]),
            ValueError,
            ("state.read_weights", "(2, 1, 7)", "(2, 2, 7)"),
        ),
        (good._replace(reads=good.reads[0]), ValueError, ("state.reads", "(2, 2)", "(2, 2, 2)")),
        (good._replace(write_weights=None), TypeError, ("state.write_weights", "NoneType", "Tensor")),
        (good._replace(memory=good.memory.double()), ValueError, ("state.memory", "float64", "float32")),
        (good._replace(memory=good.memory.to("meta")), ValueError, ("state.memory", "meta", "cpu")),
        (good._replace(controller=()), ValueError, ("state.controller", "2", "hidden", "cell")),
        (good._replace(controller=good.controller[0]), ValueError, ("state.controller", "Tensor", "tuple")),
        (good._replace(controller=None), ValueError, ("state.controller", "NoneType")),
        (
            good._replace(controller=(good.controller[0], good.controller[1][:, :1])),
            ValueError,
            ("state.controller[1]", "(1, 1, 5)", "(1, 2, 5)"),
        ),
    ]
    for state, error, words in cases:
        for call in (lambda s: ntm(torch.zeros(3, 2, 3), s), lambda s: cell(torch.zeros(2, 3), s)):
            with pytest.raises(error) as caught:
                call(state)
            for word in words:
                assert word in str(caught.value), str(caught.value)
    with pytest.raises(ValueError, match=r"state.memory.*\(2, 7, 2\).*\(7, 2\)"):
        ntm(torch.zeros(3, 3), good)  # unbatched inputs, batched state
    with pytest.raises(ValueError, match="batch_size.*-1"):
        ntm.initial_state(-1)
    with pytest.raises(TypeError, match="batch_size.*2.5"):
        ntm.initial_state(2.5)


# Every engine, for what it reads beyond a tensor's end is not its own.
EVERY_ENGINE = [*ENGINE_CONTROLLERS, ("reference", "lstm")]


@pytest.mark.parametrize(("engine", "controller"), EVERY_ENGINE)
@pytest.mark.parametrize("name", ("controller.weight_ih_l0", "controller.bias_ih_l1", "heads.bias", "output.weight"))
def test_parameters_that_do_not_fit_are_named(backend, engine: str, controller: str, name: str) -> None:
    skip_without_sequence(backend.device)
    layer, parameter = name.split(".")
    for wrong, words in ((lambda x: x[..., :-1], "shape.*expected"), (lambda x: x.float(), "float32.*float64")):
        module = make(engine=engine, controller=controller, num_layers=2)
        owner = getattr(module, layer)
        setattr(owner, parameter, nn.Parameter(wrong(getattr(owner, parameter).detach())))
        for state in (None, module.initial_state(2)):
            with pytest.raises(ValueError, match=f"{name}.*{words}"):
                module(some(3, 2, 3), state)


@pytest.mark.parametrize("engine", ("auto", "reference"))
def test_an_output_layer_of_another_size(engine: str) -> None:
    module, inputs = make(engine=engine), some(3, 2, 3)
    module.output = nn.Linear(module.output.in_features, 6, dtype=torch.float64)
    outputs, state = module(inputs)
    features = torch.cat([state.controller[0][-1], state.reads.flatten(1)], 1)
    torch.testing.assert_close(outputs[-1], module.output(features), **CLOSE)


@pytest.mark.parametrize("engine", ("sequence", "step", "reference"))
def test_linear_layers_without_a_bias(backend, engine: str) -> None:
    skip_without_sequence(backend.device)
    module, inputs = make(engine=engine), some(3, 2, 3)
    with torch.no_grad():
        module.heads.bias.zero_(), module.output.bias.zero_()
        expected, _ = module(inputs)
        module.heads.bias = module.output.bias = None
        torch.testing.assert_close(module(inputs)[0], expected, **CLOSE)


@pytest.mark.parametrize(("engine", "controller"), EVERY_ENGINE)
def test_an_initial_state_that_does_not_fit_is_named(backend, engine: str, controller: str) -> None:
    skip_without_sequence(backend.device)

    class Own(FastNTM):
        def initial_state(self, batch_size: int) -> NTMState:
            state = super().initial_state(batch_size)
            return state._replace(reads=state.reads[:, :1])

    with pytest.raises(ValueError, match=r"state.reads.*\(2, 1, 2\).*\(2, 2, 2\)"):
        make(Own, engine=engine, controller=controller)(some(3, 2, 3))
    module = make(engine=engine, controller=controller)
    module.initial_memory = module.initial_memory[:-1]
    with pytest.raises(ValueError, match=r"state.memory.*6, 2\).*7, 2\)"):
        module(some(3, 2, 3))


def test_a_weight_without_storage_is_refused(backend) -> None:
    skip_without_sequence(backend.device)
    module = make(engine="sequence")
    module.heads.weight.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="storage"):
        module(some(3, 2, 3))


def test_settings_are_checked_when_they_are_set_and_sizes_are_read_only() -> None:
    """Whatever the configuration has: a wrong value is refused at once, and nothing has changed."""
    ntm = make()
    for own in dataclasses.fields(NTMConfig):
        name = "controller_type" if own.name == "controller" else own.name
        before = ntm.ntm_config
        assert getattr(ntm, name) == getattr(before, own.name)
        with pytest.raises((AttributeError, TypeError, ValueError), match=f"{own.name}|{name}"):
            setattr(ntm, name, "no such value")
        if own.metadata.get("fixed"):
            setattr(ntm, name, getattr(before, own.name))  # what it is anyway
            assert ntm.ntm_config == before
        else:
            setattr(ntm, name, OTHER_OPTIONS.get(name, getattr(before, own.name)))
            assert getattr(ntm, name) == OTHER_OPTIONS.get(name, getattr(before, own.name))


def test_a_failed_call_changes_nothing() -> None:
    ntm = make()
    before = {n: x.clone() for n, x in ntm.state_dict().items()}
    state = ntm.initial_state(2).detach().map(torch.clone)
    kept = [x.clone() for x in flat(state)]
    with pytest.raises(ValueError):
        ntm(some(2, 2, 4), state)
    ntm(some(2, 2, 3), state)
    assert all(torch.equal(x, before[n]) for n, x in ntm.state_dict().items())
    assert all(map(torch.equal, flat(state), kept))


def test_what_passed_under_autocast_has_not_passed_outside() -> None:
    ntm = make(engine="auto", dtype=torch.float32)
    inputs, state = some(2, 2, 3, dtype=torch.float32), ntm.initial_state(2).detach().to(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError):
        ntm(inputs, state)
    with pytest.raises(ValueError, match="state.memory: got torch.float64"):
        ntm(inputs, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, final = ntm(inputs.bfloat16())
    assert all(x.dtype is torch.float32 for x in flat(final))


def test_what_is_returned_can_be_resized() -> None:
    ntm = make(engine="auto", dtype=torch.float32)
    inputs = some(2, 2, 3, dtype=torch.float32).requires_grad_()
    outputs, final = ntm(inputs)
    outputs.sum().backward()
    for x in (outputs.detach(), final.reads.detach(), inputs.grad, ntm.heads.weight.grad, ntm.initial_reads.grad):
        x.resize_(50, 50)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("engine", ("auto", "reference"))
def test_a_tiny_eps_gives_no_nan(engine: str, dtype: torch.dtype) -> None:
    """Its square would be 0 in the native code: the reference serves."""
    for eps in (1e-19, 1e-23, 1e-160, 1e-300):
        ntm = make(engine=engine, dtype=dtype, eps=eps, memory_init="constant")
        ntm.initial_memory.zero_()
        outputs, _ = ntm(some(3, 2, 3, dtype=dtype))
        assert outputs.isfinite().all()
        zeros = torch.zeros(1, 3, 2, dtype=dtype)
        found = ops.content_addressing(zeros, zeros[:, :1], zeros[:, :1, 0] + 1, eps=eps)
        torch.testing.assert_close(found, torch.full_like(found, 1 / 3))
