"""The Neural Turing Machine as modules: :class:`FastNTM` over sequences, :class:`NTMCell` over single steps."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Sequence, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import engines, native, reference
from ..engines import sequence
from ..ops.serving import left_alone
from ..spec import CONTROLLERS, EPS, NTMConfig, NTMState, NTMTrace, SequenceTensors
from .called import checked, parts_to_call
from .checks import check_inputs, check_state, check_tensors
from .controllers import Controller, parameters

INITIAL_FOCUS = 5.0  # logit of location 0 in the first weightings, the others' being 0; see docs/decisions.md
INITIAL_MEMORY = 1e-6  # Collier & Beel 2018, section 3.2: the "constant" initialisation


class _NTM(nn.Module):
    """Parameters, initial state and the loop over time, common to :class:`FastNTM` and :class:`NTMCell`."""

    input_size: int
    output_size: int
    hidden_size: int
    num_layers: int
    controller_type: str
    memory_locations: int
    memory_width: int
    read_heads: int
    write_heads: int
    shift_range: int
    memory_init: str
    read_first: bool
    key_activation: str
    add_activation: str
    clip: float | None
    eps: float
    batch_first: bool
    engine: str
    memory_checkpoint: str | int

    def __init__(self, config: NTMConfig, device: torch.device | str | int | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: got {dtype!r}, expected a floating dtype")
        self.ntm_config = config
        n, m, r, w = config.memory_locations, config.memory_width, config.read_heads, config.write_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        columns = config.input_size + r * m
        self.controller = Controller(config.controller, columns, config.hidden_size, config.num_layers, **factory)
        self.heads = nn.Linear(config.hidden_size, config.params_size, **factory)
        self.output = nn.Linear(config.features_size, config.output_size, **factory)
        initial_memory = torch.empty(n, m, **factory)
        if config.memory_init.startswith("learned"):
            self.initial_memory = nn.Parameter(initial_memory)
        else:
            self.register_buffer("initial_memory", initial_memory)
        self.initial_reads = nn.Parameter(torch.empty(r, m, **factory))
        self.initial_read_weights = nn.Parameter(torch.empty(r, n, **factory))  # logits
        self.initial_write_weights = nn.Parameter(torch.empty(w, n, **factory))  # logits
        self._weight_shapes = [tuple(weight.shape) for weight in self._weights({})[:-2]]
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
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(f"batch_size: got {batch_size!r}, expected an int")
        if batch_size < 0:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 0")
        return self._shared_state().for_batch(batch_size)

    def _shared_state(self) -> NTMState:
        """The state before the first step, without a batch dimension."""
        if not hasattr(self.controller, "initial_state"):
            kind = type(self.controller).__name__
            raise TypeError(f"controller: got {kind}, expected a module with forward(x, state) and initial_state()")
        return NTMState(
            memory=self.initial_memory,
            read_weights=self.initial_read_weights.softmax(-1),
            write_weights=self.initial_write_weights.softmax(-1),
            reads=self.initial_reads,
            controller=self.controller.initial_state(),
        )

    def _called_parts(self) -> dict[str, str]:
        """The parts that must be called as modules, and why: a hook or a forward of its own must see the calls.

        Of the others, the engines compute what the call would, from the weights.
        """
        return parts_to_call(self._modules)

    def _weights(self, called: dict[str, str]) -> list[Tensor]:
        """The controller's, layer by layer, then weight and bias of the heads and of the output layer. None for those
        of parts that are called."""
        modules = self._modules  # past the search of nn.Module, as parameters are
        none: Any = [None, None]
        controller = [] if "controller" in called else modules["controller"].weights()  # type: ignore
        heads = none if "heads" in called else _linear(modules["heads"])  # type: ignore
        output = none if "output" in called else _linear(modules["output"])  # type: ignore
        return [*controller, *heads, *output]

    def _check_weights(self, weights: list[Tensor], weight: Tensor) -> None:
        """That what may have been put in the place of a weight fits; the output layer may have another size."""
        outputs = tuple(weights[-2].shape[:1]) if weights[-2] is not None else ()
        layers = len(weights) - 4  # weights of the controller; none where it is called
        fixed = [*self._weight_shapes[:layers], *self._weight_shapes[-2:]]
        shapes = [*fixed, (*outputs, self.ntm_config.features_size), outputs]

        def name(index: int) -> str:
            linear = "heads.weight", "heads.bias", "output.weight", "output.bias"
            return linear[index - layers] if index >= layers else f"controller.{self.controller.weight_names[index]}"

        if weights[-4] is None or weights[-2] is None:
            there = [index for index, tensor in enumerate(weights) if tensor is not None]
            own, own_shapes = [weights[index] for index in there], [shapes[index] for index in there]
            check_tensors(own, own_shapes, weight, lambda index: name(there[index]))
        else:
            check_tensors(weights, shapes, weight, name)

    def _forward(
        self, inputs: Tensor, state: NTMState | None, records: list | None = None, lengths: Any = None
    ) -> tuple[Tensor, NTMState]:
        """Check, run and shape as the inputs are. ``records`` collects what a trace shows."""
        called = self._called_parts()
        weights = self._weights(called)
        key = None  # under which to remember the call
        plain = records is None and lengths is None and not called
        if plain and type(state) is NTMState and type(state.controller) is tuple and self._may_repeat():
            # What is checked and chosen depends on the configuration and on how tensors lie. Where these have been met
            # before, only the computing is left, which is little of a streamed step.
            found = native.layouts((inputs, *state[:4], *state.controller, *weights))
            if found is not None:
                layouts, addresses = found
                key = layouts, self.ntm_config
                repeated = sequence.remembered.get(key, sequence.UNKNOWN)
                if isinstance(repeated, sequence.Repeated):
                    return repeated(inputs, addresses)
                if repeated is None:  # not to be repeated, as has been found out
                    key = None
        weight, config = self.initial_reads if "heads" in called else weights[-4], self.ntm_config
        inputs, batched = self._enter(inputs, weight)
        if lengths is not None:
            if not batched:
                raise ValueError("lengths: got lengths for an unbatched sequence, which takes all its steps")
            lengths = reference.check_lengths(lengths, inputs.shape[0], inputs.shape[1], inputs.device)
        self._check_weights(weights, weight)
        if state is not None:
            check_state(config, state, tuple(inputs.shape[1:2]) if batched else (), weight)
            state = state if batched else state.batched()
        choice = engines.choose_engine(config, weight.device, weight.dtype, called)
        if state is None:
            state = self._first_state(inputs.shape[1], weight, shared=choice.engine == "sequence" and records is None)
        x = SequenceTensors(inputs, state, tuple(weights[:-4]), *weights[-4:])._replace(lengths=lengths)
        options = config.sequence_options()
        parts = checked(self.ntm_config, self._modules, called) if called else None
        results = self._leave(*engines.run(choice, x, options, records, parts), batched)
        if key is not None and choice.engine == "sequence":
            sequence.remember(key, x, options, *results)
        return results

    def _first_state(self, batch: int, weight: Tensor, shared: bool) -> NTMState:
        """The state before the first step, without a batch dimension if the engine can share one among all."""
        shared = shared and type(self).initial_state is _NTM.initial_state
        state = self._shared_state() if shared else self.initial_state(batch)
        check_state(self.ntm_config, state, () if shared else (batch,), weight)
        return state

    def _may_repeat(self) -> bool:
        """Whether a call like this one may be done again by its layout alone."""
        config = self.ntm_config
        served = CONTROLLERS[config.controller].native is not None
        return served and config.engine in ("auto", "sequence") and left_alone()

    def _enter(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
        """Check inputs and shape them (T, B, I); whether they are batched."""
        raise NotImplementedError

    def _leave(self, outputs: Tensor, state: NTMState, batched: bool) -> tuple[Tensor, NTMState]:
        """Shape outputs (T, B, O) and state as the inputs were."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return (
            f"memory={self.memory_locations}x{self.memory_width}, heads={self.read_heads}r{self.write_heads}w, "
            f"shift_range={self.shift_range}, memory_init={self.memory_init!r}, engine={self.engine!r}"
        )


def _linear(layer: nn.Module) -> list[Tensor]:
    """Weight and bias of a linear layer; zeros where it has no bias."""
    weight, bias = parameters(layer, ("weight", "bias"))
    return [weight, weight.new_zeros(weight.shape[0]) if bias is None else bias]


def _setting(own: dataclasses.Field) -> property:
    """An attribute that is a field of the configuration; one that decides a parameter's size is read-only."""
    name = own.name

    def get(self: _NTM) -> Any:
        return getattr(self.ntm_config, name)

    def set(self: _NTM, value: Any) -> None:
        now = getattr(self.ntm_config, name)
        if own.metadata.get("fixed") and value != now:
            raise AttributeError(f"{name}: got {value!r}, expected {now!r}: it is fixed when the module is made")
        self.ntm_config = dataclasses.replace(self.ntm_config, **{name: value})

    return property(get, set)


for _field in dataclasses.fields(NTMConfig):
    setattr(_NTM, "controller_type" if _field.name == "controller" else _field.name, _setting(_field))


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
        eps: added, squared, to the squared norms of the cosine.
        batch_first: batched inputs and outputs are (B, T, ...) instead of (T, B, ...). States are not affected.
        engine: ``"sequence"`` (one native call for all steps; LSTM and GRU), ``"step"`` (one native call per memory
            step; on CUDA captured into CUDA graphs when the same shapes come again), ``"reference"`` (plain PyTorch) or
            ``"auto"``, the fastest that can serve: on CUDA with a ``hidden_size`` of more than 256 that is ``"step"``.
            A forced engine that cannot serve raises a ``RuntimeError`` with the reason; :func:`ntm_fast.explain` says
            which one serves and why not the others.
        memory_checkpoint: of the sequence engine in training: ``"all"`` keeps the memory of every step for backward, a
            number K that of every K-th step, and writes those between again. ``"auto"``: all of them up to 2 MB (on
            CUDA 4 GB), beyond that every sqrt(T)-th, which on a CPU is then the faster choice too.

    All of these are attributes too (``controller`` as ``controller_type``). Those that decide no parameter's size may
    be set later: read_first, key_activation, add_activation, clip, eps, batch_first, engine and memory_checkpoint.

    Shapes: inputs (T, B, I), (B, T, I) with ``batch_first``, or unbatched (T, I). Outputs likewise with O features;
    they are logits. States are described in :class:`NTMState`.
    """

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
        eps: float = EPS,
        batch_first: bool = False,
        engine: str = "auto",
        memory_checkpoint: str | int = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = NTMConfig(
            input_size=input_size,
            output_size=output_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            controller=controller,
            memory_locations=memory_locations,
            memory_width=memory_width,
            read_heads=read_heads,
            write_heads=write_heads,
            shift_range=shift_range,
            memory_init=memory_init,
            read_first=bool(read_first),
            key_activation=key_activation,
            add_activation=add_activation,
            clip=clip,
            eps=eps,
            batch_first=bool(batch_first),
            engine=engine,
            memory_checkpoint=memory_checkpoint,
        )
        super().__init__(config, device, dtype)

    def forward(
        self,
        inputs: Tensor | PackedSequence,
        state: NTMState | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, NTMState]:
        """Run over ``inputs`` from ``state`` (by default :meth:`initial_state`) -> outputs, final state.

        Sequences of different lengths share a batch with ``lengths`` (B,), integers 0..T, a tensor or a list: at the
        steps after its own last one a sequence's outputs are 0, its inputs are not looked at, and its state stays. Or
        ``inputs`` is a ``PackedSequence``: then the outputs are one too, and states are in the order of the sequences
        before packing, as ``nn.LSTM`` has it. Time goes with the sum of the lengths.

        Lengths on a CPU are checked. Lengths on a GPU are read there: those beyond 0..T are taken as 0 or T.

        Raises ValueError or TypeError naming the argument whose shape, dtype or device is wrong.
        """
        if isinstance(inputs, PackedSequence):
            return self._packed(inputs, state, lengths)
        return self._forward(inputs, state, lengths=lengths)

    def _packed(self, inputs: PackedSequence, state: NTMState | None, lengths: Any) -> tuple[PackedSequence, NTMState]:
        if lengths is not None:
            raise ValueError("lengths: got lengths for a PackedSequence, which has its own")
        data, batch_sizes, order, back = inputs
        if data.dim() != 2:
            raise ValueError(f"inputs: got a PackedSequence of shape {tuple(data.shape)}, expected (steps, features)")
        first = self.ntm_config.batch_first
        padded, own = pad_packed_sequence(PackedSequence(data, batch_sizes), batch_first=first)  # the longest first
        if state is not None and order is not None:
            batch = (len(own),)
            check_state(self.ntm_config, state, batch, self.initial_reads)
            state = state.take(order)
        outputs, final = self._forward(padded, state, lengths=own)
        packed = pack_padded_sequence(outputs, own, batch_first=first)
        return PackedSequence(packed.data, batch_sizes, order, back), final if back is None else final.take(back)

    if TYPE_CHECKING:  # nn.Module says nothing of what a call returns

        @overload
        def __call__(
            self, inputs: Tensor, state: NTMState | None = None, *, lengths: Tensor | Sequence[int] | None = None
        ) -> tuple[Tensor, NTMState]: ...

        @overload
        def __call__(
            self, inputs: PackedSequence, state: NTMState | None = None
        ) -> tuple[PackedSequence, NTMState]: ...

        def __call__(self, inputs: Any, state: Any = None, *, lengths: Any = None) -> Any: ...

    def trace(
        self,
        inputs: Tensor,
        state: NTMState | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, NTMTrace]:
        """Run as :meth:`forward` does and show every head at every step -> outputs, trace (time first).

        With ``lengths``, what the trace shows of a step that a sequence does not take is 0.
        """
        records: list = []
        outputs, _ = self._forward(inputs, state, records, lengths)
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
        if inputs.dim() == 2:
            return outputs, NTMTrace(*(t.squeeze(1) for t in trace))
        lengths = reference.check_lengths(lengths, params.shape[0], params.shape[1], params.device)
        return outputs, NTMTrace(*(reference.without_ended(t, lengths) for t in trace))

    def _enter(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
        """Check inputs and shape them (T, B, I); whether they are batched."""
        check_inputs(self.ntm_config, inputs, 3, weight)
        batched = inputs.dim() == 3
        if not batched:
            inputs = inputs.unsqueeze(1)
        elif self.ntm_config.batch_first:
            inputs = inputs.transpose(0, 1)
        if inputs.shape[0] == 0:
            raise ValueError("inputs: got no time steps, expected at least one")
        return inputs, batched

    def _leave(self, outputs: Tensor, state: NTMState, batched: bool) -> tuple[Tensor, NTMState]:
        if not batched:
            return outputs.squeeze(1), state.unbatched()
        return outputs.transpose(0, 1) if self.ntm_config.batch_first else outputs, state


class NTMCell(_NTM):
    """One step of :class:`FastNTM`, whose arguments, parameters and ``state_dict`` it shares.

    inputs (B, I) or (I,), state -> output (B, O) or (O,), state.
    """

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
        eps: float = EPS,
        engine: str = "auto",
        memory_checkpoint: str | int = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = NTMConfig(
            input_size=input_size,
            output_size=output_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            controller=controller,
            memory_locations=memory_locations,
            memory_width=memory_width,
            read_heads=read_heads,
            write_heads=write_heads,
            shift_range=shift_range,
            memory_init=memory_init,
            read_first=bool(read_first),
            key_activation=key_activation,
            add_activation=add_activation,
            clip=clip,
            eps=eps,
            engine=engine,
            memory_checkpoint=memory_checkpoint,
        )
        super().__init__(config, device, dtype)

    def forward(self, inputs: Tensor, state: NTMState | None = None) -> tuple[Tensor, NTMState]:
        """One step from ``state`` (by default :meth:`initial_state`) -> output logits, new state."""
        return self._forward(inputs, state)

    if TYPE_CHECKING:

        def __call__(self, inputs: Tensor, state: NTMState | None = None) -> tuple[Tensor, NTMState]: ...

    def _enter(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
        check_inputs(self.ntm_config, inputs, 2, weight)
        batched = inputs.dim() == 2
        if not batched:
            inputs = inputs.unsqueeze(0)
        return inputs.unsqueeze(0), batched

    def _leave(self, outputs: Tensor, state: NTMState, batched: bool) -> tuple[Tensor, NTMState]:
        outputs = outputs.squeeze(0)
        return (outputs, state) if batched else (outputs.squeeze(0), state.unbatched())
