"""Operators under PyTorch's own tools: opcheck, torch.compile, functorch, autocast, saved tensors, threads."""

from __future__ import annotations

import concurrent.futures

import pytest
import torch
import torch.utils.checkpoint
from helpers.backends import Backend
from helpers.cases import OPERATORS, SHAPES, Case, cast, evaluate, on
from torch import Tensor

import ntm_fast
from ntm_fast import ops, reference


@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(backend: Backend, op: str) -> None:
    """torch.library.opcheck on the operator and on its backward: schema, fake and functionalisation."""
    case = Case(op, B=2, N=5, M=3, layouts=("contiguous", "reversed"))
    inputs, grads = case.tensors()
    keywords = case.keywords()
    values = list(cast(inputs, case.dtype, backend.device).values())
    options = _all_options(op, keywords)
    torch.library.opcheck(getattr(torch.ops.ntm_fast, op).default, (*values, *options))
    outputs = getattr(torch.ops.ntm_fast, op)(*values, *options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    saved = [y for y, name in zip(outputs, SHAPES[op][1]) if name in _saved(op)]
    backward = getattr(torch.ops.ntm_fast, f"{op}_backward").default
    torch.library.opcheck(backward, (*values, *saved, *cast(grads, case.dtype, backend.device).values(), *options))


def _all_options(op: str, given: dict) -> list:
    """All options in the order of the schema. What is not given has the reference's default."""
    keywords = getattr(reference, op).__kwdefaults__ or {}
    schema = getattr(torch.ops.ntm_fast, op).default._schema.arguments[len(SHAPES[op][0]) :]
    return [given.get(argument.name, keywords.get(argument.name)) for argument in schema]


def _saved(op: str) -> set[str]:
    arguments = getattr(torch.ops.ntm_fast, f"{op}_backward").default._schema.arguments
    return {argument.name for argument in arguments} & set(SHAPES[op][1])


def _step_and_loss(memory: Tensor, read_weights: Tensor, write_weights: Tensor, params: Tensor) -> Tensor:
    for _ in range(2):
        reads, memory, read_weights, write_weights = ops.memory_step(
            memory, read_weights, write_weights, params * 0.5, shift_range=1
        )
    return reads.square().sum() + (memory * memory.detach().cos()).sum()


def _compiled_agrees(backend: Backend, compiler: str) -> None:
    case = Case("memory_step", B=2, N=9, M=4)
    inputs, _ = case.tensors()
    results = []
    torch._dynamo.reset()
    for function in (_step_and_loss, torch.compile(_step_and_loss, backend=compiler, fullgraph=True)):
        leaves = [x.to(backend.device).detach().requires_grad_() for x in inputs.values()]
        calls = ["memory_step"] * 2 + ["memory_step_backward"] * 2
        with backend.serves(*calls):
            loss = function(*leaves)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    # The same kernels run; what lies between them may be fused and reordered.
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_compile_fullgraph(backend: Backend) -> None:
    _compiled_agrees(backend, "aot_eager")


@pytest.mark.slow
def test_compile_inductor(backend: Backend) -> None:
    _compiled_agrees(backend, "inductor")


def test_functorch_transforms_give_the_references_answers(backend: Backend) -> None:
    inputs, _ = Case("address", B=3, N=9, M=4, H=2, dtype=torch.float64).tensors()
    values = tuple(x.to(backend.device) for x in inputs.values())
    tangents = tuple(torch.randn_like(x) for x in values)

    def loss(module):
        return lambda *x: module.address(*x).square().sum()

    for transform in (
        lambda module: torch.func.grad(loss(module), argnums=(0, 3))(*values),
        lambda module: torch.func.jvp(module.address, values, tangents)[1],
        lambda module: torch.func.vmap(module.address)(*(torch.stack([x, 0.5 * x]) for x in values)),
        lambda module: torch.func.vmap(torch.func.grad(loss(module)))(*(x.unsqueeze(1) for x in values)),
        lambda module: torch.func.jacrev(module.address, argnums=3)(*values),
        lambda module: torch.autograd.functional.hessian(
            lambda k: loss(module)(*values[:2], k, *values[3:]), values[2]
        ),
    ):
        torch.testing.assert_close(transform(ops), transform(reference), rtol=1e-9, atol=1e-12)


def test_forward_mode(backend: Backend) -> None:
    import torch.autograd.forward_ad as fwd

    inputs, _ = Case("memory_step", B=2, N=9, M=4, dtype=torch.float64).tensors()
    tangents = {name: torch.randn_like(x) for name, x in inputs.items()}
    found = []
    for module in (ops, reference):
        with fwd.dual_level():
            duals = [fwd.make_dual(x.to(backend.device), tangents[n].to(backend.device)) for n, x in inputs.items()]
            found.append([fwd.unpack_dual(y).tangent for y in module.memory_step(*duals, shift_range=1)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_takes_inputs_to_float32(backend: Backend, low: torch.dtype) -> None:
    """Operators compute in float32. Only their inputs have lost precision: params come from a product in ``low``."""
    inputs, _ = Case("memory_step", B=2, N=9, M=4).tensors()
    inputs = cast(inputs, torch.float32, backend.device)
    mixed = {**inputs, "params": inputs["params"].to(low).requires_grad_()}
    with torch.autocast(backend.device, dtype=low), backend.serves("memory_step"):
        actual = ops.memory_step(*mixed.values(), shift_range=1)
    expected = ops.memory_step(*{**inputs, "params": mixed["params"].detach().float()}.values(), shift_range=1)
    for got, want in zip(actual, expected):
        assert got.dtype is torch.float32 and torch.equal(got, want)
    actual[0].sum().backward()
    assert mixed["params"].grad.dtype is low and mixed["params"].grad.isfinite().all()


def test_other_dtypes_are_served_by_the_reference(backend: Backend) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        inputs, grads = Case("memory_step", B=2, N=9, M=4).tensors()
        inputs, grads = cast(inputs, dtype, backend.device), cast(grads, dtype, backend.device)
        with backend.serves():
            actual = evaluate(ops.memory_step, inputs, {"shift_range": 1}, grads)
        expected = evaluate(reference.memory_step, inputs, {"shift_range": 1}, grads)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert all(
            "reference" in answer and str(dtype) in answer
            for answer in ntm_fast.explain(backend.device, dtype).values()
        )


def test_without_gradients_nothing_is_kept(backend: Backend) -> None:
    case = Case("memory_step", B=2, N=9, M=4)
    inputs, _ = case.tensors()
    leaves = [x.to(backend.device).requires_grad_() for x in inputs.values()]
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), backend.serves("memory_step"):
            outputs = ops.memory_step(*leaves, shift_range=1)
        assert not packed and all(y.grad_fn is None and not y.requires_grad for y in outputs)


def test_backward_keeps_what_the_design_says_and_no_more(backend: Backend) -> None:
    """Raw parameters, and weights and memories before and after the step. Everything else is computed again."""
    inputs, _ = Case("memory_step", B=2, N=9, M=4, R=2).tensors()
    leaves = [x.to(backend.device).requires_grad_() for x in inputs.values()]
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = ops.memory_step(*leaves, shift_range=1)
    kept = sum(x.numel() for x in packed)
    assert kept <= sum(x.numel() for x in leaves) + sum(y.numel() for y in outputs[1:])


def test_changing_an_input_in_place_before_backward_is_noticed(backend: Backend) -> None:
    inputs, _ = Case("read").tensors()
    memory, weights = (x.to(backend.device).requires_grad_() for x in inputs.values())
    memory = memory * 1
    reads = ops.read(memory, weights)
    memory.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        reads.sum().backward()


def test_several_python_threads(backend: Backend) -> None:
    """A native call releases the interpreter's lock, so threads run at once. All get the same answer."""
    case = Case("memory_step", B=4, N=100, M=20)
    inputs, grads = case.tensors()
    run = lambda _: evaluate(ops.memory_step, *on(backend.device, inputs, case, grads))  # noqa: E731
    alone = run(None)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for together in pool.map(run, range(40)):
            assert all(torch.equal(together[name], alone[name]) for name in alone)


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_activation_checkpointing(backend: Backend, use_reentrant: bool) -> None:
    inputs, _ = Case("memory_step", B=2, N=9, M=4).tensors()
    leaves = [x.to(backend.device).requires_grad_() for x in inputs.values()]
    expected = torch.autograd.grad(_step_and_loss(*leaves), leaves)
    torch.utils.checkpoint.checkpoint(_step_and_loss, *leaves, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(x.grad, want) for x, want in zip(leaves, expected))


def test_compiled_options_may_change(backend: Backend) -> None:
    """When an option has changed, torch.compile makes a symbol of it: the checks must not stumble over that."""
    inputs = [x.to(backend.device) for x in Case("content_addressing").tensors()[0].values()]
    torch._dynamo.reset()
    function = lambda *args: ops.content_addressing(*args[:-1], eps=args[-1])  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for eps in (1e-8, 1e-3, 1e-1):
        torch.testing.assert_close(compiled(*inputs, eps), ops.content_addressing(*inputs, eps=eps))
    torch._dynamo.reset()
