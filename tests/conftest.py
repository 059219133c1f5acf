"""Before Triton is imported: without a GPU, kernels run in the interpreter."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from alrp_triton import ops

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if not ops._INTERPRETS:
        sys.modules["triton"] = None  # the tests that need it are skipped


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and counted as skipped, on a machine without one."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(skip)
