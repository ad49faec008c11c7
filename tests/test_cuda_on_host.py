"""The CUDA kernels where there is no GPU: compiled by g++ and run by tests/cuda_on_host, which finds what is wrong.

The operator tests run them as the backend ``cuda_on_host``. Here the same calls are repeated under the sanitizers, with
the kernels as they are and with faults planted in them; and the harness itself is tested.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import test_sequence
import torch
from comparison import CUDA_ON_HOST, OPERATORS, Case, check, required
from cuda_on_host import build, plant

from ntm_fast import _native, ops


def need(kind: str) -> None:
    reason = build.missing(kind)
    if reason and required("cuda_on_host"):
        pytest.fail(f"NTM_TEST_REQUIRE names cuda_on_host, which cannot be tested: {reason}")
    if reason:
        pytest.skip(reason)


def run(*command: str | Path, **environment: str) -> tuple[int, str]:
    """The exit code, and everything that was printed."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, **both, text=True, errors="replace", env={**os.environ, **environment})
    return done.returncode, done.stdout


# --- the harness ------------------------------------------------------------------------------------------------------

SELFTEST = build.HERE / "selftest.cpp"
# What finds each fault that selftest.cpp plants in the kernel of a block and of warps, and its words.
TEAM_FAULTS = [
    ("no barrier", "thread", "data race"),
    ("two blocks write", "thread", "data race"),
    ("one block ahead", "thread", "data race"),  # whose barriers come between
    ("read behind", "address", "use-after-poison"),
    ("read behind", "plain", "nan, expected"),
    ("write behind", "address", "use-after-poison"),
    ("write behind", "plain", "wrote behind its shared memory"),
    ("write before", "address", "use-after-poison"),
    ("write before", "plain", "wrote before its shared memory"),
    ("unwritten", "plain", "y[7] is nan"),
    ("half a warp waits", "plain", "thread 0 waits in __syncthreads at selftest.cpp"),
    ("half a block waits", "plain", "thread 0 waits in __syncthreads at selftest.cpp"),
    ("half a warp leaves", "plain", "thread 0 has left the kernel"),
    ("barrier and shuffle", "plain", "thread 16 waits in a shuffle"),
    ("two places", "plain", "thread 16 waits in __syncwarp"),
]
# And in the kernel of groups of warps
GROUP_FAULTS = [
    ("no barrier", "thread", "data race"),
    ("no barrier", "plain", "nan, expected"),
    ("one room", "thread", "data race"),
    ("groups mix", "thread", "data race"),
    ("no __syncthreads", "plain", "which is for threads 0 to 127 until the next __syncthreads"),
    ("one id for two", "plain", "another group's barrier: thread 128 waits in barrier 1 of 64 threads at selftest.cpp"),
    ("two counts", "plain", "another group's barrier: thread 32 waits in barrier 1 of 64 threads at selftest.cpp"),
    ("two ids in a warp", "plain", "thread 16 waits in barrier 2 of 128 threads"),
    ("two places", "plain", "thread 32 waits in barrier 1 of 128 threads"),
    ("half a warp waits", "plain", "thread 16 waits in __syncthreads"),
    ("half a warp leaves", "plain", "thread 16 waits in barrier 1 of 128 threads"),
    ("a warp leaves", "plain", "thread 160 has left the kernel"),
    ("a warp goes on", "plain", "thread 128 waits in barrier 15 of 64 threads"),
    ("count 0", "plain", "no such barrier: thread 0 waits in barrier 1 of 0 threads at selftest.cpp"),
    ("count 48", "plain", "no such barrier: thread 0 waits in barrier 1 of 48 threads"),
    ("count 512", "plain", "divergent: thread 0 waits in barrier 1 of 512 threads"),
    ("id 0", "plain", "no such barrier: thread 0 waits in barrier 0 of 128 threads"),
    ("id 16", "plain", "no such barrier: thread 0 waits in barrier 16 of 128 threads"),
]
HARNESS_FINDS = [
    *((team, *fault) for team in ("block", "warp") for fault in TEAM_FAULTS),
    *(("group", *fault) for fault in GROUP_FAULTS),
]


def selftest(kind: str, fault: str, team: str) -> tuple[int, str]:
    need(kind)
    return run(build.compiled((SELFTEST,), "selftest", kind), fault, team)


@pytest.mark.parametrize("team", ("block", "warp", "group"))
@pytest.mark.parametrize("kind", build.KINDS)
def test_harness_runs_what_is_right(kind: str, team: str) -> None:
    assert selftest(kind, "clean", team) == (0, "")


@pytest.mark.parametrize(("team", "fault", "kind", "words"), HARNESS_FINDS, ids=lambda x: x.replace(" ", "-"))
def test_harness_finds(team: str, fault: str, kind: str, words: str) -> None:
    code, printed = selftest(kind, fault, team)
    assert code != 0 and words in printed, printed


SEQUENCE = "ntm_sequence"

# --- calls, recorded from the operators and repeated by replay.cpp ----------------------------------------------------

MANY = dict(B=25, N=45, M=7, H=2, R=1, W=2, S=1)  # a warp each, four of them in a block
FEW = dict(B=5, N=70, M=9, H=2, R=2, W=2, S=2)  # a block each, of three warps
LARGE = dict(B=1, N=230, M=70, H=1)  # of eight warps, which sum fewer rows at once
# Of sequences: on the two multiprocessors a tile of four elements and one of the fifth, of four warps each. Rows that
# are aligned and such that are not, memories written again or all kept.
LSTM = dict(controller="lstm", layers=2, hidden=7, T=4, B=5, N=70, M=5, R=2, W=2, checkpoint=2)
GRU = dict(controller="gru", layers=2, hidden=8, T=2, B=5, N=70, M=4, checkpoint="all")
SEQUENCE_CASES = [
    *((LSTM, torch.float32, 49152), (GRU, torch.float32, 49152)),
    *((LSTM, torch.float32, 20000), (GRU, torch.float32, 14000)),  # memories are held in none
    *((LSTM, torch.float64, 49152), (GRU, torch.float64, 49152)),
]
READ_FIRST = {"options": (("read_first", True),)}
# With the bytes of shared memory that a block may have: enough for all, for some, for no more than the block's own.
CASES = [
    *((MANY, torch.float32, 49152), (FEW, torch.float32, 49152), (LARGE, torch.float32, 131072)),
    *((FEW, torch.float32, 6144), (FEW, torch.float32, 4160)),
    *((FEW, torch.float64, 49152), (FEW, torch.float64, 8256)),
]


class Recorder:
    """Stands in for ``_native.call`` and writes the calls as replay.cpp reads them."""

    def __init__(self, path: Path) -> None:
        self.path, self.call = path, _native.call

    def __call__(self, name: str, like: torch.Tensor, *values) -> None:
        find = sequence_arrays if name.startswith("ntm_sequence") else operator_arrays
        scalars, arrays = find(name, values)
        arrays = [(role, address, like.element_size() * count) for role, count, address in arrays]
        before = [ctypes.string_at(*place) if role != "out" else b"" for role, *place in arrays]
        self.call(name, like, *values)
        # What comes in shall stay; what goes out may be recorded at the same place, if the trail was good for one use.
        after = [was if role == "in" else ctypes.string_at(*place) for was, (role, *place) in zip(before, arrays)]
        words = [name, os.environ["NTM_HOST_SHARED"], int(like.dtype is torch.float64), len(scalars)]
        words += [*map(float, scalars), len(arrays), *(word for role, _, size in arrays for word in (role, size))]
        with self.path.open("ab") as file:
            file.write(f"{' '.join(map(str, words))}\n".encode())
            file.write(b"".join(piece for pair in zip(before, after) for piece in pair))


Array = tuple[str, int, int]  # "in", "out" or "both", how many numbers, where


def operator_arrays(name: str, values: tuple) -> tuple[tuple, list[Array]]:
    """Of a call's values, the sizes and options, and the arrays."""
    op = ops._BY_NAME[name.removesuffix("_backward")]
    dims = dict(zip(op.sizes, values))
    if op.derived:
        dims |= op.derived(dims, *([dims["K"] // 2] if op.options else []))
    inputs, outputs = list(op.inputs.values()), list(op.outputs.values())
    if name != op.name:
        inputs, outputs = [*inputs, *(op.outputs[saved] for saved in op.saved), *outputs], inputs
    letters = inputs + outputs
    counts = [math.prod(dims[letter] for letter in own) for own in letters]
    roles = ["in"] * len(inputs) + ["out"] * len(outputs)
    return values[: -len(letters)], list(zip(roles, counts, values[-len(letters) :]))


def sequence_arrays(name: str, values: tuple) -> tuple[tuple, list[Array]]:
    """The same of a whole sequence, whose parameters csrc/core/sequence.h describes."""
    T, B, I, O, L, H, gru, _, R, W, N, M, K, every, shared = values[:15]
    G, F, P = (3 if gru else 4) * H, R * M, (R + W) * (M + K + 3) + 2 * W * M
    forward = name == "ntm_sequence"
    scalars = values[: 21 if forward else 20]
    keep = not forward or scalars[-1]
    numbers = [M * N, R * N, W * N, F, L * H, 0 if gru else L * H]
    state, initial = [B * n for n in numbers], [n if shared else B * n for n in numbers]
    kept = [(L - 1) * T * B * G, L * T * B * G * gru, (L - 1) * T * B * H, L * T * B * H * (not gru), T * B * P]
    kept_after = [T * B * R * N, T * B * W * N, (T - 1) // every * B * M * N]
    x, features = T * B * G, T * B * (H + F)
    trail = [x, *(n * keep for n in kept), features, *(n * keep for n in kept_after), 0]
    layer = lambda l: [G * ((F if not l else H) + (0 if l else I)), G * H, G, G]  # noqa: E731
    weights = [n for l in range(L) for n in layer(l)] + [P * H, P, O * (H + F), O]
    table = ctypes.cast(values[len(scalars)], ctypes.POINTER(ctypes.c_uint64))
    if forward:
        roles = ["in"] * (2 + len(state)) + ["out"] * len(state)
        roles += ["both" if keep else "in", *["out"] * (len(trail) - 1)]
        counts = [T * B * I, 0, *initial, *state, *trail]
    else:
        given = bool(values[len(scalars) + 20])  # the gradient of the final state
        counts = [*initial, state[0], *trail, features, *(n * given for n in state)]
        roles = ["in"] * len(counts) + ["out"] * (len(state) + 4)
        counts += [*state, x, kept[0], kept[1], kept[4]]
    addresses = [*(table[i] for i in range(len(weights))), *values[len(scalars) + 1 :]]
    arrays = list(zip(["in"] * len(weights) + roles, weights + counts, addresses))
    assert len(arrays) == len(addresses) == len(weights) + len(counts)
    return scalars, arrays


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict[str, Path]:
    """For every operator, the file with its calls. What they gave has been compared with the reference."""
    need("plain")
    folder = tmp_path_factory.mktemp("calls")
    files = {op: folder / op for op in OPERATORS}
    for op, path in files.items():
        with pytest.MonkeyPatch.context() as patch:
            CUDA_ON_HOST.activate(patch)
            patch.setattr(_native, "call", Recorder(path))
            for sizes, dtype, shared in CASES:
                patch.setenv("NTM_HOST_SHARED", str(shared))
                for options in ({}, READ_FIRST) if op == "memory_step" else ({},):
                    check(Case(op, dtype=dtype, **sizes, **options), CUDA_ON_HOST)
    return files


@pytest.fixture(scope="module")
def recorded_sequences(tmp_path_factory) -> list[Path]:
    """The same of whole sequences: for each case a file of three calls, forward, back, and forward keeping nothing."""
    need("plain")
    folder = tmp_path_factory.mktemp("calls")
    paths = []
    for index, (sizes, dtype, shared) in enumerate(SEQUENCE_CASES):
        paths.append(folder / str(index))
        with pytest.MonkeyPatch.context() as patch:
            CUDA_ON_HOST.activate(patch)
            patch.setattr(_native, "call", Recorder(paths[-1]))
            patch.setenv("NTM_HOST_SHARED", str(shared))
            case = test_sequence.Case(dtype=dtype, **sizes)
            test_sequence.check(case, CUDA_ON_HOST, test_sequence.Poison())
            with torch.no_grad():
                case.module("sequence")(case.inputs(), case.state())
    return paths


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Callable[[str], Path]:
    """replay.cpp around the kernels, by kind, with the faults asleep in them."""
    copy = tmp_path_factory.mktemp("planted") / "csrc"
    plant.plant(copy)
    sources = (*sorted(copy.glob("cuda/*.cu")), build.HERE / "replay.cpp")

    def program(kind: str) -> Path:
        need(kind)
        return build.compiled(sources, "replay", kind, copy)

    return program


class Outcome(NamedTuple):
    kernel: str  # read, read_backward ...
    way: str  # that csrc/cuda/plan.h took
    right: bool
    printed: str


def replay(program: Path, calls: list[Path], fault: str | None = None) -> list[Outcome]:
    """What became of each call. After a sanitizer's report the others go on where a fault is planted."""
    number = plant.FAULTS.index(fault) + 1 if fault else 0
    go_on = {
        "ASAN_OPTIONS": "halt_on_error=0:suppress_equal_pcs=0:symbolize=0",
        "TSAN_OPTIONS": "suppress_equal_stacks=0:suppress_equal_addresses=0:symbolize=0",
    }
    code, printed = run(program, str(number), *calls, **(go_on if fault else {}))
    outcomes = []
    for text in printed.split("call ")[1:]:
        team = re.search(r"for_each_item<ntm::cuda::(Warp|Block)<\w+(?:, (true|false))?>", text)
        tile = re.search(r"through_time<ntm::cuda::\w+<\w+>, (true|false)", text)
        assert team or tile, f"no kernel was launched:\n{text}"
        if tile:
            way = {"true": "held", "false": "in place"}[tile[1]]
        else:
            way = {"Warp": "warps", "true": "block", "false": "unstaged"}[team[2] or team[1]]
            way = "workspace" if "workspace of" in text else way
        outcomes.append(Outcome(text.split()[0], way, "\nright\n" in text, text))
    assert "that was all" in printed, printed[-5000:]
    assert (code == 0) == all(outcome.right for outcome in outcomes), f"exit code {code}:\n{printed}"
    return outcomes


# --- every kernel under the sanitizers --------------------------------------------------------------------------------

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


# --- planted faults ---------------------------------------------------------------------------------------------------


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
    operator = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.split()[0].removesuffix("Backward")).lower()
    operator = {"core/shift.h": "circular_shift", "core/element.h": operator}.get(file, "memory_step")
    calls = recorded_sequences[:2] if file == "core/sequence.h" else [recorded[operator]]
    wrong = [outcome for outcome in replay(programs("thread"), calls, name) if not outcome.right]
    assert wrong and all("data race" in outcome.printed for outcome in wrong)


def test_every_planted_fault_is_tested() -> None:
    assert {*FAULTS, *SEQUENCE_FAULTS, *plant.BARRIERS} == {*plant.FAULTS}
