"""The parts of the report gpu: the report that each of them fills, the test suite, compute-sanitizer."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ntm_fast
from reports import gpu_bench, gpu_engines
from shared.timing import ROOT, DeviceClock, HostClock, circumstances, save, show, where, write

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Report:
    """What a part has found so far: in <out>/gpu_<part>.json and, as tables, in gpu_<part>.md, at any time."""

    def __init__(self, part: str, options: argparse.Namespace, until: float) -> None:
        self.part, self.out, self.until = part, options.out, until
        self.found: dict[str, Any] = {"part": part, "device": options.device, **circumstances(options.device)}
        self.found |= {"finished": False, "failures": []}

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def add(self, section: str, finding: Any) -> None:
        self.found[section].append(finding)
        self.save()

    def fail(self, what: str, error: Exception | str) -> None:
        """What is not as it must be: a test, an answer, a finding of a sanitizer."""
        print(f"FAILED {what}: {error}", file=sys.stderr, flush=True)
        self.add("failures", f"{what}: {error}")

    def save(self) -> None:
        save(self.out / f"gpu_{self.part}.json", self.found)
        write(self.out / f"gpu_{self.part}.md", self.text())

    def text(self) -> str:
        lines = [f"# GPU report: {self.part}", ""]
        if self.found["device"] == "cpu":
            lines += ["A smoke run without a GPU (`--device cpu`): these figures mean nothing.", ""]
        if not self.found["finished"]:
            lines += ["Not finished: what follows was found before it was cut short.", ""]
        lines += TEXTS[self.part](self.found)
        if self.found["failures"]:
            lines += ["Failures:", "", *(f"- {failure}" for failure in self.found["failures"]), ""]
        return "\n".join([*lines, where(self.found)]) + "\n"


def run(part: str, options: argparse.Namespace, until: float) -> int:
    """Fill one part's report -> the number of failures. Raises ValueError where it cannot."""
    if reason := ntm_fast.capabilities()[f"{options.device}_reason"]:
        raise ValueError(f"no native kernels serve {options.device}: {reason}")
    report = Report(part, options, until)
    print(f"{part}: at most {report.left():.0f} s", file=sys.stderr, flush=True)
    if part in MEASURED:
        clock = DeviceClock() if options.device == "cuda" else HostClock()
        MEASURED[part](report, clock, options.compiled)
    else:
        {"suite": suite, "sanitize": sanitize}[part](report, options)
    report.found["finished"] = True
    report.save()
    print(report.text())
    print(f"written to {show(report.out / f'gpu_{part}.json')} and gpu_{part}.md beside it\n", flush=True)
    return len(report.found["failures"])


def run_within(seconds: float, command: list[str], log: Path, **environment: str) -> int | None:
    """Run a command, its output into ``log`` -> its exit status, None if it had to be stopped.

    Outside of the source tree, so that the copy of ntm_fast is tested that was installed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT / "tests",
            env={**os.environ, "COLUMNS": "500", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for patience, stop in ((max(0.0, seconds), signal.SIGINT), (15.0, signal.SIGKILL)):
            try:
                status = process.wait(patience)
                return status if stop is signal.SIGINT else None
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, stop)  # pytest still tells what it has; what the command started stops too
        process.wait()
    return None


# --- the suite --------------------------------------------------------------------------------------------------------


def suite(report: Report, options: argparse.Namespace) -> None:
    """The tests of this device's kernels, slow ones too; then all others."""
    report.found["runs"] = []
    backend = {"cuda": "cuda", "cpu": "native_cpu"}[options.device]
    own = f"{backend} and not cuda_on_host"
    for title, selection in ((f"tests of {backend}", own), ("other tests", f"not ({own})")):
        slow = "" if selection == own else "not slow"
        command = [sys.executable, "-m", "pytest", str(options.tests.resolve()), "-v", "--tb=short"]
        command += ["-k", selection, "-m", slow]
        log = report.out / f"gpu_suite_{title.replace(' ', '_')}.log"
        start = time.monotonic()
        status = run_within(report.left() - 20, command, log, NTM_TEST_REQUIRE=backend)
        finding = {"title": title, "seconds": round(time.monotonic() - start), "cut": status is None, "log": log.name}
        finding |= outcomes(log.read_text())
        report.add("runs", finding)
        for name in finding["failed"]:
            report.fail(title, name)
        if not finding["failed"] and status not in (0, None):
            report.fail(title, f"pytest ended with status {status}: see {log.name}")


def outcomes(log: str) -> dict[str, Any]:
    """What became of the tests, from what ``pytest -v`` has printed so far."""
    counts: Counter[str] = Counter()
    failed, skipped = [], Counter()
    for name, outcome, rest in re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b(.*?) *\[ *\d+%\]$", log, re.M):
        counts[outcome] += 1
        if outcome in ("FAILED", "ERROR"):
            failed.append(name)
        if outcome == "SKIPPED":
            skipped[rest.strip(" ()")] += 1
    return {"passed": counts["PASSED"], "failed": failed, "skipped": dict(skipped)}


def suite_text(found: dict[str, Any]) -> list[str]:
    lines = ["| | passed | failed | skipped | s | |", "|---|---:|---:|---:|---:|---|"]
    for one in found["runs"]:
        lines.append(
            f"| {one['title']} | {one['passed']} | {len(one['failed'])} | {sum(one['skipped'].values())} | "
            f"{one['seconds']} | {'**cut short**' if one['cut'] else ''} |"
        )
    reasons = Counter()
    for one in found["runs"]:
        reasons.update(one["skipped"])
    if reasons:
        lines += ["", "Skipped:", "", *(f"- {count}: {reason}" for reason, count in reasons.most_common())]
    return [*lines, ""]


# --- compute-sanitizer ------------------------------------------------------------------------------------------------


def sanitize(report: Report, options: argparse.Namespace) -> None:
    """Each tool over the small run, for an equal share of the time that is left."""
    report.found["tools"] = []
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for index, tool in enumerate(TOOLS):
        if program is None:
            report.add("tools", {"tool": tool, "result": "compute-sanitizer is not installed", "clean": None})
            continue
        command = [program, "--tool", tool, "--require-cuda-init", "no" if options.device == "cpu" else "yes"]
        # initcheck must see who writes, torch's kernels too.
        command += [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=ntm"]
        command += ["--padding", "64"] if tool == "memcheck" else []
        command += [sys.executable, str(ROOT / "benchmarks" / "run.py"), "gpu_small_run", options.device]
        log = report.out / f"gpu_sanitize_{tool}.log"
        start = time.monotonic()
        # Every tensor an allocation of its own, or an overrun would end in torch's cache, unseen.
        status = run_within(report.left() / (len(TOOLS) - index) - 15, command, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        finding = {"tool": tool, "seconds": round(time.monotonic() - start), "log": log.name}
        finding |= verdict(log.read_text(), status)
        report.add("tools", finding)
        if finding["clean"] is False:
            report.fail(tool, finding["result"])


def verdict(log: str, status: int | None) -> dict[str, Any]:
    """What a run under compute-sanitizer says: ``clean``, None where it says nothing."""
    if status is None:
        done = sum(line[:1].isdigit() for line in log.splitlines())
        return {"result": f"cut short after {done} of the small run's steps", "clean": None}
    if refused := re.search(r"Device not supported.*", log):
        return {"result": f"could not run: {refused[0]}", "clean": None}
    if summary := re.search(r"(?:ERROR|RACECHECK) SUMMARY: ((\d+).*)", log):
        return {"result": f"{summary[1]}, exit status {status}", "clean": summary[2] == "0" and status == 0}
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "it printed nothing")
    return {"result": f"no summary, exit status {status}: {last}", "clean": False}


def sanitize_text(found: dict[str, Any]) -> list[str]:
    lines = ["| compute-sanitizer | | s |", "|---|---|---:|"]
    lines += [f"| {one['tool']} | {one['result']} | {one.get('seconds', '')} |" for one in found["tools"]]
    return [*lines, ""]


MEASURED = {"bench": gpu_bench.bench, "engines": gpu_engines.engines, "compiled": gpu_engines.compiled}
TEXTS = {
    "suite": suite_text,
    "sanitize": sanitize_text,
    "bench": gpu_bench.text,
    "engines": gpu_engines.text,
    "compiled": gpu_engines.text,
}
