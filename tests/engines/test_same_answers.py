"""The step and the sequence engine give the reference's numbers and gradients."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from typing import Callable

import pytest
import torch
import torch.utils.deterministic
from helpers.cases import OTHER_OPTIONS
from helpers.machines import CLOSE, CONTROLLERS, ENGINE_CONTROLLERS, SERVED, flat, make, some
from helpers.native_calls import intercept
from torch import Tensor

import ntm_fast
from ntm_fast import NTMState, native

pytestmark = pytest.mark.usefixtures("made_on_the_backend")


def _train_step(engine: str, dtype: torch.dtype, options: dict, steps: int = 8) -> dict[str, Tensor]:
    ntm = make(engine=engine, dtype=dtype, memory_init="learned", **options)
    inputs = some(steps, 3, 3, dtype=dtype).requires_grad_()
    outputs, state = ntm(inputs)
    loss = outputs.square().mean() + sum(x.square().mean() for x in flat(state))
    loss.backward()
    found = {"outputs": outputs, "grad inputs": inputs.grad, **{f"grad {n}": p.grad for n, p in ntm.named_parameters()}}
    return {name: x.detach().double() for name, x in {**found, **dict(zip("abcdefg", flat(state)))}.items()}


def _check_engines(engine: str, options: dict, steps: int = 8) -> None:
    truth = _train_step("reference", torch.float64, options, steps)
    double = _train_step(engine, torch.float64, options, steps)
    single = _train_step("reference", torch.float32, options, steps)
    float32 = _train_step(engine, torch.float32, options, steps)
    relative = lambda got, name: (got[name] - truth[name]).norm() / truth[name].norm()  # noqa: E731
    # All gradients go back through one chain of eight steps, so each may lose what torch's float32 loses in the worst.
    # Four times that, because one machine is one draw of many: over 60 random machines an engine's worst error was 0.9
    # of torch's in the median, and more than twice torch's in one of ten.
    allowed = max(1e-5, 4 * max(relative(single, name) for name in truth))
    assert allowed < 1e-3
    for name in truth:
        assert relative(double, name) < 1e-10, name  # rounding amplified by eight steps
        assert relative(float32, name) <= allowed, name


ENGINE_OPTIONS = [
    *({"controller": c, "num_layers": n} for c in CONTROLLERS for n in (1, 2, 3)),
    {"read_first": True, "key_activation": "identity", "clip": None},
    {"add_activation": "identity", "clip": 1.0, "shift_range": 3, "read_heads": 1, "write_heads": 3},
    {"shift_range": 0, "read_heads": 3, "write_heads": 1, "read_first": True},
    *({name: value} for name, value in OTHER_OPTIONS.items()),
    {"hidden_size": 33, "memory_locations": 17, "memory_width": 9, "controller": "gru"},
]


@pytest.mark.parametrize(
    ("engine", "options"),
    [(e, o) for e in SERVED for o in ENGINE_OPTIONS if o.get("controller", "lstm") in SERVED[e]],
    ids=str,
)
def test_engines_give_the_references_numbers_and_gradients(backend, engine: str, options: dict) -> None:
    _check_engines(engine, options)


@pytest.mark.parametrize(("engine", "controller"), ENGINE_CONTROLLERS)
@pytest.mark.parametrize("steps", (1, 2, 3))
def test_engines_over_few_steps(backend, engine: str, controller: str, steps: int) -> None:
    _check_engines(engine, {"controller": controller}, steps)


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        *(("step", name) for name in ("memory_step", "memory_step_backward", "lstm_gates", "lstm_gates_backward")),
        *(("sequence", name) for name in ("ntm_sequence", "ntm_sequence_backward")),
    ],
)
def test_planted_faults_in_the_engines_are_found(backend, monkeypatch, engine: str, name: str) -> None:
    if backend.device != "cpu":
        pytest.skip("the fault is planted through a pointer to the host's memory")

    def wrong(call: Callable, called: str, like: Tensor, scalars: list, addresses: list) -> None:
        call(called, like, scalars, addresses)
        if called == name:  # the first number of an output is changed by a millionth
            number = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}[like.dtype]
            place = native.signature(called).tensors.index("outputs") if called == "ntm_sequence" else -1
            number.from_address(addresses[place]).value *= 1 + 1e-6

    intercept(monkeypatch, wrong)
    with pytest.raises(AssertionError):
        _check_engines(engine, {})


@pytest.fixture
def _fresh_memory_is_nan():
    """torch.empty and similar functions return NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_fresh_memory_is_nan")
@pytest.mark.parametrize(("engine", "controller"), ENGINE_CONTROLLERS)
def test_engines_write_all_that_they_read(backend, engine: str, controller: str) -> None:
    _check_engines(engine, {"controller": controller, "num_layers": 2})
    with torch.no_grad():
        assert make(engine=engine, controller=controller)(some(3, 2, 3))[0].isfinite().all()


@pytest.mark.parametrize(("engine", "controller"), ENGINE_CONTROLLERS)
@pytest.mark.parametrize("layers", (1, 2))
def test_engines_compute_the_same_without_a_graph(backend, engine: str, controller: str, layers: int) -> None:
    ntm = make(engine=engine, controller=controller, num_layers=layers)
    for steps in (1, 2, 3, 6):
        outputs, state = ntm(some(steps, 3, 3))
        with torch.no_grad():
            again, again_state = ntm(some(steps, 3, 3))
        # Not bit for bit: torch's products depend on the alignment of their inputs.
        torch.testing.assert_close([again, *flat(again_state)], [outputs, *flat(state)], **CLOSE)


@pytest.mark.parametrize(("native", "controller"), ENGINE_CONTROLLERS)
def test_engines_differentiate_what_is_asked_for(backend, native: str, controller: str) -> None:
    """The gradient of each parameter, input and part of the state alone, from each output alone."""
    found = {}
    for engine in ("reference", native):
        ntm = make(engine=engine, controller=controller, num_layers=2, memory_init="learned")
        state = ntm.initial_state(2).detach()
        names = [*dict(ntm.named_parameters()), "inputs", *range(len(flat(state)))]
        for name in names:
            ntm.requires_grad_(False)
            given = state.map(torch.clone)
            inputs = some(3, 2, 3)
            target = ntm.get_parameter(name) if name in dict(ntm.named_parameters()) else inputs
            target = (flat(given)[name] if isinstance(name, int) else target).requires_grad_()
            if isinstance(name, str) and "initial" in name:
                given = None
            outputs, final = ntm(inputs, given)
            for index, part in enumerate((outputs, *flat(final))):
                grad = None
                if part.requires_grad:  # the state does not depend on the output layer
                    grad = torch.autograd.grad(part.square().sum(), target, retain_graph=True, allow_unused=True)[0]
                found.setdefault((name, index), []).append(grad)
    for (name, index), (want, got) in found.items():
        if want is None:
            assert got is None or not got.any(), (name, index)
        else:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda m: f"{name}, {index}: {m}")


@pytest.mark.parametrize("native", SERVED)
def test_gradients_through_a_state_carried_on(backend, native: str) -> None:
    """Two calls with the state carried on, still attached to its graph, are one call."""
    found = []
    for engine, cut in (("reference", 0), (native, 0), (native, 4)):
        ntm, inputs = make(engine=engine), some(7, 2, 3).requires_grad_()
        outputs, state = ntm(inputs[:cut]) if cut else (inputs.new_empty(0, 2, 4), None)
        more, _ = ntm(inputs[cut:], state)
        torch.cat([outputs, more]).square().sum().backward()
        found.append([inputs.grad, *(p.grad for p in ntm.parameters())])
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("native", "controller"), ENGINE_CONTROLLERS)
def test_gradient_penalty(backend, native: str, controller: str) -> None:
    found = []
    for engine in ("reference", native):
        ntm, inputs = make(engine=engine, controller=controller), some(3, 2, 3).requires_grad_()
        outputs, _ = ntm(inputs)
        (first,) = torch.autograd.grad(outputs.square().sum(), inputs, create_graph=True)
        (outputs.sum() + first.square().sum()).backward()
        found.append([inputs.grad, *(p.grad for p in ntm.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", SERVED)
def test_backward_again(backend, engine: str) -> None:
    ntm = make(engine=engine)
    outputs, _ = ntm(some(3, 2, 3))
    outputs.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in ntm.parameters()]
    outputs.sum().backward()
    torch.testing.assert_close([p.grad for p in ntm.parameters()], [2 * x for x in once])
    with pytest.raises(RuntimeError, match="second time"):
        outputs.sum().backward()


@pytest.mark.parametrize("engine", SERVED)
@pytest.mark.parametrize("what", ("inputs", "parameter", "memory in", "weights in", *NTMState._fields[:4]))
def test_changes_in_place_before_backward_are_noticed_or_harmless(backend, engine: str, what: str) -> None:
    found = []
    for change in (False, True):
        ntm, inputs = make(engine=engine), some(3, 2, 3)
        _, before = ntm(inputs)  # a memory as a call returns it
        before = before.detach()
        outputs, state = ntm(inputs, before)
        try:
            if change:
                with torch.no_grad():
                    {
                        "inputs": inputs,
                        "parameter": ntm.controller.weight_hh_l0,
                        "memory in": before.memory,
                        "weights in": before.write_weights,
                        **state._asdict(),
                    }[what].mul_(0.5)
            outputs.square().sum().backward()
        except RuntimeError as error:
            assert change and "modified" in str(error)
            return
        found.append([p.grad for n, p in ntm.named_parameters() if "initial" not in n])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("engine", SERVED)
def test_what_is_saved_may_be_moved_away_and_back(backend, engine: str) -> None:
    """save_on_cpu with pin_memory gives saved tensors back as contiguous ones, whatever their strides were."""
    found = []
    for moved in (False, True):
        ntm, inputs = make(engine=engine), some(4, 3, 3).requires_grad_()
        with torch.autograd.graph.save_on_cpu(pin_memory=True) if moved else contextlib.nullcontext():
            outputs, state = ntm(inputs)
        (outputs.square().sum() + state.memory.square().sum()).backward()
        found.append([inputs.grad, *(p.grad for p in ntm.parameters())])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize(("engine", "controller"), ENGINE_CONTROLLERS)
def test_what_was_kept_for_backward_goes_with_the_outputs(backend, engine: str, controller: str) -> None:
    """Nothing is held after a forward without a backward, as in a validation that forgets no_grad."""
    ntm = make(engine=engine, controller=controller)
    alive = lambda: sum(type(x) is Tensor for x in gc.get_objects())  # noqa: E731
    ntm(some(5, 2, 3))
    gc.collect()
    before = alive()
    for _ in range(3):
        outputs, state = ntm(some(5, 2, 3))
    outputs.sum().backward(retain_graph=True)
    ntm.zero_grad()
    del outputs, state
    ntm_fast.empty_cache()  # drops what was captured of these calls
    gc.collect()
    assert alive() <= before


@pytest.mark.parametrize("native", SERVED)
def test_functional_transforms(backend, native: str) -> None:
    """torch.func over the module: grad, vmap of grad, jvp. Batched gradients are right or refused."""
    inputs, tangent = some(3, 2, 3), some(3, 2, 3, seed=5)
    found = []
    for engine in ("reference", native):
        ntm = make(engine=engine)
        parameters = {n: p.detach() for n, p in ntm.named_parameters()}
        loss = lambda p, x, ntm=ntm: torch.func.functional_call(ntm, p, (x,))[0].square().sum()  # noqa: E731
        grads = torch.func.grad(loss)(parameters, inputs)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.stack([inputs, tangent]))
        _, along = torch.func.jvp(lambda x: ntm(x)[0], (inputs,), (tangent,))  # noqa: B023
        found.append([*grads.values(), *each.values(), along, loss(parameters, inputs)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
    leaf = inputs.clone().requires_grad_()
    outputs, _ = make(engine=native)(leaf)
    directions = torch.stack([some(*outputs.shape, seed=seed) for seed in (1, 2)])
    try:
        (batched,) = torch.autograd.grad(outputs, leaf, directions, is_grads_batched=True, retain_graph=True)
    except RuntimeError:
        return
    for got, direction in zip(batched, directions):
        torch.testing.assert_close(got, torch.autograd.grad(outputs, leaf, direction, retain_graph=True)[0])
