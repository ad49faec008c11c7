"""The plan of a native sequence, from shapes and options: sizes, buffers, and which memories are kept."""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from .. import native, spec
from ..spec import CONTROLLERS, NTMState, SequenceOptions, SequenceTensors, step_values

# All steps' memories are kept if they take at most so many bytes. If they take more, a CPU is faster when it writes
# them again, because they do not fit its cache; on a GPU they would take too much memory.
ALL_MEMORIES = {"cpu": 1 << 21, "cuda": 1 << 32}
# A native state has an address for every tensor that a controller may have. A GRU has no cell: its address is 0.
_NATIVE_STATE = 4 + max(len(kind.state) for kind in CONTROLLERS.values())


def kept_every(checkpoint: str | int, steps: int, memory_bytes: int, device_type: str = "cpu") -> int:
    """The steps from one kept memory to the next: 1 keeps all, about sqrt(T) takes the least room.

    ``memory_bytes``: of one step's memories, B N M numbers.
    """
    number = spec.checkpoint_number(checkpoint)
    if number:
        return min(number, steps)
    most = ALL_MEMORIES["cuda" if device_type == "cuda" else "cpu"]
    return 1 if steps * memory_bytes <= most else math.isqrt(steps)


Shape = tuple[int, ...]


class Trail(NamedTuple):
    """What a forward leaves for the backward besides its outputs; what a controller does not have is empty.

    In the order of csrc/core's SequenceTrail.
    """

    x: Tensor  # (T, B, G)  the first layer's gates, activated
    upper_x: Tensor  # (L-1, T, B, G)  those of the other layers
    y: Tensor  # (L, T, B, G)  GRU: the gates' products with the hidden states
    hidden: Tensor  # (L-1, T, B, H)  of the layers below the last
    cell: Tensor  # (L, T, B, H)  LSTM
    params: Tensor  # (T, B, P)
    features: Tensor  # (T, B, H + R M)  what the outputs are made of
    read_weights: Tensor  # (T, B, R, N)
    write_weights: Tensor  # (T, B, W, N)
    memory: Tensor  # ((T-1) // every, B, M, N)
    active: Tensor  # (T, B, A)  CPU: the heads' parameters, activated


class Plan(NamedTuple):
    """Sizes and buffers of a call: T steps, B elements, I inputs, O outputs, L layers of H units with G gates."""

    T: int
    B: int
    I: int
    O: int
    L: int
    H: int
    G: int
    takes_ends: bool  # whether the native loop multiplies inputs and features too
    shared: bool  # whether the whole batch has one initial state, without a batch dimension
    values: dict[str, Any]  # sizes and options by their names in the native functions' signatures
    ordered: dict[str, list[Any]]  # these in the order of each native function that was called
    final: tuple[Shape, ...]  # of the final state's tensors in a row, in the native layout
    trail: dict[str, Shape]  # of the trail's

    def scalars(self, operator: str) -> list[Any]:
        """Sizes and options in the native function's order."""
        found = self.ordered.get(operator)
        if found is None:
            found = self.ordered[operator] = [self.values[name] for name in native.signature(operator).scalars]
        return found


def make_plan(
    options: SequenceOptions, keep: bool, shapes: tuple, item: int, device_type: str, takes_ends: bool
) -> Plan:
    """The plan. ``shapes``: as :func:`plan` lists them; ``item``: bytes of a number; ``takes_ends``: as in Plan."""
    (T, B, I), memory, (R, _), (W, _), (L, H), (P, _), (O, _) = shapes
    N, M = memory[-2:]
    kind, shared = CONTROLLERS[options.controller], len(memory) == 2
    two_products, has_cell = kind.products == 2, "cell" in kind.state
    G, K = kind.gates * H, 2 * options.step[0] + 1
    every = kept_every(options.memory_checkpoint, T, B * N * M * item, device_type) if keep else T
    return Plan(
        *(T, B, I, O, L, H, G, takes_ends, shared),
        values={
            **{"T": T, "B": B, "I": I, "O": O, "L": L, "H": H, "controller": kind.native},
            **{"R": R, "W": W, "N": N, "M": M, "every": every, "shared": shared, "keep": keep},
            **spec.native_values(spec.STEP_OPTIONS, options.step),
        },
        ordered={},
        final=((B, M, N), (B, R, N), (B, W, N), (B, R, M), *[(L, B, H)] * len(kind.state)),
        trail=dict(
            x=(T, B, G),
            upper_x=(L - 1, T, B, G),
            y=(L if two_products else 0, T, B, G),
            hidden=(L - 1, T, B, H),
            cell=(L if has_cell else 0, T, B, H),
            params=(T, B, P),
            features=(T, B, H + R * M),
            read_weights=(T, B, R, N),
            write_weights=(T, B, W, N),
            memory=((T - 1) // every, B, M, N),
            active=(T if takes_ends else 0, B, (R + W) * (M + K + 2 * (K + 3)) + 2 * W * M),
        ),
    )


_remembered = functools.lru_cache(maxsize=1024)(make_plan)


def plan(x: SequenceTensors, options: SequenceOptions, keep: bool, make: Any = _remembered) -> Plan:
    """The plan for these tensors. ``make``: make_plan itself where sizes are symbols, which cannot be remembered."""
    state, output = x.initial, x.output_weight
    assert output is not None
    (L, *_, H) = state.controller[0].shape
    heads = state.read_weights.shape[-2:], state.write_weights.shape[-2:]
    shapes = x.inputs.shape, state.memory.shape, *heads, (L, H), x.heads_weight.shape, output.shape
    kind = "cuda" if x.inputs.is_cuda else "cpu"
    return make(options, keep, shapes, x.inputs.element_size(), kind, native.part(kind).takes_ends)


def why_no_room(
    device: torch.device, dtype: torch.dtype, describe: Callable[[], spec.NTMConfig], backward: bool
) -> str | None:
    """Why the state of one sequence does not fit the device; None when it does, at every length and batch size.

    On CUDA it must fit in the shared memory of a block; backward needs more of it than forward.
    """
    if not native.bounded(device.type):
        return None
    config = describe()
    sizes = config.num_layers, config.hidden_size, config.memory_locations, config.memory_width
    heads = config.read_heads, config.write_heads
    return _refusal(device, dtype is torch.float64, config.controller, *sizes, *heads, step_values(config), backward)


def _refusal(
    device: torch.device,
    is_double: bool,
    controller: str,
    L: int,
    H: int,
    N: int,
    M: int,
    R: int,
    W: int,
    step: tuple[Any, ...],
    backward: bool,
) -> str | None:
    """Why the device refuses even the shortest sequence of the smallest batch; None when it does not."""
    P = spec.params_size(R, W, M, step[0])
    shapes = (1, 1, 1), (N, M), (R, N), (W, N), (L, H), (P, H), (1, H + R * M)
    smallest = make_plan(SequenceOptions(controller, step, 0), True, shapes, 4, device.type, False)
    name = "ntm_sequence_backward" if backward else "ntm_sequence"
    return native.refusal(name, device, is_double, smallest.scalars(name))


setattr(_refusal, "_dynamo_marked_constant", True)  # a fact of the device, for a compiled graph


# --- the native layout ------------------------------------------------------------------------------------------------


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, copied where they are not contiguous."""
    return [x if x.is_contiguous() else x.contiguous() for x in tensors]  # the method is the slow part


def native_state(state: NTMState) -> NTMState:
    """A state as it lies in the native layout, its memories [B, M, N]."""
    return NTMState.unflatten(contiguous([state.memory.mT, *state.flatten()[1:]]))


def state_addresses(addresses: Sequence[int]) -> list[int]:
    """A state's addresses in a row, with 0 for missing tensors, as the native functions take them."""
    return [*addresses, *[0] * (_NATIVE_STATE - len(addresses))]


def addresses_of(state: NTMState) -> list[int]:
    """The addresses of a state in the native layout, as :func:`state_addresses` gives them."""
    return state_addresses([tensor.data_ptr() for tensor in state.flatten()])


NO_STATE = [0] * _NATIVE_STATE
