"""The rules of docs/architecture.md that a program can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ntm_fast"
# Each imports from those before it and from itself.
FLOORS = (
    *("spec", "registry", "reference", "native", "ops", "engines", "modules", "tasks", "baselines", "importers"),
    *("training", "experiments", "cli"),
)
# What each folder of csrc may include, besides itself and the standard library.
INCLUDES = {"core": (), "cpu": ("core", "operators.h"), "cuda": ("core", "operators.h")}
ALLOWED = {"cpu": {"immintrin.h", "unistd.h"}, "cuda": {"cuda_runtime.h", "architectures.h", "math.h"}}
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))

pytestmark = pytest.mark.skipif(not SOURCES, reason="not in a source tree")


def imported(path: Path) -> set[str]:
    """The floors that a module of the package imports from."""
    package = path.relative_to(PACKAGE.parent).parent.parts  # ("ntm_fast", "ops")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - node.level + 1]
        names = [*base, *(node.module or "").split(".")] if node.module else list(base)
        if len(names) > 1:
            found.add(names[1])
        else:  # from .. import ops, reference
            found |= {alias.name for alias in node.names}
    return found & set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_imports_back(floor: str) -> None:
    own = PACKAGE / floor
    files = sorted(own.rglob("*.py")) if own.is_dir() else list(PACKAGE.glob(f"{floor}.py"))
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    wrong = {str(path.relative_to(ROOT)): imported(path) & above for path in files if imported(path) & above}
    assert not wrong, f"{floor} imports from what comes after it: {wrong}"


def test_every_part_of_the_package_has_its_floor() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__"} <= set(FLOORS)


def test_what_native_code_includes() -> None:
    """core knows nothing but the standard library; only what lies at the root knows Python; nothing knows torch."""
    wrong = []
    for path in SOURCES:
        floor = path.relative_to(ROOT / "csrc").parts[0]
        for line in path.read_text().splitlines():
            quoted, system = re.match(r'#include "(.+)"', line), re.match(r"#include <(.+)>", line)
            if quoted:
                first = quoted[1].split("/")[0]
                good = floor not in INCLUDES or first in (floor, *INCLUDES[floor], *ALLOWED.get(floor, ()))
            elif system:
                name = system[1]
                good = "torch" not in name and not name.startswith("ATen")
                if floor in INCLUDES:  # headers of the standard library have no ending
                    good = good and ("." not in name or name in ALLOWED.get(floor, ()))
            else:
                continue
            if not good:
                wrong.append(f"{path.relative_to(ROOT)}: {line}")
    assert not wrong


def test_functions_fit_a_page() -> None:
    """60 lines in Python, counted from ``def``; a signature with an argument a line and a docstring count too."""
    long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - (body[0].lineno if body else node.lineno) + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long


def test_files_are_short() -> None:
    files = [*PACKAGE.rglob("*.py"), *SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {path: lines for path, lines in long.items() if lines > 500}
