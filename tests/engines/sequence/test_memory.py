"""The main memory that a training step takes, compared with the formula of docs/memory.md."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch
from helpers.backends import Backend
from helpers.machines import NATIVE
from helpers.sequences import about_main_memory

from ntm_fast import FastNTM
from ntm_fast.ops.sequence_plan import kept_every

MEASURE = """
import re, sys, torch
from ntm_fast import FastNTM

def kib(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

def step(T):
    inputs, targets = torch.zeros(T, B, 9), torch.zeros(T, B, 8)
    outputs, _ = ntm(inputs)
    torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets).backward()

T, B, threads, controller, checkpoint = sys.argv[1:]
T, B, checkpoint = int(T), int(B), int(checkpoint) if checkpoint.isdigit() else checkpoint
torch.set_num_threads(int(threads))
imports = kib("VmRSS")
ntm = FastNTM(9, 8, 100, controller=controller, engine="sequence", memory_checkpoint=checkpoint)
step(2)  # what torch and its libraries set up at their first use
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM, the peak of this process alone, starts anew
step(T)
print(before - imports, kib("VmHWM") - before)
"""


def measured(T: int, B: int, controller: str = "lstm", checkpoint: str | int = "auto") -> tuple[int, int]:
    """Bytes of resident memory of the standard machine: what a first small step adds, and the later peak above that."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be measured here: {error}")
    command = [sys.executable, "-c", MEASURE, *map(str, (T, B, torch.get_num_threads(), controller, checkpoint))]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, peak = map(int, run.stdout.split())
    return first << 10, peak << 10


def predicted(T: int, B: int, controller: str = "lstm", checkpoint: str | int = "auto") -> int:
    """Bytes at the peak of a training step by the formula, for the standard machine in float32 on one thread."""
    L, H, N, M, R, W, S, I, O = 1, 100, 128, 20, 1, 1, 1, 9, 8
    gru = controller == "gru"
    gates, params = (3 if gru else 4) * H, (R + W) * (M + 2 * S + 4) + 2 * W * M
    every = kept_every(checkpoint, T, 4 * B * N * M)
    # What forward keeps for each step and sequence: the gates' products, hidden states of the lower layers, cells, the
    # heads' parameters, weightings; a memory at every K-th. A GRU has two products and no cell.
    kept = L * gates * (2 if gru else 1) + (L - 1) * H + (0 if gru else L * H) + params + (R + W) * N
    # The heads' parameters after activation, where one number may become two; and the inputs of the output layer.
    kept += (R + W) * (M + 6 * S + 9) + 2 * W * M + H + R * M
    # Backward adds the gradients of the heads' parameters. The gradients of the gates overwrite the gates.
    numbers = T * B * (kept + params + I + 4 * O) + (T - 1) // every * B * M * N
    if every > 1:
        numbers += min(B, 8) * every * M * N  # one segment of memories for each element of the tile of each thread
    return 4 * numbers


@pytest.mark.parametrize("controller", NATIVE)
def test_peak_memory_is_as_predicted(backend: Backend, controller: str) -> None:
    """For T = 2000 and B = 4. To keep every memory would take 82 MB."""
    about_main_memory(backend)
    T, B = 2000, 4
    found = {k: measured(T, B, controller, k)[1] for k in ("auto", "all")}
    for k, peak in found.items():
        most = predicted(T, B, controller, k)
        assert 0.75 * most < peak < 1.05 * most + 8e6, (
            f"memory_checkpoint={k!r}: {peak / 1e6:.1f} MB, {most / 1e6:.1f} predicted"
        )
    assert found["auto"] < found["all"] - 60e6


@pytest.mark.slow
def test_ten_thousand_steps_within_a_gibibyte(backend: Backend) -> None:
    about_main_memory(backend)
    first, peak = measured(10_000, 16)
    assert first + peak < 1 << 30, f"{(first + peak) / 2**20:.0f} MiB, predicted {predicted(10_000, 16) / 2**20:.0f}"


def test_a_training_step_meets_no_page_faults(backend: Backend) -> None:
    """A step reuses the memory of the step before. Fresh memory, 10 MB here, would cost 2,600 page faults."""
    about_main_memory(backend)
    model = FastNTM(9, 8, 100, engine="sequence")
    inputs = torch.randn(41, 48, 9)

    def step() -> None:
        model(inputs)[0].sum().backward()

    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10
    assert faults < 300, f"{faults} page faults a step"
