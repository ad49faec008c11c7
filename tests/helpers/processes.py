"""Run Python in fresh processes, and make source trees without a build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ntm_fast

ROOT = Path(__file__).resolve().parents[2]

BUILD = ntm_fast.capabilities()["build"] or {"cpu": [], "cuda": None, "folder": "", "cpu_reason": "nothing built"}

native_cpu = pytest.mark.skipif(not ntm_fast.available("cpu"), reason=str(ntm_fast.capabilities()["cpu_reason"]))
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")

# The tensors are so large that the native operator runs in parallel.
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


def count_warnings(work: str = WORK) -> str:
    """A program that calls work() three times and returns the warnings."""
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


def source_tree(folder: Path) -> Path:
    """The package's sources without anything built, in a folder of their own."""
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("ntm_fast", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder
