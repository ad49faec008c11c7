"""Every operator both ways on a few small inputs, and a training step: what compute-sanitizer watches.

    python benchmarks/run.py gpu_small_run [cuda|cpu]

Inputs are made, and results compared, on the CPU, so that almost all that runs on the device is ours.
"""

from __future__ import annotations

import torch

from shared.job import answers, compare, copy_batch, make
from shared.operators import DIRECTIONS, call
from shared.registry import OPERATORS, Sizes

# One for each way in which the kernels deal items out (csrc/cuda/plan.h).
SIZES = (
    Sizes(3, 17, 5, heads=2, hidden=7),
    Sizes(2),
    Sizes(2400, 9, 3),  # enough items for a warp to each
    Sizes(1, 1024, 100),  # a memory that shared memory cannot hold
    Sizes(1, 16384, 2),  # nor what is computed on the way
)
# A sequence to a block, and on a GPU of fewer than 150 multiprocessors two.
STEPS = (("lstm", "step", 2), ("lstm", "sequence", 2), ("gru", "sequence", 150))


def main(arguments: list[str]) -> int:
    device = (arguments or ["cuda"])[0]
    for dtype in (torch.float32, torch.float64):
        for sizes in SIZES:
            torch.manual_seed(0)
            for op in OPERATORS:
                for direction in DIRECTIONS:
                    host = call(op, direction, sizes, dtype=dtype)
                    there = host._replace(tensors=[tensor.to(device) for tensor in host.tensors])
                    host.check(tuple(result.to("cpu") for result in there()))
            print(f"{len(OPERATORS)} operators, {dtype}, {sizes}", flush=True)
    for controller, engine, B in STEPS:
        wanted = answers(make(controller, "reference"), copy_batch(B, steps=5))
        found = answers(make(controller, engine).to(device), copy_batch(B, steps=5, device=device))
        compare(engine, {name: tensor.to("cpu") for name, tensor in found.items()}, wanted)
        print(f"a training step of {B} sequences: {controller}, engine {engine}", flush=True)
    return 0

