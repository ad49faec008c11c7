"""The standard job: one training step of the copy task, on which all engines are compared.

Memory 128 x 20, one read and one write head, shifts -1..1, an LSTM controller of 100; T = 41 (20 vectors of 8 bits, a
delimiter, 20 vectors to say), 9 inputs, 8 outputs. A step is forward, loss, backward and RMSprop.
"""

from __future__ import annotations

import copy
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntm_fast import FastNTM, NTMCell

LENGTH, BITS, HIDDEN = 20, 8, 100
STEPS, INPUTS = 2 * LENGTH + 1, BITS + 1


def copy_batch(batch_size: int) -> tuple[Tensor, Tensor]:
    """Inputs (T, B, 9) and the bits (20, B, 8) to say in the last 20 steps."""
    bits = torch.randint(0, 2, (LENGTH, batch_size, BITS)).float()
    inputs = torch.zeros(STEPS, batch_size, INPUTS)
    inputs[:LENGTH, :, :BITS] = bits
    inputs[LENGTH, :, BITS] = 1
    return inputs, bits


class LSTM(nn.Module):
    """What a machine without a memory costs."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(INPUTS, HIDDEN), nn.Linear(HIDDEN, BITS)

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        return self.output(self.lstm(inputs)[0]), None


class CompiledSteps(nn.Module):
    """The reference, each step of it one graph of torch.compile."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = NTMCell(INPUTS, BITS, HIDDEN, engine="reference")
        self.step = torch.compile(self.cell, dynamic=False)

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        state = self.cell.initial_state(inputs.shape[1])
        outputs = []
        for x in inputs:
            y, state = self.step(x, state)
            outputs.append(y)
        return torch.stack(outputs), None


ENGINES: dict[str, Callable[[], nn.Module]] = {
    "step": lambda: FastNTM(INPUTS, BITS, HIDDEN, engine="step"),
    "reference": lambda: FastNTM(INPUTS, BITS, HIDDEN, engine="reference"),
    "compiled reference": CompiledSteps,
    "nn.LSTM": LSTM,
}


def make(engine: str) -> nn.Module:
    torch.manual_seed(0)
    return ENGINES[engine]()


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, bits = batch
    return F.binary_cross_entropy_with_logits(model(inputs)[0][-LENGTH:], bits)


def training_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """The function to time."""
    model = copy.deepcopy(model) if not isinstance(model, CompiledSteps) else model
    optimiser = torch.optim.RMSprop(model.parameters(), lr=1e-4, alpha=0.95, momentum=0.9)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss_of(model, batch).backward()
        optimiser.step()

    return step


def check_agreement(engine: str, batch: tuple[Tensor, Tensor]) -> None:
    """The engine's loss and each of its gradients are the reference's; nn.LSTM has nothing to agree with."""
    if engine in ("reference", "nn.LSTM"):
        return
    found = []
    for name in (engine, "reference"):
        model = make(name)
        loss = loss_of(model, batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, want in zip(*found):
        error = float((got - want).norm() / want.norm())
        # Forty-one steps of float32, from parameters whose gradients are small differences.
        if not error < 1e-3:
            raise AssertionError(f"{engine} and reference disagree by {error:.2g}: nothing to compare the speed of")
