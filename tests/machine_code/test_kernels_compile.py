"""Every pairwise kernel compiles ahead of time for GPUs that are not here; its code is read.

See `figures`: `python -m tests.machine_code.test_kernels_compile sm_90`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alrp_triton.reference.layout import Batch
from tests.machine_code.figures import TARGETS, THOROUGH, cases_for, print_figures

triton = pytest.importorskip("triton")

PAIR_KERNELS = ("_count_kernel", "_gradient_kernel")

# (logits, targets, targets per logit, delta, offsets beyond 32 bits). Each dtype of logits, each
# form of targets, the hard step and 64-bit offsets once: they meet in few lines of a kernel.
CASES = {
    "float32": ("float32", "int64", False, 1.0, False),
    "bfloat16": ("bfloat16", "int32", False, 1.0, False),
    "float16": ("float16", "float32", True, 1.0, False),
    "float64": ("float64", "int64", False, 1.0, False),
    "hard": ("float32", "int32", True, 0.0, False),
    "wide": ("float32", "int64", False, 1.0, True),
    "grouped": ("float32", "int64", False, 1.0, False),
    "grouped hard": ("bfloat16", "int8", True, 0.0, False),
    "grouped float64": ("float64", "int64", False, 1.0, False),
}
MEASURED = ("float32", "bfloat16", "float16", "wide", "hard")  # instructions a pair, on sm_90
SOME = ("float32", "grouped hard", "float64", "grouped float64")


def _call(
    kernels: Any,
    case: str,
    target: str,
    positives: int = 1000,
    shape: tuple[int, int, int] = (4, 20, 100),
    tuned: tuple = (),
) -> list:
    """Return the launches of one count and one gradient, by the defaults if nothing is tuned."""
    from alrp_triton.kernels.tuning.block_sizes import choose, default_tiles
    from perf.machine_code import sass

    logits_dtype, targets_dtype, per_logit, delta, wide = CASES[case]
    batch, classes, places = shape
    strides = (1 << 30 if wide else classes * places, places, 1)
    logits = torch.empty_strided(shape, strides, dtype=getattr(torch, logits_dtype), device="meta")
    targets = torch.empty(
        shape if per_logit else (batch, places), dtype=getattr(torch, targets_dtype), device="meta"
    )
    scores = torch.zeros(positives, dtype=torch.promote_types(logits.dtype, torch.float32))
    vector = torch.zeros(positives, dtype=torch.float64)
    index = torch.zeros(positives, dtype=torch.int64)
    gpu = sass.gpu_target(target)
    major = int(target.removeprefix("sm_")) // 10 if gpu.backend == "cuda" else 9
    default = default_tiles(gpu.warp_size, major)
    tiles = choose(list(tuned), default, logits.dtype, positives, logits.numel())
    batch = Batch([logits], [targets], index, scores, delta, -100)
    if "grouped" in case:
        groups = [torch.zeros(targets.shape, dtype=torch.int64)]
        batch = batch._replace(groups=groups, positive_groups=index)
    with sass.record() as launches:
        kernels.count(batch, vector, tiles)
        kernels.gradient(batch, vector, vector, tiles)
    return launches


def _figures(target: str) -> dict[str, dict[str, Any]]:
    """Return registers, spills and instructions a pair of each kernel and case."""
    from alrp_triton.kernels import pairwise
    from perf.machine_code import sass

    figures = {}
    for case in cases_for(target, CASES, SOME):
        for launch in _call(pairwise, case, target):
            name = launch.kernel.fn.__name__
            if name not in PAIR_KERNELS and case not in ("float32", "float64"):
                continue  # they see little of the logits
            code = sass.compile_launch(launch, target)
            figure: dict[str, Any] = {"registers": code.registers, "spills": code.spills}
            if name in PAIR_KERNELS:
                figure["scattered"] = sass.scattered(code)
                if target == "sm_90" and case in MEASURED:
                    figure["per_pair"] = _per_pair(code, launch, "hard" in case)
            figures[f"{name} {case}"] = figure
    return figures


def _per_pair(code: Any, launch: Any, hard: bool) -> list[float]:
    """Of the fast way and the exact one; behind them come the loops around these two."""
    given = launch.arguments
    many = given["BLOCK" if launch.kernel.fn.__name__ == "_count_kernel" else "FOLD"]
    pairs = many * given["ROWS"]  # of a thread
    loops = [loop for loop in code.loops if hard or loop.opcodes["FFMA.SAT"] == pairs]
    return sorted(loop.instructions / pairs for loop in loops)[:2]


def _tuned() -> tuple:
    """Tune four classes of sizes, two of which differ in nothing that a kernel is compiled for."""
    from alrp_triton.kernels.tuning.block_sizes import Class, Tiles

    few, many, small, large = (0, 1024), (1025, None), (0, 1 << 20), ((1 << 20) + 1, None)
    sizes = Tiles(count_block=64, gradient_block=64)
    return (
        (Class("float32", few, small), sizes),
        (Class("float32", few, large), sizes._replace(count_programs=1024)),
        (Class("float32", many, small), sizes._replace(gradient_rows=4, few=8)),
        (Class("float32", many, large), sizes._replace(count_warps=2, count_stages=2)),
    )


def _variants(target: str, tuned: tuple = ()) -> list[int]:
    """Return how many variants of kernels there are after each of 50 calls of random sizes."""
    from alrp_triton.kernels import pairwise
    from perf.machine_code import sass

    torch.manual_seed(0)
    seen: set[tuple[str, str]] = set()
    numbers = []
    for call in range(50):
        positives, batch, places = (int(n) for n in torch.randint(1, 5000, (3,)))
        if call % 5 == 0:  # what a JIT likes to specialise on
            positives, batch, places = (1, 16, 32, 4096)[call % 4], 16, (1, 16, 64)[call % 3]
        CASES["float32"] = ("float32", "int64", False, 0.1 + call, False)
        for launch in _call(pairwise, "float32", target, positives, (batch, 20, places), tuned):
            seen.add((launch.kernel.fn.__name__, sass.variant(launch, target)))
        numbers.append(len(seen))
    return numbers


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str, compiled: dict) -> None:
    figures = compiled[target]["figures"]
    assert {name.split()[0] for name in figures} == {
        "_prepare_kernel",
        "_count_kernel",
        "_rank_kernel",
        "_gradient_kernel",
        "_positive_grads_kernel",
    }
    assert {name: x["spills"] for name, x in figures.items() if x["spills"]} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_threads_read_and_write_side_by_side(target: str, compiled: dict) -> None:
    figures = compiled[target]["figures"].items()
    found = {name: x["scattered"] for name, x in figures if "scattered" in x}
    assert len(found) == 2 * len(cases_for(target, CASES, SOME))
    assert not any(found.values()), found


@pytest.mark.parametrize("case", [case for case in MEASURED if case != "hard"])
def test_instructions_a_pair(case: str, compiled: dict) -> None:
    """On sm_90 it takes two (a multiply-add that clamps, an add), and a share of the rest."""
    figures = compiled["sm_90"]["figures"]
    fast, exact = figures[f"_count_kernel {case}"]["per_pair"]
    # Triton 3.6 needs 2.57 where offsets take 64 bits, 3.9 needs 2.498.
    assert fast <= (2.6 if case == "wide" and triton.__version__ < "3.9" else 2.5)
    assert exact <= 3.6
    fast, exact = figures[f"_gradient_kernel {case}"]["per_pair"]
    assert fast <= 2.7
    assert exact <= 3.6


def test_instructions_a_pair_of_the_hard_step(compiled: dict) -> None:
    """It has but one way, which compares instead of multiplying."""
    innermost, _ = compiled["sm_90"]["figures"]["_gradient_kernel hard"]["per_pair"]
    assert innermost <= 2.7


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_random_sizes_and_deltas_make_no_new_variant(target: str, compiled: dict) -> None:
    numbers = compiled[target]["variants"]
    assert numbers == [6] * 50  # one of each kernel, and the preparation with weights and without


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_tuned_classes_make_no_more_variants_than_they_differ(target: str, compiled: dict) -> None:
    """`_tuned` makes two preparations (few) of two kinds, counts (few, warps), gradients (rows)."""
    numbers = compiled[target]["tuned_variants"]
    assert numbers[-1] == 2 * 2 + 3 + 2 + 1 + 1
    assert numbers[25:] == numbers[-1:] * 25


def _find(target: str) -> dict[str, Any]:
    found: dict[str, Any] = {"figures": _figures(target)}
    if target in THOROUGH:
        found |= {"variants": _variants(target), "tuned_variants": _variants(target, _tuned())}
    return found


if __name__ == "__main__":
    print_figures(_find)
