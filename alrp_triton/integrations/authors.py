"""aLRP, AP and Rank & Sort Loss with the calls and the numbers of the authors' published code.

The detection heads of their repositories train on these classes unchanged, after one line in the
file that holds their loss (the README beside this file says which). They take the package's road:
no loop over the positives, no `.cuda()`, and with kernels the host waits for nothing but the number
of the positives, which `aLRPLoss` knows already. `alrp_triton.set_backend` chooses what runs.

In all of them, as published, targets have the shape of the logits, and hold 1 / 0 / -1 (positive,
negative, ignored), for Rank & Sort the IoU in place of the 1; and no gradient reaches the targets
or the regression losses. How the numbers differ from those of `alrp_triton.alrp_loss`, `ap_loss`
and `rank_sort_loss`, each class says. Where the published classes fail, these go on:

- Without a positive all is 0, attached, with zero gradients.
- 16-bit logits are computed as if upcast, and get a gradient of their own dtype.
- delta = 0 is the hard step, where the published aLRP and AP divide by it.

    >>> logits = torch.tensor([0.9, 0.4, 0.6, -0.2], requires_grad=True)
    >>> targets = torch.tensor([0.0, 1.0, 1.0, -1.0])
    >>> cls_loss, rank, order = aLRPLoss.apply(logits, targets, torch.tensor([0.3, 0.1]))
    >>> cls_loss.backward()
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from alrp_triton.error_driven import (
    Ranking,
    attach,
    attach_sorting,
    mean_error,
    rank_positives,
    sort_positives,
)
from alrp_triton.inputs import check_delta, check_number, check_per_positive, prepare_ranking
from alrp_triton.loss_terms import (
    Counts,
    Errors,
    SortingCounts,
    alrp_errors,
    ap_errors,
    sorting_errors,
)

__all__ = ["APLoss", "AP_loss", "RankSort", "aLRPLoss"]


class aLRPLoss:
    """aLRP Loss as in the repositories aLRPLoss and RankSortLoss.

    `cls_loss` and its gradient are those of `alrp_triton.alrp_loss`. The localisation value is left
    to the head, which makes it of `rank` and `order`: the regression losses, from the highest score
    on, are summed up cumulatively, and divided by the rank. That orders the numerator by the hard
    step and the rank by the smooth one, where Eq. 11 (`alrp_loss`) has the smooth step in both:
    the values differ wherever positives stand within delta of each other.

    Example:
        >>> logits = torch.tensor([0.9, 0.4, 0.6, -0.2], requires_grad=True)
        >>> targets = torch.tensor([0.0, 1.0, 1.0, -1.0])
        >>> errors = torch.tensor([0.3, 0.1], requires_grad=True)
        >>> cls_loss, rank, order = aLRPLoss.apply(logits, targets, errors)
        >>> down = order.flip(0)                     # what a head does with rank and order
        >>> loc_loss = (errors[down].cumsum(0) / rank[down]).mean()
        >>> (cls_loss + 50 * loc_loss).backward()
        >>> order.tolist(), [round(x, 2) for x in rank.tolist()]
        ([0, 1], [2.35, 2.05])
    """

    @staticmethod
    def apply(
        logits: Tensor,
        targets: Tensor,
        regression_losses: Tensor,
        delta: float = 1.0,
        eps: float = 1e-5,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the classification part, and what the localisation part is made of.

        Args:
            logits: any shape; float32, bfloat16, float16 or float64.
            targets: the shape of logits, any dtype; 1 positive, 0 negative, anything else ignored.
            regression_losses: (P,) floating, Eloc of each positive in the order of the targets.
            delta: half-width of the step, in logits.
            eps: a positive whose NFP is no larger gets no update, and its negatives none by it.

        Returns:
            cls_loss: scalar, the mean of NFP / rank; the gradient of the whole aLRP rides on it.
            rank: (P,) rank(i), in the order of the targets; not differentiable.
            order: (P,) int64, the positives by ascending score; `torch.argsort`, as published, says
                which of equal ones comes first.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        eps = _check_eps(eps)
        _check_marks(logits, targets)
        check_per_positive("regression_losses", regression_losses)
        ranking = _find(logits, targets, delta, regression_losses)
        counts = rank_positives(ranking, regression_losses)
        errors = _where_above(alrp_errors(counts), counts.nfp, eps)
        cls_loss = mean_error(ap_errors(counts), ranking)
        rank = counts.rank.to(ranking.scores.dtype)
        return attach(cls_loss, counts, errors, ranking), rank, ranking.scores.argsort()


class APLoss:
    """AP Loss as in the repositories aLRPLoss and RankSortLoss: with interpolated precision.

    The precision at a positive is replaced by the highest one at any positive of no higher score,
    as in the AP of PASCAL VOC, in the value and in the gradient. `alrp_triton.ap_loss` is the
    paper's, without. Both are the same where precision grows with the score.

    Example:
        >>> logits = torch.tensor([0.3, 0.8, 0.5, 0.9], requires_grad=True)
        >>> targets = torch.tensor([1, 1, 1, 0])     # precision 1/2, 2/3, 3/4 down the list
        >>> loss = APLoss.apply(logits, targets, 0.0)
        >>> loss.item()                              # interpolated: 3/4 everywhere
        0.25
        >>> loss.backward()
    """

    @staticmethod
    def apply(logits: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
        """Return the loss, a scalar; arguments and errors as in `aLRPLoss.apply`."""
        _check_marks(logits, targets)
        ranking = _find(logits, targets, delta)
        counts = rank_positives(ranking)
        errors = _interpolated(ap_errors(counts), ranking)
        return attach(mean_error(errors, ranking), counts, errors, ranking)


class RankSort:
    """Rank & Sort Loss as in the repository RankSortLoss.

    Three things differ from `alrp_triton.rank_sort_loss`:

    - A positive stands above itself by H(0), 0.5 (but 1 for delta = 0), not by 1: in rank+, and in
      the means of the sorting error.
    - The sorting value is the mean of current error less target error, not of the current one.
    - The gradient of both rides on the ranking value; the sorting value has none. Their sum is what
      is trained on.

    And one thing to know: the IoU is the mark of a positive, so that a positive with IoU 0 silently
    becomes background, and one with a negative or NaN IoU is ignored. `rank_sort_loss` keeps the
    mask apart from the quality.

    Example:
        >>> logits = torch.tensor([0.9, 0.5, 0.1], requires_grad=True)
        >>> targets = torch.tensor([0.5, 1.0, 0.0])  # two positives, the worse one first
        >>> ranking, sorting = RankSort.apply(logits, targets, 0.0)
        >>> ranking.item(), sorting.item()           # sorting: (0 + (0.25 - 0)) / 2
        (0.0, 0.125)
        >>> (ranking + sorting).backward()
        >>> logits.grad.tolist()
        [0.125, -0.125, 0.0]
    """

    @staticmethod
    def apply(
        logits: Tensor, targets: Tensor, delta_RS: float = 0.50, eps: float = 1e-10
    ) -> tuple[Tensor, Tensor]:
        """Return the two parts of the loss.

        Args:
            logits: as in `aLRPLoss.apply`.
            targets: the shape of logits; the IoU of a positive, in (0, 1]; 0 negative, less
                is ignored.
            delta_RS: half-width of the step, in logits.
            eps: a positive gets no ranking update where its NFP is no larger, and no sorting update
                where the positives of lower IoU above it count no more.

        Returns:
            (ranking, sorting), scalars; the gradient by the logits rides on the first.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        eps = _check_eps(eps)
        _check_marks(logits, targets)
        check_delta(delta_RS, "delta_RS")
        targets = targets.detach()
        ranking = _find(logits, torch.where(targets > 0, 1, targets), delta_RS)
        # The logits' positions are those of the targets. Of padding (-1) nobody asks the quality.
        quality = targets.reshape(-1)[ranking.batch.index].double()
        counts = rank_positives(ranking, 1 - quality)
        sorting = sort_positives(ranking, quality, counts)

        counts, sorting = _weigh_itself(counts, sorting, 0.5 if delta_RS > 0 else 1.0)

        of_ranking, of_sorting = ap_errors(counts), sorting_errors(counts, sorting)
        missorted = of_sorting._replace(error=of_sorting.error - of_sorting.target)
        values = mean_error(of_ranking, ranking), mean_error(missorted, ranking)
        updates = (
            _where_above(of_ranking, counts.nfp, eps),
            _where_above(of_sorting, sorting.worse, eps),
        )
        attached = attach_sorting(values, counts, sorting, quality, updates, ranking)
        return _RideOnFirst.apply(*attached)


def AP_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate `APLoss` in the form of the function of this name in the repository AP-loss.

    Args:
        logits, targets: as in `aLRPLoss.apply`; delta is 1.

    Returns:
        The gradient by the logits, like logits; the loss, (1,). Neither is attached.

    Example:
        >>> gradient, loss = AP_loss(torch.tensor([2.0, 0.0]), torch.tensor([0, 1]))
        >>> gradient.tolist(), loss.tolist()
        ([0.5, -0.5], [0.5])
    """
    _check_marks(logits, targets)
    with torch.enable_grad():  # the forward of an autograd function has switched it off
        leaf = logits.detach().requires_grad_()
        loss = APLoss.apply(leaf, targets)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient, loss.detach().reshape(1)


class _RideOnFirst(torch.autograd.Function):
    """Two scalars as they are; both pass down what comes up to the first."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of both."""
        return first.clone(), second.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first one's gradient, twice."""
        return upstream, upstream


def _find(
    logits: Tensor, targets: Tensor, delta: float, regression_losses: Tensor | None = None
) -> Ranking:
    return prepare_ranking(
        logits,
        targets,
        delta,
        ignore_index=-100,
        positives=None,
        groups=None,
        impl="auto",
        algorithm="auto",
        per_positive=("regression_losses", regression_losses),
    )


def _check_marks(logits: Tensor, targets: Tensor) -> None:
    for name, given in (("logits", logits), ("targets", targets)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
        if given.layout != torch.strided or given.is_nested:
            layout = "a nested one" if given.is_nested else given.layout
            raise TypeError(f"{name}: expected a dense tensor, got {layout}")
    if targets.is_complex():
        raise TypeError(f"targets: expected real marks, got {targets.dtype}")
    if targets.shape != logits.shape:
        raise ValueError(
            f"targets: expected the shape of logits, {tuple(logits.shape)}, one mark for each, "
            f"got {tuple(targets.shape)}"
        )


def _check_eps(eps: float) -> float:
    number = check_number("eps", eps)
    if not 0 <= number < math.inf:
        raise ValueError(f"eps: expected a number from 0 on, got {number}")
    return number


def _weigh_itself(
    counts: Counts, sorting: SortingCounts, weight: float
) -> tuple[Counts, SortingCounts]:
    """Count a positive by `weight`, and no longer by 1, where it counts itself."""
    less = 1 - weight
    return (
        dataclasses.replace(
            counts, rank_positive=counts.rank_positive - less, values=weight * counts.values
        ),
        dataclasses.replace(sorting, better=sorting.better - less),
    )


def _where_above(errors: Errors, above: Tensor, eps: float) -> Errors:
    """Drop the update where what stands above a positive sums to no more than eps; keep NaN."""
    return errors._replace(error=torch.where(above <= float(eps), errors.target, errors.error))


def _interpolated(errors: Errors, ranking: Ranking) -> Errors:
    """Give each positive the lowest error among those that stand no higher."""
    order = ranking.scores.argsort(stable=True)
    error = torch.where(ranking.valid, errors.error, 1.0)[order]  # padding must not be the lowest
    return errors._replace(error=torch.empty_like(error).scatter(0, order, error.cummin(0).values))
