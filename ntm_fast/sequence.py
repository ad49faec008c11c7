"""The kernels of ``ntm_sequence``: all T steps in one native call forward and one backward.

The native loop does what is recurrent. Every weight gradient is one large product after it, from the gradients of the
gates and of the raw head parameters that it leaves, and on CUDA the inputs' share of the first layer's gates is one
before it.

Arguments are named and shaped as those of :func:`reference.ntm_sequence`.
"""

from __future__ import annotations

import functools
import math
from array import array
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from . import _native

# Bytes of memories up to which every step's is kept. Beyond, writing them again is faster on a CPU, whose cache they
# leave; a GPU's memory need not be full of them.
ALL_MEMORIES = {"cpu": 1 << 21, "cuda": 1 << 32}


def kept_every(checkpoint: str | int, steps: int, memory_bytes: int, device_type: str = "cpu") -> int:
    """Every how many steps a memory is kept: 1 keeps all, else about sqrt(T) keeps the least.

    ``memory_bytes`` are those of the whole batch's memory, B N M numbers.
    """
    if checkpoint == "all":
        return 1
    if checkpoint != "auto":
        return min(checkpoint, steps)
    most = ALL_MEMORIES["cuda" if device_type == "cuda" else "cpu"]
    return 1 if steps * memory_bytes <= most else math.isqrt(steps)


class Machine(NamedTuple):
    """What of a machine decides how much room a sequence takes."""

    controller: str
    num_layers: int
    hidden_size: int
    memory: tuple[int, int]  # N, M
    heads: tuple[int, int]  # R, W
    shift_range: int


def why_no_room(device: torch.device, dtype: torch.dtype, machine: Machine, backward: bool) -> str | None:
    """Why the device cannot hold a sequence's state where it runs; None when it can, at every length and batch size.

    On CUDA that is the shared memory of a block, of which backward needs more than forward.
    """
    if not _native.limited(device.type):
        return None
    controller, L, H, (N, M), (R, W), shift_range = machine
    sizes = 1, 1, 1, L, H, controller == "gru", 1, R, W, N, M, 2 * shift_range + 1, 1
    options = _native.step_scalars(False, "tanh", "tanh", None, 1.0)
    if backward:
        name, values = "ntm_sequence_backward", [0] * (1 + 6 + 1 + 10 + 1 + 6 + 6 + 4)
    else:
        name, values = "ntm_sequence", [0] * (1 + 1 + 1 + 6 + 6 + 10)
    return _native.refusal(name, device.type, device.index, dtype is torch.float64, *sizes, *options, *values)


class Options(NamedTuple):
    """What a sequence needs besides tensors, in the order of the operator's schema."""

    controller: str
    shift_range: int
    read_first: bool
    key_activation: str
    add_activation: str
    clip: float | None
    eps: float
    memory_checkpoint: int  # 0: "auto"


class Trail(NamedTuple):
    """What a forward leaves for the backward besides its outputs; what a controller does not have is empty."""

    x: Tensor  # (T, B, G)  the first layer's gates, activated
    upper_x: Tensor  # (L-1, T, B, G)  of the others
    y: Tensor  # (L, T, B, G)  GRU: those of the hidden states
    hidden: Tensor  # (L-1, T, B, H)  of the layers below the last
    cell: Tensor  # (L, T, B, H)  LSTM
    params: Tensor  # (T, B, P)
    read_weights: Tensor  # (T, B, R, N)
    write_weights: Tensor  # (T, B, W, N)
    memory: Tensor  # ((T-1) // every, B, M, N)


class _Plan(NamedTuple):
    """Of T steps, B elements, I inputs, L layers of H units with G gates: what everything else follows from."""

    T: int
    B: int
    I: int
    L: int
    H: int
    G: int
    gru: bool
    scalars: tuple  # as the native functions take them
    minor: tuple  # the strides of a memory (B, N, M) in the native layout, [B, M, N]
    features: tuple[int, ...]  # a shape
    final: list[tuple[int, ...]]  # the shapes of the final state in the native layout
    trail: list[tuple[int, ...]]  # those of the trail besides x


def _make_plan(
    options: tuple, keep: bool, inputs, memory, read_weights, write_weights, state, heads, item, device_type
) -> _Plan:
    """Of the options, the tensors' shapes, the bytes of a number and the device's type."""
    options = Options(*options)
    (T, B, I), (_, N, M), (_, R, _), (_, W, _) = inputs, memory, read_weights, write_weights
    (L, _, H), (P, _) = state, heads
    gru = options.controller == "gru"
    G = (3 if gru else 4) * H
    every = kept_every(options.memory_checkpoint or "auto", T, B * N * M * item, device_type) if keep else T
    step = B, R, W, N, M, 2 * options.shift_range + 1
    states = [(L, B, H)] * (1 if gru else 2)
    trail = [
        (L - 1, T, B, G),
        (L if gru else 0, T, B, G),
        (L - 1, T, B, H),
        (0 if gru else L, T, B, H),
        (T, B, P),
        (T, B, R, N),
        (T, B, W, N),
        ((T - 1) // every, B, M, N),
    ]
    return _Plan(
        *(T, B, I, L, H, G, gru),
        scalars=(T, B, I, L, H, gru, *step, every, *_native.step_scalars(*options[2:7])),
        minor=(N * M, 1, N),
        features=(T, B, H + R * M),
        final=[(B, M, N), (B, R, N), (B, W, N), (B, R, M), *states],
        trail=trail if keep else [],
    )


_remembered_plan = functools.lru_cache(maxsize=1024)(_make_plan)


def _plan(options, keep, inputs, memory, read_weights, write_weights, state, heads, make=_remembered_plan) -> _Plan:
    shapes = inputs.shape, memory.shape, read_weights.shape, write_weights.shape, state[0].shape, heads.shape
    return make(options, keep, *shapes, inputs.element_size(), inputs.device.type)


_empty = _native.empty


def _native_layout(
    plan: _Plan, memory: Tensor, read_weights: Tensor, write_weights: Tensor, reads: Tensor, state: Sequence[Tensor]
) -> list[Tensor]:
    """A state as it lies in the native layout."""
    if memory.stride() != plan.minor:
        if memory.stride(0) == 0:  # one memory for the whole batch: transposed once
            memory = memory[:1].mT.contiguous().expand(plan.B, -1, -1).contiguous()
        else:
            memory = memory.mT.contiguous()
    return [memory, *_contiguous((read_weights, write_weights, reads, *state))]


def _addresses(plan: _Plan, state: Sequence[Tensor]) -> list[int]:
    """Of a state in the native layout; a GRU has no cell."""
    return [tensor.data_ptr() for tensor in state] + [0] * plan.gru


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x if x.is_contiguous() else x.contiguous() for x in tensors]  # the method is the slow part


def _table(tensors: Sequence[Tensor]) -> array:
    return array("Q", [tensor.data_ptr() for tensor in tensors])


def allocate(plan: _Plan, inputs: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The features, the final state in the native layout and the trail besides x, uninitialised."""
    final = [_empty(inputs, shape) for shape in plan.final]
    trail = [_empty(inputs, shape) for shape in plan.trail]
    return _empty(inputs, plan.features), final, trail


def _results(features: Tensor, final: list[Tensor], trail: list[Tensor]) -> tuple:
    memory, read_weights, write_weights, reads, *state = final
    return features, memory.mT, read_weights, write_weights, reads, state, trail


def forward(
    inputs: Tensor,
    memory: Tensor,
    read_weights: Tensor,
    write_weights: Tensor,
    reads: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    heads_weight: Tensor,
    heads_bias: Tensor,
    *rest,
) -> tuple:
    """``rest``: the :class:`Options`, and ``keep``, whether there will be a backward -> features, the final memory,
    read weights, write weights, reads and controller's state, and the trail: empty lists where there is none.
    """
    keep = rest[-1]
    plan = _plan(rest[:-1], keep, inputs, memory, read_weights, write_weights, state, heads_weight)
    initial = _native_layout(plan, memory, read_weights, write_weights, reads, state)
    weights = _contiguous((*weights, heads_weight, heads_bias))
    table = _table(weights)
    features, final, trail = allocate(plan, inputs)
    (inputs,) = _contiguous([inputs])
    multiplies = _native.limited(inputs.device.type)  # here, what the CPU's loop multiplies itself
    x = _empty(inputs, (plan.T, plan.B, plan.G)) if keep or multiplies else None
    if multiplies:
        torch.mm(inputs.view(-1, plan.I), weights[0][:, : plan.I].t(), out=x.view(-1, plan.G))
    kept = [tensor.data_ptr() for tensor in trail] if keep else [0] * (len(Trail._fields) - 1)
    _native.call(
        "ntm_sequence",
        inputs,
        *plan.scalars,
        keep,
        table.buffer_info()[0],
        inputs.data_ptr(),
        *_addresses(plan, initial),
        *_addresses(plan, final),
        0 if x is None else x.data_ptr(),
        *kept[:5],  # to params
        features.data_ptr(),
        *kept[5:],
    )
    return _results(features, final, [x, *trail] if keep else [])


def fake(inputs, memory, read_weights, write_weights, reads, state, weights, heads_weight, heads_bias, *rest) -> tuple:
    """:func:`forward` on shapes alone."""
    keep = rest[-1]
    # Sizes may be symbols, which cannot be remembered.
    plan = _plan(rest[:-1], keep, inputs, memory, read_weights, write_weights, state, heads_weight, _make_plan)
    features, final, trail = allocate(plan, inputs)
    return _results(features, final, [_empty(inputs, (plan.T, plan.B, plan.G)), *trail] if keep else [])


def backward(
    inputs: Tensor,
    memory: Tensor,
    read_weights: Tensor,
    write_weights: Tensor,
    reads: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    heads_weight: Tensor,
    heads_bias: Tensor,
    features: Tensor,
    final_memory: Tensor,
    trail: Sequence[Tensor],
    grad_features: Tensor,
    grad_memory: Tensor,
    grad_read_weights: Tensor,
    grad_write_weights: Tensor,
    grad_reads: Tensor,
    grad_state: Sequence[Tensor],
    *rest,
    spend: bool = False,
) -> list[Tensor]:
    """``rest``: the :class:`Options`, and whether the inputs' gradient is needed.

    -> gradients of the initial memory, read weights, write weights, reads and controller's state, of the weights, of
    the heads' weight and bias and, if needed, of the inputs. With ``spend`` the trail is good for no other backward.
    """
    needs_inputs = rest[-1]
    plan = _plan(rest[:-1], True, inputs, memory, read_weights, write_weights, state, heads_weight)
    T, B, I, L, H, G, gru, *_ = plan
    features, grad_features, trail = features.contiguous(), grad_features.contiguous(), Trail(*trail)
    initial = _native_layout(plan, memory, read_weights, write_weights, reads, state)
    final_memory = final_memory.transpose(1, 2).contiguous()
    grad_final = _native_layout(plan, grad_memory, grad_read_weights, grad_write_weights, grad_reads, grad_state)
    grad = [_empty(inputs, shape) for shape in plan.final]
    # A step's gates are done with when their gradients are known: these may take their place.
    gates = trail.x, trail.upper_x, trail.y
    grad_x, grad_upper_x, grad_y = gates if spend else (_empty(inputs, tensor.shape) for tensor in gates)
    grad_params = _empty(inputs, trail.params.shape)
    weights = _contiguous((*weights, heads_weight, heads_bias))
    table = _table(weights)
    *kept, all_read_weights, all_write_weights, all_memory = trail
    initial_addresses = _addresses(plan, initial)
    trail_addresses = [x.data_ptr() for x in (*kept, features, all_read_weights, all_write_weights, all_memory)]
    of_gates = grad_x, grad_upper_x, grad_y, grad_params
    grad_addresses = [tensor.data_ptr() for tensor in of_gates]
    _native.call(
        "ntm_sequence_backward",
        inputs,
        *plan.scalars,
        table.buffer_info()[0],
        *initial_addresses,
        final_memory.data_ptr(),
        *trail_addresses,
        grad_features.data_ptr(),
        *_addresses(plan, grad_final),
        *_addresses(plan, grad),
        *grad_addresses,
    )

    with _native.without_autocast(inputs.device.type):
        if _native.why_not(inputs.device.type, inputs.dtype is torch.float64, "ntm_sequence_weight_gradients") is None:
            grad_weights = [_empty(inputs, weight.shape) for weight in weights]
            (inputs,), grad_table = _contiguous([inputs]), _table(grad_weights)
            _native.call(
                "ntm_sequence_weight_gradients",
                inputs,
                *plan.scalars[:-5],  # the sizes
                inputs.data_ptr(),
                *initial_addresses,
                *trail_addresses,
                *grad_addresses,
                grad_table.buffer_info()[0],
            )
        else:
            grad_weights = weight_gradients(plan, inputs, reads, state[0], features, trail.hidden, *of_gates)
        grad_memory, *grad_rest = grad
        found = [grad_memory.transpose(1, 2), *grad_rest, *grad_weights]
        if needs_inputs:
            found.append((grad_x.view(T * B, G) @ weights[0][:, :I]).view(T, B, I))
    return found


def weight_gradients(
    plan: _Plan,
    inputs: Tensor,
    reads: Tensor,
    initial_hidden: Tensor,
    features: Tensor,
    lower_hidden: Tensor,
    grad_x: Tensor,
    grad_upper_x: Tensor,
    grad_y: Tensor,
    grad_params: Tensor,
) -> list[Tensor]:
    """The gradients of the weights and of the heads' weight and bias, where no native kernel computes them."""
    T, B, _, L, H, G, gru, *_ = plan
    hidden = [*lower_hidden, features[..., :H]]
    grad_weights = []
    for layer in range(L):
        # What the layer met at every step, side by side: its inputs or the layer below, the reads, its hidden state.
        below = hidden[layer - 1] if layer else inputs
        before = [(reads, features[..., H:])] * (not layer) + [(initial_hidden[layer], hidden[layer])]
        earlier = [torch.cat([first.flatten(1)[None], all_steps[:-1]]) for first, all_steps in before]
        met = torch.cat([below, *earlier], 2).flatten(0, 1)
        fed = met.shape[1] - H
        x = (grad_upper_x[layer - 1] if layer else grad_x).view(T * B, G)
        grad_bias_ih = x.sum(0)
        if gru:
            y = grad_y[layer].view(T * B, G)
            grad_weight_ih, grad_weight_hh = x.t() @ met[:, :fed], y.t() @ met[:, fed:]
            grad_bias_hh = y.sum(0)
        else:  # one product for both
            grad_weight_ih, grad_weight_hh = (part.contiguous() for part in (x.t() @ met).split([fed, H], 1))
            grad_bias_hh = grad_bias_ih.clone()
        grad_weights += grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh
    params = grad_params.flatten(0, 1)
    return [*grad_weights, params.t() @ hidden[-1].flatten(0, 1), params.sum(0)]


def fake_backward(
    inputs, memory, read_weights, write_weights, reads, state, weights, heads_weight, heads_bias, *rest
) -> list[Tensor]:
    """:func:`backward` on shapes alone."""
    minor = memory.new_empty(memory.shape[0], memory.shape[2], memory.shape[1]).transpose(1, 2)
    others = read_weights, write_weights, reads, *state, *weights, heads_weight, heads_bias
    return [minor, *(x.new_empty(x.shape) for x in (*others, *([inputs] if rest[-1] else [])))]
