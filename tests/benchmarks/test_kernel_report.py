"""What the assembler reports of the CUDA kernels: none uses local memory, and each leaves room for the planned warps.

Nothing is compiled here. The tests read what the last build of these sources left behind, and are skipped where that
build had no CUDA part or PTX alone, unless NTM_TEST_REQUIRE names kernel_report.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from helpers.backends import required

from ntm_fast import ops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # as run.py has it

from reports import kernels as kernel_report  # noqa: E402
from reports.kernels import Kernel, Usage  # noqa: E402


@pytest.fixture(scope="module")
def found() -> kernel_report.Usages:
    try:
        return kernel_report.usages(kernel_report.build_folder())
    except ValueError as error:
        (pytest.fail if required("kernel_report") else pytest.skip)(str(error))


def test_every_operator_has_its_kernels(found):
    wanted = {name.replace("_", "") + direction for name in ops.CONTRACTS for direction in ("", "backward")}
    wanted |= {"sequenceforward", "sequencebackward", "packedlayer"}
    for dtype in ("float32", "float64"):
        assert {kernel.operator.lower() for kernel in found if kernel.dtype == dtype} == wanted
    assert {kernel.operator.lower() for kernel in found if kernel.serves_standard_shapes()} == wanted


def test_no_local_memory_and_room_for_the_warps_that_the_plan_counts_on(found):
    assert kernel_report.problems(found) == []


def test_a_tile_of_a_sequence_has_the_registers_that_its_block_needs(found):
    for kernel, by_architecture in found.items():
        for one in kernel_report.built(found) if kernel.team.startswith("tile") else ():
            assert by_architecture[one].warps(one, kernel.block()) >= kernel.block()


def test_the_page_is_what_was_built(found):
    page, nvcc = kernel_report.PAGE.read_text(), kernel_report.nvcc_version(kernel_report.build_folder())
    if f"nvcc {nvcc} " not in page:
        pytest.skip(f"docs/kernels.md is of another nvcc than {nvcc}")
    advice = f"run '{kernel_report.COMMAND}', commit docs/kernels.md"
    architectures = kernel_report.built(found)
    if architectures == kernel_report.ARCHITECTURES:
        assert page == kernel_report.page(found, nvcc), advice
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    columns = [3 + kernel_report.ARCHITECTURES.index(one) for one in architectures]
    on_page = [[*row[:3], *(row[column] for column in columns)] for row in rows]
    wanted = [
        [f"`{kernel.operator}`", kernel.dtype, kernel.team]
        + [kernel_report.registers(kernel, usage[one], one) for one in architectures]
        for kernel, usage in found.items()
    ]
    assert on_page == wanted, advice


# --- the report itself ------------------------------------------------------------------------------------------------

WARP = Kernel("Read", "float32", "warp")
GOOD = Usage(128, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("registers", "architecture", "warps"),
    # As NVIDIA's occupancy calculator has it, for blocks of 128 threads.
    [(32, "sm_90", 64), (33, "sm_90", 48), (96, "sm_90", 20), (128, "sm_80", 16), (129, "sm_80", 12)]
    + [(168, "sm_90", 12), (169, "sm_90", 8), (255, "sm_90", 8), (32, "sm_120", 48), (40, "sm_120", 48)],
)
def test_resident_warps(registers: int, architecture: str, warps: int) -> None:
    assert Usage(registers, 0, 0, 0, 0).warps(architecture, block=4) == warps


@pytest.mark.parametrize("change", [{"stack": 8}, {"spill_stores": 4}, {"spill_loads": 4}, {"registers": 200}], ids=str)
def test_problems_are_found(change: dict) -> None:
    bad = GOOD._replace(**change)
    for architecture in kernel_report.ARCHITECTURES:
        usages = dict.fromkeys(kernel_report.ARCHITECTURES, GOOD) | {architecture: bad}
        (problem,) = kernel_report.problems({WARP: usages})
        assert architecture in problem and "Read" in problem
        # Kernels for float64, and for sizes beyond the standard ones, may be slow: they are no problem.
        assert not kernel_report.problems({Kernel("Read", "float64", "block, unstaged"): usages})


@pytest.mark.parametrize(
    ("name", "kernel", "warps"),
    [
        ("for_each_item<ntm::cuda::Warp<float>, ntm::Read<float>, float>(", WARP, kernel_report.BLOCK),
        (
            "through_time<ntm::cuda::SequenceBackward<double>, false, double>(",
            Kernel("SequenceBackward", "float64", "tile, memories in place"),
            kernel_report.TILE_BLOCK["float64"],
        ),
        (
            "through_time<ntm::cuda::SequenceForward<float>, true, float>(",
            Kernel("SequenceForward", "float32", "tile"),
            kernel_report.TILE_BLOCK["float32"],
        ),
        ("pack_layer<float>(", Kernel("PackedLayer", "float32", "grid"), kernel_report.BLOCK),
    ],
    ids=lambda value: str(value).split("<")[0],
)
def test_names_of_kernels(name: str, kernel: Kernel, warps: int) -> None:
    assert kernel_report.kernel_of(f"void ntm::cuda::{name}...)") == kernel
    assert kernel.block() == warps


NAME = "_ZN3ntm4cuda13for_each_itemINS0_4WarpIfEENS_4ReadIfEEfEEvT0_llPT1_"
ENTRY = f"""ptxas info    : Compiling entry function '{NAME}' for '{{0}}'
ptxas info    : Function properties for {NAME}
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 16 bytes cumulative stack size, 64 bytes smem, 424 bytes cmem[0]
ptxas info    : Compile time = 70.532 ms
"""


def _log(folder: Path, *builds: dict[str, str]) -> Path:
    """A build folder with the log of several builds, each of some objects."""
    lines = ["cmake says\n"]
    for build in builds:
        for step, (name, text) in enumerate(build.items(), 1):
            lines.append(f"[{step}/{len(build)}] Building CUDA object CMakeFiles/x.dir/csrc/cuda/{name}.o\n{text}")
    (folder / "build.log").write_text("".join(lines))
    return folder


def test_the_log_of_several_builds(tmp_path):
    names = [path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
    nothing = dict.fromkeys(names, "ptxas info    : 0 bytes gmem\n")
    entries = [ENTRY.format(one) for one in kernel_report.ARCHITECTURES]
    again = [entry.replace("40 registers", "41 registers") for entry in entries]
    # Where an object was compiled twice, the last time counts.
    builds = {**nothing, names[0]: "".join(entries)}, {names[0]: "".join(again)}
    usages = kernel_report.usages(_log(tmp_path, *builds))
    assert usages == {WARP: dict.fromkeys(kernel_report.ARCHITECTURES, Usage(41, 16, 4, 8, 64))}
    row = "| `Read` | float32 | warp | 41 (40) | 41 (40) | 41 (40) | 16 | 4, 8 | 64 |"
    assert row in kernel_report.page(usages, "1").splitlines()

    with pytest.raises(ValueError, match=f"nothing on {re.escape(names[-1])}"):
        kernel_report.usages(_log(tmp_path, {name: nothing[name] for name in names[:-1]}))
    some = kernel_report.usages(_log(tmp_path, {**nothing, names[0]: "".join(entries[1:])}))
    assert kernel_report.built(some) == kernel_report.ARCHITECTURES[1:]
    with pytest.raises(ValueError, match="not built for sm_80"):
        kernel_report.page(some, "1")
    with pytest.raises(ValueError, match="built for none of"):
        kernel_report.usages(_log(tmp_path, nothing))
    with pytest.raises(ValueError, match="reads otherwise"):
        kernel_report.usages(_log(tmp_path, {**nothing, names[0]: entries[0].replace("spill", "pill")}))
    with pytest.raises(ValueError, match="not one that"):
        kernel_report.usages(_log(tmp_path, {**nothing, names[0]: entries[0].replace("for_each", "for_some")}))


def test_a_build_of_other_sources_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_report, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "one.cu").write_text("int x;\n")
    log = tmp_path / "build" / "cpython-311-wheel" / "cuda" / "build.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"[1/1] Linking\nsources {kernel_report.native.sources_digest(tmp_path)}\n")
    assert kernel_report.build_folder() == log.parent
    (tmp_path / "csrc" / "one.cu").write_text("int y;\n")
    with pytest.raises(ValueError, match="no CUDA part of these sources"):
        kernel_report.build_folder()
