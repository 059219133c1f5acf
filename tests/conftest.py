"""Before Triton is imported: without a GPU, kernels run in the interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from alrp_triton import backend

# The cores are shared out, here and in the processes that tests start.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and not backend._INTERPRETS:
        sys.modules["triton"] = None  # the tests that need it are skipped

# How many generated cases, and which: the same each time, or new ones from a seed that is printed.
# No case is too slow, and none is kept for the next run.
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fast")
COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("fast", derandomize=True, **COMMON)
settings.register_profile("ci", **COMMON)
settings.register_profile("long", **COMMON)
settings.load_profile(PROFILE)


# Folders and files whose tests compile, interpret kernels, train, install or draw many cases.
SLOW = [
    "machine_code",
    "api/test_boxes.py",
    "api/test_compile.py",
    "api/test_family.py",
    "api/test_generated.py",
    "api/test_install.py",
    "api/test_launches.py",
    "api/test_metrics.py",
    "api/test_nan.py",
    "api/test_self_balance.py",
    "api/test_triton.py",
    "integrations/test_authors.py",
    "kernels/test_breakpoints.py",
    "kernels/test_kernels.py",
    "kernels/test_kernels_delta.py",
    "kernels/test_locate.py",
    "kernels/test_scale.py",
    "kernels/test_skewed.py",
    "kernels/test_sorting.py",
    "perf/test_arguments.py",
    "perf/test_autotune.py",
    "perf/test_balance.py",
    "perf/test_bench.py",
    "perf/test_gpu_command.py",
    "perf/test_memory_rates.py",
    "perf/test_train.py",
    "reference/test_lookup.py",
    "reference/test_reference.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and counted as skipped, on a machine without one."""
    folder = Path(__file__).parent
    slow = {folder / name for name in SLOW}
    for item in items:
        if slow & {item.path, *item.path.parents}:
            item.add_marker(pytest.mark.slow)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(skip)
