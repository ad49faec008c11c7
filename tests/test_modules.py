"""FastNTM and NTMCell: they behave as nn.LSTM does, whichever engine serves."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import pickle
from typing import Any, Callable

import pytest
import torch
import torch.nn.utils.parametrize
import torch.utils._python_dispatch
import torch.utils.deterministic
from torch import Tensor, nn

import ntm_fast
from ntm_fast import FastNTM, NTMCell, NTMState, NTMTrace, _native, ops, reference, sequence

CONTROLLERS = ("lstm", "gru", "feedforward")
SERVED = {"step": CONTROLLERS, "sequence": ("lstm", "gru")}  # by the native engines
ENGINE_CONTROLLERS = [(engine, controller) for engine, controllers in SERVED.items() for controller in controllers]
SIZES = dict(
    input_size=3, output_size=4, hidden_size=5, memory_locations=7, memory_width=2, read_heads=2, write_heads=2
)
# Sums in another order, over 10 steps.
CLOSE = dict(rtol=1e-10, atol=1e-12)


def make(cls=FastNTM, engine: str = "reference", dtype: torch.dtype = torch.float64, **options):
    """Parameters far from their initial values, so that whatever is mixed up shows."""
    module = cls(**{**SIZES, "engine": engine, "dtype": dtype, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(0.7 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu"))
    return module


def some(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device(), dtype)


def skip_without_sequence(device: str) -> None:
    if reason := ops.why_not_native(torch.device(device), torch.float64, "ntm_sequence"):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _where_the_backend_computes(request):
    """Modules and tensors are made there, and engines that it does not have are skipped."""
    device = request.getfixturevalue("backend").device if "backend" in request.fixturenames else "cpu"
    if device != "cpu" and "sequence" in request.node.callspec.params.values():
        skip_without_sequence(device)
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


def flat(state: NTMState) -> list[Tensor]:
    return [*state[:4], *state.controller]


def assert_states_close(a: NTMState, b: NTMState, **tolerance) -> None:
    assert type(a) is type(b) is NTMState
    torch.testing.assert_close(flat(a), flat(b), **tolerance)


# --- shapes and states, as nn.LSTM's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("layers", (1, 2))
def test_shapes(controller: str, layers: int) -> None:
    T, B = 6, 3
    ntm = make(controller=controller, num_layers=layers)
    count = {"lstm": 2, "gru": 1, "feedforward": 0}[controller]
    outputs, state = ntm(some(T, B, 3))
    assert outputs.shape == (T, B, 4)
    assert [tuple(x.shape) for x in flat(state)] == [(B, 7, 2), (B, 2, 7), (B, 2, 7), (B, 2, 2)] + [
        (layers, B, 5)
    ] * count
    outputs, state = ntm(some(T, 3))
    assert outputs.shape == (T, 4)
    assert [tuple(x.shape) for x in flat(state)] == [(7, 2), (2, 7), (2, 7), (2, 2)] + [(layers, 5)] * count
    outputs, _ = ntm(some(T, 3), state)
    assert outputs.shape == (T, 4)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_batch_first_and_unbatched_are_the_same_numbers(controller: str) -> None:
    ntm, turned = make(controller=controller), make(controller=controller, batch_first=True)
    inputs = some(5, 3, 3)
    outputs, state = ntm(inputs)
    turned_outputs, turned_state = turned(inputs.transpose(0, 1))
    torch.testing.assert_close(turned_outputs.transpose(0, 1), outputs, **CLOSE)
    assert_states_close(turned_state, state, **CLOSE)
    for b in range(3):
        for module in (ntm, turned):  # batch_first says nothing about unbatched inputs
            alone, alone_state = module(inputs[:, b])
            torch.testing.assert_close(alone, outputs[:, b], **CLOSE)
            torch.testing.assert_close(
                flat(alone_state), [*(x[b] for x in state[:4]), *(x[:, b] for x in state.controller)], **CLOSE
            )
    # A state taken from one and carried into the other.
    again, _ = turned(inputs.transpose(0, 1), state)
    torch.testing.assert_close(again.transpose(0, 1), ntm(inputs, state)[0], **CLOSE)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("layers", (1, 2))
def test_a_sequence_in_parts_and_step_by_step(controller: str, layers: int) -> None:
    options = dict(controller=controller, num_layers=layers)
    ntm, cell = make(**options), make(NTMCell, **options)
    inputs = some(10, 3, 3)
    whole, final = ntm(inputs)
    first, state = ntm(inputs[:4])
    second, parts_final = ntm(inputs[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole, **CLOSE)
    assert_states_close(parts_final, final, **CLOSE)
    cell.load_state_dict(ntm.state_dict())
    state, steps = None, []
    for x in inputs:
        y, state = cell(x, state)
        assert y.shape == (3, 4)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps), whole, **CLOSE)
    assert_states_close(state, final, **CLOSE)
    y, state = cell(inputs[0, 0])
    assert y.shape == (4,) and state.memory.shape == (7, 2)
    torch.testing.assert_close(cell(inputs[1, 0], state)[0], whole[1, 0], **CLOSE)


def test_initial_state_is_the_default_and_learns() -> None:
    for controller in CONTROLLERS:
        ntm = make(controller=controller, memory_init="learned")
        inputs = some(3, 2, 3)
        torch.testing.assert_close(ntm(inputs, ntm.initial_state(2))[0], ntm(inputs)[0], rtol=0, atol=0)
        ntm(inputs)[0].square().sum().backward()
        without = [
            n for n, p in ntm.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
        ]
        assert not without, f"no gradient for {without}"


class _StartsAside(FastNTM):
    def initial_state(self, batch_size: int) -> NTMState:
        return super().initial_state(batch_size).map(lambda x: x + 0.3)


def test_an_initial_state_of_ones_own_is_asked_for() -> None:
    inputs = some(3, 2, 3)
    wanted = make(_StartsAside, controller="lstm")(inputs)[0]
    assert not torch.allclose(make(controller="lstm")(inputs)[0], wanted)
    torch.testing.assert_close(make(_StartsAside, "auto", controller="lstm")(inputs)[0], wanted, **CLOSE)


def test_gradients_reach_the_state_given() -> None:
    ntm = make()
    state = ntm.initial_state(2).map(lambda x: x.detach().clone().requires_grad_())
    outputs, final = ntm(some(3, 2, 3), state)
    (outputs.sum() + final.memory.square().sum()).backward()
    assert all(x.grad.any() for x in flat(state))


@pytest.mark.parametrize(
    ("mode", "learned", "constant"),
    [("constant", False, True), ("learned_constant", True, True), ("learned", True, False), ("random", False, False)],
)
def test_memory_init(mode: str, learned: bool, constant: bool) -> None:
    ntm = FastNTM(**SIZES, memory_init=mode)
    assert ("initial_memory" in dict(ntm.named_parameters())) == learned
    assert ("initial_memory" in dict(ntm.named_buffers())) == (not learned)
    assert "initial_memory" in ntm.state_dict()
    assert bool((ntm.initial_memory == 1e-6).all()) == constant
    assert constant or ntm.initial_memory.unique().numel() == ntm.initial_memory.numel()
    before = ntm.initial_memory.detach().clone()
    optimiser = torch.optim.SGD(ntm.parameters(), lr=1.0)
    ntm(some(4, 2, 3, dtype=torch.float32))[0].square().sum().backward()
    optimiser.step()
    assert torch.equal(before, ntm.initial_memory) != learned
    # The weightings alone tell the locations of a constant memory apart: heads start out somewhere.
    for weights in FastNTM(**SIZES, memory_init=mode).initial_state(1)[1:3]:
        assert (weights.max(-1).values > 3 * weights.median(-1).values).all()


def test_truncated_backpropagation() -> None:
    ntm = make(memory_init="learned")
    inputs = some(6, 2, 3)
    _, state = ntm(inputs[:3])
    assert all(x.grad_fn is not None for x in flat(state))
    outputs, _ = ntm(inputs[3:], state.detach())
    outputs.square().sum().backward()
    # What came before the cut, the initial state alone here, gets nothing; all else gets what a fresh start gives.
    assert all(p.grad is None for n, p in ntm.named_parameters() if "initial" in n)
    assert all(p.grad.any() for n, p in ntm.named_parameters() if "initial" not in n)
    moved = state.to(torch.float32)
    assert isinstance(moved, NTMState) and all(x.dtype is torch.float32 for x in flat(moved))


# --- engines ----------------------------------------------------------------------------------------------------------


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
    # Gradients run back through one chain of eight steps: what torch's float32 loses in the worst of them, any may.
    # Four times, because that is one draw of many: over 60 machines drawn at random, an engine's worst error was 0.9
    # of torch's in the middle, and in one of ten more than twice.
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
    right = _native.call

    def wrong(called: str, like: Tensor, *values) -> None:
        right(called, like, *values)
        if called == name:  # the first number of an output, by a millionth
            number = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}[like.dtype]
            number.from_address(values[-24 if called == "ntm_sequence" else -1]).value *= 1 + 1e-6

    monkeypatch.setattr(_native, "call", wrong)
    with pytest.raises(AssertionError):
        _check_engines(engine, {})


@pytest.fixture
def _fresh_memory_is_nan():
    """Whatever torch.empty and its like return is full of NaN."""
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
        # Not bit for bit: torch's products may differ by the alignment of what they are given.
        torch.testing.assert_close([again, *flat(again_state)], [outputs, *flat(state)], **CLOSE)


@pytest.mark.parametrize(("native", "controller"), ENGINE_CONTROLLERS)
def test_engines_differentiate_what_is_asked_for(backend, native: str, controller: str) -> None:
    """One parameter, the inputs or one part of the state alone; a loss of one part of what comes out alone."""
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
    """Two calls, the state between them attached, are one call."""
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
        _, before = ntm(inputs)  # as memories come out of a call
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
    """With pin_memory it comes back contiguous, whatever its strides were."""
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
    """A forward without a backward, as in a validation that forgets no_grad, holds nothing afterwards."""
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
    ntm_fast.empty_cache()  # what was captured of these calls
    gc.collect()
    assert alive() <= before


@pytest.mark.parametrize("native", SERVED)
def test_functional_transforms(backend, native: str) -> None:
    """torch.func over the module: grad, vmap of grad, jvp; and gradients batched over directions, or refused."""
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


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_auto_takes_the_fastest_engine_that_serves(backend, controller: str) -> None:
    inputs = some(2, 2, 3, dtype=torch.float32)
    auto = make(engine="auto", dtype=torch.float32, controller=controller)
    sequence = backend.device == "cpu" and controller != "feedforward"
    gates = [] if controller == "feedforward" else [f"{controller}_gates"]
    forward = ["ntm_sequence"] if sequence else [*gates, "memory_step"] * 2
    backward = ["memory_step_backward", *(f"{g}_backward" for g in gates)] * 2
    backward = ["ntm_sequence_backward"] if sequence else backward
    with backend.serves(*forward), torch.no_grad():
        auto(inputs)
    with backend.serves(*forward, *backward):
        auto(inputs)[0].sum().backward()
    with backend.serves(), torch.no_grad():
        make(engine="reference", dtype=torch.float32, controller=controller)(inputs)
    with backend.serves(*[*gates, "memory_step"] * 2), torch.no_grad():
        make(engine="step", dtype=torch.float32, controller=controller)(inputs)


@pytest.mark.parametrize("engine", SERVED)
def test_a_forced_engine_that_cannot_serve_says_why(engine: str) -> None:
    ntm = make(engine=engine, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"{engine}.*bfloat16"):
        ntm(some(2, 2, 3, dtype=torch.bfloat16))
    outputs, _ = make(engine="auto", dtype=torch.bfloat16)(some(2, 2, 3, dtype=torch.bfloat16))
    assert outputs.dtype is torch.bfloat16 and outputs.isfinite().all()


def test_the_sequence_engine_refuses_a_feedforward_controller(backend) -> None:
    skip_without_sequence(backend.device)
    for cls, inputs in ((FastNTM, some(2, 2, 3)), (NTMCell, some(2, 3))):
        with pytest.raises(RuntimeError, match="engine='sequence' cannot serve.*LSTM and GRU, not feedforward"):
            make(cls, engine="sequence", controller="feedforward")(inputs)


@pytest.mark.filterwarnings("ignore:ntm_fast has no native")
@pytest.mark.parametrize("engine", ("auto", "reference"))
def test_no_grad_keeps_no_graph(engine: str) -> None:
    ntm, inputs = make(engine=engine, dtype=torch.float32), some(3, 2, 3, dtype=torch.float32)
    packed = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x):
            outputs, state = ntm(inputs)
        assert not packed and all(x.grad_fn is None and not x.requires_grad for x in (outputs, *flat(state)))
    frozen = ntm.requires_grad_(False)
    assert not frozen(inputs)[0].requires_grad


def test_autocast(backend) -> None:
    """Products in bfloat16, the memory in float32: close to float32 by bfloat16's 3 digits, and it trains."""
    ntm = FastNTM(**SIZES, engine="auto")
    inputs = some(5, 2, 3, dtype=torch.float32)
    expected, _ = ntm(inputs)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        outputs, state = ntm(inputs)
        again, _ = ntm(inputs, state)
    assert state.memory.dtype is torch.float32
    torch.testing.assert_close(outputs.float(), expected, rtol=0.05, atol=0.02)
    again.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ntm.parameters())


@pytest.mark.filterwarnings("ignore:ntm_fast has no native")
@pytest.mark.parametrize("engine", ("auto", "reference"))
def test_compile(engine: str) -> None:
    torch._dynamo.reset()
    ntm, inputs = make(engine=engine, dtype=torch.float32), some(3, 2, 3, dtype=torch.float32)
    compiled = torch.compile(ntm, backend="aot_eager", fullgraph=True)
    results = []
    for module in (ntm, compiled):
        ntm.zero_grad()
        outputs, state = module(inputs)
        (outputs.square().sum() + state.memory.sum()).backward()
        results.append([outputs.detach(), *(p.grad.clone() for p in ntm.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# --- calls like earlier ones ------------------------------------------------------------------------------------------

# How a module is called for one step of a sequence (T, B, I).
FORMS = {
    "FastNTM": (FastNTM, {}, lambda x: x),
    "FastNTM, batch first": (FastNTM, {"batch_first": True}, lambda x: x.transpose(0, 1)),
    "FastNTM, unbatched": (FastNTM, {}, lambda x: x[:, 0]),
    "NTMCell": (NTMCell, {}, lambda x: x[0]),
    "NTMCell, unbatched": (NTMCell, {}, lambda x: x[0, 0]),
}


@pytest.fixture
def checks(monkeypatch) -> list[int]:
    """Grows with each call that is checked. Nothing has been remembered of earlier ones."""
    if ops.why_not_native(torch.device("cpu"), torch.float32, "ntm_sequence"):
        pytest.skip("no native sequence engine")
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch does not let its tensors be looked at")
    monkeypatch.setattr(sequence, "remembered", {})
    found, check = [], FastNTM._check_inputs
    for cls in (FastNTM, NTMCell):
        monkeypatch.setattr(cls, "_check_inputs", lambda *args: found.append(1) or check(*args))
    return found


def bits(outputs: Tensor, state: NTMState) -> list[Any]:
    """What can be told of results, as what can be compared."""
    return [(x.numpy().tobytes(), x.shape, x.stride(), x.dtype, x.requires_grad) for x in (outputs, *flat(state))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("controller", ("lstm", "gru"))
@pytest.mark.parametrize("batch", (1, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_streaming_checks_a_step_like_the_last_no_more(
    checks: list[int], monkeypatch, form: str, controller: str, batch: int, dtype: torch.dtype
) -> None:
    """The bits of one call for all steps, and all that can be told of the results of calls that were checked."""
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
    assert len(checks) == 2 + 1 + 1 + 1  # the first and the second step; wholes; without a state nothing is remembered
    before = bits(y, state)
    with torch.no_grad():
        found = bits(*module(take(inputs[:1]), state))
        assert bits(y, state) == before  # results are nobody else's
        monkeypatch.setattr(_native, "layouts", lambda tensors: None)  # as before torch 2.10
        assert bits(*module(take(inputs[:1]), state)) == found and len(checks) == 6


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


# What may come between two calls and must be heeded by the second.
CHANGES = {
    "nothing": lambda module: None,
    "clip": lambda module: setattr(module, "clip", 0.3),
    "read_first": lambda module: setattr(module, "read_first", True),
    "key_activation": lambda module: setattr(module, "key_activation", "identity"),
    "add_activation": lambda module: setattr(module, "add_activation", "identity"),
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
    """A call computes what it would, had nothing like it been met before."""
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
    layouts, seen = _native.layouts, []

    def blind(tensors: tuple) -> tuple:
        (part, layout), addresses = layouts(tensors)
        if len(tensors) > 7:  # arguments, and not results
            seen.append(layout)
            layout = seen[0]
        return (part, layout), addresses

    with monkeypatch.context() as plant:
        plant.setattr(ntm_fast.modules, "_SETTINGS", lambda module: ())
        for change in ("clip", "read_first", "key_activation", "add_activation"):
            with pytest.raises(AssertionError, match="not heeded"):
                check_that_it_is_heeded(change=change)
    with monkeypatch.context() as plant:
        plant.setattr(_native, "layouts", blind)
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
    state = module.initial_state(2).detach()  # whose memory does not lie as native code takes it
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
        (lambda x, s: (x.to_sparse(), s), "Contiguous"),  # which native code asks of it
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


# --- who is who: the wiring of heads and states -----------------------------------------------------------------------


def test_heads_keep_to_their_own_state() -> None:
    """Read and write weightings, and the order of heads, are told apart: any swap of the state's parts is seen."""
    ntm = make(read_heads=2, write_heads=2)
    inputs = some(1, 1, 3)
    state = ntm.initial_state(1).detach()
    outputs, final = ntm(inputs, state)
    swaps = {
        "read and write heads": state._replace(read_weights=state.write_weights, write_weights=state.read_weights),
        "two read heads": state._replace(read_weights=state.read_weights.flip(1)),
        "two write heads": state._replace(write_weights=state.write_weights.flip(1)),
        "two reads": state._replace(reads=state.reads.flip(1)),
        "hidden and cell": state._replace(controller=state.controller[::-1]),
    }
    for name, swapped in swaps.items():
        other, other_final = ntm(inputs, swapped)
        assert not torch.allclose(other, outputs, rtol=1e-6), f"swapping {name} changes nothing"


def _check_hand_set_machine(engine: str) -> None:
    """Heads told by biases alone: the write head moves on by one each step, the read head stays two steps behind it."""
    N, big = 6, 40.0
    ntm = FastNTM(
        1, 1, 2, memory_locations=N, memory_width=1, engine=engine, dtype=torch.float64, add_activation="identity",
        clip=None,
    )  # fmt: skip
    with torch.no_grad():
        for p in ntm.parameters():
            p.zero_()
        ntm.controller.weight_ih_l0[4:6, 0] = 1.0  # h = tanh(tanh(x)): cell input x, i and o open, f shut
        ntm.controller.bias_ih_l0.copy_(torch.tensor([big, big, -big, -big, 0, 0, big, big]))
        head = [0.0, 0.0, -big, -big, -big, big, big]  # k, beta, g: to the previous weighting, s: to +1, gamma
        ntm.heads.bias.copy_(torch.tensor([*head, *head, big, 0.0]))  # e: all
        ntm.heads.weight[-1, 0] = 1.0  # a = h
        ntm.initial_write_weights[0, 0] = 100 * big  # so the first write is to location 1
        ntm.initial_read_weights[0, N - 2] = 100 * big  # and the first read from location N - 1
        ntm.output.weight[0, 2] = 1.0  # output = read
    inputs = some(5, 1)
    outputs, state = ntm(inputs)
    stored = torch.tanh(torch.tanh(inputs))[:, 0]
    torch.testing.assert_close(state.memory[1:, 0], stored, **CLOSE)
    torch.testing.assert_close(outputs[2:, 0], stored[:3], **CLOSE)
    assert state.write_weights.argmax() == 5 and state.read_weights.argmax() == 3


def test_a_hand_set_machine_repeats_what_it_is_told() -> None:
    _check_hand_set_machine("reference")


@pytest.mark.parametrize("engine", SERVED)
def test_a_hand_set_machine_on_the_native_engines(backend, engine: str) -> None:
    _check_hand_set_machine(engine)


@pytest.mark.parametrize("fault", ("weights out", "weights in", "parameters", "stale memory", "stale weights"))
def test_planted_faults_in_the_wiring_are_found(monkeypatch, fault: str) -> None:
    right = reference.memory_step

    def wrong(memory, read_weights, write_weights, params, **options):
        if fault == "weights in":
            read_weights, write_weights = write_weights, read_weights
        if fault == "parameters":  # of the two heads, exchanged and with the shift turned round
            params = torch.cat([params[:, :3], params[:, 3:6].flip(1), params[:, 6:]], 1)
        reads, new_memory, new_reads, new_writes = right(memory, read_weights, write_weights, params, **options)
        if fault == "weights out":
            new_reads, new_writes = new_writes, new_reads
        if fault == "stale weights":
            new_writes = write_weights
        return reads, memory if fault == "stale memory" else new_memory, new_reads, new_writes

    monkeypatch.setattr(reference, "memory_step", wrong)
    with pytest.raises(AssertionError):
        _check_hand_set_machine("reference")


def test_trace_is_what_forward_did() -> None:
    for batched in (True, False):
        ntm, inputs = make(shift_range=2), some(5, *([3] if batched else []), 3)
        outputs, state = ntm(inputs)
        traced, trace = ntm.trace(inputs)
        assert isinstance(trace, NTMTrace)
        torch.testing.assert_close(traced, outputs, rtol=0, atol=0)
        for name in ("read_weights", "write_weights", "reads"):
            torch.testing.assert_close(getattr(trace, name)[-1], getattr(state, name), rtol=0, atol=0)
        lead = (5, 3) if batched else (5,)
        for name, shape in (
            ("read_weights", (2, 7)), ("write_weights", (2, 7)), ("reads", (2, 2)), ("key", (4, 2)), ("beta", (4,)),
            ("gate", (4,)), ("shift", (4, 5)), ("gamma", (4,)), ("erase", (2, 2)), ("add", (2, 2)),
        ):  # fmt: skip
            assert getattr(trace, name).shape == (*lead, *shape), name
        assert trace.read_weights.sum(-1).allclose(torch.ones(1).double()) and trace.shift.sum(-1).allclose(
            torch.ones(1).double()
        )
        # The heads as recorded, applied one step from the weightings recorded before it, give those recorded after.
        if batched:
            t, memory = 1, ntm(inputs[:1])[1].memory
            heads = [x[t][:, 2:] for x in (trace.key, trace.beta, trace.gate, trace.shift, trace.gamma)]
            weights = reference.address(memory, trace.write_weights[t - 1], *heads)
            torch.testing.assert_close(weights, trace.write_weights[t], **CLOSE)
            written = reference.erase_add_write(memory, weights, trace.erase[t], trace.add[t])
            torch.testing.assert_close(reference.read(written, trace.read_weights[t]), trace.reads[t], **CLOSE)


# --- names, and where weights come from and go to ---------------------------------------------------------------------


@pytest.mark.parametrize("layers", (1, 2))
def test_state_dict_names_and_shapes(layers: int) -> None:
    rows = {"lstm": 20, "gru": 15, "feedforward": 5}
    initial = {"lstm": ("hidden", "cell"), "gru": ("hidden",), "feedforward": ()}
    for controller in CONTROLLERS:
        expected = {
            "heads.weight": (4 * (2 + 2 + 4) + 2 * 2 * 2, 5),
            "heads.bias": (40,),
            "output.weight": (4, 5 + 2 * 2),
            "output.bias": (4,),
            "initial_memory": (7, 2),
            "initial_reads": (2, 2),
            "initial_read_weights": (2, 7),
            "initial_write_weights": (2, 7),
            **{f"controller.initial_{name}": (layers, 5) for name in initial[controller]},
        }
        for layer in range(layers):
            kinds = ("ih", "hh") if initial[controller] else ("ih",)
            for kind in kinds:
                columns = 3 + 2 * 2 if kind == "ih" and layer == 0 else 5
                expected[f"controller.weight_{kind}_l{layer}"] = (rows[controller], columns)
                expected[f"controller.bias_{kind}_l{layer}"] = (rows[controller],)
        for cls in (FastNTM, NTMCell):
            for mode in ("constant", "learned", "learned_constant", "random"):
                state = cls(**SIZES, controller=controller, num_layers=layers, memory_init=mode).state_dict()
                assert {name: tuple(x.shape) for name, x in state.items()} == expected


@pytest.mark.parametrize(("name", "layers"), [("lstm", 1), ("lstm", 3), ("gru", 1), ("gru", 3)])
def test_controller_weights_are_nn_lstms_and_nn_grus(name: str, layers: int) -> None:
    """Loaded both ways, and the controller computes what nn.LSTM or nn.GRU does over the same inputs."""
    ntm = make(controller=name, num_layers=layers)
    rnn = getattr(nn, name.upper())(3 + 2 * 2, 5, layers, dtype=torch.float64)
    for module in (ops, reference):
        ntm.controller.load_state_dict(rnn.state_dict(), strict=False)
        state = tuple(some(layers, 2, 5, seed=9 + i) for i in range(len(ntm.controller.state_names)))
        inputs = some(6, 2, 7)
        expected, expected_state = rnn(inputs, state if name == "lstm" else state[0])
        kind = reference.CONTROLLERS[name]
        steps = [kind.layer(module, own) for own in reference.by_layer(ntm.controller.weights(), 4)]
        layer_states = [[x[layer] for x in state] for layer in range(layers)]
        for x, want in zip(inputs, expected):
            for layer, step in enumerate(steps):
                layer_states[layer] = step(x, *layer_states[layer])
                x = layer_states[layer][0]
            torch.testing.assert_close(x, want, **CLOSE)
        final = tuple(torch.stack(x) for x in zip(*layer_states))
        torch.testing.assert_close(final, expected_state if name == "lstm" else (expected_state,), **CLOSE)
    learned = {
        n: x for n, x in make(controller=name, num_layers=layers).controller.state_dict().items() if "initial" not in n
    }
    rnn.load_state_dict(learned)
    assert all(torch.equal(x, learned[n]) for n, x in rnn.state_dict().items())


def test_state_dict_round_trip_and_its_errors() -> None:
    ntm, other = make(), FastNTM(**SIZES, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(ntm.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    inputs = some(4, 2, 3)
    torch.testing.assert_close(other(inputs)[0], ntm(inputs)[0], **CLOSE)
    # A buffer and a parameter load into each other: the names are the same in every mode.
    make(memory_init="learned").load_state_dict(ntm.state_dict())
    with pytest.raises(RuntimeError, match="heads.weight"):
        make(shift_range=2).load_state_dict(ntm.state_dict())
    with pytest.raises(RuntimeError, match="weight_hh_l0"):
        make(controller="feedforward").load_state_dict(ntm.state_dict())


def test_copies_and_casts() -> None:
    ntm, inputs = make(memory_init="learned"), some(4, 2, 3)
    expected, state = ntm(inputs)
    for other in (copy.deepcopy(ntm), pickle.loads(pickle.dumps(ntm))):
        torch.testing.assert_close(other(inputs)[0], expected, rtol=0, atol=0)
        assert not {id(p) for p in ntm.parameters()} & {id(p) for p in other.parameters()}
    restored = pickle.loads(pickle.dumps(state.detach()))
    assert_states_close(restored, state.detach(), rtol=0, atol=0)
    single = copy.deepcopy(ntm).float()
    assert {x.dtype for x in single.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(single(inputs.float())[0].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.double()(inputs)[0], expected, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(ntm).to(torch.bfloat16)
    outputs, _ = half(inputs.bfloat16(), state.detach().to(torch.bfloat16))
    assert outputs.dtype is torch.bfloat16 and outputs.isfinite().all()


def test_meta_device_and_to_empty() -> None:
    ntm = FastNTM(**SIZES, device="meta")
    assert all(x.is_meta for x in ntm.state_dict().values())
    outputs, state = ntm(torch.empty(3, 2, 3, device="meta"))
    assert outputs.shape == (3, 2, 4) and outputs.is_meta
    real = ntm.to_empty(device="cpu")
    real.reset_parameters()
    assert all(x.isfinite().all() for x in real.state_dict().values())
    assert real(torch.zeros(3, 2, 3))[0].isfinite().all()


def test_seeds_decide_the_parameters() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return FastNTM(**SIZES, memory_init="random").state_dict()

    first, same, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not torch.equal(first["heads.weight"], other["heads.weight"])
    assert "memory=7x2" in repr(make())


@pytest.mark.parametrize("engine", ("auto", "reference"))
@pytest.mark.filterwarnings("ignore:ntm_fast has no native")
def test_the_smallest_and_the_empty(engine: str) -> None:
    tiny = FastNTM(1, 1, 1, memory_locations=1, memory_width=1, shift_range=0, engine=engine)
    tiny(torch.zeros(2, 1, 1))[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in tiny.parameters())
    outputs, state = make(engine=engine)(some(3, 0, 3))
    assert outputs.shape == (3, 0, 4) and state.memory.shape == (0, 7, 2)
    outputs.sum().backward()


def test_fresh_machines_have_finite_gradients_over_long_sequences() -> None:
    """The standard machine at its initial values, memory constant, 100 steps, inputs mostly zero as in a copy."""
    for controller in CONTROLLERS:
        ntm = FastNTM(9, 8, controller=controller, memory_locations=32)
        inputs = torch.zeros(100, 4, 9)
        inputs[:20] = (torch.rand(20, 4, 9) > 0.5).float()
        ntm(inputs)[0].square().sum().backward()
        assert all(p.grad.isfinite().all() for p in ntm.parameters())


# --- bad input --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ("controller.weight_ih_l0", "controller.bias_hh_l1", "heads.bias", "output.weight"))
def test_parameters_that_do_not_fit_are_named(backend, name: str) -> None:
    skip_without_sequence(backend.device)
    layer, parameter = name.split(".")
    for wrong, words in ((lambda x: x[..., :-1], "shape.*expected"), (lambda x: x.float(), "float32.*float64")):
        module = make(engine="sequence", num_layers=2)
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


def test_an_initial_state_that_does_not_fit_is_named(backend) -> None:
    skip_without_sequence(backend.device)

    class Own(FastNTM):
        def initial_state(self, batch_size: int) -> NTMState:
            state = super().initial_state(batch_size)
            return state._replace(reads=state.reads[:, :1])

    with pytest.raises(ValueError, match=r"state.reads.*\(2, 1, 2\).*\(2, 2, 2\)"):
        make(Own, engine="sequence")(some(3, 2, 3))
    module = make(engine="sequence")
    module.initial_memory = module.initial_memory[:-1]
    with pytest.raises(ValueError, match=r"state.memory.*\(6, 2\).*\(7, 2\)"):
        module(some(3, 2, 3))


def test_a_weight_without_storage_is_refused(backend) -> None:
    skip_without_sequence(backend.device)
    module = make(engine="sequence")
    module.heads.weight.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="storage"):
        module(some(3, 2, 3))


def test_fake_tensors_outside_of_their_mode() -> None:
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module, inputs = FastNTM(**SIZES), torch.empty(3, 2, 3)
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            outputs, state = module(inputs)
            outputs, _ = module(inputs, state)
        assert isinstance(outputs, torch._subclasses.FakeTensor) and outputs.shape == (3, 2, 4)


def test_lengths_are_reserved() -> None:
    ntm = make()
    ntm(some(2, 2, 3), lengths=None)
    with pytest.raises(NotImplementedError, match="lengths"):
        ntm(some(2, 2, 3), lengths=torch.tensor([1, 2]))


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


def test_public_names() -> None:
    for name in (
        "FastNTM",
        "NTMCell",
        "NTMState",
        "NTMTrace",
        "available",
        "capabilities",
        "explain",
        "ops",
        "reference",
    ):
        assert name in ntm_fast.__all__ and hasattr(ntm_fast, name)
    assert {"cpu", "cuda"} <= set(ntm_fast.capabilities())
