"""Before Triton is imported: without a GPU, kernels run in the interpreter."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from alrp_triton import backend
from alrp_triton.testing import interpreter
from tests.machine_code.figures import compile_apart
from tests.profiles import FULL, PROFILE

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
if os.environ.get("TRITON_INTERPRET") == "1" and backend._INTERPRETS:
    interpreter.speed_up()

# How many generated cases, and which: the same each time, or new ones from a seed that is printed.
# No case is too slow, and none is kept for the next run.
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
    "software_gpu",
]


SLOW_PATHS = {Path(__file__).parent / name for name in SLOW}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import what `-m "not slow"` leaves out."""
    return (config.option.markexpr == "not slow" and collection_path in SLOW_PATHS) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu`, and count them as skipped, on a machine without one.

    Those marked `full` are left out, but for the profiles that leave out nothing.
    """
    if not FULL:
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    for item in items:
        if SLOW_PATHS & {item.path, *item.path.parents}:
            item.add_marker(pytest.mark.slow)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(skip)


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """{target: figures} of a file in machine_code; of pytest-xdist's processes, one compiles."""
    folder = tmp_path_factory.getbasetemp()
    if WORKERS > 1:
        folder = folder.parent
    module = f"tests.machine_code.{request.path.stem}"
    found = folder / f"{module}.json"
    with FileLock(f"{found}.lock"):
        if not found.exists():
            found.write_text(json.dumps(compile_apart(module)))
    return json.loads(found.read_text())
