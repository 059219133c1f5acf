"""Finding the positives compiles ahead of time for GPUs that are not here; its code is read.

See `figures`: `python -m tests.machine_code.test_locate_compile sm_90`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.machine_code.figures import TARGETS, THOROUGH, print_figures

pytest.importorskip("triton")

# (logits, targets, targets per logit, transposed): each dtype, each form of targets, dense or not.
CASES = {
    "float32": ("float32", "int64", False, False),
    "transposed": ("float32", "int64", False, True),
    "bfloat16": ("bfloat16", "int8", False, False),
    "marked": ("float16", "float32", True, False),
    "marked transposed": ("float64", "bool", True, True),
}
KERNELS = {"_count_kernel", "_write_kernel", "_look_up_kernel"}


def _call(case: str, positives: int = 1000, shape: tuple = (4, 20, 100)) -> list:
    """Return the launches of one search and one look-up in two levels."""
    from alrp_triton.kernels import positives as locate
    from perf.machine_code import sass

    logits_dtype, targets_dtype, per_logit, transposed = CASES[case]
    logits = torch.empty(shape, dtype=getattr(torch, logits_dtype), device="meta")
    targets_shape = shape if per_logit else (shape[0], shape[2])
    targets = torch.empty(targets_shape, dtype=getattr(torch, targets_dtype), device="meta")
    if transposed:
        targets = targets.transpose(0, -1).contiguous().transpose(0, -1)
    levels = [logits, logits], [targets, targets]
    said = torch.zeros(positives, dtype=torch.int64, device="meta")
    with sass.record() as launches:
        for given in (None, said):
            locate.locate(*levels, given, positives, True, -100)
    return launches


def _figures(target: str) -> dict[str, dict[str, Any]]:
    """Return registers and spills of each kernel and case, and how often a call launches it."""
    from perf.machine_code import sass

    figures: dict[str, dict[str, Any]] = {}
    for case in CASES:
        for launch in _call(case):
            name = f"{launch.kernel.fn.__name__} {case}"
            if name not in figures:
                code = sass.compile_launch(launch, target)
                figures[name] = {"registers": code.registers, "spills": code.spills, "launches": 0}
            figures[name]["launches"] += 1
    return figures


def _variants(target: str) -> list[int]:
    """Return how many variants of kernels there are after each of 50 calls of random sizes."""
    from perf.machine_code import sass

    torch.manual_seed(0)
    seen: set[tuple[str, str]] = set()
    numbers = []
    for call in range(50):
        positives, batch, places = (int(n) for n in torch.randint(1, 5000, (3,)))
        if call % 5 == 0:  # what a JIT likes to specialise on
            positives, batch, places = (1, 16, 32, 4096)[call % 4], 16, (1, 16, 64)[call % 3]
        for launch in _call("float32", positives, (batch, 20, places)):
            seen.add((launch.kernel.fn.__name__, sass.variant(launch, target)))
        numbers.append(len(seen))
    return numbers


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str, compiled: dict) -> None:
    figures = compiled[target]["figures"]
    assert set(figures) == {f"{kernel} {case}" for kernel in KERNELS for case in CASES}
    assert {name: x["spills"] for name, x in figures.items() if x["spills"]} == {}


def test_each_level_takes_two_launches_or_one(compiled: dict) -> None:
    """Two search in it, one looks up what is given."""
    figures = compiled["sm_90"]["figures"]
    assert {x["launches"] for x in figures.values()} == {2}  # there are two levels


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_random_sizes_make_no_new_variant(target: str, compiled: dict) -> None:
    assert compiled[target]["variants"] == [len(KERNELS)] * 50


def _find(target: str) -> dict[str, Any]:
    variants = _variants(target) if target in THOROUGH else []
    return {"figures": _figures(target), "variants": variants}


if __name__ == "__main__":
    print_figures(_find)
