"""The equations of the paper, pair by pair: the specification.

Everything else in this project is held to these two functions, which are never changed to suit it.
Notation: P positives i, k with scores s_i; N negatives j; x_ij = s_j - s_i (Sec. 2.1). A level of
logits is (B, C, M), with targets as `layout` describes. Sums over examples are float64; H is
evaluated in the logits' dtype, or in float32 for 16-bit logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Batch, blocks, exclude_non_negatives, finite, over_classes, write_positives

# Pairs that are evaluated at once: what bounds the memory.
PAIRS = 1 << 22


def step(x: Tensor, delta: float) -> Tensor:
    """Return H(x), Sec. 2.1: x / (2 delta) + 1/2 within [0, 1]; for delta = 0, [x >= 0] or NaN."""
    if delta == 0:
        return torch.where(x.isnan(), x, (x >= 0).to(x.dtype))
    return (x / (2 * delta) + 0.5).clamp(0, 1)


def within(h: Tensor, batch: Batch, i: slice, groups: Tensor | None) -> Tensor:
    """Return H(x_ij), positives by others, where both are of one group, else 0; a NaN stays."""
    if batch.positive_groups is None:
        return h
    return h.where((groups == batch.positive_groups[i, None]) | h.isnan(), 0)


def count(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each positive sees above itself: NFP(i), rank+(i) and S(i).

    Args:
        batch: of P positives, without padding.
        values: (P,) any number for each positive, such as Eloc(k) of aLRP.

    Returns:
        Three (P,) float64 tensors: NFP(i) = sum_{j in N} H(x_ij); rank+(i) = 1 + sum_{k != i}
        H(x_ik) (Eq. 3); S(i) = sum_{k != i} values(k) H(x_ik) (the sum in the numerator of Eq. 10).

    NaN has no place in any order, so it leaves no number standing that a rank is made of: one among
    the positives makes all three NaN for every positive, one among the negatives every NFP, in all
    groups alike. What is ignored is no negative.
    """
    scores, delta = batch.scores, batch.delta
    nfp = scores.new_zeros(scores.shape, dtype=torch.float64)
    unranked = unordered = scores.isnan().any()
    for part in negatives_of(batch):
        unordered = unordered | part.scores.isnan().any()
        for i in chunks(scores, part.scores):
            h = step(part.scores - scores[i, None], delta)
            nfp[i] += within(h, batch, i, part.groups).sum(1, dtype=torch.float64)

    rank_positive, value_sum = torch.ones_like(nfp), torch.zeros_like(nfp)
    for i in chunks(scores, scores):
        h = step(scores - scores[i, None], delta).double()
        h = within(h, batch, i, batch.positive_groups)
        h.diagonal(i.start).zero_()  # k != i
        rank_positive[i] += h.sum(1)
        value_sum[i] = (h * values.double()).sum(1)
    nfp.masked_fill_(unordered, torch.nan)
    rank_positive.masked_fill_(unranked, torch.nan)
    value_sum.masked_fill_(unranked, torch.nan)
    return nfp, rank_positive, value_sum


def gradient(batch: Batch, weights: Tensor, positive_grad: Tensor) -> list[Tensor]:
    """Return the gradient by every logit (Eq. 5 and Algorithm 1), in the logits' dtype.

    Args:
        batch: of P positives, without padding.
        weights: (P,) float64; what positive i lays on a negative j is weights(i) H(x_ij), so
            weights(i) = D(i) / (Z NFP(i)).
        positive_grad: (P,) float64; the gradient by the positives, -D(i) / Z.

    Returns:
        One tensor a level: sum_i weights(i) H(x_ij) at negatives, positive_grad(i) at positives, 0
        at ignored.
    """
    gradients = [torch.zeros_like(level) for level in batch.logits]
    for part in negatives_of(batch):
        total = part.scores.new_zeros(part.scores.shape, dtype=torch.float64)
        for i in chunks(batch.scores, part.scores):
            h = step(part.scores - batch.scores[i, None], batch.delta)
            total += (within(h, batch, i, part.groups) * weights[i, None]).sum(0)
        part.write(gradients, total)
    write_positives(gradients, batch.index, positive_grad)
    return gradients


class Negatives(NamedTuple):
    """The negatives of a part of a level, n of them."""

    scores: Tensor  # (n,) finite
    groups: Tensor | None  # (n,)
    level: int
    rows: slice
    places: slice
    mask: Tensor  # where they are in the part

    def write(self, gradients: Sequence[Tensor], total: Tensor) -> None:
        """Write their gradient (n,) into that of their level."""
        out = gradients[self.level]
        out[self.rows, :, self.places][self.mask] = total.to(out.dtype)


def negatives_of(batch: Batch) -> Iterator[Negatives]:
    """Yield the negatives of all levels, part by part."""
    for number, (level, target, groups) in enumerate(batch.levels()):
        for rows, places, part, part_targets in blocks(level, target):
            mask = torch.ones_like(part, dtype=torch.bool)
            exclude_non_negatives(mask, part_targets, batch.ignore_index)
            theirs = None
            if groups is not None:
                theirs = over_classes(groups[rows, ..., places], part)[mask]
            yield Negatives(finite(part[mask]), theirs, number, rows, places, mask)


def chunks(scores: Tensor, others: Tensor) -> Iterator[slice]:
    """Cut the positives so that no more than `PAIRS` pairs with `others` are evaluated at once."""
    size = max(1, PAIRS // max(1, others.numel()))
    for start in range(0, scores.numel(), size):
        yield slice(start, min(start + size, scores.numel()))
