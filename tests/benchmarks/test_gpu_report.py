"""The GPU check, benchmarks/reports/gpu.py, as far as it goes without a GPU."""

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

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as run.py has it

from reports import gpu, gpu_bench, gpu_engines, gpu_parts, gpu_small_run  # noqa: E402
from shared import job, operators, registry, timing  # noqa: E402

pytestmark = pytest.mark.skipif(
    not ntm_fast.available("cpu"), reason=f"no native CPU part: {ntm_fast.capabilities()['cpu_reason']}"
)


def report(out: Path, part: str, *options: str) -> tuple[int, dict, str]:
    """Exit status, findings and page of a smoke run."""
    status = gpu.main(["--device", "cpu", "--no-build", "--part", part, "--out", str(out), *options])
    return status, json.loads((out / f"gpu_{part}.json").read_text()), (out / f"gpu_{part}.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, BENCHMARKS / "run.py", "gpu", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "there is no GPU" in done.stderr and "Traceback" not in done.stderr


# --- bench ------------------------------------------------------------------------------------------------------------


def test_bench_measures_all_of_it(tmp_path):
    status, found, page = report(tmp_path, "bench", "--no-compile")
    assert status == 0 and found["finished"] and not found["failures"] and not found["left_out"]
    titles = [one["title"] for one in found["bandwidth"]]
    for op in registry.OPERATORS:
        sizes = 2 if "gates" in op else 4 if "memory" in operators.inputs_of(op) else 2
        for direction in operators.DIRECTIONS:
            assert sum(title.startswith(f"{op} {direction}, ") for title in titles) == sizes, (op, direction)
    for one in found["bandwidth"]:
        us = one["us"]
        assert us["kernel"]["median"] > 0 and us["copy"]["median"] > 0 and one["sets"] * one["bytes"] >= 2 << 12
        assert one["gb_per_s"] == pytest.approx(one["bytes"] / us["kernel"]["median"] / 1e3, rel=1e-3)
        assert f"| {one['title']} |" in page
    assert [set(one["us"]) for one in found["memory_step"]] == [{"native", "eager"}] * 3
    assert "these figures mean nothing" in page and "Not finished" not in page


def test_bytes_are_those_of_inputs_and_outputs():
    B, N, M = 6, 16, 4
    sizes = registry.Sizes(B, N, M)
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
    assert not found["memory_step"] and not found["bandwidth"]
    # The most important first: that order is the report's promise.
    assert "memory_step" in found["left_out"][0] and found["left_out"][0] in page

    def slow(*_):
        time.sleep(30)

    todo = [gpu_bench.Measurement("memory_step", title, 1.0, slow) for title in ("one", "another")]
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

    monkeypatch.setattr(gpu_bench, "measure_kernel", cut)
    with pytest.raises(Cut):
        report(tmp_path, "bench", "--no-compile")
    found = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert len(found["memory_step"]) == 1 and not found["finished"]
    assert "Not finished" in (tmp_path / "gpu_bench.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_bench.json", "gpu_bench.md"}


def test_every_side_also_as_a_graph():
    class Clock(timing.HostClock):
        graphs = True

        def captured(self, work):
            captured.append(work)
            return work

    captured: list = []
    found = gpu_bench.measure_memory_step(registry.Sizes(2, 9, 3), False, Clock(), 0.0)
    assert list(found["us"]) == ["native", "native, graph", "eager", "eager, graph"] and len(captured) == 2


def test_a_graph_keeps_what_it_works_on(monkeypatch):
    """The clock of a CUDA device, tested with a stand-in for every call of CUDA."""

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
    """B = 64 .. 16,384, N = 128 and 1024, M = 20 and 64."""
    todo = gpu_bench.measurements(gpu_bench.FULL, compiled=True)
    titles = [one.title for one in todo]
    assert len(set(titles)) == len(titles)
    for B in (64, 256, 1024, 4096, 16384):
        for N, M in ((128, 20), (128, 64), (1024, 20), (1024, 64)):
            assert f"read backward, B={B}, N={N}, M={M}" in titles
        assert f"sharpen forward, B={B}, N=1024" in titles
        assert f"memory_step forward and backward, B={B}, N=128, M=20" in titles
    assert "memory_step" in titles[0] and "B=1024" in titles[0]


# --- engines and compiled ---------------------------------------------------------------------------------------------


def test_engines_measures_all_of_it(tmp_path):
    status, found, page = report(tmp_path, "engines")
    assert status == 0 and found["finished"] and not found["failures"] and not found["left_out"]
    with_graphs = {side.name for side in gpu_engines.SIDES if side.graph}
    for one in found["engines"]:
        assert set(one["ms"]) == {side.name for side in gpu_engines.SIDES} - with_graphs
        assert set(one["cannot"]) == with_graphs
        assert f"| {one['title']} | ms | / sequence |" in page
    (profile,), (solved,) = found["profile"], found["solved"]
    assert 0.99 < sum(one["share"] for one in profile["kernels"]) + 1 - profile["kernels"][0]["share"]
    assert any("_NTMSequence" in one["kernel"] for one in profile["kernels"])
    assert not solved["solved"] and solved["sequences"] == 16 and "**not solved** after 16 sequences" in page
    assert "these figures mean nothing" in page


def test_compiled_is_beside_ours(tmp_path, monkeypatch):
    modes = []

    def compile(module, mode, **_):
        modes.append(mode)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    status, found, page = report(tmp_path, "compiled")
    (one,) = found["engines"]
    assert status == 0 and set(one["ms"]) == {"sequence", "step", "eager", "compiled"} and modes == ["max-autotune"]
    assert set(one["cannot"]) == {"compiled, graph"}
    status, found, _ = report(tmp_path, "compiled", "--no-compile")
    assert set(found["engines"][0]["ms"]) == {"sequence", "step", "eager"}


class Graphs(timing.HostClock):
    """A clock that claims to have graphs. Each side seems to need more memory than the one before."""

    graphs = True

    def __init__(self) -> None:
        self.asked = 0

    def peak(self, work):
        self.asked += 1
        return work(), self.asked


def sides(*names: str) -> tuple:
    found = {side.name: side for side in (*gpu_engines.SIDES, *gpu_engines.COMPILED)}
    return tuple(found[name] for name in names)


def test_every_side_of_every_engine(monkeypatch):
    def training_step(model, batch, capturable):
        asked.append(capturable)
        return job.training_step(model, batch)  # torch's optimisers refuse to be capturable on the CPU

    asked: list[bool] = []
    monkeypatch.setattr(gpu_engines, "training_step", training_step)
    found = gpu_engines.measure_job(gpu_engines.SMOKE, gpu_engines.SIDES, Graphs(), 0.0)
    assert set(found["ms"]) == {side.name for side in gpu_engines.SIDES} == set(found["peak_bytes"])
    assert not found["cannot"] and not found["failures"] and asked == [side.graph for side in gpu_engines.SIDES]


def test_a_side_that_cannot_be_had_says_why(monkeypatch):
    """Others have their turn; only what is wrong, or ours and broken, is a failure."""
    right = job.make

    def make(controller, engine, hidden=job.HIDDEN, **options):
        if engine == "compiled reference" and options["mode"] == "max-autotune":
            time.sleep(5)
        if engine == "compiled reference":
            raise RuntimeError("no compiler\nwith much detail")
        if engine == "no memory":
            raise torch.OutOfMemoryError("out of memory")
        model = right(controller, engine, hidden, **options)
        if engine == "step":
            torch.nn.init.zeros_(model.output.bias.data.add_(1))
            model.heads.bias.data.add_(0.5)
        return model

    monkeypatch.setattr(gpu_engines, "make", make)
    which = tuple(
        side._replace(seconds=0.5 if side.mode == "max-autotune" else side.seconds)
        for side in sides("sequence", "step", "no memory", "eager", "compiled", "compiled, graph")
    )
    found = gpu_engines.measure_job(gpu_engines.SMOKE, which, Graphs(), 0.0)
    assert set(found["ms"]) == {"sequence", "eager"}
    assert "disagree" in found["cannot"]["step"] and "memory" in found["cannot"]["no memory"]
    assert found["cannot"]["compiled"] == "it took too long to make"
    assert found["cannot"]["compiled, graph"] == "RuntimeError: no compiler"
    assert len(found["failures"]) == 1 and found["failures"][0].startswith("step: ")
    page = "\n".join(gpu_engines.text({"engines": [{"title": "it", **found}], "left_out": []}))
    assert "| compiled | | | cannot: it took too long to make |" in page
    monkeypatch.setattr(gpu_engines, "why_no_sequence", lambda *_: "no such kernel")
    found = gpu_engines.measure_job(gpu_engines.SMOKE, sides("sequence", "eager"), Graphs(), 0.0)
    assert found["cannot"] == {"sequence": "no such kernel"} and set(found["ms"]) == {"eager"} and not found["failures"]


def test_sides_that_do_not_fit_together(monkeypatch):
    """Where memory is short, the side that takes the most is left out."""
    right = gpu_engines.take_turns

    def take_turns(functions, *rest, **options):
        if len(functions) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return right(functions, *rest, **options)

    monkeypatch.setattr(gpu_engines, "take_turns", take_turns)
    found = gpu_engines.measure_job(gpu_engines.SMOKE, sides("sequence", "step", "eager"), Graphs(), 0.0)
    assert set(found["ms"]) == {"sequence", "step"} and "beside the others" in found["cannot"]["eager"]


def test_uncaptured_and_tf32_last_for_a_call_only():
    before = gpu_engines.graphs.RECORDERS, torch.backends.cudnn.allow_tf32
    with gpu_engines.kernel_by_kernel(), gpu_engines.tf32():
        assert not gpu_engines.graphs.RECORDERS and torch.backends.cudnn.allow_tf32
    assert before == (gpu_engines.graphs.RECORDERS, torch.backends.cudnn.allow_tf32) and before[0]


def test_answers_in_chunks_are_the_same():
    model, batch = job.make("lstm", "reference", 5, memory_locations=9, memory_width=3), job.copy_batch(7, 5)
    job.compare("chunks", job.answers(model, batch, 3), job.answers(model, batch))
    wrong = job.answers(model, batch, 3)
    wrong["loss"] *= 1.1
    with pytest.raises(AssertionError, match="disagree on loss"):
        job.compare("chunks", wrong, job.answers(model, batch))


def test_targets():
    record = lambda ms, **sizes: {  # noqa: E731
        "job": gpu_engines.Job(**sizes)._asdict(),
        "ms": {name: {"median": value} for name, value in ms.items()},
    }
    records = [
        record({"sequence": 2.0, "step": 3.0, "eager": 41.0, "eager, graph": 7.0, "no memory": 1.5}),
        record({"sequence": 6.0, "eager": 66.0}, B=4096),
        record({"step": 20.0}, B=16384),
        record({"sequence": 0.1}, B=16384, training=False),
        record({"eager": 1.0}, B=64),
    ]
    found = {title: (ratio, met) for title, ratio, met in gpu_engines.goals(records)}
    assert found == {
        "20x eager at B = 1024": (20.5, True),
        "10x eager at B = 4096": (11.0, True),
        "4x a CUDA graph of the eager step": (3.5, False),
        "at most twice cuDNN's nn.LSTM without TF32": (0.75, True),
        "throughput at B = 16384, 0.9 of the best": (1.0, True),
    }
    page = "\n".join(gpu_engines.text({"engines": [], "left_out": []}))
    assert "target" not in page


def test_jobs_of_the_full_run():
    """All sizes around the standard job, both controllers, training and inference."""
    jobs = gpu_engines.JOBS
    assert len(set(jobs)) == len(jobs) and jobs[0] == gpu_engines.Job() == gpu_engines.STANDARD
    for name, values in {
        "B": (1, 4, 16, 64, 256, 1024, 4096, 16384),
        "T": (41, 200),
        "hidden": (100, 256, 512),
        "controller": ("lstm", "gru"),
        "training": (True, False),
    }.items():
        for value in values:
            assert gpu_engines.STANDARD._replace(**{name: value}) in jobs, (name, value)
    assert {(one.N, one.M) for one in jobs} == {(128, 20), (128, 64), (1024, 32)}
    assert {target.job for target in gpu_engines.TARGETS} <= {*jobs}
    assert {*gpu_engines.COMPILED_JOBS} <= {*jobs}
    todo = gpu_engines.engine_measurements(smoke=False)
    assert len(todo) == len(jobs) + 2 and sum(one.seconds for one in todo) < 600


def test_limits_within_limits():
    start = time.monotonic()
    with pytest.raises(TimeoutError), gpu_bench.limited(0.5):
        with pytest.raises(TimeoutError), gpu_bench.limited(0.1):
            time.sleep(5)
        with gpu_bench.limited(5):
            pass
        time.sleep(5)
    assert 0.4 < time.monotonic() - start < 3
    with pytest.raises(TimeoutError), gpu_bench.limited(0.1), gpu_bench.limited(5):
        time.sleep(5)


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
    assert gpu_small_run.main(["cpu"]) == 0
    assert "10 operators, torch.float64" in capsys.readouterr().out
    right = reference.sharpen
    monkeypatch.setattr(reference, "sharpen", lambda weights, gamma: 1.001 * right(weights, gamma))
    with pytest.raises(AssertionError, match="disagree"):
        gpu_small_run.main(["cpu"])


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
        assert re.search(rf"--tool {tool} .*run\.py gpu_small_run cpu", log)
    # A missing tool is reported, and is not a failure.
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
