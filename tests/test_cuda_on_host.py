"""The CUDA kernels where there is no GPU: compiled by g++ and run by tests/cuda_on_host, which finds what is wrong.

The operator tests run them as the backend ``cuda_on_host``. Here are the harness's own tests.
"""

from __future__ import annotations

import subprocess

import pytest
from comparison import required
from cuda_on_host import build

SELFTEST = build.HERE / "selftest.cpp"
# What finds each fault that selftest.cpp plants, and its words.
HARNESS_FINDS = [
    ("no barrier", "thread", "data race"),
    ("two blocks write", "thread", "data race"),
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


def need(kind: str) -> None:
    reason = build.missing(kind)
    if reason and required("cuda_on_host"):
        pytest.fail(f"NTM_TEST_REQUIRE names cuda_on_host, which cannot be tested: {reason}")
    if reason:
        pytest.skip(reason)


def run(program, *arguments: str) -> tuple[int, str]:
    """The exit code, and everything that was printed."""
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def selftest(kind: str, fault: str, team: str) -> tuple[int, str]:
    need(kind)
    return run(build.compiled((SELFTEST,), "selftest", kind), fault, team)


@pytest.mark.parametrize("team", ("block", "warp"))
@pytest.mark.parametrize("kind", build.KINDS)
def test_harness_runs_what_is_right(kind: str, team: str) -> None:
    assert selftest(kind, "clean", team) == (0, "")


@pytest.mark.parametrize("team", ("block", "warp"))
@pytest.mark.parametrize(("fault", "kind", "words"), HARNESS_FINDS, ids=lambda x: x.replace(" ", "-"))
def test_harness_finds(fault: str, kind: str, words: str, team: str) -> None:
    code, printed = selftest(kind, fault, team)
    assert code != 0 and words in printed, printed
