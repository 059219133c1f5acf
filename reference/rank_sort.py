"""What Rank & Sort sorts by: positives among positives, those of higher quality first.

The sorting error compares the scores of positive i and of the positives above it, told apart by
their quality q, the IoU: those with q_k < q_i should not be there. Notation as in `pairwise`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Batch
from .pairwise import chunks, step, within


def count(batch: Batch, quality: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many positives stand above i, of lower quality and not.

    Args:
        batch: of P positives, without padding; its levels are not looked at.
        quality: (P,) float64, the quality q of each.
        values: (P,) float64, any number for each.

    Returns:
        Three (P,) float64 tensors: sum_{q_k < q_i} H(x_ik); sum_{k != i, q_k >= q_i} H(x_ik); and
        sum_{k != i, q_k >= q_i} values(k) H(x_ik). A NaN among the scores or qualities makes all of
        them NaN.
    """
    scores = batch.scores
    worse, better, better_values = quality.new_zeros((3, scores.numel()), dtype=torch.float64)
    for i in chunks(scores, scores):
        h = _above(batch, i)
        h.diagonal(i.start).zero_()  # k != i
        lower = quality < quality[i, None]
        worse[i] = h.where(lower, 0).sum(1)
        h = h.where(~lower, 0)
        better[i] = h.sum(1)
        better_values[i] = (h * values).sum(1)
    nan = (scores.isnan() | quality.isnan()).any()
    return tuple(x.masked_fill(nan, torch.nan) for x in (worse, better, better_values))


def gradient(batch: Batch, quality: Tensor, weights: Tensor) -> Tensor:
    """Return what the positives of higher quality lay on each positive that stands above them.

    Args:
        batch, quality: as in `count`.
        weights: (P,) float64; what positive i lays on a worse one k is weights(i) H(x_ik).

    Returns:
        (P,) float64: sum_{i: q_k < q_i} weights(i) H(x_ik).
    """
    total = torch.zeros_like(weights)
    for i in chunks(batch.scores, batch.scores):
        h = _above(batch, i).where(quality < quality[i, None], 0)
        total += (h * weights[i, None]).sum(0)
    return total


def _above(batch: Batch, i: slice) -> Tensor:
    """Return H(x_ik) (i, k) in float64, within groups."""
    h = step(batch.scores - batch.scores[i, None], batch.delta).double()
    return within(h, batch, i, batch.positive_groups)
