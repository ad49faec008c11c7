"""The GPU check, benchmarks/gpu_report.py, as far as it goes without a GPU."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

import ntm_fast
from ntm_fast import reference

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its modules import each other by name, as scripts do

import gpu_bench  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_report  # noqa: E402
import gpu_small_run  # noqa: E402
import operators  # noqa: E402
import timing  # noqa: E402

pytestmark = pytest.mark.skipif(
    not ntm_fast.available("cpu"), reason=f"no native CPU part: {ntm_fast.capabilities()['cpu_reason']}"
)


def report(out: Path, part: str, *options: str) -> tuple[int, dict, str]:
    """Exit status, findings and page of a smoke run."""
    status = gpu_report.main(["--device", "cpu", "--no-build", "--part", part, "--out", str(out), *options])
    return status, json.loads((out / f"gpu_{part}.json").read_text()), (out / f"gpu_{part}.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu_report.py", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "there is no GPU" in done.stderr and "Traceback" not in done.stderr


# --- bench ------------------------------------------------------------------------------------------------------------


def test_bench_measures_all_of_it(tmp_path):
    status, found, page = report(tmp_path, "bench", "--no-compile")
    assert status == 0 and found["finished"] and not found["failures"] and not found["left_out"]
    titles = [one["title"] for one in found["bandwidth"]]
    for op in operators.OPERATORS:
        sizes = 2 if "gates" in op else 4 if "memory" in operators.inputs_of(op) else 2
        for direction in operators.DIRECTIONS:
            assert sum(title.startswith(f"{op} {direction}, ") for title in titles) == sizes, (op, direction)
    for one in found["bandwidth"]:
        us = one["us"]
        assert us["kernel"]["median"] > 0 and us["copy"]["median"] > 0 and one["sets"] * one["bytes"] >= 2 << 12
        assert one["gb_per_s"] == pytest.approx(one["bytes"] / us["kernel"]["median"] / 1e3, rel=1e-3)
        assert f"| {one['title']} |" in page
    assert [set(one["us"]) for one in found["memory_step"]] == [{"native", "eager"}] * 3
    assert [set(one["ms"]) for one in found["training"]] == [{"sequence", "step", "reference", "no memory"}] * 2
    assert "these figures mean nothing" in page and "Not finished" not in page


def test_bytes_are_those_of_inputs_and_outputs():
    B, N, M = 6, 16, 4
    sizes = operators.Sizes(B, N, M)
    memory, weights, vector = 4 * B * N * M, 4 * B * N, 4 * B * M
    for op, direction, moved in (
        ("read", "forward", memory + weights + vector),
        ("read", "backward", (memory + weights + vector) + (memory + weights)),
        ("erase_add_write", "forward", memory + weights + 2 * vector + memory),
        # the output of the forward is among what content addressing's backward reads
        ("content_addressing", "backward", 2 * (memory + vector + 4 * B) + 2 * weights),
    ):
        call = operators.call(op, direction, sizes)
        assert call.moved(call()) == moved, (op, direction)


def test_bench_finds_a_wrong_answer(tmp_path, monkeypatch):
    right = reference.read
    monkeypatch.setattr(reference, "read", lambda memory, weights: 1.001 * right(memory, weights))
    monkeypatch.setattr(gpu_bench, "SMOKE", gpu_bench.SMOKE._replace(batches=(2,), memories=((16, 4),)))
    status, found, page = report(tmp_path, "bench", "--no-compile")
    assert status == 1
    failed = [failure for failure in found["failures"] if "disagree" in failure]
    assert {failure.split(",")[0] for failure in failed} >= {"read forward", "read backward"}
    assert not any(one["title"].startswith("read") for one in found["bandwidth"])
    assert any(one["title"].startswith("sharpen") for one in found["bandwidth"])
    assert all(failure.splitlines()[0] in page for failure in failed)


def test_bench_stops_when_its_time_is_up(tmp_path, monkeypatch):
    status, found, page = report(tmp_path, "bench", "--seconds", "1")
    assert status == 0 and found["finished"]
    assert not found["training"] and not found["bandwidth"]
    # The most important first: that order is the report's promise.
    assert "training step" in found["left_out"][0] and found["left_out"][0] in page

    def slow(*_):
        time.sleep(30)

    todo = [gpu_bench.Measurement("training", title, 1.0, slow) for title in ("one", "another")]
    monkeypatch.setattr(gpu_bench, "measurements", lambda *_: todo)
    monkeypatch.setattr(gpu_bench, "OVERTIME", 0.0)
    start = time.monotonic()
    _, found, _ = report(tmp_path, "bench", "--seconds", "3")
    assert found["left_out"] == ["one: it took too long", "another: no time left"] and not found["failures"]
    assert time.monotonic() - start < 20


def test_what_was_found_is_on_disk_at_once(tmp_path, monkeypatch):
    class Cut(BaseException):
        pass

    def cut(*_):
        raise Cut

    monkeypatch.setattr(gpu_bench, "measure_memory_step", cut)
    with pytest.raises(Cut):
        report(tmp_path, "bench", "--no-compile")
    found = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert len(found["training"]) == 1 and not found["finished"]
    assert "Not finished" in (tmp_path / "gpu_bench.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_bench.json", "gpu_bench.md"}


def test_every_side_also_as_a_graph():
    class Clock(timing.HostClock):
        graphs = True

        def captured(self, work):
            captured.append(work)
            return work

    captured: list = []
    found = gpu_bench.measure_memory_step(operators.Sizes(2, 9, 3), False, Clock(), 0.0)
    assert list(found["us"]) == ["native", "native, graph", "eager", "eager, graph"] and len(captured) == 2


def test_a_graph_keeps_what_it_works_on(monkeypatch):
    """The device's clock with every call of CUDA a stand-in."""

    class Anything:
        def __init__(self, *_, **__):
            self.L2_cache_size, self.replayed = 1 << 20, 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def replay(self):
            self.replayed += 1

        def elapsed_time(self, other):
            return 2.5

        def nothing(self, *_):
            pass

        record = synchronize = wait_stream = nothing

    for name in ("get_device_properties", "Event", "Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Anything)
    clock = timing.DeviceClock()
    given = torch.ones(3)
    alive = weakref.ref(given)
    replay = clock.captured(lambda given=given: given + 1)
    del given
    gc.collect()
    assert alive() is not None and replay().tolist() == [2, 2, 2]
    assert clock.milliseconds(replay) == 2.5 and clock.cache == 1 << 20
    assert set(timing.take_turns({"it": replay}, 0.0, clock, turn=0.01)["it"]) == {2.5 / 4}


def test_where_a_gpu_was_measured():
    report = dict.fromkeys(("driver", "architectures", "nvcc", "torch", "cuda", "cpu", "commit"), "x")
    report |= {"gpu": "NVIDIA X", "compute_capability": "9.0", "multiprocessors": 132, "l2_bytes": 50 << 20}
    line = timing.where({**report, "date": "2026-01-02T03:04:05+00:00"})
    assert "NVIDIA X, compute capability 9.0, 132 multiprocessors, 50 MiB of L2" in line and "2026-01-02" in line


def test_sizes_of_the_full_run():
    """What the report is for: B = 64 .. 16,384, N = 128 and 1024, M = 20 and 64, and the training step."""
    todo = gpu_bench.measurements(gpu_bench.FULL, compiled=True)
    titles = [one.title for one in todo]
    assert len(set(titles)) == len(titles)
    for B in (64, 256, 1024, 4096, 16384):
        for N, M in ((128, 20), (128, 64), (1024, 20), (1024, 64)):
            assert f"read backward, B={B}, N={N}, M={M}" in titles
        assert f"sharpen forward, B={B}, N=1024" in titles
        assert f"memory_step forward and backward, B={B}, N=128, M=20" in titles
    assert "training step, lstm, B=1024" in titles[0] and "memory_step" in titles[1] and "B=1024" in titles[1]


# --- the suite --------------------------------------------------------------------------------------------------------

TESTS = """
import pytest

def test_native_cpu_right(): pass

@pytest.mark.slow
def test_native_cpu_slow(): pass

@pytest.mark.parametrize("x", ["a b", "c[d]"])
def test_native_cpu_wrong(x): assert x == "a b"

@pytest.mark.skip(reason="no (real) need")
def test_native_cpu_skipped(): pass

def test_other(): pass
"""


def test_suite_counts_what_pytest_says(tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text(TESTS)
    status, found, page = report(tmp_path, "suite", "--tests", str(tests))
    assert status == 1 and len(found["failures"]) == 1
    own, others = found["runs"]
    assert own["passed"] == 3 and others["passed"] == 1 and not own["cut"]
    assert [name.split("::")[1] for name in own["failed"]] == ["test_native_cpu_wrong[c[d]]"]
    assert own["skipped"] == {"no (real) need": 1}
    assert "test_native_cpu_wrong[c[d]]" in page and "1: no (real) need" in page


def test_suite_keeps_what_was_found_before_it_was_cut_short(tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text("import time\ndef test_native_cpu_a(): pass\ndef test_native_cpu_b(): time.sleep(60)\n")
    status, found, page = report(tmp_path, "suite", "--tests", str(tests), "--seconds", "25")
    assert found["runs"][0]["cut"] and found["runs"][0]["passed"] == 1 and "cut short" in page
    assert status == 0


def test_no_tests_at_all_is_a_failure(tmp_path):
    (tmp_path / "test_some.py").write_text("")
    status, found, _ = report(tmp_path, "suite", "--tests", str(tmp_path / "test_some.py"))
    assert status == 1 and "status 5" in found["failures"][0]


# --- compute-sanitizer ------------------------------------------------------------------------------------------------


def test_the_small_run_computes_what_it_says(monkeypatch, capsys):
    monkeypatch.setattr(gpu_small_run, "SIZES", gpu_small_run.SIZES[:1])
    assert gpu_small_run.main("cpu") == 0
    assert "10 operators, torch.float64" in capsys.readouterr().out
    right = reference.sharpen
    monkeypatch.setattr(reference, "sharpen", lambda weights, gamma: 1.001 * right(weights, gamma))
    with pytest.raises(AssertionError, match="disagree"):
        gpu_small_run.main("cpu")


def test_sanitize_runs_every_tool_and_tells_findings(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "========= COMPUTE-SANITIZER"\necho "$@"\n'
        'case "$*" in\n'
        '*racecheck*) echo "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)" ;;\n'
        '*) echo "========= ERROR SUMMARY: 0 errors" ;;\nesac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    status, found, page = report(tmp_path, "sanitize")
    assert status == 1
    assert {one["tool"]: one["clean"] for one in found["tools"]} == {
        "memcheck": True, "racecheck": False, "initcheck": True, "synccheck": True,
    }  # fmt: skip
    assert "2 hazards displayed" in page and len(found["failures"]) == 1
    for tool in gpu_parts.TOOLS:
        log = (tmp_path / f"gpu_sanitize_{tool}.log").read_text()
        assert re.search(rf"--tool {tool} .*gpu_small_run\.py cpu", log)
    # No tool at all is told, and is no failure.
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda *_, **__: None)
    status, found, page = report(tmp_path, "sanitize")
    assert status == 0 and page.count("is not installed") == 4


@pytest.mark.parametrize(
    ("log", "status", "clean", "word"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0, True, "0 errors"),
        ("========= ERROR SUMMARY: 12 errors\n", 0, False, "12 errors"),
        ("10 operators\n========= ERROR SUMMARY: 0 errors\n", 1, False, "exit status 1"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, True, "0 hazards"),
        ("10 operators\n10 operators\n", None, None, "after 2 of"),
        ("========= Device not supported\n========= ERROR SUMMARY: 1 error\n", 1, None, "could not run"),
        ("Traceback\nImportError: no such thing\n", 1, False, "no such thing"),
        ("", 0, False, "it printed nothing"),
    ],
)
def test_verdicts(log: str, status: int | None, clean: bool | None, word: str) -> None:
    found = gpu_parts.verdict(log, status)
    assert found["clean"] is clean and word in found["result"]
