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


# What the kernels do. It decides which faults can occur in them.
STAGED = KERNELS - both("interpolate", "lstm_gates", "gru_gates")  # copy something to scratch
SCRATCH = both(
    "content_addressing", "circular_shift", "address", "memory_step"
)  # these need scratch even where nothing is copied to it
RINGS = both("circular_shift", "address", "memory_step")
SUMS = both("content_addressing", "sharpen", "address", "memory_step") | backward("interpolate")
ROWS = {"read"} | both("memory_step") | backward("content_addressing", "circular_shift", "address", "erase_add_write")
NUMBERS = backward("content_addressing", "interpolate", "sharpen", "address", "memory_step")  # write single numbers

BLOCKS = {"block", "unstaged", "workspace"}
WAYS = {(kernel, way) for kernel in KERNELS for way in ("warps", *BLOCKS)}
WAYS -= {(kernel, "workspace") for kernel in KERNELS - SCRATCH} | {(kernel, "warps") for kernel in both("memory_step")}


@pytest.mark.parametrize("kind", ("address", "thread"))
def test_every_kernel_is_clean(recorded, programs, kind: str) -> None:
    """No sanitizer reports anything, and the bits are those computed without one."""
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
    words: str  # in the message of what finds it
    where: Callable[[str, str], bool]  # whether a kernel that runs in that way has the fault


FAULTS = {
    "no __syncthreads": Fault(
        "thread",
        "data race",
        lambda k, way: way in BLOCKS and k in SUMS | ROWS | RINGS or way == "block" and k in STAGED,
    ),
    "no __syncwarp": Fault("thread", "data race", lambda k, way: way == "warps" and k in STAGED),
    "no barrier in rows": Fault("thread", "data race", lambda k, way: way in BLOCKS and k in ROWS),
    "no barrier in sums": Fault("thread", "data race", lambda k, way: way in BLOCKS and k in SUMS),
    # Elsewhere a barrier or a sum comes before the scratch of an item is written again.
    "no barrier between items": Fault(
        "thread", "data race", lambda k, way: (k, way) == ("circular_shift", "workspace")
    ),
    "half a block in __syncthreads": Fault("address", "divergent", lambda k, way: way in BLOCKS),
    "half a warp in __syncwarp": Fault("address", "divergent", lambda k, way: way == "warps"),
    "half a warp in a shuffle": Fault("address", "divergent", lambda k, way: k in SUMS | ROWS),
    "tiles go one too far": Fault("address", "", lambda k, way: True),  # beside an array, or in another array
    "scratch one too far": Fault(
        "address", "use-after-poison", lambda k, way: k in {"unstaged": SCRATCH, "workspace": ()}.get(way, STAGED)
    ),
    "workspace too small": Fault("address", "use-after-poison", lambda k, way: way == "workspace"),
    "last element unwritten": Fault("address", "other numbers", lambda k, way: k != "read"),  # read writes whole rows
    "number unwritten": Fault("address", "other numbers", lambda k, way: k in NUMBERS),
    "row unwritten": Fault("address", "other numbers", lambda k, way: k in ROWS),
    "copy one short": Fault("address", "other numbers", lambda k, way: k in STAGED and way in ("warps", "block")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(recorded, programs, name: str) -> None:
    """A fault is found in every kernel that has it, and in no other."""
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
    where: Callable[[str], bool] = lambda kernel: True  # however the kernel runs


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
    "what is over goes on": SequenceFault("address", "", lambda k: not k.endswith("backward")),
    "states in the order of lengths": SequenceFault("address", "other numbers"),
    "the last memory after step T alone": SequenceFault("address", "", lambda k: k.endswith("backward")),
    "what was left is fetched at step T alone": SequenceFault("address", "", lambda k: k.endswith("backward")),
}


@pytest.mark.parametrize("name", SEQUENCE_FAULTS)
def test_faults_planted_in_sequences_are_found(recorded_sequences, programs, name: str) -> None:
    fault = SEQUENCE_FAULTS[name]
    calls = [*recorded_sequences[:2], *recorded_sequences[4:]]  # memories held and in place, of both controllers
    wrong = [outcome for outcome in replay(programs(fault.kind), calls, name) if not outcome.right]
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
    last = replay(programs("thread"), calls, name, until_wrong=True)[-1]
    assert not last.right and "data race" in last.printed, last.printed


def test_every_planted_fault_is_tested() -> None:
    assert {*FAULTS, *SEQUENCE_FAULTS, *plant.BARRIERS} == {*plant.FAULTS}
