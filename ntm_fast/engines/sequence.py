"""The sequence engine: a whole sequence in one native call, and the short way of repeated streamed calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from ..ops.sequence import checked_sequence
from ..ops.sequence_kernels import NO_TRAIL, call_forward, table_of
from ..ops.sequence_plan import plan, state_addresses
from ..ops.serving import in_float32
from ..spec import NTMState, SequenceOptions, SequenceTensors

REMEMBERED = 1024  # calls; when there are more, all are forgotten


def run(x: SequenceTensors, options: SequenceOptions) -> tuple[Tensor, NTMState]:
    """Outputs (T, B, O) and the final state. ``x`` has been checked. Autocast computes it in float32."""
    kind = "cpu" if x.inputs.is_cpu else x.inputs.device.type
    if not torch.is_autocast_enabled(kind):
        return checked_sequence(x, options)
    with torch.autocast(kind, enabled=False):
        row = in_float32(x.flatten())
        dtypes = {tensor.dtype for tensor in row}
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            raise TypeError(f"inputs, state and weights: got {names}, expected dtypes that autocast brings together")
        outputs, state = checked_sequence(SequenceTensors.unflatten(row, options.controller, x.lengths), options)
    if outputs.dtype is torch.float32:  # the dtype that the other engines' output layer gives
        outputs = outputs.to(torch.get_autocast_dtype(kind))
    return outputs, state


class Repeated(NamedTuple):
    """A call without backward, to be done again with other tensors of the same layouts.

    Only the native call remains: checks and choices depend on layouts and the module's configuration alone.
    """

    scalars: list[Any]
    state: int  # how many tensors a state has
    results: native.Layout  # of outputs and final state

    def __call__(self, inputs: Tensor, addresses: list[int]) -> tuple[Tensor, NTMState]:
        """``addresses``: of SequenceTensors in a row."""
        results, places = native.empty_as(self.results)
        first, last = 1, 1 + self.state
        initial, final = state_addresses(addresses[first:last]), state_addresses(places[1:])
        weights = table_of(addresses[last:])
        call_forward(self.scalars, inputs, weights, 0, addresses[0], places[0], initial, final, NO_TRAIL)
        return results[0], NTMState.unflatten(results[1:])


# The key: the layouts of a call's tensors and its module's configuration; nothing else decides. None: the call must not
# be repeated.
remembered: dict[Any, Repeated | None] = {}
UNKNOWN = object()  # a call that was not seen before


def remember(
    key: Any, x: SequenceTensors, options: SequenceOptions, outputs: Tensor, final: NTMState
) -> None:
    """Remember a call without backward by its results, which are views of native buffers.

    It cannot be repeated if its tensors had to be copied into the layouts that the native code takes.
    """
    inputs, memory, *others = x.flatten()
    in_place = all([tensor.is_contiguous() for tensor in (inputs, memory.mT, *others)])
    found = native.layouts((outputs, *final.flatten())) if in_place else None
    if len(remembered) >= REMEMBERED:
        remembered.clear()
    repeated = None
    if found is not None:
        scalars = plan(x, options, False).scalars("ntm_sequence")
        repeated = Repeated(scalars, len(final.flatten()), found[0])
    remembered[key] = repeated
