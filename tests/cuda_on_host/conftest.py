"""Recorded calls, and the programs that repeat them: made once."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest
import torch
from cuda_on_host import build, plant
from cuda_on_host.replay import Recorder, need
from helpers import sequences
from helpers.backends import CUDA_ON_HOST
from helpers.cases import OPERATORS, Case
from helpers.comparison import check

from ntm_fast import _native

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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
            case = sequences.Case(dtype=dtype, **sizes)
            sequences.check(case, CUDA_ON_HOST, sequences.Poison())
            with torch.no_grad():
                case.module("sequence")(case.inputs(), case.state())
    return paths


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Callable[[str], Path]:
    """replay.cpp around the kernels, by kind, with the faults asleep in them."""
    copy = tmp_path_factory.mktemp("planted") / "csrc"
    plant.plant(copy)
    sources = (*sorted(copy.glob("cuda/*.cu")), build.HERE / "replay.cpp")

    def program(kind: str) -> Path:
        need(kind)
        return build.compiled(sources, "replay", kind, copy)

    return program
