"""The operators: ``torch.ops.ntm_fast.*`` with schemas and fakes, and their public, differentiable form.

Every public function here has the name, the signature and the answers of its twin in :mod:`ntm_fast.reference`, takes
strided and expanded inputs, and is served by a native kernel where one exists for the device and dtype, else by the
reference; :func:`explain` says which and why. All of them raise TypeError or ValueError, naming the argument, what it
was and what it must be, before anything is computed.

A memory has the paper's shape (B, N, M) and, inside the native code, locations contiguous: memories returned here are
transposed views, and passing them on costs no copy.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import torch
from torch import Tensor

from . import _native, reference, sequence

_LIBRARY = torch.library.Library("ntm_fast", "DEF")
_MEMORY = "BNM"  # tensors of these dimensions are location-minor inside: [B, M, N]
_ACTIVATIONS = ("tanh", "identity")
EPS = 1e-8  # every operator's default
LARGEST_HIDDEN = 256  # of a controller whose weights each block of a GPU reads at every step; docs/decisions.md


class _Operator(NamedTuple):
    """What one operator is: from this follow its schema, its fake, its kernels and its autograd Function."""

    name: str
    sizes: str  # the dimensions that the native function takes, in its order
    inputs: dict[str, str]  # name -> dimensions
    outputs: dict[str, str]
    saved: tuple[str, ...] = ()  # the outputs that backward needs
    options: dict[str, str] = {}  # name -> type in the schema
    derived: Callable[..., dict[str, int]] | None = None  # (dims, *options) -> dimensions that follow from others


_STEP_OPTIONS = {
    "shift_range": "int",
    "read_first": "bool",
    "key_activation": "str",
    "add_activation": "str",
    "clip": "float?",
    "eps": "float",
}


def _step_dimensions(dims: dict[str, int], shift_range: int, *_: Any) -> dict[str, int]:
    return {"K": 2 * shift_range + 1, "P": reference.params_size(dims["R"], dims["W"], dims["M"], shift_range)}


_OPERATORS = (
    _Operator(
        "content_addressing",
        "BHNM",
        {"memory": _MEMORY, "key": "BHM", "beta": "BH"},
        {"content": "BHN"},
        saved=("content",),
        options={"eps": "float"},
    ),
    _Operator("interpolate", "BHN", {"content": "BHN", "previous": "BHN", "gate": "BH"}, {"gated": "BHN"}),
    _Operator("circular_shift", "BHNK", {"weights": "BHN", "shift": "BHK"}, {"shifted": "BHN"}),
    _Operator("sharpen", "BHN", {"weights": "BHN", "gamma": "BH"}, {"sharpened": "BHN"}, saved=("sharpened",)),
    _Operator(
        "address",
        "BHNMK",
        {
            "memory": _MEMORY,
            "previous": "BHN",
            "key": "BHM",
            "beta": "BH",
            "gate": "BH",
            "shift": "BHK",
            "gamma": "BH",
        },
        {"weights": "BHN"},
        saved=("weights",),
        options={"eps": "float"},
    ),
    _Operator(
        "erase_add_write",
        "BHNM",
        {"memory": _MEMORY, "weights": "BHN", "erase": "BHM", "add": "BHM"},
        {"written": _MEMORY},
    ),
    _Operator("read", "BHNM", {"memory": _MEMORY, "weights": "BHN"}, {"reads": "BHM"}),
    _Operator(
        "memory_step",
        "BRWNMK",
        {"memory": _MEMORY, "read_weights": "BRN", "write_weights": "BWN", "params": "BP"},
        {"reads": "BRM", "new_memory": _MEMORY, "new_read_weights": "BRN", "new_write_weights": "BWN"},
        saved=("new_memory", "new_read_weights", "new_write_weights"),
        options=_STEP_OPTIONS,
        derived=_step_dimensions,
    ),
    _Operator(
        "lstm_gates",
        "BH",
        {"gates": "BG", "cell": "BH"},
        {"hidden": "BH", "new_cell": "BH"},
        saved=("new_cell",),
        derived=lambda dims: {"G": 4 * dims["H"]},
    ),
    _Operator(
        "gru_gates",
        "BH",
        {"input_gates": "BG", "hidden_gates": "BG", "hidden": "BH"},
        {"new_hidden": "BH"},
        derived=lambda dims: {"G": 3 * dims["H"]},
    ),
)


# --- torch.ops.ntm_fast.*: schema, fake, kernels ----------------------------------------------------------------------


def _reader(op: _Operator) -> Callable[[tuple], dict[str, int]]:
    """A function from an operator's arguments (tensors, then options) to the size of every dimension."""
    count = len(op.inputs)
    places = {}
    for index, letters in enumerate(op.inputs.values()):
        for axis, letter in enumerate(letters):
            places.setdefault(letter, (index, axis))
    places = [(letter, index, axis) for letter, (index, axis) in places.items()]

    def read(args: tuple) -> dict[str, int]:
        shapes = [tensor.shape for tensor in args[:count]]
        dims = {letter: shapes[index][axis] for letter, index, axis in places}
        if op.derived is not None:
            dims.update(op.derived(dims, *args[count : count + len(op.options)]))
        return dims

    return read


def _empty(like: Tensor, letters: str, dims: dict[str, int]) -> Tensor:
    if letters == _MEMORY:
        n, m = dims["N"], dims["M"]
        return like.new_empty_strided((dims["B"], n, m), (n * m, 1, n))
    return like.new_empty([dims[letter] for letter in letters])


def _address(tensor: Tensor, letters: str, keep: list[Tensor]) -> int:
    """Where the native code finds the tensor; a copy in the native layout is kept alive in ``keep``."""
    if letters == _MEMORY:
        tensor = tensor.transpose(1, 2)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
        keep.append(tensor)
    return tensor.data_ptr()


def _native_scalars(op: _Operator, dims: dict[str, int], options: tuple) -> list:
    """Sizes and options as the native functions take them (csrc/operators.h)."""
    scalars = _native.step_scalars(*options[1:]) if op.name == "memory_step" else options
    return [dims[letter] for letter in op.sizes] + list(scalars)


def _define(name: str, op: _Operator, inputs: dict[str, str], outputs: dict[str, str]) -> None:
    """Register ``torch.ops.ntm_fast.{name}``: tensors ``inputs``, then the options, to fresh tensors ``outputs``."""
    arguments = [f"Tensor {n}" for n in inputs] + [f"{kind} {n}" for n, kind in op.options.items()]
    returns = "Tensor" if len(outputs) == 1 else f"({', '.join(['Tensor'] * len(outputs))})"
    _LIBRARY.define(f"{name}({', '.join(arguments)}) -> {returns}")
    count = len(inputs)
    input_letters, output_letters = tuple(inputs.values()), tuple(outputs.values())
    single = len(outputs) == 1
    read = _reader(op._replace(inputs=inputs))

    def fake(*args):
        dims = read(args)
        results = [_empty(args[0], letters, dims) for letters in output_letters]
        return results[0] if single else tuple(results)

    def kernel(*args):
        dims = read(args)
        results = [_empty(args[0], letters, dims) for letters in output_letters]
        keep: list[Tensor] = []
        addresses = [_address(tensor, letters, keep) for tensor, letters in zip(args, input_letters)]
        addresses += [tensor.data_ptr() for tensor in results]
        _native.call(name, args[0], *_native_scalars(op, dims, args[count:]), *addresses)
        return results[0] if single else tuple(results)

    torch.library.register_fake(f"ntm_fast::{name}", fake, lib=_LIBRARY)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)


# --- autograd ---------------------------------------------------------------------------------------------------------


def grads_through(
    function: Callable, inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Differentiable gradients of a function in plain PyTorch: what a backward returns under ``create_graph``."""
    local = [x.view_as(x) for x in inputs]  # inputs may depend on each other; their aliases do not
    outputs = function(*local)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs, grads = zip(*[(output, grad) for output, grad in zip(outputs, grads) if grad is not None])
    wanted = [x for x in local if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in local]


def _function(op: _Operator) -> type[torch.autograd.Function]:
    """The autograd Function around an operator; its backward is one registered operator too."""
    count, nones = len(op.inputs), (None,) * len(op.options)
    kept = [index for index, name in enumerate(op.outputs) if name in op.saved]
    forward_op = getattr(torch.ops.ntm_fast, op.name).default
    backward_op = getattr(torch.ops.ntm_fast, f"{op.name}_backward").default

    class Function(torch.autograd.Function):
        twin = staticmethod(getattr(reference, op.name))
        plain = staticmethod(forward_op)  # without a graph

        @staticmethod
        def forward(ctx, *args):
            outputs = forward_op(*args)
            saved = (outputs,) if kept and isinstance(outputs, Tensor) else [outputs[index] for index in kept]
            ctx.save_for_backward(*args[:count], *saved)
            ctx.options = args[count:]
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            saved = ctx.saved_tensors
            if torch.is_grad_enabled():
                options = dict(zip(op.options, ctx.options))
                return (*grads_through(functools.partial(Function.twin, **options), saved[:count], grads), *nones)
            found = backward_op(*saved, *grads, *ctx.options)
            return (*(found if isinstance(found, (tuple, list)) else (found,)), *nones)

    Function.__name__ = Function.__qualname__ = op.name
    return Function


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_BY_NAME = {op.name: op for op in _OPERATORS}
for _op in _OPERATORS:
    _define(_op.name, _op, _op.inputs, _op.outputs)
    _define(
        f"{_op.name}_backward",
        _op,
        {
            **_op.inputs,
            **{name: _op.outputs[name] for name in _op.saved},
            **{f"grad_{name}": letters for name, letters in _op.outputs.items()},
        },
        {f"grad_{name}": letters for name, letters in _op.inputs.items()},
    )
    _FUNCTIONS[_op.name] = _function(_op)


# --- ntm_sequence: as many tensors as there are layers ----------------------------------------------------------------

CHECKPOINTS = {"auto": 0, "all": 1}  # as the operator has them; else a number
_SEQUENCE_OPTIONS = {"controller": "str", **_STEP_OPTIONS, "memory_checkpoint": "int"}


def _define_sequence() -> None:
    tensors = "Tensor inputs, Tensor memory, Tensor read_weights, Tensor write_weights, Tensor reads, Tensor[] state"
    tensors += ", Tensor[] weights, Tensor heads_weight, Tensor heads_bias, Tensor output_weight, Tensor output_bias"
    trail = "Tensor new_memory, Tensor[] trail"
    grads = "Tensor grad_outputs, Tensor[] grad_final"
    options = ", ".join(f"{kind} {name}" for name, kind in _SEQUENCE_OPTIONS.items())
    results = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[]"
    _LIBRARY.define(f"ntm_sequence({tensors}, {options}, bool keep) -> ({results})")
    _LIBRARY.define(f"ntm_sequence_backward({tensors}, {trail}, {grads}, {options}, bool needs_inputs) -> Tensor[]")
    for name, kernel, fake in (
        ("ntm_sequence", sequence.forward, sequence.fake),
        ("ntm_sequence_backward", sequence.backward, sequence.fake_backward),
    ):
        torch.library.register_fake(f"ntm_fast::{name}", fake, lib=_LIBRARY)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, kernel, key)


_define_sequence()


def nested(tensors: Sequence[Tensor], controller: str, last: int = 4) -> tuple:
    """ntm_sequence's tensors in a row -> as its signature groups them. ``last``: how many come after the weights."""
    states = len(reference.CONTROLLERS[controller].state)
    return *tensors[:5], tensors[5 : 5 + states], tensors[5 + states : -last], *tensors[-last:]


def in_a_row(arguments: tuple) -> tuple[Tensor, ...]:
    """The reverse of :func:`nested`."""
    *first, state, weights = arguments[:7]
    return *first, *state, *weights, *arguments[7:]


def grouped(outputs: tuple[Tensor, ...]) -> tuple:
    """ntm_sequence's outputs in a row -> as its signature groups them."""
    return *outputs[:5], outputs[5:]


def flat(function: Callable, last: int) -> Callable[..., tuple[Tensor, ...]]:
    """``function``, whose signature is ntm_sequence's up to the weights, tensors in a row in and out."""

    def flattened(*tensors: Tensor, controller: str, **options: Any) -> tuple[Tensor, ...]:
        *outputs, state = function(*nested(tensors, controller, last), controller=controller, **options)
        return *outputs, *state

    return flattened


_flat_sequence = flat(reference.ntm_sequence, last=4)


def watched(tensors: Iterable[Tensor] = ()) -> bool:
    """Whether somebody is to see registered operators: a tracer, a mode that intercepts them, tensors of a class that
    may."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return not _native.PLAIN.issuperset(map(type, tensors))


def _run_sequence(*args: Any, keep: bool = False) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Tensors and options in a row -> outputs and final state in a row, and the trail."""
    tensors, options = args[: -len(_SEQUENCE_OPTIONS)], args[-len(_SEQUENCE_OPTIONS) :]
    kernel = torch.ops.ntm_fast.ntm_sequence.default if watched(tensors) else sequence.forward
    *outputs, state, trail = kernel(*nested(tensors, options[0]), *options, keep)
    return (*outputs, *state), trail


class _NTMSequence(torch.autograd.Function):
    twin = staticmethod(_flat_sequence)

    @staticmethod
    def plain(*args):
        return _run_sequence(*args)[0]

    @staticmethod
    def forward(ctx, *args):
        outputs, trail = _run_sequence(*args, keep=True)
        tensors, ctx.options = args[: -len(_SEQUENCE_OPTIONS)], args[-len(_SEQUENCE_OPTIONS) :]
        ctx.save_for_backward(*tensors, outputs[1], *trail)
        ctx.set_materialize_grads(False)  # autograd's zeros of the memory would not lie as the memory does
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        count = len(saved) - 1 - len(sequence.Trail._fields)
        tensors, (memory, *trail) = saved[:count], saved[count:]
        nones = (None,) * len(_SEQUENCE_OPTIONS)
        if torch.is_grad_enabled():
            twin = functools.partial(_flat_sequence, **dict(zip(_SEQUENCE_OPTIONS, ctx.options)))
            return (*grads_through(twin, tensors, grads), *nones)
        grad_outputs, *grad_final = grads
        if grad_outputs is None:
            grad_outputs = tensors[0].new_zeros(*tensors[0].shape[:2], tensors[-1].shape[0])
        if any([grad is not None for grad in grad_final]):
            final = nested(tensors, ctx.options[0])[1:6]  # what has their shapes
            if tensors[1].dim() == 2:
                final = reference.for_batch(memory.shape[0], *final)
            final = memory, *final[1:4], *final[4]
            grad_final = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(final, grad_final)]
        else:
            grad_final = []
        needs_inputs = ctx.needs_input_grad[0]
        arguments = *nested(tensors, ctx.options[0]), memory, trail, grad_outputs, grad_final
        if watched(tensors):
            found = torch.ops.ntm_fast.ntm_sequence_backward.default(*arguments, *ctx.options, needs_inputs)
        else:  # the trail may go, unless backward may be asked for once more
            spend = not torch._C._autograd._get_current_graph_task_keep_graph()
            found = sequence.backward(*arguments, *ctx.options, needs_inputs, spend=spend)
        return found[-1] if needs_inputs else None, *found[: count - 1], *nones


_FUNCTIONS["ntm_sequence"] = _NTMSequence


def _sequence_operator(controller: str, states: int, weights: int, shared: bool) -> _Operator:
    """What :func:`_check` must know of an ntm_sequence with so many tensors, its state ``shared`` or each's own."""
    kind = reference.CONTROLLERS[controller]
    layers, left = divmod(weights, len(kind.weights))
    if states != len(kind.state):
        raise ValueError(
            f"ntm_sequence: state must be {len(kind.state)} tensors ({', '.join(kind.state) or 'none'}) for controller "
            f"{controller!r}; got {states}"
        )
    if layers == 0 or left:
        raise ValueError(
            f"ntm_sequence: weights must be {len(kind.weights)} tensors for each layer ({', '.join(kind.weights)}) for "
            f"controller {controller!r}; got {weights}"
        )
    letters = [
        {"weight_ih": "GH" if layer else "GX", "weight_hh": "GH"}.get(name, "G")
        for layer in range(layers)
        for name in kind.weights
    ]

    def derived(dims: dict[str, int], _: str, shift_range: int, *__: Any) -> dict[str, int]:
        columns = dims["I"] + dims["R"] * dims["M"]
        features = dims["H"] + dims["R"] * dims["M"]
        own = {"L": layers, "G": kind.gates * dims["H"], "X": columns, "F": features}
        return own | _step_dimensions(dims, shift_range)

    inputs = {"inputs": "TBI", "memory": _MEMORY, "read_weights": "BRN", "write_weights": "BWN", "reads": "BRM"}
    inputs |= {f"state[{index}]": "LBH" for index in range(states)}
    if shared:
        inputs = {name: letters if name == "inputs" else letters.replace("B", "") for name, letters in inputs.items()}
    inputs |= {f"weights[{index}]": own for index, own in enumerate(letters)}
    inputs |= {"heads_weight": "PH", "heads_bias": "P", "output_weight": "OF", "output_bias": "O"}
    return _Operator("ntm_sequence", "", inputs, {}, derived=derived)


_cached_sequence_operator = functools.cache(_sequence_operator)


# --- the public functions ---------------------------------------------------------------------------------------------


def why_not_native(device: torch.device, dtype: torch.dtype, name: str = "memory_step") -> str | None:
    """Why no native kernel serves operator ``name`` there; None when one does."""
    if dtype not in (torch.float32, torch.float64):
        return f"there are native kernels for float32 and float64, not for {dtype}"
    return _native.why_not(device.type, dtype is torch.float64, name)


def why_no_sequence(
    device: torch.device, dtype: torch.dtype, controller: str, machine: Callable[[], sequence.Machine]
) -> str | None:
    """Why no native :func:`ntm_sequence` takes such a machine, asked for where sizes matter; None when one does."""
    if controller == "feedforward":
        return "its controllers are LSTM and GRU, not feedforward"
    return why_not_native(device, dtype, "ntm_sequence") or sequence.why_no_room(
        device, dtype, machine, torch.is_grad_enabled()
    )


def faster_in_steps(device: torch.device, hidden_size: int) -> bool:
    """Whether such a controller's sequences are better served step by step than by :func:`ntm_sequence`.

    On CUDA a block multiplies by all of the controller's weights at every step. Beyond some size, cuBLAS, which deals
    them out among all blocks, makes up for the kernels that a step in a captured graph then takes.
    """
    return hidden_size > LARGEST_HIDDEN and device.type == "cuda"


def explain(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, module: Any = None
) -> dict[str, str]:
    """For every operator, what would serve tensors of that device and dtype: ``"native"``, or ``"reference: why"``.

    With ``module``, an NTMCell or FastNTM, what is said of ``ntm_sequence`` takes its sizes into account.
    """
    device = torch.device(device)
    reasons = {name: why_not_native(device, dtype, name) for name in (*_BY_NAME, "ntm_sequence")}
    if module is not None:
        reasons["ntm_sequence"] = module.why_no_sequence(device, dtype)
    return {name: "native" if reason is None else f"reference: {reason}" for name, reason in reasons.items()}


def transforming() -> bool:
    """Whether functorch or forward-mode AD is active: these need the reference."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
    )


def left_alone(tensors: Iterable[Tensor] = ()) -> bool:
    """Whether nothing is at work that has to see tensors or operators, or changes either."""
    return not (watched(tensors) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or transforming())


def _describe(letters: str) -> str:
    return "(" + ", ".join(letters) + ")"


def _check(op: _Operator, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    first_name, first = next(iter(op.inputs)), tensors[0]
    dims: dict[str, int] = {}
    owners: dict[str, str] = {}
    for (name, letters), tensor in zip(op.inputs.items(), tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op.name}: {name} must be a Tensor, got {type(tensor).__name__}")
        shape = tensor.shape
        if len(shape) != len(letters):
            raise ValueError(
                f"{op.name}: {name} must have shape {_describe(letters)}, {len(letters)} dimensions; got shape "
                f"{tuple(shape)}"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op.name}: {name} must be {first.dtype} as {first_name} is, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{op.name}: {name} must be on {first.device} as {first_name} is, got {tensor.device}")
        for letter, size in zip(letters, shape):
            if letter not in dims:
                dims[letter], owners[letter] = size, name
                if size == 0 and letter != "B":
                    raise ValueError(
                        f"{op.name}: {name} must not be empty, {letter} of {_describe(letters)} is 0; got shape "
                        f"{tuple(shape)}"
                    )
            elif dims[letter] != size:
                raise ValueError(
                    f"{op.name}: {name} must have shape {_describe(letters)} with {letter} = {dims[letter]} as "
                    f"in {owners[letter]}; got shape {tuple(shape)}"
                )
    if not first.is_floating_point():
        raise TypeError(f"{op.name}: {first_name} must have a floating dtype, got {first.dtype}")
    for letter, size in (op.derived(dims, *options.values()) if op.derived else {}).items():
        if letter in dims and dims[letter] != size:
            raise ValueError(
                f"{op.name}: {owners[letter]} must have {letter} = {size} entries for the other sizes "
                f"{ {k: v for k, v in dims.items() if k != letter} }; got {dims[letter]}"
            )
        dims[letter] = size
    if "K" in dims and not (dims["K"] % 2 == 1 and dims["K"] <= dims["N"]):
        raise ValueError(
            f"{op.name}: the number of shifts must be odd, 2S+1, and at most N = {dims['N']}; got {dims['K']}"
        )


def _call(
    op: _Operator,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    why_not: Callable[[], str | None] = lambda: None,
) -> Any:
    """Check, then let serve what can; ``why_not`` says what, beside device and dtype, speaks against native kernels."""
    first = tensors[0]
    if isinstance(first, Tensor) and not first.is_meta and torch.is_autocast_enabled(first.device.type):
        low = (torch.float16, torch.bfloat16)
        tensors = tuple(t.float() if isinstance(t, Tensor) and t.dtype in low else t for t in tensors)
        with torch.autocast(first.device.type, enabled=False):
            return _call(op, tensors, options, why_not)
    _check(op, tensors, options)
    function = _FUNCTIONS[op.name]
    if why_not_native(first.device, first.dtype, op.name) is not None or why_not() is not None:
        _native.warn_once(first.device.type)
        return function.twin(*tensors, **options)
    return _serve(function, tensors, options)


def _serve(function: type[torch.autograd.Function], tensors: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    """What is checked, on the native kernels unless something is at work that needs the reference."""
    if transforming():
        return function.twin(*tensors, **options)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return function.apply(*tensors, *options.values())
    return function.plain(*tensors, *options.values())


def _positive(op: str, name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{op}: {name} must be positive, got {value}")


def _check_step_options(
    op: str, shift_range: int, key_activation: str, add_activation: str, clip: float | None, eps: float
) -> None:
    if shift_range < 0:
        raise ValueError(f"{op}: shift_range must not be negative, got {shift_range}")
    for name, value in (("key_activation", key_activation), ("add_activation", add_activation)):
        if value not in _ACTIVATIONS:
            raise ValueError(f"{op}: {name} must be 'tanh' or 'identity', got {value!r}")
    if clip is not None:
        _positive(op, "clip", clip)
    _positive(op, "eps", eps)


def content_addressing(memory: Tensor, key: Tensor, beta: Tensor, *, eps: float = EPS) -> Tensor:
    _positive("content_addressing", "eps", eps)
    return _call(_BY_NAME["content_addressing"], (memory, key, beta), {"eps": eps})


def interpolate(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    return _call(_BY_NAME["interpolate"], (content, previous, gate), {})


def circular_shift(weights: Tensor, shift: Tensor) -> Tensor:
    return _call(_BY_NAME["circular_shift"], (weights, shift), {})


def sharpen(weights: Tensor, gamma: Tensor) -> Tensor:
    return _call(_BY_NAME["sharpen"], (weights, gamma), {})


def address(
    memory: Tensor,
    previous: Tensor,
    key: Tensor,
    beta: Tensor,
    gate: Tensor,
    shift: Tensor,
    gamma: Tensor,
    *,
    eps: float = EPS,
) -> Tensor:
    _positive("address", "eps", eps)
    return _call(_BY_NAME["address"], (memory, previous, key, beta, gate, shift, gamma), {"eps": eps})


def erase_add_write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    return _call(_BY_NAME["erase_add_write"], (memory, weights, erase, add), {})


def read(memory: Tensor, weights: Tensor) -> Tensor:
    return _call(_BY_NAME["read"], (memory, weights), {})


def memory_step(
    memory: Tensor,
    read_weights: Tensor,
    write_weights: Tensor,
    params: Tensor,
    *,
    shift_range: int,
    read_first: bool = False,
    key_activation: str = "tanh",
    add_activation: str = "tanh",
    clip: float | None = 20.0,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_step_options("memory_step", shift_range, key_activation, add_activation, clip, eps)
    options = {
        "shift_range": shift_range,
        "read_first": read_first,
        "key_activation": key_activation,
        "add_activation": add_activation,
        "clip": clip,
        "eps": eps,
    }
    return _call(_BY_NAME["memory_step"], (memory, read_weights, write_weights, params), options)


def lstm_gates(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    return _call(_BY_NAME["lstm_gates"], (gates, cell), {})


def gru_gates(input_gates: Tensor, hidden_gates: Tensor, hidden: Tensor) -> Tensor:
    return _call(_BY_NAME["gru_gates"], (input_gates, hidden_gates, hidden), {})


def ntm_sequence(
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
    *,
    controller: str = "lstm",
    shift_range: int,
    read_first: bool = False,
    key_activation: str = "tanh",
    add_activation: str = "tanh",
    clip: float | None = 20.0,
    eps: float = EPS,
    memory_checkpoint: str | int = "auto",
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    reference.check_lengths(lengths)
    if controller not in reference.CONTROLLERS:
        raise ValueError(
            f"ntm_sequence: controller must be {', '.join(map(repr, reference.CONTROLLERS))}, got {controller!r}"
        )
    if memory_checkpoint not in ("auto", "all") and not (isinstance(memory_checkpoint, int) and memory_checkpoint > 0):
        raise ValueError(
            f"ntm_sequence: memory_checkpoint must be 'auto', 'all' or a positive int, got {memory_checkpoint!r}"
        )
    _check_step_options("ntm_sequence", shift_range, key_activation, add_activation, clip, eps)
    options = {
        "controller": controller,
        "shift_range": shift_range,
        "read_first": read_first,
        "key_activation": key_activation,
        "add_activation": add_activation,
        "clip": clip,
        "eps": eps,
        "memory_checkpoint": CHECKPOINTS.get(memory_checkpoint, memory_checkpoint),
    }
    arguments, state, weights = (inputs, memory, read_weights, write_weights, reads), tuple(state), tuple(weights)

    def why_not() -> str | None:
        if torch.compiler.is_compiling() and controller != "feedforward":
            return None  # sizes may be symbols
        dtype = torch.float64 if heads_weight.dtype is torch.float64 else torch.float32  # autocast takes the rest to it
        return why_no_sequence(inputs.device, dtype, controller, machine)

    def machine() -> sequence.Machine:
        heads = read_weights.shape[-2], write_weights.shape[-2]
        sizes = state[0].shape[0], heads_weight.shape[1], tuple(memory.shape[-2:]), heads
        return sequence.Machine(controller, *sizes, shift_range)

    initial = memory, read_weights, write_weights, reads, *state
    shared = all(isinstance(x, Tensor) and x.dim() == 2 for x in initial)
    describe = _sequence_operator if torch.compiler.is_compiling() else _cached_sequence_operator
    return grouped(
        _call(
            describe(controller, len(state), len(weights), shared),
            in_a_row((*arguments, state, weights, heads_weight, heads_bias, output_weight, output_bias)),
            options,
            why_not,
        )
    )


def checked_sequence(
    arguments: tuple, options: tuple
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """:func:`ntm_sequence` of tensors, as it takes them, and options, as the operator does, that are known to be right
    and to be served."""
    tensors = in_a_row(arguments)
    if not left_alone(tensors):
        return grouped(_serve(_NTMSequence, tensors, dict(zip(_SEQUENCE_OPTIONS, options))))
    *outputs, state, _ = sequence.forward(*arguments, *options, False)
    return *outputs, tuple(state)


for _name in (*_BY_NAME, "ntm_sequence"):
    globals()[_name].__doc__ = getattr(reference, _name).__doc__
