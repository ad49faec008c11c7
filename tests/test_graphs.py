"""The step engine in CUDA graphs: the same answers as without, whatever comes in between.

On a GPU with its graphs, elsewhere with an emulation that replays addresses and nothing of Python (graphs_on_host.py).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import types
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import torch.utils.flop_counter
from graphs_on_host import HostRecorder
from test_modules import CLOSE, CONTROLLERS, flat, make, some
from torch import Tensor

import ntm_fast
from ntm_fast import FastNTM, NTMCell, NTMState, graphs, ops, recurrence, sequence
from ntm_fast.modules import MEMORY_INITS

FIRST = graphs.CAPTURED_AT  # the call that is captured
CALLS = FIRST + 2


@pytest.fixture(autouse=True)
def _where_the_backend_computes(request, monkeypatch):
    """On the CPU the emulation serves; what is made is made on the backend's device."""
    names = {"backend", "kernels"} & set(request.fixturenames)
    device = request.getfixturevalue(*names).device if names else "cpu"
    if device == "cpu":
        monkeypatch.setitem(graphs.RECORDERS, "cpu", HostRecorder)
        HostRecorder.replays = 0
    monkeypatch.setattr(graphs, "_warned", False)
    with torch.device(device) if device != "cpu" else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="ntm_fast")
        yield


@contextlib.contextmanager
def without_graphs():
    recorders = dict(graphs.RECORDERS)
    graphs.RECORDERS.clear()
    try:
        yield
    finally:
        graphs.RECORDERS.update(recorders)


@pytest.fixture
def tapes(monkeypatch) -> list:
    """Of every StepTape that is made, and captured or run kernel by kernel, whether it keeps what backward needs."""
    made: list = []

    class Counted(recurrence.StepTape):
        def __init__(self, controller, options, keep, tensors):
            made.append(keep)
            super().__init__(controller, options, keep, tensors)

    monkeypatch.setattr(recurrence, "StepTape", Counted)
    return made


def captured() -> list:
    return [kind.captured for kind in graphs._kinds.values() if kind.captured]


def some_state(ntm: FastNTM, seed: int) -> NTMState:
    """Of two sequences; leaves."""
    return ntm.initial_state(2).detach().map(lambda x: some(*x.shape, seed=seed).softmax(-1).requires_grad_())


def train(ntm: FastNTM, inputs: Tensor, state: NTMState | None = None) -> list[Tensor]:
    """Outputs, the final state, and the gradients of all that requires one: as they were returned, not copies."""
    outputs, final = ntm(inputs, state)
    results = [outputs, *flat(final)]
    loss = sum((x * some(*x.shape, dtype=x.dtype, seed=40 + i)).sum() for i, x in enumerate(results))
    leaves = [x for x in (*ntm.parameters(), inputs, *(flat(state) if state else [])) if x.requires_grad]
    return [*results, *(x for x in torch.autograd.grad(loss, leaves, allow_unused=True) if x is not None)]


def check(needs_inputs: bool = True, given: bool = False, close: dict = CLOSE, **options: Any) -> None:
    """Calls with other numbers and other parameters each time; and what was returned earlier stays as it was."""
    ntm = make(engine="step", **{"memory_init": "learned", **options})
    twin, held = copy.deepcopy(ntm), []
    for call in range(CALLS):
        inputs = some(5, 2, 3, seed=call, dtype=ntm.heads.weight.dtype).requires_grad_(needs_inputs)
        state = some_state(ntm, seed=call) if given else None
        found = train(ntm, inputs, state)
        with without_graphs():
            wanted = train(twin, inputs, state)
        torch.testing.assert_close(found, wanted, **close)
        held.append((found, wanted))
        with torch.no_grad():
            for index, (a, b) in enumerate(zip(ntm.parameters(), twin.parameters())):
                a.add_(0.1 * some(*a.shape, dtype=a.dtype, seed=50 + index))
                b.copy_(a)
    for found, wanted in held:
        torch.testing.assert_close(found, wanted, **close)


TABLE: list[dict[str, Any]] = [
    *({"controller": c, "num_layers": n} for c in CONTROLLERS for n in (1, 2)),
    *({"controller": c, "needs_inputs": False} for c in CONTROLLERS),
    *({"controller": c, "num_layers": 3, "given": True} for c in CONTROLLERS),
    {"read_heads": 1, "write_heads": 1, "read_first": True, "key_activation": "identity", "clip": None},
    {"read_heads": 3, "write_heads": 1, "controller": "gru", "read_first": True, "shift_range": 0, "given": True},
    {"read_heads": 1, "write_heads": 3, "add_activation": "identity", "clip": 1.0, "shift_range": 3},
    *({"memory_init": init} for init in MEMORY_INITS if init != "learned"),
]


@pytest.mark.parametrize("options", TABLE, ids=str)
def test_captured_calls_give_the_same(backend, tapes: list, options: dict) -> None:
    check(**options)
    # The twin made one for each call, and ours one for each call until, and with, the one that was captured.
    assert len(tapes) == CALLS + FIRST and len(captured()) == 1


@pytest.mark.parametrize("controller", ("lstm", "gru"))
def test_every_build_of_the_kernels(kernels, controller: str) -> None:
    """CUDA's, compiled for the host, with the room that they ask for."""
    check(controller=controller)


def test_float32_too(backend) -> None:
    check(dtype=torch.float32, hidden_size=16, close=dict(rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_streaming(backend, tapes: list, controller: str, mode: Any) -> None:
    """A step a call, the state carried; every output and state is still there at the end."""
    for cls in (FastNTM, NTMCell):
        ntm, held, states = make(cls, engine="step", controller=controller), [], [None, None]
        ntm_fast.empty_cache()
        tapes.clear()
        for call in range(8):
            x = some(*((2, 3) if cls is NTMCell else (1, 2, 3)), seed=call)
            with mode():
                found, states[0] = ntm(x, states[0])
                with without_graphs():
                    wanted, states[1] = ntm(x, states[1])
            held.append(([found, *flat(states[0])], [wanted, *flat(states[1])]))
        for found, wanted in held:
            torch.testing.assert_close(found, wanted, **CLOSE)
        assert tapes == [False] * (8 + FIRST)


def test_first_in_one_mode_then_in_another(backend) -> None:
    """Captured under inference_mode, where every new tensor is one that autograd refuses."""
    ntm, inputs = make(engine="step"), some(5, 2, 3)
    with without_graphs(), torch.no_grad():
        wanted, _ = ntm(inputs)
    for mode in (*[torch.inference_mode] * FIRST, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            found, state = ntm(inputs)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert found.is_inference() == (mode is torch.inference_mode)
    assert len(captured()) == 1


# --- one forward after another, and backwards in any order ------------------------------------------------------------


def warm(ntm: FastNTM, calls: int = FIRST) -> None:
    """As many calls of a training step, all of one kind."""
    for call in range(calls):
        train(ntm, some(5, 2, 3, seed=90 + call).requires_grad_())


def forward(ntm: FastNTM, seed: int) -> tuple[Tensor, Tensor, NTMState]:
    inputs = some(5, 2, 3, seed=seed).requires_grad_()
    return inputs, *ntm(inputs)


def gradient(inputs: Tensor, outputs: Tensor, final: NTMState, **options: Any) -> Tensor:
    return torch.autograd.grad(outputs.square().sum() + final.memory.square().sum(), inputs, **options)[0]


def expected(ntm: FastNTM, seed: int) -> Tensor:
    with without_graphs():
        return gradient(*forward(ntm, seed))


def test_a_second_forward_before_the_firsts_backward(backend, tapes: list) -> None:
    ntm = make(engine="step")
    warm(ntm)
    tapes.clear()
    calls = [forward(ntm, seed) for seed in range(3)]
    assert len(tapes) == 2  # the first is in the graphs, the others are run kernel by kernel
    for seed in (1, 0, 2):
        torch.testing.assert_close(gradient(*calls[seed]), expected(ntm, seed), **CLOSE)
    tapes.clear()
    assert gradient(*forward(ntm, 3)) is not None and not tapes  # whose turn is over, though their outputs are there


def test_a_forward_that_is_never_gone_back_over(backend, tapes: list) -> None:
    """As a validation that forgets no_grad does: the turn ends with the outputs."""
    ntm = make(engine="step")
    warm(ntm)
    tapes.clear()
    for seed in range(3):
        outputs, state = forward(ntm, seed)[1:]
        del outputs, state
    assert not tapes
    torch.testing.assert_close(gradient(*forward(ntm, 3)), expected(ntm, 3), **CLOSE)


def test_retained_graphs_keep_their_turn(backend, tapes: list) -> None:
    ntm = make(engine="step")
    warm(ntm)
    call = forward(ntm, 0)
    first = gradient(*call, retain_graph=True)
    tapes.clear()
    other = gradient(*forward(ntm, 1))
    assert len(tapes) == 1
    torch.testing.assert_close(other, expected(ntm, 1), **CLOSE)
    again = gradient(*call)
    torch.testing.assert_close(again, first, **CLOSE)
    torch.testing.assert_close(first, expected(ntm, 0), **CLOSE)
    with pytest.raises(RuntimeError, match="second time"):
        gradient(*call)
    tapes.clear()
    gradient(*forward(ntm, 2))
    assert not tapes


def test_gradients_through_a_state_carried_on(backend) -> None:
    """Two calls of one kind, both on the way back: the second waits for nobody's turn."""
    ntm = make(engine="step", memory_init="learned")
    warm(ntm)
    found = []
    for context in (contextlib.nullcontext, without_graphs):
        with context():
            inputs = some(10, 2, 3).requires_grad_()
            outputs, state = ntm(inputs[:5])
            more, _ = ntm(inputs[5:], state)
            found.append(torch.autograd.grad(torch.cat([outputs, more]).square().sum(), [inputs, *ntm.parameters()]))
    torch.testing.assert_close(*found, **CLOSE)


def test_gradient_penalty(backend) -> None:
    """Second derivatives: the reference's, as without graphs."""
    ntm = make(engine="step")
    warm(ntm)
    found = []
    for context in (contextlib.nullcontext, without_graphs):
        with context():
            inputs, outputs, _ = forward(ntm, 0)
            (grad,) = torch.autograd.grad(outputs.square().sum(), inputs, create_graph=True)
            (outputs.sum() + grad.square().sum()).backward()
            found.append([grad, *(p.grad for p in ntm.parameters())])
            ntm.zero_grad()
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("what", ("memory", "read_weights", "write_weights", "inputs", "parameter"))
def test_changes_in_place_before_backward_are_noticed(backend, what: str) -> None:
    ntm = make(engine="step")
    warm(ntm)
    inputs, outputs, state = forward(ntm, 0)
    changed = {"inputs": inputs, "parameter": ntm.heads.weight, **state._asdict()}[what]
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(inputs, outputs, state)


def test_under_torch_checkpoint(backend) -> None:
    ntm = make(engine="step")
    for _ in range(FIRST + 2):
        found = []
        for reentrant in (False, True, None):
            with without_graphs() if reentrant is None else contextlib.nullcontext():
                inputs = some(5, 2, 3).requires_grad_()
                if reentrant is None:
                    outputs = ntm(inputs)[0]
                else:
                    outputs = torch.utils.checkpoint.checkpoint(lambda x: ntm(x)[0], inputs, use_reentrant=reentrant)
                ntm.zero_grad()
                outputs.square().sum().backward()
                found.append([inputs.grad, *(p.grad for p in ntm.parameters())])
        torch.testing.assert_close(found[0], found[2], **CLOSE)
        torch.testing.assert_close(found[1], found[2], **CLOSE)
    assert captured()


def test_gradients_batched_over_directions_are_right_or_refused(backend) -> None:
    ntm = make(engine="step")
    warm(ntm)
    inputs, outputs, _ = forward(ntm, 0)
    directions = torch.stack([some(*outputs.shape, seed=seed) for seed in (1, 2)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            (found,) = torch.autograd.grad(outputs, inputs, directions, is_grads_batched=True, retain_graph=True)
        except RuntimeError:
            return
    with without_graphs():
        inputs, outputs, _ = forward(ntm, 0)
        wanted = [torch.autograd.grad(outputs, inputs, x, retain_graph=True)[0] for x in directions]
    torch.testing.assert_close(found, torch.stack(wanted), **CLOSE)


def test_threads_take_turns(backend) -> None:
    ntm = make(engine="step")
    warm(ntm)
    wanted = [expected(ntm, seed) for seed in range(2)]

    def work(seed: int) -> None:
        with torch.device(backend.device):
            for _ in range(10):
                torch.testing.assert_close(gradient(*forward(ntm, seed)), wanted[seed], **CLOSE)

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))


# --- what is captured, and what not -----------------------------------------------------------------------------------


def test_each_kind_of_call_by_itself(backend, tapes: list, monkeypatch) -> None:
    """Whatever a captured call depends on makes another kind of call: none is served by another's graphs."""
    ntm, kinds = make(engine="step"), 0

    def call(module: FastNTM, *shape: int, grad: bool = True, needs_inputs: bool = False) -> None:
        nonlocal kinds
        kinds += 1
        for _ in range(FIRST):
            with torch.set_grad_enabled(grad):
                train(module, some(*shape).requires_grad_(needs_inputs)) if grad else module(some(*shape))
        assert len(captured()) == kinds

    monkeypatch.setattr(graphs, "KEYS", 100)
    call(ntm, 5, 2, 3)
    call(ntm, 5, 2, 3, needs_inputs=True)
    call(ntm, 5, 2, 3, grad=False)
    call(ntm, 4, 2, 3)
    call(ntm, 5, 3, 3)
    for options in (
        {"controller": "gru"}, {"num_layers": 2}, {"hidden_size": 6}, {"memory_locations": 8}, {"memory_width": 3},
        {"read_heads": 1}, {"write_heads": 1}, {"shift_range": 2}, {"read_first": True}, {"clip": 1.0}, {"clip": None},
        {"key_activation": "identity"}, {"add_activation": "identity"},
    ):  # fmt: skip
        call(make(engine="step", **options), 5, 2, 3)
    before = graphs._precision()
    monkeypatch.setattr(graphs, "_precision", lambda: (before, "less"))
    call(ntm, 5, 2, 3)


def test_precision_is_what_torch_allows() -> None:
    found = []
    for allowed in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(allowed)
        found.append(graphs._precision())
    assert found[0] == found[2] != found[1]


def test_each_stream_by_itself(monkeypatch) -> None:
    ntm, stream = make(engine="step"), 0
    monkeypatch.setattr(HostRecorder, "stream", staticmethod(lambda device: stream))
    for stream in (1, 2, 1, 2):
        warm(ntm)
    assert len(captured()) == 2
    stream = None  # somebody captures it
    before = HostRecorder.replays
    warm(ntm)
    assert HostRecorder.replays == before


def test_what_is_not_captured(backend, tapes: list) -> None:
    """Nothing under a mode, autocast or a transform, whoever captures already, and no empty batch."""
    ntm = make(engine="step", dtype=torch.float32)
    inputs = some(5, 2, 3, dtype=torch.float32)
    for _ in range(FIRST + 1):
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            ntm(inputs)
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            ntm(inputs)
        torch.func.vmap(lambda x: ntm(x)[0])(torch.stack([inputs, inputs]))
        ntm(inputs[:, :0])
    assert not graphs._kinds


class Failing(HostRecorder):
    """Fails in the capture of that number."""

    at = 1

    def capture(self, work):
        self.count = getattr(self, "count", 0) + 1

        def failing():
            results = work()
            if self.count == Failing.at:
                raise torch.OutOfMemoryError("out of memory, as planned")
            return results

        return super().capture(failing)


@pytest.mark.parametrize("at", (1, 2))
def test_a_capture_that_fails_loses_nothing(monkeypatch, tapes: list, at: int) -> None:
    monkeypatch.setitem(graphs.RECORDERS, "cpu", Failing)
    monkeypatch.setattr(Failing, "at", at)
    ntm, others = make(engine="step"), make(engine="step", controller="gru")
    with pytest.warns(RuntimeWarning, match="out of memory, as planned") as told:
        for seed in range(FIRST + 2):
            torch.testing.assert_close(gradient(*forward(ntm, seed)), expected(ntm, seed), **CLOSE)
        warm(others)
    assert len(told) == 1 and not captured()
    assert len(tapes) == 2 * (FIRST + 2) + 1 + FIRST + 1  # one attempt for each of the two kinds
    monkeypatch.setattr(Failing, "at", 0)
    warm(ntm)
    assert not captured()  # not tried again,
    ntm_fast.empty_cache()
    warm(ntm)
    assert len(captured()) == 1  # unless one asks for it


def test_the_longest_unused_goes_first(monkeypatch) -> None:
    monkeypatch.setattr(graphs, "KEYS", 2)
    ntm = make(engine="step")

    def call(steps: int) -> None:
        with torch.no_grad():
            ntm(some(steps, 2, 3))

    def kept() -> list[int]:
        return sorted(tape.given[0].shape[0] for tape in captured())

    for steps in (1, 2):
        for _ in range(FIRST):
            call(steps)
    assert kept() == [1, 2]
    for _ in range(5):  # all in use: no one drives out another
        for steps in (1, 2, 3):
            call(steps)
    assert kept() == [1, 2]
    for _ in range(2 * FIRST):
        call(2)
        call(3)
    assert kept() == [2, 3]
    for _ in range(FIRST):
        call(1)
    assert kept() == [1, 3]
    for steps in range(4, 4 + graphs.REMEMBERED):
        graphs._see(steps)
    assert len(graphs._kinds) == graphs.REMEMBERED and not captured()


def test_memory_is_bounded(monkeypatch) -> None:
    ntm = make(engine="step")
    warm(ntm)
    (one,) = captured()
    # The tape: memories, weightings, gates and head parameters of five steps, of two sequences.
    assert 8 * 5 * 2 * (7 * 2 + 4 * 7 + 4 * 5 + ntm.heads.out_features) < one.bytes < 1 << 20
    monkeypatch.setattr(HostRecorder, "room", int(1.5 * one.bytes / graphs.SHARE))
    warm(make(engine="step", memory_locations=9))  # which drives the other out, as nobody has used it meanwhile
    assert [tape.given[1].shape[1] for tape in captured()] == [9]
    monkeypatch.setattr(HostRecorder, "room", int(0.9 * one.bytes / graphs.SHARE))
    ntm_fast.empty_cache()
    with pytest.warns(RuntimeWarning, match="all captured ones together may take 25%"):
        warm(ntm, FIRST + 1)
    assert not captured()


def test_empty_cache_drops_what_was_captured(backend, tapes: list) -> None:
    ntm = make(engine="step")
    warm(ntm)
    call, alive = forward(ntm, 0), weakref.ref(captured()[0])
    ntm_fast.empty_cache()
    assert not captured() and alive() is not None
    torch.testing.assert_close(gradient(*call), expected(ntm, 0), **CLOSE)
    del call
    assert alive() is None
    tapes.clear()
    warm(ntm)
    assert len(tapes) == FIRST and len(captured()) == 1


# --- which engine -----------------------------------------------------------------------------------------------------


def test_auto_takes_large_controllers_in_steps_on_cuda(monkeypatch) -> None:
    """As if CUDA had all kernels: the choice alone, on tensors without storage."""

    class Weight:
        device, dtype = torch.device("cuda", 0), torch.float32

    def chosen(engine: str = "auto", device: str = "cuda", **options: Any) -> str:
        ntm = FastNTM(3, 4, engine=engine, device="meta", **options)
        weight = Weight()
        weight.device = torch.device(device)
        return ntm._choose_engine(weight)

    monkeypatch.setattr(ops, "why_not_native", lambda *_: None)
    monkeypatch.setattr(sequence, "why_no_room", lambda *_: None)
    limit = ops.LARGEST_HIDDEN
    assert chosen(hidden_size=limit) == "sequence" and chosen(hidden_size=limit + 1) == "step"
    assert chosen(hidden_size=limit, controller="feedforward") == "step"
    assert chosen(hidden_size=4 * limit, device="cpu") == "sequence"
    assert chosen("sequence", hidden_size=4 * limit) == "sequence" and chosen("step", hidden_size=8) == "step"
    with monkeypatch.context() as patch:
        patch.setattr(recurrence, "can_serve", lambda device_type: False)  # autocast, torch.compile: no graphs then
        assert chosen(hidden_size=4 * limit) == "sequence"
    monkeypatch.setattr(ops, "why_not_native", lambda *args: "no such kernel" if "ntm_sequence" in args else None)
    assert chosen(hidden_size=8) == "step"
    assert f"of more than {limit}" in FastNTM.__doc__


def test_compiled_code_is_not_unrolled_for_it(backend, monkeypatch) -> None:
    """torch.compile cannot capture steps into graphs of ours: there it stays with one operator for all of them."""
    if reason := ops.why_not_native(torch.device(backend.device), torch.float32, "ntm_sequence"):
        pytest.skip(reason)
    monkeypatch.setattr(ops, "faster_in_steps", lambda *_: True)
    ntm, inputs = make(engine="auto", dtype=torch.float32), some(3, 2, 3, dtype=torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        with backend.serves(*["lstm_gates", "memory_step"] * 3):
            ntm(inputs)
        compiled = torch.compile(ntm, backend="aot_eager", fullgraph=True)
        with backend.serves("ntm_sequence"):
            compiled(inputs)
    torch._dynamo.reset()


# --- planted faults ---------------------------------------------------------------------------------------------------


def _skip(count: int, index: int):
    """Leave one of so many tensors as it was."""
    right = graphs._copy_in

    def wrong(targets, sources):
        if len(targets) == count:
            targets, sources = ([x for i, x in enumerate(xs) if i != index] for xs in (targets, sources))
        right(targets, sources)

    return "_copy_in", wrong


GIVEN, RESULTS = 13, 7  # the tensors of an LSTM's sequence: inputs, a state of 6, weights of 6; features and that state
FAULTS = {
    **{f"given {index} is not copied": lambda index=index: _skip(GIVEN, index) for index in range(GIVEN)},
    **{f"result or its gradient {index} is not copied": lambda i=index: _skip(RESULTS, i) for index in range(RESULTS)},
    "static tensors are handed out": lambda: ("_copies", lambda tensors: list(tensors)),
}


@pytest.mark.parametrize("fault", [None, *FAULTS], ids=str)
def test_planted_faults_are_found(monkeypatch, fault: str | None) -> None:
    if fault is not None:
        monkeypatch.setattr(graphs, *FAULTS[fault]())
    with contextlib.nullcontext() if fault is None else pytest.raises(AssertionError):
        check(given=True)


def test_a_tape_that_is_not_kept_is_found(monkeypatch) -> None:
    """Its memory would be a pool's, to give away."""
    right = graphs._Captured.__init__

    def wrong(self, *args):
        right(self, *args)
        self.tape = None

    monkeypatch.setattr(graphs._Captured, "__init__", wrong)
    with pytest.raises(AssertionError):
        check()


def test_a_turn_that_is_not_taken_is_found(monkeypatch, tapes: list) -> None:
    monkeypatch.setattr(graphs, "weakref", types.SimpleNamespace(ref=lambda turn: lambda: None))
    ntm = make(engine="step")
    warm(ntm)
    calls = [forward(ntm, seed) for seed in range(2)]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradient(*calls[0]), expected(ntm, 0), **CLOSE)


def test_the_emulation_refuses_what_a_capture_refuses() -> None:
    """Numbers read on the host, and one capture within another."""
    recorder = HostRecorder(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder.capture(lambda: torch.ones(1).item())
    assert recorder.stream(recorder.device) == 0
    _, within = recorder.capture(lambda: recorder.stream(recorder.device))
    assert within is None
    x = torch.ones(3)
    replay, (y, z) = recorder.capture(lambda: (x + 1, (x * 2).sum()))
    assert y.isnan().all() and z.isnan()
    replay()
    assert y.tolist() == [2, 2, 2] and z == 6
    x.fill_(2)
    replay()
    assert y.tolist() == [3, 3, 3] and z == 12


# --- CUDA's own, with every call of it a stand-in ---------------------------------------------------------------------


@pytest.mark.parametrize("invalid", (False, True))
def test_calls_of_cuda(monkeypatch, invalid: bool) -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def stream(which):
        log.append(f"on {which}")
        try:
            yield
        finally:
            log.append(f"off {which}")

    @contextlib.contextmanager
    def graph(it, pool, stream, capture_error_mode):
        log.append(f"begin {pool} {stream} {capture_error_mode}")
        yield
        log.append("end")
        if invalid:
            raise RuntimeError("the capture is invalid")

    class Graph:
        def replay(self):
            log.append("replay")

    reserved, streams = iter((100, 160)), iter(range(5))
    stand_ins = {
        "Stream": lambda device, priority: f"side {next(streams)}", "graph_pool_handle": lambda: "pool",
        "CUDAGraph": Graph, "stream": stream,
        "current_stream": lambda device: "current", "graph": graph, "empty_cache": lambda: log.append("empty"),
        "memory_reserved": lambda device: next(reserved), "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: invalid,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: log.append("close"), raising=False)
    monkeypatch.setattr(graphs.CUDARecorder, "_idle", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 40 + index, raising=False)
    device = torch.device("cuda", 1)
    recorder = graphs.CUDARecorder(device)
    before = ["on current", "empty", "begin pool side 0 thread_local", "work", "end"]
    if invalid:
        with pytest.raises(RuntimeError, match="invalid"):
            recorder.capture(lambda: log.append("work"))
        assert log == [*before, "close", "off current"] and recorder.stream(device) is None
        return
    replay, results = recorder.capture(lambda: log.append("work") or 5)
    assert log == [*before, "off current"] and results == 5 and recorder.bytes == 60
    replay()
    assert log[-1] == "replay" and recorder.stream(device) == 41
    # A stream for each, until it is no longer used.
    other = graphs.CUDARecorder(device)
    assert other.capture_stream == "side 1"
    del other
    assert graphs.CUDARecorder(device).capture_stream == "side 1"
