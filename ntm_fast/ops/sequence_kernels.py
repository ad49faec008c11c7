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

from .. import native, reference
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
    outputs, *final = native.empty(inputs, ((p.T, p.B, p.O), *p.final), returned=True)
    trail = Trail(*native.empty(inputs, tuple(p.trail.values()))) if keep else None
    return outputs, NTMState.unflatten(final), trail


def call_forward(
    scalars: list[Any],
    like: Tensor,
    weights: array,
    order: int,
    inputs: int,
    outputs: int,
    initial: list[int],
    final: list[int],
    trail: Sequence[int],
) -> None:
    """The native forward; tensors are given by address. ``weights``: a :func:`table`."""
    addresses = weights.buffer_info()[0], order, inputs, outputs, *initial, *final, *trail
    native.call("ntm_sequence", like, scalars, addresses)


class Order(NamedTuple):
    """The order in which the native code takes sequences: the longest first. SequenceOrder in csrc/core."""

    lengths: Tensor  # (B,) of each sequence, in this order
    numbers: Tensor  # (B,) which sequence of the batch it is
    back: Tensor  # (B,) the place of each sequence of the batch in this order
    native: Tensor  # (2, B), int32: the first two

    def sort(self, tensor: Tensor, clear: bool) -> Tensor:
        """A tensor (T, B, ...) of the batch in this order. ``clear``: with 0 at the steps that a sequence does not
        take, for products over all steps."""
        tensor = tensor.index_select(1, self.numbers)
        return reference.without_ended(tensor, self.lengths) if clear else tensor

    def unsort(self, tensor: Tensor) -> Tensor:
        """A tensor (T, B, ...) in this order as one of the batch."""
        return tensor.index_select(1, self.back)

    def sort_fed(self, state: NTMState) -> NTMState:
        """What the first step is fed of the states of a batch, in this order."""
        controller = tuple([x.index_select(1, self.numbers) for x in state.controller])
        return state._replace(reads=state.reads.index_select(0, self.numbers), controller=controller)


def order_of(x: SequenceTensors) -> Order | None:
    """The order of the sequences; None where no lengths are given."""
    if x.lengths is None:
        return None
    lengths, numbers = x.lengths.sort(descending=True, stable=True)
    return Order(lengths, numbers, numbers.argsort(), torch.stack([lengths, numbers]).int())


def _address(order: Order | None) -> int:
    return 0 if order is None else order.native.data_ptr()


NO_TRAIL = [0] * len(Trail._fields)


def forward(x: SequenceTensors, options: SequenceOptions, keep: bool) -> tuple[Tensor, NTMState, Trail | None]:
    """-> outputs (T, B, O), the final state, and the trail for a backward, if it is to be kept."""
    p = plan(x, options, keep)
    initial, weights = native_state(x.initial), weights_of(x)
    places = table(weights)
    outputs, final, trail = allocate(p, x.inputs, keep)
    order = order_of(x)
    inputs = order.sort(x.inputs, clear=False) if order else x.inputs.contiguous()
    kept = [tensor.data_ptr() for tensor in trail] if trail else list(NO_TRAIL)
    if not p.takes_ends:
        shapes = p.trail["x"], p.trail["features"]
        gates, features = (trail.x, trail.features) if trail else native.empty(inputs, shapes)
        kept[Trail._fields.index("x")], kept[Trail._fields.index("features")] = gates.data_ptr(), features.data_ptr()
        torch.mm(inputs.view(-1, p.I), weights[0][:, : p.I].t(), out=gates.view(-1, p.G))
    states = addresses_of(initial), addresses_of(final)
    ends = inputs.data_ptr(), outputs.data_ptr()
    call_forward(p.scalars("ntm_sequence"), inputs, places, _address(order), *ends, *states, kept)
    if not p.takes_ends:
        torch.addmm(weights[-1], features.flatten(0, 1), weights[-2].t(), out=outputs.view(-1, p.O))
        outputs = reference.without_ended(outputs, order.lengths if order else None)
    if order:
        outputs = order.unsort(outputs)
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
    order = order_of(x)
    fed = x
    if order:
        clear = not p.takes_ends
        fed = x._replace(inputs=order.sort(x.inputs, clear))
        if not p.shared:
            fed = fed._replace(initial=order.sort_fed(x.initial))
        grad_outputs = order.sort(grad_outputs, clear)
    grad_outputs = grad_outputs.contiguous()
    weights = weights_of(x)
    shapes = [p.trail[name] for name in _Grads._fields]
    (grad_params,) = native.empty(x.inputs, (shapes.pop(),))
    of_state = native.empty(x.inputs, p.final, returned=not p.shared)
    # A step's gates are not needed once their gradients are known: these may overwrite them.
    grad_x, grad_upper_x, grad_y = trail[:3] if spend else native.empty(x.inputs, tuple(shapes))
    grad, left = NTMState.unflatten(of_state), _Grads(grad_x, grad_upper_x, grad_y, grad_params)
    with native.without_autocast(x.inputs.device.type):
        of_inputs = _call_backward(
            p, x, order, weights, final_memory, trail, grad_outputs, grad_final, needs_inputs, grad, left
        )
        if native.why_not(x.inputs.device.type, x.inputs.dtype is torch.float64, "ntm_sequence_weight_gradients"):
            state, of_weights = _weight_gradients_by_torch(p, fed, trail, grad_outputs, grad, left)
        else:
            state, of_weights = _weight_gradients(p, fed, order, weights, trail, grad_outputs, grad, left)
    if order and of_inputs is not None:
        of_inputs = order.unsort(of_inputs)
    return of_inputs, [state.memory.mT, *state.flatten()[1:], *of_weights]


def _call_backward(
    p: Plan,
    x: SequenceTensors,
    order: Order | None,
    weights: list[Tensor],
    final_memory: Tensor,
    trail: Trail,
    grad_outputs: Tensor,
    grad_final: NTMState | None,
    needs_inputs: bool,
    grad: NTMState,
    left: _Grads,
) -> Tensor | None:
    """The native backward fills ``grad``, the gradient of the initial state, and ``left``. -> the gradient of the
    inputs, if it is needed."""
    initial, final_memory = native_state(x.initial), final_memory.mT.contiguous()
    of_inputs = None
    if needs_inputs and p.takes_ends:
        (of_inputs,) = native.empty(x.inputs, ((p.T, p.B, p.I),), returned=True)
    native_grad_final = native_state(grad_final) if grad_final else None
    grad_features = grad_outputs if p.takes_ends else grad_outputs.view(-1, p.O) @ weights[-2]
    places = table(weights)
    addresses = [
        places.buffer_info()[0],
        _address(order),
        *addresses_of(initial),
        final_memory.data_ptr(),
        *[tensor.data_ptr() for tensor in trail],
        grad_features.data_ptr(),
        *(addresses_of(native_grad_final) if native_grad_final else NO_STATE),
        *addresses_of(grad),
        *[tensor.data_ptr() for tensor in left],
        0 if of_inputs is None else of_inputs.data_ptr(),
    ]
    native.call("ntm_sequence_backward", x.inputs, p.scalars("ntm_sequence_backward"), addresses)
    if needs_inputs and not p.takes_ends:
        of_inputs = (left.x.view(p.T * p.B, p.G) @ weights[0][:, : p.I]).view(p.T, p.B, p.I)
    return of_inputs


def _weight_gradients(
    p: Plan,
    fed: SequenceTensors,
    order: Order | None,
    weights: list[Tensor],
    trail: Trail,
    grad_outputs: Tensor,
    grad: NTMState,
    left: _Grads,
) -> tuple[NTMState, list[Tensor]]:
    """By the native code -> the gradients of the initial state, summed over the batch where it is shared, and of the
    weights. ``fed``: inputs, and what the first step was fed, in the native order."""
    memory, *others = fed.initial.flatten()
    initial = NTMState.unflatten([memory, *contiguous(others)])  # the memory is not used
    inputs, sums = fed.inputs.contiguous(), grad
    shapes: list[tuple[int, ...]] = [weight.shape for weight in weights]
    if p.shared:
        shapes += [p.final[0][1:], *[tensor.shape for tensor in fed.initial.flatten()[1:]]]
    made = native.empty(inputs, tuple(shapes), returned=True)
    grads = made[: len(weights)]
    places = table(grads)
    if p.shared:
        sums = NTMState.unflatten(made[len(weights) :])
    addresses = [
        _address(order),
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
    p: Plan, fed: SequenceTensors, trail: Trail, grad_outputs: Tensor, grad: NTMState, left: _Grads
) -> tuple[NTMState, list[Tensor]]:
    """The same where no native kernel computes them."""
    initial, sums = fed.initial, grad
    if p.shared:
        initial = initial.for_batch(p.B)
        sums = NTMState.unflatten([g.sum(0) for g in grad[:4]] + [g.sum(1) for g in grad.controller])
    H, rows = p.H, p.T * p.B
    hidden = [*trail.hidden, trail.features[..., :H]]
    found: list[Tensor] = []
    for layer in range(p.L):
        # What the layer was fed at each step, side by side: its inputs or the layer below, the reads, its hidden state.
        below = hidden[layer - 1] if layer else fed.inputs
        before = [] if layer else [(initial.reads, trail.features[..., H:])]
        before.append((initial.controller[0][layer], hidden[layer]))
        earlier = [torch.cat([first.flatten(1)[None], all_steps[:-1]]) for first, all_steps in before]
        met = torch.cat([below, *earlier], 2).flatten(0, 1)
        of_x = (left.upper_x[layer - 1] if layer else left.x).view(rows, p.G)
        of_y = left.y[layer].view(rows, p.G) if len(left.y) else None
        found += _layer_gradients(met, H, of_x, of_y)
    for grad_out, met in (left.params, hidden[-1]), (grad_outputs, trail.features):
        flat = grad_out.flatten(0, 1)
        found += [flat.t() @ met.flatten(0, 1), flat.sum(0)]
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
