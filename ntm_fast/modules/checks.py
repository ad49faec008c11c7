"""Checks of what a module is given, before anything is computed. Each raises TypeError or ValueError, naming the
argument, what came and what is expected."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from .. import native
from ..spec import CONTROLLERS, NTMConfig, NTMState


def check_inputs(config: NTMConfig, inputs: Any, dimensions: int, weight: Tensor) -> None:
    """That inputs have so many dimensions, or one fewer when unbatched, and dtype and device of ``weight``."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected a Tensor")
    if inputs.dim() not in (dimensions - 1, dimensions):
        raise ValueError(
            f"inputs: got shape {tuple(inputs.shape)}, expected {dimensions} dimensions, or {dimensions - 1} when "
            "unbatched"
        )
    if not (inputs.is_cpu and weight.is_cpu) and inputs.device != weight.device:
        raise ValueError(f"inputs: got device {inputs.device}, expected the module's {weight.device}")
    if inputs.dtype != weight.dtype and (weight.is_meta or not torch.is_autocast_enabled(inputs.device.type)):
        raise TypeError(f"inputs: got dtype {inputs.dtype}, expected the module's {weight.dtype}")
    if inputs.shape[-1] != config.input_size:
        raise ValueError(
            f"inputs: got shape {tuple(inputs.shape)}, expected the last dimension to be input_size = "
            f"{config.input_size}"
        )


def check_state(config: NTMConfig, state: Any, batch: tuple[int, ...], weight: Tensor) -> None:
    """That it is a state of the machine for such a batch, of dtype and device of ``weight``."""
    if not isinstance(state, NTMState):
        raise TypeError(f"state: got {type(state).__name__}, expected an NTMState")
    names = CONTROLLERS[config.controller].state
    controller = state.controller
    if not isinstance(controller, tuple) or len(controller) != len(names):
        raise ValueError(
            f"state.controller: expected a tuple of {len(names)} tensors ({', '.join(names) or 'none'}) for a "
            f"{config.controller} controller, got {type(controller).__name__} of "
            f"{len(controller) if hasattr(controller, '__len__') else '?'}"
        )
    n, m, r, w = config.memory_locations, config.memory_width, config.read_heads, config.write_heads
    shapes: list[tuple[int, ...]] = [(*batch, n, m), (*batch, r, n), (*batch, w, n), (*batch, r, m)]
    shapes += [(config.num_layers, *batch, config.hidden_size)] * len(names)

    def name(index: int) -> str:
        return f"state.{state._fields[index] if index < 4 else f'controller[{index - 4}]'}"

    check_tensors(state.flatten(), shapes, weight, name)


# Tensors on the CPU that were found to fit, by layouts, shapes and dtype: to look that up takes a third of a check.
_fitting: set[Any] = set()
REMEMBERED = 1024  # when there are more, all are forgotten


def check_tensors(
    tensors: Sequence[Any], shapes: Sequence[tuple[int, ...]], weight: Tensor, name: Callable[[int], str]
) -> None:
    """That they have these shapes, and dtype and device of ``weight``; ``name`` is asked for in errors. Under autocast
    dtypes may differ: where that cannot be, the engine says so."""
    key = None
    if weight.is_cpu and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
        found = native.layouts(tuple(tensors))
        key = (found[0], tuple(shapes), weight.dtype) if found else None
        if key in _fitting:
            return
    device, on_cpu = weight.device, weight.is_cpu  # which is quicker asked than a device
    dtype = weight.dtype if weight.is_meta or not torch.is_autocast_enabled(device.type) else None
    for index, (tensor, shape) in enumerate(zip(tensors, shapes)):
        if isinstance(tensor, Tensor) and tensor.shape == shape:
            if dtype in (None, tensor.dtype) and (tensor.is_cpu if on_cpu else tensor.device == device):
                continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name(index)}: got {type(tensor).__name__}, expected a Tensor")
        if tensor.shape != shape:
            raise ValueError(f"{name(index)}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        raise ValueError(
            f"{name(index)}: got {tensor.dtype} on {tensor.device}, expected the module's {weight.dtype} on {device}"
        )
    if key is not None:
        if len(_fitting) >= REMEMBERED:
            _fitting.clear()
        _fitting.add(key)
