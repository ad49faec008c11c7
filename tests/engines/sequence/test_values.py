"""Whole sequences forward and back against the float64 reference."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.backends import CUDA_ON_HOST, Backend
from helpers.comparison import sweep
from helpers.machines import NATIVE
from helpers.poison import Poison
from helpers.sequences import Case, check, named, train
from torch import Tensor

from ntm_fast import FastNTM, NTMState
from ntm_fast.spec import MEMORY_INITS

CHANGES: list[dict[str, Any]] = [
    {},
    *({"layers": n} for n in (2, 3)),
    *({"hidden": n} for n in (1, 7, 33, 100)),
    *({"T": n} for n in (1, 2, 20)),
    *({"B": n} for n in (1, 2, 7, 8, 9, 16, 33)),
    {"B": 17, "layers": 2, "checkpoint": 2},
    *({"N": n} for n in (3, 16, 64)),
    {"N": 1, "S": 0},
    {"N": 5, "S": 2},
    {"N": 7, "S": 3, "R": 2},
    {"N": 300, "M": 16, "B": 13},  # memories so large that a CPU's thread takes fewer elements at a time
    *({"M": n} for n in (1, 20)),
    {"M": 1, "R": 3},
    *({"R": r, "W": w} for r, w in ((2, 1), (1, 2), (3, 3))),
    *({"S": n} for n in (0, 2, 3)),
    *({"read_first": True, "R": r, "W": 3 - r} for r in (1, 2)),
    {"key": "identity"},
    {"add": "identity"},
    {"clip": None},
    {"clip": 2.0},
    *({"given": False, "memory_init": init} for init in MEMORY_INITS),
    {"I": 1, "O": 1},
    {"I": 200},
    {"O": 40},
    *({"loss": loss} for loss in ("outputs", "state")),
    *({"checkpoint": k} for k in ("all", 1, 2, 3, 5, 7, 70)),
    {"checkpoint": 6, "T": 20},
    {"checkpoint": 1, "T": 1},
    {"checkpoint": 4, "T": 9, "B": 9, "R": 2, "W": 2, "read_first": True, "layers": 3},
    *({"lengths": lengths} for lengths in ((7, 7, 7), (1, 1, 1), (0, 0, 0), (2, 7, 0), (6, 3, 7))),
    *({"lengths": (2, 7, 5), "loss": loss} for loss in ("outputs", "state")),
    *({"lengths": (7, 1, 4, 0, 6, 2, 3), "B": 7, "checkpoint": k} for k in ("all", 2, 3, 5)),
    {"lengths": (3, 5, 1, 7, 2, 4, 7, 0, 6, 7, 1, 3, 2, 5, 7, 6, 1), "B": 17, "R": 2, "W": 2, "given": False},
    {"lengths": (5, 2, 5, 5, 0, 4, 1, 3, 5), "T": 5, "B": 9, "layers": 3, "hidden": 7, "checkpoint": 2},
]


@pytest.mark.parametrize("controller", NATIVE)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_each_size_and_option(backend: Backend, poison: Poison, controller: str, change: dict) -> None:
    case = Case(controller, **change)
    check(case, backend, poison)
    if case.clip != 2.0:  # float32 may round a number to the other side of where the gradient ends
        check(case._replace(dtype=torch.float32), backend, poison)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("controller", NATIVE)
def test_every_build_of_the_kernels(kernels: Backend, poison: Poison, controller: str, dtype: torch.dtype) -> None:
    for change in (
        {"B": 13, "hidden": 100, "N": 64, "M": 20, "T": 4},
        {"B": 1, "hidden": 33, "layers": 2},
        {"B": 7, "hidden": 7, "layers": 3, "R": 2, "W": 2, "checkpoint": 2},
        {"B": 2, "hidden": 1, "N": 3, "M": 1, "read_first": True},
        {"lengths": (3, 5, 1, 0, 5, 4, 2, 5, 1), "T": 5, "B": 9, "layers": 2, "R": 2, "checkpoint": 2},
    ):
        check(Case(controller, dtype=dtype, **change), kernels, poison)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("controller", NATIVE)
def test_one_element_at_a_time(kernels: Backend, poison: Poison, controller: str, dtype: torch.dtype) -> None:
    """Memories that fill a CPU's second-level cache, on the way back and, in float64, forward."""
    if kernels is CUDA_ON_HOST:
        pytest.skip("its blocks cannot hold such an element")
    check(Case(controller, N=800, M=128, B=3, T=3, checkpoint=2, dtype=dtype), kernels, poison)


def random_case(seed: int) -> Case:
    rng = random.Random(f"sequence-{seed}")
    S, dtype, T = rng.randrange(4), rng.choice((torch.float32, torch.float64)), rng.choice((1, 2, 7, 20))
    given, B = rng.random() < 0.6, rng.choice((1, 2, 7, 8, 9, 16, 17, 33))
    return Case(
        controller=rng.choice(NATIVE),
        layers=rng.choice((1, 1, 2, 3)),
        hidden=rng.choice((1, 7, 16, 33, 100)),
        T=T,
        B=B,
        I=rng.choice((1, 3, 9)),
        O=rng.choice((1, 4, 8)),
        N=rng.choice((2 * S + 1, 2 * S + 2, 15, 16, 17, 31, 64, 100)),
        M=rng.choice((1, 5, 20)),
        R=rng.randrange(1, 4),
        W=rng.randrange(1, 4),
        S=S,
        read_first=rng.random() < 0.5,
        key=rng.choice(("tanh", "identity")),
        add=rng.choice(("tanh", "identity")),
        clip=rng.choice((None, 2.0, 20.0) if dtype is torch.float64 else (None, 20.0)),
        memory_init="learned" if given else rng.choice(MEMORY_INITS),
        given=given,
        checkpoint=rng.choice(("auto", "all", 1, 2, 3, 5, T, 10 * T)),
        lengths=tuple(rng.randrange(T + 1) for _ in range(B)) if rng.random() < 0.5 else None,
        dtype=dtype,
        seed=rng.randrange(2**20),
    )


def test_sweep(request, backend: Backend, poison: Poison) -> None:
    sweep(request.node.nodeid, lambda seed: check(random_case(seed), backend, poison))


# Not seed 0: with its draw the GRU's gradient of initial_read_weights is so small a difference that torch's own float32
# errs by up to 1.1e-4 where the parameters are changed by a thousandth; of 20 others by 2e-5 at most.
@pytest.mark.parametrize("seed", (1, 2, 3))
@pytest.mark.parametrize("controller", NATIVE)
def test_float32_over_a_copy_of_twenty(backend: Backend, controller: str, seed: int) -> None:
    """The standard machine at its initial values: 1e-4, relative L2, for every gradient at T = 41."""
    case = Case(
        controller, hidden=100, T=41, B=4, I=9, O=8, N=128, M=20, memory_init="constant", given=False, seed=seed
    )
    found = {}
    for engine, dtype in (("sequence", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(seed)
        ntm = FastNTM(9, 8, 100, controller=controller, engine=engine).to(backend.device, dtype)
        found[engine] = train(case, engine, dtype, ntm)
    for name, want in found["reference"].items():
        assert (found["sequence"][name].double() - want).norm() <= 1e-4 * want.norm(), name


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layers": 2},
        {"read_first": True, "R": 2},
        {"key": "identity", "add": "identity", "clip": None},
        {"W": 2, "S": 0, "M": 1},
        {"clip": 1.0, "S": 2, "N": 5},
        {"given": False, "checkpoint": 2},
        {"lengths": (1, 3), "checkpoint": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("controller", NATIVE)
def test_gradcheck(backend: Backend, controller: str, change: dict) -> None:
    case = Case(controller, **{**dict(hidden=3, T=3, B=2, I=2, O=2, N=4, M=2), **change})
    ntm = case.module("sequence")
    names, parameters = zip(*ntm.named_parameters())
    if case.given:
        names, parameters = zip(*((n, p) for n, p in zip(names, parameters) if "initial" not in n))
    state = [x.requires_grad_() for x in named(case.state()).values()] if case.given else []

    def run(inputs: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given, rest = tensors[: len(state)], tensors[len(state) :]
        start = NTMState(*given[:4], tuple(given[4:])) if given else None
        called = dict(zip(names, rest)), (inputs, start), {"lengths": case.lengths}
        outputs, final = torch.func.functional_call(ntm, *called)
        return outputs, *named(final).values()

    with backend.serves("ntm_sequence"):
        run(case.inputs(), *state, *parameters)
    # The CUDA kernels take minutes here. Fast mode compares one random combination of all derivatives instead of each.
    fast = backend is CUDA_ON_HOST
    assert torch.autograd.gradcheck(run, (case.inputs().requires_grad_(), *state, *parameters), fast_mode=fast)
