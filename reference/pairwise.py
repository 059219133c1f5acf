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

from .layout import blocks, exclude_non_negatives, finite, over_classes, write_positives

# Pairs that are evaluated at once: what bounds the memory.
PAIRS = 1 << 22


def step(x: Tensor, delta: float) -> Tensor:
    """H(x), Sec. 2.1: x / (2 delta) + 1/2 on [-delta, delta]; [x >= 0] for delta = 0. NaN stays."""
    if delta == 0:
        return torch.where(x.isnan(), x, (x >= 0).to(x.dtype))
    return (x / (2 * delta) + 0.5).clamp(0, 1)


def within(h: Tensor, own_groups: Tensor | None, i: slice, groups: Tensor | None) -> Tensor:
    """H(x_ij), positives by others, where both are of one group, else 0; a NaN stays anyway."""
    if own_groups is None:
        return h
    return h.where((groups == own_groups[i, None]) | h.isnan(), 0)


def count(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    scores: Tensor,
    values: Tensor,
    delta: float,
    ignore_index: int,
    groups: Sequence[Tensor] = (),
    own_groups: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a positive sees above itself: NFP(i), rank+(i) and S(i).

    Args:
        logits: levels (B, C, M), any float dtype.
        targets: class indices (B, M), or 1 / 0 / -1 (B, C, M).
        scores: (P,) finite scores of the positives.
        values: (P,) any number for each positive, such as Eloc(k) of aLRP.
        delta: half-width of the step.
        ignore_index: the class index that takes an anchor out.
        groups: integers in the shape of the targets; a positive sees its own group only.
        own_groups: (P,) int64, the groups of the positives. None: all are one group.

    Returns:
        Three (P,) float64 tensors: NFP(i) = sum_{j in N} H(x_ij); rank+(i) = 1 + sum_{k != i}
        H(x_ik) (Eq. 3); S(i) = sum_{k != i} values(k) H(x_ik) (the sum in the numerator of Eq. 10).

    NaN has no place in any order, so it leaves no number standing that a rank is made of: one among
    the positives makes all three NaN for every positive, one among the negatives every NFP, in all
    groups alike. What is ignored is no negative.
    """
    nfp = scores.new_zeros(scores.shape, dtype=torch.float64)
    unranked = unordered = scores.isnan().any()
    for part in negatives_of(logits, targets, ignore_index, groups):
        unordered = unordered | part.scores.isnan().any()
        for i in chunks(scores, part.scores):
            h = step(part.scores - scores[i, None], delta)
            nfp[i] += within(h, own_groups, i, part.groups).sum(1, dtype=torch.float64)

    rank_positive, value_sum = torch.ones_like(nfp), torch.zeros_like(nfp)
    for i in chunks(scores, scores):
        h = within(step(scores - scores[i, None], delta).double(), own_groups, i, own_groups)
        h.diagonal(i.start).zero_()  # k != i
        rank_positive[i] += h.sum(1)
        value_sum[i] = (h * values.double()).sum(1)
    nfp.masked_fill_(unordered, torch.nan)
    rank_positive.masked_fill_(unranked, torch.nan)
    value_sum.masked_fill_(unranked, torch.nan)
    return nfp, rank_positive, value_sum


def gradient(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    index: Tensor,
    scores: Tensor,
    weights: Tensor,
    own: Tensor,
    delta: float,
    ignore_index: int,
    groups: Sequence[Tensor] = (),
    own_groups: Tensor | None = None,
) -> list[Tensor]:
    """The gradient by every logit (Eq. 5 and Algorithm 1), in the logits' dtype.

    Args:
        logits: levels, as in `count`; so is all else that stands there too.
        index: (P,) positions of the positives in the flattened logits of all levels.
        weights: (P,) float64; what positive i lays on a negative j is weights(i) H(x_ij), so
            weights(i) = D(i) / (Z NFP(i)).
        own: (P,) float64; the gradient by the positives, -D(i) / Z.

    Returns:
        One tensor a level: sum_i weights(i) H(x_ij) at negatives, own(i) at positives, 0 at
        ignored.
    """
    gradients = [torch.zeros_like(level) for level in logits]
    for part in negatives_of(logits, targets, ignore_index, groups):
        total = part.scores.new_zeros(part.scores.shape, dtype=torch.float64)
        for i in chunks(scores, part.scores):
            h = within(step(part.scores - scores[i, None], delta), own_groups, i, part.groups)
            total += (h * weights[i, None]).sum(0)
        part.write(gradients, total)
    write_positives(gradients, index, own)
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
        """Writes their gradient (n,) into that of their level."""
        out = gradients[self.level]
        out[self.rows, :, self.places][self.mask] = total.to(out.dtype)


def negatives_of(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    ignore_index: int,
    groups: Sequence[Tensor],
) -> Iterator[Negatives]:
    """The negatives of all levels, part by part."""
    for number, (level, target) in enumerate(zip(logits, targets, strict=True)):
        for rows, places, part, part_targets in blocks(level, target):
            mask = torch.ones_like(part, dtype=torch.bool)
            exclude_non_negatives(mask, part_targets, ignore_index)
            theirs = None
            if groups:
                theirs = over_classes(groups[number][rows, ..., places], part)[mask]
            yield Negatives(finite(part[mask]), theirs, number, rows, places, mask)


def chunks(scores: Tensor, others: Tensor) -> Iterator[slice]:
    """Cuts the positives so that no more than `PAIRS` pairs with `others` are evaluated at once."""
    size = max(1, PAIRS // max(1, others.numel()))
    for start in range(0, scores.numel(), size):
        yield slice(start, min(start + size, scores.numel()))
