"""Before Triton is imported: without a GPU, kernels run in the interpreter."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

from alrp_triton import backend

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if not backend._INTERPRETS:
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and counted as skipped, on a machine without one."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(skip)
