"""How an operator is computed: by the native code, by its autograd Function, or by its twin in plain PyTorch."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor

from .. import native
from .contract import Contract, check
from .registration import Served


def why_not_native(device: torch.device, dtype: torch.dtype, name: str = "memory_step") -> str | None:
    """Why no native kernel serves operator ``name`` there; None when one does."""
    if dtype not in (torch.float32, torch.float64):
        return f"there are native kernels for float32 and float64, not for {dtype}"
    return native.why_not(device.type, dtype is torch.float64, name)


def transforming() -> bool:
    """Whether functorch or forward-mode AD is active: these need the reference."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return functorch is not None or torch.autograd.forward_ad._current_level >= 0


def watched(tensors: Iterable[Tensor] = ()) -> bool:
    """Whether a tracer, a mode or a tensor's class must see the registered operators."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return not native.PLAIN.issuperset(map(type, tensors))


def left_alone(tensors: Iterable[Tensor] = ()) -> bool:
    """Whether nothing must see or change tensors or operators: :func:`watched`, autograd, autocast, transforms."""
    return not (watched(tensors) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or transforming())


LOW_PRECISION = torch.float16, torch.bfloat16
# Below these the native code, which takes subnormal numbers for 0, would find a norm of 0: eps enters squared.
SMALLEST_EPS = {torch.float32: 1e-18, torch.float64: 1e-153}


def why_not_eps(eps: Any, dtype: torch.dtype) -> str | None:
    """Why the native code does not serve with this ``eps``; None where it does, or where its value is a symbol."""
    least = SMALLEST_EPS.get(dtype)
    if least is None or not isinstance(eps, float) or eps >= least:
        return None
    return f"eps = {eps} is below {least}, so that its square is no normal number of {dtype}"


def in_float32(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """What autocast computes with: tensors in low precision as float32, the others as they are."""
    return tuple([x.float() if isinstance(x, Tensor) and x.dtype in LOW_PRECISION else x for x in tensors])


def call(
    contract: Contract,
    served: Served,
    tensors: Sequence[Any],
    options: dict[str, Any],
    why_not: Callable[[], str | None] = lambda: None,
) -> Any:
    """Check, then compute. ``why_not``: a reason against native kernels besides device and dtype; None without one."""
    first = tensors[0]
    if isinstance(first, Tensor) and not first.is_meta and torch.is_autocast_enabled(first.device.type):
        with torch.autocast(first.device.type, enabled=False):
            return call(contract, served, in_float32(tensors), options, why_not)
    check(contract, tensors, options)
    unserved = why_not_native(first.device, first.dtype, contract.name) is not None or why_not() is not None
    if unserved or why_not_eps(options.get("eps"), first.dtype) is not None:
        native.warn_once(first.device.type)
        return served.twin(*tensors, **options)
    return serve(served, tensors, options)


def serve(served: Served, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
    """Compute from checked arguments: on the native kernels, or on the reference under a transform."""
    if transforming():
        return served.twin(*tensors, **options)
    # An exported program is for inference: with a graph it would keep what a backward needs, for none that runs.
    graph = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    if graph and any(tensor.requires_grad for tensor in tensors):
        return served.apply(*tensors, *options.values())
    return served.plain(*tensors, *options.values())
