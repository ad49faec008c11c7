"""The kernels of ``ntm_sequence``: one native call takes all T steps forward, and one takes them back.

These calls do what is recurrent. Every weight gradient is one large product after them, from the gradients of the gates
and of the raw head parameters: on the CPU in one more native call, on CUDA by PyTorch. On CUDA PyTorch also multiplies
the inputs, before the call forward, and the output layer, after it; on the CPU the call does both itself.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor

from .. import native
from ..spec import NTMState, SequenceOptions, SequenceTensors
from .sequence_plan import NO_STATE, Plan, Trail, addresses_of, contiguous, make_plan, native_state, plan


def table(tensors: Sequence[Tensor]) -> array:
    """The addresses of weights or of their gradients. Raises RuntimeError for a tensor without storage."""
    return table_of([tensor.data_ptr() for tensor in tensors])


def table_of(addresses: Sequence[int]) -> array:
    """:func:`table` of addresses."""
    found = array("Q", addresses)
    if 0 in found:
        raise RuntimeError("ntm_sequence: a weight has no storage")
    return found


def weights_of(x: SequenceTensors) -> list[Tensor]:
    """The weights, contiguous, in the order of the native functions."""
    row = x.flatten()
    return contiguous(row[1 + len(x.initial.flatten()) :])


def allocate(p: Plan, inputs: Tensor, keep: bool) -> tuple[Tensor, NTMState, Trail | None]:
    """The outputs, the final state in the native layout and the trail, uninitialised; no trail unless it is kept."""
    made = native.empty(inputs, ((p.T, p.B, p.O), *p.final, *(p.trail.values() if keep else ())))
    end = 1 + len(p.final)
    return made[0], NTMState.unflatten(made[1:end]), Trail(*made[end:]) if keep else None


def call_forward(
    scalars: list[Any],
    like: Tensor,
    weights: array,
    inputs: int,
    outputs: int,
    initial: list[int],
    final: list[int],
    trail: Sequence[int],
) -> None:
    """The native forward; tensors are given by address. ``weights``: a :func:`table`."""
    addresses = weights.buffer_info()[0], inputs, outputs, *initial, *final, *trail
    native.call("ntm_sequence", like, scalars, addresses)


NO_TRAIL = [0] * len(Trail._fields)


def forward(x: SequenceTensors, options: SequenceOptions, keep: bool) -> tuple[Tensor, NTMState, Trail | None]:
    """-> outputs (T, B, O), the final state, and the trail for a backward, if it is to be kept."""
    p = plan(x, options, keep)
    initial, weights = native_state(x.initial), weights_of(x)
    places = table(weights)
    outputs, final, trail = allocate(p, x.inputs, keep)
    inputs = x.inputs.contiguous()
    kept = [tensor.data_ptr() for tensor in trail] if trail else list(NO_TRAIL)
    if not p.takes_ends:
        shapes = p.trail["x"], p.trail["features"]
        gates, features = (trail.x, trail.features) if trail else native.empty(inputs, shapes)
        kept[Trail._fields.index("x")], kept[Trail._fields.index("features")] = gates.data_ptr(), features.data_ptr()
        torch.mm(inputs.view(-1, p.I), weights[0][:, : p.I].t(), out=gates.view(-1, p.G))
    states = addresses_of(initial), addresses_of(final)
    call_forward(p.scalars("ntm_sequence"), inputs, places, inputs.data_ptr(), outputs.data_ptr(), *states, kept)
    if not p.takes_ends:
        torch.addmm(weights[-1], features.flatten(0, 1), weights[-2].t(), out=outputs.view(-1, p.O))
    return outputs, final._replace(memory=final.memory.mT), trail


def fake(x: SequenceTensors, options: SequenceOptions, keep: bool) -> tuple[Tensor, NTMState, Trail | None]:
    """:func:`forward` on shapes alone."""
    outputs, final, trail = allocate(plan(x, options, keep, make=make_plan), x.inputs, keep)
    return outputs, final._replace(memory=final.memory.mT), trail


class _Grads(NamedTuple):
    """What the native backward leaves for the weights' gradients, in the order of csrc/core's SequenceGrads."""

    x: Tensor  # as Trail
    upper_x: Tensor
    y: Tensor
    params: Tensor


def backward(
    x: SequenceTensors,
    options: SequenceOptions,
    final_memory: Tensor,
    trail: Trail,
    grad_outputs: Tensor,
    grad_final: NTMState | None,
    needs_inputs: bool,
    spend: bool = False,
) -> tuple[Tensor | None, list[Tensor]]:
    """``grad_final``: the gradients of the final state; None when all are 0. ``spend``: the trail may be
    overwritten, so that no other backward can use it.

    -> the gradient of the inputs, if it is needed, and those of all other tensors in a row.
    """
    p = plan(x, options, True)
    grad_outputs = grad_outputs.contiguous()
    initial, weights = native_state(x.initial), weights_of(x)
    shapes = [p.trail[name] for name in _Grads._fields]
    *of_state, grad_params = native.empty(x.inputs, (*p.final, shapes.pop()))
    # A step's gates are not needed once their gradients are known: these may overwrite them.
    grad_x, grad_upper_x, grad_y = trail[:3] if spend else native.empty(x.inputs, tuple(shapes))
    grad, left = NTMState.unflatten(of_state), _Grads(grad_x, grad_upper_x, grad_y, grad_params)
    with native.without_autocast(x.inputs.device.type):
        _call_backward(p, x, initial, weights, final_memory, trail, grad_outputs, grad_final, grad, left)
        if native.why_not(x.inputs.device.type, x.inputs.dtype is torch.float64, "ntm_sequence_weight_gradients"):
            state, of_weights = _weight_gradients_by_torch(p, x, trail, grad_outputs, grad, left)
        else:
            state, of_weights = _weight_gradients(p, x, initial, weights, trail, grad_outputs, grad, left)
        row = [state.memory.mT, *state.flatten()[1:], *of_weights]
        if not needs_inputs:
            return None, row
        return (left.x.view(p.T * p.B, p.G) @ weights[0][:, : p.I]).view(p.T, p.B, p.I), row


def _call_backward(
    p: Plan,
    x: SequenceTensors,
    initial: NTMState,
    weights: list[Tensor],
    final_memory: Tensor,
    trail: Trail,
    grad_outputs: Tensor,
    grad_final: NTMState | None,
    grad: NTMState,
    left: _Grads,
) -> None:
    """The native backward fills ``grad``, the gradient of the initial state, and ``left``."""
    final_memory = final_memory.mT.contiguous()
    native_grad_final = native_state(grad_final) if grad_final else None
    grad_features = grad_outputs if p.takes_ends else grad_outputs.view(-1, p.O) @ weights[-2]
    places = table(weights)
    addresses = [
        places.buffer_info()[0],
        *addresses_of(initial),
        final_memory.data_ptr(),
        *[tensor.data_ptr() for tensor in trail],
        grad_features.data_ptr(),
        *(addresses_of(native_grad_final) if native_grad_final else NO_STATE),
        *addresses_of(grad),
        *[tensor.data_ptr() for tensor in left],
    ]
    native.call("ntm_sequence_backward", x.inputs, p.scalars("ntm_sequence_backward"), addresses)


def _weight_gradients(
    p: Plan,
    x: SequenceTensors,
    initial: NTMState,
    weights: list[Tensor],
    trail: Trail,
    grad_outputs: Tensor,
    grad: NTMState,
    left: _Grads,
) -> tuple[NTMState, list[Tensor]]:
    """By the native code -> the gradients of the initial state, summed over the batch where it is shared, and of the
    weights."""
    inputs, sums = x.inputs.contiguous(), grad
    shapes: list[tuple[int, ...]] = [weight.shape for weight in weights]
    if p.shared:
        shapes += [p.final[0][1:], *[tensor.shape for tensor in x.initial.flatten()[1:]]]
    made = native.empty(inputs, tuple(shapes))
    grads = made[: len(weights)]
    places = table(grads)
    if p.shared:
        sums = NTMState.unflatten(made[len(weights) :])
    addresses = [
        inputs.data_ptr(),
        *addresses_of(initial),
        *[tensor.data_ptr() for tensor in trail],
        grad_outputs.data_ptr(),
        *[tensor.data_ptr() for tensor in left],
        *addresses_of(grad),
        *addresses_of(sums),
        places.buffer_info()[0],
    ]
    name = "ntm_sequence_weight_gradients"
    native.call(name, inputs, p.scalars(name), addresses)
    return sums, grads


def _weight_gradients_by_torch(
    p: Plan, x: SequenceTensors, trail: Trail, grad_outputs: Tensor, grad: NTMState, left: _Grads
) -> tuple[NTMState, list[Tensor]]:
    """The same where no native kernel computes them."""
    initial, sums = x.initial, grad
    if p.shared:
        initial = initial.for_batch(p.B)
        sums = NTMState.unflatten([g.sum(0) for g in grad[:4]] + [g.sum(1) for g in grad.controller])
    H, rows = p.H, p.T * p.B
    hidden = [*trail.hidden, trail.features[..., :H]]
    found: list[Tensor] = []
    for layer in range(p.L):
        # What the layer was fed at each step, side by side: its inputs or the layer below, the reads, its hidden state.
        below = hidden[layer - 1] if layer else x.inputs
        before = [] if layer else [(initial.reads, trail.features[..., H:])]
        before.append((initial.controller[0][layer], hidden[layer]))
        earlier = [torch.cat([first.flatten(1)[None], all_steps[:-1]]) for first, all_steps in before]
        met = torch.cat([below, *earlier], 2).flatten(0, 1)
        of_x = (left.upper_x[layer - 1] if layer else left.x).view(rows, p.G)
        of_y = left.y[layer].view(rows, p.G) if len(left.y) else None
        found += _layer_gradients(met, H, of_x, of_y)
    for grad_out, fed in (left.params, hidden[-1]), (grad_outputs, trail.features):
        flat = grad_out.flatten(0, 1)
        found += [flat.t() @ fed.flatten(0, 1), flat.sum(0)]
    return sums, found


def _layer_gradients(met: Tensor, H: int, of_x: Tensor, of_y: Tensor | None) -> list[Tensor]:
    """Of weight_ih, weight_hh, bias_ih and bias_hh. ``of_y``: of a GRU's products with hidden states; else None."""
    fed = met.shape[1] - H
    bias = of_x.sum(0)
    if of_y is not None:
        return [of_x.t() @ met[:, :fed], of_y.t() @ met[:, fed:], bias, of_y.sum(0)]
    weight_ih, weight_hh = (of_x.t() @ met).split([fed, H], 1)  # one product for both
    return [weight_ih.contiguous(), weight_hh.contiguous(), bias, bias.clone()]


def fake_backward(x: SequenceTensors, needs_inputs: bool) -> tuple[Tensor | None, list[Tensor]]:
    """:func:`backward` on shapes alone."""
    inputs, memory, *others = x.flatten()
    row = [memory.new_empty(memory.mT.shape).mT, *[tensor.new_empty(tensor.shape) for tensor in others]]
    return inputs.new_empty(inputs.shape) if needs_inputs else None, row
