"""The parts of a machine that are called as modules: something must see the calls, a hook or a forward of its own.

Of the other parts, the engines compute what the call would, from their weights.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping

import torch.nn.modules.module as everywhere
from torch import Tensor, nn

from ..engines import Called
from ..spec import CONTROLLERS, NTMConfig
from .controllers import Controller

# What a call runs where an engine may compute it from the weights.
_FORWARDS = {"controller": Controller.forward, "heads": nn.Linear.forward, "output": nn.Linear.forward}


def parts_to_call(parts: Mapping[str, Any]) -> dict[str, str]:
    """The parts that must be called, and why. ``parts``: the modules of a machine by name."""
    if _hooks_for_all():
        return dict.fromkeys(_FORWARDS, "has hooks")
    found = {}
    for name, forward in _FORWARDS.items():
        part = parts[name]
        own = part.__dict__  # quicker asked than the module: every streamed step does
        if type(part).forward is not forward or "forward" in own:
            found[name] = f"is a {type(part).__name__} with a forward of its own"
        elif (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            found[name] = "has hooks"
    return found


def _hooks_for_all() -> bool:
    """Whether there are hooks that every module has."""
    return bool(
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def checked(config: NTMConfig, parts: Mapping[str, Any], names: Mapping[str, str]) -> Called:
    """These parts, to be called. What a call gives is checked: TypeError or ValueError names the part."""
    called: dict[str, Any] = {}
    if "controller" in names:
        count = len(CONTROLLERS[config.controller].state)
        called["controller"] = _checked_controller(parts["controller"], config.hidden_size, count)
    if "heads" in names:
        called["heads"] = _checked_layer("heads", parts["heads"], config.params_size)
    if "output" in names:
        called["output"] = _checked_layer("output", parts["output"], None)
    return Called(**called)


def _checked_layer(name: str, layer: Callable[[Tensor], Any], width: int | None) -> Callable[[Tensor], Tensor]:
    """A layer that is called: it gives (..., width) for (..., inputs); any width where None is given."""

    def call(x: Tensor) -> Tensor:
        y = layer(x)
        if not isinstance(y, Tensor):
            raise TypeError(f"{name}: got {type(y).__name__} from its call, expected a Tensor")
        expected = (*x.shape[:-1], y.shape[-1] if width is None and y.dim() else width)
        if y.shape != expected:
            raise ValueError(f"{name}: got shape {tuple(y.shape)} from its call, expected {expected}")
        return y

    return call


def _checked_controller(controller: Callable[..., Any], hidden_size: int, count: int) -> Callable[..., Any]:
    """A controller that is called: it gives the hidden state (B, H) and a state like the one that it got."""

    def call(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = controller(x, state)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
            raise TypeError(
                f"controller: got {type(found).__name__} from its call, expected a tuple of the hidden state and a "
                f"state of {count} tensors"
            )
        hidden, new = found
        if hidden.shape != (len(x), hidden_size):
            raise ValueError(
                f"controller: got a hidden state of shape {tuple(hidden.shape)} from its call, expected "
                f"{(len(x), hidden_size)}"
            )
        if [tuple(own.shape) for own in new] != [tuple(own.shape) for own in state]:
            raise ValueError(
                f"controller: got a state of shapes {[tuple(own.shape) for own in new]} from its call, expected "
                f"{[tuple(own.shape) for own in state]}"
            )
        return hidden, tuple(new)

    return call
