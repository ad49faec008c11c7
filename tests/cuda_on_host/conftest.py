"""Recorded calls, and the programs that repeat them. Each is made once for all tests."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Callable

import pytest
import torch
from cuda_on_host import build, plant
from cuda_on_host.replay import Recorder, need
from filelock import FileLock
from helpers import sequences
from helpers.backends import CUDA_ON_HOST
from helpers.cases import OPERATORS, Case
from helpers.comparison import check
from helpers.native_calls import intercept
from helpers.poison import poison_sequences

MANY = dict(B=25, N=45, M=7, H=2, R=1, W=2, S=1)  # a warp each, four of them in a block
FEW = dict(B=5, N=70, M=9, H=2, R=2, W=2, S=2)  # a block each, of three warps
LARGE = dict(B=1, N=230, M=70, H=1)  # of eight warps, which sum fewer rows at once
# Sequences. Each of the two multiprocessors has a tile of four warps: one of four elements, one of the fifth element.
# The LSTM's rows are not aligned and its memories are recomputed; the GRU's rows are aligned, all its memories kept.
LSTM = dict(controller="lstm", layers=2, hidden=7, T=4, B=5, N=70, M=5, R=2, W=2, checkpoint=2)
GRU = dict(controller="gru", layers=2, hidden=8, T=2, B=5, N=70, M=4, checkpoint="all")
SEQUENCE_CASES = [
    *((LSTM, torch.float32, 49152), (GRU, torch.float32, 49152)),
    *((LSTM, torch.float32, 20000), (GRU, torch.float32, 14000)),  # tiles of fewer elements
    *((LSTM, torch.float64, 49152), (GRU, torch.float64, 49152)),
    ({**LSTM, "lengths": (2, 4, 0, 1, 3)}, torch.float32, 49152),
    ({**GRU, "T": 3, "lengths": (0, 2, 1, 3, 1)}, torch.float64, 49152),
]
READ_FIRST = {"options": (("read_first", True),)}
# The last number is the bytes of shared memory that a block may have: enough to hold everything, some of it, or no
# more than the block's own scratch.
CASES = [
    *((MANY, torch.float32, 49152), (FEW, torch.float32, 49152), (LARGE, torch.float32, 131072)),
    *((FEW, torch.float32, 6144), (FEW, torch.float32, 4160)),
    *((FEW, torch.float64, 49152), (FEW, torch.float64, 8256)),
]


@pytest.fixture(scope="session")
def calls(tmp_path_factory) -> Path:
    """A folder for recorded calls, one for all pytest workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "calls"
    folder.mkdir(exist_ok=True)
    return folder


def record(path: Path, make: Callable[[pytest.MonkeyPatch], None]) -> Path:
    """Record the calls that ``make`` makes at ``path``, unless another worker has done so, and return the path."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            part = path.with_suffix(".part")
            with pytest.MonkeyPatch.context() as patch:
                CUDA_ON_HOST.activate(patch)
                intercept(patch, Recorder(part))
                make(patch)
            part.rename(path)
    return path


@pytest.fixture(scope="session")
def recorded(calls) -> dict[str, Path]:
    """For every operator, the file with its calls. Their results have been compared with the reference."""
    need("plain")

    def check_all(op: str, patch: pytest.MonkeyPatch) -> None:
        for sizes, dtype, shared in CASES:
            patch.setenv("NTM_HOST_SHARED", str(shared))
            for options in ({}, READ_FIRST) if op == "memory_step" else ({},):
                check(Case(op, dtype=dtype, **sizes, **options), CUDA_ON_HOST)

    return {op: record(calls / op, functools.partial(check_all, op)) for op in OPERATORS}


@pytest.fixture(scope="session")
def recorded_sequences(calls) -> list[Path]:
    """For each case of a whole sequence, a file of three calls: forward, backward, and forward without a trail."""
    need("plain")

    def check_one(case: sequences.Case, shared: int, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("NTM_HOST_SHARED", str(shared))
        # Of steps that are not taken, the trail keeps what its memory held: here and in the replay all bits 1.
        sequences.check(case, CUDA_ON_HOST, poison_sequences(patch))
        with torch.no_grad():
            case.module("sequence")(case.inputs(), case.state(), lengths=case.lengths)

    cases = [(sequences.Case(dtype=dtype, **sizes), shared) for sizes, dtype, shared in SEQUENCE_CASES]
    return [record(calls / f"{i}", functools.partial(check_one, *case)) for i, case in enumerate(cases)]


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Callable[[str], Path]:
    """Compiles replay.cpp and the kernels as the kind that is asked for. All faults are planted, and none is active."""
    copy = tmp_path_factory.mktemp("planted") / "csrc"
    plant.plant(copy)
    sources = (*sorted(copy.glob("cuda/*.cu")), build.HERE / "replay.cpp")

    def program(kind: str) -> Path:
        need(kind)
        return build.compiled(sources, "replay", kind, copy)

    return program
