"""Native calls are recorded here, and repeated by replay.cpp."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import pytest
import torch
from cuda_on_host import build, plant
from helpers.backends import required

from ntm_fast import native, ops


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

    def __call__(
        self, call: Callable, name: str, like: torch.Tensor, scalars: Sequence, addresses: Sequence[int]
    ) -> None:
        find = sequence_arrays if name.startswith("ntm_sequence") else operator_arrays
        sizes = dict(zip(native.signature(name).scalars, scalars))
        arrays = [
            (role, address, 4 * count if role == "order" else like.element_size() * count)
            for role, count, address in find(name, sizes, addresses)
        ]
        arrays = [("in" if role == "order" else role, *place) for role, *place in arrays]
        before = [ctypes.string_at(*place) if role != "out" else b"" for role, *place in arrays]
        call(name, like, scalars, addresses)
        # An input must keep its value. An output may lie in the place of an input: a trail may be overwritten.
        after = [was if role == "in" else ctypes.string_at(*place) for was, (role, *place) in zip(before, arrays)]
        words = [name, os.environ["NTM_HOST_SHARED"], int(like.dtype is torch.float64), len(scalars)]
        words += [*map(float, scalars), len(arrays), *(word for role, _, size in arrays for word in (role, size))]
        with self.path.open("ab") as file:
            file.write(f"{' '.join(map(str, words))}\n".encode())
            file.write(b"".join(piece for pair in zip(before, after) for piece in pair))


Array = tuple[str, int, int]  # "in", "out", "both", or "order" for integers that come in; how many numbers, where


def operator_arrays(name: str, sizes: dict[str, int], addresses: Sequence[int]) -> list[Array]:
    """The arrays of a call."""
    contract = ops.CONTRACTS[name.removesuffix("_backward")]
    if name != contract.name:
        contract = contract.backward()
    if contract.derived:
        sizes = sizes | contract.derived(sizes, *([sizes["K"] // 2] if contract.options else []))
    letters = [*contract.inputs.values(), *contract.outputs.values()]
    counts = [math.prod(sizes[letter] for letter in own) for own in letters]
    roles = ["in"] * len(contract.inputs) + ["out"] * len(contract.outputs)
    return list(zip(roles, counts, addresses, strict=True))


def sequence_arrays(name: str, sizes: dict[str, int], addresses: Sequence[int]) -> list[Array]:
    """The same of a whole sequence; csrc/core's SequenceState, SequenceTrail and SequenceGrads describe its arrays."""
    T, B, I, O, L, H, R, W, N, M, K = (sizes[letter] for letter in "TBIOLHRWNMK")
    gru, every, shared = sizes["controller"], sizes["every"], sizes["shared"]
    G, F, P = (3 if gru else 4) * H, R * M, (R + W) * (M + K + 3) + 2 * W * M
    forward = name == "ntm_sequence"
    keep = not forward or sizes["keep"]
    state = {"memory": M * N, "read_weights": R * N, "write_weights": W * N, "reads": F, "hidden": L * H}
    state["cell"] = 0 if gru else L * H
    x, upper_x, y = T * B * G, (L - 1) * T * B * G, L * T * B * G * gru
    kept = {"upper_x": upper_x, "y": y, "hidden": (L - 1) * T * B * H, "cell": L * T * B * H * (not gru)}
    kept |= {"params": T * B * P, "read_weights": T * B * R * N, "write_weights": T * B * W * N}
    kept["memory"] = (T - 1) // every * B * M * N
    features = T * B * (H + F)
    counts = {f"initial_{own}": n if shared else B * n for own, n in state.items()}
    counts |= {f"trail_{own}": n * keep for own, n in kept.items()}
    counts |= {"trail_x": x, "trail_features": features, "trail_active": 0, "inputs": T * B * I, "outputs": 0}
    counts |= {"grad_outputs": features, "grad_x": x, "grad_upper_x": upper_x, "grad_y": y, "grad_params": T * B * P}
    counts |= {f"{way}_{own}": B * n for way in ("final", "grad_initial") for own, n in state.items()}
    names = native.signature(name).tensors
    counts |= {"order": 2 * B * bool(addresses[names.index("order")]), "grad_inputs": 0}
    if not forward:
        given = bool(addresses[names.index("grad_final_memory")])  # the gradient of the final state
        counts |= {f"grad_final_{own}": B * n * given for own, n in state.items()}

    def role(own: str) -> str:
        if own == "order":
            return own
        if forward and own.startswith(("final", "trail")):
            return ("both" if keep else "in") if own == "trail_x" else "out"
        return "out" if own.startswith("grad_") and not own.startswith(("grad_final", "grad_outputs")) else "in"

    layer = lambda l: [G * ((F if not l else H) + (0 if l else I)), G * H, G, G]  # noqa: E731
    weights = [n for l in range(L) for n in layer(l)] + [P * H, P, O * (H + F), O]
    table = ctypes.cast(addresses[0], ctypes.POINTER(ctypes.c_uint64))
    arrays: list[Array] = [("in", count, table[i]) for i, count in enumerate(weights)]
    return arrays + [(role(own), counts[own], place) for own, place in list(zip(names, addresses, strict=True))[1:]]


class Outcome(NamedTuple):
    kernel: str  # read, read_backward ...
    way: str  # where the plan of csrc/cuda/plan.h puts the data
    right: bool
    printed: str


def replay(program: Path, calls: list[Path], fault: str | None = None, *, until_wrong: bool = False) -> list[Outcome]:
    """The outcome of each call, or of those up to the first that goes wrong.

    With a planted fault, a call goes on after a sanitizer's report.
    """
    number = plant.FAULTS.index(fault) + 1 if fault else 0
    number = -number if until_wrong else number
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
