"""Compiles csrc/cuda with g++: as a backend to load, and with a program around it, plain or with sanitizers.

What is built lies in build/cuda_on_host, and is used again as long as neither sources nor flags nor compiler change.
When several pytest workers want the same, one of them builds it and the others wait.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILT = ROOT / "build" / "cuda_on_host"

SOURCES = (".h", ".cpp", ".cu")
# -O1, because everything is inlined and -O2 takes minutes. Without contraction, so that every kind gives the same bits.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
]
KINDS = {
    "plain": [],
    # The checks that are left out would take minutes to compile, because so much is inlined.
    "address": [
        "-fsanitize=address,undefined",
        "-fsanitize-recover=address",  # a program goes on after an error if ASAN_OPTIONS says so
        "-fno-sanitize=null,alignment,pointer-overflow",
        "-fno-sanitize-recover=undefined",
        "-fno-sanitize-address-use-after-scope",
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-fsanitize=thread"],
}


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")


@functools.cache
def missing(kind: str = "plain") -> str | None:
    """Why this machine cannot build and run the kind; None when it can."""
    if shutil.which("g++") is None:
        return "there is no g++"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "empty.cpp"), Path(folder, "empty")
        source.write_text("int main() {}\n")
        for command in (["g++", *FLAGS, *KINDS[kind], source, "-o", program], [program]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                return f"g++ {' '.join(KINDS[kind])}: {done.stdout.strip()[:300]}"
    return None


def compiled(sources: tuple[Path, ...], product: str, kind: str = "plain", csrc: Path = CSRC) -> Path:
    """Compile the sources and the scheduler to ``product``: a program, or a backend if the name ends in .so."""
    return _compiled(sources, product, kind, csrc, _digest(sources, csrc))


def _digest(sources: tuple[Path, ...], csrc: Path) -> str:
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    files = sorted(path for path in csrc.rglob("*.*") if path.suffix in SOURCES)
    files += [*sorted(HERE.glob("*.h")), HERE / "scheduler.cpp", *sources]
    content = [version, repr((FLAGS, KINDS)).encode(), *(path.read_bytes() for path in files)]
    return hashlib.sha256(b"\0".join(content)).hexdigest()[:16]


@functools.cache
def _compiled(sources: tuple[Path, ...], product: str, kind: str, csrc: Path, digest: str) -> Path:
    result = BUILT / digest / kind / product
    if result.exists():
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{result}.lock"):
        if not result.exists():
            _build(sources, result, kind, csrc)
    return result


def _build(sources: tuple[Path, ...], result: Path, kind: str, csrc: Path) -> None:
    for stale in BUILT.iterdir():  # built from other sources; if it is young, another process may still use it
        if stale != result.parents[1] and time.time() - stale.stat().st_mtime > 24 * 3600:
            shutil.rmtree(stale, ignore_errors=True)
    backend = result.suffix == ".so"
    # A program prints the names of its kernels, so they must be visible.
    visibility = ["-fvisibility=hidden"] if backend else []
    linked = ["-shared", f"-Wl,--version-script={csrc / 'exports.map'}"] if backend else ["-rdynamic", "-ldl"]
    with tempfile.TemporaryDirectory(dir=result.parent) as folder:

        def compile_one(source: Path) -> str:
            target = str(Path(folder, f"{source.name}.o"))
            # The scheduler switches stacks and tells the sanitizers itself, so it is compiled without them.
            flags = ["-O2"] if source.name == "scheduler.cpp" else KINDS[kind]
            _run("g++", *FLAGS, *flags, *visibility, f"-I{HERE}", f"-I{csrc}", "-x", "c++", "-c", source, "-o", target)
            return target

        largest_first = sorted((*sources, HERE / "scheduler.cpp"), key=lambda source: -source.stat().st_size)
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compile_one, largest_first))
        _run("g++", *KINDS[kind], *objects, *linked, "-o", Path(folder, result.name))
        os.replace(Path(folder, result.name), result)  # it is there only when it is whole
