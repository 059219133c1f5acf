"""Every sorting kernel compiles ahead of time for GPUs that are not here; its code is read.

See `figures`: `python -m tests.machine_code.test_sorting_compile sm_90`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alrp_triton.reference.layout import Batch
from tests.machine_code.figures import TARGETS, THOROUGH, print_figures

pytest.importorskip("triton")

# (scores, delta, groups)
CASES = {
    "float32": ("float32", 0.5, False),
    "float64": ("float64", 0.5, False),
    "hard": ("float32", 0.0, False),
    "groups": ("float32", 0.5, True),
}
KERNELS = {"_survey_kernel", "_count_kernel", "_gradient_kernel"}


def _call(case: str, positives: int = 1000) -> list:
    """Return the launches of one count and one gradient."""
    from alrp_triton.kernels import rank_sort as sorting
    from perf.machine_code import sass

    dtype, delta, grouped = CASES[case]
    scores = torch.zeros(positives, dtype=getattr(torch, dtype))
    vector = torch.zeros(positives, dtype=torch.float64)
    groups = torch.zeros(positives, dtype=torch.int64) if grouped else None
    batch = Batch([], [], torch.arange(positives), scores, delta, -100, [], groups)
    with sass.record() as launches:
        sorting.count(batch, vector, vector)
        sorting.gradient(batch, vector, vector)
    return launches


def _figures(target: str) -> dict[str, dict[str, Any]]:
    """Return registers, spills and shared memory of each kernel and case."""
    from perf.machine_code import sass

    figures = {}
    for case in CASES:
        for launch in _call(case):
            code = sass.compile_launch(launch, target)
            name = f"{launch.kernel.fn.__name__} {case}"
            figures[name] = {"registers": code.registers, "spills": code.spills}
    return figures


def _variants(target: str) -> list[int]:
    """Return how many variants of kernels there are after each of 50 calls of random sizes."""
    from perf.machine_code import sass

    torch.manual_seed(0)
    seen: set[tuple[str, str]] = set()
    numbers = []
    for call in range(50):
        positives = int(torch.randint(1, 5000, ()))
        if call % 5 == 0:  # what a JIT likes to specialise on
            positives = (1, 16, 32, 4096)[call % 4]
        CASES["float32"] = ("float32", 0.1 + call, False)
        for launch in _call("float32", positives):
            seen.add((launch.kernel.fn.__name__, sass.variant(launch, target)))
        numbers.append(len(seen))
    return numbers


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str, compiled: dict) -> None:
    figures = compiled[target]["figures"]
    assert {tuple(name.split()) for name in figures} == {(k, c) for k in KERNELS for c in CASES}
    assert {name: x["spills"] for name, x in figures.items() if x["spills"]} == {}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_random_sizes_and_deltas_make_no_new_variant(target: str, compiled: dict) -> None:
    assert compiled[target]["variants"] == [len(KERNELS)] * 50


def _find(target: str) -> dict[str, Any]:
    variants = _variants(target) if target in THOROUGH else []
    return {"figures": _figures(target), "variants": variants}


if __name__ == "__main__":
    print_figures(_find)
