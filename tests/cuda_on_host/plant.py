"""Faults in a copy of the kernels. None is active until the program is told its number: its place in FAULTS, from 1."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from . import build

# File, text that stands in it once, and the text that replaces it in the copy. PLANTED("name") is 1 while that fault is
# active, else 0.
SITES = [
    (
        "cuda/team.h",
        "{ __syncthreads(); }",
        '{ if (!PLANTED("no __syncthreads") && !(PLANTED("half a block in __syncthreads") && rank() < size() / 2)) '
        "__syncthreads(); }",
    ),
    (
        "cuda/team.h",
        "{ __syncwarp(); }",
        '{ if (!PLANTED("no __syncwarp") && !(PLANTED("half a warp in __syncwarp") && rank() < 16)) __syncwarp(); }',
    ),
    (
        "cuda/team.h",
        "self().sync();\n            this->each(",
        'if (!PLANTED("no barrier in rows")) self().sync();\n this->each(',
    ),
    (
        "cuda/team.h",
        "self().sync();\n        x = place[0];",
        'if (!PLANTED("no barrier in sums")) self().sync();\n x = place[0];',
    ),
    ("cuda/launch.h", "team.sync();", 'if (!PLANTED("no barrier between items")) team.sync();'),
    (
        "cuda/team.h",
        "x = f(x, __shfl_xor_sync(",
        'if (!PLANTED("half a warp in a shuffle") || threadIdx.x % 32 < 16) x = f(x, __shfl_xor_sync(',
    ),
    (
        "cuda/team.h",
        "{ sums[0][s] = x[0][s] + __shfl_xor_sync(",
        '{ if (!PLANTED("half a warp in a shuffle") || threadIdx.x % 32 < 16) sums[0][s] = x[0][s] + __shfl_xor_sync(',
    ),
    (
        "cuda/team.h",
        "i < n; i += W * self().size()) f(Tile<T, W>{i, n, self().size()})",
        'i < n + PLANTED("tiles go one too far"); i += W * self().size()) '
        'f(Tile<T, W>{i, n + PLANTED("tiles go one too far"), self().size()})',
    ),
    (
        "cuda/team.h",
        "if (begin + i * stride < n) p[",
        'if (begin + i * stride < n - PLANTED("last element unwritten")) p[',
    ),
    ("cuda/team.h", "if (self().rank() == 0) f();", 'if (self().rank() == -PLANTED("number unwritten")) f();'),
    ("cuda/team.h", "if (row >= 0) unroll", 'if (row >= PLANTED("row unwritten")) unroll'),
    ("cuda/team.h", "each(n - vectors * numbers, ", 'each(n - vectors * numbers - PLANTED("copy one short"), '),
    ("cuda/launch.h", "own * scratch}", '(own + PLANTED("scratch one too far")) * scratch}'),
    (
        "cuda/team.h",
        "{ __barrier_sync_count(",
        '{ if (!PLANTED("no barrier of a group") && !(PLANTED("half a group in its barrier") && rank() < threads / 2)) '
        "__barrier_sync_count(",
    ),
    ("cuda/sequence.cu", "{ __syncthreads(); }", '{ if (!PLANTED("no barrier of a tile")) __syncthreads(); }'),
    ("cuda/sequence.cu", "+ index * exchange_room(group)", '+ index * !PLANTED("groups share") * exchange_room(group)'),
    (
        "cuda/sequence.cu",
        "E = smaller(elements,",
        'E = PLANTED("a whole tile at the end") ? elements : smaller(elements,',
    ),
    ("cuda/sequence.cu", "segments + first *", 'segments + first * !PLANTED("blocks share segments") *'),
    (
        "cuda/sequence.cu",
        "packed.end - workspace + segments",
        'packed.end - workspace + segments - (segments && PLANTED("too little room"))',
    ),
    (
        "cuda/sequence.cu",
        "plan.threads, plan.shared,",
        'plan.threads, plan.shared - PLANTED("too little is shared") * 64,',
    ),
    ("cuda/product.h", "if (e < E && c < C) out", 'if (e < E && c < C - PLANTED("a column lost")) out'),
    ("cuda/product.h", "if (output < p.outputs &&", 'if (output < p.outputs - PLANTED("a weight lost") &&'),
    (
        "core/sequence/forward.h",
        "E = order.taking(t, first, E);",
        'E = PLANTED("what is over goes on") ? tile : order.taking(t, first, E);',
    ),
    (
        "core/sequence/layout.h",
        "return lengths ? lengths[s.B + p] : p; }",
        'return lengths && !PLANTED("states in the order of lengths") ? lengths[s.B + p] : p; }',
    ),
    (
        "core/sequence/backward.h",
        "is_last(e) ? final_memory",
        '(PLANTED("the last memory after step T alone") ? t + 1 == s.T : is_last(e)) ? final_memory',
    ),
    (
        "core/sequence/backward.h",
        "const bool last = is_last(e);",
        'const bool last = PLANTED("what was left is fetched at step T alone") ? t + 1 == s.T : is_last(e);',
    ),
    ("cuda/plan.h", "few * d.unstaged * d.real}", '(few - PLANTED("workspace too small")) * d.unstaged * d.real}'),
]


def _barriers() -> dict[str, tuple[str, int]]:
    """Every sync() of what the operators do: its name, after the file and what it stands in; its file and line."""
    found: dict[str, tuple[str, int]] = {}
    for path in sorted(build.CSRC.glob("core/**/*.h")):
        inside, count = "", 0
        for number, line in enumerate(path.read_text().splitlines()):
            begins = re.match(r"struct (\w+)|\s*NTM_(?:FN|PASS) [^(]*?\b(?!operator)(\w+)\(", line)
            if begins:
                inside, count = begins[1] or begins[2], 0
            if line.strip() in ("team.sync();", "crew.sync();"):
                count += 1
                name = f"{path.stem} {inside} {count}"
                assert name not in found
                found[name] = (str(path.relative_to(build.CSRC)), number)
    return found


BARRIERS = _barriers()
FAULTS = [*dict.fromkeys(re.findall(r'PLANTED\("(.*?)"\)', " ".join(wrong for _, _, wrong in SITES))), *BARRIERS]


def _numbered(fault: str) -> str:
    return f"(ntm_planted == {FAULTS.index(fault) + 1})"


def plant(copy: Path) -> None:
    """Copy the sources and plant all faults in the copy."""
    shutil.copytree(build.CSRC, copy)
    for name, (file, number) in BARRIERS.items():
        lines = (copy / file).read_text().splitlines(keepends=True)
        lines[number] = re.sub(r"\b(?=\w+\.sync\(\);)", f"if (!{_numbered(name)}) ", lines[number])
        (copy / file).write_text("".join(lines))
    for file, right, wrong in SITES:
        text = (copy / file).read_text()
        assert text.count(right) == 1, f"{file} has {text.count(right)} times the place of a planted fault: {right}"
        wrong = re.sub(r'PLANTED\("(.*?)"\)', lambda fault: _numbered(fault[1]), wrong)
        (copy / file).write_text(text.replace(right, wrong))
    for path in copy.rglob("*.h"):  # on the first line, so that line numbers stay as they are
        path.write_text("extern int ntm_planted;  " + path.read_text())
