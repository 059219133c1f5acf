"""Algorithm 1: the error-driven update of a ranking loss, as one autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import Counts, Errors


@dataclass(frozen=True)
class Ranking:
    """One call's input on the road: the levels, and where the positives stand in them."""

    logits: Sequence[Tensor]  # levels (B, C, M)
    targets: Sequence[Tensor]  # (B, M) class indices, or (B, C, M) with 1 / 0 / -1
    index: Tensor  # (P,) int64 positions in the flattened logits of all levels, -1 for padding
    scores: Tensor  # (P,) finite scores of the positives, -inf for padding
    delta: float
    ignore_index: int
    impl: str
    algorithm: str

    @property
    def valid(self) -> Tensor:
        """(P,) bool: not padding."""
        return self.index >= 0


def rank_positives(ranking: Ranking, values: Tensor | None = None) -> Counts:
    """The count: NFP(i), rank+(i) and S(i) of every positive. Not differentiable."""
    valid = ranking.valid
    if values is None:
        values = torch.zeros_like(valid, dtype=torch.float64)
    values = torch.where(valid, values.detach().double(), 0.0)
    nfp, rank_positive, value_sum = ops.count(
        [level.detach() for level in ranking.logits],
        ranking.targets,
        ranking.scores,
        values,
        ranking.delta,
        ranking.ignore_index,
        ranking.impl,
        ranking.algorithm,
    )
    return Counts(nfp, rank_positive, values, value_sum, valid.sum(dtype=torch.float64))


def mean_error(errors: Errors, ranking: Ranking) -> Tensor:
    """L = (1/Z) sum_i l(i) (Theorem 1), in the dtype of the scores; 0 without a positive."""
    total = torch.where(ranking.valid, errors.error, 0.0).sum() / errors.normaliser
    return torch.where(ranking.valid.any(), total, 0.0).to(ranking.scores.dtype)


def attach(value: Tensor, counts: Counts, errors: Errors, ranking: Ranking) -> Tensor:
    """`value`, with the error-driven gradient of the loss `errors` by every logit (Algorithm 1).

    Positive i gets -D(i) / Z and lays D(i) H(x_ij) / (Z NFP(i)) on each negative j, where
    D(i) = l(i) - l*(i); both sides sum to the same (Theorem 2).
    """
    if not (torch.is_grad_enabled() and any(level.requires_grad for level in ranking.logits)):
        return value
    reached = ranking.valid & (counts.nfp != 0)  # NaN counts as reached, and stays visible
    update = torch.where(reached, (errors.error - errors.target) / errors.normaliser, 0.0)
    weights = torch.where(reached, update / counts.nfp, 0.0)
    return ErrorDrivenUpdate.apply(
        value,
        ranking.index,
        ranking.scores,
        weights,
        -update,
        ranking.delta,
        ranking.ignore_index,
        ranking.impl,
        ranking.algorithm,
        *ranking.logits,
        *ranking.targets,
    )


class ErrorDrivenUpdate(torch.autograd.Function):
    """Passes a value on; its backward makes the gradient by every logit, scaled by the upstream
    one.

    Between the two it keeps the logits and P numbers. The gradient is an update rule and not the
    derivative of the value, so there is no second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        index: Tensor,
        scores: Tensor,
        weights: Tensor,
        own: Tensor,
        delta: float,
        ignore_index: int,
        impl: str,
        algorithm: str,
        *levels: Tensor,
    ) -> Tensor:
        """Keeps what backward needs; returns a copy of `value`."""
        ctx.save_for_backward(index, scores, weights, own, *levels)
        ctx.settings = (delta, ignore_index, impl, algorithm)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient by every level of logits."""
        index, scores, weights, own, *levels = ctx.saved_tensors
        half = len(levels) // 2
        logits, targets = levels[:half], levels[half:]
        with torch.no_grad():
            gradients = ops.gradient(
                logits, targets, index, scores, weights * upstream, own * upstream, *ctx.settings
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = NoSecondDerivative.apply(upstream, *logits, *gradients)
        return (None,) * 9 + tuple(gradients) + (None,) * half


class NoSecondDerivative(torch.autograd.Function):
    """Passes the gradients on, and raises where somebody differentiates them.

    `once_differentiable` would do so only for an upstream gradient that requires one itself, and
    otherwise let them pass as constants.
    """

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, *logits_and_gradients: Tensor) -> tuple[Tensor, ...]:
        """Copies of the gradients, attached to the logits."""
        half = len(logits_and_gradients) // 2
        return tuple(gradient.clone() for gradient in logits_and_gradients[half:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        """Always raises."""
        raise RuntimeError(
            "a ranking loss has no second derivative: its gradient by the logits is an update rule"
        )
