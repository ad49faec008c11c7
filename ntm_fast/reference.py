"""The Neural Turing Machine in plain PyTorch, one function per equation.

This is the ground truth that every native backend is tested against, and the fallback where none serves. It runs on
any floating dtype and any device and is differentiable to any order. Equation numbers are those of Graves, Wayne and
Danihelka, "Neural Turing Machines" (2014), section 3.

Shapes: B batch, H heads (R read, W write), N memory locations, M memory width, S shift range, 2S+1 shifts.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any, Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import CONTROLLERS, EPS, NTMState, by_layer, layers_in_row, layers_stacked, params_size

__all__ = [
    "CONTROLLERS",
    "HeadParameters",
    "address",
    "circular_shift",
    "content_addressing",
    "erase_add_write",
    "gru_gates",
    "head_parameters",
    "interpolate",
    "lstm_gates",
    "memory_step",
    "ntm_sequence",
    "params_size",
    "read",
    "sharpen",
    "unroll",
]


def content_addressing(memory: Tensor, key: Tensor, beta: Tensor, *, eps: float = EPS) -> Tensor:
    """Focus by content: softmax over locations of ``beta`` times the cosine of key and memory row (eqs. 5 and 6).

    memory (B, N, M), key (B, H, M), beta (B, H) -> (B, H, N). Norms are ``sqrt(|x|^2 + eps^2)``, so that a zero key
    or a zero row has a similarity of 0 rather than NaN.
    """
    eps = max(eps, math.sqrt(torch.finfo(memory.dtype).tiny))  # eps^2 must not underflow, as it would in float16
    key_norm = (key.square().sum(-1) + eps**2).sqrt()  # (B, H)
    row_norm = (memory.square().sum(-1) + eps**2).sqrt()  # (B, N)
    dot = key @ memory.transpose(1, 2)  # (B, H, N)
    cosine = dot / (key_norm.unsqueeze(-1) * row_norm.unsqueeze(1))
    return torch.softmax(beta.unsqueeze(-1) * cosine, dim=-1)


def interpolate(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    """Blend the content weighting with the previous one (eq. 7): content, previous (B, H, N), gate (B, H)."""
    gate = gate.unsqueeze(-1)
    return gate * content + (1 - gate) * previous


def circular_shift(weights: Tensor, shift: Tensor) -> Tensor:
    """Rotate by the circular convolution with ``shift`` (eq. 8): weights (B, H, N), shift (B, H, 2S+1) -> (B, H, N).

    ``shift[..., S + j]`` moves the focus by +j locations.
    """
    reach = shift.shape[-1] // 2
    turned = [shift[..., j + reach, None] * weights.roll(j, -1) for j in range(-reach, reach + 1)]
    return functools.reduce(torch.add, turned)


def sharpen(weights: Tensor, gamma: Tensor) -> Tensor:
    """Sharpen ``w_i^gamma / sum_j w_j^gamma`` (eq. 9): weights (B, H, N), gamma (B, H) -> (B, H, N).

    Computed as ``softmax(gamma * log w)``, which sums to one however large gamma is; the logarithm is taken of at
    least ``finfo(dtype).tiny``.
    """
    log_weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
    return torch.softmax(gamma.unsqueeze(-1) * log_weights, dim=-1)


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
    """A head's whole addressing (section 3.3): content, interpolation, shift, sharpening -> weights (B, H, N)."""
    content = content_addressing(memory, key, beta, eps=eps)
    gated = interpolate(content, previous, gate)
    return sharpen(circular_shift(gated, shift), gamma)


def erase_add_write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """Write with every head: all erases, then all adds (eqs. 3 and 4).

    memory (B, N, M), weights (B, H, N), erase and add (B, H, M) -> (B, N, M).
    """
    for w, e in zip(weights.unbind(1), erase.unbind(1)):
        memory = memory * (1 - w.unsqueeze(2) * e.unsqueeze(1))
    return memory + weights.transpose(1, 2) @ add


def read(memory: Tensor, weights: Tensor) -> Tensor:
    """Read the weighted sum of memory rows (eq. 2): memory (B, N, M), weights (B, H, N) -> (B, H, M)."""
    return weights @ memory


class HeadParameters(NamedTuple):
    """What the controller tells its heads, activated; H = R + W heads, the read heads first."""

    key: Tensor  # (B, H, M)
    beta: Tensor  # (B, H)         key strength, > 0
    gate: Tensor  # (B, H)         interpolation gate, in (0, 1)
    shift: Tensor  # (B, H, 2S+1)  sums to one
    gamma: Tensor  # (B, H)        sharpening, >= 1
    erase: Tensor  # (B, W, M)     in (0, 1)
    add: Tensor  # (B, W, M)


_ACTIVATIONS = {"tanh": torch.tanh, "identity": lambda x: x}


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # from the default, 20, on it is x alone: wrong by 2e-9, which float64 sees


def head_parameters(
    params: Tensor,
    read_heads: int,
    write_heads: int,
    memory_width: int,
    *,
    shift_range: int,
    key_activation: str = "tanh",
    add_activation: str = "tanh",
    clip: float | None = 20.0,
) -> HeadParameters:
    """Split raw parameters (..., P) and activate them.

    The layout, read heads first: for each head k (M), beta, g, s (2S+1, from -S to S), gamma; then for each write
    head e (M), a (M). Raw values are first clamped to +-clip, unless clip is None.
    """
    heads, width, shifts = read_heads + write_heads, memory_width, 2 * shift_range + 1
    if clip is not None:
        params = params.clamp(-clip, clip)
    addressing, writing = params.split([heads * (width + shifts + 3), 2 * write_heads * width], dim=-1)
    key, beta, gate, shift, gamma = addressing.unflatten(-1, (heads, -1)).split([width, 1, 1, shifts, 1], dim=-1)
    erase, add = writing.unflatten(-1, (write_heads, 2, width)).unbind(-2)
    return HeadParameters(
        key=_ACTIVATIONS[key_activation](key),
        beta=_softplus(beta.squeeze(-1)),
        gate=torch.sigmoid(gate.squeeze(-1)),
        shift=torch.softmax(shift, dim=-1),
        gamma=1 + _softplus(gamma.squeeze(-1)),
        erase=torch.sigmoid(erase),
        add=_ACTIVATIONS[add_activation](add),
    )


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
    """One step of the memory: every head addresses, the write heads write, the read heads read.

    memory (B, N, M), read_weights (B, R, N) and write_weights (B, W, N) of the previous step, raw head parameters
    params (B, P) as in :func:`head_parameters` -> reads (B, R, M), memory, read_weights, write_weights.

    By default the write heads address M_{t-1} and write M_t, then the read heads address and read M_t; with
    ``read_first`` the read heads address and read M_{t-1}.
    """
    readers, writers = read_weights.shape[1], write_weights.shape[1]
    p = head_parameters(
        params,
        readers,
        writers,
        memory.shape[2],
        shift_range=shift_range,
        key_activation=key_activation,
        add_activation=add_activation,
        clip=clip,
    )
    addressing = p.key, p.beta, p.gate, p.shift, p.gamma
    reading, writing = zip(*(parameter.split([readers, writers], dim=1) for parameter in addressing))

    write_weights = address(memory, write_weights, *writing, eps=eps)
    written = erase_add_write(memory, write_weights, p.erase, p.add)
    source = memory if read_first else written
    read_weights = address(source, read_weights, *reading, eps=eps)
    return read(source, read_weights), written, read_weights, write_weights


def lstm_gates(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The elementwise part of ``nn.LSTM``: gates (B, 4H) in the order i, f, g, o; cell (B, H) -> hidden, cell."""
    i, f, g, o = gates.chunk(4, dim=-1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def gru_gates(input_gates: Tensor, hidden_gates: Tensor, hidden: Tensor) -> Tensor:
    """The elementwise part of ``nn.GRU``, the reset gate applied after the product.

    input_gates (B, 3H) = W_i x + b_i and hidden_gates (B, 3H) = W_h h + b_h, both in the order r, z, n;
    hidden (B, H) -> hidden: ``n = tanh(i_n + r h_n)``, ``h' = (1 - z) n + z h``. The literature also writes the update
    gate the other way round, ``(1 - z) h + z n``: the same family with z replaced by 1 - z, that is, with the sign of
    its weights and biases flipped.
    """
    i_r, i_z, i_n = input_gates.chunk(3, dim=-1)
    h_r, h_z, h_n = hidden_gates.chunk(3, dim=-1)
    z = torch.sigmoid(i_z + h_z)
    n = torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n)
    return (1 - z) * n + z * hidden


def _lstm(kernels: Any, weights: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    weight, bias = torch.cat([weight_ih, weight_hh], 1), bias_ih + bias_hh  # one product a step
    return lambda x, hidden, cell: kernels.lstm_gates(F.linear(torch.cat([x, hidden], 1), weight, bias), cell)


def _gru(kernels: Any, weights: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    weight_ih, weight_hh, bias_ih, bias_hh = weights

    def step(x: Tensor, hidden: Tensor) -> tuple[Tensor]:
        gates = F.linear(x, weight_ih, bias_ih), F.linear(hidden, weight_hh, bias_hh)
        return (kernels.gru_gates(*gates, hidden),)

    return step


def _feedforward(kernels: Any, weights: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    weight, bias = weights
    return lambda x: (torch.tanh(F.linear(x, weight, bias)),)


# One layer of a controller: (kernels, its weights) -> a function (x (B, inputs), its state's tensors (B, H) ...) -> the
# new state's tensors, the hidden state first.
LAYERS: dict[str, Callable[[Any, Sequence[Tensor]], Callable[..., tuple[Tensor, ...]]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "feedforward": _feedforward,
}


Step = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]


def controller_step(kernels: Any, controller: str, weights: Sequence[Tensor]) -> Step:
    """A step of all layers: x (B, inputs), the states of the layers in a row, each (B, H) -> the last layer's hidden
    state, and the new states."""
    kind = CONTROLLERS[controller]
    layers = [LAYERS[controller](kernels, own) for own in by_layer(weights, len(kind.weights))]
    count = len(kind.state)

    def step(x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        found: list[Tensor] = []
        for index, layer in enumerate(layers):
            x, *rest = layer(x, *states[index * count : (index + 1) * count])
            found += (x, *rest)[:count]
        return x, found

    return step


def _module_step(
    controller: Callable[..., Any], count: int, x: Tensor, states: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The same by a module, whose state has ``count`` tensors (L, B, H)."""
    hidden, state = controller(x, layers_stacked(states, count))
    return hidden, layers_in_row(state)


def _unless(over: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """``new``, but ``old`` for the sequences (B,) that are over; tensors (B, ...)."""
    return [torch.where(over.view(-1, *[1] * (x.dim() - 1)), y, x) for x, y in zip(new, old)]


def unroll(
    kernels: Any,
    inputs: Tensor,
    memory: Tensor,
    read_weights: Tensor,
    write_weights: Tensor,
    reads: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    heads_weight: Tensor,
    heads_bias: Tensor,
    *,
    controller: str = "lstm",
    records: list | None = None,
    lengths: Tensor | None = None,
    call_controller: Callable[..., Any] | None = None,
    call_heads: Callable[[Tensor], Tensor] | None = None,
    **options,
) -> tuple:
    """:func:`ntm_sequence` up to its output layer, step by step around ``kernels``, which has ``memory_step`` and the
    gates: :mod:`ops` or this module -> features (T, B, H + R M), the last layer's h_t and r_t, and the final state.
    ``records`` collects each step's read weights, write weights, reads and raw head parameters. ``lengths`` (B,): a
    step that a sequence does not take leaves its state, and its features are 0. ``call_controller`` and ``call_heads``
    take the place of these weights: functions of x (B, inputs) and the controller's state, each (L, B, H), -> the
    hidden state (B, H) and the state; and of the hidden state -> raw head parameters (B, P).
    """
    if call_controller is None:
        step = controller_step(kernels, controller, weights)
    else:
        step = functools.partial(_module_step, call_controller, len(state))
    states = layers_in_row(state)
    features: list[Tensor] = []
    over = None if lengths is None else ended(lengths, len(inputs))
    inputs = without_ended(inputs, lengths)  # what is not looked at may be NaN
    for t, x in enumerate(inputs.unbind(0)):
        hidden = torch.cat([x, reads.flatten(1)], 1)
        hidden, new = step(hidden, states)
        states = new if over is None else _unless(over[t], new, states)
        params = F.linear(hidden, heads_weight, heads_bias) if call_heads is None else call_heads(hidden)
        before = reads, memory, read_weights, write_weights
        after = kernels.memory_step(*before[1:], params, **options)
        reads, memory, read_weights, write_weights = after if over is None else _unless(over[t], after, before)
        features += (hidden, reads.flatten(1))
        if records is not None:
            records.append((read_weights, write_weights, reads, params))
    # (B, T (H + R M)), then time first: one copy instead of one per step
    width = hidden.shape[1] + reads.shape[1] * reads.shape[2]
    stacked = torch.cat(features, 1).view(inputs.shape[1], inputs.shape[0], width).transpose(0, 1)
    stacked = without_ended(stacked, lengths)
    return stacked, memory, read_weights, write_weights, reads, layers_stacked(states, len(state))


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
    """A whole sequence: controller, heads, memory and output layer through all T steps.

    ::

        h_t = controller([x_t, r_{t-1}])        params_t = W_heads h_t + b_heads
        r_t, memory and weights = memory_step(memory, weights, params_t)
        y_t = W_output [h_t, r_t] + b_output

    Args:
        inputs: (T, B, I), T at least 1.
        memory, read_weights, write_weights, reads: the state before the first step, (B, N, M), (B, R, N), (B, W, N)
            and (B, R, M).
        state: the controller's, L layers of H units: (hidden, cell) for an LSTM, (hidden,) for a GRU, () for
            feedforward; each (L, B, H). The whole state may lack its B: it is one for all sequences then.
        weights: layer by layer, as ``nn.LSTM`` and ``nn.GRU`` have them, weight_ih (G, I + R M) or, above the first
            layer, (G, H); weight_hh (G, H); bias_ih and bias_hh (G,). G is 4H for an LSTM, 3H for a GRU; feedforward
            layers of tanh units, G = H, have weight_ih and bias_ih alone.
        heads_weight, heads_bias: (P, H) and (P,), where P is :func:`params_size`.
        output_weight, output_bias: (O, H + R M) and (O,).
        controller: ``"lstm"``, ``"gru"`` or ``"feedforward"``.
        shift_range, read_first, key_activation, add_activation, clip, eps: as in :func:`memory_step`.
        memory_checkpoint: which memories the native backward keeps: ``"all"``, those of every K-th step for a number
            K, or ``"auto"``, chosen by size. It changes no answer.
        lengths: (B,) integers 0..T, a tensor or a list: so many steps each sequence takes. Its outputs after them are
            0, its final state is that after its own last step, and its inputs there are not looked at.

    Returns:
        outputs (T, B, O); then the final memory, read_weights, write_weights, reads and controller's state, a tuple.

    Raises:
        TypeError, ValueError: from :mod:`ops`, naming the argument whose type, shape, dtype or device is wrong.
    """
    steps, batch, _ = inputs.shape
    lengths = check_lengths(lengths, steps, batch, inputs.device)
    initial = NTMState(memory, read_weights, write_weights, reads, tuple(state))
    if all(x.dim() == 2 for x in initial.flatten()):
        initial = initial.for_batch(batch)
    features, *final = unroll(
        sys.modules[__name__],
        inputs,
        *initial,
        weights,
        heads_weight,
        heads_bias,
        controller=controller,
        shift_range=shift_range,
        read_first=read_first,
        key_activation=key_activation,
        add_activation=add_activation,
        clip=clip,
        eps=eps,
        lengths=lengths,
    )
    return output_layer(features, output_weight, output_bias, lengths), *final


_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}


def check_lengths(lengths: Any, steps: int, batch: int, device: torch.device) -> Tensor | None:
    """Lengths as a tensor (B,) on the device; None where all sequences take all steps.

    ``lengths``: integers 0..T, one for each sequence, a tensor on any device or a list. Those on a GPU are not checked,
    because that would wait for the GPU: below 0 is taken as 0, above T as T.

    Raises TypeError or ValueError where they are something else.
    """
    if lengths is None:
        return None
    expected = f"expected {batch} integers from 0 to {steps}, one for each sequence"
    values: Sequence[int] | None = None  # where they are known
    if isinstance(lengths, Tensor):
        if lengths.dtype not in _INTEGERS:
            raise TypeError(f"lengths: got dtype {lengths.dtype}, {expected}")
        if lengths.layout is not torch.strided or lengths.is_nested or lengths.is_meta and device.type != "meta":
            found = f"a tensor without numbers in a row ({lengths.layout}, {lengths.device})"
            raise TypeError(f"lengths: got {found}, {expected}")
        if lengths.shape != (batch,):
            raise ValueError(f"lengths: got shape {tuple(lengths.shape)}, {expected}")
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
        if type(lengths) is Tensor and lengths.is_cpu and not torch.compiler.is_compiling() and not wrapped(lengths):
            values = lengths.tolist()
    else:
        whole = isinstance(lengths, (list, tuple))
        if not whole or not all(isinstance(n, int) and not isinstance(n, bool) for n in lengths):
            raise TypeError(f"lengths: got {lengths!r}, {expected}")
        if len(lengths) != batch:
            raise ValueError(f"lengths: got shape ({len(lengths)},), {expected}")
        values = lengths
    if values is not None:
        for index, value in enumerate(values):
            if not 0 <= value <= steps:
                raise ValueError(f"lengths: got {value} for sequence {index}, {expected}")
        if all(value == steps for value in values) and not torch.compiler.is_compiling():
            return None
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    return lengths.to(device, torch.int64, non_blocking=True).clamp(0, steps)


def ended(lengths: Tensor, steps: int) -> Tensor:
    """(T, B): whether a sequence does not take that step."""
    return lengths <= torch.arange(steps, device=lengths.device).unsqueeze(1)


def output_layer(features: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor | None = None) -> Tensor:
    """features (T, B, F) -> outputs (T, B, O), 0 at steps that a sequence does not take."""
    return without_ended(F.linear(features, weight, bias), lengths)


def without_ended(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (T, B, ...), with 0 at steps that a sequence does not take."""
    if lengths is None:
        return x
    over = ended(lengths, len(x))
    return x.masked_fill(over.view(*over.shape, *[1] * (x.dim() - 2)), 0)
