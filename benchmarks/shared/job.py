"""The standard job: one training step of the copy task, on which all engines are compared.

Memory 128 x 20, one read and one write head, shifts -1..1, an LSTM or GRU controller of 100; T = 41 (20 vectors of 8
bits, a delimiter, 20 vectors to say), 9 inputs, 8 outputs. A step is forward, loss, backward and RMSprop.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntm_fast import FastNTM, NTMCell

STEPS, BITS, HIDDEN = 41, 8, 100
INPUTS = BITS + 1
CONTROLLERS = ("lstm", "gru")
ENGINES = ("sequence", "step", "reference", "compiled reference", "no memory")
Batch = tuple[Tensor, Tensor]


def copy_batch(batch_size: int, steps: int = STEPS, device: str = "cpu") -> Batch:
    """Inputs (T, B, 9) and the bits (length, B, 8) to say in the last steps; the same ones for the same sizes."""
    length = (steps - 1) // 2
    bits = torch.randint(0, 2, (length, batch_size, BITS), generator=torch.Generator().manual_seed(batch_size)).float()
    inputs = torch.zeros(steps, batch_size, INPUTS)
    inputs[:length, :, :BITS] = bits
    inputs[length, :, BITS] = 1
    return inputs.to(device), bits.to(device)


class Bare(nn.Module):
    """What a controller without a memory costs: ``nn.LSTM`` or ``nn.GRU``, and a Linear."""

    def __init__(self, controller: str, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.rnn = {"lstm": nn.LSTM, "gru": nn.GRU}[controller](INPUTS, hidden)
        self.output = nn.Linear(hidden, BITS)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.rnn(inputs, state)
        return self.output(hidden), state


class CompiledSteps(nn.Module):
    """The reference, each step of it one graph of torch.compile. ``mode`` is torch.compile's, the rest NTMCell's."""

    def __init__(self, controller: str, hidden: int = HIDDEN, mode: str | None = None, **options: Any) -> None:
        super().__init__()
        self.cell = NTMCell(INPUTS, BITS, hidden, controller=controller, engine="reference", **options)
        # fullgraph: where torch gives up on compiling again, it would go on in eager mode without a word.
        self.step = torch.compile(self.cell, dynamic=False, fullgraph=True, mode=mode)

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        torch.compiler.cudagraph_mark_step_begin()  # what a graph returned in the sequence before may be overwritten
        state = self.cell.initial_state(inputs.shape[1])
        outputs = []
        for x in inputs:
            y, state = self.step(x, state)
            outputs.append(y)
        return torch.stack(outputs), None


def make(controller: str, engine: str, hidden: int = HIDDEN, **options: Any) -> nn.Module:
    """A fresh model, its parameters those of every other engine's; ``options`` are of FastNTM or CompiledSteps."""
    torch.manual_seed(0)
    if engine == "no memory":
        return Bare(controller, hidden)
    if engine == "compiled reference":
        # What was compiled for other models and sizes counts towards the most that torch keeps of one function.
        torch.compiler.reset()
        return CompiledSteps(controller, hidden, **options)
    return FastNTM(INPUTS, BITS, hidden, controller=controller, engine=engine, **options)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    inputs, bits = batch
    return F.binary_cross_entropy_with_logits(model(inputs)[0][-len(bits) :], bits)


def training_step(model: nn.Module, batch: Batch, capturable: bool = False) -> Callable[[], None]:
    """The function to time; it trains the model. ``capturable``: it can be captured into a CUDA graph."""
    settings = dict(lr=1e-4, alpha=0.95, momentum=0.9, capturable=capturable)
    optimiser = torch.optim.RMSprop(model.parameters(), **settings)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss_of(model, batch).backward()
        optimiser.step()

    return step


def forward_only(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """The function to time."""

    @torch.no_grad()
    def forward() -> None:
        model(batch[0])

    return forward


def stream(model: nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    """The next step's output at each call, the state carried along; to be called under no_grad. ``inputs``: (T, B, I),
    over and over."""
    steps, state, t = inputs.split(1), None, 0

    def step() -> Tensor:
        nonlocal state, t
        output, state = model(steps[t % len(steps)], state)
        t += 1
        return output

    return step


class TorchCallsAround(nn.Module):
    """What a streamed step cannot do without of PyTorch: the price of admission that the rest of a step adds to.

    The call of a module, and the tensors that are returned, allocated: outputs, memory, weights, reads and the
    controller's state. Checks of arguments, the native call and all else between these count as the step's own.
    """

    def __init__(self, model: FastNTM) -> None:
        super().__init__()
        n, m = model.memory_locations, model.memory_width
        self.shapes = [(1, 1, BITS), (1, m, n), (1, 1, n), (1, 1, n), (1, 1, m)]
        self.shapes += [(1, 1, HIDDEN)] * len(model.controller.state_names)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, memory, *rest = (inputs.new_empty(shape) for shape in self.shapes)
        return outputs, (memory.mT, *rest)


def answers(model: nn.Module, batch: Batch, chunk: int | None = None) -> dict[str, Tensor]:
    """All that engines must agree on: the outputs, computed without grad, the loss, and every gradient.

    ``chunk``: so many sequences at a time, for who cannot hold all of them.
    """
    size = batch[0].shape[1]
    parts = list(zip(*(x.split(chunk or size, dim=1) for x in batch)))
    with torch.no_grad():
        found = {"outputs": torch.cat([model(part[0])[0] for part in parts], 1)}
    model.zero_grad(set_to_none=True)
    found["loss"] = torch.zeros((), device=batch[0].device)
    for part in parts:
        loss = loss_of(model, part) * (part[0].shape[1] / size)
        loss.backward()
        found["loss"] += loss.detach()
    # A compiled model's parameters have other names, in the same order.
    for name, parameter in model.named_parameters():
        found[f"gradient of {name.removeprefix('cell.')}"] = parameter.grad
    model.zero_grad(set_to_none=True)
    return found


def compare(engine: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raises AssertionError where an engine's answers are not the reference's."""
    if found.keys() != wanted.keys():
        raise AssertionError(f"{engine} and reference answer different things: {found.keys() ^ wanted.keys()}")
    for name, want in wanted.items():
        error = float((found[name] - want).norm() / want.norm())
        # Forty-one steps of float32, from parameters whose gradients are small differences.
        if not error < 1e-3:
            raise AssertionError(
                f"{engine} and reference disagree on {name} by {error:.2g}: nothing to compare the speed of"
            )


@torch.no_grad()
def check_stream(engine: str, model: FastNTM, batch: Batch) -> None:
    """Raises AssertionError where step by step does not give what the reference gives for the whole sequence."""
    step = stream(model, batch[0])
    found = torch.cat([step() for _ in batch[0]])
    compare(
        f"{engine}, streamed,",
        {"outputs": found},
        {"outputs": make(model.controller_type, "reference")(batch[0])[0]},
    )
