"""A streamed call like an earlier one is not checked again and gives the same; any change in between is noticed."""

from __future__ import annotations

import functools
from typing import Any, Callable

import pytest
import torch
import torch.utils._python_dispatch
from helpers.cases import OTHER_OPTIONS
from helpers.machines import NATIVE, flat, make, some
from torch import Tensor, nn

from ntm_fast import FastNTM, NTMCell, NTMState, native
from ntm_fast.engines import sequence
from ntm_fast.modules import ntm as modules
from ntm_fast.ops.serving import why_not_native
from ntm_fast.spec import NTMConfig

pytestmark = pytest.mark.usefixtures("made_on_the_backend")


# Ways to call a module for one step of a sequence: class, options, and the step's input from one of shape (1, B, I).
FORMS = {
    "FastNTM": (FastNTM, {}, lambda x: x),
    "FastNTM, batch first": (FastNTM, {"batch_first": True}, lambda x: x.transpose(0, 1)),
    "FastNTM, unbatched": (FastNTM, {}, lambda x: x[:, 0]),
    "NTMCell": (NTMCell, {}, lambda x: x[0]),
    "NTMCell, unbatched": (NTMCell, {}, lambda x: x[0, 0]),
}


@pytest.fixture
def checks(monkeypatch) -> list[int]:
    """A list that grows with each call that is checked. At the start no earlier call is remembered."""
    if why_not_native(torch.device("cpu"), torch.float32, "ntm_sequence"):
        pytest.skip("no native sequence engine")
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch does not let its tensors be looked at")
    monkeypatch.setattr(sequence, "remembered", {})
    found, check = [], modules.check_inputs
    monkeypatch.setattr(modules, "check_inputs", lambda *args: found.append(1) or check(*args))
    return found


def bits(outputs: Tensor, state: NTMState) -> list[Any]:
    """All that can be told of results, in a form that can be compared."""
    return [(x.numpy().tobytes(), x.shape, x.stride(), x.dtype, x.requires_grad) for x in (outputs, *flat(state))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("controller", NATIVE)
@pytest.mark.parametrize("batch", (1, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_streaming_checks_a_step_like_the_last_no_more(
    checks: list[int], monkeypatch, form: str, controller: str, batch: int, dtype: torch.dtype
) -> None:
    """Streamed calls give the bits of one call for all steps; unchecked calls look like checked ones in all else."""
    cls, options, take = FORMS[form]
    batch = 1 if "unbatched" in form else batch
    options = dict(engine="sequence", dtype=dtype, controller=controller, num_layers=2, **options)
    module, inputs = make(cls, **options), some(6, batch, 3, dtype=dtype)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            whole, _ = make(**{**options, "batch_first": False})(inputs)
            state, outputs = None, []
            for step, x in enumerate(inputs.split(1)):
                y, state = module(take(x), state)
                outputs.append(y.reshape(1, batch, -1))
                assert y.is_inference() == state.memory.is_inference() == (mode is torch.inference_mode)
                if step == 1:
                    checked = bits(y, state)
            assert torch.equal(torch.cat(outputs), whole)
            told = [part[1:] for part in bits(y, state)]
            assert told == [part[1:] for part in checked] and type(state) is NTMState and type(y) is Tensor
    assert len(checks) == 2 + 1 + 1 + 1  # steps 1 and 2, and calls without a state, which are not remembered
    before = bits(y, state)
    with torch.no_grad():
        found = bits(*module(take(inputs[:1]), state))
        assert bits(y, state) == before  # no later call changes earlier results
        monkeypatch.setattr(native, "layouts", lambda tensors: None)  # as with torch before 2.10
        assert bits(*module(take(inputs[:1]), state)) == found and len(checks) == 6


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _set(module: nn.Module, name: str, value: Any) -> None:
    setattr(module, name, value)


# What may change between two calls. The second call must notice.
CHANGES = {
    "nothing": lambda module: None,
    **{name: functools.partial(_set, name=name, value=value) for name, value in OTHER_OPTIONS.items()},
    "engine": lambda module: setattr(module, "engine", "reference"),
    "weights in place": lambda module: module.heads.weight.data.mul_(0.5),
    "another parameter": lambda module: setattr(module.output, "bias", nn.Parameter(module.output.bias + 1)),
    "another layer": lambda module: setattr(module, "output", nn.Linear(9, 4, dtype=torch.float64)),
    "weights lie otherwise": lambda module: module.heads.weight.set_(module.heads.weight.mT.contiguous().mT),
    "a parametrization": lambda module: nn.utils.parametrize.register_parametrization(
        module.heads, "weight", Doubled()
    ),
}


class OwnTensor(Tensor):
    pass


LAYOUTS = {
    "as before": lambda inputs, state: (inputs, state),
    "inputs": lambda inputs, state: (inputs.mT.contiguous().mT, state),
    "memory": lambda inputs, state: (inputs, state._replace(memory=state.memory.contiguous())),
    "reads": lambda inputs, state: (inputs, state._replace(reads=state.reads.mT.contiguous().mT)),
    "a subclass": lambda inputs, state: (inputs.as_subclass(OwnTensor), state),
}


def check_that_it_is_heeded(change: str = "nothing", layout: str = "as before") -> None:
    """After a change, a call computes what it would if no earlier call were remembered."""
    module, inputs, state = make(engine="auto"), some(1, 2, 3), None
    with torch.no_grad():
        for _ in range(3):
            _, state = module(inputs, state)
        CHANGES[change](module)
        given = LAYOUTS[layout](inputs, state)
        got = module(*given)
        sequence.remembered.clear()
        want = module(*given)
    assert bits(*got) == bits(*want), "not heeded"


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_steps_is_heeded(checks: list[int], change: str) -> None:
    check_that_it_is_heeded(change=change)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_heeded(checks: list[int], layout: str) -> None:
    check_that_it_is_heeded(layout=layout)


def test_planted_faults_in_what_is_remembered_are_found(checks: list[int], monkeypatch) -> None:
    layouts, seen = native.layouts, []

    def blind(tensors: tuple) -> tuple:
        (part, layout), addresses = layouts(tensors)
        if len(tensors) > 7:  # these are arguments, not results
            seen.append(layout)
            layout = seen[0]
        return (part, layout), addresses

    with monkeypatch.context() as plant:
        plant.setattr(NTMConfig, "__eq__", lambda a, b: True)
        plant.setattr(NTMConfig, "__hash__", lambda config: 0)
        for change in OTHER_OPTIONS:
            with pytest.raises(AssertionError, match="not heeded"):
                check_that_it_is_heeded(change=change)
    with monkeypatch.context() as plant:
        plant.setattr(native, "layouts", blind)
        for layout in ("inputs", "memory", "reads"):
            sequence.remembered.clear()
            with pytest.raises(AssertionError, match="not heeded"):
                check_that_it_is_heeded(layout=layout)
        sequence.remembered.clear()
        with pytest.raises(AssertionError, match="not heeded"):
            check_that_it_is_heeded(change="weights lie otherwise")


def test_who_watches_sees_calls_like_earlier_ones(checks: list[int]) -> None:
    module, inputs = make(engine="auto", dtype=torch.float32), some(1, 2, 3, dtype=torch.float32)
    state = module.initial_state(2).detach()
    call = lambda x: module(x, state)[0]  # noqa: E731
    with torch.no_grad():
        want = [call(inputs) for _ in range(3)][-1]
    assert call(inputs).requires_grad
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        with Mode():
            assert torch.equal(call(inputs), want)
        assert any("ntm_sequence" in name for name in seen), seen
        torch.testing.assert_close(torch.vmap(call)(torch.stack([inputs, inputs])), torch.stack([want, want]))
        with torch.autocast("cpu"):
            assert call(inputs).dtype is torch.bfloat16
        tangent = torch.func.jvp(call, (inputs,), (torch.ones_like(inputs),))[1]
        assert tangent.abs().max() > 0


def test_what_cannot_be_repeated_is_found_out_once(checks: list[int], monkeypatch) -> None:
    calls, remember = [], sequence.remember
    monkeypatch.setattr(sequence, "remember", lambda *args: calls.append(1) or remember(*args))
    module, inputs = make(engine="auto"), some(1, 2, 3)
    state = module.initial_state(2).detach()  # its memory does not lie as native code takes it
    with torch.no_grad():
        for _ in range(3):
            _, other = module(inputs, state)
        assert len(calls) == 1 and len(checks) == 3
        for engine in ("step", "reference"):
            module.engine = engine
            module(inputs, other)
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x, s: (x[..., :2], s), "inputs.*input_size"),
        (lambda x, s: (x.double(), s), "inputs.*float64"),
        (lambda x, s: (x.to("meta"), s), "inputs.*meta"),
        (lambda x, s: (x.to_sparse(), s), "Contiguous"),  # the error comes from the native code
        (lambda x, s: (x.tolist(), s), "inputs.*list"),
        (lambda x, s: (x, s._replace(memory=s.memory.mT)), "state.memory"),
        (lambda x, s: (x, s._replace(reads=None)), "state.reads"),
        (lambda x, s: (x, s._replace(controller=list(s.controller))), "state.controller"),
        (lambda x, s: (x, s._replace(controller=s.controller[:1])), "state.controller"),
        (lambda x, s: (x, tuple(s)), "state.*tuple"),
    ],
)
def test_calls_unlike_earlier_ones_are_checked(checks: list[int], wrong: Callable, words: str) -> None:
    module, inputs = make(engine="sequence", dtype=torch.float32), some(1, 2, 3, dtype=torch.float32)
    state = module.initial_state(2).detach()
    with torch.no_grad():
        for _ in range(3):
            module(inputs, state)
        with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
            module(*wrong(inputs, state))
