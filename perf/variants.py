"""What is timed side by side: this package, and what people use instead of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrp_triton import alrp_loss


class PublishedLoop(torch.autograd.Function):
    """aLRP as the authors' description has it: one positive after the other, in Python.

    Every iteration evaluates H against all positives and all relevant negatives, and adds one
    positive's share to the negatives' gradient, which is ready when forward returns. Returns cls.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, loc_errors: Tensor, delta: float
    ) -> Tensor:
        is_positive = targets == 1
        scores = logits[is_positive]
        relevant = (targets == 0) & (logits >= scores.min() - delta)
        negatives = logits[relevant]
        own, passed = torch.zeros_like(scores), torch.zeros_like(negatives)
        precision_error = torch.zeros_like(scores)
        for i in range(scores.numel()):
            above = ((scores - scores[i]) / (2 * delta) + 0.5).clamp(0, 1)
            above[i] = 0
            false = ((negatives - scores[i]) / (2 * delta) + 0.5).clamp(0, 1)
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

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


class Variant(NamedTuple):
    """A loss of (logits (N, C), targets in its own form, loc_errors (P,)), a scalar."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    prepare: Callable[[Tensor, Tensor], Tensor]  # (logits, class indices) to its form, not timed
    ranks: bool  # whether it is aLRP, and so has to agree with the reference


def class_indices(logits: Tensor, targets: Tensor) -> Tensor:
    return targets


def marks(logits: Tensor, targets: Tensor) -> Tensor:
    """1 / 0 / -1 for each logit (N, C), as the published code wants it."""
    out = torch.zeros_like(logits)
    anchors = (targets >= 0).nonzero()[:, 0]
    out[anchors, targets[anchors]] = 1
    out[targets == -100] = -1
    return out


def package(logits: Tensor, targets: Tensor, loc_errors: Tensor) -> Tensor:
    return alrp_loss(logits, targets, loc_errors)[0]


def published_loop(logits: Tensor, targets: Tensor, loc_errors: Tensor) -> Tensor:
    return PublishedLoop.apply(logits, targets, loc_errors, 1.0)


def focal(logits: Tensor, targets: Tensor, loc_errors: Tensor) -> Tensor:
    """torchvision's sigmoid focal loss on the same logits, eager; it ranks nothing."""
    from torchvision.ops import sigmoid_focal_loss

    valid = targets[:, 0] >= 0
    loss = sigmoid_focal_loss(logits[valid], targets[valid], reduction="sum")
    return loss / loc_errors.numel()


VARIANTS = {
    "alrp_triton": Variant(package, class_indices, ranks=True),
    "published loop": Variant(published_loop, marks, ranks=True),
    "focal, torchvision eager": Variant(focal, marks, ranks=False),
}
