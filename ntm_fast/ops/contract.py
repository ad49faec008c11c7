"""What an operator is, in one row: its tensors by name and dimensions, and its options. All else follows from that:
schema, fake, kernel, autograd (:mod:`registration`) and the checks of its arguments."""

from __future__ import annotations

from dataclasses import Field
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from .. import spec

MEMORY = "BNM"  # tensors of these dimensions are location-minor inside the native code: [B, M, N]


class Contract(NamedTuple):
    """One operator. Tensors are ``{name: dimensions}``, a letter for each dimension, one size for a letter."""

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    saved: tuple[str, ...] = ()  # the outputs that backward needs
    options: Mapping[str, Field] = {}  # fields of spec.StepOptions
    derived: Callable[..., dict[str, int]] | None = None  # (sizes, *options) -> sizes that follow from others

    def backward(self) -> Contract:
        """The operator that computes the gradients of the inputs."""
        kept = {name: self.outputs[name] for name in self.saved}
        given = {f"grad_{name}": letters for name, letters in self.outputs.items()}
        wanted = {f"grad_{name}": letters for name, letters in self.inputs.items()}
        return self._replace(name=f"{self.name}_backward", inputs={**self.inputs, **kept, **given}, outputs=wanted)

    def reader(self) -> Callable[[Sequence[Any]], dict[str, int]]:
        """A function from the arguments (tensors, then options) to the size of every letter."""
        count = len(self.inputs)
        places: dict[str, tuple[int, int]] = {}
        for index, letters in enumerate(self.inputs.values()):
            for axis, letter in enumerate(letters):
                places.setdefault(letter, (index, axis))
        listed = [(letter, index, axis) for letter, (index, axis) in places.items()]

        def read(args: Sequence[Any]) -> dict[str, int]:
            shapes = [tensor.shape for tensor in args[:count]]
            sizes = {letter: shapes[index][axis] for letter, index, axis in listed}
            if self.derived is not None:
                sizes.update(self.derived(sizes, *args[count : count + len(self.options)]))
            return sizes

        return read


def step_sizes(sizes: dict[str, int], shift_range: int, *_: Any) -> dict[str, int]:
    """The sizes of a memory step that follow from others."""
    params = spec.params_size(sizes["R"], sizes["W"], sizes["M"], shift_range)
    return {"K": 2 * shift_range + 1, "P": params}


def empty(like: Tensor, letters: str, sizes: dict[str, int]) -> Tensor:
    """An uninitialised tensor of these dimensions; a memory with its locations contiguous."""
    if letters == MEMORY:
        n, m = sizes["N"], sizes["M"]
        return like.new_empty_strided((sizes["B"], n, m), (n * m, 1, n))
    return like.new_empty([sizes[letter] for letter in letters])


# --- checks -----------------------------------------------------------------------------------------------------------


def check(contract: Contract, tensors: Sequence[Any], options: dict[str, Any]) -> None:
    """Raise TypeError or ValueError, naming the argument, what it was and what it must be."""
    op, sizes = contract.name, {}
    owners: dict[str, str] = {}
    first_name, first = next(iter(contract.inputs)), tensors[0]
    for (name, letters), tensor in zip(contract.inputs.items(), tensors):
        _check_kind(op, name, letters, tensor, first_name, first)
        for letter, size in zip(letters, tensor.shape):
            if letter not in sizes:
                sizes[letter], owners[letter] = size, name
                if size == 0 and letter != "B":
                    raise ValueError(
                        f"{op}: {name} must not be empty, {letter} of {_describe(letters)} is 0; got shape "
                        f"{tuple(tensor.shape)}"
                    )
            elif sizes[letter] != size:
                raise ValueError(
                    f"{op}: {name} must have shape {_describe(letters)} with {letter} = {sizes[letter]} as "
                    f"in {owners[letter]}; got shape {tuple(tensor.shape)}"
                )
    if not first.is_floating_point():
        raise TypeError(f"{op}: {first_name} must have a floating dtype, got {first.dtype}")
    _check_derived(contract, sizes, owners, options)


def _check_kind(op: str, name: str, letters: str, tensor: Any, first_name: str, first: Any) -> None:
    """Raise unless it is a tensor of so many dimensions, with dtype and device of the first one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if len(tensor.shape) != len(letters):
        raise ValueError(
            f"{op}: {name} must have shape {_describe(letters)}, {len(letters)} dimensions; got shape "
            f"{tuple(tensor.shape)}"
        )
    if tensor.dtype != first.dtype:
        raise TypeError(f"{op}: {name} must be {first.dtype} as {first_name} is, got {tensor.dtype}")
    if tensor.device != first.device:
        raise ValueError(f"{op}: {name} must be on {first.device} as {first_name} is, got {tensor.device}")


def _check_derived(contract: Contract, sizes: dict[str, int], owners: dict[str, str], options: dict[str, Any]) -> None:
    """Raise ValueError unless the sizes that follow from others are right."""
    op = contract.name
    for letter, size in (contract.derived(sizes, *options.values()) if contract.derived else {}).items():
        if letter in sizes and sizes[letter] != size:
            raise ValueError(
                f"{op}: {owners[letter]} must have {letter} = {size} entries for the other sizes "
                f"{ {k: v for k, v in sizes.items() if k != letter} }; got {sizes[letter]}"
            )
        sizes[letter] = size
    if "K" in sizes and not (sizes["K"] % 2 == 1 and sizes["K"] <= sizes["N"]):
        raise ValueError(
            f"{op}: the number of shifts must be odd, 2S+1, and at most N = {sizes['N']}; got {sizes['K']}"
        )


_right: set[tuple[Any, ...]] = set()  # options that have been checked
# Choices, least value and lower bound of each option, as torch.compile can trace them.
_RULES = {
    name: (own.metadata.get("choices"), own.metadata.get("least"), own.metadata.get("above"))
    for name, own in spec.STEP_OPTIONS.items()
}


def check_options(contract_name: str, options: dict[str, Any]) -> None:
    """Raise TypeError or ValueError, naming operator and option, unless these step options are right."""
    if torch.compiler.is_compiling():
        _check_traced(contract_name, options)
        return
    key = contract_name, *options.items(), *map(type, options.values())  # True equals 1, but it is no number
    try:
        if key in _right:
            return
    except TypeError:  # a value that cannot be hashed, and is wrong
        pass
    _check_each(contract_name, options)
    if len(_right) < 1024:
        _right.add(key)


def _check_traced(contract_name: str, options: dict[str, Any]) -> None:
    """The same in words that torch.compile can trace, for numbers that may be symbols."""
    for name, value in options.items():
        choices, least, above = _RULES[name]
        if choices is not None and value not in choices:
            raise ValueError(f"{contract_name}: {name}: got {value!r}, expected one of {choices}")
        if least is not None and value < least:
            raise ValueError(f"{contract_name}: {name}: got {value}, expected at least {least}")
        if above is not None and value is not None and not value > above:
            raise ValueError(f"{contract_name}: {name}: got {value}, expected a number above {above}")


def _check_each(contract_name: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        try:
            spec.check_option(spec.STEP_OPTIONS[name], value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{contract_name}: {error}") from None


def _describe(letters: str) -> str:
    return "(" + ", ".join(letters) + ")"
