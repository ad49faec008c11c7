"""The Neural Turing Machine as modules: :class:`FastNTM` over sequences, :class:`NTMCell` over single steps."""

from __future__ import annotations

import math
import operator
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _native, ops, recurrence, reference, sequence
from .controllers import Controller, parameters
from .state import NTMState, NTMTrace

ENGINES = ("auto", "sequence", "step", "reference")
MEMORY_INITS = ("constant", "learned", "learned_constant", "random")
ACTIVATIONS = ("tanh", "identity")
INITIAL_FOCUS = 5.0  # logit of location 0 in the first weightings, the others' being 0; see docs/decisions.md
INITIAL_MEMORY = 1e-6  # Collier & Beel 2018, section 3.2: the "constant" initialisation
# What, beside tensors, decides what a call without a graph does.
_SETTINGS = operator.attrgetter(
    *("input_size", "hidden_size", "num_layers", "controller_type", "memory_locations", "memory_width", "read_heads"),
    *("write_heads", "shift_range", "read_first", "key_activation", "add_activation", "clip", "engine", "batch_first"),
)


def _choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
    return value


def _count(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
    return value


def _check_tensors(tensors: list, shapes: list, weight: Tensor, name: Callable[[int], str]) -> None:
    """That they have these shapes, and dtype and device of ``weight``; ``name`` is asked for in errors."""
    dtype, device, on_cpu = weight.dtype, weight.device, weight.is_cpu  # which is quicker asked than a device
    for index, (tensor, shape) in enumerate(zip(tensors, shapes)):
        if isinstance(tensor, Tensor) and tensor.shape == shape:
            if tensor.dtype is dtype and (tensor.is_cpu if on_cpu else tensor.device == device):
                continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name(index)}: got {type(tensor).__name__}, expected a Tensor")
        if tensor.shape != shape:
            raise ValueError(f"{name(index)}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        raise ValueError(
            f"{name(index)}: got {tensor.dtype} on {tensor.device}, expected the module's {dtype} on {device}"
        )


class _NTM(nn.Module):
    """Parameters, initial state and the loop over time, common to :class:`FastNTM` and :class:`NTMCell`."""

    batch_first = False

    def __init__(
        self,
        input_size: int,
        output_size: int,
        hidden_size: int = 100,
        *,
        num_layers: int = 1,
        controller: str = "lstm",
        memory_locations: int = 128,
        memory_width: int = 20,
        read_heads: int = 1,
        write_heads: int = 1,
        shift_range: int = 1,
        memory_init: str = "constant",
        read_first: bool = False,
        key_activation: str = "tanh",
        add_activation: str = "tanh",
        clip: float | None = 20.0,
        engine: str = "auto",
        memory_checkpoint: str | int = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.input_size = _count("input_size", input_size)
        self.output_size = _count("output_size", output_size)
        self.hidden_size = _count("hidden_size", hidden_size)
        self.num_layers = _count("num_layers", num_layers)
        self.memory_locations = _count("memory_locations", memory_locations)
        self.memory_width = _count("memory_width", memory_width)
        self.read_heads = _count("read_heads", read_heads)
        self.write_heads = _count("write_heads", write_heads)
        self.shift_range = _count("shift_range", shift_range, least=0)
        if 2 * shift_range + 1 > memory_locations:
            raise ValueError(
                f"shift_range: got {shift_range}, whose {2 * shift_range + 1} shifts do not fit memory_locations = "
                f"{memory_locations}; expected at most {(memory_locations - 1) // 2}"
            )
        if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float))):
            raise TypeError(f"clip: got {clip!r}, expected a positive number or None")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: got {clip}, expected a positive number or None")
        self.memory_init = _choice("memory_init", memory_init, MEMORY_INITS)
        self.read_first = bool(read_first)
        self.key_activation = _choice("key_activation", key_activation, ACTIVATIONS)
        self.add_activation = _choice("add_activation", add_activation, ACTIVATIONS)
        self.clip = clip
        self.engine = _choice("engine", engine, ENGINES)
        if isinstance(memory_checkpoint, str):
            self.memory_checkpoint = _choice("memory_checkpoint", memory_checkpoint, ("auto", "all"))
        else:
            self.memory_checkpoint = _count("memory_checkpoint", memory_checkpoint)

        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: got {dtype!r}, expected a floating dtype")
        factory = {"device": device, "dtype": dtype}
        n, m, r, w = memory_locations, memory_width, read_heads, write_heads
        self.controller_type = _choice("controller", controller, tuple(reference.CONTROLLERS))
        self.controller = Controller(controller, input_size + r * m, hidden_size, num_layers, **factory)
        self.heads = nn.Linear(hidden_size, reference.params_size(r, w, m, shift_range), **factory)
        self.output = nn.Linear(hidden_size + r * m, output_size, **factory)
        initial_memory = torch.empty(n, m, **factory)
        if memory_init.startswith("learned"):
            self.initial_memory = nn.Parameter(initial_memory)
        else:
            self.register_buffer("initial_memory", initial_memory)
        self.initial_reads = nn.Parameter(torch.empty(r, m, **factory))
        self.initial_read_weights = nn.Parameter(torch.empty(r, n, **factory))  # logits
        self.initial_write_weights = nn.Parameter(torch.empty(w, n, **factory))  # logits
        self._weight_shapes = [weight.shape for layer in self._weights()[:2] for weight in layer]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew, the initial state's included."""
        self.controller.reset_parameters()
        nn.init.xavier_uniform_(self.heads.weight, gain=1.4)
        nn.init.normal_(self.heads.bias, std=0.01)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if self.memory_init in ("constant", "learned_constant"):
            nn.init.constant_(self.initial_memory, INITIAL_MEMORY)
        else:
            bound = 1 / math.sqrt(self.memory_locations + self.memory_width)
            nn.init.uniform_(self.initial_memory, -bound, bound)
        nn.init.normal_(self.initial_reads, std=0.01)
        # Rows of a constant memory are told apart by the first weightings alone: every head starts out at location 0.
        for logits in (self.initial_read_weights, self.initial_write_weights):
            nn.init.zeros_(logits)
            logits[:, 0] = INITIAL_FOCUS

    def initial_state(self, batch_size: int) -> NTMState:
        """The (learned) state before the first step, for ``batch_size`` sequences."""
        _count("batch_size", batch_size, least=0)

        return NTMState(*reference.for_batch(batch_size, *self._shared_state()))

    def _shared_state(self) -> NTMState:
        """The state before the first step, without a batch dimension."""
        return NTMState(
            memory=self.initial_memory,
            read_weights=self.initial_read_weights.softmax(-1),
            write_weights=self.initial_write_weights.softmax(-1),
            reads=self.initial_reads,
            controller=self.controller.initial_state(),
        )

    def why_no_sequence(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the sequence engine cannot serve this machine there; None when it can."""
        return ops.why_no_sequence(device, dtype, self.controller_type, self._machine)

    def _machine(self) -> sequence.Machine:
        memory, heads = (self.memory_locations, self.memory_width), (self.read_heads, self.write_heads)
        sizes = self.num_layers, self.hidden_size, memory, heads, self.shift_range
        return sequence.Machine(self.controller_type, *sizes)

    def _choose_engine(self, weight: Tensor) -> str:
        """The engine that serves where ``weight`` is. Raises RuntimeError where a forced one cannot."""
        if self.engine == "reference":
            return "reference"
        device, dtype = weight.device, weight.dtype
        in_steps = self.engine == "auto" and ops.faster_in_steps(device, self.hidden_size)
        if self.engine != "step" and not (in_steps and recurrence.can_serve(device.type)):
            reason = self.why_no_sequence(device, dtype)
            if reason is None:
                return "sequence"
            if self.engine == "sequence":
                raise RuntimeError(f"engine='sequence' cannot serve: {reason}")
        reason = ops.why_not_native(device, dtype, "memory_step")
        if reason is None:
            return "step"
        if self.engine == "step":
            raise RuntimeError(f"engine='step' cannot serve: {reason}")
        _native.warn_once(device.type)
        return "reference"

    def _check_inputs(self, inputs: Tensor, dimensions: int, weight: Tensor) -> None:
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
        if inputs.shape[-1] != self.input_size:
            raise ValueError(
                f"inputs: got shape {tuple(inputs.shape)}, expected the last dimension to be input_size = "
                f"{self.input_size}"
            )

    def _check_state(self, state: NTMState, batch: tuple[int, ...], weight: Tensor) -> None:
        if not isinstance(state, NTMState):
            raise TypeError(f"state: got {type(state).__name__}, expected an NTMState")
        *tensors, controller = state
        names = reference.CONTROLLERS[self.controller_type].state
        if not isinstance(controller, tuple) or len(controller) != len(names):
            raise ValueError(
                f"state.controller: expected a tuple of {len(names)} tensors ({', '.join(names) or 'none'}) for a "
                f"{self.controller_type} controller, got {type(controller).__name__} of "
                f"{len(controller) if hasattr(controller, '__len__') else '?'}"
            )
        n, m, r, w = self.memory_locations, self.memory_width, self.read_heads, self.write_heads
        shapes = [(*batch, n, m), (*batch, r, n), (*batch, w, n), (*batch, r, m)]
        shapes += [(self.num_layers, *batch, self.hidden_size)] * len(names)
        name = lambda index: f"state.{state._fields[index] if index < 4 else f'controller[{index - 4}]'}"  # noqa: E731
        _check_tensors([*tensors, *controller], shapes, weight, name)

    def _check_weights(self, weights: tuple[list[Tensor], ...]) -> None:
        """That what may have been put in the place of a weight fits; the output layer may have another size."""
        controller, heads, output = weights
        outputs, features = output[0].shape[:1], self.hidden_size + self.read_heads * self.memory_width
        shapes = [*self._weight_shapes, (*outputs, features), tuple(outputs)]

        def name(index: int) -> str:
            linear = "heads.weight", "heads.bias", "output.weight", "output.bias"
            return [*(f"controller.{own}" for own in self.controller.weight_names), *linear][index]

        _check_tensors([*controller, *heads, *output], shapes, heads[0], name)

    def _options(self) -> dict:
        return {
            "controller": self.controller_type,
            "shift_range": self.shift_range,
            "read_first": self.read_first,
            "key_activation": self.key_activation,
            "add_activation": self.add_activation,
            "clip": self.clip,
        }

    def _operator_options(self) -> tuple:
        """As the operator ``ntm_sequence`` takes them."""
        checkpoint = ops.CHECKPOINTS.get(self.memory_checkpoint, self.memory_checkpoint)
        return *self._options().values(), ops.EPS, checkpoint

    def _weights(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of the controller, of the heads and of the output layer."""
        modules, linear = self._modules, ("weight", "bias")  # looked up past the search of nn.Module, as parameters are
        heads, output = parameters(modules["heads"], linear), parameters(modules["output"], linear)
        return modules["controller"].weights(), heads, output

    def _forward(self, inputs: Tensor, state: NTMState | None, records: list | None = None) -> tuple[Tensor, NTMState]:
        """Check, run and shape as the inputs are. ``records`` collects what a trace shows."""
        weights = controller, heads, output = self._weights()
        key = None  # under which to remember the call
        if type(state) is NTMState and type(state.controller) is tuple and records is None and self._may_repeat():
            # What is checked and chosen depends on settings and on how tensors lie. Where these have been met before,
            # only the computing is left, which is little of a streamed step.
            found = _native.layouts((inputs, *state[:4], *state.controller, *controller, *heads, *output))
            if found is not None:
                layouts, addresses = found
                key = layouts, *_SETTINGS(self)
                step = sequence.remembered.get(key, False)
                if step:
                    outputs, *final = step(inputs, addresses)
                    return outputs, NTMState(*final[:4], tuple(final[4:]))
                if step is None:  # not to be repeated, as has been found out
                    key = None
        inputs, batched = self._enter(inputs, heads[0])
        if state is not None:
            self._check_state(state, inputs.shape[1:2] if batched else (), heads[0])
            state = state if batched else _batched(state)
        results = outputs, final = self._leave(*self._run(inputs, state, weights, records), batched)
        if key is not None and self._choose_engine(heads[0]) == "sequence":
            arguments = inputs, *state, controller, *heads, *output, *self._operator_options()
            sequence.remember(key, arguments, (outputs, *final[:4], *final.controller))
        return results

    def _may_repeat(self) -> bool:
        """Whether a call like this one may be done again by its layout alone."""
        return self.controller_type != "feedforward" and self.engine in ("auto", "sequence") and ops.left_alone()

    def _run(
        self, inputs: Tensor, state: NTMState | None, weights: tuple[list[Tensor], ...], records: list | None
    ) -> tuple[Tensor, NTMState]:
        """inputs (T, B, I) -> outputs (T, B, O) and the final state. ``weights``: those of :meth:`_weights`."""
        controller, heads, output = weights
        engine = self._choose_engine(heads[0])
        if state is None:
            of_all = engine == "sequence" and records is None and type(self).initial_state is _NTM.initial_state
            state = self._shared_state() if of_all else self.initial_state(inputs.shape[1])
            if engine == "sequence":
                self._check_state(state, () if of_all else inputs.shape[1:2], heads[0])
        arguments = inputs, *state, controller, *heads
        if engine == "sequence" and records is None:
            arguments += tuple(output)
            kind = "cpu" if inputs.is_cpu else inputs.device.type
            if torch.is_autocast_enabled(kind):
                options = {**self._options(), "memory_checkpoint": self.memory_checkpoint}
                outputs, *final = ops.ntm_sequence(*arguments, **options)
                if outputs.dtype is torch.float32:  # as the other engines' output layer has it there
                    outputs = outputs.to(torch.get_autocast_dtype(kind))
            else:  # what the operator would check is checked, but for weights
                self._check_weights(weights)
                outputs, *final = ops.checked_sequence(arguments, self._operator_options())
            return outputs, NTMState(*final)
        options = self._options()
        if engine == "step" and records is None and inputs.shape[1] > 0 and recurrence.can_serve(inputs.device.type):
            features, *final = recurrence.run(*arguments, **options)
        else:
            kernels = reference if engine == "reference" else ops
            features, *final = reference.unroll(kernels, *arguments, **options, records=records)
        return F.linear(features, *output), NTMState(*final)

    def extra_repr(self) -> str:
        return (
            f"memory={self.memory_locations}x{self.memory_width}, heads={self.read_heads}r{self.write_heads}w, "
            f"shift_range={self.shift_range}, memory_init={self.memory_init!r}, engine={self.engine!r}"
        )


def _batched(state: NTMState) -> NTMState:
    *rest, controller = state
    return NTMState(*(t.unsqueeze(0) for t in rest), tuple(t.unsqueeze(1) for t in controller))


def _unbatched(state: NTMState) -> NTMState:
    *rest, controller = state
    return NTMState(*(t.squeeze(0) for t in rest), tuple(t.squeeze(1) for t in controller))


class FastNTM(_NTM):
    """A Neural Turing Machine (Graves et al. 2014) over whole sequences; it behaves like ``nn.LSTM``.

    Args:
        input_size, output_size: I and O, the features of an input and of an output.
        hidden_size: units of each controller layer.
        num_layers: controller layers.
        controller: ``"lstm"``, ``"gru"`` or ``"feedforward"``.
        memory_locations, memory_width: N and M.
        read_heads, write_heads: R and W.
        shift_range: S; a head can rotate its focus by -S..S locations a step.
        memory_init: ``"constant"`` (every entry 1e-6), ``"learned"`` (a parameter, drawn at random),
            ``"learned_constant"`` (a parameter that starts at 1e-6) or ``"random"`` (drawn once, then fixed).
        read_first: read heads address and read the memory before the write, not after it.
        key_activation, add_activation: ``"tanh"`` or ``"identity"``.
        clip: raw head parameters are clamped to +-clip; ``None`` switches it off.
        batch_first: batched inputs and outputs are (B, T, ...) instead of (T, B, ...). States are not affected.
        engine: ``"sequence"`` (one native call for all steps; LSTM and GRU), ``"step"`` (one native call per memory
            step; on CUDA captured into CUDA graphs when the same shapes come again), ``"reference"`` (plain PyTorch) or
            ``"auto"``, the fastest that can serve: on CUDA with a ``hidden_size`` of more than 256 that is ``"step"``.
            A forced engine that cannot serve raises a ``RuntimeError`` with the reason.
        memory_checkpoint: of the sequence engine in training: ``"all"`` keeps the memory of every step for backward, a
            number K that of every K-th step, and writes those between again. ``"auto"``: all of them up to 2 MB (on
            CUDA 4 GB), beyond that every sqrt(T)-th, which on a CPU is then the faster choice too.

    Shapes: inputs (T, B, I), (B, T, I) with ``batch_first``, or unbatched (T, I). Outputs likewise with O features;
    they are logits. States are described in :class:`NTMState`.
    """

    def __init__(self, *args, batch_first: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.batch_first = bool(batch_first)

    def forward(
        self, inputs: Tensor, state: NTMState | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, NTMState]:
        """Run over ``inputs`` from ``state`` (by default :meth:`initial_state`) -> outputs, final state.

        Raises ValueError or TypeError naming the argument whose shape, dtype or device is wrong.
        """
        reference.check_lengths(lengths)
        return self._forward(inputs, state)

    def trace(self, inputs: Tensor, state: NTMState | None = None) -> tuple[Tensor, NTMTrace]:
        """Run as :meth:`forward` does and show every head at every step -> outputs, trace (time first)."""
        records: list = []
        outputs, _ = self._forward(inputs, state, records)
        read_weights, write_weights, reads, params = (torch.stack(x) for x in zip(*records))
        parameters = reference.head_parameters(
            params,
            self.read_heads,
            self.write_heads,
            self.memory_width,
            shift_range=self.shift_range,
            key_activation=self.key_activation,
            add_activation=self.add_activation,
            clip=self.clip,
        )
        trace = NTMTrace(read_weights, write_weights, reads, *parameters)
        return outputs, trace if inputs.dim() == 3 else NTMTrace(*(t.squeeze(1) for t in trace))

    def _enter(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
        """Check inputs and shape them (T, B, I); whether they are batched."""
        self._check_inputs(inputs, 3, weight)
        batched = inputs.dim() == 3
        if not batched:
            inputs = inputs.unsqueeze(1)
        elif self.batch_first:
            inputs = inputs.transpose(0, 1)
        if inputs.shape[0] == 0:
            raise ValueError("inputs: got no time steps, expected at least one")
        return inputs, batched

    def _leave(self, outputs: Tensor, state: NTMState, batched: bool) -> tuple[Tensor, NTMState]:
        if not batched:
            return outputs.squeeze(1), _unbatched(state)
        return outputs.transpose(0, 1) if self.batch_first else outputs, state


class NTMCell(_NTM):
    """One step of :class:`FastNTM`, whose arguments, parameters and ``state_dict`` it shares.

    inputs (B, I) or (I,), state -> output (B, O) or (O,), state.
    """

    def forward(self, inputs: Tensor, state: NTMState | None = None) -> tuple[Tensor, NTMState]:
        """One step from ``state`` (by default :meth:`initial_state`) -> output logits, new state."""
        return self._forward(inputs, state)

    def _enter(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
        self._check_inputs(inputs, 2, weight)
        batched = inputs.dim() == 2
        if not batched:
            inputs = inputs.unsqueeze(0)
        return inputs.unsqueeze(0), batched

    def _leave(self, outputs: Tensor, state: NTMState, batched: bool) -> tuple[Tensor, NTMState]:
        outputs = outputs.squeeze(0)
        return (outputs, state) if batched else (outputs.squeeze(0), _unbatched(state))
