"""Algorithm 1: the error-driven update of a ranking loss, as one autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .errors import Counts, Errors, SortingCounts


@dataclass(frozen=True)
class Ranking:
    """One call's input on the road: the levels, and where the positives stand in them."""

    logits: Sequence[Tensor]  # levels (B, C, M)
    targets: Sequence[Tensor]  # (B, M) class indices, or (B, C, M) with 1 / 0 / -1
    groups: Sequence[Tensor]  # integers in the shape of the targets; empty without groups
    index: Tensor  # (P,) int64 positions in the flattened logits of all levels, -1 for padding
    valid: Tensor  # (P,) bool: not padding
    padded: bool  # whether some may be
    scores: Tensor  # (P,) finite scores of the positives, -inf for padding
    own_groups: Tensor | None  # (P,) int64; None without groups
    delta: float
    ignore_index: int
    impl: str
    algorithm: str
    skew: float = 0.0  # power of the margin in p(j|i); 0 is the uniform distribution


def rank_positives(ranking: Ranking, values: Tensor | None = None) -> Counts:
    """The count: NFP(i), rank+(i) and S(i) of every positive. Not differentiable."""
    valid = ranking.valid
    if values is None:
        values = torch.zeros_like(valid, dtype=torch.float64)
    values = blank_padding(values.detach().to(torch.float64, copy=True), ranking)
    nfp, rank_positive, value_sum = ops.count(
        [level.detach() for level in ranking.logits],
        ranking.targets,
        ranking.scores,
        values,
        ranking.delta,
        ranking.ignore_index,
        ranking.impl,
        ranking.algorithm,
        ranking.groups,
        ranking.own_groups,
    )
    return Counts(nfp, rank_positive, values, value_sum, valid.sum(dtype=torch.float64))


def sort_positives(ranking: Ranking, quality: Tensor, counts: Counts) -> SortingCounts:
    """The count among the positives, of better and of worse ones. Not differentiable."""
    return SortingCounts(
        *ops.sorting_count(
            ranking.scores, quality, counts.values, ranking.delta, ranking.impl, ranking.own_groups
        )
    )


def blank_padding(x: Tensor, ranking: Ranking, fill: float = 0.0) -> Tensor:
    """x (P,) with `fill` at the padding, in place."""
    return x.masked_fill_(~ranking.valid, fill) if ranking.padded else x


def mean_error(errors: Errors, ranking: Ranking) -> Tensor:
    """L = (1/Z) sum_i l(i) (Theorem 1), in the dtype of the scores; 0 without a positive."""
    each = blank_padding(errors.error / errors.normaliser, ranking)
    return each.sum().to(ranking.scores.dtype)


def attach(value: Tensor, counts: Counts, errors: Errors, ranking: Ranking) -> Tensor:
    """`value`, with the error-driven gradient of the loss `errors` by every logit (Algorithm 1)."""
    if not _is_wanted(ranking):
        return value
    return _apply([value], _ranking_update(counts, errors, ranking), [], ranking)[0]


def attach_sorting(
    values: tuple[Tensor, Tensor],
    counts: Counts,
    sorting: SortingCounts,
    quality: Tensor,
    errors: tuple[Errors, Errors],
    ranking: Ranking,
) -> tuple[Tensor, Tensor]:
    """The ranking and the sorting value of Rank & Sort, each with its gradient by every logit.

    One pass over the logits serves both, whatever each is multiplied by.
    """
    if not _is_wanted(ranking):
        return values
    update = _ranking_update(counts, errors[0], ranking)
    own = _sorting_update(sorting, quality, errors[1], ranking)
    first, second = _apply(values, update, [own], ranking)
    return first, second


def _is_wanted(ranking: Ranking) -> bool:
    return torch.is_grad_enabled() and any(level.requires_grad for level in ranking.logits)


class _Update(NamedTuple):
    """What Algorithm 1 does with each positive; (P,) float64."""

    weights: Tensor  # i lays weights(i) H(x_ij) m_ij^powers(i) on the negative j
    powers: Tensor | None  # of the margin m; None: all 0, the uniform distribution
    own: Tensor  # and gets this itself


def _ranking_update(counts: Counts, errors: Errors, ranking: Ranking) -> _Update:
    """Positive i gets -D(i) / Z and lays D(i) p(j|i) / Z on each negative j.

    D(i) = l(i) - l*(i), and p(j|i) = H(x_ij) / NFP(i), or skewed. Both sides sum to the same
    (Theorem 2).
    """
    update, nothing = _share(counts.nfp, errors)
    mass, powers = counts.nfp, None
    if ranking.skew:
        powers = torch.full_like(mass, ranking.skew)
        mass = ops.skewed_mass(
            [level.detach() for level in ranking.logits],
            ranking.targets,
            ranking.scores,
            powers,
            ranking.delta,
            ranking.ignore_index,
            ranking.impl,
            ranking.groups,
            ranking.own_groups,
        )
        # Where no negative has a margin (ties under the hard step) all have the same: uniform.
        powers = torch.where(mass == 0, 0.0, powers)
        mass = torch.where(mass == 0, counts.nfp, mass)
    return _Update((update / mass).masked_fill_(nothing, 0.0), powers, -update)


def _sorting_update(
    sorting: SortingCounts, quality: Tensor, errors: Errors, ranking: Ranking
) -> Tensor:
    """(P,) the gradient by the positives: the error of i is spread over the worse ones above it."""
    update, nothing = _share(sorting.worse, errors)
    passed = ops.sorting_gradient(
        ranking.scores,
        quality,
        (update / sorting.worse).masked_fill_(nothing, 0.0),
        ranking.delta,
        ranking.impl,
        ranking.own_groups,
    )
    return passed - update


def _share(above: Tensor, errors: Errors) -> tuple[Tensor, Tensor]:
    """D(i) / Z, 0 where nothing stands above i to take it; and where nothing does.

    Above padding nothing stands. NaN is something, and stays visible.
    """
    nothing = above == 0
    update = (errors.error - errors.target) / errors.normaliser
    return update.masked_fill_(nothing, 0.0), nothing


def _apply(
    values: Sequence[Tensor], update: _Update, more_own: Sequence[Tensor], ranking: Ranking
) -> list[Tensor]:
    """The scalars attached: the first with the update, the others with gradients by positives."""
    attached = ErrorDrivenUpdate.apply(
        _rows(values),
        ranking.index,
        ranking.scores,
        update.weights,
        _rows([update.own, *more_own]),
        update.powers,
        ranking.own_groups,
        (ranking.delta, ranking.ignore_index, ranking.impl, ranking.algorithm),
        len(ranking.logits),
        *ranking.logits,
        *ranking.targets,
        *ranking.groups,
    )
    # One by one: what `unbind` gives may not be changed in place, as in `loss *= weight`.
    return [attached[place] for place in range(len(values))]


def _rows(given: Sequence[Tensor]) -> Tensor:
    """Stacked, but for a single one, which is not copied."""
    return given[0][None] if len(given) == 1 else torch.stack(list(given))


class ErrorDrivenUpdate(torch.autograd.Function):
    """Passes values on; its backward makes the gradient by every logit, scaled by the upstream one.

    Between the two it keeps what it was called with, and P numbers. The gradient is an update rule
    and not the derivative of the values, so there is no second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        index: Tensor,
        scores: Tensor,
        weights: Tensor,
        own: Tensor,
        powers: Tensor | None,
        own_groups: Tensor | None,
        settings: tuple[float, int, str, str],
        number: int,
        *levels: Tensor,
    ) -> Tensor:
        """Keeps what backward needs; returns a copy of `values` (V,), to which `own` is (V, P)."""
        ctx.save_for_backward(index, scores, weights, own, powers, own_groups, *levels)
        ctx.settings, ctx.number = settings, number
        return values.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient by every level of logits."""
        index, scores, weights, own, powers, own_groups, *levels = ctx.saved_tensors
        logits, targets, groups = (
            levels[start : start + ctx.number] for start in range(0, 3 * ctx.number, ctx.number)
        )
        delta, ignore_index, impl, algorithm = ctx.settings
        weights = weights * upstream[0]
        own = (own * upstream[:, None]).sum(0)
        with torch.no_grad():
            if powers is None:
                gradients = ops.gradient(
                    logits, targets, index, scores, weights, own,
                    delta, ignore_index, impl, algorithm, groups, own_groups,
                )  # fmt: skip
            else:
                gradients = ops.skewed_gradient(
                    logits, targets, index, scores, weights, own, powers,
                    delta, ignore_index, impl, groups, own_groups,
                )  # fmt: skip
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = NoSecondDerivative.apply(upstream, *logits, *gradients)
        return (None,) * 9 + tuple(gradients) + (None,) * (len(levels) - ctx.number)


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
