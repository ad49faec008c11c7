"""What part ``bench`` of the report gpu measures: each kernel's bandwidth and the memory step.

Agreement with the reference is checked before anything is timed, in float32 without TF32. Kernels and small steps work
in turn on several sets of tensors, together more than the cache holds; sides that are compared take turns.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import time
from typing import Any, Callable, Iterator, NamedTuple

import torch

import ntm_fast
from ntm_fast import ops, reference
from shared.operators import DIRECTIONS, Call, both, call, check, inputs, inputs_of, options, outputs_of
from shared.registry import OPERATORS, Sizes
from shared.timing import DeviceClock, HostClock, summary, take_turns

Clock = HostClock | DeviceClock

LARGE = 64e6  # bytes: kernels that move as much are measured by their bandwidth, smaller ones by their delay
BANDWIDTH, DELAY = 0.8, 3.0  # of the copy's; microseconds beyond the copy's
OVERTIME = 30.0  # seconds that a measurement may go on when the part's time is up
PATIENCE = 4.0  # times what a measurement takes, about: it is given up then
SPEEDUP, SPEEDUP_BATCH = 10.0, 1024  # of the memory step, forward and backward, over eager


class Scope(NamedTuple):
    """What is measured, the most important sizes first, and for how long each."""

    batches: tuple[int, ...]
    memories: tuple[tuple[int, int], ...]  # N, M
    hidden: int
    kernel_seconds: float
    step_seconds: float


FULL = Scope(
    batches=(1024, 16384, 64, 4096, 256),
    memories=((128, 20), (1024, 64), (128, 64), (1024, 20)),
    hidden=100,
    kernel_seconds=0.25,
    step_seconds=3.0,
)
SMOKE = Scope((3, 2), ((16, 4), (9, 3)), 5, 0.0, 0.0)  # figures that mean nothing


class Measurement(NamedTuple):
    """One entry of the report."""

    section: str
    title: str
    seconds: float  # what it takes, about; it is not begun with less left
    run: Callable[[Clock], dict[str, Any]]


def measurements(scope: Scope, compiled: bool) -> list[Measurement]:
    """The most important first."""
    found = [_memory_step(scope, scope.batches[0], scope.memories[0], False)]
    found += [_memory_step(scope, scope.batches[0], scope.memories[0], True)] * compiled
    by_memory = [list(_kernels(scope, N, M)) for N, M in scope.memories]
    found += by_memory[0]
    found += [_memory_step(scope, B, scope.memories[0], False) for B in scope.batches[1:]]
    found += [kernel for kernels in by_memory[1:] for kernel in kernels]
    found += [_memory_step(scope, scope.batches[0], memory, False) for memory in scope.memories[1:]]
    return found


# --- kernels ----------------------------------------------------------------------------------------------------------


def _kernels(scope: Scope, N: int, M: int) -> Iterator[Measurement]:
    """Every operator both ways, where this memory matters to it."""
    (first_N, first_M), *_ = scope.memories
    for B in scope.batches:
        for op in OPERATORS:
            letters = set().union(*inputs_of(op).values())
            if ("N" not in letters and N != first_N) or ("M" not in letters and M != first_M):
                continue
            for direction in DIRECTIONS:
                sizes = Sizes(B, N, M, hidden=scope.hidden)
                shape = f"B={B}, " + (f"N={N}" if "N" in letters else f"hidden {sizes.hidden}")
                shape += f", M={M}" if "M" in letters else ""

                def run(clock: Clock, op=op, direction=direction, sizes=sizes) -> dict[str, Any]:
                    return measure_kernel(call(op, direction, sizes, clock.device), clock, scope.kernel_seconds)

                yield Measurement("bandwidth", f"{op} {direction}, {shape}", 5.0, run)


def measure_kernel(work: Call, clock: Clock, seconds: float) -> dict[str, Any]:
    """A kernel and a copy of the same bytes; both without their launches, which cost more than a small kernel."""
    results = work()
    work.check(results)
    moved = work.moved(results)
    del results
    sets = _sets(moved, clock)
    works = [work, *(work.elsewhere() for _ in range(sets - 1))]
    sources = [torch.rand(moved // 8, device=clock.device) for _ in range(sets)]
    copies = [(torch.empty_like(source), source) for source in sources]
    times = take_turns(
        {
            "kernel": clock.captured(lambda: [one() for one in works]),
            "copy": clock.captured(lambda: [target.copy_(source) for target, source in copies]),
        },
        seconds,
        clock,
        turn=min(seconds / 10, 0.02),
    )
    us = {name: summary([1e3 * time / sets for time in found]) for name, found in times.items()}
    kernel, copy = us["kernel"]["median"], us["copy"]["median"]
    stage = work.op != "memory_step"
    return {
        "bytes": moved,
        "sets": sets,
        "us": us,
        "gb_per_s": float(f"{moved / kernel / 1e3:.4g}"),
        "copy_gb_per_s": float(f"{moved / copy / 1e3:.4g}"),
        "met": (copy / kernel >= BANDWIDTH if moved >= LARGE else kernel - copy <= DELAY) if stage else None,
    }


def _sets(size: int, clock: Clock) -> int:
    """How many times ``size`` bytes are twice what the cache holds."""
    return max(1, -(-2 * clock.cache // size))


# --- the memory step --------------------------------------------------------------------------------------------------


def _memory_step(scope: Scope, B: int, memory: tuple[int, int], compiled: bool) -> Measurement:
    sizes = Sizes(B, *memory)
    return Measurement(
        "memory_step",
        f"memory_step forward and backward, B={B}, N={sizes.N}, M={sizes.M}" + ", compiled too" * compiled,
        90.0 if compiled else 15.0,
        lambda clock: measure_memory_step(sizes, compiled, clock, scope.step_seconds),
    )


def measure_memory_step(sizes: Sizes, compiled: bool, clock: Clock, seconds: float) -> dict[str, Any]:
    """As a user calls it, through autograd: native, eager and compiled, each plain and as a CUDA graph."""
    keywords = options("memory_step", sizes)
    sides = {"native": ops.memory_step, "eager": reference.memory_step}
    if compiled:
        torch.compiler.reset()
        sides["compiled"] = torch.compile(reference.memory_step, dynamic=False, fullgraph=True)

    def fresh() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        leaves = [tensor.requires_grad_() for tensor in inputs("memory_step", sizes, clock.device)]
        with torch.no_grad():
            return leaves, [torch.randn_like(y) for y in outputs_of(ops.memory_step, *leaves, **keywords)]

    leaves, grads = fresh()
    wanted = both(reference.memory_step, leaves, keywords, grads)
    for side in (name for name in sides if name != "eager"):
        check(both(sides[side], leaves, keywords, grads), wanted, grads)
    sets = _sets(sum(tensor.numel() * tensor.element_size() for tensor in (*leaves, *grads, *wanted)), clock)
    del wanted
    given = [(leaves, grads), *(fresh() for _ in range(sets - 1))]
    functions = {}
    for side, function in sides.items():

        def work(function=function) -> list:
            return [both(function, leaves, keywords, grads) for leaves, grads in given]

        functions[side] = work
        if clock.graphs:
            functions[f"{side}, graph"] = clock.captured(work)
    times = take_turns(functions, seconds, clock, turn=min(seconds / 30, 0.1))
    us = {name: summary([1e3 * time / sets for time in found]) for name, found in times.items()}
    met = us["eager"]["median"] >= SPEEDUP * us["native"]["median"] if sizes.B == SPEEDUP_BATCH else None
    return {"sets": sets, "us": us, "met": met}


# --- all of it --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """float32 is float32: cuDNN would take TF32 for an nn.LSTM."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError within when the time is up; so does one around it."""

    def stop(*_: Any) -> None:
        raise TimeoutError("its time is up")

    start, before = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    left = left or math.inf
    signal.setitimer(signal.ITIMER_REAL, max(min(seconds, left), 1e-3))
    try:
        yield
    finally:
        left -= time.monotonic() - start
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left < math.inf:
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3))


def measure(report: Any, clock: Clock, todo: list[Measurement], *sections: str) -> None:
    """Measure into the report (of gpu_parts.py) until its time is up, and say in it what was left out."""
    report.found |= {section: [] for section in (*sections, "left_out")}
    with exact_products():
        while todo:
            section, title, seconds, run = todo.pop(0)
            if report.left() < seconds:
                report.add("left_out", f"{title}: no time left")
                continue
            try:
                torch.manual_seed(0)
                with limited(min(report.left() + OVERTIME, PATIENCE * seconds)):
                    finding = run(clock)
                for failure in finding.pop("failures", ()):
                    report.fail(title, failure)
                report.add(section, {"title": title, **finding})
            except TimeoutError:
                report.add("left_out", f"{title}: it took too long")
            except torch.OutOfMemoryError:
                report.add("left_out", f"{title}: more memory than this device has")
            except Exception as error:  # told, and the others still have their turn
                report.fail(title, error)
                if not answering(clock):
                    report.found["left_out"] += [f"{one.title}: the device no longer answers" for one in todo]
                    report.save()
                    return
            ntm_fast.empty_cache()
            release(clock)


def release(clock: Clock) -> None:
    """Give the device's memory back that nobody holds: a graph's serves nobody else."""
    if clock.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def bench(report: Any, clock: Clock, compiled: bool) -> None:
    """The part."""
    scope = SMOKE if clock.device == "cpu" else FULL
    measure(report, clock, measurements(scope, compiled), "bandwidth", "memory_step")


def answering(clock: Clock) -> bool:
    """Whether the device survived an error; an illegal access spoils it for the rest of the process."""
    try:
        if clock.device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def text(found: dict[str, Any]) -> list[str]:
    """The tables."""
    lines = [
        "Medians. A kernel's bytes are those of its inputs and outputs, each once; the copy, device to device, moves "
        f"as many. Targets: {BANDWIDTH:.0%} of the copy's bandwidth from {LARGE / 1e6:.0f} MB on, within {DELAY:g} us "
        f"of the copy below; memory_step, forward and backward, {SPEEDUP:g}x eager at B = {SPEEDUP_BATCH}.",
        "",
    ]
    for record in found["memory_step"]:
        lines += _sides(record["title"], record["us"], record["met"])
    if found["bandwidth"]:
        lines += ["| kernel | MB | us | copy, us | GB/s | of the copy's | target |", "|---|" + "---:|" * 5 + "---|"]
    for record in found["bandwidth"]:
        us, copy = (record["us"][name]["median"] for name in ("kernel", "copy"))
        lines.append(
            f"| {record['title']} | {record['bytes'] / 1e6:.3g} | "
            f"{us:.4g} | {copy:.4g} | {record['gb_per_s']:.4g} | {copy / us:.0%} | {target(record['met'])} |"
        )
    lines += [""]
    goals = [record["met"] for section in ("bandwidth", "memory_step") for record in found[section]]
    goals = [met for met in goals if met is not None]
    return [*lines, f"Targets met: {sum(goals)} of {len(goals)}.", "", *left_out(found)]


def left_out(found: dict[str, Any]) -> list[str]:
    if not found["left_out"]:
        return []
    return [f"Left out, {len(found['left_out'])}:", "", *(f"- {what}" for what in found["left_out"]), ""]


def _sides(title: str, us: dict[str, dict[str, float]], met: bool | None) -> list[str]:
    lines = [f"| {title} | us | / native |", "|---|---:|---:|"]
    for name, one in us.items():
        verdict = f" ({target(met)})" if met is not None and name == "eager" else ""
        lines.append(f"| {name} | {one['median']:.4g} | {one['median'] / us['native']['median']:.3g}x{verdict} |")
    return [*lines, ""]


def target(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: ""}[met]
