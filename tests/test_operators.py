"""Every native operator against the float64 reference: forward, every gradient, and everything torch does with them."""

from __future__ import annotations

import concurrent.futures
import random

import pytest
import torch
import torch.utils.checkpoint
from comparison import (
    BACKENDS,
    CUDA_ON_HOST,
    EXTREMES,
    LAYOUTS,
    OPERATORS,
    SHAPES,
    Backend,
    Case,
    assert_agrees,
    cast,
    check,
    evaluate,
    sweep,
    usable,
)
from torch import Tensor

import ntm_fast
from ntm_fast import _native, ops, reference

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(params=[*BACKENDS, CUDA_ON_HOST], ids=lambda backend: backend.name)
def backend(request, monkeypatch) -> Backend:
    """The torch side too, for it tells kernels of both kinds apart: those of CUDA may ask for a workspace."""
    return usable(request.param, monkeypatch)


# --- values -----------------------------------------------------------------------------------------------------------

# B, N, M, H, S: from the smallest there is, N = 2S+1, to several tiles of locations and a remainder
STAGE_SIZES = [
    (1, 1, 1, 1, 0),
    (2, 3, 1, 1, 1),
    (1, 5, 2, 2, 2),
    (2, 7, 3, 1, 3),
    (0, 16, 8, 2, 1),
    (7, 16, 8, 2, 1),
    (2, 17, 20, 3, 1),
    (1, 31, 33, 5, 2),
    (2, 64, 20, 2, 0),
    (3, 100, 3, 4, 3),
    (2, 128, 20, 1, 1),
    (33, 129, 2, 2, 1),
    (1, 300, 70, 1, 2),
]
# B, N, M, R, W, S
STEP_SIZES = [
    (1, 1, 1, 1, 1, 0),
    (2, 3, 1, 1, 1, 1),
    (1, 5, 2, 2, 1, 2),
    (2, 7, 3, 1, 2, 3),
    (0, 16, 8, 1, 1, 1),
    (7, 16, 8, 2, 2, 1),
    (2, 17, 20, 3, 1, 1),
    (1, 31, 33, 1, 3, 2),
    (2, 64, 20, 2, 3, 0),
    (3, 100, 3, 3, 3, 3),
    (2, 128, 20, 1, 1, 1),
    (33, 129, 2, 1, 1, 1),
    (1, 300, 70, 1, 2, 2),
]


def sized(op: str, index: int, **more) -> Case:
    if op == "memory_step":
        B, N, M, R, W, S = STEP_SIZES[index]
        return Case(op, B=B, N=N, M=M, R=R, W=W, S=S, seed=index, **more)
    B, N, M, H, S = STAGE_SIZES[index]
    return Case(op, B=B, N=N, M=M, H=H, S=S, seed=index, **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_sizes(kernels: Backend, op: str, dtype: torch.dtype) -> None:
    for index in range(len(STAGE_SIZES)):
        check(sized(op, index, dtype=dtype), kernels)


LARGEST = (
    Case("interpolate", B=70_000, N=2, H=1),  # more than the 65,535 blocks of a CUDA grid in any direction but x
    Case("read", B=1, N=16_384, M=512, H=1),
    Case("content_addressing", B=1, N=16_384, M=33, H=16),
    Case("address", B=1, N=1024, M=512, H=2, S=8),
    Case("memory_step", B=1, N=16_384, M=16, S=3),
    Case("memory_step", B=2, N=128, M=20, R=8, W=8),
)


@pytest.mark.parametrize("case", LARGEST, ids=lambda case: case.op)
def test_the_largest_sizes(kernels: Backend, case: Case) -> None:
    check(case, kernels)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("op", OPERATORS)
def test_layouts(kernels: Backend, op: str, layout: str) -> None:
    for index in (5, 6, 9):
        check(sized(op, index, layouts=(layout,)), kernels)
        check(sized(op, index, layouts=(layout, "contiguous")), kernels)
        check(sized(op, index, layouts=("contiguous", layout), dtype=torch.float64), kernels)


EXTREME_CASES = [
    (op, extreme) for op in OPERATORS for extreme, e in EXTREMES.items() if set(e.touches) & set(SHAPES[op][0])
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "extreme"), EXTREME_CASES, ids=lambda x: str(x))
def test_extremes(kernels: Backend, op: str, extreme: str, dtype: torch.dtype) -> None:
    options = (("clip", 20.0 if extreme != "raw_20" else None),) if op == "memory_step" else ()
    for index in (1, 5, 6, 10):
        check(sized(op, index, extremes=(extreme,), dtype=dtype, options=options), kernels)


STEP_OPTIONS = [
    (("read_first", read_first), ("key_activation", key), ("add_activation", add), ("clip", clip), ("eps", eps))
    for read_first in (False, True)
    for key, add, clip, eps in (
        ("tanh", "tanh", 20.0, 1e-8),
        ("identity", "tanh", None, 1e-8),
        ("tanh", "identity", 1.5, 1e-3),
        ("identity", "identity", 0.5, 1e-8),
    )
]


@pytest.mark.parametrize("options", STEP_OPTIONS, ids=lambda options: "-".join(str(value) for _, value in options))
def test_memory_step_options(kernels: Backend, options: tuple) -> None:
    for index in (2, 3, 5, 9, 10):
        for dtype in DTYPES:
            check(sized("memory_step", index, dtype=dtype, options=options), kernels)


@pytest.mark.parametrize("op", ("content_addressing", "address"))
def test_eps(kernels: Backend, op: str) -> None:
    for eps in (1e-12, 1e-3, 1.0):
        check(sized(op, 6, options=(("eps", eps),)), kernels)


def test_clip_passes_gradients_inside_alone(backend: Backend) -> None:
    inputs, grads = Case("memory_step", B=3, dtype=torch.float64).tensors()
    params = inputs["params"]
    inside = (params > -1) & (params < 1)
    assert inside.any() and not inside.all()
    options = {"shift_range": 1, "clip": 1.0}
    clipped = evaluate(
        ops.memory_step,
        cast(inputs, torch.float64, backend.device),
        options,
        cast(grads, torch.float64, backend.device),
    )
    assert torch.equal(clipped["grad_params"].cpu() != 0, inside)


def random_case(op: str, seed: int) -> Case:
    rng = random.Random(f"{op}-{seed}")
    S = rng.randrange(4)
    extremes = [e for e, extreme in EXTREMES.items() if set(extreme.touches) & set(SHAPES[op][0])]
    options: dict = {}
    if op == "memory_step":
        options = {
            "read_first": rng.random() < 0.5,
            "key_activation": rng.choice(("tanh", "identity")),
            "add_activation": rng.choice(("tanh", "identity")),
            "clip": rng.choice((None, 20.0, 20.0, 1.0)),
        }
    return Case(
        op,
        B=rng.choice((0, 1, 2, 3, 7, 33)),
        N=rng.choice((2 * S + 1, 2 * S + 2, 3, 5, 7, 16, 17, 31, 64, 65, 100, 128, 129, rng.randrange(7, 200)))
        if S < 2
        else rng.choice((2 * S + 1, 2 * S + 2, 7, 16, 31, 64, 100, 129, rng.randrange(7, 200))),
        M=rng.choice((1, 2, 3, 4, 8, 20, 33, rng.randrange(1, 70))),
        H=rng.randrange(1, 6),
        R=rng.randrange(1, 4),
        W=rng.randrange(1, 4),
        S=S,
        dtype=rng.choice((torch.float32, torch.float32, torch.float64)),
        extremes=(rng.choice(extremes),) if rng.random() < 0.3 else (),
        layouts=tuple(rng.choice(list(LAYOUTS)) for _ in range(7)) if rng.random() < 0.5 else ("contiguous",),
        options=tuple(options.items()),
        seed=rng.randrange(2**31),
    )


@pytest.mark.parametrize("op", OPERATORS)
def test_sweep(request, kernels: Backend, op: str) -> None:
    """Random cases: see comparison.sweep."""
    sweep(request.node.nodeid, lambda seed: check(random_case(op, seed), kernels))


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
def test_nan_in_nan_out(kernels: Backend, op: str) -> None:
    """Where the reference gives NaN, so does the native operator; the other elements of the batch notice nothing."""
    case = Case(op, B=3, N=17, M=5, H=2, R=2, W=2)
    clean_inputs, clean_grads = case.tensors()
    clean = evaluate(getattr(ops, op), *_on(kernels, clean_inputs, case, clean_grads))
    for target in (*clean_inputs, *clean_grads):
        for place in (0, -1):
            inputs, grads = case.tensors()
            poisoned = inputs[target] if target in inputs else grads[target]
            poisoned[1].view(-1)[place] = torch.nan
            with kernels.serves(op, f"{op}_backward"):
                actual = evaluate(getattr(ops, op), *_on(kernels, inputs, case, grads))
            expected = evaluate(getattr(reference, op), inputs, case.keywords(), grads)
            assert any(x.isnan().any() for x in expected.values())
            for name, want in expected.items():
                where = f"{op}, NaN in {target}[1] at {place}: {name}"
                missed = want.isnan() & ~actual[name].cpu().isnan()
                assert not missed.any(), f"{where} is a number where the reference says NaN: {missed.nonzero()[:3]}"
                for b in (0, 2):
                    assert torch.equal(actual[name][b], clean[name][b]), f"{where}[{b}] is affected"


@pytest.mark.parametrize("op", OPERATORS)
def test_infinities_do_not_become_plausible_numbers(kernels: Backend, op: str) -> None:
    case = Case(op, B=2, N=17, M=5, H=2, R=2, W=2)
    for target in SHAPES[op][0]:
        inputs, grads = case.tensors()
        inputs[target][1].view(-1)[0] = torch.inf
        actual = evaluate(getattr(ops, op), *_on(kernels, inputs, case, grads))
        expected = evaluate(getattr(reference, op), inputs, case.keywords(), grads)
        for name in SHAPES[op][1]:
            wrong = expected[name].isnan() & actual[name].cpu().isfinite()
            assert not wrong.any(), f"{op}, infinite {target}: {name} is a number where the reference says NaN"


def _on(backend: Backend, inputs: dict, case: Case, grads: dict) -> tuple[dict, dict, dict]:
    return cast(inputs, case.dtype, backend.device), case.keywords(), cast(grads, case.dtype, backend.device)


# --- derivatives by differences, and of derivatives -------------------------------------------------------------------


def _small(op: str, backend: Backend, layout: str = "contiguous", **more) -> tuple[list[Tensor], dict]:
    case = Case(op, B=2, N=4, M=2, H=2, R=1, W=2, dtype=torch.float64, layouts=(layout,), **more)
    inputs, _ = case.tensors()
    return [x.to(backend.device).detach().requires_grad_() for x in inputs.values()], case.keywords()


@pytest.mark.parametrize("layout", ("contiguous", "reversed"))
@pytest.mark.parametrize("op", OPERATORS)
def test_gradcheck(kernels: Backend, op: str, layout: str) -> None:
    leaves, options = _small(op, kernels, layout)
    assert torch.autograd.gradcheck(lambda *x: getattr(ops, op)(*x, **options), leaves)


@pytest.mark.parametrize("op", OPERATORS)
def test_gradgradcheck(backend: Backend, op: str) -> None:
    leaves, options = _small(op, backend)
    assert torch.autograd.gradgradcheck(lambda *x: getattr(ops, op)(*x, **options), leaves)


@pytest.mark.parametrize("op", OPERATORS)
def test_gradient_penalty(backend: Backend, op: str) -> None:
    """Through a graph around the operator, as in training: a loss that contains the norm of a gradient."""

    def penalty(function, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*[x * 1.5 for x in leaves])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(y.square().sum() for y in outputs)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return list(torch.autograd.grad(loss + sum(g.square().sum() for g in first), leaves))

    case = Case(op, B=2, N=9, M=3, H=2, R=2, W=2)
    inputs, _ = case.tensors()
    options = case.keywords()
    actual = penalty(
        lambda *x: getattr(ops, op)(*x, **options), list(cast(inputs, torch.float32, backend.device).values())
    )
    twin = getattr(reference, op)
    truth = penalty(lambda *x: twin(*x, **options), list(cast(inputs, torch.float64).values()))
    single = penalty(lambda *x: twin(*x, **options), list(inputs.values()))
    assert_agrees(*(dict(zip(inputs, x)) for x in (actual, truth, single)))


@pytest.mark.parametrize("op", OPERATORS)
def test_each_input_and_each_output_alone(backend: Backend, op: str) -> None:
    """A gradient for some inputs only, from some outputs only, is that part of all of them."""
    case = Case(op, B=2, N=9, M=3, H=2, R=2, W=2, dtype=torch.float64)
    inputs, grads = case.tensors()
    inputs, grads = cast(inputs, case.dtype, backend.device), cast(grads, case.dtype, backend.device)
    for index, name in enumerate(inputs):
        tensors = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs.values())]
        outputs = getattr(ops, op)(*tensors, **case.keywords())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for output, (kept, grad) in zip(outputs, grads.items()):
            found = torch.autograd.grad(output, tensors[index], grad, retain_graph=True)[0]
            others_zero = {n: g if n == kept else torch.zeros_like(g) for n, g in grads.items()}
            expected = evaluate(
                getattr(reference, op), cast(inputs, case.dtype), case.keywords(), cast(others_zero, case.dtype)
            )
            torch.testing.assert_close(
                found.cpu(), expected[f"grad_{name}"], rtol=1e-9, atol=1e-12, msg=lambda m: f"{name} from {kept}: {m}"
            )


def test_batched_gradients_are_right_or_refused(backend: Backend) -> None:
    """``is_grads_batched`` runs a backward under vmap."""
    inputs, _ = Case("read", B=2, N=5, M=3, dtype=torch.float64).tensors()
    leaves = [x.to(backend.device).requires_grad_() for x in inputs.values()]
    outputs = ops.read(*leaves)
    directions = torch.randn(4, *outputs.shape, dtype=torch.float64, device=backend.device)
    try:
        found = torch.autograd.grad(outputs, leaves, directions, is_grads_batched=True, retain_graph=True)
    except RuntimeError:
        return
    for index, direction in enumerate(directions):
        for got, want in zip(found, torch.autograd.grad(outputs, leaves, direction, retain_graph=True)):
            torch.testing.assert_close(got[index], want)


# --- what torch does with operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(backend: Backend, op: str) -> None:
    """Schema, fake and functionalisation, of the operator and of its backward."""
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
    """Options in the schema's order, where they are positional; those not given at the reference's defaults."""
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
    # The same kernels; what is between them may be fused and reordered.
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
    """Not the operators' precision but their inputs' is reduced: params come from a product in ``low``."""
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
    """Raw parameters, weights and memories, before and after: everything else is computed again."""
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
    """The interpreter's lock is released meanwhile: everybody gets the same answer."""
    case = Case("memory_step", B=4, N=100, M=20)
    inputs, grads = case.tensors()
    run = lambda _: evaluate(ops.memory_step, *_on(backend, inputs, case, grads))  # noqa: E731
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


# --- bit for bit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
def test_results_depend_neither_on_threads_nor_on_the_rest_of_the_batch(kernels: Backend, op: str) -> None:
    for case in (Case(op, B=9, N=100, M=20, H=2, R=2, W=2), Case(op, B=5, N=517, M=33, R=2, dtype=torch.float64)):
        _same_bits(case, kernels)


def _same_bits(case: Case, kernels: Backend) -> None:
    op = case.op
    inputs, grads = case.tensors()
    function = getattr(ops, op)
    together = evaluate(function, *_on(kernels, inputs, case, grads))
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        again = evaluate(function, *_on(kernels, inputs, case, grads))
        for name in together:
            assert torch.equal(again[name], together[name]), f"{op}: {name} differs with {threads} threads"
    for b in (0, 2, case.B - 1):
        one, grad = ({n: x[b : b + 1] for n, x in tensors.items()} for tensors in (inputs, grads))
        alone = evaluate(function, *_on(kernels, one, case, grad))
        for name in together:
            assert torch.equal(alone[name][0], together[name][b]), f"{op}: {name}[{b}] differs when alone"


# --- planted faults: the comparison finds them ------------------------------------------------------------------------


def _one_element(x: Tensor) -> None:
    flat = x[1].flatten()
    flat[flat.abs().argmax()] *= 1.01
    x[1] = flat.view(x[1].shape)


FAULTS = {
    "scaled": lambda x: x.mul_(1.001),
    "one element": _one_element,
    "one of the batch": lambda x: x[1].mul_(1.001),
    "sign": lambda x: x.neg_(),
    "order": lambda x: x.copy_(x.flip(1).clone()),
    "unwritten": lambda x: x[-1, -1].fill_(torch.nan),
    "overrun": lambda x: x.as_strided((1,), (1,), x.storage_offset() + x.numel()).zero_(),
    "underrun": lambda x: x.as_strided((1,), (1,), x.storage_offset() - 1).zero_(),
}


def _expect_found(case: Case, backend: Backend, monkeypatch, fault) -> None:
    """``fault(native function, like)`` runs after each native call; the comparison must say that something is wrong."""
    real = _native.call

    def call(name: str, like: Tensor, *args) -> None:
        real(name, like, *args)
        fault(name, like)

    with monkeypatch.context() as patch:
        patch.setattr(_native, "call", call)
        with pytest.raises(AssertionError):
            check(case, backend)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", OPERATORS)
def test_planted_faults_are_found(backend: Backend, monkeypatch, op: str, fault: str) -> None:
    """Each output and each gradient of each operator is made a little wrong in turn."""
    case = Case(op, B=3, N=17, M=5, H=2, R=2, W=2)
    check(case, backend)
    for name, results in ((op, SHAPES[op][1]), (f"{op}_backward", SHAPES[op][0])):
        for index in range(len(results)):

            def plant(called: str, like: Tensor, name=name, index=index, count=len(results)) -> None:
                if called == name:
                    FAULTS[fault](ops._empty.results[-count:][index])

            _expect_found(case, backend, monkeypatch, plant)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_modified_input_is_found(backend: Backend, monkeypatch, op: str) -> None:
    for name in (op, f"{op}_backward"):
        plant = lambda called, like, name=name: like.neg_() if called == name else None  # noqa: E731
        _expect_found(Case(op), backend, monkeypatch, plant)


def test_a_silent_fallback_is_found(backend: Backend, monkeypatch) -> None:
    monkeypatch.setattr(ops, "why_not_native", lambda *_: "planted")
    monkeypatch.setattr(_native, "warn_once", lambda *_: None)
    with pytest.raises(AssertionError, match="were"):
        check(Case("read"), backend)


# --- bad input --------------------------------------------------------------------------------------------------------


def _bad(op: str, name: str, change) -> tuple[list, dict]:
    case = Case(op, B=2, N=9, M=4, H=3, R=2, W=1)
    inputs, _ = case.tensors()
    inputs[name] = change(inputs[name])
    return list(inputs.values()), case.keywords()


@pytest.mark.parametrize("op", OPERATORS)
def test_bad_tensors_are_named(op: str) -> None:
    """Each argument in turn, of each operator: the message names it and what it was; nothing is computed."""
    first = next(iter(SHAPES[op][0]))
    letters_of_all = "".join(SHAPES[op][0].values())
    longer = lambda x: torch.cat([x, x[..., :1]], -1)  # noqa: E731
    for name, letters in SHAPES[op][0].items():
        for error, change, expected in (
            (TypeError, lambda x: x.tolist(), "list"),
            (ValueError, lambda x: x.unsqueeze(0), f"{len(letters)} dimensions"),
            (ValueError, lambda x: x[..., 0], None),
            (ValueError, longer, None),
            (ValueError, lambda x: x[..., :0], None),
            (TypeError, lambda x: x.double(), "float64") if name != first else (TypeError, lambda x: x.int(), "int32"),
            (ValueError, lambda x: x.to("meta"), "meta"),
        ):
            if change is longer and letters[-1] not in "KPG" and letters_of_all.count(letters[-1]) == 1:
                continue  # nothing says how long it must be
            tensors, options = _bad(op, name, change)
            with Backend("none", "cpu").serves(), pytest.raises(error) as caught:
                getattr(ops, op)(*tensors, **options)
            # A size or dtype is what two arguments disagree about; the message names one of them, and the operator.
            text = str(caught.value)
            assert op in text and any(n in text for n in SHAPES[op][0]), text
            assert expected is None or expected in text, text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shift_range": -1}, ValueError, ("shift_range", "-1")),
        ({"shift_range": 5}, ValueError, ("9",)),
        ({"shift_range": 2}, ValueError, ("params",)),
        ({"key_activation": "relu"}, ValueError, ("key_activation", "relu", "tanh")),
        ({"add_activation": None}, ValueError, ("add_activation", "None", "tanh")),
        ({"clip": 0.0}, ValueError, ("clip", "0")),
        ({"clip": -1.0}, ValueError, ("clip", "-1")),
        ({"clip": float("nan")}, ValueError, ("clip", "nan")),
        ({"eps": 0.0}, ValueError, ("eps", "0")),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict, error: type, words: tuple) -> None:
    inputs, _ = Case("memory_step", B=2, N=9, M=4).tensors()
    with Backend("none", "cpu").serves(), pytest.raises(error) as caught:
        ops.memory_step(*inputs.values(), **{"shift_range": 1, **options})
    for word in ("memory_step", *words):
        assert word in str(caught.value)


def test_shifts_must_be_odd_and_fit() -> None:
    weights = torch.full((2, 1, 5), 0.2)
    for shifts in (2, 4, 7):
        with pytest.raises(ValueError, match=rf"circular_shift.*{shifts}"):
            ops.circular_shift(weights, torch.ones(2, 1, shifts))


def test_explain_names_every_operator() -> None:
    for device, dtype in (
        ("cpu", torch.float32),
        ("cpu", torch.float16),
        ("cuda", torch.float32),
        ("meta", torch.float64),
    ):
        answers = ntm_fast.explain(device, dtype)
        assert set(answers) == {*OPERATORS, "ntm_sequence"}
        assert all(answer == "native" or answer.startswith("reference: ") for answer in answers.values())
