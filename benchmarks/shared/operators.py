"""An operator as a call to be timed, in either direction, and the check of its answer against the reference."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor

from ntm_fast import ops, reference
from shared.registry import INPUTS, Sizes

DIRECTIONS = ("forward", "backward")


def inputs_of(op: str) -> dict[str, str]:
    """name -> dimensions"""
    return ops.CONTRACTS[op].inputs


def inputs(op: str, sizes: Sizes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with torch.device(device):
        return [tensor.to(dtype) for tensor in INPUTS[op](sizes)]


def options(op: str, sizes: Sizes) -> dict[str, Any]:
    """Every option of an operator, in the schema's order: those that the reference has defaults for at these."""
    given = {"shift_range": sizes.S} if op == "memory_step" else {}
    return {**given, **(getattr(reference, op).__kwdefaults__ or {})}


def outputs_of(function: Callable, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    outputs = function(*args, **options)
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def both(function: Callable, leaves: list[Tensor], options: dict[str, Any], grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Outputs, and the gradient of every input for these gradients of the outputs."""
    outputs = outputs_of(function, *leaves, **options)
    return (*outputs, *torch.autograd.grad(outputs, leaves, grads))


@torch.no_grad()
def check(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], grads: list[Tensor]) -> None:
    """Raises AssertionError where there is nothing to compare the speed of."""
    scale = sum(float(grad.norm()) ** 2 for grad in grads) ** 0.5
    for index, (got, want) in enumerate(zip(found, wanted, strict=True)):
        # The gradient of a scalar is a sum that may cancel, to some ulp of what was summed.
        error, allowed = float((got - want).norm()), 1e-4 * float(want.norm()) + 1e-6 * scale
        if not error <= allowed:
            raise AssertionError(f"native and reference disagree on result {index}: {error:.3g}, allowed {allowed:.3g}")


class Call(NamedTuple):
    """One registered operator, ``ntm_fast::{op}`` or ``ntm_fast::{op}_backward``, with all that it is called with."""

    op: str
    direction: str
    tensors: list[Tensor]
    options: dict[str, Any]

    def __call__(self) -> tuple[Tensor, ...]:
        name = self.op if self.direction == "forward" else f"{self.op}_backward"
        return outputs_of(getattr(torch.ops.ntm_fast, name), *self.tensors, *self.options.values())

    def elsewhere(self) -> Call:
        """The same numbers in other memory."""
        return self._replace(tensors=[tensor.clone() for tensor in self.tensors])

    def moved(self, results: tuple[Tensor, ...]) -> int:
        """The bytes that a kernel cannot help but move: every input read once, every output written once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.tensors, *results))

    def check(self, results: tuple[Tensor, ...]) -> None:
        """Compare some elements of the batch, from the first to the last, with the reference; raises AssertionError."""
        spec = ops.CONTRACTS[self.op]
        batch = self.tensors[0].shape[0]
        which = torch.linspace(0, batch - 1, min(batch, 64), device=self.tensors[0].device).round().long()
        tensors = [tensor[which] for tensor in self.tensors]
        given, twin = tensors[: len(spec.inputs)], getattr(reference, self.op)
        if self.direction == "forward":
            wanted, grads = outputs_of(twin, *given, **self.options), []
        else:
            grads = tensors[len(spec.inputs) + len(spec.saved) :]
            wanted = both(twin, [x.requires_grad_() for x in given], self.options, grads)[len(spec.outputs) :]
        check(tuple(result[which] for result in results), wanted, grads)


def call(op: str, direction: str, sizes: Sizes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Call:
    forward = Call(op, "forward", inputs(op, sizes, device, dtype), options(op, sizes))
    if direction == "forward":
        return forward
    spec, outputs = ops.CONTRACTS[op], forward()
    saved = [tensor for name, tensor in zip(spec.outputs, outputs) if name in spec.saved]
    grads = [torch.randn_like(tensor) for tensor in outputs]  # which keeps a memory's layout
    return Call(op, direction, [*forward.tensors, *saved, *grads], forward.options)
