from __future__ import annotations

import pytest
import torch

import ntm_fast

# Long enough for a median, short enough that all benchmarks together stay below four minutes on two cores.
TIMING = pytest.mark.benchmark(min_rounds=5, max_time=0.2, warmup=True, warmup_iterations=2, disable_gc=True)


def pytest_configure(config) -> None:
    config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        item.add_marker(TIMING)


def pytest_report_header() -> list[str]:
    found = ntm_fast.capabilities()
    return [
        f"ntm_fast: torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU kernels {found['cpu'] or 'missing: ' + str(found['cpu_reason'])}"
    ]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
