"""The engines: one native call for all steps (:mod:`sequence`), one for every memory step (:mod:`step`, on CUDA in
:mod:`graphs`), or the reference. :mod:`choose` says which one serves, and why not the others."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.serving import LOW_PRECISION, in_float32
from ..spec import NTMState, SequenceOptions, SequenceTensors
from . import sequence, step
from .choose import Choice, choose_engine, explain
from .graphs import empty_cache

__all__ = ["Choice", "choose_engine", "empty_cache", "explain", "run"]


def run(
    choice: Choice, x: SequenceTensors, options: SequenceOptions, records: list | None = None
) -> tuple[Tensor, NTMState]:
    """Run ``x``, which has been checked, on the chosen engine -> outputs (T, B, O), final state.

    ``records`` collects what a trace shows, step by step: as in :func:`reference.unroll`.
    """
    dtype = x.heads_weight.dtype
    if dtype in LOW_PRECISION and choice.engine != "reference":  # computed in float32, and rounded at the door
        wide = SequenceTensors.unflatten(in_float32(x.flatten()), options.controller, x.lengths)
        outputs, final = run(choice, wide, options, records)
        if records is not None:
            records[:] = [tuple(tensor.to(dtype) for tensor in step) for step in records]
        return outputs.to(dtype), final.to(dtype)
    if choice.engine == "sequence" and records is None:
        return sequence.run(x, options)
    weight, bias = x.output_weight, x.output_bias
    assert weight is not None and bias is not None
    without = x._replace(output_weight=None, output_bias=None)
    if choice.engine == "reference":
        own = {**options.keywords(), "records": records, "lengths": x.lengths}
        features, *state = reference.unroll(reference, *without.arguments(), **own)
        final = NTMState(*state)
    else:
        features, final = step.run(without, options, records)
    return reference.output_layer(features, weight, bias, x.lengths), final
