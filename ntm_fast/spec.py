"""What a machine is made of, each fact said once: the options of a step, the kinds of controllers, a machine's
configuration, and the tensors that a machine carries, takes and shows.

Whatever needs a list of these (operator schemas, native calls, modules, the command line, tests) derives it from here.

Letters: B batch, T time, N memory locations, M memory width, R read and W write heads, H = R + W heads or, for a
controller, its hidden size; S shift range, 2S+1 shifts; I inputs, O outputs, L controller layers, P raw head
parameters.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import Field, dataclass, field, fields
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import torch
import torch.utils._pytree
from torch import Tensor

EPS = 1e-8  # every operator's default
ACTIVATIONS = ("tanh", "identity")
MEMORY_INITS = ("constant", "learned", "learned_constant", "random")
ENGINES = ("auto", "sequence", "step", "reference")
CHECKPOINTS = {"auto": 0, "all": 1}  # words for memory_checkpoint, and what operators take for them; else a number


# --- options ----------------------------------------------------------------------------------------------------------


def option(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field that is an option: its default, one line of help, and the rules of :func:`check_option`.

    ``choices``: the values allowed. ``least``: the smallest. ``above``: what it must be greater than. ``infinite``: it
    may be infinite. ``optional``: the type of an option that may also be None. ``fixed``: it decides a parameter's
    size, so it cannot change later. ``changeable``: it may change when a training run goes on, for no result depends on
    it. ``native``: its name in the native code, and the function that converts a value for it.
    """
    return field(default=default, metadata={"help": help, **rules})


def option_type(option: Field) -> type:
    """The type of an option's values, None apart."""
    return option.metadata.get("optional") or type(option.default)


def check_option(option: Field, value: Any) -> None:
    """Raise TypeError or ValueError, naming the option, what came and what is expected, where the value is wrong."""
    kind, rules = option_type(option), option.metadata
    if value is None and "optional" in rules:
        return
    or_none = " or None" if "optional" in rules else ""
    if "choices" in rules:
        if value not in rules["choices"]:
            expected = ", ".join(map(repr, rules["choices"]))
            raise ValueError(f"{option.name}: got {value!r}, expected one of {expected}{or_none}")
        return
    expected = {int: "an int", float: "a number", str: "a str", bool: "a bool"}[kind]
    if value is None or not (_is_flag(value) if kind is bool else _is_a(kind, value)):
        raise TypeError(f"{option.name}: got {value!r}, expected {expected}{or_none}")
    infinite = rules.get("infinite", False) and value == math.inf
    if "least" in rules and not rules["least"] <= value < math.inf:
        raise ValueError(f"{option.name}: got {value!r}, expected {expected} of at least {rules['least']}{or_none}")
    if "above" in rules and not (infinite or rules["above"] < value < math.inf):
        raise ValueError(f"{option.name}: got {value!r}, expected {expected} above {rules['above']}{or_none}")


_NUMBERS: dict[type, type] = {int: numbers.Integral, float: numbers.Real}  # numpy's too


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, _NUMBERS.get(kind, kind)) and not isinstance(value, bool)


def _is_flag(value: Any) -> bool:
    """Whether it is a bool, Python's or numpy's, or 0 or 1."""
    return isinstance(value, numbers.Integral) and value in (0, 1) or type(value).__name__ in ("bool_", "bool")


def check_options(values: Any) -> None:
    """:func:`check_option` for every option of a dataclass."""
    for own in fields(values):
        if "help" in own.metadata:
            check_option(own, getattr(values, own.name))


def _shifts(shift_range: int) -> int:
    return 2 * shift_range + 1


def _is_tanh(activation: str) -> bool:
    return activation == "tanh"


def _or_infinity(number: float | None) -> float:
    return math.inf if number is None else number


@dataclass(frozen=True)
class StepOptions:
    """What a memory step may vary. The order of the fields is that of every schema and of csrc/core/step.h."""

    shift_range: int = option(
        1, "locations that a head can move its focus by in a step", least=0, fixed=True, native=("K", _shifts)
    )
    read_first: bool = option(False, "read heads address and read the memory before the write, not after it")
    key_activation: str = option(
        "tanh", "activation of the keys", choices=ACTIVATIONS, native=("key_tanh", _is_tanh)
    )
    add_activation: str = option(
        "tanh", "activation of the added vectors", choices=ACTIVATIONS, native=("add_tanh", _is_tanh)
    )
    clip: float | None = option(
        20.0,
        "largest raw head parameter; None switches clipping off",
        above=0,
        infinite=True,
        optional=float,
        native=("clip", _or_infinity),
    )
    eps: float = option(EPS, "added, squared, to the squared norms of the cosine", above=0, infinite=True)

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError naming the option that is wrong."""
        check_options(self)


STEP_OPTIONS: Mapping[str, Field] = {own.name: own for own in fields(StepOptions)}


def step_values(source: Any) -> tuple[Any, ...]:
    """The step options of anything that has them as attributes, in their order."""
    return tuple([getattr(source, name) for name in STEP_OPTIONS])


def native_values(names: Iterable[str], values: Sequence[Any]) -> dict[str, Any]:
    """Step options as the native code takes them, by the names of csrc/core/step.h. The shift range is there as the
    number of shifts, K."""
    found = {}
    for name, value in zip(names, values):
        native_name, convert = STEP_OPTIONS[name].metadata.get("native", (name, None))
        found[native_name] = value if convert is None else convert(value)
    return found


# --- controllers ------------------------------------------------------------------------------------------------------


class ControllerKind(NamedTuple):
    """What a controller is made of; :mod:`reference` says what it computes."""

    gates: int  # rows of a weight matrix, in units of the hidden size
    products: int  # of a step: 1, of what it is fed joined with its hidden state; 2, of each apart
    state: tuple[str, ...]  # the names of its state's tensors, each (L, B, H)
    weights: tuple[str, ...]  # the names of a layer's weights, as nn.LSTM's
    native: int | None  # its number in csrc/core (Controller); None: there is no native sequence with it


_RECURRENT = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
CONTROLLERS = {
    "lstm": ControllerKind(4, 1, ("hidden", "cell"), _RECURRENT, 0),
    "gru": ControllerKind(3, 2, ("hidden",), _RECURRENT, 1),  # the reset gate applies after the product
    "feedforward": ControllerKind(1, 1, (), ("weight_ih", "bias_ih"), None),  # tanh
}


def by_layer(weights: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    """The weights of each layer, ``count`` of them, out of those of all."""
    return [tuple(weights[start : start + count]) for start in range(0, len(weights), count)]


def layers_in_row(state: Sequence[Tensor]) -> list[Tensor]:
    """A controller's state, each (L, B, H), as the tensors (B, H) of one layer after the other."""
    return [tensor[layer] for layer in range(len(state[0]) if state else 0) for tensor in state]


def layers_stacked(row: list[Tensor], count: int) -> tuple[Tensor, ...]:
    """The reverse of :func:`layers_in_row`, for a state of ``count`` tensors."""
    return tuple([torch.stack(row[index::count]) for index in range(count)])


def params_size(read_heads: int, write_heads: int, memory_width: int, shift_range: int) -> int:
    """P, the number of raw head parameters of one element: (R + W)(M + 2S + 4) + 2WM."""
    return (read_heads + write_heads) * (memory_width + 2 * shift_range + 4) + 2 * write_heads * memory_width


# --- a machine --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MachineOptions(StepOptions):
    """What one may choose of a machine; the sizes of inputs and outputs are given by its use."""

    hidden_size: int = option(100, "units of each controller layer", least=1, fixed=True)
    num_layers: int = option(1, "controller layers", least=1, fixed=True)
    controller: str = option("lstm", "controller", choices=tuple(CONTROLLERS), fixed=True)
    memory_locations: int = option(128, "memory locations N", least=1, fixed=True)
    memory_width: int = option(20, "memory width M", least=1, fixed=True)
    read_heads: int = option(1, "read heads", least=1, fixed=True)
    write_heads: int = option(1, "write heads", least=1, fixed=True)
    memory_init: str = option("constant", "initial memory", choices=MEMORY_INITS, fixed=True)
    engine: str = option("auto", "engine of FastNTM", choices=ENGINES, changeable=True)


@dataclass(frozen=True, kw_only=True)
class NTMConfig(MachineOptions):
    """Everything that decides what a :class:`FastNTM` or :class:`NTMCell` is, but for its parameters, device and dtype.

    Raises TypeError or ValueError naming the field that is wrong.
    """

    input_size: int = option(1, "I, the features of an input", least=1, fixed=True)
    output_size: int = option(1, "O, the features of an output", least=1, fixed=True)
    batch_first: bool = option(False, "batched inputs and outputs are (B, T, ...)")
    memory_checkpoint: str | int = field(default="auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2 * self.shift_range + 1 > self.memory_locations:
            raise ValueError(
                f"shift_range: got {self.shift_range}, whose {2 * self.shift_range + 1} shifts do not fit "
                f"memory_locations = {self.memory_locations}; expected at most {(self.memory_locations - 1) // 2}"
            )
        check_checkpoint(self.memory_checkpoint)
        self._remember()

    def _remember(self) -> None:
        """Work out once what every call asks for."""
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, own.name) for own in fields(self))))
        checkpoint = checkpoint_number(self.memory_checkpoint)
        options = SequenceOptions(self.controller, step_values(self), checkpoint)
        object.__setattr__(self, "_sequence_options", options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()  # another process has other hashes

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]  # asked at every streamed step

    @property
    def params_size(self) -> int:
        """P, the raw head parameters of one element."""
        return params_size(self.read_heads, self.write_heads, self.memory_width, self.shift_range)

    @property
    def features_size(self) -> int:
        """What the output layer is fed: the controller's hidden state and the reads."""
        return self.hidden_size + self.read_heads * self.memory_width

    def sequence_options(self) -> SequenceOptions:
        """As the operator ``ntm_sequence`` takes them."""
        return self._sequence_options  # type: ignore[attr-defined]


def check_checkpoint(value: Any) -> None:
    """Raise TypeError or ValueError unless it is a ``memory_checkpoint``."""
    if isinstance(value, str):
        if value not in CHECKPOINTS:
            raise ValueError(f"memory_checkpoint: got {value!r}, expected 'auto', 'all' or an int of at least 1")
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"memory_checkpoint: got {value!r}, expected 'auto', 'all' or an int of at least 1")
    elif value < 1:
        raise ValueError(f"memory_checkpoint: got {value!r}, expected 'auto', 'all' or an int of at least 1")


def checkpoint_number(value: str | int) -> int:
    """A ``memory_checkpoint`` as operators take it."""
    return CHECKPOINTS[value] if isinstance(value, str) else value


# --- tensors ----------------------------------------------------------------------------------------------------------


class NTMState(NamedTuple):
    """The state between two steps, batched here; for unbatched inputs every B is missing.

    As in ``nn.LSTM``, the batch is never first in the controller's state, and ``batch_first`` does not change that.
    """

    memory: Tensor  # (B, N, M)
    read_weights: Tensor  # (B, R, N)
    write_weights: Tensor  # (B, W, N)
    reads: Tensor  # (B, R, M)
    controller: tuple[Tensor, ...]  # each (layers, B, hidden): (h, c) for an LSTM, (h,) for a GRU, () for feedforward

    def flatten(self) -> tuple[Tensor, ...]:
        """All tensors in a row."""
        return *self[:4], *self.controller

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor]) -> NTMState:
        """The reverse of :meth:`flatten`."""
        memory, read_weights, write_weights, reads, *controller = tensors
        return cls(memory, read_weights, write_weights, reads, tuple(controller))

    def map(self, function: Callable[[Tensor], Tensor]) -> NTMState:
        """Apply ``function`` to every tensor."""
        return NTMState.unflatten([function(tensor) for tensor in self.flatten()])

    def detach(self) -> NTMState:
        """Cut the graph here: truncated backpropagation through time."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> NTMState:
        """Move or cast every tensor, as :meth:`torch.Tensor.to`."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def for_batch(self, batch: int) -> NTMState:
        """A state without a batch dimension, one for all sequences, as that of so many; nothing is copied."""
        return self._by_part(lambda x: x.expand(batch, -1, -1), lambda x: x.unsqueeze(1).expand(-1, batch, -1))

    def batched(self) -> NTMState:
        """The state of one sequence as that of a batch of one."""
        return self._by_part(lambda x: x.unsqueeze(0), lambda x: x.unsqueeze(1))

    def unbatched(self) -> NTMState:
        """The reverse of :meth:`batched`."""
        return self._by_part(lambda x: x.squeeze(0), lambda x: x.squeeze(1))

    def take(self, order: Tensor) -> NTMState:
        """The state of the sequences with these indices, in this order."""
        state = self._replace(memory=self.memory.mT)  # stays location-minor, as the native code wants it
        state = state._by_part(lambda x: x.index_select(0, order), lambda x: x.index_select(1, order))
        return state._replace(memory=state.memory.mT)

    def _by_part(self, function: Callable[[Tensor], Tensor], of_controller: Callable[[Tensor], Tensor]) -> NTMState:
        """Apply a function to every tensor, those of the controller their own: there the batch is not first."""
        memory, read_weights, write_weights, reads = [function(tensor) for tensor in self[:4]]
        controller = tuple([of_controller(tensor) for tensor in self.controller])
        return NTMState(memory, read_weights, write_weights, reads, controller)


# So that a saved state loads with weights_only=True, and torch.export.save takes programs that return states.
torch.serialization.add_safe_globals([NTMState])
torch.utils._pytree._register_namedtuple(NTMState, serialized_type_name="ntm_fast.NTMState")


class NTMTrace(NamedTuple):
    """Every head at every step, for looking at; heads H = R + W, the read heads first. Unbatched: no B."""

    read_weights: Tensor  # (T, B, R, N)
    write_weights: Tensor  # (T, B, W, N)
    reads: Tensor  # (T, B, R, M)
    key: Tensor  # (T, B, H, M)
    beta: Tensor  # (T, B, H)
    gate: Tensor  # (T, B, H)
    shift: Tensor  # (T, B, H, 2S+1)
    gamma: Tensor  # (T, B, H)
    erase: Tensor  # (T, B, W, M)
    add: Tensor  # (T, B, W, M)


class SequenceTensors(NamedTuple):
    """What a sequence is computed from, or the gradients of that. In a row they are in the order of the arguments of
    :func:`ops.ntm_sequence`."""

    inputs: Tensor  # (T, B, I)
    initial: NTMState  # before the first step
    weights: tuple[Tensor, ...]  # the controller's, layer by layer
    heads_weight: Tensor  # (P, H)
    heads_bias: Tensor  # (P,)
    output_weight: Tensor | None = None  # (O, H + R M); None: the features themselves are wanted
    output_bias: Tensor | None = None  # (O,)
    lengths: Tensor | None = None  # (B,), integers: steps of each sequence; None: all take T. It has no gradient

    def arguments(self) -> tuple[Any, ...]:
        """As :func:`ops.ntm_sequence` takes them, grouped; without an output layer, as :func:`reference.unroll`."""
        given = self.inputs, *self.initial, self.weights, self.heads_weight, self.heads_bias
        return given if self.output_weight is None else (*given, self.output_weight, self.output_bias)

    @classmethod
    def from_arguments(cls, arguments: Sequence[Any]) -> SequenceTensors:
        """The reverse of :meth:`arguments`."""
        inputs, memory, read_weights, write_weights, reads, controller, weights, *layers = arguments
        initial = NTMState(memory, read_weights, write_weights, reads, tuple(controller))
        return cls(inputs, initial, tuple(weights), *layers)

    def flatten(self) -> tuple[Tensor, ...]:
        """All tensors in a row, but the lengths."""
        row = self.inputs, *self.initial.flatten(), *self.weights, self.heads_weight, self.heads_bias
        if self.output_weight is None or self.output_bias is None:
            return row
        return *row, self.output_weight, self.output_bias

    @classmethod
    def unflatten(
        cls, row: Sequence[Tensor], controller: str, lengths: Tensor | None = None, output: bool = True
    ) -> SequenceTensors:
        """The reverse of :meth:`flatten`. ``output``: whether there is an output layer among them."""
        state_end = 1 + 4 + len(CONTROLLERS[controller].state)
        weights_end = len(row) - (4 if output else 2)
        initial = NTMState.unflatten(row[1:state_end])
        x = cls(row[0], initial, tuple(row[state_end:weights_end]), *row[weights_end:])
        return x if lengths is None else x._replace(lengths=lengths)


class SequenceOptions(NamedTuple):
    """What a sequence needs besides tensors. In a row they are in the order of the operator's schema."""

    controller: str
    step: tuple[Any, ...]  # those of StepOptions
    memory_checkpoint: int  # 0: "auto", 1: "all", else every so many steps' memory

    def flatten(self) -> tuple[Any, ...]:
        """All values in a row."""
        return self.controller, *self.step, self.memory_checkpoint

    @classmethod
    def unflatten(cls, row: Sequence[Any]) -> SequenceOptions:
        """The reverse of :meth:`flatten`."""
        return cls(row[0], tuple(row[1:-1]), row[-1])

    def keywords(self) -> dict[str, Any]:
        """As :func:`reference.unroll` and :func:`reference.ntm_sequence` take them; no answer depends on the rest."""
        return {"controller": self.controller, **dict(zip(STEP_OPTIONS, self.step))}
