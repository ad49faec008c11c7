"""Calls of native functions, recorded from the operators and repeated by replay.cpp."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import torch
from cuda_on_host import build, plant
from helpers.backends import required

from ntm_fast import ops


def need(kind: str) -> None:
    reason = build.missing(kind)
    if reason and required("cuda_on_host"):
        pytest.fail(f"NTM_TEST_REQUIRE names cuda_on_host, which cannot be tested: {reason}")
    if reason:
        pytest.skip(reason)


def run(*command: str | Path, **environment: str) -> tuple[int, str]:
    """The exit code, and everything that was printed."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, **both, text=True, errors="replace", env={**os.environ, **environment})
    return done.returncode, done.stdout


class Recorder:
    """Makes native calls and writes them as replay.cpp reads them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, call: Callable, name: str, like: torch.Tensor, *values) -> None:
        find = sequence_arrays if name.startswith("ntm_sequence") else operator_arrays
        scalars, arrays = find(name, values)
        arrays = [(role, address, like.element_size() * count) for role, count, address in arrays]
        before = [ctypes.string_at(*place) if role != "out" else b"" for role, *place in arrays]
        call(name, like, *values)
        # What comes in shall stay; what goes out may be recorded at the same place, if the trail was good for one use.
        after = [was if role == "in" else ctypes.string_at(*place) for was, (role, *place) in zip(before, arrays)]
        words = [name, os.environ["NTM_HOST_SHARED"], int(like.dtype is torch.float64), len(scalars)]
        words += [*map(float, scalars), len(arrays), *(word for role, _, size in arrays for word in (role, size))]
        with self.path.open("ab") as file:
            file.write(f"{' '.join(map(str, words))}\n".encode())
            file.write(b"".join(piece for pair in zip(before, after) for piece in pair))


Array = tuple[str, int, int]  # "in", "out" or "both", how many numbers, where


def operator_arrays(name: str, values: tuple) -> tuple[tuple, list[Array]]:
    """Of a call's values, the sizes and options, and the arrays."""
    op = ops._BY_NAME[name.removesuffix("_backward")]
    dims = dict(zip(op.sizes, values))
    if op.derived:
        dims |= op.derived(dims, *([dims["K"] // 2] if op.options else []))
    inputs, outputs = list(op.inputs.values()), list(op.outputs.values())
    if name != op.name:
        inputs, outputs = [*inputs, *(op.outputs[saved] for saved in op.saved), *outputs], inputs
    letters = inputs + outputs
    counts = [math.prod(dims[letter] for letter in own) for own in letters]
    roles = ["in"] * len(inputs) + ["out"] * len(outputs)
    return values[: -len(letters)], list(zip(roles, counts, values[-len(letters) :]))


def sequence_arrays(name: str, values: tuple) -> tuple[tuple, list[Array]]:
    """The same of a whole sequence, whose parameters csrc/core/sequence.h describes."""
    T, B, I, O, L, H, gru, _, R, W, N, M, K, every, shared = values[:15]
    G, F, P = (3 if gru else 4) * H, R * M, (R + W) * (M + K + 3) + 2 * W * M
    forward = name == "ntm_sequence"
    scalars = values[: 21 if forward else 20]
    keep = not forward or scalars[-1]
    numbers = [M * N, R * N, W * N, F, L * H, 0 if gru else L * H]
    state, initial = [B * n for n in numbers], [n if shared else B * n for n in numbers]
    kept = [(L - 1) * T * B * G, L * T * B * G * gru, (L - 1) * T * B * H, L * T * B * H * (not gru), T * B * P]
    kept_after = [T * B * R * N, T * B * W * N, (T - 1) // every * B * M * N]
    x, features = T * B * G, T * B * (H + F)
    trail = [x, *(n * keep for n in kept), features, *(n * keep for n in kept_after), 0]
    layer = lambda l: [G * ((F if not l else H) + (0 if l else I)), G * H, G, G]  # noqa: E731
    weights = [n for l in range(L) for n in layer(l)] + [P * H, P, O * (H + F), O]
    table = ctypes.cast(values[len(scalars)], ctypes.POINTER(ctypes.c_uint64))
    if forward:
        roles = ["in"] * (2 + len(state)) + ["out"] * len(state)
        roles += ["both" if keep else "in", *["out"] * (len(trail) - 1)]
        counts = [T * B * I, 0, *initial, *state, *trail]
    else:
        given = bool(values[len(scalars) + 20])  # the gradient of the final state
        counts = [*initial, state[0], *trail, features, *(n * given for n in state)]
        roles = ["in"] * len(counts) + ["out"] * (len(state) + 4)
        counts += [*state, x, kept[0], kept[1], kept[4]]
    addresses = [*(table[i] for i in range(len(weights))), *values[len(scalars) + 1 :]]
    arrays = list(zip(["in"] * len(weights) + roles, weights + counts, addresses))
    assert len(arrays) == len(addresses) == len(weights) + len(counts)
    return scalars, arrays


class Outcome(NamedTuple):
    kernel: str  # read, read_backward ...
    way: str  # that csrc/cuda/plan.h took
    right: bool
    printed: str


def replay(program: Path, calls: list[Path], fault: str | None = None) -> list[Outcome]:
    """What became of each call. After a sanitizer's report the others go on where a fault is planted."""
    number = plant.FAULTS.index(fault) + 1 if fault else 0
    go_on = {
        "ASAN_OPTIONS": "halt_on_error=0:suppress_equal_pcs=0:symbolize=0",
        "TSAN_OPTIONS": "suppress_equal_stacks=0:suppress_equal_addresses=0:symbolize=0",
    }
    code, printed = run(program, str(number), *calls, **(go_on if fault else {}))
    outcomes = []
    for text in printed.split("call ")[1:]:
        team = re.search(r"for_each_item<ntm::cuda::(Warp|Block)<\w+(?:, (true|false))?>", text)
        tile = re.search(r"through_time<ntm::cuda::\w+<\w+>, (true|false)", text)
        assert team or tile, f"no kernel was launched:\n{text}"
        if tile:
            way = {"true": "held", "false": "in place"}[tile[1]]
        else:
            way = {"Warp": "warps", "true": "block", "false": "unstaged"}[team[2] or team[1]]
            way = "workspace" if "workspace of" in text else way
        outcomes.append(Outcome(text.split()[0], way, "\nright\n" in text, text))
    assert "that was all" in printed, printed[-5000:]
    assert (code == 0) == all(outcome.right for outcome in outcomes), f"exit code {code}:\n{printed}"
    return outcomes
