"""What Rank & Sort sorts by: positives among positives, those of higher quality first.

The sorting error compares the scores of positive i and of the positives above it, told apart by
their quality q, the IoU: those with q_k < q_i should not be there. Notation as in `pairwise`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairwise import chunks, step, within


def count(
    scores: Tensor,
    quality: Tensor,
    values: Tensor,
    delta: float,
    own_groups: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """How many positives stand above i, of lower quality and not.

    Args:
        scores: (P,) finite scores of the positives.
        quality: (P,) float64, the quality q of each.
        values: (P,) float64, any number for each.
        delta: half-width of the step.
        own_groups: (P,) int64, the groups of the positives. None: all are one group.

    Returns:
        Three (P,) float64 tensors: sum_{q_k < q_i} H(x_ik); sum_{k != i, q_k >= q_i} H(x_ik); and
        sum_{k != i, q_k >= q_i} values(k) H(x_ik). A NaN among the scores or qualities makes all of
        them NaN.
    """
    worse, better, better_values = quality.new_zeros((3, scores.numel()), dtype=torch.float64)
    for i in chunks(scores, scores):
        h = _above(scores, i, delta, own_groups)
        h.diagonal(i.start).zero_()  # k != i
        lower = quality < quality[i, None]
        worse[i] = h.where(lower, 0).sum(1)
        h = h.where(~lower, 0)
        better[i] = h.sum(1)
        better_values[i] = (h * values).sum(1)
    nan = (scores.isnan() | quality.isnan()).any()
    return tuple(x.masked_fill(nan, torch.nan) for x in (worse, better, better_values))


def gradient(
    scores: Tensor,
    quality: Tensor,
    weights: Tensor,
    delta: float,
    own_groups: Tensor | None = None,
) -> Tensor:
    """What the positives of higher quality lay on each positive that stands above them.

    Args:
        scores, quality, delta, own_groups: as in `count`.
        weights: (P,) float64; what positive i lays on a worse one k is weights(i) H(x_ik).

    Returns:
        (P,) float64: sum_{i: q_k < q_i} weights(i) H(x_ik).
    """
    total = torch.zeros_like(weights)
    for i in chunks(scores, scores):
        h = _above(scores, i, delta, own_groups).where(quality < quality[i, None], 0)
        total += (h * weights[i, None]).sum(0)
    return total


def _above(scores: Tensor, i: slice, delta: float, own_groups: Tensor | None) -> Tensor:
    """H(x_ik) (i, k) in float64, within groups."""
    return within(step(scores - scores[i, None], delta).double(), own_groups, i, own_groups)
