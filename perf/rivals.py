"""What was published before this package, written from its description: aLRP in two other ways.

Both return cls with the gradient of the whole aLRP by the logits, which is ready when forward
returns, and take the logits in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _step(x: Tensor, delta: float) -> Tensor:
    """H(x): the clipped line of half-width delta, or [x >= 0]."""
    return (x / (2 * delta) + 0.5).clamp(0, 1) if delta > 0 else (x >= 0).to(x.dtype)


class _GradientFromForward(torch.autograd.Function):
    """Backward of a loss of (logits, marks, loc_errors, delta) that kept its gradient."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


class PublishedLoop(_GradientFromForward):
    """aLRP as its authors published it: one positive after the other, in Python.

    Every iteration evaluates H against all positives and all relevant negatives, and adds one
    positive's share to the negatives' gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, marks: Tensor, loc_errors: Tensor, delta: float
    ) -> Tensor:
        is_positive = marks == 1
        scores = logits[is_positive]
        relevant = (marks == 0) & (logits >= scores.min() - delta)
        negatives = logits[relevant]
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
        gradient = torch.zeros_like(logits)
        gradient[is_positive] = own / scores.numel()
        gradient[relevant] = passed / scores.numel()
        ctx.save_for_backward(gradient)
        return precision_error.mean()


class SortAndBucket(_GradientFromForward):
    """aLRP by sorting and bucketing (Yavuz et al., Bucketed Ranking-based Losses, ECCV 2024).

    The relevant logits are sorted. A run of negatives between neighbouring positives is a bucket:
    it stands at its mean, counts as many times as it has members, and shares its gradient equally
    among them. That leaves P x (P + 1) relations. Exact for delta = 0 only: inside a window of
    width 2 delta the members of a bucket differ in H where the line bends.

    The published code walks over the buckets in Python; this is vectorised, which favours it.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, marks: Tensor, loc_errors: Tensor, delta: float
    ) -> Tensor:
        is_positive = marks == 1
        scores = logits[is_positive]
        relevant = (marks == 0) & (logits >= scores.min() - delta)
        negatives = logits[relevant]
        order, bucket, size, mean = _buckets(negatives, scores)

        above = _step(scores[None, :] - scores[:, None], delta).fill_diagonal_(0)
        false = _step(mean[None, :] - scores[:, None], delta)
        nfp = false @ size
        rank = 1 + above.sum(1) + nfp
        reached = nfp > 0
        own = torch.where(reached, (nfp + above @ loc_errors) / rank, 0.0) / scores.numel()
        passed = torch.where(reached, own / nfp, 0.0) @ false

        of_negatives = torch.empty_like(negatives)
        of_negatives[order] = passed[bucket]
        gradient = torch.zeros_like(logits)
        gradient[is_positive] = -own
        gradient[relevant] = of_negatives
        ctx.save_for_backward(gradient)
        return (nfp / rank).mean()


def _buckets(negatives: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The negatives in descending order, cut at every positive.

    Returns:
        order (R,): which negative stands where; bucket (R,): where it stands, the number of
        positives above it; size and mean (P + 1,) of the buckets.
    """
    # A negative that ties with a positive counts as above it: it comes first and the sort is
    # stable.
    mixed = torch.cat([negatives, scores]).argsort(descending=True, stable=True)
    of_negative = mixed < negatives.numel()
    order = mixed[of_negative]
    bucket = of_negative.logical_not().cumsum(0)[of_negative]
    size = bucket.bincount(minlength=scores.numel() + 1)
    stop = size.cumsum(0)
    start = stop - size
    # A zero behind the end keeps the look-ups of empty buckets in bounds; their size is their
    # weight.
    ranked = torch.nn.functional.pad(negatives[order], (0, 1))
    running = torch.nn.functional.pad(ranked.cumsum(0, dtype=torch.float64), (1, 0))
    mean = ((running[stop] - running[start]) / size.clamp(min=1)).to(scores.dtype)
    # Rounding must not move a mean past the positives that its members stand between.
    mean = torch.minimum(torch.maximum(mean, ranked[stop - 1]), ranked[start])
    return order, bucket, size.to(scores.dtype), mean
