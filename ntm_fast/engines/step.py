"""The step engine's loop over time: one autograd node for a whole sequence.

What is recurrent runs step by step on the native kernels, without autograd's bookkeeping between them. What is not
(the inputs' share of the gates, every weight gradient) is one large product over all steps. Where autograd, a compiler
or a transform must see every step, the loop in plain PyTorch, :func:`reference.unroll`, runs around the operators.

T time, B batch, I inputs, H hidden, F what a layer is fed at every step: the reads for the first layer, the hidden
state of the layer below for the others.
"""

from __future__ import annotations

import functools
from typing import Any, Sequence

import torch
from torch import Tensor

from .. import native, ops, reference, spec
from ..ops.registration import grads_through, once_only
from ..ops.serving import transforming, watched
from ..spec import CONTROLLERS, NTMState, SequenceOptions, SequenceTensors
from . import graphs


class _Layer:
    """One controller layer over a sequence: steps forward, steps backward, then its weight gradients.

    ``inputs`` (T B, I) are known beforehand, ``fed`` inputs arrive with each step. Without ``keep`` nothing is stored
    for backward.
    """

    def __init__(self, weights: tuple[Tensor, ...], inputs: Tensor, steps: int, state: tuple[Tensor, ...], keep: bool):
        self.inputs, self.steps, self.keep = inputs, steps, keep
        self.state = tuple(tensor.contiguous() for tensor in state)  # each (B, H)
        self.batch = inputs.shape[0] // steps
        self.split = inputs.shape[1]  # the columns of weight_ih before this one belong to the inputs, the rest to fed

    def _empty(self, *shape: int) -> Tensor:
        return self.inputs.new_empty(shape)

    def _per_step(self, *shape: int) -> tuple[Tensor, ...]:
        """A tensor (T, *shape) cut by steps; without ``keep``, the same memory at every step."""
        if self.keep:
            return self._empty(self.steps, *shape).unbind(0)
        return (self._empty(*shape),) * self.steps

    def forward(self, t: int, fed: Tensor) -> Tensor:
        """fed (B, F) -> the hidden state (B, H); also moves ``state`` on."""
        raise NotImplementedError

    def start_backward(self, grad_state: tuple[Tensor, ...]) -> None:
        raise NotImplementedError

    def backward(self, t: int, grad_hidden: Tensor) -> Tensor:
        """The gradient that reaches the hidden state of step t from outside this layer -> the gradient of fed."""
        raise NotImplementedError

    def finish(self, needs_inputs: bool) -> tuple[Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Gradients of the inputs (T B, I), of the weights and of the initial state."""
        raise NotImplementedError


class _LSTM(_Layer):
    def __init__(self, weights, inputs, steps, state, keep):
        super().__init__(weights, inputs, steps, state, keep)
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        self.hidden_size, columns = weight_hh.shape[1], weight_ih.shape[1]
        self.weight_inputs = weight_ih[:, : self.split]
        self.weight = torch.cat([weight_ih[:, self.split :], weight_hh], 1)  # (4H, F + H)
        self.gates = torch.addmm(bias_ih + bias_hh, inputs, self.weight_inputs.t()).view(steps, self.batch, -1).unbind()
        self.joined = self._per_step(self.batch, columns - self.split + self.hidden_size)  # [fed, hidden] of each step
        self.cells = [self.state[1]]

    def forward(self, t, fed):
        hidden, cell = self.state
        torch.cat([fed, hidden], 1, out=self.joined[t])
        gates = self.gates[t].addmm_(self.joined[t], self.weight.t())
        hidden, new_cell = torch.empty_like(hidden), torch.empty_like(cell)
        _run("lstm_gates", self.batch, self.hidden_size, gates, cell, hidden, new_cell)
        self.state = hidden, new_cell
        if self.keep:
            self.cells.append(new_cell)
        return hidden

    def start_backward(self, grad_state):
        self.grad_hidden, grad_cell = grad_state
        self.grad_cell = grad_cell.contiguous()
        self.grad_gates = self._empty(self.steps, self.batch, 4 * self.hidden_size)
        self.grad_gates_at = self.grad_gates.unbind()

    def backward(self, t, grad_hidden):
        grad_hidden = grad_hidden + self.grad_hidden
        grad_cell = torch.empty_like(self.grad_cell)
        _run(
            "lstm_gates_backward",
            self.batch,
            self.hidden_size,
            self.gates[t],
            self.cells[t],
            self.cells[t + 1],
            grad_hidden,
            self.grad_cell,
            self.grad_gates_at[t],
            grad_cell,
        )
        self.grad_cell = grad_cell
        grad_joined = self.grad_gates_at[t] @ self.weight
        fed = grad_joined.shape[1] - self.hidden_size
        self.grad_hidden = grad_joined[:, fed:]
        return grad_joined[:, :fed]

    def finish(self, needs_inputs):
        grad_gates = self.grad_gates.flatten(0, 1)
        joined = torch.stack(self.joined).flatten(0, 1)
        rows = grad_gates.t()
        over_joined = rows @ joined
        fed = joined.shape[1] - self.hidden_size
        grad_weight_ih = torch.cat([rows @ self.inputs, over_joined[:, :fed]], 1)
        grad_bias = grad_gates.sum(0)
        grad_inputs = grad_gates @ self.weight_inputs if needs_inputs else None
        weights = grad_weight_ih, over_joined[:, fed:], grad_bias, grad_bias
        return grad_inputs, weights, (self.grad_hidden, self.grad_cell)


class _GRU(_Layer):
    def __init__(self, weights, inputs, steps, state, keep):
        super().__init__(weights, inputs, steps, state, keep)
        weight_ih, self.weight_hh, bias_ih, self.bias_hh = weights
        self.hidden_size = self.weight_hh.shape[1]
        self.weight_inputs, self.weight_fed = weight_ih[:, : self.split], weight_ih[:, self.split :]
        self.x = torch.addmm(bias_ih, inputs, self.weight_inputs.t()).view(steps, self.batch, -1).unbind()
        self.y = self._per_step(self.batch, 3 * self.hidden_size)
        self.fed, self.hidden = [], [self.state[0]]

    def forward(self, t, fed):
        (hidden,) = self.state
        self.x[t].addmm_(fed, self.weight_fed.t())
        torch.addmm(self.bias_hh, hidden, self.weight_hh.t(), out=self.y[t])
        new_hidden = torch.empty_like(hidden)
        _run("gru_gates", self.batch, self.hidden_size, self.x[t], self.y[t], hidden, new_hidden)
        self.state = (new_hidden,)
        if self.keep:
            self.fed.append(fed)
            self.hidden.append(new_hidden)
        return new_hidden

    def start_backward(self, grad_state):
        (self.grad_hidden,) = grad_state
        shape = self.steps, self.batch, 3 * self.hidden_size
        self.grad_x, self.grad_y = self._empty(*shape), self._empty(*shape)
        self.grad_x_at, self.grad_y_at = self.grad_x.unbind(), self.grad_y.unbind()

    def backward(self, t, grad_hidden):
        grad_new = grad_hidden + self.grad_hidden
        grad_hidden = torch.empty_like(grad_new)
        grad_x, grad_y = self.grad_x_at[t], self.grad_y_at[t]
        before = self.x[t], self.y[t], self.hidden[t]
        _run("gru_gates_backward", self.batch, self.hidden_size, *before, grad_new, grad_x, grad_y, grad_hidden)
        self.grad_hidden = grad_hidden.addmm_(grad_y, self.weight_hh)
        return grad_x @ self.weight_fed

    def finish(self, needs_inputs):
        grad_x, grad_y = self.grad_x.flatten(0, 1), self.grad_y.flatten(0, 1)
        fed, hidden = torch.stack(self.fed).flatten(0, 1), torch.stack(self.hidden[:-1]).flatten(0, 1)
        grad_inputs = grad_x @ self.weight_inputs if needs_inputs else None
        grad_weight_ih = torch.cat([grad_x.t() @ self.inputs, grad_x.t() @ fed], 1)
        return grad_inputs, (grad_weight_ih, grad_y.t() @ hidden, grad_x.sum(0), grad_y.sum(0)), (self.grad_hidden,)


class _FeedForward(_Layer):
    def __init__(self, weights, inputs, steps, state, keep):
        super().__init__(weights, inputs, steps, state, keep)
        weight, bias = weights
        self.weight_inputs, self.weight_fed = weight[:, : self.split], weight[:, self.split :]
        self.hidden = torch.addmm(bias, inputs, self.weight_inputs.t()).view(steps, self.batch, -1).unbind()
        self.fed = []

    def forward(self, t, fed):
        if self.keep:
            self.fed.append(fed)
        return self.hidden[t].addmm_(fed, self.weight_fed.t()).tanh_()

    def start_backward(self, grad_state):
        self.grad = []

    def backward(self, t, grad_hidden):
        hidden = self.hidden[t]
        self.grad.append(grad_hidden * (1 - hidden * hidden))
        return self.grad[-1] @ self.weight_fed

    def finish(self, needs_inputs):
        grad = torch.stack(self.grad[::-1]).flatten(0, 1)
        fed = torch.stack(self.fed).flatten(0, 1)
        grad_inputs = grad @ self.weight_inputs if needs_inputs else None
        return grad_inputs, (torch.cat([grad.t() @ self.inputs, grad.t() @ fed], 1), grad.sum(0)), ()


_LAYERS: dict[str, type[_Layer]] = {"lstm": _LSTM, "gru": _GRU, "feedforward": _FeedForward}


def _run(name: str, batch: int, hidden_size: int, *tensors: Tensor) -> None:
    native.call(name, tensors[0], (batch, hidden_size), [tensor.data_ptr() for tensor in tensors])


def _step_scalars(state: NTMState, options: SequenceOptions) -> list[Any]:
    """What memory_step takes besides tensors, in the native order."""
    sizes = dict(zip("BNM", state.memory.shape))
    sizes |= {"R": state.read_weights.shape[1], "W": state.write_weights.shape[1]}
    values = sizes | spec.native_values(spec.STEP_OPTIONS, options.step)
    return [values[name] for name in native.signature("memory_step").scalars]


class StepTape:
    """A sequence on its way forward, and what backward needs of it.

    ``row``: SequenceTensors without an output layer, in a row. ``keep``: whether there may be a backward.
    """

    def __init__(self, options: SequenceOptions, keep: bool, row: Sequence[Tensor]) -> None:
        kind = CONTROLLERS[options.controller]
        x = SequenceTensors.unflatten(row, options.controller, output=False)
        inputs, (memory, read_weights, write_weights, reads, state) = x.inputs, x.initial
        self.heads_weight, self.heads_bias = x.heads_weight, x.heads_bias
        self.keep = keep
        self.steps, self.batch, _ = inputs.shape
        self.scalars = _step_scalars(x.initial, options)
        self.memory = [memory.transpose(1, 2).contiguous()]
        # The memories after every step; without ``keep`` two take turns. The last one is apart, because it is returned.
        kept = self.steps - 1 if keep else min(self.steps - 1, 2)
        self.history = [torch.empty_like(self.memory[0]) for _ in range(kept)]
        self.read_weights, self.write_weights = [read_weights.contiguous()], [write_weights.contiguous()]
        self.params: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self.reads = reads.contiguous()
        self.layers = []
        flat = inputs.reshape(self.steps * self.batch, -1)
        for layer, own in enumerate(spec.by_layer(x.weights, len(kind.weights))):
            layer_state = tuple(tensor[layer] for tensor in state)
            self.layers.append(_LAYERS[options.controller](own, flat, self.steps, layer_state, keep))
            flat = flat[:, :0]  # the layers above have no inputs of their own

    def _call(self, name: str, *tensors: Tensor) -> None:
        native.call(name, tensors[0], self.scalars, [tensor.data_ptr() for tensor in tensors])

    def forward(self) -> tuple[Tensor, ...]:
        """-> features (T, B, hidden + R M), then the final state's tensors."""
        features: list[Tensor] = []
        memory, read_weights, write_weights = self.memory[0], self.read_weights[0], self.write_weights[0]
        reads = self.reads
        for t in range(self.steps):
            hidden = reads.view(self.batch, -1)
            for layer in self.layers:
                hidden = layer.forward(t, hidden)
            params = torch.addmm(self.heads_bias, hidden, self.heads_weight.t())
            before = memory, read_weights, write_weights
            # Without backward two memories take turns.
            last = t == self.steps - 1
            memory = torch.empty_like(memory) if last else self.history[t if self.keep else t % 2]
            reads, read_weights, write_weights = map(torch.empty_like, (reads, read_weights, write_weights))
            self._call("memory_step", *before, params, reads, memory, read_weights, write_weights)
            features += (hidden, reads.view(self.batch, -1))
            if self.keep:
                self.params.append(params)
                self.hidden.append(hidden)
            if self.keep and not last:
                self.memory.append(memory)
                self.read_weights.append(read_weights)
                self.write_weights.append(write_weights)
        width = hidden.shape[1] + reads[0].numel()
        stacked = torch.cat(features, 1).view(self.batch, self.steps, width).transpose(0, 1)
        states = zip(*(layer.state for layer in self.layers))
        return (
            stacked,
            memory.transpose(1, 2),
            read_weights,
            write_weights,
            reads,
            *(torch.stack(tensors) for tensors in states),
        )

    def backward(
        self, needs_inputs: bool, outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the outputs -> of the inputs (T, B, I), the initial state's tensors and the weights.

        ``outputs``: the memory, read and write weights that :meth:`forward` returned, which the tape does not hold.
        """
        memory, read_weights, write_weights = outputs
        memories = [*self.memory, memory.transpose(1, 2).contiguous()]
        all_read_weights = [*self.read_weights, read_weights.contiguous()]
        all_write_weights = [*self.write_weights, write_weights.contiguous()]
        features, memory, read_weights, write_weights, reads, *state = grads
        hidden_size = self.hidden[0].shape[1]
        for index, layer in enumerate(self.layers):
            layer.start_backward(tuple(tensor[index] for tensor in state))
        grad_hidden_at = features[..., :hidden_size].unbind()
        grad_reads_at = features[..., hidden_size:].unbind()
        after = [memory.transpose(1, 2).contiguous(), read_weights.contiguous(), write_weights.contiguous()]
        before = [torch.empty_like(tensor) for tensor in after]
        grad_params = self.params[0].new_empty(self.steps, *self.params[0].shape)
        grad_params_at = grad_params.unbind()
        fed = reads.reshape(self.batch, -1)
        for t in reversed(range(self.steps)):
            grad_memory, *grad_weights = after
            self._call(
                "memory_step_backward",
                memories[t],
                all_read_weights[t],
                all_write_weights[t],
                self.params[t],
                memories[t + 1],
                all_read_weights[t + 1],
                all_write_weights[t + 1],
                fed + grad_reads_at[t],
                grad_memory,
                *grad_weights,
                *before,
                grad_params_at[t],
            )
            after, before = before, after if t < self.steps - 1 else [torch.empty_like(tensor) for tensor in before]
            fed = torch.addmm(grad_hidden_at[t], grad_params_at[t], self.heads_weight)
            for layer in reversed(self.layers):
                fed = layer.backward(t, fed)
        flat = grad_params.flatten(0, 1)
        heads = flat.t() @ torch.stack(self.hidden).flatten(0, 1), flat.sum(0)
        found = [layer.finish(needs_inputs and not index) for index, layer in enumerate(self.layers)]
        flat_inputs = found[0][0]
        grad_inputs = None if flat_inputs is None else flat_inputs.view(self.steps, self.batch, -1)
        weights = [grad for _, layer_weights, _ in found for grad in layer_weights]
        states = [torch.stack(tensors) for tensors in zip(*(layer_state for _, _, layer_state in found))]
        grad_memory, *grad_weights = after
        return grad_inputs, grad_memory.transpose(1, 2), *grad_weights, fed.view_as(reads), *states, *weights, *heads


class _StepSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: SequenceOptions, *row: Tensor) -> tuple[Tensor, ...]:
        ctx.options = options
        ctx.tape = _tape(options, True, ctx.needs_input_grad[1], row)
        outputs = ctx.tape.forward()
        # torch keeps the outputs that backward needs: so it notices when they are changed in place. A tape that held
        # them would hold itself, through their graph.
        ctx.save_for_backward(*outputs[1:4], *row)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        memory, read_weights, write_weights, *row = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *grads_through(functools.partial(_twin, **ctx.options.keywords()), row, grads)
        with native.without_autocast(memory.device.type):  # backward may be called in autocast
            found = ctx.tape.backward(ctx.needs_input_grad[1], (memory, read_weights, write_weights), grads)
        if once_only():
            ctx.tape = None  # freed now, as saved tensors are, not with the last output
        return None, *found


def _twin(*row: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """:func:`reference.unroll`, tensors in a row in and out."""
    x = SequenceTensors.unflatten(row, options["controller"], output=False)
    features, *final = reference.unroll(reference, *x.arguments(), **options)
    return features, *NTMState(*final).flatten()


def _tape(options: SequenceOptions, keep: bool, needs_inputs: bool, row: Sequence[Tensor]) -> Any:
    """A StepTape; on CUDA, if such a call has come often enough, one captured into graphs."""
    make = functools.partial(StepTape, options, keep)
    if watched():  # a mode must see what is computed
        return make(row)
    return graphs.tape(make, options.flatten(), row, keep, needs_inputs)


def in_one_node(device_type: str) -> bool:
    """Whether a sequence can be one node of autograd's graph: nothing must see every step."""
    return not (torch.compiler.is_compiling() or transforming() or torch.is_autocast_enabled(device_type))


def run(
    x: SequenceTensors, options: SequenceOptions, records: list | None = None, calls: dict[str, Any] | None = None
) -> tuple[Tensor, NTMState]:
    """The features (T, B, H + R M) and the final state. ``x`` has been checked, and has no output layer.

    ``records``: as in :func:`reference.unroll`. ``calls``: its ``call_controller`` and ``call_heads``.
    """
    whole = options.controller in _LAYERS and in_one_node(x.inputs.device.type) and x.lengths is None
    calls = calls or {}
    if records is not None or x.inputs.shape[1] == 0 or not whole or any(calls.values()):
        own = {**options.keywords(), "records": records, "lengths": x.lengths, **calls}
        features, *final = reference.unroll(ops, *x.arguments(), **own)
        return features, NTMState(*final)
    row = x.flatten()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in row):
        features, *final = _StepSequence.apply(options, *row)
    else:
        features, *final = _tape(options, False, False, row).forward()
    return features, NTMState.unflatten(final)
