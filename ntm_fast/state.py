"""What a Neural Turing Machine carries from one step to the next, and what it can show of itself."""

from __future__ import annotations

from typing import Callable, NamedTuple

from torch import Tensor


class NTMState(NamedTuple):
    """The state between two steps, batched here; for unbatched inputs every B is missing.

    As in ``nn.LSTM``, the batch is never first in the controller's state, and ``batch_first`` does not change that.
    """

    memory: Tensor  # (B, N, M)
    read_weights: Tensor  # (B, R, N)
    write_weights: Tensor  # (B, W, N)
    reads: Tensor  # (B, R, M)
    controller: tuple[Tensor, ...]  # each (layers, B, hidden): (h, c) for an LSTM, (h,) for a GRU, () for feedforward

    def map(self, function: Callable[[Tensor], Tensor]) -> NTMState:
        """Apply ``function`` to every tensor."""
        *memory, controller = self
        return NTMState(*map(function, memory), tuple(map(function, controller)))

    def detach(self) -> NTMState:
        """Cut the graph here: truncated backpropagation through time."""
        return self.map(Tensor.detach)

    def to(self, *args, **kwargs) -> NTMState:
        """Move or cast every tensor, as :meth:`torch.Tensor.to`."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))


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
