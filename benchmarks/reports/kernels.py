"""What every CUDA kernel takes of a multiprocessor, as the assembler told when it was built: writes docs/kernels.md.

    TORCH_CUDA_ARCH_LIST=all pip install . && python benchmarks/run.py kernels

Nothing is compiled for it: setup.py keeps what the compilers say in build/*/cuda/build.log, and this reads the last one
of the present sources. The page needs all of its architectures; a test compares with it those that were built.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ntm_fast import native
from shared.timing import ROOT, show, write

PAGE = ROOT / "docs" / "kernels.md"
COMMAND = "TORCH_CUDA_ARCH_LIST=all pip install . && python benchmarks/run.py kernels"


def planned(name: str) -> int:
    """A number of csrc/cuda/plan.h."""
    plan = (ROOT / "csrc" / "cuda" / "plan.h").read_text()
    found = re.search(rf"^constexpr \w+ {name} = (\d+);", plan, re.M)
    assert found is not None, name
    return int(found[1])


ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
# Of a multiprocessor: resident warps and blocks, at most (CUDA C++ Programming Guide, "Compute Capabilities").
LIMITS = {"sm_80": (64, 32), "sm_90": (64, 32), "sm_120": (48, 24)}
REGISTERS, GRANULE, PARTITIONS = 64 << 10, 256, 4  # alike in all of them; a warp gets whole granules of one partition
LANES = planned("warp_size")
BLOCK = planned("warps_per_block")  # of a block of single warps; the block that 128 locations get has as many
TEAMS = {"Warp": "warp", "Block true": "block", "Block false": "block, unstaged", "grid": "grid"}
TILES = {"true": "tile", "false": "tile, memories in place"}  # of a sequence's elements
TILE_BLOCK = {dtype: planned(f"sequence_threads_{dtype}") // LANES for dtype in ("float32", "float64")}  # warps
RESIDENT_WARPS = planned("resident_warps")  # that the plan counts on where it gives every element a warp
DTYPES = {"float": "float32", "double": "float64"}


class Kernel(NamedTuple):
    operator: str
    dtype: str
    team: str  # of threads, for one element: see csrc/cuda/plan.h

    def serves_standard_shapes(self) -> bool:
        return self.dtype == "float32" and self.team not in ("block, unstaged", "tile, memories in place")

    def block(self) -> int:
        """Warps of a block."""
        return TILE_BLOCK[self.dtype] if self.team.startswith("tile") else BLOCK


class Usage(NamedTuple):
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int  # known to the compiler; most is asked for at launch

    def warps(self, architecture: str, block: int = BLOCK) -> int:
        """Resident on a multiprocessor, as far as registers and threads allow, in blocks of so many."""
        most_warps, most_blocks = LIMITS[architecture]
        of_a_warp = -(-LANES * self.registers // GRANULE) * GRANULE
        by_registers = REGISTERS // PARTITIONS // of_a_warp * PARTITIONS
        return min(by_registers // block, most_warps // block, most_blocks) * block


Usages = dict[Kernel, dict[str, Usage]]  # by architecture


def build_folder() -> Path:
    """Where the present sources were last built. Raises ValueError where they were not."""
    digest = native.sources_digest(ROOT)
    logs = sorted(ROOT.glob("build/*/cuda/build.log"), key=lambda path: path.stat().st_mtime, reverse=True)
    for log in logs:
        if log.read_text().splitlines()[-1:] == [f"sources {digest}"]:
            return log.parent
    raise ValueError(f"no CUDA part of these sources was built in {ROOT / 'build'}: run 'NTM_CUDA=1 pip install .'")


def nvcc_version(folder: Path) -> str:
    texts = (path.read_text() for path in folder.glob("CMakeFiles/*/CMakeCUDACompiler.cmake"))
    return re.search(r'CMAKE_CUDA_COMPILER_VERSION "([\d.]+)"', "".join(texts))[1]


def usages(folder: Path) -> Usages:
    """By kernel and architecture. Raises ValueError where the log says nothing of the page's architectures."""
    objects = {}  # of an object that was compiled several times, the last time counts
    for part in re.split(r"^\[\d+/\d+\] ", (folder / "build.log").read_text(), flags=re.M):
        if named := re.match(r"Building CUDA object \S*/(\w+\.cu)\.o$", part, re.M):
            objects[named[1]] = part
    sources = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    if missing := sources - objects.keys():
        raise ValueError(f"{folder}: its log has nothing on {', '.join(sorted(missing))}: remove the folder and build")
    log = "".join(objects[source] for source in sorted(sources))
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        log,
        re.S,
    )
    if len(entries) != log.count("Compiling entry function"):
        raise ValueError(f"{folder}: its log reads otherwise than it did with nvcc 13.0")
    names = demangled([entry[0] for entry in entries])
    found: Usages = {}
    for name, (_, architecture, stack, stores, loads, registers, rest) in zip(names, entries):
        shared = re.search(r"(\d+) bytes smem", rest)
        usage = Usage(int(registers), int(stack), int(stores), int(loads), int(shared[1]) if shared else 0)
        found.setdefault(kernel_of(name), {})[architecture] = usage
    if not built(found):
        raise ValueError(
            f"{folder}: was built for none of {', '.join(ARCHITECTURES)}: run 'TORCH_CUDA_ARCH_LIST=9.0 pip install .'"
        )
    return dict(sorted(found.items()))


def built(found: Usages) -> tuple[str, ...]:
    """Those of the page's architectures that every kernel was built for."""
    return tuple(one for one in ARCHITECTURES if found and all(one in usage for usage in found.values()))


def demangled(names: list[str]) -> list[str]:
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise ValueError("reading the kernels' names needs c++filt, of binutils") from error
    return done.stdout.splitlines()


def kernel_of(name: str) -> Kernel:
    """``void ntm::cuda::for_each_item<ntm::cuda::Block<float, true>, ntm::Read<float>, float>(...)``

    or ``through_time<ntm::cuda::SequenceForward<float>, true, float>``, ``pack_layer<float>``
    """
    if tile := re.search(r"through_time<ntm::cuda::(\w+)<(\w+)>, (\w+)", name):
        operator, dtype, holds = tile.groups()
        return Kernel(operator, DTYPES[dtype], TILES[holds])
    if packing := re.search(r"ntm::cuda::pack_layer<(\w+)>", name):
        return Kernel("PackedLayer", DTYPES[packing[1]], "grid")
    parts = re.search(r"for_each_item<ntm::cuda::(\w+)<(\w+)(?:, (\w+))?>, ntm::(\w+)<", name)
    if not parts:
        raise ValueError(f"kernel {name}: not one that kernel_of knows how to read")
    team, dtype, staged, operator = parts.groups()
    return Kernel(operator, DTYPES[dtype], TEAMS[f"{team} {staged}" if staged else team])


def problems(found: Usages) -> list[str]:
    """What must not be, of kernels that serve the standard shapes."""
    lines = []
    for kernel, by_architecture in found.items():
        if not kernel.serves_standard_shapes():
            continue
        for architecture in built(found):
            usage = by_architecture[architecture]
            where = f"{kernel.operator}, {kernel.team}, {architecture}"
            if usage.stack or usage.spill_stores or usage.spill_loads:
                lines.append(f"{where}: local memory: {usage}")
            if kernel.team == "warp" and usage.warps(architecture) < RESIDENT_WARPS:
                lines.append(f"{where}: registers for {usage.warps(architecture)} warps: {usage}")
    return lines


def registers(kernel: Kernel, usage: Usage, architecture: str) -> str:
    """The page's cell of a kernel and an architecture."""
    return f"{usage.registers} ({usage.warps(architecture, kernel.block())})"


def page(found: Usages, nvcc: str) -> str:
    """Raises ValueError where an architecture of the page was not built."""
    if missing := set(ARCHITECTURES) - {*built(found)}:
        raise ValueError(f"not built for {', '.join(sorted(missing))}: run 'TORCH_CUDA_ARCH_LIST=all pip install .'")
    teams = ", ".join(f"{count} of a {team}" for team, count in counts(found).items())
    lines = [
        "# CUDA kernels",
        "",
        f"What each of the {len(found)} kernels ({teams}) takes of a multiprocessor, as the assembler of nvcc {nvcc} "
        "tells. Written by `python benchmarks/run.py kernels`; a test compares it with the build.",
        "",
        "For each architecture: registers of a thread, and in brackets the warps that can be resident on a "
        f"multiprocessor as far as registers and threads allow, in blocks of {LANES * BLOCK} threads, which 128 "
        f"locations get, of a tile of {LANES * TILE_BLOCK['float32']} (float64: {LANES * TILE_BLOCK['float64']}). "
        "Shared memory is asked for at launch and may allow fewer (`csrc/cuda/plan.h`, which counts on "
        f"{RESIDENT_WARPS} of the kernels of a warp); what the compiler fixed of it, like stack and spills, is in "
        "bytes, the worst of the architectures.",
        "",
        "| a multiprocessor has | " + " | ".join(ARCHITECTURES) + " |",
        "|---" + "|---:" * len(ARCHITECTURES) + "|",
        "| registers | " + " | ".join(f"{REGISTERS:,}" for _ in ARCHITECTURES) + " |",
        "| warps, at most | " + " | ".join(str(LIMITS[one][0]) for one in ARCHITECTURES) + " |",
        "| blocks, at most | " + " | ".join(str(LIMITS[one][1]) for one in ARCHITECTURES) + " |",
        "",
        "| kernel | | team | " + " | ".join(ARCHITECTURES) + " | stack | spilled, reloaded | shared |",
        "|---|---|---" + "|---:" * (len(ARCHITECTURES) + 3) + "|",
    ]
    for kernel, by_architecture in found.items():
        each = [by_architecture[one] for one in ARCHITECTURES]
        cells = [registers(kernel, usage, one) for one, usage in zip(ARCHITECTURES, each)]
        worst = Usage(*(max(values) for values in zip(*each)))
        lines.append(
            f"| `{kernel.operator}` | {kernel.dtype} | {kernel.team} | {' | '.join(cells)} | {worst.stack} | "
            f"{worst.spill_stores}, {worst.spill_loads} | {worst.shared} |"
        )
    return "\n".join(lines) + "\n"


def counts(found: Usages) -> dict[str, int]:
    return {team: sum(kernel.team == team for kernel in found) for team in (*TEAMS.values(), *TILES.values())}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "run.py kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    try:
        folder = build_folder()
        found = usages(folder)
        text = page(found, nvcc_version(folder))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write(PAGE, text)
    print(f"{len(found)} kernels, from {show(folder / 'build.log')}; written to {show(PAGE)}")
    for problem in problems(found):
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems(found) else 0

