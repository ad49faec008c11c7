"""What was built, which part is loaded, and the message where a part is missing.

Most tests run in a fresh process, because native parts are loaded once in each process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.processes import BUILD, WORK, count_warnings, native_cpu, python, source_tree

import ntm_fast
from ntm_fast import native
from ntm_fast.native import build, parts

LIBRARIES = sorted(Path(BUILD["folder"]).glob("ntm_*.so")) if BUILD["folder"] else []
VARIANTS = ("baseline", "x86-64-v3", "x86-64-v4")

needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")


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
        for part in ("cpu", "cuda"):  # there is a reason exactly where something was not built
            assert bool(told["build"][part]) == (told["build"][f"{part}_reason"] is None)
        built = {path.name for path in LIBRARIES}
        files = {name: file for name, file, _ in parts.VARIANTS}
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
    assert "not for mps" in native.why_not("mps", False, "read")


@pytest.mark.skipif(not BUILD["cuda"], reason="no CUDA part was built")
def test_cuda_part_loads_without_a_driver():
    assert parts.cuda().id is not None
    problem = build.extension().problem(parts.cuda().id)
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
        ("75-virtual", (7, 5), True),
        ("75-virtual", (12, 0), True),
        ("75-virtual", (7, 0), False),
    ],
)
def test_which_devices_the_architectures_serve(monkeypatch, architectures, device, served):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: device)
    reason = parts.no_device(architectures)
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
    needed = {name: needed for name, _, needed in parts.VARIANTS}[name]
    supported = needed <= build.extension().cpu_level()
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
    level = build.extension().cpu_level()
    best = next(name for name, _, needed in parts.VARIANTS if needed <= level and name in BUILD["cpu"])
    assert python("import ntm_fast; result = ntm_fast.capabilities()", tmp_path)["cpu"] == best


def test_unknown_variant_is_named(tmp_path):
    told = python("import ntm_fast; result = ntm_fast.capabilities()", tmp_path, NTM_CPU="avx9")
    assert told["cpu"] is None
    if BUILD["cpu"]:
        assert "avx9" in told["cpu_reason"] and "x86-64-v3" in told["cpu_reason"]


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
    extension, backend = build.extension(), parts.cpu().id
    with pytest.raises(RuntimeError, match="no/such/library"):
        extension.load("/no/such/library.so")
    with pytest.raises(IndexError, match="1000"):
        extension.interpolate(1000, False)
    with pytest.raises(TypeError, match="takes"):
        extension.interpolate(backend, False, 1, 1, 8)
    with pytest.raises(TypeError):
        extension.interpolate(backend, False, "1", 1, 8, 0, 0, 0, 0, 1, 0, 0)
    with pytest.raises(ValueError, match="reed"):
        extension.serves(backend, False, "reed")


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
    # Native parts are looked for at first use. Before that, the path is emptied, so that no installed copy is found.
    code = "import sys, ntm_fast; sys.path[:] = ['']; result = {'file': ntm_fast.__file__, **ntm_fast.capabilities()}"
    told = python(code, source_tree(tmp_path / "tree"))
    assert told["file"].startswith(str(tmp_path))
    for part in ("cpu", "cuda"):
        assert told[part] is None and "nothing has been built" in told[f"{part}_reason"]
    assert told["build"] is None
