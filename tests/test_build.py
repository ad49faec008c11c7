"""What the build makes, how it is loaded, and what is said where something is missing.

Most tests run a fresh process, because the native parts are loaded once in each.
"""

from __future__ import annotations

import hashlib
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
import torch

import ntm_fast
from ntm_fast import _native

ROOT = Path(__file__).resolve().parents[1]
BUILD = ntm_fast.capabilities()["build"] or {"cpu": [], "cuda": None, "folder": "", "cpu_reason": "nothing built"}
LIBRARIES = sorted(Path(BUILD["folder"]).glob("ntm_*.so")) if BUILD["folder"] else []
VARIANTS = ("baseline", "x86-64-v3", "x86-64-v4")

native_cpu = pytest.mark.skipif(not ntm_fast.available("cpu"), reason=str(ntm_fast.capabilities()["cpu_reason"]))
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")

# Calls a native operator in a parallel region, whatever the sizes from which the kernels go parallel.
WORK = """
import torch, ntm_fast
from ntm_fast import ops, reference
content, previous, gate = torch.rand(4096, 2, 128), torch.rand(4096, 2, 128), torch.rand(4096, 2)
def work():
    return ops.interpolate(content, previous, gate)
torch.testing.assert_close(work(), reference.interpolate(content, previous, gate))
"""


def python(code: str, cwd: Path, **environment: str) -> dict:
    """Run code in a fresh process, away from the source tree, and return the dict that it leaves in ``result``."""
    inherited = {name: value for name, value in os.environ.items() if name != "NTM_CPU"}
    done = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}\nprint('RESULT' + json.dumps(result))"],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.split("RESULT")[-1])


# --- what was built ---------------------------------------------------------------------------------------------------


def test_capabilities_tell_what_was_built():
    told = ntm_fast.capabilities()
    assert set(told) == {"cpu", "cpu_reason", "cuda", "cuda_reason", "build"}
    assert told["cpu"] in (None, *VARIANTS)
    for part in ("cpu", "cuda"):
        assert ntm_fast.available(part) == (told[f"{part}_reason"] is None)
        assert told[part] is not None or told[f"{part}_reason"]
    if told["build"]:
        assert told["build"]["version"] == ntm_fast.__version__
        assert told["cuda"] == told["build"]["cuda"]
        for part in ("cpu", "cuda"):  # a reason exactly where something was not built
            assert bool(told["build"][part]) == (told["build"][f"{part}_reason"] is None)
        built = {path.name for path in LIBRARIES}
        files = {name: file for name, file, _ in _native._VARIANTS}
        assert built == {files[name] for name in told["build"]["cpu"]} | ({"ntm_cuda.so"} if told["cuda"] else set())


def test_cuda_says_why_it_does_not_serve():
    told = ntm_fast.capabilities()
    if torch.version.cuda is None:
        assert not ntm_fast.available("cuda")
        if told["cuda"]:
            assert "has no CUDA" in told["cuda_reason"]
    elif not torch.cuda.is_available():
        assert told["cuda_reason"]
    assert not ntm_fast.available("mps")
    assert "not for mps" in _native.why_not("mps", False, "read")


@pytest.mark.skipif(not BUILD["cuda"], reason="no CUDA part was built")
def test_cuda_part_loads_without_a_driver():
    assert _native._cuda().id is not None
    problem = _native._extension().problem(_native._cuda().id)
    assert problem is None or "driver" in problem


@pytest.mark.parametrize(
    ("architectures", "device", "served"),
    [
        ("80;90;90-virtual", (8, 6), True),
        ("80;90;90-virtual", (7, 5), False),
        ("80;90;90-virtual", (12, 0), True),
        ("80;90", (12, 0), False),
        ("86", (8, 0), False),
        ("90a;90a-virtual", (9, 0), True),
        ("90a;90a-virtual", (10, 0), False),
    ],
)
def test_which_devices_the_architectures_serve(monkeypatch, architectures, device, served):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: device)
    reason = _native._no_device(architectures)
    assert reason is None if served else f"{device[0]}.{device[1]}" in reason


@needs_readelf
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_exports_its_table_and_links_no_openmp(library):
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    needed = [line for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert needed and not [line for line in needed if "omp" in line or "cudart" in line or "libcuda" in line]
    symbols = subprocess.run(["readelf", "--dyn-syms", "-W", library], capture_output=True, text=True, check=True)
    columns = [line.split() for line in symbols.stdout.splitlines() if line.strip()[:1].isdigit()]
    exported = {
        row[7] for row in columns if len(row) > 7 and row[4] in ("GLOBAL", "WEAK", "UNIQUE") and row[6] != "UND"
    }
    assert exported == ({"ntm_backend", "ntm_problem"} if library.name == "ntm_cuda.so" else {"ntm_backend"})


# --- choosing a CPU variant -------------------------------------------------------------------------------------------


DENORMALS = """
import numpy, torch
def denormals():
    tiny = torch.full((1 << 20,), 1e-39)  # large enough for every thread of torch's pool
    return [bool(numpy.float32(1e-39) * numpy.float32(0.5) > 0), bool(((tiny * 0.5) > 0).all()), 1e-310 * 0.5 > 0]
seen = [denormals()]
import ntm_fast
seen.append(denormals())
"""


@native_cpu
@pytest.mark.parametrize("name", BUILD["cpu"])
def test_forced_variant_serves_and_leaves_denormals_alone(name, tmp_path):
    needed = {name: needed for name, _, needed in _native._VARIANTS}[name]
    supported = needed <= _native._extension().cpu_level()
    code = DENORMALS + (WORK + "seen.append(denormals())\n" if supported else "")
    told = python(code + "result = {'denormals': seen, **ntm_fast.capabilities()}", tmp_path, NTM_CPU=name)
    assert all(all(seen) for seen in told["denormals"])
    if supported:
        assert (told["cpu"], told["cpu_reason"]) == (name, None)
    else:
        assert told["cpu"] is None and name in told["cpu_reason"]


def test_best_variant_that_the_processor_supports_is_chosen(tmp_path):
    if not BUILD["cpu"]:
        pytest.skip(BUILD["cpu_reason"])
    level = _native._extension().cpu_level()
    best = next(name for name, _, needed in _native._VARIANTS if needed <= level and name in BUILD["cpu"])
    assert python("import ntm_fast; result = ntm_fast.capabilities()", tmp_path)["cpu"] == best


def test_unknown_variant_is_named(tmp_path):
    told = python("import ntm_fast; result = ntm_fast.capabilities()", tmp_path, NTM_CPU="avx9")
    assert told["cpu"] is None
    if BUILD["cpu"]:
        assert "avx9" in told["cpu_reason"] and "x86-64-v3" in told["cpu_reason"]


def count_warnings(work: str = WORK) -> str:
    """A program that calls work() three times and tells what it was warned of."""
    indented = "\n".join("    " + line for line in work.splitlines())
    return f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ntm_fast
    at_import = len(caught)
{indented}
    for _ in range(3):
        work()
caught = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
result = {{"at_import": at_import, "warnings": caught, **ntm_fast.capabilities()}}
"""


MODULE_ALONE = "import torch\nfrom ntm_fast import FastNTM\nwork = lambda: FastNTM(3, 2)(torch.randn(4, 2, 3))"


@pytest.mark.parametrize("work", (WORK, MODULE_ALONE), ids=("operators", "module"))
def test_switched_off_means_the_reference_and_one_warning(tmp_path, work):
    told = python(count_warnings(work), tmp_path, NTM_CPU="off")
    assert told["cpu"] is None and "NTM_CPU=off" in told["cpu_reason"]
    assert told["at_import"] == 0
    assert len(told["warnings"]) == 1 and "NTM_CPU=off" in told["warnings"][0]


@native_cpu
def test_no_warning_where_the_native_part_serves(tmp_path):
    assert python(count_warnings(), tmp_path)["warnings"] == []


@native_cpu
def test_errors_of_the_binding():
    extension, backend = _native._extension(), _native._cpu().id
    with pytest.raises(RuntimeError, match="no/such/library"):
        extension.load("/no/such/library.so")
    with pytest.raises(IndexError, match="1000"):
        extension.interpolate(1000, False)
    with pytest.raises(TypeError, match="takes 11 values"):
        extension.interpolate(backend, False, 1, 1, 8)
    with pytest.raises(TypeError):
        extension.interpolate(backend, False, "1", 1, 8, 0, 0, 0, 0, 1, 0)
    with pytest.raises(ValueError, match="reed"):
        extension.serves(backend, False, "reed")


# --- threads ----------------------------------------------------------------------------------------------------------


@native_cpu
@needs_proc
def test_one_openmp_runtime_and_one_pool_of_threads(tmp_path):
    code = """
import os, torch
torch.set_num_threads(3)
def threads():
    return len(os.listdir("/proc/self/task"))
def runtimes():
    import re
    paths = {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if "omp" in line}
    return sorted(path for path in paths if re.search(r"/lib(gomp|i?omp)", path))
def torch_work():
    torch.rand(1 << 22).mul_(2).exp_()
torch_work()
result = {"torch": threads(), "before": runtimes()}
"""
    code += WORK + "for _ in range(20):\n    work(); torch_work()\n"
    code += "result |= {'both': threads(), 'after': runtimes(), 'cpu': ntm_fast.capabilities()['cpu']}"
    told = python(code, tmp_path)
    assert told["cpu"]
    assert told["torch"] > 2, "torch's pool was not at work, so this would show nothing"
    assert told["both"] == told["torch"]
    assert len(told["after"]) == 1 and told["after"] == told["before"]


@native_cpu
@needs_proc
def test_kernels_use_as_many_threads_as_torch(tmp_path):
    # Nothing but the native call goes parallel here: random numbers are drawn by one thread.
    code = WORK.replace("torch.testing", "threads = len(os.listdir('/proc/self/task'))\nwork() #")
    code = f"import os, torch\ntorch.set_num_threads(4)\n{code}"
    code += "result = {'started': len(os.listdir('/proc/self/task')) - threads}"
    assert python(code, tmp_path)["started"] == 3


# --- a source tree without a build ------------------------------------------------------------------------------------


def source_tree(folder: Path) -> Path:
    """The package's sources without anything built, in a folder of their own."""
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("ntm_fast", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder


def digest(tree: Path) -> str:
    files = sorted(path for path in (tree / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


@native_cpu
def test_source_tree_borrows_the_build_of_the_same_sources_only(tmp_path):
    tree, site = source_tree(tmp_path / "tree"), tmp_path / "site"
    shutil.copytree(BUILD["folder"], site / "ntm_fast", ignore=shutil.ignore_patterns("__pycache__"))
    record = {**BUILD, "sources": digest(tree)}
    (site / "ntm_fast" / "_build.json").write_text(json.dumps(record))
    code = "import ntm_fast; result = {'file': ntm_fast.__file__, **ntm_fast.capabilities()}"

    same = python(code, tree, PYTHONPATH=str(site))
    assert same["file"].startswith(str(tree))
    assert same["cpu"] and same["build"]["folder"] == str(site / "ntm_fast")

    (tree / "csrc" / "operators.h").write_text("// changed\n" + (tree / "csrc" / "operators.h").read_text())
    changed = python(code, tree, PYTHONPATH=str(site))
    assert changed["cpu"] is None
    for part in ("cpu", "cuda"):
        assert "other sources" in changed[f"{part}_reason"] and str(site) in changed[f"{part}_reason"]


def test_source_tree_with_no_build_anywhere_says_so(tmp_path):
    # Parts are looked for at first use: by then nothing is left on the path that could hold an installed copy.
    code = "import sys, ntm_fast; sys.path[:] = ['']; result = {'file': ntm_fast.__file__, **ntm_fast.capabilities()}"
    told = python(code, source_tree(tmp_path / "tree"))
    assert told["file"].startswith(str(tmp_path))
    for part in ("cpu", "cuda"):
        assert told[part] is None and "nothing has been built" in told[f"{part}_reason"]
    assert told["build"] is None


# --- building ---------------------------------------------------------------------------------------------------------


def build(tree: Path, out: str = "out", **environment: str) -> subprocess.CompletedProcess:
    ours = ("NTM_", "CXX", "CUDA", "CMAKE_CUDA", "TORCH_CUDA")
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
    """A source tree whose CPU kernels serve nothing, and compile in no time."""
    tree = source_tree(tmp_path / "tree")
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
    for kernels in (tree / "csrc" / "cuda").glob("*.cu"):  # a table without kernels, which take minutes to compile
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
    assert built(CUDAARCHS="90-real") == ("90", True)
    done = build(tree, PATH=path, TORCH_CUDA_ARCH_LIST="Maxwell")
    assert done.returncode != 0 and "Maxwell" in done.stderr
