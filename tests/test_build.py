"""What setup.py builds, what it refuses, and its messages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import count_warnings, python, source_tree


def build(tree: Path, out: str = "out", **environment: str) -> subprocess.CompletedProcess:
    ours = ("NTM_", "CXX", "CUDA", "CMAKE_CUDA", "TORCH_CUDA")  # what decides what is built
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", out],
        cwd=tree,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def has(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) for name in modules)


def setuptools_is_new() -> bool:
    return has("setuptools") and int(importlib.metadata.version("setuptools").split(".")[0]) >= 77


needs_setuptools = pytest.mark.skipif(not setuptools_is_new(), reason="setuptools 77 or newer builds the package")
needs_cmake = pytest.mark.skipif(
    not setuptools_is_new() or not has("cmake", "ninja", "pybind11") or shutil.which("g++") is None,
    reason="setuptools, cmake, ninja, pybind11 and g++ build the package",
)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A source tree whose binding and CPU kernels serve nothing, and compile in no time."""
    tree = source_tree(tmp_path / "tree")
    for source in (tree / "csrc").rglob("*.cpp"):
        source.write_text("")
    (tree / "csrc" / "binding.cpp").write_text(
        "#include <Python.h>\nPyMODINIT_FUNC PyInit__C() { return nullptr; }\n"
    )
    (tree / "csrc" / "cpu" / "kernels.cpp").write_text(
        '#include "operators.h"\n'
        "static const ntm::Backend backend{NTM_VARIANT, {}, {}};\n"
        'extern "C" const ntm::Backend* ntm_backend() { return &backend; }\n'
    )
    return tree


@needs_setuptools
def test_install_without_a_compiler_is_pure_python_and_says_so(tree, tmp_path):
    (tmp_path / "bin").mkdir()
    done = build(tree, PATH=str(tmp_path / "bin"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tree / "out").rglob("*.so"))
    told = python(count_warnings(), tmp_path, PYTHONPATH=str(tree / "out"))
    assert told["cpu"] is None and told["cuda"] is None
    assert "no C++ compiler" in told["cpu_reason"] and "no C++ compiler" in told["cuda_reason"]
    assert told["at_import"] == 0
    assert len(told["warnings"]) == 1 and "no C++ compiler" in told["warnings"][0]


@needs_setuptools
def test_demanding_cuda_without_a_compiler_fails(tree, tmp_path):
    (tmp_path / "bin").mkdir()
    done = build(tree, PATH=str(tmp_path / "bin"), NTM_CUDA="1")
    assert done.returncode != 0
    assert "NTM_CUDA=1, but" in done.stderr and "no C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr


@needs_setuptools
def test_ntm_cuda_is_checked(tree):
    done = build(tree, NTM_CUDA="yes")
    assert done.returncode != 0 and "NTM_CUDA=yes: must be auto, 1 or 0" in done.stderr


def architectures(tree: Path, tmp_path: Path, gpus: str, patience: float = 10, **environment: str) -> str:
    """What setup.py would build for, with an nvcc that knows 7.5, 9.0 and 9.1, and an nvidia-smi of these lines."""
    folder = tmp_path / "tools"
    folder.mkdir(exist_ok=True)
    for name, script in (
        ("nvcc", "echo compute_75; echo compute_90; echo compute_91"),
        ("nvidia-smi", gpus),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    code = f"""
import setuptools
setuptools.setup = lambda **_: None
import setup
setup.NVIDIA_SMI_SECONDS = {patience}
try:
    result = {{"it": ";".join(setup.cuda_architectures({str(folder / "nvcc")!r}))}}
except setup.CompileError as error:
    result = {{"it": str(error)}}
"""
    names = ("CMAKE_CUDA_ARCHITECTURES", "CUDAARCHS", "TORCH_CUDA_ARCH_LIST")
    unset = dict.fromkeys(names, "")
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return python(code, tree, PATH=path, **{**unset, **environment})["it"]


@needs_setuptools
@pytest.mark.parametrize(
    ("gpus", "wanted"),
    [
        ("echo 9.0; echo 9.0", "90-real"),
        ("echo 9.0; echo 7.5", "75-real;90-real"),
        ("echo 9.0; echo 12.1", "90-real;75-virtual"),  # the second is too new for this nvcc
        ("echo 6.1", "75-virtual"),  # too old for the kernels
        ("exit 9", "75-virtual"),
        ("echo '[N/A]'", "75-virtual"),
        ("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2", "75-virtual"),
    ],
)
def test_cuda_is_built_for_the_gpus_that_are_visible(tree, tmp_path, gpus, wanted):
    assert architectures(tree, tmp_path, gpus) == wanted


@needs_setuptools
def test_cuda_architectures_that_are_asked_for(tree, tmp_path):
    gpus = "echo 9.0"
    assert architectures(tree, tmp_path, gpus, TORCH_CUDA_ARCH_LIST="all") == "75-real;90-real;90-virtual"
    assert architectures(tree, tmp_path, gpus, TORCH_CUDA_ARCH_LIST="8.0+PTX") == "80-real;80-virtual"
    assert architectures(tree, tmp_path, gpus, CUDAARCHS="75-virtual") == "75-virtual"
    assert "'Maxwell' is not an architecture" in architectures(tree, tmp_path, gpus, TORCH_CUDA_ARCH_LIST="8.0 Maxwell")


@needs_setuptools
def test_an_nvidia_smi_that_hangs_is_left_behind(tree, tmp_path):
    assert architectures(tree, tmp_path, "exec sleep 60", patience=0.2) == "75-virtual"


@needs_cmake
@pytest.mark.slow
def test_cuda_that_does_not_build_leaves_the_cpu_part_or_fails_as_asked(tree, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal   : this toolkit is broken' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    done = build(tree, CUDACXX=str(nvcc))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tree / "out" / "ntm_fast" / "_build.json").read_text())
    assert record["cpu"] and record["cuda"] is None and "this toolkit is broken" in record["cuda_reason"]

    done = build(tree, CUDACXX=str(nvcc), NTM_CUDA="1")
    assert done.returncode != 0
    assert "NTM_CUDA=1, but" in done.stderr and "this toolkit is broken" in done.stderr


@needs_cmake
@pytest.mark.slow
def test_a_compile_error_is_an_error_and_is_shown(tree):
    source = tree / "csrc" / "cpu" / "kernels.cpp"
    source.write_text(source.read_text() + "int broken = nonsense;\n")
    done = build(tree)
    assert done.returncode != 0
    assert "could not be built" in done.stderr and "nonsense" in done.stderr
    assert not list((tree / "out").rglob("_build.json"))


@needs_cmake
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_builds_do_not_mix(tree, tmp_path):
    for kernels in (tree / "csrc" / "cuda").glob("*.cu"):  # no kernels in the table: they would take minutes to compile
        if kernels.stem != "backend":
            serve = r"(void serve_\w+\(Operators<T>&) table\) \{.*?^\}"
            text, count = re.subn(serve, r"\1) {}", kernels.read_text(), flags=re.M | re.S)
            assert count == 1
            kernels.write_text(text)
    wrapper = tmp_path / "wrapped" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec "{shutil.which("nvcc")}" "$@"\n')
    wrapper.chmod(0o755)
    path = f"{wrapper.parent}:{os.environ['PATH']}"

    def built(**environment) -> tuple[str | None, bool]:
        done = build(tree, PATH=path, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads((tree / "out" / "ntm_fast" / "_build.json").read_text())
        assert record["cpu"]
        return record["cuda"], (tree / "out" / "ntm_fast" / "ntm_cuda.so").exists()

    assert built(TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX", NTM_CUDA="1") == ("80;90;90-virtual", True)
    assert built(NTM_CUDA="0") == (None, False)
    assert built(CUDAARCHS="75-virtual") == ("75-virtual", True)
