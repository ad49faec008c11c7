"""The sequence engine under PyTorch's own tools: second derivatives, torch.compile, autocast, checkpoints."""

from __future__ import annotations

import functools
import gc
import re
import weakref

import pytest
import torch
import torch.utils.checkpoint
from helpers.backends import CUDA_ON_HOST, Backend
from helpers.machines import NATIVE
from helpers.sequences import Case, arguments, assert_same_bits, named, train
from torch import Tensor

from ntm_fast import native
from ntm_fast.ops import sequence_kernels
from ntm_fast.ops.sequence_plan import Trail


@pytest.mark.parametrize("change", [{}, {"controller": "gru", "layers": 2}, {"given": False, "checkpoint": 2}], ids=str)
def test_second_derivatives(backend: Backend, change: dict) -> None:
    case = Case(**{**dict(T=3, B=2, hidden=4, N=6, M=3), **change})
    found = []
    for engine in ("reference", "sequence"):
        ntm, inputs = case.module(engine), case.inputs().requires_grad_()
        state = case.state().map(Tensor.requires_grad_) if case.given else None
        leaves = [inputs, *(p for n, p in ntm.named_parameters() if state is None or "initial" not in n)]
        leaves += named(state).values() if state is not None else []
        outputs, final = ntm(inputs, state)
        first = torch.autograd.grad(outputs.square().sum() + final.memory.sum(), leaves, create_graph=True)
        penalty = outputs.sum() + sum(x.square().sum() for x in first)
        found.append([*first, *torch.autograd.grad(penalty, leaves)])
    # The reference computes the second derivatives in both; only sums are in another order.
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("checkpoint", ("all", 2))
def test_backward_twice_gives_the_same_twice(backend: Backend, checkpoint) -> None:
    case = Case("gru", checkpoint=checkpoint)
    ntm, inputs = case.module("sequence"), case.inputs().requires_grad_()
    outputs, final = ntm(inputs, case.state())
    loss = outputs.square().sum() + final.memory.sum()
    leaves = [inputs, *(p for n, p in ntm.named_parameters() if "initial" not in n)]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("what", ("memory", "read_weights", "write_weights", "reads", "controller[0]", "controller[1]"))
def test_changing_what_was_returned_is_noticed_or_harmless(backend: Backend, what: str) -> None:
    case = Case()
    want = train(case, "sequence")["grad inputs"]
    inputs = case.inputs().requires_grad_()
    outputs, final = case.module("sequence")(inputs, case.state().map(Tensor.requires_grad_))
    results = [outputs, *named(final).values()]
    grads = [case.normal(*x.shape, seed=20 + i) for i, x in enumerate(results)]
    with torch.no_grad():
        named(final)[what].mul_(0.5)
    try:
        (found,) = torch.autograd.grad(results, inputs, grads)
    except RuntimeError as error:
        assert re.search("modified (by an )?in-?place", str(error))
    else:
        assert what != "memory", "backward reads the final memory"
        assert torch.equal(found, want)


@pytest.mark.parametrize("backwards", (0, 1))
@pytest.mark.parametrize("controller", NATIVE)
def test_nothing_outlives_its_use(backend: Backend, monkeypatch, controller: str, backwards: int) -> None:
    """What is kept for backward goes when backward has run, or when the outputs go, without the garbage collector."""
    trails = []
    right = sequence_kernels.allocate

    def noting(*args) -> tuple:
        *others, trail = right(*args)
        if trail:
            trails.append([weakref.ref(tensor) for tensor in trail])
        return *others, trail

    alive = lambda index: sum(tensor() is not None for tensor in trails[index])  # noqa: E731
    monkeypatch.setattr(sequence_kernels, "allocate", noting)
    case = Case(controller)
    ntm = case.module("sequence")
    gc.disable()
    try:
        outputs, final = ntm(case.inputs(), case.state())
        assert alive(0) == len(Trail._fields)
        if backwards:
            outputs.sum().backward()
        else:
            del outputs, final
        assert not alive(0)
        with torch.no_grad():
            outputs, final = ntm(case.inputs(), case.state())
        assert len(trails) == 1  # this call kept nothing
    finally:
        gc.enable()


def test_under_torch_checkpoint(backend: Backend) -> None:
    case = Case(T=4)
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    found = []
    for through in (lambda f, *a: f(*a), checkpoint):
        ntm, inputs = case.module("sequence"), case.inputs().requires_grad_()
        middle, state = through(ntm, inputs)
        outputs, _ = through(ntm, inputs, state)
        (middle.square().sum() + outputs.square().sum()).backward()
        found.append([inputs.grad, *(p.grad for p in ntm.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({}, False),
        ({"layers": 2, "checkpoint": 2}, True),
        ({"controller": "gru", "layers": 2}, False),
        ({"lengths": (1, 3)}, False),
    ],
    ids=("a state for each", "a state for all", "GRU", "lengths"),
)
def test_opcheck(backend: Backend, monkeypatch, change: dict, shared: bool) -> None:
    """torch.library.opcheck on the operator and on its backward: schema, fake and functionalisation."""
    if "lengths" in change:  # of steps that are not taken the trail keeps what its memory held, which opcheck compares
        monkeypatch.setattr(native, "empty", lambda like, shapes, returned=False: [like.new_zeros(x) for x in shapes])
    case = Case(**{**dict(T=3, B=2, hidden=4, N=5, M=3, R=2), **change}, dtype=torch.float32)
    values, options = arguments(case, shared)
    options |= {"eps": 1e-8, "memory_checkpoint": 0 if case.checkpoint == "auto" else case.checkpoint}
    options["lengths"] = None if case.lengths is None else torch.tensor(case.lengths, device=backend.device)
    schema = torch.ops.ntm_fast.ntm_sequence.default._schema.arguments
    positional = [options[argument.name] for argument in schema if argument.name in options]
    # The other checks, of autograd and functionalisation, see nothing of the backend: they are not repeated.
    some = {"test_utils": ("test_schema", "test_faketensor")} if backend is CUDA_ON_HOST else {}
    check = functools.partial(torch.library.opcheck, **some)
    for keep in (True, False):
        check(torch.ops.ntm_fast.ntm_sequence.default, (*values, *positional, keep))
    outputs, memory, *others, state, trail = torch.ops.ntm_fast.ntm_sequence(*values, *positional, True)
    grad, *grads = (torch.randn_like(x) for x in (outputs, memory, *others, *state))
    for needs_inputs, grad_final in ((True, grads), (False, grads), (False, [])):
        backward = torch.ops.ntm_fast.ntm_sequence_backward.default
        given = *values, memory, trail, grad, grad_final
        check(backward, (*given, *positional, needs_inputs))


def compiled_agrees(backend: Backend, controller: str, compiler: str) -> None:
    torch._dynamo.reset()
    ntm = Case(controller, dtype=torch.float32, memory_init="learned").module("auto")
    compiled = torch.compile(ntm, backend=compiler, fullgraph=True)
    for T, B in ((4, 2), (4, 2), (6, 3)):  # the last one compiles again, now for sizes that may change
        inputs = torch.randn(T, B, 3, device=backend.device)
        results = []
        for module in (ntm, compiled):
            ntm.zero_grad()
            with backend.serves("ntm_sequence", "ntm_sequence_backward"):
                outputs, state = module(inputs)
                (outputs.square().sum() + state.memory.sum() + state.controller[0].sum()).backward()
            with backend.serves("ntm_sequence"), torch.no_grad():
                again, _ = module(inputs, state.detach())
            results.append([outputs.detach(), again, *(p.grad.clone() for p in ntm.parameters())])
        # The same kernels run; what lies between them may be fused and reordered.
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("controller", NATIVE)
def test_compiled_machines_use_the_operator(backend: Backend, controller: str) -> None:
    """With fullgraph=True: one native call for all steps forward, one backward."""
    compiled_agrees(backend, controller, "aot_eager")


@pytest.mark.slow
def test_compile_inductor(backend: Backend) -> None:
    compiled_agrees(backend, "lstm", "inductor")


def test_modes_see_the_operator(backend: Backend) -> None:
    """A dispatch mode (a tracer, a counter) sees the operator in eager mode too, and results stay the same."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    case = Case()
    want = train(case, "sequence")
    with Watch():
        found = train(case, "sequence")
    assert_same_bits(found, want, "watched")
    ours = [name.removeprefix("ntm_fast::") for name in seen if name.startswith("ntm_fast::")]
    assert ours == ["ntm_sequence", "ntm_sequence_backward"]


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_takes_all_to_float32(backend: Backend, low: torch.dtype) -> None:
    ntm = Case(dtype=torch.float32).module("sequence")
    inputs = Case(dtype=torch.float32).inputs().to(low).requires_grad_()
    with torch.autocast(backend.device, dtype=low), backend.serves("ntm_sequence"):
        outputs, state = ntm(inputs)
    with torch.no_grad():
        expected, expected_state = ntm(inputs.float())
    assert outputs.dtype is low and all(x.dtype is torch.float32 for x in named(state).values())
    assert_same_bits(named(state.detach()), named(expected_state), low)
    torch.testing.assert_close(outputs.float(), expected, rtol=0.05, atol=0.05)
    loss = outputs.float().square().sum()
    grads = torch.autograd.grad(loss, list(ntm.controller.parameters()), retain_graph=True)
    with torch.autocast(backend.device, dtype=low):  # autocast could round what goes to the kernels and to products
        again = torch.autograd.grad(loss, list(ntm.controller.parameters()), retain_graph=True)
    for grad, other in zip(grads, again):
        torch.testing.assert_close(other, grad, rtol=0.02, atol=0.02 * float(grad.abs().max()))
    loss.backward()
    assert inputs.grad.dtype is low and all(p.grad.isfinite().all() for p in ntm.parameters() if p.grad is not None)


@pytest.mark.parametrize("engine", ("sequence", "step"))
def test_backward_in_autocast_is_that_outside(backend: Backend, engine: str) -> None:
    """Bit for bit, where the loss reads the engine's results alone: autocast rounds nothing on the way to a kernel."""
    case = Case(layers=2, dtype=torch.float32)
    ntm = case.module(engine)
    _, final = ntm(case.inputs(), case.state())
    loss = final.memory.square().sum() + final.reads.sum()
    leaves = [*ntm.controller.parameters(), *ntm.heads.parameters()]
    leaves = [leaf for leaf in leaves if leaf.dim() < 3]  # the initial state was given
    outside = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        inside = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 0 for grad in outside)
    for one, other in zip(outside, inside):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
