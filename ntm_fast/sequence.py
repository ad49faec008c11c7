"""The kernels of ``ntm_sequence``: all T steps in one native call forward and one backward.

The native loop does what is recurrent. Left to PyTorch as large products: the inputs' share of the first layer's gates,
and every weight gradient, from the gradients of the gates and of the raw head parameters that the backward leaves.

Arguments are named and shaped as those of :func:`reference.ntm_sequence`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from . import _native

ALL_MEMORIES = 1 << 21  # bytes of memories up to which every step's is kept: beyond, writing them again is faster


def kept_every(checkpoint: str | int, steps: int, memory_bytes: int) -> int:
    """Every how many steps a memory is kept: 1 keeps all, else about sqrt(T) keeps the least.

    ``memory_bytes`` are those of the whole batch's memory, B N M numbers.
    """
    if checkpoint == "all":
        return 1
    if checkpoint != "auto":
        return min(checkpoint, steps)
    return 1 if steps * memory_bytes <= ALL_MEMORIES else math.isqrt(steps)


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

    x: Tensor  # (T + (L-1) slots, B, G)  the gates' products; for a GRU those of what the layer is fed
    y: Tensor  # (L slots, B, G)  GRU: those of the hidden state
    hidden: Tensor  # (L-1, slots, B, H)  of the layers below the last
    cell: Tensor  # (L slots, B, H)  LSTM
    params: Tensor  # (slots, B, P)
    read_weights: Tensor  # (T, B, R, N)
    write_weights: Tensor  # (T, B, W, N)
    memory: Tensor  # ((T-1) // every, B, M, N)


class _Plan(NamedTuple):
    """Sizes: T steps, B elements, L layers of H units with G gates; and what the native functions take."""

    T: int
    B: int
    L: int
    H: int
    G: int
    gru: bool
    every: int
    scalars: tuple


def _plan(options: Options, keep: bool, inputs, memory, read_weights, write_weights, state) -> _Plan:
    T, B, _ = inputs.shape
    L, _, H = state[0].shape
    gru = options.controller == "gru"
    every = kept_every(options.memory_checkpoint or "auto", T, memory.numel() * memory.element_size()) if keep else T
    sizes = T, B, L, H, gru, *_native.step_sizes(memory, read_weights, write_weights, options.shift_range), every
    return _Plan(T, B, L, H, (3 if gru else 4) * H, gru, every, (*sizes, *_native.step_scalars(*options[2:7])))


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape)


def _native_layout(
    memory: Tensor, read_weights: Tensor, write_weights: Tensor, reads: Tensor, state: Sequence[Tensor]
) -> list[Tensor]:
    """A state as the native functions take it: the memory location-minor, a GRU with an empty cell."""
    found = [memory.transpose(1, 2), read_weights, write_weights, reads, *state]
    return [x.contiguous() for x in found] + ([memory.new_empty(0)] if len(state) == 1 else [])


def _flat(plan: _Plan, columns: int, weights: Sequence[Tensor], heads_weight: Tensor, heads_bias: Tensor) -> Tensor:
    """Every weight as the native functions take them: without the first layer's ``columns`` for the inputs."""
    flat = []
    for layer in range(plan.L):
        weight_ih, weight_hh, bias_ih, bias_hh = weights[4 * layer : 4 * layer + 4]
        fed = weight_ih if layer else weight_ih[:, columns:]
        both = (fed, weight_hh) if plan.gru else (torch.cat([fed, weight_hh], 1),)
        flat += (*(weight.flatten() for weight in both), bias_ih if plan.gru else bias_ih + bias_hh, bias_hh)
    return torch.cat([*flat, heads_weight.flatten(), heads_bias])


def allocate(
    plan: _Plan, keep: bool, inputs: Tensor, initial: Sequence[Tensor], heads_weight: Tensor
) -> tuple[Tensor, list[Tensor], Trail]:
    """The features, the final state in the native layout and the trail, uninitialised."""
    T, B, L, H, G, gru, every, _ = plan
    slots, kept = (T, T) if keep else (1, 0)
    memory, read_weights, write_weights, reads, *state = (x.shape for x in initial)
    features = _empty(inputs, T, B, H + reads[1] * reads[2])
    final = [_empty(inputs, *shape) for shape in (memory, read_weights, write_weights, reads, *state)]
    trail = Trail(
        x=_empty(inputs, T + (L - 1) * slots, B, G),
        y=_empty(inputs, L * slots if gru else 0, B, G),
        hidden=_empty(inputs, L - 1, slots, B, H),
        cell=_empty(inputs, 0 if gru else L * slots, B, H),
        params=_empty(inputs, slots, B, heads_weight.shape[0]),
        read_weights=_empty(inputs, kept, *read_weights),
        write_weights=_empty(inputs, kept, *write_weights),
        memory=_empty(inputs, (T - 1) // every, *memory),
    )
    return features, final, trail


def _results(plan: _Plan, keep: bool, features: Tensor, final: list[Tensor], trail: Trail) -> tuple:
    memory, read_weights, write_weights, reads, *state = final
    state = state[:1] if plan.gru else state
    return features, memory.transpose(1, 2), read_weights, write_weights, reads, state, list(trail) if keep else []


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
    *options, keep = rest
    plan = _plan(Options(*options), keep, inputs, memory, read_weights, write_weights, state)
    initial = _native_layout(memory, read_weights, write_weights, reads, state)
    features, final, trail = allocate(plan, keep, inputs, initial, heads_weight)
    columns = inputs.shape[2]
    weight_ih, _, bias_ih, bias_hh = weights[:4]
    torch.addmm(
        bias_ih if plan.gru else bias_ih + bias_hh,
        inputs.reshape(plan.T * plan.B, columns),
        weight_ih[:, :columns].t(),
        out=trail.x[: plan.T].view(plan.T * plan.B, plan.G),
    )
    x, y, hidden, cell, params, *kept = trail
    flat = _flat(plan, columns, weights, heads_weight, heads_bias)
    arrays = flat, *initial, *final, x, y, hidden, cell, params, features, *kept
    _native.call("ntm_sequence", inputs, *plan.scalars, keep, *(array.data_ptr() for array in arrays))
    return _results(plan, keep, features, final, trail)


def fake(inputs, memory, read_weights, write_weights, reads, state, weights, heads_weight, heads_bias, *rest) -> tuple:
    """:func:`forward` on shapes alone."""
    *options, keep = rest
    plan = _plan(Options(*options), keep, inputs, memory, read_weights, write_weights, state)
    initial = _native_layout(memory, read_weights, write_weights, reads, state)
    return _results(plan, keep, *allocate(plan, keep, inputs, initial, heads_weight))


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
    *options, needs_inputs = rest
    plan = _plan(Options(*options), True, inputs, memory, read_weights, write_weights, state)
    T, B, L, H, G, gru, *_ = plan
    features, trail = features.contiguous(), Trail(*trail)
    initial = _native_layout(memory, read_weights, write_weights, reads, state)
    grad_final = _native_layout(grad_memory, grad_read_weights, grad_write_weights, grad_reads, grad_state)
    grad = [_empty(inputs, *tensor.shape) for tensor in grad_final]
    # A step's gates are done with when their gradients are known: these may take their place.
    grad_x = trail.x if spend else _empty(inputs, *trail.x.shape)
    grad_y = trail.y if spend else _empty(inputs, *trail.y.shape)
    grad_params = _empty(inputs, *trail.params.shape)
    columns = inputs.shape[2]
    x, y, hidden, cell, params, *kept = trail
    flat = _flat(plan, columns, weights, heads_weight, heads_bias)
    final_memory, grad_features = final_memory.transpose(1, 2).contiguous(), grad_features.contiguous()
    arrays = flat, *initial, final_memory, x, y, hidden, cell, params, features, *kept
    arrays += grad_features, *grad_final, *grad, grad_x, grad_y, grad_params
    _native.call("ntm_sequence_backward", inputs, *plan.scalars, *(array.data_ptr() for array in arrays))

    def before(first: Tensor, all_steps: Tensor) -> Tensor:
        """What each step met, (T, B, size): the initial value, then each step's but the last."""
        return torch.cat([first.reshape(1, *all_steps.shape[1:]), all_steps[:-1]])

    hidden = [*hidden, features[..., :H]]
    grad_x = grad_x.view(L, T * B, G)
    grad_y = grad_y.view(L, T * B, G) if gru else grad_x
    grad_weights = []
    for layer in range(L):
        met = [hidden[layer - 1]] if layer else [inputs, before(reads, features[..., H:])]
        met.append(before(state[0][layer], hidden[layer]))
        x, y = grad_x[layer], grad_y[layer]
        grad_bias_ih = x.sum(0)
        if gru:
            grad_weight_ih = x.t() @ torch.cat(met[:-1], -1).flatten(0, 1)
            grad_weight_hh, grad_bias_hh = y.t() @ met[-1].flatten(0, 1), y.sum(0)
        else:  # one product for both
            joined = x.t() @ torch.cat(met, -1).flatten(0, 1)
            grad_weight_ih, grad_weight_hh = (part.contiguous() for part in joined.split([joined.shape[1] - H, H], 1))
            grad_bias_hh = grad_bias_ih.clone()
        grad_weights += grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh
    params = grad_params.flatten(0, 1)
    heads = params.t() @ hidden[-1].flatten(0, 1), params.sum(0)
    grad_memory, *grad_rest = grad[:5] if gru else grad
    found = [grad_memory.transpose(1, 2), *grad_rest, *grad_weights, *heads]
    if needs_inputs:
        found.append((grad_x[0] @ weights[0][:, :columns]).view(T, B, columns))
    return found


def fake_backward(
    inputs, memory, read_weights, write_weights, reads, state, weights, heads_weight, heads_bias, *rest
) -> list[Tensor]:
    """:func:`backward` on shapes alone."""
    minor = memory.new_empty(memory.shape[0], memory.shape[2], memory.shape[1]).transpose(1, 2)
    others = read_weights, write_weights, reads, *state, *weights, heads_weight, heads_bias
    return [minor, *(x.new_empty(x.shape) for x in (*others, *([inputs] if rest[-1] else [])))]
