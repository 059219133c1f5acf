"""How far the sorting kernels, and Rank & Sort on them, may be from float64.

As in `budgets` and `loss_budget`: what one H may be off by, times how many are on their slope, is
carried on to first order. A case's values are 1 - q, its qualities q come beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alrp_triton.reference import layout, pairwise, rank_sort

from .kernel_tolerance import (
    Case,
    Rounding,
    count_budget,
    pair_error,
    reach_of,
    sum_within,
    torch_error,
)
from .loss_tolerance import ROAD, SECOND_ORDER, LossResult, Uncertain, update_budget

if TYPE_CHECKING:
    from alrp_triton.kernels.tuning.block_sizes import BreakpointTiles, Tiles

_DOUBLE = torch.finfo(torch.float64).eps


def sorting_count_budget(case: Case, exact: Tensor) -> Tensor:
    """Bound how far the sums over worse and better positives, (3, P), may be from `exact`.

    There is no padding.
    """
    ones = torch.ones_like(case.values)
    on_slope = torch.stack([_on_slope(case, weights) for weights in (ones, ones, case.values)])
    return on_slope + _DOUBLE * case.scores.numel() * exact.abs()


def sorting_gradient_budget(case: Case, exact: Tensor) -> Tensor:
    """Bound how far what the weights lay on each positive, (P,), may be from `exact`.

    There is no padding.
    """
    return _on_slope(case, case.weights) + _DOUBLE * case.scores.numel() * exact.abs()


def _on_slope(case: Case, weights: Tensor) -> Tensor:
    """Return what rounding all H on their slope may amount to, whatever the qualities are."""
    reach = reach_of(case)
    error = pair_error(case, Rounding(0.0, 0, 0), torch_error(case, case.scores))
    return error * sum_within(case.scores, weights, case.scores, reach, reach)


def rank_sort_budget(
    case: Case,
    quality: Tensor,
    tiles: Tiles | BreakpointTiles,
    truth: LossResult,
    itself: float = 1.0,
    least: float = 0.0,
) -> LossResult:
    """Bound how far (ranking, sorting) and the gradient of their sum may be from `truth`.

    Args:
        case: without padding.
        quality: (P,) float64.
        tiles: sizes of the kernels that count and spread over the negatives.
        itself: what a positive adds to its own rank and means.
        least: where no more than this stands above a positive, it gets no update.
    """
    # 1. The two errors: NFP / rank; mean over all above less mean over those of no lower quality.
    own = itself * case.values
    counts = case.expected_count(torch.float64)
    (nfp, rank_positive, above), off = counts, count_budget(case, tiles, counts)
    rank_positive = rank_positive - 1 + itself
    rank = nfp + rank_positive
    ranking = nfp / rank
    d_ranking = (off[0] + ranking * (off[0] + off[1])) / rank
    current = (own + above) / rank_positive
    d_current = (off[2] + current * off[1]) / rank_positive
    sums = torch.stack(rank_sort.count(case.to(torch.float64).batch, quality, case.values))
    (worse, better, values), d_sums = sums, sorting_count_budget(case, sums)
    target = (own + values) / (itself + better)
    d_target = (d_sums[2] + target * d_sums[1]) / (itself + better)
    ranked = Uncertain(ranking, d_ranking + ROAD * ranking)
    missorted = Uncertain(current - target, d_current + d_target + ROAD * current)

    # 2. The gradient by the logits: of the ranking error, then what positives lay on each other.
    by_logits = update_budget(
        case, tiles, truth.by_logits, Uncertain(nfp, off[0]), ranked, pairwise, least
    )
    more = [torch.zeros_like(budget) for budget in by_logits]
    among = _among_positives(case, quality, Uncertain(worse, d_sums[0]), missorted, least)
    layout.write_positives(more, case.index, among)
    by_logits = [a + b for a, b in zip(by_logits, more, strict=True)]

    # 3. The values. The sorting value is `current`, or less `target`, and so no further off.
    eps = torch.finfo(case.scores.dtype).eps
    d_values = torch.stack([ranked.off.mean(), missorted.off.mean()])
    values = SECOND_ORDER * d_values + (eps + ROAD) * truth.values.abs()
    return LossResult(values, by_logits, truth.by_loc_errors)


def _among_positives(
    case: Case, quality: Tensor, worse: Uncertain, missorted: Uncertain, least: float
) -> Tensor:
    """Bound the gradient by the positives, (P,), that the sorting error makes."""
    weights, d_weights = missorted.per(worse)
    unsure = torch.where(worse.unsure(least), missorted.exact + missorted.off, 0.0)
    scores = case.scores.double()
    batch = case.to(torch.float64).batch
    passed = rank_sort.gradient(batch, quality, weights)
    off = sorting_gradient_budget(case._replace(weights=weights), passed)
    off += rank_sort.gradient(batch, quality, SECOND_ORDER * d_weights)
    # Where it is not sure that there is a worse one, all may be laid on any that is not below.
    off += sum_within(scores, unsure, scores, torch.inf, reach_of(case))
    return (off + SECOND_ORDER * missorted.off + unsure) / max(1, scores.numel())
