"""What the operator tests are made of: the backends, the cases, and the one comparison with the float64 reference."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, Callable, NamedTuple

import pytest
import torch
from cuda_on_host import build
from torch import Tensor

import ntm_fast
from ntm_fast import _native, ops, reference


class Backend:
    """A native backend under test. Another one is one more entry in BACKENDS, and every test runs on it."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device

    def missing(self) -> str | None:
        """Why it cannot be tested here; None when it can."""
        answers = [ntm_fast.explain(self.device, dtype) for dtype in (torch.float32, torch.float64)]
        reasons = {answer[op] for answer in answers for op in OPERATORS}
        return ", ".join(sorted(reasons - {"native"})) or None

    def activate(self, monkeypatch) -> None:
        """Make the operators use this backend for tensors on ``device``; nothing to do where they do so anyway."""

    def kernels(self) -> str | None:
        """The name of the native backend that must serve."""
        return ntm_fast.capabilities()[self.device]

    @contextlib.contextmanager
    def serves(self, *expected: str):
        """Within, exactly these native functions are called, in this order, and those of this backend."""
        calls: list[tuple[str, str]] = []
        original = _native._extension
        _native._extension = lambda: _Recorder(original(), calls)
        try:
            yield
        finally:
            _native._extension = original
        wanted = [(name, self.kernels()) for name in expected]
        assert calls == wanted, f"{self.name}: the native functions called were {calls}, expected {wanted}"


class _Recorder:
    """The binding, noting which function of which backend is called."""

    def __init__(self, binding: Any, calls: list[tuple[str, str]]) -> None:
        self._binding, self._calls = binding, calls

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._binding, name)
        if name.removesuffix("_backward") not in (*OPERATORS, "ntm_sequence"):
            return function

        def call(backend: int, *args: Any) -> None:
            self._calls.append((name, self._binding.describe(backend)["name"]))
            function(backend, *args)

        return call


class CPUVariant(Backend):
    """One build of the CPU's kernels, whichever of them this machine would choose."""

    def __init__(self, name: str) -> None:
        super().__init__(f"native_cpu_{name}", "cpu")
        self.variant = name

    @functools.cached_property
    def part(self) -> _native._Part:
        for name, file, level in _native._VARIANTS:
            if (
                name == self.variant
                and name in _native._build().record["cpu"]
                and level <= _native._extension().cpu_level()
            ):
                return _native._Part(_native._load(file), name, None)
        return _native._Part(None, None, f"the CPU variant {self.variant} was not built or does not run here")

    def missing(self) -> str | None:
        return super().missing() or self.part.reason

    def activate(self, monkeypatch) -> None:
        monkeypatch.setattr(_native, "_cpu", lambda: self.part)
        monkeypatch.setitem(_native._PARTS, "cpu", lambda: self.part)

    def kernels(self) -> str:
        return self.variant


class CUDAOnHost(Backend):
    """The CUDA kernels, compiled by g++ for tensors on the CPU: see cuda_on_host."""

    def __init__(self) -> None:
        super().__init__("cuda_on_host", "cpu")

    @functools.cached_property
    def part(self) -> _native._Part:
        try:
            _native._extension()
        except _native._Missing as missing:
            return _native._Part(None, None, str(missing))
        reason = build.missing()
        if reason:
            return _native._Part(None, None, reason)
        library = build.compiled(tuple(sorted(build.CSRC.glob("cuda/*.cu"))), "backend.so")
        return _native._Part(_native._extension().load(str(library)), self.name, None, cuda=True)

    def missing(self) -> str | None:
        return self.part.reason

    def activate(self, monkeypatch) -> None:
        monkeypatch.setattr(_native, "_cpu", lambda: self.part)
        monkeypatch.setitem(_native._PARTS, "cpu", lambda: self.part)
        monkeypatch.setattr(_native, "_reasons", {})  # what the CPU's part serves, this one may not
        monkeypatch.setattr(_native, "_refusals", {})

    def kernels(self) -> str:
        return self.name


# The torch side of the operators is tested on each of BACKENDS, the numbers on each of KERNELS.
BACKENDS = [Backend("native_cpu", "cpu"), Backend("cuda", "cuda")]
CUDA_ON_HOST = CUDAOnHost()
KERNELS = [
    *BACKENDS,
    *(CPUVariant(name) for name, _, _ in _native._VARIANTS if name != ntm_fast.capabilities()["cpu"]),
    CUDA_ON_HOST,
]


def required(name: str) -> bool:
    """Whether the environment says that this backend must be there: NTM_TEST_REQUIRE=native_cpu,..."""
    return name in os.environ.get("NTM_TEST_REQUIRE", "").split(",")


def usable(backend: Backend, monkeypatch) -> Backend:
    """Skips, with the reason, what this machine lacks, unless NTM_TEST_REQUIRE says that it must be there."""
    backend.activate(monkeypatch)
    reason = backend.missing()
    if reason and required(backend.name):
        pytest.fail(f"NTM_TEST_REQUIRE names {backend.name}, which cannot serve: {reason}")
    if reason:
        pytest.skip(f"{backend.name} cannot serve: {reason}")
    return backend


class Poison:
    """Stands in for ``ops._empty``: fresh outputs are full of NaN, between guards that nobody may touch."""

    GUARD, SENTINEL = 64, 777.0  # 64 elements keep an allocation's alignment

    def __init__(self) -> None:
        self.original = ops._empty
        self.blocks: list[Tensor] = []
        self.results: list[Tensor] = []

    def __call__(self, like: Tensor, letters: str, dims: dict[str, int]) -> Tensor:
        result = self.original(like, letters, dims)
        if type(like) is not Tensor:  # a fake
            return result
        block = like.new_full((result.numel() + 2 * self.GUARD,), self.SENTINEL)
        block[self.GUARD : self.GUARD + result.numel()] = torch.nan
        self.blocks.append(block)
        self.results.append(like.new_empty(0).set_(block.untyped_storage(), self.GUARD, result.shape, result.stride()))
        return self.results[-1]

    def check(self) -> None:
        for block in self.blocks:
            guards = torch.cat([block[: self.GUARD], block[-self.GUARD :]])
            assert bool((guards == self.SENTINEL).all()), "wrote outside of an output"
        self.blocks.clear()


# --- sweeps: random cases, each told by its seed ----------------------------------------------------------------------

SWEEP_SEED = int(os.environ.get("NTM_SWEEP_SEED", 0))
SWEEP_CASES = int(os.environ.get("NTM_SWEEP_CASES", 40))


def sweep(node: str, check_seed: Callable[[int], None]) -> None:
    """NTM_SWEEP_SEED and NTM_SWEEP_CASES repeat one case or run many more; a failure says how to repeat it."""
    failures = []
    for seed in range(SWEEP_SEED, SWEEP_SEED + SWEEP_CASES):
        try:
            check_seed(seed)
        except AssertionError as error:
            failures.append(f"NTM_SWEEP_SEED={seed} NTM_SWEEP_CASES=1 pytest '{node}'\n{error}")
    if failures:
        pytest.fail(f"{len(failures)} of {SWEEP_CASES} cases:\n\n" + "\n\n".join(failures[:5]), pytrace=False)


# --- cases ------------------------------------------------------------------------------------------------------------

# The operators' contract, said again: dimensions of inputs and outputs. G is 4N or 3N gates of N units.
SHAPES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "content_addressing": ({"memory": "BNM", "key": "BHM", "beta": "BH"}, {"content": "BHN"}),
    "interpolate": ({"content": "BHN", "previous": "BHN", "gate": "BH"}, {"gated": "BHN"}),
    "circular_shift": ({"weights": "BHN", "shift": "BHK"}, {"shifted": "BHN"}),
    "sharpen": ({"weights": "BHN", "gamma": "BH"}, {"sharpened": "BHN"}),
    "address": (
        {
            "memory": "BNM",
            "previous": "BHN",
            "key": "BHM",
            "beta": "BH",
            "gate": "BH",
            "shift": "BHK",
            "gamma": "BH",
        },
        {"weights": "BHN"},
    ),
    "erase_add_write": (
        {"memory": "BNM", "weights": "BHN", "erase": "BHM", "add": "BHM"},
        {"written": "BNM"},
    ),
    "read": ({"memory": "BNM", "weights": "BHN"}, {"reads": "BHM"}),
    "memory_step": (
        {"memory": "BNM", "read_weights": "BRN", "write_weights": "BWN", "params": "BP"},
        {"reads": "BRM", "new_memory": "BNM", "new_read_weights": "BRN", "new_write_weights": "BWN"},
    ),
    "lstm_gates": ({"gates": "BG", "cell": "BN"}, {"hidden": "BN", "new_cell": "BN"}),
    "gru_gates": ({"input_gates": "BG", "hidden_gates": "BG", "hidden": "BN"}, {"new_hidden": "BN"}),
}
OPERATORS = tuple(SHAPES)

_NATURAL: dict[str, Callable[[Tensor], Tensor]] = {
    "memory": lambda x: 0.5 * x,
    "key": torch.tanh,
    "beta": lambda x: torch.nn.functional.softplus(2 * x),
    "gate": lambda x: torch.sigmoid(2 * x),
    "shift": lambda x: torch.softmax(x, -1),
    "gamma": lambda x: 1 + torch.nn.functional.softplus(2 * x),
    "erase": torch.sigmoid,
    "add": torch.tanh,
    "params": lambda x: 2 * x,
    "gates": lambda x: 2 * x,
    "input_gates": lambda x: 2 * x,
    "hidden_gates": lambda x: 2 * x,
    "cell": lambda x: x,
    "hidden": torch.tanh,
}
_WEIGHTINGS = ("content", "previous", "weights", "read_weights", "write_weights")


def _fill(*names: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(inputs: dict[str, Tensor]) -> None:
        for name in names:
            if name in inputs:
                inputs[name].fill_(value)

    return change


def _scale(*names: str, by: float) -> Callable[[dict[str, Tensor]], None]:
    def change(inputs: dict[str, Tensor]) -> None:
        for name in names:
            if name in inputs:
                inputs[name].mul_(by)

    return change


def _weightings(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(inputs: dict[str, Tensor]) -> None:
        for name in _WEIGHTINGS:
            if name in inputs:
                inputs[name].copy_(change(inputs[name]))

    return apply


def _one_hot(weights: Tensor) -> Tensor:
    return torch.zeros_like(weights).scatter_(-1, weights.argmax(-1, keepdim=True), 1.0)


def _some_zeros(weights: Tensor) -> Tensor:
    sparse = torch.where(weights < weights.mean(-1, keepdim=True), 0.0, weights)
    return sparse / sparse.sum(-1, keepdim=True)


def _zero_first_key(inputs: dict[str, Tensor]) -> None:
    if "key" in inputs:
        inputs["key"][:, 0] = 0


class Extreme(NamedTuple):
    change: Callable[[dict[str, Tensor]], None]
    touches: tuple[str, ...]  # an operator with one of these inputs has this extreme
    # How much larger than an ulp of the gradients that come in an operator's rounding errors may be where they cancel
    # to nothing in the true answer: a saturated softmax has a gradient of 0, to rounding errors of beta or gamma ulp.
    amplification: float


EXTREMES = {
    "none": Extreme(lambda inputs: None, (), 0),
    "large_beta": Extreme(_scale("beta", by=1e3), ("beta",), 1e4),
    "large_gamma": Extreme(_scale("gamma", by=1e3), ("gamma",), 1e4),
    "gate_zero": Extreme(_fill("gate", value=0.0), ("gate",), 0),
    "gate_one": Extreme(_fill("gate", value=1.0), ("gate",), 0),
    "zero_beta": Extreme(_fill("beta", value=0.0), ("beta",), 1),
    "zero_key": Extreme(_zero_first_key, ("key",), 0),
    "zero_memory": Extreme(_fill("memory", value=0.0), ("memory",), 0),
    "constant_memory": Extreme(_fill("memory", value=1e-6), ("memory",), 1e6),  # gradients are divided by its norm
    "large_memory": Extreme(_scale("memory", by=1e10), ("memory",), 0),
    "one_hot": Extreme(_weightings(_one_hot), _WEIGHTINGS, 1),
    "some_zeros": Extreme(_weightings(_some_zeros), _WEIGHTINGS, 1),
    "zero_weights": Extreme(_weightings(torch.zeros_like), _WEIGHTINGS, 1e3),  # of log tiny, -708 in float64
    "full_erase": Extreme(_fill("erase", value=1.0), ("erase",), 0),
    "raw_20": Extreme(lambda inputs: "params" in inputs and inputs["params"].sign_().mul_(20), ("params",), 1e3),
    "raw_beyond_clip": Extreme(_scale("params", by=20.0), ("params",), 1e4),
    "saturated_gates": Extreme(
        _scale("gates", "input_gates", "hidden_gates", by=30.0), ("gates", "input_gates", "hidden_gates"), 1
    ),
}


# Each makes a tensor with the values given, laid out so that a kernel that believes in dense rows is found out:
# what lies between and around the values is NaN.
def _gaps(x: Tensor) -> Tensor:
    room = x.new_full([2 * size + 1 for size in x.shape], torch.nan)
    view = room[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def _offset(x: Tensor) -> Tensor:
    room = x.new_full((x.numel() + 6,), torch.nan)  # 3 elements: aligned to nothing
    return room[3 : 3 + x.numel()].view(x.shape).copy_(x)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if len(x) else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": _transposed,
    "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "expanded": _expanded,
    "gaps": _gaps,
    "offset": _offset,
}


class Case(NamedTuple):
    """One test of one operator; everything follows from it."""

    op: str
    B: int = 2
    N: int = 16
    M: int = 8
    H: int = 2
    R: int = 1
    W: int = 1
    S: int = 1
    dtype: torch.dtype = torch.float32
    extremes: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ("contiguous",)  # of the inputs in their order, going round
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    def keywords(self) -> dict[str, Any]:
        shift = {"shift_range": self.S} if self.op == "memory_step" else {}
        return {**shift, **dict(self.options)}

    def size(self, letter: str) -> int:
        if letter == "K":
            return 2 * self.S + 1
        if letter == "G":
            return {"lstm_gates": 4, "gru_gates": 3}[self.op] * self.N
        if letter == "P":
            return (self.R + self.W) * (self.M + 2 * self.S + 4) + 2 * self.W * self.M
        return getattr(self, letter)

    def amplification(self, inputs: dict[str, Tensor]) -> float:
        """See Extreme; in ulp."""
        amplification = max((EXTREMES[extreme].amplification for extreme in self.extremes), default=0.0)
        if self.op == "address" and self.B and (self.N == 1 or self.S == 0):
            # A softmax of one number is 1; and one shift alone scales the weights, which sharpening undoes.
            amplification = max(amplification, float(inputs["gamma"].max()))
        if self.M == 1 and "key" in inputs and self.B:
            # The cosine of numbers is 1 or -1: its gradient, a difference of terms of 1/|k| and 1/|M_i|, is 0.
            sizes = [inputs[name].abs() for name in ("key", "memory")]
            largest = max(float(1 / size[size > 0].min()) for size in sizes if size.any())
            amplification = max(amplification, largest * float(inputs["beta"].max()))
        if self.M == 1 and self.op == "memory_step":
            amplification = max(amplification, 10.0)  # likewise; its keys are seldom smaller than 0.1
        return amplification

    def tensors(self, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs, and a gradient for each output; the same numbers on every device."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(letters: str) -> Tensor:
            return torch.randn([self.size(c) for c in letters], generator=generator, dtype=torch.float64)

        shapes, results = SHAPES[self.op]
        inputs = {}
        for name, letters in shapes.items():
            values = normal(letters)
            natural = _NATURAL.get(name, lambda x: torch.softmax(2 * x, -1))
            inputs[name] = natural(values).to(self.dtype)
        for extreme in self.extremes:
            EXTREMES[extreme].change(inputs)
        for index, (name, value) in enumerate(inputs.items()):
            inputs[name] = LAYOUTS[self.layouts[index % len(self.layouts)]](value.to(device))
        return inputs, {name: normal(letters).to(device, self.dtype) for name, letters in results.items()}


def evaluate(function: Callable, inputs: dict[str, Tensor], options: dict[str, Any], grads: dict[str, Tensor]):
    """Outputs by name, and the gradient of every input as ``grad_{input}``."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    outputs = function(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = torch.autograd.grad(outputs, leaves, list(grads.values()))
    named = {**dict(zip(grads, outputs)), **{f"grad_{name}": g for name, g in zip(inputs, found)}}
    return {name: tensor.detach() for name, tensor in named.items()}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    return {name: tensor.to(dtype=dtype, device=device) for name, tensor in tensors.items()}


# --- the comparison ---------------------------------------------------------------------------------------------------


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """The L2 distance for each element of the batch."""
    return (a.double() - b.double()).flatten(1).norm(dim=1) if a.numel() else a.new_zeros(0, dtype=torch.float64)


def assert_agrees(
    actual: dict[str, Tensor],
    truth: dict[str, Tensor],
    single: dict[str, Tensor],
    *,
    floor: float = 0.0,
    grad_norm: float = 1.0,
) -> None:
    """Compare each tensor with the float64 reference, ``truth``; ``single`` is the float32 reference.

    float32: a relative L2 error of 1e-5, about a hundred ulp, which covers sums over hundreds of terms. Where a case
    is worse conditioned than that, torch's own float32 shows it: at most twice its error, and 8 ulp more because its
    error may happen to be 0.
    float64: 1e-12, some 5,000 ulp; where float32 shows bad conditioning, eight times what it loses, scaled by the ulps.
    ``floor``, in ulp, times ``grad_norm`` for gradients: see Extreme.amplification. It is at least a tenth of an ulp:
    some gradients are sums over all locations that cancel, down to a single number for one head.

    The same holds for each element of the batch alone, ten times wider, so that an element with small numbers cannot
    hide behind one with large numbers.
    """
    problems = []
    for name, got in actual.items():
        want, low = truth[name], single[name]
        assert got.shape == want.shape, f"{name}: got shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        assert got.dtype in (torch.float32, torch.float64)
        got = got.cpu()
        eps = torch.finfo(got.dtype).eps
        unusable = int((~got.isfinite()).sum())
        if unusable:
            problems.append(f"{name}: {unusable} of {got.numel()} elements are not finite (or never written)")
            continue
        errors, torch_errors, norms = _distances(got, want), _distances(low, want), _distances(want, 0 * want)
        least = max(floor, 0.1) * eps * (grad_norm if name.startswith("grad_") else 1.0)

        def allowed(norm: Tensor, torch_error: Tensor) -> Tensor:
            if eps > 1e-10:
                return torch.maximum(1e-5 * norm, 2 * torch_error) + 8 * eps * norm
            return torch.maximum(1e-12 * norm, 8 * torch_error * (eps / torch.finfo(torch.float32).eps))

        total = allowed(norms.norm(), torch_errors.norm()) + least
        if errors.norm() > total:
            problems.append(
                f"{name}: error {errors.norm():.3g}, allowed {total:.3g} (norm {norms.norm():.3g}, float32 torch's "
                f"error {torch_errors.norm():.3g})"
            )
            continue
        each = 10 * (allowed(norms, torch_errors) + least) + 8 * eps * norms.norm()
        for b in torch.nonzero(errors > each).flatten().tolist():
            problems.append(
                f"{name}[{b}]: error {errors[b]:.3g}, allowed {each[b]:.3g} (norm {norms[b]:.3g}, float32 torch's "
                f"error {torch_errors[b]:.3g})"
            )
    if problems:
        raise AssertionError("\n".join(problems))


def check(case: Case, backend: Backend) -> None:
    """Forward and every gradient of one case on ``backend``, against the float64 reference."""
    inputs, grads = case.tensors(backend.device)
    before = {name: x.clone() for name, x in {**inputs, **grads}.items()}
    twin = getattr(reference, case.op)
    with _poisoned() as poison:
        with backend.serves(case.op, f"{case.op}_backward"):
            actual = evaluate(getattr(ops, case.op), inputs, case.keywords(), grads)
        poison.check()
    for name, x in {**inputs, **grads}.items():
        assert torch.equal(x, before[name]), f"{case}\n{name} was modified"
    truth = evaluate(twin, cast(inputs, torch.float64), case.keywords(), cast(grads, torch.float64))
    single = evaluate(twin, cast(inputs, torch.float32), case.keywords(), cast(grads, torch.float32))
    try:
        assert_agrees(
            actual,
            truth,
            single,
            floor=8 * case.amplification(inputs),
            grad_norm=sum(g.double().square().sum().item() for g in grads.values()) ** 0.5,
        )
    except AssertionError as error:
        raise AssertionError(f"{case}\n{error}") from None


@contextlib.contextmanager
def _poisoned():
    poison = Poison()
    ops._empty = poison
    try:
        yield poison
    finally:
        ops._empty = poison.original
