"""Cases of training steps of the sequence engine, and their comparison with the float64 reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.backends import Backend
from helpers.poison import Poison
from ntm_fast import FastNTM, NTMState, reference

DEVICE = "cpu"  # where all tensors are made; a fixture sets it to the backend's


class Case(NamedTuple):
    """One training step; everything follows from it."""

    controller: str = "lstm"
    layers: int = 1
    hidden: int = 16
    T: int = 7
    B: int = 3
    I: int = 3
    O: int = 4
    N: int = 17
    M: int = 5
    R: int = 1
    W: int = 1
    S: int = 1
    read_first: bool = False
    key: str = "tanh"
    add: str = "tanh"
    clip: float | None = 20.0
    memory_init: str = "learned"
    given: bool = True  # the initial state is an argument; else it is the module's own
    checkpoint: str | int = "auto"
    lengths: tuple[int, ...] | None = None  # steps of each sequence
    loss: str = "all"  # the results that the loss reads: "all", "outputs", or the final "state"
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def module(self, engine: str, dtype: torch.dtype | None = None) -> FastNTM:
        """A module whose parameters are far from their initial values, so that any mix-up changes the results."""
        ntm = FastNTM(
            self.I, self.O, self.hidden, num_layers=self.layers, controller=self.controller, memory_locations=self.N,
            memory_width=self.M, read_heads=self.R, write_heads=self.W, shift_range=self.S,
            memory_init=self.memory_init, read_first=self.read_first, key_activation=self.key, add_activation=self.add,
            clip=self.clip, engine=engine, memory_checkpoint=self.checkpoint, dtype=self.dtype,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, tensor in ntm.state_dict().items():
                if name == "initial_memory" and self.memory_init.endswith("constant"):
                    continue
                scale = 1.0 if tensor.dim() < 2 or "initial" in name else min(0.7, 2 / tensor.shape[1] ** 0.5)
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        return ntm.to(DEVICE, dtype or self.dtype)

    def normal(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, self.dtype)

    def inputs(self) -> Tensor:
        return self.normal(self.T, self.B, self.I, seed=1)

    def state(self) -> NTMState:
        """A state as an earlier sequence could have left it."""
        B = self.B
        controller = [self.normal(self.layers, B, self.hidden, seed=6 + i) for i in range(2)]
        return NTMState(
            0.5 * self.normal(B, self.N, self.M, seed=2),
            torch.softmax(2 * self.normal(B, self.R, self.N, seed=3), -1),
            torch.softmax(2 * self.normal(B, self.W, self.N, seed=4), -1),
            0.5 * self.normal(B, self.R, self.M, seed=5),
            (controller[0].tanh(), *controller[1:]) if self.controller == "lstm" else (controller[0].tanh(),),
        )


def named(state: NTMState) -> dict[str, Tensor]:
    controller = {f"controller[{i}]": tensor for i, tensor in enumerate(state.controller)}
    return {**dict(zip(state._fields[:4], state)), **controller}


def or_nan(x: Tensor, over: Tensor | None) -> Tensor:
    """x (T, B, ...), NaN at steps that a sequence does not take: nobody may look there."""
    return x if over is None else x.masked_fill(over.unsqueeze(-1), torch.nan)


def train(case: Case, engine: str, dtype: torch.dtype | None = None, ntm: FastNTM | None = None) -> dict[str, Tensor]:
    """Outputs, final state and every gradient. The gradients that come in do not depend on the results."""
    dtype = dtype or case.dtype
    ntm = ntm or case.module(engine, dtype)
    over = None if case.lengths is None else reference.ended(torch.tensor(case.lengths, device=DEVICE), case.T)
    inputs = or_nan(case.inputs(), over).to(dtype).requires_grad_()
    state = case.state().map(lambda x: x.to(dtype).requires_grad_()) if case.given else None
    leaves = {"inputs": inputs, **dict(ntm.named_parameters())}
    if state is not None:
        leaves = {n: x for n, x in leaves.items() if "initial" not in n}
        leaves |= {f"state.{name}": x for name, x in named(state).items()}
    outputs, final = ntm(inputs, state, lengths=case.lengths)
    results = {"outputs": outputs, **{f"final.{name}": x for name, x in named(final).items()}}
    grads = [case.normal(*x.shape, seed=20 + i).to(dtype) for i, x in enumerate(results.values())]
    grads[0] = or_nan(grads[0], over)
    before = [x.detach().clone() for x in (*leaves.values(), *grads)]
    of = {"all": slice(None), "outputs": slice(1), "state": slice(1, None)}[case.loss]
    found = torch.autograd.grad(
        list(results.values())[of], list(leaves.values()), grads[of], allow_unused=True, materialize_grads=True
    )
    for name, x, was in zip((*leaves, *(f"grad of {n}" for n in results)), (*leaves.values(), *grads), before):
        assert torch.allclose(x, was, rtol=0, atol=0, equal_nan=True), f"{name} was modified"
    results |= {f"grad {name}": x for name, x in zip(leaves, found)}
    if over is not None:
        assert not results["outputs"][over].any() and not results["grad inputs"][over].any()
    return {name: x.detach() for name, x in results.items()}


def assert_agrees(actual: dict[str, Tensor], truth: dict[str, Tensor], singles: list[dict[str, Tensor]]) -> None:
    """Compare each tensor with ``truth``, the float64 reference. ``singles`` are float32 references; none for float64.

    float64: a relative L2 error of 1e-9. Twenty steps may amplify rounding ten million times; a real error is larger.
    float32: 1e-5; or twice the error of torch's own float32 in the same tensor; or twice its largest relative error in
    any tensor, at most 1e-3, because all gradients go back through one chain of steps.
    In both, 100 ulp of the largest gradient more, for gradients that are 0 because terms cancel: of a cosine of single
    numbers (M = 1), or of beta where all locations are alike (a constant memory).
    """
    norms = {name: float(want.norm()) for name, want in truth.items()}
    largest = {kind: max(norms[n] for n in norms if n.startswith("grad") == kind) for kind in (False, True)}
    substantial = [n for n in norms if norms[n] > 1e-4 * largest[n.startswith("grad")]]
    lost = {n: max([float((x[n].double() - truth[n]).norm()) for x in singles], default=0.0) for n in truth}
    worst = max(lost[n] / norms[n] for n in substantial)
    problems = []
    for name, want in truth.items():
        got = actual[name]
        assert got.shape == want.shape, f"{name}: got shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        unusable = int((~got.isfinite()).sum())
        error = float((got.double() - want).norm())
        most = max((1e-5 if singles else 1e-9) * norms[name], 2 * lost[name], 2 * min(worst, 1e-3) * norms[name])
        most += 100 * torch.finfo(got.dtype).eps * largest[name.startswith("grad")]
        if unusable or error > most:
            problems.append(
                f"{name}: error {error:.3g}, allowed {most:.3g}, norm {norms[name]:.3g}, {unusable} not finite"
            )
    if problems:
        raise AssertionError("\n".join(problems))


def nudged(case: Case, seed: int) -> FastNTM:
    """The float32 reference, each parameter moved by one ulp up, one down, or not at all."""
    ntm = case.module("reference", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ntm.parameters():
            p.mul_(1 + torch.finfo(torch.float32).eps * (torch.randint(0, 3, p.shape, generator=generator).to(p) - 1))
    return ntm


def about_main_memory(backend: Backend) -> None:
    if backend.name != "native_cpu":
        pytest.skip("it is about the main memory that the CPU's kernels take")


def check(case: Case, kernels: Backend, poison: Poison) -> None:
    try:
        with kernels.serves("ntm_sequence", "ntm_sequence_backward"):
            actual = train(case, "sequence")
        poison.check(all_written=case.lengths is None)  # of steps that are not taken the trail may hold anything
        truth = train(case, "reference", torch.float64)
        singles = [train(case, "reference")] if case.dtype is torch.float32 else []
        try:
            assert_agrees(actual, truth, singles)
        except AssertionError:
            if not singles:
                raise
            # One float32 reference may be lucky. Rounding may do what an ulp in the parameters does, so take several.
            singles += [train(case, "reference", ntm=nudged(case, seed)) for seed in range(8)]
            assert_agrees(actual, truth, singles)
    except AssertionError as error:
        raise AssertionError(f"{case}\n{error}") from None


def native_alone(case: Case) -> FastNTM:
    """A machine in which torch's own products round nothing: what differs in the last bit comes from the native loop.

    Each input feeds gates of its own, times a power of two, and the output layer is the identity.
    """
    ntm = case._replace(O=case.hidden + case.R * case.M).module("sequence")
    with torch.no_grad():
        weight = ntm.controller.weight_ih_l0
        weight[:, : case.I] = 0
        weight[torch.arange(case.I), torch.arange(case.I)] = 0.5
        ntm.output.weight.copy_(torch.eye(ntm.output.in_features))
        ntm.output.bias.zero_()
    return ntm


def of_sequences(found: dict[str, Tensor], which: slice | list[int]) -> dict[str, Tensor]:
    """From what ``train`` returns, the part of these elements of the batch."""
    own = {n: x for n, x in found.items() if n.split()[-1].split(".")[0] in ("outputs", "final", "inputs", "state")}
    second = lambda name: name.endswith(("outputs", "inputs", "]"))  # noqa: E731  the batch is the second dimension
    return {name: x[:, which] if second(name) else x[which] for name, x in own.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor], where: Any) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{where}: {name} differs by {(a[name] - b[name]).abs().max():.2g}"


BITS = [
    {},
    {"layers": 2, "checkpoint": 2},
    {"controller": "gru", "R": 2, "W": 2},
    {"controller": "gru", "hidden": 33},
    {"N": 300, "M": 16},
    {"T": 1, "hidden": 33, "layers": 2},  # for a single sequence, weights are not packed before the product
    {"T": 1, "hidden": 33, "controller": "gru"},
]


def arguments(case: Case, shared: bool = False) -> tuple[list, dict[str, Any]]:
    """The arguments of ops.ntm_sequence. ``shared``: the state is the first element's, without a batch dimension."""
    ntm = case.module("reference").requires_grad_(False)
    options = {**ntm.ntm_config.sequence_options().keywords(), "memory_checkpoint": case.checkpoint}
    last = ntm.heads.weight, ntm.heads.bias, ntm.output.weight, ntm.output.bias
    *first, state = case.state()
    if shared:
        first, state = [x[0] for x in first], tuple(x[:, 0] for x in state)
    return [case.inputs(), *first, state, ntm.controller.weights(), *last], options


def tensors_of(values: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, Tensor)]
