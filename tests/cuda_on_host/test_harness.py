"""The harness itself: correct kernels run without a report, and each planted fault is found."""

from __future__ import annotations

import pytest
from cuda_on_host import build
from cuda_on_host.replay import need, run

SELFTEST = build.HERE / "selftest.cpp"
# Each fault that selftest.cpp plants in its kernels of blocks and of warps; the kind that finds it; its message.
TEAM_FAULTS = [
    ("no barrier", "thread", "data race"),
    ("two blocks write", "thread", "data race"),
    ("one block ahead", "thread", "data race"),  # its barriers lie between the writes
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
# The same for its kernel of groups of warps.
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
