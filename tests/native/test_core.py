"""The native core without Python: small programs, compiled here, that exit with 0 when all is well."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ntm_fast import native
from ntm_fast.native import build

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
# As in CMakeLists.txt, because results depend on what the compiler may do with floating point.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"]
VARIANTS = {"baseline": (1, []), "x86-64-v3": (3, ["-march=x86-64-v3"]), "x86-64-v4": (4, ["-march=x86-64-v4"])}


def compile_and_run(name: str, folder: Path, flags: list[str]) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program, source = folder / name, HERE / f"{name}.cpp"
    build = [compiler, *FLAGS, *flags, f"-I{CSRC}", str(source), "-o", str(program)]
    subprocess.run(build, check=True, timeout=120)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("variant", VARIANTS)
def test_elementary_functions_and_tiles(variant, tmp_path):
    level, flags = VARIANTS[variant]
    if native.available("cpu") and level > build.extension().cpu_level():
        pytest.skip(f"this processor cannot run {variant}")
    compile_and_run("elementary", tmp_path, flags)


def test_cuda_launch_plans(tmp_path):
    """The launch plan for every size stays within the limits of a device."""
    compile_and_run("plan", tmp_path, [])
