"""The operator ``ntm_sequence``. The number of its tensors depends on the layers, so each number has its own contract.
The public function is beside the others, in :mod:`operators`."""

from __future__ import annotations

import functools
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from .. import reference, spec
from ..spec import CONTROLLERS, STEP_OPTIONS, NTMConfig, NTMState, SequenceOptions, SequenceTensors
from . import sequence_kernels as kernels
from .contract import MEMORY, Contract, check_options, step_sizes
from .registration import Served, grads_through, once_only, register, schema
from .sequence_plan import Trail, why_no_room
from .serving import call, left_alone, serve, watched, why_not_native

# --- torch.ops.ntm_fast.ntm_sequence ----------------------------------------------------------------------------------


_OPTIONS = len(STEP_OPTIONS) + 2  # in a row: controller, step options, memory_checkpoint. The lengths follow.


def _kernel(*args: Any) -> tuple:
    x, options = _parse(args[:-1])
    return _listed(*kernels.forward(x, options, args[-1]))


def _fake(*args: Any) -> tuple:
    x, options = _parse(args[:-1])
    return _listed(*kernels.fake(x, options, args[-1]))


def _parse(args: Sequence[Any]) -> tuple[SequenceTensors, SequenceOptions]:
    *args, lengths = args
    x = SequenceTensors.from_arguments(args[:-_OPTIONS])._replace(lengths=lengths)
    return x, SequenceOptions.unflatten(args[-_OPTIONS:])


def _listed(outputs: Tensor, final: NTMState, trail: Trail | None) -> tuple:
    return outputs, *final[:4], list(final.controller), list(trail or ())


def _backward_arguments(args: Sequence[Any]) -> tuple:
    """The arguments of the registered backward as those of :func:`kernels.backward`."""
    *args, needs_inputs = args
    *tensors, final_memory, trail, grad_outputs, grad_final = args[: -_OPTIONS - 1]
    x, options = _parse([*tensors, *args[-_OPTIONS - 1 :]])
    grads = NTMState.unflatten(grad_final) if grad_final else None
    return x, options, final_memory, Trail(*trail), grad_outputs, grads, needs_inputs


def _backward_kernel(*args: Any) -> list[Tensor]:
    of_inputs, row = kernels.backward(*_backward_arguments(args))
    return row if of_inputs is None else [*row, of_inputs]


def _backward_fake(*args: Any) -> list[Tensor]:
    x, *_, needs_inputs = _backward_arguments(args)
    of_inputs, row = kernels.fake_backward(x, needs_inputs)
    return row if of_inputs is None else [*row, of_inputs]


def _define() -> None:
    tensors = "Tensor inputs, Tensor memory, Tensor read_weights, Tensor write_weights, Tensor reads, Tensor[] state"
    tensors += ", Tensor[] weights, Tensor heads_weight, Tensor heads_bias, Tensor output_weight, Tensor output_bias"
    options = f", str controller{schema(STEP_OPTIONS)}, int memory_checkpoint, Tensor? lengths"
    results = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[]"
    register("ntm_sequence", f"({tensors}{options}, bool keep) -> ({results})", _kernel, _fake)
    given = f"({tensors}, Tensor new_memory, Tensor[] trail, Tensor grad_outputs, Tensor[] grad_final{options}"
    register("ntm_sequence_backward", f"{given}, bool needs_inputs) -> Tensor[]", _backward_kernel, _backward_fake)


_define()


# --- autograd: tensors, options and lengths in a row, outputs and final state in a row --------------------------------


def _split(args: Sequence[Any]) -> tuple[tuple[Tensor, ...], SequenceOptions, Tensor | None]:
    *args, lengths = args
    return tuple(args[:-_OPTIONS]), SequenceOptions.unflatten(args[-_OPTIONS:]), lengths


def _twin(*row: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """:func:`reference.ntm_sequence`, tensors in a row in and out."""
    x = SequenceTensors.unflatten(row, options["controller"])
    outputs, *final, controller = reference.ntm_sequence(*x.arguments(), **options)
    return outputs, *final, *controller


def _run(
    row: Sequence[Tensor], options: SequenceOptions, lengths: Tensor | None, keep: bool
) -> tuple[tuple[Tensor, ...], Trail | None]:
    x = SequenceTensors.unflatten(row, options.controller, lengths)
    if watched(row):
        found = torch.ops.ntm_fast.ntm_sequence.default(*x.arguments(), *options.flatten(), lengths, keep)
        outputs, *final, controller, trail = found
        return (outputs, *final, *controller), Trail(*trail) if keep else None
    outputs, state, left = kernels.forward(x, options, keep)
    return (outputs, *state.flatten()), left


class _NTMSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        row, ctx.options, ctx.lengths = _split(args)
        outputs, trail = _run(row, ctx.options, ctx.lengths, keep=True)
        assert trail is not None
        ctx.save_for_backward(outputs[1], *trail, *row)
        ctx.set_materialize_grads(False)  # autograd's zero gradients would have another layout than the memory
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        saved, options, lengths = ctx.saved_tensors, ctx.options, ctx.lengths
        memory, trail = saved[0], Trail(*saved[1 : 1 + len(Trail._fields)])
        row = saved[1 + len(Trail._fields) :]
        nones = (None,) * (_OPTIONS + 1)
        if torch.is_grad_enabled():
            twin = functools.partial(_twin, **options.keywords(), lengths=lengths)
            return (*grads_through(twin, row, grads), *nones)
        x = SequenceTensors.unflatten(row, options.controller, lengths)
        grad_outputs, *rest = grads
        if grad_outputs is None:
            grad_outputs = x.inputs.new_zeros(*x.inputs.shape[:2], row[-1].shape[0])
        grad_final = _grad_final(x, memory, rest)
        needs_inputs = ctx.needs_input_grad[0]
        if watched(row):
            given = *x.arguments(), memory, list(trail), grad_outputs, list(grad_final.flatten() if grad_final else ())
            found = torch.ops.ntm_fast.ntm_sequence_backward.default(
                *given, *options.flatten(), lengths, needs_inputs
            )
            of_inputs, found = (found[-1], found[:-1]) if needs_inputs else (None, found)
        else:  # the trail may be overwritten, unless another backward may follow
            given = x, options, memory, trail, grad_outputs, grad_final, needs_inputs
            of_inputs, found = kernels.backward(*given, spend=once_only())
        return of_inputs, *found, *nones


def _grad_final(x: SequenceTensors, memory: Tensor, grads: Sequence[Tensor | None]) -> NTMState | None:
    """The gradient of the final state: zeros where autograd has none; None where it has none at all."""
    if all([grad is None for grad in grads]):
        return None
    like = x.initial if x.initial.memory.dim() == 3 else x.initial.for_batch(memory.shape[0])
    shapes = memory, *like.flatten()[1:]
    return NTMState.unflatten([torch.zeros_like(x) if grad is None else grad for x, grad in zip(shapes, grads)])


_SERVED = Served(_twin, lambda *args: _run(*_split(args), keep=False)[0], _NTMSequence.apply)


# --- the contract -----------------------------------------------------------------------------------------------------


def _contract(controller: str, states: int, weights: int, shared: bool) -> Contract:
    """The contract for so many tensors; ``shared``: one initial state for all sequences."""
    kind = CONTROLLERS[controller]
    layers, rest = divmod(weights, len(kind.weights))
    if states != len(kind.state):
        raise ValueError(
            f"ntm_sequence: state must be {len(kind.state)} tensors ({', '.join(kind.state) or 'none'}) for controller "
            f"{controller!r}; got {states}"
        )
    if layers == 0 or rest:
        raise ValueError(
            f"ntm_sequence: weights must be {len(kind.weights)} tensors for each layer ({', '.join(kind.weights)}) for "
            f"controller {controller!r}; got {weights}"
        )
    inputs = {"inputs": "TBI", "memory": MEMORY, "read_weights": "BRN", "write_weights": "BWN", "reads": "BRM"}
    inputs |= {f"state[{index}]": "LBH" for index in range(states)}
    if shared:
        inputs = {name: letters if name == "inputs" else letters.replace("B", "") for name, letters in inputs.items()}
    for index in range(weights):
        layer, own = divmod(index, len(kind.weights))
        columns = {"weight_ih": "GH" if layer else "GX", "weight_hh": "GH"}
        inputs[f"weights[{index}]"] = columns.get(kind.weights[own], "G")
    inputs |= {"heads_weight": "PH", "heads_bias": "P", "output_weight": "OF", "output_bias": "O"}

    def derived(sizes: dict[str, int], _: str, shift_range: int, *__: Any) -> dict[str, int]:
        read = sizes["R"] * sizes["M"]
        own = {"L": layers, "G": kind.gates * sizes["H"], "X": sizes["I"] + read, "F": sizes["H"] + read}
        return own | step_sizes(sizes, shift_range)

    return Contract("ntm_sequence", inputs, {}, derived=derived)


_cached_contract = functools.cache(_contract)


def why_no_sequence(
    device: torch.device, dtype: torch.dtype, controller: str, config: Callable[[], NTMConfig]
) -> str | None:
    """Why no native ``ntm_sequence`` serves such a machine; None when one does. ``config`` is called if sizes
    matter."""
    if CONTROLLERS[controller].native is None:
        served = [name for name, kind in CONTROLLERS.items() if kind.native is not None]
        return f"its controllers are {', '.join(served)}, not {controller}"
    reason = why_not_native(device, dtype, "ntm_sequence")
    return reason or why_no_room(device, dtype, config, torch.is_grad_enabled())


def call_sequence(
    x: SequenceTensors, controller: str, step: tuple[Any, ...], memory_checkpoint: str | int
) -> tuple[Tensor, NTMState]:
    """Check, then compute ``ntm_sequence`` -> outputs, final state. ``step``: the step options in their order."""
    if controller not in CONTROLLERS:
        raise ValueError(f"ntm_sequence: controller must be {', '.join(map(repr, CONTROLLERS))}, got {controller!r}")
    check_options("ntm_sequence", dict(zip(STEP_OPTIONS, step)))
    try:
        spec.check_checkpoint(memory_checkpoint)
    except (TypeError, ValueError) as error:
        raise type(error)(f"ntm_sequence: {error}") from None
    options = SequenceOptions(controller, step, spec.checkpoint_number(memory_checkpoint))

    def why_not() -> str | None:
        if torch.compiler.is_compiling() and CONTROLLERS[controller].native is not None:
            return None  # sizes may be symbols
        weight = x.heads_weight  # autocast takes all but float64 to float32
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        return why_no_sequence(x.inputs.device, dtype, controller, lambda: _config(x, options))

    row = x.initial.flatten()
    shared = all(isinstance(own, Tensor) and own.dim() == 2 for own in row)
    describe = _contract if torch.compiler.is_compiling() else _cached_contract
    contract = describe(controller, len(x.initial.controller), len(x.weights), shared)
    if x.lengths is not None and isinstance(x.inputs, Tensor) and x.inputs.dim() == 3:  # else the inputs are refused
        steps, batch, _ = x.inputs.shape
        try:
            x = x._replace(lengths=reference.check_lengths(x.lengths, steps, batch, x.inputs.device))
        except (TypeError, ValueError) as error:
            raise type(error)(f"ntm_sequence: {error}") from None
    outputs, *final = call(contract, _SERVED, x.flatten(), _by_name(options, x.lengths), why_not)
    return outputs, NTMState.unflatten(final)


def _by_name(options: SequenceOptions, lengths: Tensor | None) -> dict[str, Any]:
    return {**options.keywords(), "memory_checkpoint": options.memory_checkpoint, "lengths": lengths}


def _config(x: SequenceTensors, options: SequenceOptions) -> NTMConfig:
    """The configuration of a machine with tensors of these sizes."""
    state = x.initial
    return NTMConfig(
        **options.keywords(),
        input_size=x.inputs.shape[-1],
        hidden_size=x.heads_weight.shape[1],
        num_layers=state.controller[0].shape[0],
        memory_locations=state.memory.shape[-2],
        memory_width=state.memory.shape[-1],
        read_heads=state.read_weights.shape[-2],
        write_heads=state.write_weights.shape[-2],
    )


def checked_sequence(x: SequenceTensors, options: SequenceOptions) -> tuple[Tensor, NTMState]:
    """``ntm_sequence`` of checked tensors, which a native kernel serves -> outputs, final state."""
    row = x.flatten()
    if left_alone(row):
        outputs, state, _ = kernels.forward(x, options, False)
        return outputs, state
    outputs, *final = serve(_SERVED, row, _by_name(options, x.lengths))
    return outputs, NTMState.unflatten(final)
