"""What parts ``engines`` and ``compiled`` of the report gpu measure: whole sequences, by engine and beside others.

Sizes go out from the standard job (shared/job.py) at B = 1024, one at a time, and to some corners. A side that cannot
be had is told with its reason. Before anything is timed the engines' answers are compared with the reference's, in
float32 without TF32; then the sides take turns.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch

from ntm_fast.engines import graphs
from ntm_fast.ops.sequence import why_no_sequence
from ntm_fast.ops.serving import why_not_native
from ntm_fast.training import TrainConfig, train
from reports.gpu_bench import Clock, Measurement, left_out, limited, measure, release, target
from shared.job import HIDDEN, STEPS, Batch, answers, compare, copy_batch, forward_only, make, training_step
from shared.timing import summary, take_turns

KEPT = 3e8  # numbers of memories that the reference, which keeps some twelve for each, is given at a time
COMPILING = 100.0  # seconds that torch.compile may take for one side


class Job(NamedTuple):
    """One thing to measure: so many sequences, trained on once or run through without grad."""

    B: int = 1024
    T: int = STEPS
    N: int = 128
    M: int = 20
    hidden: int = HIDDEN
    controller: str = "lstm"
    training: bool = True

    def title(self) -> str:
        what = "training step" if self.training else "inference"
        return f"{what}, {self.controller} of {self.hidden}, {self.N}x{self.M}, T={self.T}, B={self.B}"

    def model(self, engine: str, device: str, **options: Any) -> torch.nn.Module:
        """Its parameters are the same for all engines."""
        if engine != "no memory":
            options |= {"memory_locations": self.N, "memory_width": self.M}
        return make(self.controller, engine, self.hidden, **options).to(device)


STANDARD, INFERENCE = Job(), Job(training=False)
# The most important first: what there is no time for is left out.
JOBS = (
    STANDARD,
    INFERENCE,
    Job(B=64),
    Job(B=16384),
    Job(controller="gru"),
    *(Job(hidden=hidden) for hidden in (512, 256)),
    Job(T=200),
    *(Job(N=N, M=M) for N, M in ((1024, 32), (128, 64))),
    *(Job(B=B) for B in (4096, 256, 16, 4, 1)),
    *(INFERENCE._replace(B=B) for B in (16384, 64, 1)),
    *(Job(B=B, hidden=hidden) for B, hidden in ((64, 256), (64, 512), (16384, 512))),
    *(INFERENCE._replace(**sizes) for sizes in ({"hidden": 512}, {"T": 200}, {"controller": "gru"})),
    Job(B=64, N=1024, M=32),
    Job(B=64, T=200),
    Job(controller="gru", hidden=512),
)
COMPILED_JOBS = (STANDARD, INFERENCE, Job(B=64), Job(controller="gru"))
SMOKE = Job(B=3, T=5, N=9, M=3, hidden=5)  # figures that mean nothing
SMOKE_JOBS = (SMOKE, SMOKE._replace(training=False, controller="gru"))


# --- sides ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kernel_by_kernel() -> Iterator[None]:
    """The step engine captures nothing."""
    before, graphs.RECORDERS = graphs.RECORDERS, {}
    try:
        yield
    finally:
        graphs.RECORDERS = before


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """cuDNN may."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Side(NamedTuple):
    """What is measured beside others."""

    name: str
    engine: str  # of job.make
    graph: bool = False  # all of it, optimiser included, in a CUDA graph by hand
    around: Callable = contextlib.nullcontext
    mode: str | None = None  # of torch.compile
    seconds: float | None = None  # which it may take to make


SIDES = (
    Side("sequence", "sequence"),
    Side("step", "step"),
    Side("no memory", "no memory"),
    Side("no memory, TF32", "no memory", around=tf32),
    Side("sequence, graph", "sequence", graph=True),
    Side("step, graph", "step", graph=True, around=kernel_by_kernel),
    Side("step, uncaptured", "step", around=kernel_by_kernel),
    Side("eager", "reference"),
    Side("eager, graph", "reference", graph=True),
)
COMPILED = (
    Side("compiled", "compiled reference", mode="max-autotune", seconds=COMPILING),
    Side("compiled, graph", "compiled reference", True, mode="max-autotune-no-cudagraphs", seconds=COMPILING),
)
BESIDE_COMPILED = tuple(side for side in SIDES if side.name in ("sequence", "step", "eager"))


class _Cannot(Exception):
    """There is no such side, and that is no failure; the text is the reason."""


def _make(side: Side, job: Job, batch: Batch, wanted: dict[str, torch.Tensor], clock: Clock) -> tuple[Callable, Any]:
    """The function to time and its peak in bytes. Raises AssertionError where the side's answers are wrong."""
    if side.graph and not clock.graphs:
        raise _Cannot("there are no graphs here")
    model = job.model(side.engine, clock.device, **({"mode": side.mode} if side.mode else {}))
    where = torch.device(clock.device), torch.float32
    reason = None
    if side.engine == "sequence":
        reason = why_no_sequence(*where, model.controller_type, lambda: model.ntm_config)
    elif side.engine == "step":
        reason = why_not_native(*where)
    if reason:
        raise _Cannot(reason)
    if side.engine not in ("reference", "no memory"):
        for _ in range(graphs.CAPTURED_AT):  # as captured, too
            with side.around():
                found = answers(model, batch)
        compare(side.name, found, wanted)
        del found

    def ready() -> Callable:
        if job.training:
            function = training_step(model, batch, capturable=side.graph)
        else:
            function = forward_only(model, batch)
        function = clock.captured(function) if side.graph else function

        def timed() -> None:
            with side.around():
                function()

        for _ in range(graphs.CAPTURED_AT + 1):
            timed()
        return timed

    with side.around():
        return clock.peak(ready)


def measure_job(job: Job, sides: tuple[Side, ...], clock: Clock, seconds: float) -> dict[str, Any]:
    """Milliseconds and peak of every side that can be had, the reasons of the others, and failures."""
    batch = copy_batch(job.B, job.T, clock.device)
    chunk = max(1, int(KEPT / (job.N * job.M * job.T)))
    wanted = answers(job.model("reference", clock.device), batch, chunk)
    functions: dict[str, Callable] = {}
    peaks: dict[str, Any] = {}
    cannot: dict[str, str] = {}
    failures: list[str] = []
    for side in sides:
        try:
            with limited(side.seconds) if side.seconds else contextlib.nullcontext():
                functions[side.name], peaks[side.name] = _make(side, job, batch, wanted, clock)
            continue
        except _Cannot as error:
            cannot[side.name] = str(error)
        except torch.OutOfMemoryError:
            cannot[side.name] = "more memory than this device has, beside the others"
        except TimeoutError:
            if not side.seconds:
                raise
            cannot[side.name] = "it took too long to make"
        except Exception as error:
            cannot[side.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            # An engine of ours must serve and be right, compiled or by hand in a graph; what others cannot do is told.
            if isinstance(error, AssertionError) or side.engine in ("sequence", "step"):
                failures.append(f"{side.name}: {error}")
        release(clock)
    times = None
    while functions and times is None:
        try:
            times = take_turns(functions, seconds, clock, turn=seconds / 40)
        except torch.OutOfMemoryError:
            largest = max(functions, key=lambda name: peaks[name])
            cannot[largest] = "more memory than this device has, beside the others"
            del functions[largest]
            release(clock)
    ms = {name: summary(found) for name, found in (times or {}).items()}
    peaks = {name: peaks[name] for name in ms}
    return {"job": job._asdict(), "ms": ms, "peak_bytes": peaks, "cannot": cannot, "failures": failures}


def _job(job: Job, sides: tuple[Side, ...], seconds: float, about: float) -> Measurement:
    return Measurement("engines", job.title(), about, lambda clock: measure_job(job, sides, clock, seconds))


# --- profiles, and a solved copy --------------------------------------------------------------------------------------


def measure_profile(job: Job, clock: Clock) -> dict[str, Any]:
    """Where the device's time goes in one training step; here the CPU's, without a device."""
    step = training_step(job.model("auto", clock.device), copy_batch(job.B, job.T, clock.device))
    for _ in range(graphs.CAPTURED_AT + 1):
        step()
    on_device = clock.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * on_device
    with torch.profiler.profile(activities=activities) as profiler:
        clock.milliseconds(step)
    # Kernels by themselves: the operators that launched them are given their time once more.
    where = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    events = [x for x in profiler.key_averages() if x.device_type == where and not x.is_user_annotation]
    time_of = "self_device_time_total" if on_device else "self_cpu_time_total"
    rows = [(getattr(one, time_of), one.key, one.count) for one in events]
    total = sum(us for us, *_ in rows)
    rows = sorted(rows, reverse=True)[:12]
    kernels = [{"kernel": key, "calls": n, "us": float(f"{us:.4g}"), "share": us / total} for us, key, n in rows]
    return {"job": job._asdict(), "total_us": float(f"{total:.4g}"), "kernels": kernels}


def measure_solved(config: TrainConfig) -> dict[str, Any]:
    """Copy as ``ntm-fast train copy`` trains it."""
    with tempfile.TemporaryDirectory() as folder:
        found = train(config, Path(folder) / "run", quiet=True)
    kept = ("solved", "sequences", "updates", "seconds", "error", "unit", "error_at_length", "seed")
    return {**{name: found[name] for name in kept}, "batch_size": config.batch_size}


# --- the parts --------------------------------------------------------------------------------------------------------


def engine_measurements(smoke: bool) -> list[Measurement]:
    jobs = SMOKE_JOBS if smoke else JOBS
    found = [_job(job, SIDES, 0.0 if smoke else 2.0, 12.0) for job in jobs]
    profiled = jobs[0]
    profile = Measurement(
        "profile", f"profile of a {profiled.title()}", 5.0, functools.partial(measure_profile, profiled)
    )
    if smoke:
        small = {"hidden_size": 5, "memory_locations": 9, "memory_width": 3}
        config = TrainConfig(
            task_options={"max_length": 2}, model_options=small, max_sequences=16, validate_every=8, threads=1
        )
    else:
        config = TrainConfig(device="cuda")
    solved = Measurement("solved", "copy, trained until it is solved", 60.0, lambda clock: measure_solved(config))
    return [found[0], profile, *found[1:4], solved, *found[4:]]


def engines(report: Any, clock: Clock, compiled: bool) -> None:
    """The part; nothing in it is compiled."""
    measure(report, clock, engine_measurements(clock.device == "cpu"), "engines", "profile", "solved")


def compiled(report: Any, clock: Clock, compiled: bool) -> None:
    """The part: as others compile takes longer than all else, it has a part, and some of the jobs, for itself."""
    smoke = clock.device == "cpu"
    sides = BESIDE_COMPILED + (COMPILED if compiled else ())
    jobs = SMOKE_JOBS[:1] if smoke else COMPILED_JOBS
    todo = [_job(job, sides, 0.0 if smoke else 3.0, 60.0) for job in jobs]
    measure(report, clock, todo, "engines")


# --- tables -----------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A side that ours is to be so many times as fast as."""

    title: str
    job: Job
    sides: tuple[str, ...]  # the fastest of which counts
    least: float


TARGETS = (
    Target("20x eager at B = 1024", STANDARD, ("eager",), 20),
    Target("10x eager at B = 4096", Job(B=4096), ("eager",), 10),
    Target("4x a CUDA graph of the eager step", STANDARD, ("eager, graph",), 4),
    Target("3x torch.compile", STANDARD, ("compiled", "compiled, graph"), 3),
    Target("at most twice cuDNN's nn.LSTM without TF32", STANDARD, ("no memory",), 0.5),
)
LARGEST, OF_THE_BEST = 16384, 0.9  # the throughput of the standard job there, and what part of the best it must be


def ours(ms: dict[str, dict[str, float]]) -> str | None:
    """The engine whose times others are compared with."""
    return next((name for name in ("sequence", "step") if name in ms), None)


def goals(records: list[dict[str, Any]]) -> list[tuple[str, float, bool]]:
    """Of each target that was measured its title, the ratio found and whether that meets it."""
    found = []
    times = {Job(**record["job"]): record["ms"] for record in records}
    for title, job, sides, least in TARGETS:
        ms = times.get(job, {})
        others = [ms[side]["median"] for side in sides if side in ms]
        if others and ours(ms):
            ratio = min(others) / ms[ours(ms)]["median"]
            found.append((title, ratio, ratio >= least))
    rates = {
        job.B: job.B / ms[ours(ms)]["median"]
        for job, ms in times.items()
        if job == Job(B=job.B) and ours(ms) is not None
    }
    if LARGEST in rates and len(rates) > 1:
        ratio = rates[LARGEST] / max(rates.values())
        found.append((f"throughput at B = {LARGEST}, {OF_THE_BEST} of the best", ratio, ratio >= OF_THE_BEST))
    return found


def text(found: dict[str, Any]) -> list[str]:
    """The tables."""
    lines = [
        "Medians of repeats that take turns. A training step is forward, loss, backward and RMSprop; `graph`: all "
        "of it captured by hand; `step` captures itself. `no memory` is nn.LSTM or nn.GRU and a Linear, by cuDNN on a "
        "GPU. Peak: allocated while a side was made and first run, beyond what was there.",
        "",
    ]
    if reached := goals(found["engines"]):
        lines += ["| target | found | |", "|---|---:|---|"]
        lines += [f"| {title} | {ratio:.3g}x | {target(met)} |" for title, ratio, met in reached] + [""]
    for record in found["engines"]:
        lines += _sides(record)
    for record in found.get("solved", ()):
        how = "solved" if record["solved"] else "**not solved**"
        lines += [
            f"{record['title']}: {how} after {record['sequences']:,} sequences, {record['updates']:,} updates of "
            f"{record['batch_size']} and {record['seconds']:.4g} s; {record['error']:.3g} {record['unit']} "
            "wrong.",
            "",
        ]
    for record in found.get("profile", ()):
        lines += [f"| {record['title']}: {record['total_us']:.4g} us | calls | us | share |", "|---|---:|---:|---:|"]
        for one in record["kernels"]:
            name = one["kernel"].replace("|", "/")[:90]
            lines.append(f"| {name} | {one['calls']} | {one['us']:.4g} | {one['share']:.1%} |")
        lines += [""]
    return [*lines, *left_out(found)]


def _sides(record: dict[str, Any]) -> list[str]:
    own = ours(record["ms"])
    lines = [f"| {record['title']} | ms | / {own} | peak, MiB |", "|---|---:|---:|---:|"]
    for name, one in record["ms"].items():
        ratio = f"{one['median'] / record['ms'][own]['median']:.3g}x" if own else ""
        peak = record["peak_bytes"][name]
        lines.append(f"| {name} | {one['median']:.4g} | {ratio} | {'' if peak is None else f'{peak / 2**20:.4g}'} |")
    lines += [f"| {name} | | | cannot: {reason.replace('|', '/')[:200]} |" for name, reason in record["cannot"].items()]
    return [*lines, ""]
