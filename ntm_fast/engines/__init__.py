"""The engines: one native call for all steps (:mod:`sequence`), one for every memory step (:mod:`step`, on CUDA in
:mod:`graphs`), or the reference. :mod:`choose` says which one serves, and why not the others."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

from torch import Tensor

from .. import reference
from ..ops.serving import LOW_PRECISION, in_float32
from ..spec import NTMState, SequenceOptions, SequenceTensors
from . import sequence, step
from .choose import Choice, choose_engine, explain
from .graphs import empty_cache

__all__ = ["Called", "Choice", "choose_engine", "empty_cache", "explain", "run"]


class Called(NamedTuple):
    """The parts of a machine that are called as modules, because something must see the calls; the others are None,
    and computed from their weights."""

    controller: Callable[..., Any] | None = None
    heads: Callable[[Tensor], Tensor] | None = None
    output: Callable[[Tensor], Tensor] | None = None


def run(
    choice: Choice,
    x: SequenceTensors,
    options: SequenceOptions,
    records: list | None = None,
    called: Called | None = None,
) -> tuple[Tensor, NTMState]:
    """Run ``x``, which has been checked, on the chosen engine -> outputs (T, B, O), final state.

    ``records`` collects what a trace shows, step by step: as in :func:`reference.unroll`. ``called``: only the step
    engine and the reference serve; of the parts that are called ``x`` needs no weights.
    """
    if not called and choice.engine != "reference" and x.heads_weight.dtype in LOW_PRECISION:
        # Computed in float32, and rounded at the door.
        dtype = x.heads_weight.dtype
        wide = SequenceTensors.unflatten(in_float32(x.flatten()), options.controller, x.lengths)
        outputs, final = run(choice, wide, options, records)
        if records is not None:
            records[:] = [tuple(tensor.to(dtype) for tensor in step) for step in records]
        return outputs.to(dtype), final.to(dtype)
    if choice.engine == "sequence" and records is None:
        return sequence.run(x, options)
    weight, bias = x.output_weight, x.output_bias
    without = x._replace(output_weight=None, output_bias=None)
    calls = {"call_controller": called.controller, "call_heads": called.heads} if called else {}
    if choice.engine == "reference":
        own = {**options.keywords(), "records": records, "lengths": x.lengths, **calls}
        features, *state = reference.unroll(reference, *without.arguments(), **own)
        final = NTMState(*state)
    else:
        features, final = step.run(without, options, records, calls)
    if called and called.output is not None:
        return reference.without_ended(called.output(features), x.lengths), final
    assert weight is not None and bias is not None
    return reference.output_layer(features, weight, bias, x.lengths), final
