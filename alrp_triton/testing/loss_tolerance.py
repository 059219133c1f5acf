"""How far a loss on the kernels may be from the truth: the kernels' budgets, passed down the road.

A loss is made of NFP, rank+ and S by a few float64 operations, and its gradient by the logits of
weights w(i) = D(i) / (Z NFP(i)). What the counts may be off by is carried on to first order: by a
quotient as the sum of relative errors, by the sums over positives as the same sum of what each
positive may be off by.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss
from alrp_triton.reference import layout

from .kernel_tolerance import (
    IGNORE,
    Case,
    count_budget,
    gradient_budget,
    gradient_of,
    reach_of,
    sum_within,
)

if TYPE_CHECKING:
    from alrp_triton.kernels.tuning.block_sizes import BreakpointTiles, Tiles

LOSSES = ("alrp", "ap")

# Second order terms of errors below 1e-2, and float64 roundings on the road.
SECOND_ORDER, ROAD = 1.02, 32 * torch.finfo(torch.float64).eps


class LossResult(NamedTuple):
    """What a loss and its backward give; or how far that may be off."""

    values: Tensor  # (2,) cls and loc, or (1,) of AP; float64
    by_logits: list[Tensor]
    by_loc_errors: Tensor  # (P,), or none of AP


def evaluate(
    loss: str, case: Case, impl: str, algorithm: str, dtype: torch.dtype | None = None
) -> LossResult:
    """Run forward and backward of a loss on the case, without padding; in float64 if asked."""
    leaves = [level.detach().to(dtype or level.dtype).requires_grad_() for level in case.logits]
    settings: dict[str, Any] = {"ignore_index": IGNORE, "impl": impl, "algorithm": algorithm}
    values: tuple[Tensor, ...]
    if loss == "ap":
        value = ap_loss(leaves, case.targets, case.delta, **settings)
        value.backward()
        values, by_loc_errors = (value,), value.new_empty(0)
    else:
        dtype = layout.compute_dtype(leaves[0].dtype)
        loc_errors = case.values.detach().to(dtype).requires_grad_()
        values = alrp_loss(leaves, case.targets, loc_errors, case.delta, **settings)
        (values[0] + values[1]).backward()
        by_loc_errors = gradient_of(loc_errors)
    stacked = torch.stack([value.detach().double() for value in values])
    return LossResult(stacked, [gradient_of(leaf) for leaf in leaves], by_loc_errors)


def loss_budget(
    loss: str, case: Case, tiles: Tiles | BreakpointTiles, truth: LossResult, reference: ModuleType
) -> LossResult:
    """Bound how far a loss may be from `truth`, the reference's in float64."""
    case = case if loss == "alrp" else case._replace(values=torch.zeros_like(case.values))
    exact = case.expected_count(torch.float64, reference)
    nfp, rank_positive, value_sum = exact
    d_nfp, d_rank_positive, d_sum = count_budget(case, tiles, exact)
    positives, rank = max(1, nfp.numel()), nfp + rank_positive
    d_rank = (d_nfp + d_rank_positive) / rank  # relative
    eps = torch.finfo(case.scores.dtype).eps

    # 1. D = (NFP + S) / rank for both losses, AP having no S.
    driven = (nfp + value_sum) / rank
    d_driven = (d_nfp + d_sum) / rank + driven * (d_rank + ROAD)
    by_logits = update_budget(
        case, tiles, truth.by_logits, Uncertain(nfp, d_nfp), Uncertain(driven, d_driven), reference
    )

    # 2. The values. A loss is rounded to the dtype of the scores at the end.
    d_values = [((d_nfp + d_rank_positive) / rank).sum() / positives]
    by_loc_errors = torch.empty_like(truth.by_loc_errors)
    if loss == "alrp":
        error = (case.values + value_sum) / rank
        d_values.append((d_sum / rank + error * d_rank).sum() / positives)
        by_loc_errors = _by_loc_errors(case, tiles, rank, d_rank, reference)
        by_loc_errors += (eps + ROAD) * truth.by_loc_errors.abs()
    values = SECOND_ORDER * torch.stack(d_values) + (eps + ROAD) * truth.values.abs()
    return LossResult(values, by_logits, by_loc_errors)


class Uncertain(NamedTuple):
    """A number for each positive, and how far it may be off; (P,) both."""

    exact: Tensor
    off: Tensor

    def unsure(self, least: float = 0.0) -> Tensor:
        """Return where it is not sure that the number exceeds `least`, 0 or a little more."""
        return (self.exact <= 4 * self.off + least) & (self.off > 0)

    def per(self, above: Uncertain) -> Uncertain:
        """Divide by what stands above a positive; 0 where nothing does, or it is not sure."""
        seen, exact = above.exact > 4 * above.off, self.exact / above.exact
        off = (self.off + exact * above.off) / above.exact
        return Uncertain(torch.where(above.exact > 0, exact, 0.0), torch.where(seen, off, 0.0))


def update_budget(
    case: Case,
    tiles: Tiles | BreakpointTiles,
    truth: Sequence[Tensor],
    nfp: Uncertain,
    driven: Uncertain,
    reference: ModuleType,
    least: float = 0.0,
) -> list[Tensor]:
    """Bound the gradient by logits, `truth`: -D / |P| at positives, else D / (|P| NFP) H.

    Args:
        case, tiles, truth, reference: as in `loss_budget`.
        nfp, driven: NFP(i) and D(i).
        least: where NFP(i) is no larger, nothing is updated.
    """
    positives = max(1, nfp.exact.numel())
    weights, d_weights = driven.per(nfp)
    # Where not even NFP > least is sure, the whole update of a positive may be there or not, and
    # all of it on one logit.
    unsure = torch.where(nfp.unsure(least), driven.exact + driven.off, 0.0) / positives
    given = case._replace(weights=weights / positives, positive_grad=-driven.exact / positives)
    passed = case._replace(
        weights=SECOND_ORDER * d_weights / positives,
        positive_grad=SECOND_ORDER * driven.off / positives + unsure,
    ).expected_gradient(torch.float64, reference)
    by_logits = []
    budgets = gradient_budget(given, tiles, truth)
    for level, budget, more in zip(case.logits, budgets, passed, strict=True):
        finite = layout.finite(level).reshape(-1)
        whole = sum_within(case.scores, 2 * unsure, finite, torch.inf, reach_of(case))
        more = more.abs() + whole.reshape(level.shape)
        by_logits.append(budget + more * (1 + torch.finfo(level.dtype).eps))
    return by_logits


def _by_loc_errors(
    case: Case, tiles: Tiles | BreakpointTiles, rank: Tensor, d_rank: Tensor, reference: ModuleType
) -> Tensor:
    """Bound dloc/dEloc(k) = (1/|P|) [1 / rank(k) + sum_{i != k} H(x_ik) / rank(i)].

    The sum is S(k) of the values 1 / rank among the negated scores.
    """
    turned = case._replace(logits=[], targets=[], groups=(), scores=-case.scores, values=1 / rank)
    exact = turned.expected_count(torch.float64, reference)
    off = count_budget(turned, tiles, exact)[2]
    d_values = SECOND_ORDER * d_rank / rank
    passed = turned._replace(values=d_values).expected_count(torch.float64, reference)[2]
    return (off + passed + d_values) / max(1, rank.numel())
