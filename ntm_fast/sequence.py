"""The kernels of ``ntm_sequence``: all T steps in one native call forward and one backward.

The native loop does what is recurrent. Every weight gradient is one large product after it, from the gradients of the
gates and of the raw head parameters that it leaves. On CUDA the inputs' share of the first layer's gates is one before
it and the output layer one behind, which the CPU's loop multiplies itself.

Arguments are named and shaped as those of :func:`reference.ntm_sequence`.
"""

from __future__ import annotations

import functools
import math
from array import array
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from . import _native, reference

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


def why_no_room(
    device: torch.device, dtype: torch.dtype, machine: Callable[[], Machine], backward: bool
) -> str | None:
    """Why the device cannot hold a sequence's state where it runs; None when it can, at every length and batch size.

    On CUDA that is the shared memory of a block, of which backward needs more than forward.
    """
    if not _native.limited(device.type):
        return None
    controller, L, H, (N, M), (R, W), shift_range = machine()
    sizes = 1, 1, 1, 1, L, H, controller == "gru", 1, R, W, N, M, 2 * shift_range + 1, 1, 0
    options = _native.step_scalars(False, "tanh", "tanh", None, 1.0)
    name, keep = ("ntm_sequence_backward", ()) if backward else ("ntm_sequence", (False,))
    return _native.refusal(name, device.type, device.index, dtype is torch.float64, *sizes, *options, *keep)


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
    features: Tensor  # (T, B, H + R M)  what the outputs are made of
    read_weights: Tensor  # (T, B, R, N)
    write_weights: Tensor  # (T, B, W, N)
    memory: Tensor  # ((T-1) // every, B, M, N)
    active: Tensor  # (T, B, A)  CPU: the heads' parameters, activated


X, FEATURES = (Trail._fields.index(name) for name in ("x", "features"))


class _Plan(NamedTuple):
    """Of T steps, B elements, I inputs, O outputs, L layers of H units with G gates: what all else follows from."""

    T: int
    B: int
    I: int
    O: int
    L: int
    H: int
    G: int
    gru: bool
    takes_ends: bool  # whether the native loop multiplies inputs and features too
    shared: bool  # whether the initial state is one for the whole batch, and has no dimension for it
    sizes: tuple  # as the native functions take them
    options: tuple  # as these do
    final: list[tuple[int, ...]]  # the shapes of the final state in the native layout
    trail: list[tuple[int, ...]]  # those of the trail


def _make_plan(
    options: tuple,
    keep: bool,
    inputs,
    memory,
    read_weights,
    write_weights,
    state,
    heads,
    output,
    item,
    device_type,
    takes_ends: bool,
) -> _Plan:
    """Of the options, the tensors' shapes, the bytes of a number, the device's type and what its kernels do."""
    options = Options(*options)
    (T, B, I), (N, M), R, W = inputs, memory[-2:], read_weights[-2], write_weights[-2]
    (L, *_, H), (P, _), (O, _) = state, heads, output
    shared = len(memory) == 2
    gru = options.controller == "gru"
    G, K = (3 if gru else 4) * H, 2 * options.shift_range + 1
    every = kept_every(options.memory_checkpoint or "auto", T, B * N * M * item, device_type) if keep else T
    step = B, R, W, N, M, K
    states = [(L, B, H)] * (1 if gru else 2)
    trail = [
        (T, B, G),
        (L - 1, T, B, G),
        (L if gru else 0, T, B, G),
        (L - 1, T, B, H),
        (0 if gru else L, T, B, H),
        (T, B, P),
        (T, B, H + R * M),
        (T, B, R, N),
        (T, B, W, N),
        ((T - 1) // every, B, M, N),
        (T if takes_ends else 0, B, (R + W) * (M + K + 2 * (K + 3)) + 2 * W * M),
    ]
    return _Plan(
        *(T, B, I, O, L, H, G, gru, takes_ends, shared),
        sizes=(T, B, I, O, L, H, gru, *step, every, shared),
        options=_native.step_scalars(*options[2:7]),
        final=[(B, M, N), (B, R, N), (B, W, N), (B, R, M), *states],
        trail=trail,
    )


_remembered_plan = functools.lru_cache(maxsize=1024)(_make_plan)


def _plan(
    options, keep, inputs, memory, read_weights, write_weights, state, heads, output, make=_remembered_plan
) -> _Plan:
    shapes = inputs.shape, memory.shape, read_weights.shape, write_weights.shape, state[0].shape, heads.shape
    kind = "cuda" if inputs.is_cuda else "cpu"
    return make(options, keep, *shapes, output.shape, inputs.element_size(), kind, not _native.limited(kind))


_empty = _native.empty


def _native_layout(
    memory: Tensor, read_weights: Tensor, write_weights: Tensor, reads: Tensor, state: Sequence[Tensor]
) -> list[Tensor]:
    """A state as it lies in the native layout, memories [B, M, N]."""
    if not memory.mT.is_contiguous():
        memory = memory.mT.contiguous()
    return [memory, *_contiguous((read_weights, write_weights, reads, *state))]


def _addresses(plan: _Plan, state: Sequence[Tensor]) -> list[int]:
    """Of a state in the native layout."""
    return _with_cell(plan, [tensor.data_ptr() for tensor in state])


def _with_cell(plan: _Plan, addresses: list[int]) -> list[int]:
    """A state's addresses as the native functions take them; a GRU has no cell."""
    return [*addresses, 0] if plan.gru else addresses


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x if x.is_contiguous() else x.contiguous() for x in tensors]  # the method is the slow part


def _table(tensors: Sequence[Tensor]) -> array:
    """Where weights or their gradients lie. Raises RuntimeError for one whose storage has been taken away."""
    table = array("Q", [tensor.data_ptr() for tensor in tensors])
    if 0 in table:
        raise RuntimeError("ntm_sequence: a weight has no storage")
    return table


def allocate(plan: _Plan, inputs: Tensor, keep: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The outputs, the final state in the native layout and the trail, uninitialised; no trail unless it is kept."""
    final = [_empty(inputs, shape) for shape in plan.final]
    trail = [_empty(inputs, shape) for shape in plan.trail] if keep else []
    return _empty(inputs, (plan.T, plan.B, plan.O)), final, trail


def _results(outputs: Tensor, final: list[Tensor], trail: list[Tensor]) -> tuple:
    memory, read_weights, write_weights, reads, *state = final
    return outputs, memory.mT, read_weights, write_weights, reads, state, trail


def _call(
    plan: _Plan,
    keep: bool,
    like: Tensor,
    table: array,
    inputs: int,
    outputs: int,
    initial: list[int],
    final: list[int],
    kept: list[int],
) -> None:
    """The native forward, of addresses; ``table``: of the weights'."""
    weights = table.buffer_info()[0]
    given = *plan.sizes, *plan.options, keep, weights, inputs, outputs
    _native.call("ntm_sequence", like, *given, *initial, *final, *kept)


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
    output_weight: Tensor,
    output_bias: Tensor,
    *rest,
) -> tuple:
    """``rest``: the :class:`Options`, and ``keep``, whether there will be a backward -> outputs, the final memory, read
    weights, write weights, reads and controller's state, and the trail, an empty list where none is kept.
    """
    keep = rest[-1]
    plan = _plan(rest[:-1], keep, inputs, memory, read_weights, write_weights, state, heads_weight, output_weight)
    initial = _native_layout(memory, read_weights, write_weights, reads, state)
    weights = _contiguous((*weights, heads_weight, heads_bias, output_weight, output_bias))
    table = _table(weights)
    outputs, final, trail = allocate(plan, inputs, keep)
    inputs = inputs.contiguous()
    kept = [tensor.data_ptr() for tensor in trail] if keep else [0] * len(Trail._fields)
    if not plan.takes_ends:
        x, features = (trail[i] if keep else _empty(inputs, plan.trail[i]) for i in (X, FEATURES))
        kept[X], kept[FEATURES] = x.data_ptr(), features.data_ptr()
        torch.mm(inputs.view(-1, plan.I), weights[0][:, : plan.I].t(), out=x.view(-1, plan.G))
    states = _addresses(plan, initial), _addresses(plan, final)
    _call(plan, keep, inputs, table, inputs.data_ptr(), outputs.data_ptr(), *states, kept)
    if not plan.takes_ends:
        torch.addmm(weights[-1], features.flatten(0, 1), weights[-2].t(), out=outputs.view(-1, plan.O))
    return _results(outputs, final, trail)


class Repeated(NamedTuple):
    """A :func:`forward` that kept nothing, to be done again with other tensors that lie as its own did.

    Nothing but the native call is left of it: what it was checked for, and what it chose, depends on layouts and
    options alone.
    """

    plan: _Plan
    results: tuple[int, bytes]  # the layouts of what its caller returned: outputs and final state

    def __call__(self, inputs: Tensor, addresses: list[int]) -> list[Tensor]:
        """``addresses``: of the arguments in a row, ``inputs`` first."""
        plan = self.plan
        results, places = _native.empty_as(self.results)
        state = len(plan.final)
        table = array("Q", addresses[1 + state :])
        states = _with_cell(plan, addresses[1 : 1 + state]), _with_cell(plan, places[1:])
        _call(plan, False, inputs, table, addresses[0], places[0], *states, [0] * len(Trail._fields))
        return results


remembered: dict[Any, Repeated | None] = {}  # by all that decided a call; None: not to be repeated


def remember(key: Any, arguments: tuple, results: tuple[Tensor, ...]) -> None:
    """That a call of :func:`forward` with these arguments, which keeps nothing, came to ``results``, views of its own.

    It cannot be repeated if its arguments do not lie as the native code takes them, and had to be copied.
    """
    inputs, memory, read_weights, write_weights, reads, state, weights, *others = arguments[:11]
    plan = _plan(arguments[11:], False, inputs, memory, read_weights, write_weights, state, others[0], others[2])
    native = inputs, memory.mT, read_weights, write_weights, reads, *state, *weights, *others
    found = _native.layouts(results) if all([x.is_contiguous() for x in native]) else None
    if len(remembered) >= 1024:
        remembered.clear()
    remembered[key] = found and Repeated(plan, found[0])


def fake(
    inputs,
    memory,
    read_weights,
    write_weights,
    reads,
    state,
    weights,
    heads_weight,
    heads_bias,
    output_weight,
    output_bias,
    *rest,
) -> tuple:
    """:func:`forward` on shapes alone."""
    keep, shaped = rest[-1], (inputs, memory, read_weights, write_weights, state, heads_weight, output_weight)
    plan = _plan(rest[:-1], keep, *shaped, make=_make_plan)  # sizes may be symbols, which cannot be remembered
    return _results(*allocate(plan, inputs, keep))


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
    output_weight: Tensor,
    output_bias: Tensor,
    final_memory: Tensor,
    trail: Sequence[Tensor],
    grad_outputs: Tensor,
    grad_final: Sequence[Tensor],
    *rest,
    spend: bool = False,
) -> list[Tensor]:
    """``rest``: the :class:`Options`, and whether the inputs' gradient is needed. ``grad_final``: the gradients of the
    final memory, read weights, write weights, reads and controller's state, in a row; none when all are 0.

    -> gradients of the initial memory, read weights, write weights, reads and controller's state, of the weights, of
    the weight and bias of heads and output layer and, if needed, of the inputs. With ``spend`` the trail is good for no
    other backward.
    """
    needs_inputs = rest[-1]
    plan = _plan(rest[:-1], True, inputs, memory, read_weights, write_weights, state, heads_weight, output_weight)
    T, B, I, O, L, H, G, *_ = plan
    grad_outputs, trail = grad_outputs.contiguous(), Trail(*trail)
    initial = _native_layout(memory, read_weights, write_weights, reads, state)
    final_memory = final_memory.transpose(1, 2).contiguous()
    after = [0] * 6
    if grad_final:
        grad_final = _native_layout(*grad_final[:4], grad_final[4:])
        after = _addresses(plan, grad_final)
    grad = [_empty(inputs, shape) for shape in plan.final]
    # A step's gates are done with when their gradients are known: these may take their place.
    gates = trail.x, trail.upper_x, trail.y
    grad_x, grad_upper_x, grad_y = gates if spend else (_empty(inputs, tensor.shape) for tensor in gates)
    grad_params = _empty(inputs, trail.params.shape)
    weights = _contiguous((*weights, heads_weight, heads_bias, output_weight, output_bias))
    table = _table(weights)
    initial_addresses = _addresses(plan, initial)
    trail_addresses = [tensor.data_ptr() for tensor in trail]
    of_gates = grad_x, grad_upper_x, grad_y, grad_params
    grad_addresses = [tensor.data_ptr() for tensor in of_gates]
    with _native.without_autocast(inputs.device.type):
        grad_features = grad_outputs if plan.takes_ends else grad_outputs.view(-1, O) @ output_weight
        _native.call(
            "ntm_sequence_backward",
            inputs,
            *plan.sizes,
            *plan.options,
            table.buffer_info()[0],
            *initial_addresses,
            final_memory.data_ptr(),
            *trail_addresses,
            grad_features.data_ptr(),
            *after,
            *_addresses(plan, grad),
            *grad_addresses,
        )
        if _native.why_not(inputs.device.type, inputs.dtype is torch.float64, "ntm_sequence_weight_gradients") is None:
            grad_weights = [_empty(inputs, weight.shape) for weight in weights]
            (inputs,), grad_table = _contiguous([inputs]), _table(grad_weights)
            sums = grad
            if plan.shared:
                sums = [_empty(inputs, shape[1:]) for shape in plan.final[:4]] + [_empty(inputs, (L, H)) for _ in state]
            _native.call(
                "ntm_sequence_weight_gradients",
                inputs,
                *plan.sizes,
                inputs.data_ptr(),
                *initial_addresses,
                *trail_addresses,
                grad_outputs.data_ptr(),
                *grad_addresses,
                *_addresses(plan, grad),
                *_addresses(plan, sums),
                grad_table.buffer_info()[0],
            )
        else:
            sums = grad
            if plan.shared:
                *_, reads, state = reference.for_batch(B, memory, read_weights, write_weights, reads, state)
                sums = [x.sum(0) for x in grad[:4]] + [x.sum(1) for x in grad[4:]]
            grad_weights = weight_gradients(plan, inputs, reads, state[0], trail, grad_outputs, *of_gates)
        grad_memory, *grad_rest = sums
        found = [grad_memory.mT, *grad_rest, *grad_weights]
        if needs_inputs:
            found.append((grad_x.view(T * B, G) @ weights[0][:, :I]).view(T, B, I))
    return found


def weight_gradients(
    plan: _Plan,
    inputs: Tensor,
    reads: Tensor,
    initial_hidden: Tensor,
    trail: Trail,
    grad_outputs: Tensor,
    grad_x: Tensor,
    grad_upper_x: Tensor,
    grad_y: Tensor,
    grad_params: Tensor,
) -> list[Tensor]:
    """The gradients of the weights, of the heads' and of the output layer's, where no native kernel computes them."""
    T, B, _, _, L, H, G, gru, *_ = plan
    features = trail.features
    hidden = [*trail.hidden, features[..., :H]]
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
    for grad, fed in (grad_params, hidden[-1]), (grad_outputs, features):
        grad = grad.flatten(0, 1)
        grad_weights += grad.t() @ fed.flatten(0, 1), grad.sum(0)
    return grad_weights


def fake_backward(
    inputs,
    memory,
    read_weights,
    write_weights,
    reads,
    state,
    weights,
    heads_weight,
    heads_bias,
    output_weight,
    output_bias,
    *rest,
) -> list[Tensor]:
    """:func:`backward` on shapes alone."""
    minor = memory.new_empty(memory.mT.shape).mT
    others = read_weights, write_weights, reads, *state, *weights, heads_weight, heads_bias, output_weight, output_bias
    return [minor, *(x.new_empty(x.shape) for x in (*others, *([inputs] if rest[-1] else [])))]
