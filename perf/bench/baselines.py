"""What was published before this package, written from its description: aLRP in two other ways.

One of them stands here a second time, made better. All return cls with the gradient of the whole
aLRP by the logits, which is ready when forward returns, and take the logits in float32.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def _step(x: Tensor, delta: float) -> Tensor:
    """Return H(x): the clipped line of half-width delta, or [x >= 0]."""
    return (x / (2 * delta) + 0.5).clamp(0, 1) if delta > 0 else (x >= 0).to(x.dtype)


def _filter(logits: Tensor, marks: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the positives and the negatives that matter to any.

    Returns:
        Where the positives stand, and their scores; likewise of the negatives.
    """
    is_positive = marks == 1
    scores = logits[is_positive]
    relevant = (marks == 0) & (logits >= scores.min() - delta)
    return is_positive, scores, relevant, logits[relevant]


def _gradient(logits: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """Lay out the gradient by all logits; each part is where it stands and what stands there."""
    gradient = torch.zeros_like(logits)
    for where, part in parts:
        gradient[where] = part
    return gradient


class GradientFromForward(torch.autograd.Function):
    """Backward of a loss of (logits, marks, loc_errors, delta) that kept its gradient."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


class PublishedLoop(GradientFromForward):
    """aLRP as its authors published it: one positive after the other, in Python.

    Every iteration evaluates H against all positives and all relevant negatives, and adds one
    positive's share to the negatives' gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, marks: Tensor, loc_errors: Tensor, delta: float
    ) -> Tensor:
        is_positive, scores, relevant, negatives = _filter(logits, marks, delta)
        own, passed = torch.zeros_like(scores), torch.zeros_like(negatives)
        precision_error = torch.zeros_like(scores)
        for i in range(scores.numel()):
            above = _step(scores - scores[i], delta)
            above[i] = 0
            false = _step(negatives - scores[i], delta)
            nfp = false.sum()
            rank = 1 + above.sum() + nfp
            precision_error[i] = nfp / rank
            if nfp > 0:
                own[i] = -(nfp + (above * loc_errors).sum()) / rank
                passed += false * (-own[i] / nfp)
        parts = (is_positive, own / scores.numel()), (relevant, passed / scores.numel())
        ctx.save_for_backward(_gradient(logits, *parts))
        return precision_error.mean()


class SortAndBucket(GradientFromForward):
    """aLRP by sorting and bucketing (Yavuz et al., Bucketed Ranking-based Losses, ECCV 2024).

    All examples are sorted. A run of negatives between neighbouring positives is a bucket: it
    stands at its mean, counts as many times as it has members, and shares its gradient equally
    among them. That leaves P x (P + 1) relations. Exact for delta = 0 only: inside a window of
    width 2 delta the members of a bucket differ in H where the line bends.

    As in the published code, the irrelevant negatives are cut off after the sort, and the buckets
    are added up one after the other, in Python.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, marks: Tensor, loc_errors: Tensor, delta: float
    ) -> Tensor:
        is_positive, is_negative = marks == 1, marks == 0
        negatives, scores = logits[is_negative], logits[is_positive]
        examples, order, of_negative = _sort(negatives, scores)
        at = of_negative.logical_not().nonzero()[:, 0]
        ranked, by_score = examples[at], order[at] - negatives.numel()
        relevant = (examples >= ranked[-1] - delta).count_nonzero()
        examples, order = (x[:relevant][of_negative[:relevant]] for x in (examples, order))
        size = torch.cat([at, relevant[None]]).diff(prepend=at.new_tensor([-1])) - 1
        buckets = examples.split(size.tolist())
        mean = torch.stack([bucket.sum() / max(len(bucket), 1) for bucket in buckets])
        # Rounding must not move a mean past the positives that its members stand between.
        mean = mean.clamp(pad(ranked, (0, 1), value=-inf), pad(ranked, (1, 0), value=inf))

        loss, own, passed = _relate(ranked, loc_errors[by_score], mean, size, delta)
        of_positives, of_negatives = torch.zeros_like(scores), torch.zeros_like(negatives)
        of_positives[by_score] = own
        of_negatives[order] = passed.repeat_interleave(size)
        parts = (is_positive, of_positives), (is_negative, of_negatives)
        ctx.save_for_backward(_gradient(logits, *parts))
        return loss


class FilteredSortAndBucket(GradientFromForward):
    """The same, better than it was published: filtered before the sort, and without a loop."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, marks: Tensor, loc_errors: Tensor, delta: float
    ) -> Tensor:
        is_positive, scores, relevant, negatives = _filter(logits, marks, delta)
        order, bucket, size, mean = _buckets(negatives, scores)

        loss, own, passed = _relate(scores, loc_errors, mean, size, delta)
        of_negatives = torch.empty_like(negatives)
        of_negatives[order] = passed[bucket]
        ctx.save_for_backward(_gradient(logits, (is_positive, own), (relevant, of_negatives)))
        return loss


def _sort(negatives: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort all in descending order; return them, where each came from, and which are negatives.

    A negative that ties with a positive counts as above it: it comes first and the sort is stable.
    """
    examples, order = torch.cat([negatives, scores]).sort(descending=True, stable=True)
    return examples, order, order < negatives.numel()


def _buckets(negatives: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put the negatives in descending order, and cut them at every positive.

    Returns:
        order (R,): which negative stands where; bucket (R,): where it stands, the number of
        positives above it; size and mean (P + 1,) of the buckets.
    """
    examples, order, of_negative = _sort(negatives, scores)
    bucket = of_negative.logical_not().cumsum(0)[of_negative]
    size = bucket.bincount(minlength=scores.numel() + 1)
    stop = size.cumsum(0)
    start = stop - size
    # A zero behind the end keeps the look-ups of empty buckets in bounds; their size is their
    # weight.
    ranked = pad(examples[of_negative], (0, 1))
    running = pad(ranked.cumsum(0, dtype=torch.float64), (1, 0))
    mean = ((running[stop] - running[start]) / size.clamp(min=1)).to(scores.dtype)
    # Rounding must not move a mean past the positives that its members stand between.
    mean = torch.minimum(torch.maximum(mean, ranked[stop - 1]), ranked[start])
    return order[of_negative], bucket, size, mean


def _relate(
    scores: Tensor, loc_errors: Tensor, mean: Tensor, size: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cls and the gradient by the positives (P,) and by a member of each bucket (P + 1,)."""
    above = _step(scores[None, :] - scores[:, None], delta).fill_diagonal_(0)
    false = _step(mean[None, :] - scores[:, None], delta)
    nfp = false @ size.to(scores.dtype)
    rank = 1 + above.sum(1) + nfp
    reached = nfp > 0
    own = torch.where(reached, (nfp + above @ loc_errors) / rank, 0.0) / scores.numel()
    return (nfp / rank).mean(), -own, torch.where(reached, own / nfp, 0.0) @ false
