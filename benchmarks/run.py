"""Run a report by its name.

    python benchmarks/run.py training_step    a training step of the standard job, by engine: the README's tables
    python benchmarks/run.py scaling          what it costs over T, B, N and M: docs/scaling.md
    python benchmarks/run.py kernels          the registers of every CUDA kernel: docs/kernels.md
    python benchmarks/run.py gpu              checks and measurements on this machine's GPU: benchmarks/results/gpu_*.md
    python benchmarks/run.py NAME --help      the options of one report

A report is a file in benchmarks/reports/ with a function ``main(arguments)``. The pytest-benchmark suites beside this
file go engine by engine and operator by operator: pytest benchmarks/ --benchmark-only
"""

from __future__ import annotations

import importlib
import sys

# What compute-sanitizer watches is started by the report gpu.
REPORTS = ("training_step", "scaling", "kernels", "gpu", "gpu_small_run")


def main(arguments: list[str]) -> int:
    name, *options = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in REPORTS:
        print(f"error: no report is called {name!r}; there are {', '.join(REPORTS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"reports.{name}").main(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
