"""Native code and torch share one pool of threads, and their state."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import CUDA_ON_HOST, Backend
from helpers.processes import WORK, native_cpu, needs_proc, python

from ntm_fast import ops


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
    # Only the native call runs in parallel here, because one thread draws random numbers.
    code = WORK.replace("torch.testing", "threads = len(os.listdir('/proc/self/task'))\nwork() #")
    code = f"import os, torch\ntorch.set_num_threads(4)\n{code}"
    code += "result = {'started': len(os.listdir('/proc/self/task')) - threads}"
    assert python(code, tmp_path)["started"] == 3


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_subnormals_are_zero_inside_and_the_process_is_left_as_it_was(kernels: Backend, dtype: torch.dtype) -> None:
    """Products that are subnormal come out as 0, NaN and infinities as they are; torch's own go on as they were, on
    every thread."""
    if kernels.device != "cpu" or kernels is CUDA_ON_HOST:
        pytest.skip("it is about the CPU's kernels")
    tiny = torch.finfo(dtype).tiny
    many = torch.full((1 << 20,), tiny, dtype=dtype)  # so many that torch takes all threads
    memory = torch.full((64, 128, 20), tiny, dtype=dtype)
    memory[0], memory[1] = torch.inf, torch.nan
    weights = torch.zeros(64, 1, 128, dtype=dtype)
    weights[..., 3] = 0.25
    torch.set_num_threads(2)
    found = []
    for flushing in (False, True):
        if not torch.set_flush_denormal(flushing):
            pytest.skip("this processor cannot flush")
        try:
            before = bool((many * 0.5).all()), bool((many[:4] * 0.5).all())
            for _ in range(3):
                found.append(ops.read(memory, weights))
            after = bool((many * 0.5).all()), bool((many[:4] * 0.5).all())
        finally:
            torch.set_flush_denormal(False)
        assert before == after
        assert before[1] is not flushing
    for reads in found:
        assert not reads[2:].any()
        assert reads[1].isnan().all() and reads[0].isnan().all()  # 0 inf is NaN
    vectors = torch.zeros(1, 1, 20, dtype=dtype), torch.ones(1, 1, 20, dtype=dtype)
    infinite = ops.erase_add_write(memory[:1], weights[:1], *vectors)
    assert infinite.isinf().all()
