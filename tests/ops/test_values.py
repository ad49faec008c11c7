"""Every operator compared with the float64 reference: sizes, layouts, extremes, options, random cases."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.backends import Backend
from helpers.cases import EXTREMES, LAYOUTS, OPERATORS, OTHER_OPTIONS, SHAPES, Case, cast, evaluate
from helpers.comparison import check, sweep

from ntm_fast import ops

DTYPES = (torch.float32, torch.float64)

# B, N, M, H, S: from the smallest N, 2S+1, to several tiles of locations and a remainder
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
    Case("interpolate", B=70_000, N=2, H=1),  # a CUDA grid has at most 65,535 blocks along y and z
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
] + [(option,) for option in OTHER_OPTIONS.items()]


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
    """Random cases: see helpers.comparison.sweep."""
    sweep(request.node.nodeid, lambda seed: check(random_case(op, seed), kernels))
