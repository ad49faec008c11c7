"""The sequence engine's loop over time: all T steps in one native call forward and one backward.

The native loop does what is recurrent. Left to PyTorch as large products: the inputs' share of the first layer's gates,
and every weight gradient, from the gradients of the gates and of the raw head parameters that the backward leaves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _native, ops

if TYPE_CHECKING:
    from .recurrence import Plan

ALL_MEMORIES = 1 << 21  # bytes of memories up to which every step's is kept: beyond, writing them again is faster


def kept_every(checkpoint: str | int, steps: int, memory_bytes: int) -> int:
    """Every how many steps a memory is kept: 1 keeps all, else about sqrt(T) keeps the least.

    ``memory_bytes`` are those of the whole batch's memory, B N M numbers.
    """
    if isinstance(checkpoint, int):
        return min(checkpoint, steps)
    if checkpoint == "all" or steps * memory_bytes <= ALL_MEMORIES:
        return 1
    return math.isqrt(steps)


class SequenceTape:
    """A sequence on its way forward, and what its backward needs: see :class:`recurrence.StepTape`."""

    def __init__(self, plan: Plan, keep: bool, inputs: Tensor, tensors: tuple[Tensor, ...]):
        (memory, read_weights, write_weights, reads), state, weights, heads = plan.split(tensors)
        heads_weight, heads_bias = heads
        self.gru, self.keep, self.layers = plan.controller == "gru", keep, plan.layers
        self.steps, self.batch, self.inputs_size = inputs.shape
        self.inputs = inputs.reshape(self.steps * self.batch, -1)
        self.hidden_size, self.gates = heads_weight.shape[1], weights[0][0].shape[0]
        self.read_size = reads[0].numel()
        step = ops.step_sizes(memory, read_weights, write_weights, plan.options[0])
        memory_bytes = memory.numel() * memory.element_size()
        self.every = kept_every(plan.memory_checkpoint, self.steps, memory_bytes) if keep else self.steps
        sizes = self.steps, self.batch, self.layers, self.hidden_size, self.gru, *step, self.every
        self.scalars = *sizes, *ops.step_scalars(plan.options)
        self.initial = [memory.transpose(1, 2).contiguous(), read_weights.contiguous(), write_weights.contiguous()]
        self.initial += [reads.contiguous(), *(tensor.contiguous() for tensor in state)]
        if self.gru:
            self.initial.append(self._empty(0))  # no cell

        flat = []
        for layer, (weight_ih, weight_hh, bias_ih, bias_hh) in enumerate(weights):
            fed = weight_ih if layer else weight_ih[:, self.inputs_size :]
            bias_x = bias_ih if self.gru else bias_ih + bias_hh
            if not layer:
                self.weight_inputs, bias_inputs = weight_ih[:, : self.inputs_size], bias_x
            both = (fed, weight_hh) if self.gru else (torch.cat([fed, weight_hh], 1),)
            flat += (*(weight.flatten() for weight in both), bias_x, bias_hh)
        self.flat = torch.cat([*flat, heads_weight.flatten(), heads_bias])

        slots = self.steps if keep else 1
        shape = self.batch, self.gates
        self.x = self._empty(self.steps + (self.layers - 1) * slots, *shape)
        x = self.x[: self.steps].view(-1, self.gates)
        torch.addmm(bias_inputs, self.inputs, self.weight_inputs.t(), out=x)
        self.y = self._empty(self.layers * slots if self.gru else 0, *shape)
        self.hidden = self._empty(self.layers - 1, slots, self.batch, self.hidden_size)  # of the layers below the last
        self.cell = self._empty(0 if self.gru else self.layers * slots, self.batch, self.hidden_size)
        self.params = self._empty(slots, self.batch, heads_weight.shape[0])
        self.features = self._empty(self.steps, self.batch, self.hidden_size + self.read_size)
        kept = self.steps if keep else 0
        self.read_weights = self._empty(kept, *self.initial[1].shape)
        self.write_weights = self._empty(kept, *self.initial[2].shape)
        self.memory = self._empty((self.steps - 1) // self.every, *self.initial[0].shape)

    def _empty(self, *shape: int) -> Tensor:
        return self.inputs.new_empty(shape)

    def _call(self, name: str, scalars: tuple, *tensors: Tensor) -> None:
        _native.call(name, self.inputs, *scalars, *[tensor.data_ptr() for tensor in tensors])

    def forward(self) -> tuple[Tensor, ...]:
        """-> features (T, B, hidden + R M), then the final state's tensors."""
        state = [tensor.clone() for tensor in self.initial]
        trail = self.x, self.y, self.hidden, self.cell, self.params, self.features
        trail += self.read_weights, self.write_weights, self.memory
        self._call("sequence", (*self.scalars, self.keep), self.flat, *state, *trail)
        memory, read_weights, write_weights, reads, *controller = state
        features, self.features = self.features, None  # torch keeps it, with the other outputs that backward needs
        return features, memory.transpose(1, 2), read_weights, write_weights, reads, *controller[: 2 - self.gru]

    def backward(
        self, needs_inputs: bool, again: bool, outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """As :meth:`recurrence.StepTape.backward`."""
        features, final_memory, *_ = outputs
        features, final_memory = features.contiguous(), final_memory.transpose(1, 2).contiguous()
        grad_features, memory, read_weights, write_weights, reads, *controller = grads
        fresh = lambda tensor: tensor.clone(memory_format=torch.contiguous_format)  # noqa: E731
        grad = [fresh(memory.transpose(1, 2)), *map(fresh, (read_weights, write_weights, reads, *controller))]
        if self.gru:
            grad.append(self._empty(0))
        grad_features = grad_features.contiguous()
        # A step's gates are done with when their gradients are known: these take their place, unless asked for again.
        grad_x = torch.empty_like(self.x) if again else self.x
        grad_y = torch.empty_like(self.y) if again else self.y
        grad_params = torch.empty_like(self.params)
        memory_0, read_weights_0, write_weights_0, _, *controller_0 = self.initial
        self._call(
            "sequence_backward",
            self.scalars,
            self.flat,
            memory_0,
            read_weights_0,
            write_weights_0,
            *controller_0,
            final_memory,
            self.x,
            self.y,
            self.hidden,
            self.cell,
            self.params,
            features,
            self.read_weights,
            self.write_weights,
            self.memory,
            grad_features,
            *grad,
            grad_x,
            grad_y,
            grad_params,
        )

        def before(first: Tensor, all_steps: Tensor) -> Tensor:
            """What each step met, (T, B, size): the initial value, then each step's but the last."""
            return torch.cat([first.reshape(1, self.batch, -1), all_steps[:-1]])

        hidden = [*self.hidden, features[..., : self.hidden_size]]
        grad_x = grad_x.view(self.layers, self.steps * self.batch, -1)
        grad_y = grad_y.view(self.layers, self.steps * self.batch, -1) if self.gru else grad_x
        weights = []
        for layer in range(self.layers):
            if layer:
                met = [hidden[layer - 1]]
            else:
                reads = before(self.initial[3], features[..., self.hidden_size :])
                met = [self.inputs.view(self.steps, self.batch, -1), reads]
            met.append(before(self.initial[4][layer], hidden[layer]))
            x, y = grad_x[layer], grad_y[layer]
            grad_bias_ih = x.sum(0)
            if self.gru:
                grad_weight_ih = x.t() @ torch.cat(met[:-1], -1).flatten(0, 1)
                grad_weight_hh, grad_bias_hh = y.t() @ met[-1].flatten(0, 1), y.sum(0)
            else:  # one product for both
                joined = x.t() @ torch.cat(met, -1).flatten(0, 1)
                columns = joined.shape[1] - self.hidden_size
                grad_weight_ih, grad_weight_hh = joined[:, :columns], joined[:, columns:]
                grad_bias_hh = grad_bias_ih
            weights += grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh
        params = grad_params.flatten(0, 1)
        heads = params.t() @ hidden[-1].flatten(0, 1), params.sum(0)
        grad_inputs = None
        if needs_inputs:
            grad_inputs = (grad_x[0] @ self.weight_inputs).view(self.steps, self.batch, -1)
        memory, read_weights, write_weights, grad_reads, *controller = grad
        states = memory.transpose(1, 2), read_weights, write_weights, grad_reads, *controller[: 2 - self.gru]
        return grad_inputs, *states, *weights, *heads
