"""The operators' contract, written a second time, and test cases made from it: sizes, extremes, memory layouts."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor

from ntm_fast.spec import STEP_OPTIONS

# The dimensions of inputs and outputs. G is 4N or 3N gates of N units.
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
    touches: tuple[str, ...]  # for operators with one of these inputs
    # A true gradient may be 0 because large terms cancel, as in a saturated softmax. Rounding leaves an error there, of
    # beta or gamma ulp. This is how many ulp of the gradients that come in are allowed.
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
    "zero_weights": Extreme(_weightings(torch.zeros_like), _WEIGHTINGS, 1e3),  # log(tiny) is -708 in float64
    "full_erase": Extreme(_fill("erase", value=1.0), ("erase",), 0),
    "raw_20": Extreme(lambda inputs: "params" in inputs and inputs["params"].sign_().mul_(20), ("params",), 1e3),
    "raw_beyond_clip": Extreme(_scale("params", by=20.0), ("params",), 1e4),
    "saturated_gates": Extreme(
        _scale("gates", "input_gates", "hidden_gates", by=30.0), ("gates", "input_gates", "hidden_gates"), 1
    ),
}


# Each returns the same values in another memory layout. What lies between and around the values is NaN, so that a
# kernel that assumes dense rows reads NaN.
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


# Another value than the default for each option of a memory step: tests that go over the options use these.
OTHER_OPTIONS: dict[str, Any] = {
    "read_first": True,
    "key_activation": "identity",
    "add_activation": "identity",
    "clip": 0.3,
    "eps": 0.1,
}
assert OTHER_OPTIONS.keys() == STEP_OPTIONS.keys() - {"shift_range"}, "an option of spec.StepOptions has no other value"

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": _transposed,
    "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "expanded": _expanded,
    "gaps": _gaps,
    "offset": _offset,
}


class Case(NamedTuple):
    """One test of one operator. Inputs and incoming gradients follow from it."""

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
    layouts: tuple[str, ...] = ("contiguous",)  # for the inputs in order, repeated as needed
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
        """How many ulp a gradient that cancels may be wrong: see Extreme."""
        amplification = max((EXTREMES[extreme].amplification for extreme in self.extremes), default=0.0)
        if self.op == "address" and self.B and (self.N == 1 or self.S == 0):
            # A softmax of one number is 1. A single shift scales all weights, and sharpening undoes that.
            amplification = max(amplification, float(inputs["gamma"].max()))
        if self.M == 1 and "key" in inputs and self.B:
            # The cosine of numbers is 1 or -1: its gradient, a difference of terms of 1/|k| and 1/|M_i|, is 0.
            sizes = [inputs[name].abs() for name in ("key", "memory")]
            largest = max(float(1 / size[size > 0].min()) for size in sizes if size.any())
            amplification = max(amplification, largest * float(inputs["beta"].max()))
        if self.M == 1 and self.op == "memory_step":
            amplification = max(amplification, 10.0)  # the same; its keys are seldom smaller than 0.1
        return amplification

    def tensors(self, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs, and the gradient that comes in for each output. The numbers are the same on every device."""
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


def on(device: str, inputs: dict, case: Case, grads: dict) -> tuple[dict, dict, dict]:
    """The arguments of ``evaluate`` after the function, with tensors on that device."""
    return cast(inputs, case.dtype, device), case.keywords(), cast(grads, case.dtype, device)
