"""Algorithm 1: the error-driven update of a ranking loss, as one autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .loss_terms import Counts, Errors, SortingCounts
from .reference.layout import Batch


@dataclass(frozen=True)
class Ranking:
    """One call's input on the road: the levels, and where the positives stand in them."""

    batch: Batch  # its logits attached; the index of padding is -1, its score -inf
    valid: Tensor  # (P,) bool: not padding
    padded: bool  # whether some may be
    impl: str
    algorithm: str
    skew: float = 0.0  # power of the margin in p(j|i); 0 is the uniform distribution

    @property
    def scores(self) -> Tensor:
        """(P,) finite scores of the positives, -inf for padding."""
        return self.batch.scores

    def detached(self) -> Batch:
        """Return the batch as operators take it, cut off from autograd."""
        given = self.batch
        return Batch(
            [level.detach() for level in given.logits],
            given.targets,
            given.index,
            given.scores,
            given.delta,
            given.ignore_index,
            given.groups,
            given.positive_groups,
        )

    def positives(self, scores: Tensor) -> Batch:
        """Return the positives alone, with these scores: a list without negatives."""
        given = self.batch
        settings = given.delta, given.ignore_index
        return Batch([], [], given.index, scores, *settings, [], given.positive_groups)


def rank_positives(ranking: Ranking, values: Tensor | None = None) -> Counts:
    """Count NFP(i), rank+(i) and S(i) of every positive. Not differentiable."""
    valid = ranking.valid
    if values is None:
        values = torch.zeros_like(valid, dtype=torch.float64)
    values = blank_padding(values.detach().to(torch.float64, copy=True), ranking)
    nfp, rank_positive, value_sum = ops.count(
        *ranking.detached(), values, ranking.impl, ranking.algorithm
    )
    return Counts(nfp, rank_positive, values, value_sum, valid.sum(dtype=torch.float64))


def sort_positives(ranking: Ranking, quality: Tensor, counts: Counts) -> SortingCounts:
    """Count among the positives, better and worse ones apart. Not differentiable."""
    given = ranking.positives(ranking.scores)
    return SortingCounts(*ops.sorting_count(*given, quality, counts.values, ranking.impl))


def sum_from_below(ranking: Ranking, values: Tensor) -> Tensor:
    """Return what each positive k passes down: sum_{i != k} values(i) H(x_ik). Not differentiable.

    A count collects from above. With all scores negated the list is turned over, and what stood
    below a positive stands above it, as far as it did: so it is S(k) in that list.
    """
    turned = blank_padding(-ranking.scores, ranking, fill=-torch.inf)
    given = ranking.positives(turned)
    _, _, value_sum = ops.count(*given, values, ranking.impl, ranking.algorithm)
    return value_sum


def blank_padding(x: Tensor, ranking: Ranking, fill: float = 0.0) -> Tensor:
    """Write `fill` into x (P,) at the padding, in place, and return it."""
    return x.masked_fill_(~ranking.valid, fill) if ranking.padded else x


def mean_error(errors: Errors, ranking: Ranking) -> Tensor:
    """Return L = (1/Z) sum_i l(i) (Theorem 1) in the scores' dtype; 0 without a positive."""
    each = blank_padding(errors.error / errors.normaliser, ranking)
    return each.sum().to(ranking.scores.dtype)


def attach(value: Tensor, counts: Counts, errors: Errors, ranking: Ranking) -> Tensor:
    """Attach the error-driven gradient of `errors` by every logit (Algorithm 1) to `value`."""
    if not _is_wanted(ranking):
        return value
    (attached,) = _apply([value], _ranking_update(counts, errors, ranking), [], ranking)
    return attached


def attach_sorting(
    values: tuple[Tensor, Tensor],
    counts: Counts,
    sorting: SortingCounts,
    quality: Tensor,
    errors: tuple[Errors, Errors],
    ranking: Ranking,
) -> tuple[Tensor, Tensor]:
    """Attach to ranking and sorting value of Rank & Sort their gradients by every logit.

    One pass over the logits serves both, whatever each is multiplied by.
    """
    if not _is_wanted(ranking):
        return values
    update = _ranking_update(counts, errors[0], ranking)
    sorted_grad = _sorting_update(sorting, quality, errors[1], ranking)
    first, second = _apply(values, update, [sorted_grad], ranking)
    return first, second


def _is_wanted(ranking: Ranking) -> bool:
    """Return whether anybody differentiates by the logits; in forward mode too, to be refused."""
    if torch.is_grad_enabled() and any(level.requires_grad for level in ranking.batch.logits):
        return True
    if not torch.compiler.is_compiling():
        return _is_transformed() or _has_tangent(ranking.batch.logits)
    if _is_transformed() and _has_tangent(ranking.batch.logits):  # the compiler knows no jvp
        _raise_forward_mode()
    return False


def _has_tangent(levels: Sequence[Tensor]) -> bool:
    return any(forward_ad.unpack_dual(level).tangent is not None for level in levels)


class _Update(NamedTuple):
    """What Algorithm 1 does with each positive; (P,) float64."""

    weights: Tensor  # i lays weights(i) H(x_ij) m_ij^powers(i) on the negative j
    powers: Tensor | None  # of the margin m; None: all 0, the uniform distribution
    positive_grad: Tensor  # and gets this itself


def _ranking_update(counts: Counts, errors: Errors, ranking: Ranking) -> _Update:
    """Give positive i -D(i) / Z, and lay D(i) p(j|i) / Z on each negative j.

    D(i) = l(i) - l*(i), and p(j|i) = H(x_ij) / NFP(i), or skewed. Both sides sum to the same
    (Theorem 2).
    """
    update, nothing = _share(counts.nfp, errors)
    mass, powers = counts.nfp, None
    if ranking.skew:
        powers = torch.full_like(mass, ranking.skew)
        mass = ops.skewed_mass(*ranking.detached(), powers, ranking.impl)
        # Where no negative has a margin to speak of (ties under the hard step, float64 logits that
        # are next to ties), all have the same: uniform.
        tied = mass < _MIN_ABOVE
        powers = torch.where(tied, 0.0, powers)
        mass = torch.where(tied, counts.nfp, mass)
    return _Update((update / mass).masked_fill_(nothing, 0.0), powers, -update)


def _sorting_update(
    sorting: SortingCounts, quality: Tensor, errors: Errors, ranking: Ranking
) -> Tensor:
    """Return the gradient by the positives (P,): the error of i lies on the worse ones above it."""
    update, nothing = _share(sorting.worse, errors)
    weights = (update / sorting.worse).masked_fill_(nothing, 0.0)
    given = ranking.positives(ranking.scores)
    passed = ops.sorting_gradient(*given, quality, weights, ranking.impl)
    return passed - update


# Quotients by as much as this are finite, times what may come from above too.
_MIN_ABOVE = 2.0**-900


def _share(above: Tensor, errors: Errors) -> tuple[Tensor, Tensor]:
    """Return D(i) / Z, 0 where nothing stands above i to take it; and where nothing does.

    Above padding nothing stands. NaN is something, and stays visible. So little that D(i) could not
    be divided by it (a float64 logit a hair inside the window) is nothing, for both sides alike.
    """
    nothing = above < _MIN_ABOVE
    update = (errors.error - errors.target) / errors.normaliser
    return update.masked_fill_(nothing, 0.0), nothing


def _apply(
    values: Sequence[Tensor], update: _Update, more_grads: Sequence[Tensor], ranking: Ranking
) -> tuple[Tensor, ...]:
    """Attach scalars: the first with the update, the others with gradients by the positives."""
    batch = ranking.batch
    return _function().apply(
        (batch.delta, batch.ignore_index, ranking.impl, ranking.algorithm),
        len(batch.logits),
        len(values),
        batch.index,
        batch.scores,
        update.weights,
        update.powers,
        batch.positive_groups,
        update.positive_grad,
        *more_grads,
        *values,
        *batch.logits,
        *batch.targets,
        *batch.groups,
    )


def _function() -> type[ErrorDrivenUpdate]:
    """Return the form of the autograd function that torch takes here; all do the same."""
    if torch.compiler.is_compiling():
        return ErrorDrivenUpdate
    return TransformedUpdate if _is_transformed() else EagerUpdate


def _is_transformed() -> bool:
    """Return whether this runs under a transform of `torch.func`; torch asks it alike."""
    return torch._C._are_functorch_transforms_active()


class ErrorDrivenUpdate(torch.autograd.Function):
    """Passes values on; its backward makes the gradient by every logit, scaled by the upstream one.

    Between the two it keeps what it was called with, and P numbers. The gradient is an update rule
    and not the derivative of the values, so there is no second derivative, and none in forward
    mode. This is the form for torch.compile, which takes no `jvp`.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        """Keep what backward needs; return copies of the values, no views of anything."""
        _keep(ctx, given)
        return _copies(given)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient by every level of logits."""
        index, scores, weights, powers, positive_groups, *rest = ctx.saved_tensors
        levels = rest[len(upstream) :]
        logits, targets, groups = (
            levels[start : start + ctx.number] for start in range(0, 3 * ctx.number, ctx.number)
        )
        delta, ignore_index, impl, algorithm = ctx.settings
        weights = weights * upstream[0]
        positive_grad = rest[0] * upstream[0]
        for grad, scale in zip(rest[1 : len(upstream)], upstream[1:], strict=True):
            positive_grad = positive_grad + grad * scale
        batch = logits, targets, index, scores, delta, ignore_index, groups, positive_groups
        with torch.no_grad():
            if powers is None:
                gradients = ops.gradient(*batch, weights, positive_grad, impl, algorithm)
            else:
                gradients = ops.skewed_gradient(*batch, weights, positive_grad, powers, impl)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = NoSecondDerivative.apply(upstream[0], *logits, *gradients)
        before = _SETTINGS + 2 * len(upstream)
        return (None,) * before + tuple(gradients) + (None,) * (len(levels) - ctx.number)


# What `_apply` passes on before the gradients by the positives, the values and the levels.
_SETTINGS = 8


def _keep(ctx: Any, given: Sequence[Any]) -> None:
    ctx.settings, ctx.number, values, *tensors = given
    fixed = _SETTINGS - 3
    positive_grads, levels = tensors[fixed : fixed + values], tensors[fixed + 2 * values :]
    ctx.save_for_backward(*tensors[:fixed], *positive_grads, *levels)


def _copies(given: Sequence[Any]) -> tuple[Tensor, ...]:
    values = given[2]
    return tuple(value.clone() for value in given[_SETTINGS + values : _SETTINGS + 2 * values])


class EagerUpdate(ErrorDrivenUpdate):
    """The form for calls that nothing transforms: a tenth of the next one's price."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        """Raise in any case: there is no forward mode."""
        _raise_forward_mode()


class TransformedUpdate(EagerUpdate):
    """The form for transforms of `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, ...]:
        """Return copies of the values."""
        return _copies(given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what backward needs."""
        _keep(ctx, inputs)


def _raise_forward_mode() -> NoReturn:
    raise RuntimeError(
        "a ranking loss has no forward-mode derivative by its logits: its gradient by them is an "
        "update rule, which backward makes"
    )


class NoSecondDerivative(torch.autograd.Function):
    """Passes the gradients on, and raises where somebody differentiates them.

    `once_differentiable` would do so only for an upstream gradient that requires one itself, and
    otherwise let them pass as constants.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(upstream: Tensor, *logits_and_gradients: Tensor) -> tuple[Tensor, ...]:
        """Return copies of the gradients, attached to the logits."""
        half = len(logits_and_gradients) // 2
        return tuple(gradient.clone() for gradient in logits_and_gradients[half:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        """Raise in any case: there is no second derivative."""
        _raise_second_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        """Raise in any case: there is no second derivative."""
        _raise_second_derivative()


def _raise_second_derivative() -> NoReturn:
    raise RuntimeError(
        "a ranking loss has no second derivative: its gradient by the logits is an update rule"
    )
