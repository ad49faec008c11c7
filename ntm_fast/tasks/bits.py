"""What tasks have in common whose answers are bits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..spec import check_options
from .task import Batch


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean binary cross-entropy, in nats a bit, over the answers: logits (T, B, O) -> scalar."""
    loss = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none")
    mask = batch.mask.unsqueeze(-1)
    # where, not a product: what is outside the answer must not matter even if it is infinite
    return loss.where(mask, 0).sum() / (mask.sum() * logits.shape[-1])


def wrong_bits(logits: Tensor, batch: Batch) -> Tensor:
    """The number of wrongly answered bits, over all sequences of the batch: logits (T, B, O) -> integer scalar.

    A bit is answered 1 where its logit is positive and 0 elsewhere; NaN is always wrong.
    """
    right = (logits > 0).where(batch.targets > 0.5, logits <= 0)
    return (~right & batch.mask.unsqueeze(-1)).sum()


class BitTask:
    """Base of a :class:`Task` whose answers are bits: outputs are their logits, targets 0 and 1.

    The loss is their mean cross-entropy, the error the number of wrong bits of a sequence.
    """

    unit = "bits a sequence"
    solved_below = 0.01
    validate_below = 1.0

    def __post_init__(self) -> None:
        check_options(self)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """:func:`answer_loss`."""
        return answer_loss(outputs, batch)

    def errors(self, outputs: Tensor, batch: Batch) -> Tensor:
        """:func:`wrong_bits`."""
        return wrong_bits(outputs, batch)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The probability that a bit is 1."""
        return outputs.sigmoid()
