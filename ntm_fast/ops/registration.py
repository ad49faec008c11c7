"""From a contract to ``torch.ops.ntm_fast.*``: the schema, the fake, the kernels, and the autograd Function around.

Backward is a registered operator too, so that ``torch.compile(fullgraph=True)`` passes.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from .. import native, reference, spec
from . import contract as contracts
from .contract import MEMORY, Contract

LIBRARY = torch.library.Library("ntm_fast", "DEF")
_SCHEMA_TYPES = {int: "int", float: "float", bool: "bool", str: "str"}


def schema(options: Any) -> str:
    """Options, ``{name: field}``, as a schema declares them."""
    types = {
        name: _SCHEMA_TYPES[spec.option_type(own)] + "?" * ("optional" in own.metadata)
        for name, own in options.items()
    }
    return "".join(f", {kind} {name}" for name, kind in types.items())


def register(name: str, declaration: str, kernel: Callable, fake: Callable) -> None:
    """Declare ``torch.ops.ntm_fast.{name}`` with its kernel, the same for every device, and its fake."""
    LIBRARY.define(f"{name}{declaration}")
    torch.library.register_fake(f"ntm_fast::{name}", fake, lib=LIBRARY)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)


def _address(tensor: Tensor, letters: str, keep: list[Tensor]) -> int:
    """Where the native code finds the tensor; a copy in the native layout is kept alive in ``keep``."""
    if letters == MEMORY:
        tensor = tensor.transpose(1, 2)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
        keep.append(tensor)
    return tensor.data_ptr()


def _scalars(contract: Contract, sizes: dict[str, int], options: Sequence[Any]) -> list[Any]:
    """Sizes and options in the native function's order."""
    values = {**sizes, **spec.native_values(contract.options, options)}
    return [values[name] for name in native.signature(contract.name).scalars]


def define(contract: Contract) -> None:
    """Register the operator: it takes tensors, then options, and returns fresh tensors."""
    name, count, single = contract.name, len(contract.inputs), len(contract.outputs) == 1
    input_letters, output_letters = tuple(contract.inputs.values()), tuple(contract.outputs.values())
    read = contract.reader()

    def fake(*args: Any) -> Any:
        sizes = read(args)
        results = [contracts.empty(args[0], letters, sizes) for letters in output_letters]
        return results[0] if single else tuple(results)

    def kernel(*args: Any) -> Any:
        sizes = read(args)
        results = [contracts.empty(args[0], letters, sizes) for letters in output_letters]
        keep: list[Tensor] = []
        addresses = [_address(tensor, letters, keep) for tensor, letters in zip(args, input_letters)]
        addresses += [tensor.data_ptr() for tensor in results]
        native.call(name, args[0], _scalars(contract, sizes, args[count:]), addresses)
        return results[0] if single else tuple(results)

    tensors = ", ".join(f"Tensor {own}" for own in contract.inputs)
    returns = "Tensor" if single else f"({', '.join(['Tensor'] * len(output_letters))})"
    register(name, f"({tensors}{schema(contract.options)}) -> {returns}", kernel, fake)


class Served(NamedTuple):
    """The ways in which an operator can be computed, once its arguments are checked: tensors, then options' values."""

    twin: Callable[..., Any]  # in plain PyTorch: tensors, options by name
    plain: Callable[..., Any]  # by the native code, without a graph
    apply: Callable[..., Any]  # by the native code, in autograd's graph


def served(contract: Contract) -> Served:
    """Register an operator and its backward, and put an autograd Function around them."""
    define(contract)
    define(contract.backward())
    forward_op = getattr(torch.ops.ntm_fast, contract.name).default
    return Served(getattr(reference, contract.name), forward_op, _function(contract).apply)


def _function(contract: Contract) -> type[torch.autograd.Function]:
    count, nones = len(contract.inputs), (None,) * len(contract.options)
    kept = [index for index, name in enumerate(contract.outputs) if name in contract.saved]
    forward_op = getattr(torch.ops.ntm_fast, contract.name).default
    backward_op = getattr(torch.ops.ntm_fast, f"{contract.name}_backward").default
    twin = getattr(reference, contract.name)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = forward_op(*args)
            saved = (outputs,) if kept and isinstance(outputs, Tensor) else [outputs[index] for index in kept]
            ctx.save_for_backward(*args[:count], *saved)
            ctx.options = args[count:]
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = ctx.saved_tensors
            if torch.is_grad_enabled():
                options = dict(zip(contract.options, ctx.options))
                return (*grads_through(functools.partial(twin, **options), saved[:count], grads), *nones)
            found = backward_op(*saved, *grads, *ctx.options)
            return (*(found if isinstance(found, (tuple, list)) else (found,)), *nones)

    Function.__name__ = Function.__qualname__ = contract.name
    return Function


def once_only() -> bool:
    """Within a backward: whether it is the last one, so that what it reads may be freed or overwritten."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def grads_through(
    function: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Differentiable gradients of a function in plain PyTorch: what a backward returns under ``create_graph``."""
    local = [x.view_as(x) for x in inputs]  # inputs may depend on each other; their aliases do not
    outputs = function(*local)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    reached = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None]
    wanted = [x for x in local if x.requires_grad]
    of = [output for output, _ in reached]
    found = iter(torch.autograd.grad(of, wanted, [grad for _, grad in reached], create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in local]
