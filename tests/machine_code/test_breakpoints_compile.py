"""Every breakpoint kernel compiles ahead of time for GPUs that are not here; its code is read.

See `figures`: `python -m tests.machine_code.test_breakpoints_compile sm_90`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alrp_triton.reference.layout import Batch
from tests.machine_code.figures import TARGETS, THOROUGH, cases_for, print_figures

pytest.importorskip("triton")

# (logits, targets, targets per logit, delta): each dtype, each form of targets, the hard step.
CASES = {
    "float32": ("float32", "int64", False, 1.0),
    "bfloat16": ("bfloat16", "int32", False, 1.0),
    "float16": ("float16", "int64", False, 1.0),
    "float64": ("float64", "int64", False, 1.0),
    "marked": ("float32", "float32", True, 1.0),
    "marked bfloat16": ("bfloat16", "int8", True, 1.0),
    "hard": ("float32", "int64", False, 0.0),
    "grouped": ("float32", "int64", False, 1.0),
    "grouped bfloat16": ("bfloat16", "int32", False, 1.0),
    "grouped marked": ("float32", "float32", True, 1.0),
    "grouped float64": ("float64", "int64", False, 1.0),
}
SOME = ("float32", "marked bfloat16", "grouped float64")
KERNELS = {
    "_merge_kernel", "_table_kernel", "_count_kernel", "_pattern_sums_kernel",
    "_fold_kernel", "_points_kernel", "_stretch_kernel", "_integral_kernel", "_finish_kernel",
    "_slopes_kernel", "_linear_pieces_kernel", "_pattern_gradient_kernel", "_gradient_kernel",
    "_clear_kernel", "_positive_grads_kernel",
}  # fmt: skip


# Instructions a logit on sm_90, at most.
MOST = {
    ("_count_kernel", "float32"): 70,
    ("_count_kernel", "marked"): 70,
    ("_count_kernel", "bfloat16"): 40,
    ("_count_kernel", "marked bfloat16"): 40,
    ("_count_kernel", "float16"): 40,
    ("_gradient_kernel", "float32"): 45,
    ("_gradient_kernel", "bfloat16"): 8,
    ("_gradient_kernel", "float16"): 8,
}


def _call(case: str, target: str, positives: int = 1000, shape: tuple = (4, 20, 100)) -> list:
    """Return the launches of one count and one gradient."""
    from alrp_triton.kernels.breakpoints import ranks as breakpoints
    from alrp_triton.kernels.tuning.block_sizes import default_breakpoint_tiles
    from perf.machine_code import sass

    logits_dtype, targets_dtype, per_logit, delta = CASES[case]
    logits = torch.empty(shape, dtype=getattr(torch, logits_dtype), device="meta")
    targets_shape = shape if per_logit else (shape[0], shape[2])
    targets = torch.empty(targets_shape, dtype=getattr(torch, targets_dtype), device="meta")
    scores = torch.zeros(positives, dtype=torch.promote_types(logits.dtype, torch.float32))
    vector = torch.zeros(positives, dtype=torch.float64)
    index = torch.zeros(positives, dtype=torch.int64)
    tiles = default_breakpoint_tiles(sass.gpu_target(target).warp_size, scores.dtype)
    batch = Batch([logits], [targets], index, scores, delta, -100)
    if "grouped" in case:  # by image
        groups = torch.zeros((shape[0], *targets_shape[1:]), dtype=torch.int64)
        batch = batch._replace(groups=[groups], positive_groups=index)
    with sass.record() as launches:
        breakpoints.count(batch, vector, tiles)
        breakpoints.gradient(batch, vector, vector, tiles)
    return launches


def _figures(target: str) -> dict[str, dict[str, Any]]:
    """Return registers and spills of each kernel and case, and instructions a logit.

    The latter are told where logits are read.
    """
    from perf.machine_code import sass
    from perf.machine_code.occupancy import a_logit

    figures: dict[str, dict[str, Any]] = {}
    seen = set()
    for case in cases_for(target, CASES, SOME):
        for launch in _call(case, target):
            name, variant = launch.kernel.fn.__name__, sass.variant(launch, target)
            if (name, variant) in seen:
                continue
            seen.add((name, variant))
            code = sass.compile_launch(launch, target)
            figure: dict[str, Any] = {"registers": code.registers, "spills": code.spills}
            if name in ("_count_kernel", "_gradient_kernel"):
                figure["scattered"] = sass.scattered(code)
            if target == "sm_90" and (name, case) in MOST:
                side = name.strip("_").removesuffix("_kernel")
                figure["per_logit"] = a_logit(code, side, launch.arguments)
            figures[f"{name} {case} {len(seen)}"] = figure
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
        CASES["float32"] = ("float32", "int64", False, 0.1 + call)
        for launch in _call("float32", target, positives, (batch, 20, places)):
            seen.add((launch.kernel.fn.__name__, sass.variant(launch, target)))
        numbers.append(len(seen))
    return numbers


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str, compiled: dict) -> None:
    figures = compiled[target]["figures"]
    assert {name.split()[0] for name in figures} == KERNELS
    assert {name: x["spills"] for name, x in figures.items() if x["spills"]} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_threads_read_and_add_side_by_side(target: str, compiled: dict) -> None:
    """Otherwise the lanes of a tile would share replicas of a bin, and wait for each other."""
    figures = compiled[target]["figures"].items()
    found = {name: x["scattered"] for name, x in figures if "scattered" in x}
    assert len(found) >= 2 * len(cases_for(target, CASES, SOME)) - 2  # some cases share a kernel
    assert not any(found.values()), found


@pytest.mark.parametrize(("kernel", "case"), MOST)
def test_instructions_a_logit(kernel: str, case: str, compiled: dict) -> None:
    """Of the longest way that a full tile can take."""
    figures = compiled["sm_90"]["figures"]
    (found,) = (
        x["per_logit"]
        for name, x in figures.items()
        if name.rsplit(" ", 1)[0] == f"{kernel} {case}"
    )
    assert found <= MOST[kernel, case]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_random_sizes_and_deltas_make_no_new_variant(target: str, compiled: dict) -> None:
    numbers = compiled[target]["variants"]
    assert len(set(numbers)) == 1


def _find(target: str) -> dict[str, Any]:
    variants = _variants(target) if target in THOROUGH else []
    return {"figures": _figures(target), "variants": variants}


if __name__ == "__main__":
    print_figures(_find)
