"""The time of the host alone: calls side by side on a runtime whose kernels do nothing.

A call that launches a hundred small kernels keeps a GPU waiting for the host, whatever the kernels
take. What is measured here is Python, torch's dispatcher and autograd, and Triton's launcher, on a
CUDA device that is not there (`perf.software_gpu.runtime`): no time of a GPU, and without the share
of the real driver. Only a ratio of calls on one machine means anything.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alrp_triton.testing.workloads import Cell, draw

from ..software_gpu import build, runtime
from ..timing import interleave
from .run import forward_backward
from .variants import VARIANTS

BESIDE = "focal, fused"  # what the others are compared with
_NAMES = "breakpoints, triton", "pairwise, triton", BESIDE
_CELL = Cell(160_000, 300, "mid")  # the host's time depends on no size
_WARMUP, _ROUNDS = 20, 200
_ROOT = Path(__file__).parents[2]


def measure() -> dict[str, Any]:
    """Return a row for each variant, or why there is none: "rows" or "why"."""
    try:
        done = runtime.run("-m", "perf.bench.host_time", cwd=_ROOT)
    except build.Unavailable as reason:
        return {"why": str(reason)}
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or ["no reason was given"])[-1]}
    return {"rows": json.loads(done.stdout.splitlines()[-1])}


def _rows() -> list[dict[str, Any]]:
    """Measure in a process that has the device."""
    inputs = draw(_CELL, torch.device("cuda"))
    calls: dict[str, Callable[[], object]] = {
        name: partial(forward_backward, VARIANTS[name].bind(inputs), inputs.logits)
        for name in _NAMES
    }
    # By the clock, as on a CPU: the device does everything at once.
    seconds = interleave(calls, torch.device("cpu"), _ROUNDS, _WARMUP)
    return [_row(name, call, seconds) for name, call in calls.items()]


def _row(name: str, call: Callable[[], object], seconds: dict[str, list[float]]) -> dict[str, Any]:
    with runtime.operations() as found:
        call()
    ratios = [own / other for own, other in zip(seconds[name], seconds[BESIDE], strict=True)]
    return {
        "variant": name,
        "microseconds": 1e6 * statistics.median(seconds[name]),
        "least_microseconds": 1e6 * min(seconds[name]),
        "times_focal": statistics.median(ratios),
        **found.numbers(),
    }


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(json.dumps(_rows()))
