"""Check and measure ntm_fast on this machine's GPU, in parts of at most eight minutes each.

    python benchmarks/run.py gpu                     build and install, then every part
    python benchmarks/run.py gpu --part suite        the tests: first those on CUDA, then all others
    python benchmarks/run.py gpu --part sanitize     compute-sanitizer's four tools over a small run
    python benchmarks/run.py gpu --part bench        kernels against copies, the memory step
    python benchmarks/run.py gpu --part engines      training and inference by engine over all sizes, their memory,
                                                     profiles, and copy trained until it is solved
    python benchmarks/run.py gpu --part compiled     engines against torch.compile(mode="max-autotune")
    python benchmarks/run.py gpu --device cpu        a smoke run without a GPU: its figures mean nothing

Each part writes gpu_<part>.json and gpu_<part>.md, after every finding anew: what was found is there if it is cut
short. It stops by itself when its time is up and says what it left out; the most important comes first.

Exit status: 0 all is well, 1 something failed, 2 it cannot run here. A target that is missed is no failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("suite", "sanitize", "bench", "engines", "compiled")
FINE, FAILED, IMPOSSIBLE = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        "run.py gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="[all, one after another]")
    parser.add_argument("--seconds", type=float, default=420.0, help="time for each part, the build included [420]")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="[benchmarks/results]")
    parser.add_argument("--no-build", dest="build", action="store_false", help="take ntm_fast as it is installed")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="without torch.compile")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="suite: which tests [tests]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"error: there is no GPU to report on: torch {torch.__version__} sees no CUDA device. "
            "(--device cpu makes a smoke run without one.)",
            file=sys.stderr,
        )
        return IMPOSSIBLE
    try:
        if options.build:
            build(options.device, options.seconds)
        # Only now: what this imports may have been installed just before.
        from reports.gpu_parts import run

        failures = 0
        for part in options.part:
            failures += run(part, options, until=start + options.seconds)
            start = time.monotonic()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return IMPOSSIBLE
    return FAILED if failures else FINE


def build(device: str, seconds: float) -> None:
    """Install this tree into the environment, for this GPU alone. Raises ValueError with the reason."""
    environment = dict(os.environ, NTM_CUDA="1" if device == "cuda" else "0")
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{' '.join(command)} took more than {seconds:.0f} s") from error
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")

