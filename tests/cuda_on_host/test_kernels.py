"""Every CUDA kernel under the sanitizers, as it is and with faults planted in it."""

from __future__ import annotations

import re
from typing import Callable, NamedTuple

import pytest
from cuda_on_host import plant
from cuda_on_host.replay import replay
from helpers.cases import OPERATORS

SEQUENCE = "ntm_sequence"

KERNELS = {f"{op}{direction}" for op in OPERATORS for direction in ("", "_backward")}


def both(*operators: str) -> set[str]:
    return {kernel for kernel in KERNELS if kernel.removesuffix("_backward") in operators}


def backward(*operators: str) -> set[str]:
    return {f"{op}_backward" for op in operators}


# What the kernels do, from which follows what can go wrong in them
STAGED = KERNELS - both("interpolate", "lstm_gates", "gru_gates")  # copy something to scratch
SCRATCH = both(
    "content_addressing", "circular_shift", "address", "memory_step"
)  # need some even where nothing is staged
RINGS = both("circular_shift", "address", "memory_step")
SUMS = both("content_addressing", "sharpen", "address", "memory_step") | backward("interpolate")
ROWS = {"read"} | both("memory_step") | backward("content_addressing", "circular_shift", "address", "erase_add_write")
NUMBERS = backward("content_addressing", "interpolate", "sharpen", "address", "memory_step")  # one by one

BLOCKS = {"block", "unstaged", "workspace"}
WAYS = {(kernel, way) for kernel in KERNELS for way in ("warps", *BLOCKS)}
WAYS -= {(kernel, "workspace") for kernel in KERNELS - SCRATCH} | {(kernel, "warps") for kernel in both("memory_step")}


@pytest.mark.parametrize("kind", ("address", "thread"))
def test_every_kernel_is_clean(recorded, programs, kind: str) -> None:
    """And gives the same bits as without the sanitizer."""
    outcomes = replay(programs(kind), list(recorded.values()))
    for outcome in outcomes:
        assert outcome.right, outcome.printed
    assert {(outcome.kernel, outcome.way) for outcome in outcomes} == WAYS


SEQUENCES = {(f"{SEQUENCE}{direction}", way) for direction in ("", "_backward") for way in ("held", "in place")}


@pytest.mark.parametrize("kind", ("address", "thread"))
def test_sequences_are_clean(recorded_sequences, programs, kind: str) -> None:
    outcomes = replay(programs(kind), recorded_sequences)
    for outcome in outcomes:
        assert outcome.right, outcome.printed
    assert {(outcome.kernel, outcome.way) for outcome in outcomes} == SEQUENCES


class Fault(NamedTuple):
    kind: str
    words: str  # of what finds it
    where: Callable[[str, str], bool]  # whether a kernel has it that runs in that way


FAULTS = {
    "no __syncthreads": Fault(
        "thread",
        "data race",
        lambda k, way: way in BLOCKS and k in SUMS | ROWS | RINGS or way == "block" and k in STAGED,
    ),
    "no __syncwarp": Fault("thread", "data race", lambda k, way: way == "warps" and k in STAGED),
    "no barrier in rows": Fault("thread", "data race", lambda k, way: way in BLOCKS and k in ROWS),
    "no barrier in sums": Fault("thread", "data race", lambda k, way: way in BLOCKS and k in SUMS),
    # Everywhere else a barrier or a sum comes before an item's scratch is written again.
    "no barrier between items": Fault(
        "thread", "data race", lambda k, way: (k, way) == ("circular_shift", "workspace")
    ),
    "half a block in __syncthreads": Fault("address", "divergent", lambda k, way: way in BLOCKS),
    "half a warp in __syncwarp": Fault("address", "divergent", lambda k, way: way == "warps"),
    "half a warp in a shuffle": Fault("address", "divergent", lambda k, way: k in SUMS | ROWS),
    "tiles go one too far": Fault("address", "", lambda k, way: True),  # next to an array, or in another with numbers
    "scratch one too far": Fault(
        "address", "use-after-poison", lambda k, way: k in {"unstaged": SCRATCH, "workspace": ()}.get(way, STAGED)
    ),
    "workspace too small": Fault("address", "use-after-poison", lambda k, way: way == "workspace"),
    "last element unwritten": Fault("address", "other numbers", lambda k, way: k != "read"),  # which writes by rows
    "number unwritten": Fault("address", "other numbers", lambda k, way: k in NUMBERS),
    "row unwritten": Fault("address", "other numbers", lambda k, way: k in ROWS),
    "copy one short": Fault("address", "other numbers", lambda k, way: k in STAGED and way in ("warps", "block")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(recorded, programs, name: str) -> None:
    """In every kernel that has them, and nothing is found in the others."""
    fault = FAULTS[name]
    wrong = [outcome for outcome in replay(programs(fault.kind), list(recorded.values()), name) if not outcome.right]
    found = {(outcome.kernel, outcome.way) for outcome in wrong}
    expected = {(kernel, way) for kernel, way in WAYS if fault.where(kernel, way)}
    assert found == expected, f"missed: {sorted(expected - found)}, found besides: {sorted(found - expected)}"
    for outcome in wrong:
        assert fault.words in outcome.printed, outcome.printed


class SequenceFault(NamedTuple):
    kind: str
    words: str
    where: Callable[[str], bool] = lambda kernel: True  # in whichever way it runs


SEQUENCE_FAULTS = {
    "no barrier of a tile": SequenceFault("thread", "data race"),
    "no barrier of a group": SequenceFault("thread", "data race"),
    "half a group in its barrier": SequenceFault("address", "divergent"),
    "groups share": SequenceFault("thread", "data race"),
    "blocks share segments": SequenceFault("thread", "data race", lambda k: k.endswith("backward")),
    "a whole tile at the end": SequenceFault("address", ""),
    "too little room": SequenceFault("address", "use-after-poison", lambda k: k.endswith("backward")),  # for segments
    "too little is shared": SequenceFault("address", "use-after-poison"),
    "a column lost": SequenceFault("address", "other numbers"),
    "a weight lost": SequenceFault("address", "other numbers"),
}


@pytest.mark.parametrize("name", SEQUENCE_FAULTS)
def test_faults_planted_in_sequences_are_found(recorded_sequences, programs, name: str) -> None:
    fault = SEQUENCE_FAULTS[name]
    wrong = [outcome for outcome in replay(programs(fault.kind), recorded_sequences, name) if not outcome.right]
    assert {(outcome.kernel, outcome.way) for outcome in wrong} == {ways for ways in SEQUENCES if fault.where(ways[0])}
    for outcome in wrong:
        assert fault.words in outcome.printed, outcome.printed


@pytest.mark.parametrize("name", plant.BARRIERS)
def test_every_barrier_is_needed(recorded, recorded_sequences, programs, name: str) -> None:
    file, _ = plant.BARRIERS[name]
    operator = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.split()[1].removesuffix("Backward")).lower()
    if not file.startswith("core/element/"):
        operator = "circular_shift" if file == "core/shift.h" else "memory_step"
    calls = recorded_sequences[:2] if file.startswith("core/sequence/") else [recorded[operator]]
    wrong = [outcome for outcome in replay(programs("thread"), calls, name) if not outcome.right]
    assert wrong and all("data race" in outcome.printed for outcome in wrong)


def test_every_planted_fault_is_tested() -> None:
    assert {*FAULTS, *SEQUENCE_FAULTS, *plant.BARRIERS} == {*plant.FAULTS}
