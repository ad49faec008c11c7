"""Which engine serves a machine, and why not the others. Every call asks, except a repeated streamed step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import native, ops
from ..ops.sequence import why_no_sequence
from ..ops.serving import LOW_PRECISION, why_not_eps, why_not_native
from ..spec import NTMConfig
from . import step

LARGEST_HIDDEN = 256  # units, up to which the sequence engine is faster on CUDA; docs/decisions.md


class Choice(NamedTuple):
    """The engine that serves, and for each faster one the reason why it does not."""

    engine: str  # "sequence", "step" or "reference"
    reasons: dict[str, str]

    def __str__(self) -> str:
        return "; ".join([self.engine, *(f"not {name}: {reason}" for name, reason in self.reasons.items())])


def choose_engine(
    config: NTMConfig, device: torch.device, dtype: torch.dtype, called: dict[str, str] | None = None
) -> Choice:
    """The engine for a machine on this device. ``called``: the parts whose calls something must see, and what.

    Raises RuntimeError where ``engine=`` forces one that cannot serve.
    """
    reasons: dict[str, str] = {}
    if not called:  # parts that are called take and give the module's own dtype
        dtype = _computed_in(dtype)
    for engine in ("sequence", "step"):
        reason = _why_not(engine, config, device, dtype, called)
        if reason is None:
            return Choice(engine, reasons)
        if config.engine == engine:
            raise RuntimeError(f"engine={engine!r} cannot serve: {reason}")
        reasons[engine] = reason
    if config.engine == "auto":
        native.warn_once(device.type)
    return Choice("reference", reasons)


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a module of this dtype computes in, on the native engines."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def _why_not(
    engine: str, config: NTMConfig, device: torch.device, dtype: torch.dtype, called: dict[str, str] | None
) -> str | None:
    """Why this engine is not taken; None when it is."""
    if config.engine not in ("auto", engine):
        return f"engine={config.engine!r} was asked for"
    if reason := why_not_eps(config.eps, dtype):
        return reason
    if engine == "step":
        return why_not_native(device, dtype, "memory_step")
    if called:
        return "it would go past " + ", and ".join(f"{name}, which {what}" for name, what in called.items())
    if config.engine == "auto" and _faster_in_steps(config, device):
        return (
            f"on CUDA the step engine is faster for a controller of more than {LARGEST_HIDDEN} units, "
            f"this one has {config.hidden_size}"
        )
    return why_no_sequence(device, dtype, config.controller, lambda: config)


def _faster_in_steps(config: NTMConfig, device: torch.device) -> bool:
    """Whether the step engine is faster than the sequence engine.

    In the sequence engine on CUDA, every block reads all of the controller's weights at every step. The step engine
    multiplies by cuBLAS, which deals the weights out among all blocks. For large controllers that saves more time than
    the step engine's many kernels cost.
    """
    return device.type == "cuda" and config.hidden_size > LARGEST_HIDDEN and step.in_one_node("cuda")


def explain(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    module: torch.nn.Module | None = None,
) -> dict[str, str]:
    """For every operator, what would serve tensors of that device and dtype: ``"native"``, or ``"reference: why"``.

    With ``module``, a FastNTM or NTMCell, ``"engine"`` says what would serve it there, and why not the faster ones; and
    what is said of ``ntm_sequence`` takes its sizes into account.
    """
    device = torch.device(device)
    reasons = {name: why_not_native(device, dtype, name) for name in ops.NAMES}
    config = getattr(module, "ntm_config", None)
    if module is not None and not isinstance(config, NTMConfig):
        raise TypeError(f"module: got {type(module).__name__}, expected a FastNTM or NTMCell")
    if config is not None:
        reasons["ntm_sequence"] = why_no_sequence(device, _computed_in(dtype), config.controller, lambda: config)
    found = {name: "native" if reason is None else f"reference: {reason}" for name, reason in reasons.items()}
    if config is None:
        return found
    try:
        called = module._called_parts() if module is not None else None  # type: ignore[operator]
        return {**found, "engine": str(choose_engine(config, device, dtype, called))}
    except RuntimeError as error:  # the engine asked for cannot serve
        return {**found, "engine": f"none: {error}"}
