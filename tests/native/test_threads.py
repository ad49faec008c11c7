"""Native code and torch share one pool of threads."""

from __future__ import annotations

from helpers.processes import WORK, native_cpu, needs_proc, python


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
