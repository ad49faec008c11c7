"""Finds this package's native build and loads parts of it. Nothing here raises at import."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch  # before any native part: its OpenMP runtime is the one that serves both
from torch.torch_version import TorchVersion

PACKAGE = Path(__file__).resolve().parents[1]  # where setup.py puts the native parts
RECORD = "_build.json"  # what setup.py says of them
# Tensors of exactly these classes behave as plain tensors; subclasses may not.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


class Missing(Exception):
    """A native part cannot serve; the text is the reason."""


class Build(NamedTuple):
    folder: Path
    record: dict[str, Any]  # what setup.py wrote into RECORD


def sources_digest(tree: Path) -> str:
    """A digest of all that is compiled of a source tree. setup.py has its own copy: it cannot import this package."""
    files = sorted(path for path in (tree / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


@functools.cache
def find() -> Build | Missing:
    """This package's own build. A source tree without one borrows that of an installed copy of the same sources."""
    if (PACKAGE / RECORD).exists():
        return Build(PACKAGE, json.loads((PACKAGE / RECORD).read_text()))
    tree, name = PACKAGE.parent, PACKAGE.name
    sources = sources_digest(tree)
    folders = [Path(path, name) for path in sys.path if Path(path, name, RECORD).exists()]
    others = [Build(folder, json.loads((folder / RECORD).read_text())) for folder in folders]
    for build in others:
        if build.record["sources"] == sources:
            return build
    if others:
        return Missing(
            f"ntm_fast was imported from the source tree {tree}, and the copy installed in {others[0].folder} "
            f"was built from other sources (version {others[0].record['version']}): run 'pip install .' again"
        )
    return Missing(
        f"ntm_fast was imported from {PACKAGE}, where nothing has been built: run 'pip install .' in its source tree"
    )


def found() -> Build:
    """:func:`find`'s build; raises Missing where there is none."""
    build = find()
    if isinstance(build, Missing):
        raise build
    return build


@functools.cache
def extension() -> Any:
    """The binding, csrc/binding.cpp; raises Missing where there is none."""
    build = found()
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = build.folder / f"_C{suffix}"
        if path.exists():
            return _imported(path)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    built_for = f"ntm_fast in {build.folder} was built for Python {build.record['python']}, and this is Python {python}"
    raise Missing(build.record["cpu_reason"] or built_for)


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"{PACKAGE.name}._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise Missing(f"{path} does not load: {error}") from error
    # Before torch 2.10 a table is not torch's own: another package may have put it there.
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if TorchVersion(torch.__version__) >= "2.10" and table is not None:
        module.exchange_with(table, *PLAIN)
    return module


def load(file: str) -> int:
    """Load one backend of the build -> its id for the binding. Raises Missing."""
    try:
        return extension().load(str(found().folder / file))
    except RuntimeError as error:
        raise Missing(f"{file} does not load: {error}") from error


def share_openmp() -> None:
    """Offer torch's OpenMP runtime to what is loaded next, so that the process has one pool of threads.

    The CPU variants are not linked with a runtime. Wheels of torch carry theirs under many names: libgomp.so.1,
    libgomp-a34b3233.so.1, libiomp5.so.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # no /proc: not Linux
        return
    mapped = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
    runtimes = sorted(path for path in mapped if re.search(r"/lib(gomp|i?omp)\d*\b[^/]*\.so[^/]*$", path))
    home = str(Path(torch.__file__).parent)  # .../torch, beside which wheel repair puts .../torch.libs
    of_torch = [path for path in runtimes if path.startswith((f"{home}/", f"{home}.libs/"))]
    for path in [*of_torch, *runtimes][:1]:
        ctypes.CDLL(path, mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD)
    if not runtimes:  # a torch without OpenMP
        try:
            ctypes.CDLL("libgomp.so.1", mode=os.RTLD_GLOBAL)
        except OSError as error:
            raise Missing(f"there is no OpenMP runtime: {error}") from error
