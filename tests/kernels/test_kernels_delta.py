"""The whole range of delta, with scores of every magnitude: all kernels against the specification.

Budgets are derived, see `alrp_triton.testing`; the kernels run in the interpreter, or on a GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from batches import halved
from torch import Tensor

from alrp_triton import alrp_loss
from alrp_triton.reference import layout, rank_sort
from alrp_triton.reference.layout import LARGEST, LARGEST_DELTA, SMALLEST_DELTA
from alrp_triton.testing import kernel_tolerance as budgets
from alrp_triton.testing.rank_sort_tolerance import sorting_count_budget, sorting_gradient_budget

pytest.importorskip("triton")
kernels = {
    name.split(".")[-1]: importlib.import_module(f"alrp_triton.kernels.{name}")
    for name in (
        "pairwise",
        "breakpoints",
        "rank_sort",
        "breakpoints.scan",
        "breakpoints.sort",
        "breakpoints.bins",
    )
}
tiles_module = importlib.import_module("alrp_triton.kernels.tuning.block_sizes")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL: dict[str, Any] = {
    "pairwise": tiles_module.Tiles(lanes=8, few=4, count_block=16, count_rows=2, gradient_block=16,
                                   gradient_rows=2, gradient_fold=8, count_programs=4),
    "breakpoints": tiles_module.BreakpointTiles(8, count_rows=2, gradient_rows=4, programs=3,
                                                block=64, patterns=1 << 14),
}  # fmt: skip
DELTAS = [SMALLEST_DELTA, 1.7 * 2.0**-50, 3.0, 1.3 * 2.0**40, LARGEST_DELTA]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use several stretches in the interpreter, where a long one takes long."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels["scan"], "_STRETCH", 128)


def scores_around(delta: float, number: int, dtype: torch.dtype) -> Tensor:
    """Draw a third near delta's magnitude, a third of all magnitudes, a third steps from others.

    These stand 0, delta or 2 delta from another, as exactly as the dtype can say, or one float
    beside that. All mantissas, both signs; 0, the ends of the range and infinities are among them.
    """
    near = (delta or 1.0) * torch.randn(number // 3, dtype=torch.float64)
    powers = torch.empty(number // 3, dtype=torch.float64).uniform_(-149, 125)
    everywhere = torch.where(torch.rand(number // 3) < 0.5, -1.0, 1.0) * 2.0**powers
    ends = torch.tensor([0.0, -0.0, LARGEST, -LARGEST, torch.inf, -torch.inf], dtype=torch.float64)
    drawn = torch.cat([near, everywhere, ends])
    others = drawn[torch.randint(number // 3, (number - drawn.numel(),))]
    others = others + delta * torch.randint(-2, 3, others.shape)
    scores = torch.cat([drawn, others]).to(dtype)
    beside = torch.nextafter(scores.float(), scores.float().new_tensor(0)).to(dtype)
    return torch.where(torch.rand(number) < 0.1, beside, scores)[torch.randperm(number)]


def draw(delta: float, dtype: torch.dtype, grouped: bool = False, number: int = 45) -> budgets.Case:
    logits = scores_around(delta, number, dtype)[:, None, None].to(DEVICE)
    targets = torch.where(torch.rand(number, 1) < 0.35, 0, -1).to(DEVICE)
    case = budgets.find([logits], [targets], delta, 2)
    return budgets.group(case, [torch.randint(0, 3, targets.shape)]) if grouped else case


@pytest.mark.parametrize(
    ("delta", "dtype", "algorithm"), halved(DELTAS, DTYPES, ["pairwise", "breakpoints"])
)
def test_count_and_gradient(delta: float, dtype: torch.dtype, algorithm: str) -> None:
    # Only without groups are bit patterns looked up.
    check(draw(delta, dtype, grouped=dtype == torch.float32 and delta > 1), algorithm)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="sizes that a GPU has compiled for")
@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize(("cells", "bits"), [(1, 24), (40, 16), (1 << 16, 20)])
def test_large_calls_in_small(
    cells: int, bits: int, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many positives leave a cell or two for each of them, and distances of fewer bits."""
    monkeypatch.setattr(kernels["sort"], "_MOST_CELLS", cells)
    monkeypatch.setattr(kernels["bins"], "_BITS", bits)
    for grouped in (False, True):
        check(draw(delta, torch.float32, grouped), "breakpoints")


def check(case: budgets.Case, algorithm: str) -> None:
    """Check that count and gradient are within budget of the float64 reference."""
    tiles = SMALL[algorithm]
    counts = torch.stack(kernels[algorithm].count(*case.count_input, tiles))
    exact = case.expected_count(torch.float64)
    allowed = budgets.count_budget(case, tiles, exact)
    assert (counts - exact).abs().le(allowed).all(), ((counts - exact).abs() / allowed).max()
    (gradient,) = kernels[algorithm].gradient(*case.gradient_input, tiles)
    (truth,) = case.expected_gradient(torch.float64)
    (allowed,) = budgets.gradient_budget(case, tiles, [truth])
    error = (gradient.double() - truth).abs()
    assert error.le(allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("algorithm", ["pairwise", "breakpoints"])
@pytest.mark.parametrize(
    ("positives", "score", "negative"),
    [(2, -1e-45, -1.0), (2, -1e-40, -1.0), (2, 1.0, 1e-45), (40, 1.0, 3e-43), (40, 1.0, 1e-40)],
)
def test_a_negative_barely_within_reach(
    positives: int, score: float, negative: float, algorithm: str
) -> None:
    """H may be as small as a float, and its reciprocal beyond all: what is shared is still 1."""
    logits = torch.tensor([score] * positives + [negative] * 2, device=DEVICE)[:, None]
    logits.requires_grad_()
    targets = torch.tensor([0] * positives + [-1] * 2, device=DEVICE)
    loc_errors = torch.full((positives,), 0.5, device=DEVICE)
    settings = {"impl": "triton", "algorithm": algorithm}
    cls, _ = alrp_loss(logits, targets, loc_errors, 1.0, **settings)
    (gradient,) = torch.autograd.grad(cls, logits)
    assert gradient.isfinite().all()
    assert gradient.sum().abs() <= 1e-6 * gradient.abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", DELTAS)
def test_sorting(delta: float, dtype: torch.dtype) -> None:
    scores = layout.finite(scores_around(delta, 60, dtype)).to(DEVICE)
    quality, values, weights = torch.rand(3, 60, dtype=torch.float64, device=DEVICE)
    empty = scores.new_empty(0)
    case = budgets.Case([], [], empty.long(), scores, values, weights, empty, delta)
    wide = case.to(torch.float64).batch
    exact = torch.stack(rank_sort.count(wide, quality, values))
    counts = torch.stack(kernels["rank_sort"].count(case.batch, quality, values))
    assert (counts - exact).abs().le(sorting_count_budget(case, exact)).all()
    exact = rank_sort.gradient(wide, quality, weights)
    passed = kernels["rank_sort"].gradient(case.batch, quality, weights)
    assert (passed - exact).abs().le(sorting_gradient_budget(case, exact)).all()
