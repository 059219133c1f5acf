"""How far a ranking kernel may be from the truth: derived, and shared by the tests and perf.gpu.

The truth is `alrp_triton.reference` in float64. A budget comes from the error of the same-dtype
torch result where there is an error to compare with, and from the number of float32 additions in a
row where torch adds in float64. Nothing of size P x N is made, so that calls of any size have one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from alrp_triton.reference import layout, pairwise
from alrp_triton.reference.layout import Batch

if TYPE_CHECKING:
    from alrp_triton.kernels.tuning.block_sizes import BreakpointTiles, Tiles

IGNORE = -100
Error = TypeVar("Error", float, Tensor)

# How many positives and how many others torch's own error is looked for among, at most. The largest
# error of fewer pairs is smaller: it only makes the budget tighter.
_COMPARED_POSITIVES, _COMPARED_OTHERS = 1 << 10, 1 << 14


class Case(NamedTuple):
    """What a call of count and gradient takes, and what the reference makes of it."""

    logits: list[Tensor]  # levels (B, C, M)
    targets: list[Tensor]
    index: Tensor  # type: ignore[assignment]  # (P,), -1 for padding; a tuple's index() is unused
    scores: Tensor  # (P,), -inf for padding
    values: Tensor  # (P,) float64; so are the next two
    weights: Tensor
    positive_grad: Tensor
    delta: float
    groups: Sequence[Tensor] = ()  # integers in the shapes of the targets; empty without groups
    positive_groups: Tensor | None = None  # (P,) int64

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        parts = [[part] if isinstance(part, Tensor) else part for part in self]
        return [x for part in parts if isinstance(part, (list, tuple)) for x in part]

    @property
    def batch(self) -> Batch:
        """The batch that both take."""
        return Batch(
            self.logits,
            self.targets,
            self.index,
            self.scores,
            self.delta,
            IGNORE,
            self.groups,
            self.positive_groups,
        )

    @property
    def count_input(self) -> tuple[Any, ...]:
        """The arguments of `count`."""
        return self.batch, self.values

    @property
    def gradient_input(self) -> tuple[Any, ...]:
        """The arguments of `gradient`."""
        return self.batch, self.weights, self.positive_grad

    def expected_count(
        self, dtype: torch.dtype | None = None, reference: ModuleType = pairwise
    ) -> Tensor:
        """Count by the reference, (3, P), in another dtype if one is named; padding is left out."""
        valid = self.scores != -torch.inf
        counts = torch.zeros(3, valid.numel(), dtype=torch.float64, device=valid.device)
        counts[1] = 1
        batch = self.to(dtype).batch.select(valid)
        counts[:, valid] = torch.stack(reference.count(batch, self.values[valid]))
        return counts

    def expected_gradient(
        self, dtype: torch.dtype | None = None, reference: ModuleType = pairwise
    ) -> list[Tensor]:
        """Take the gradient by the reference."""
        valid = self.index >= 0
        batch = self.to(dtype).batch.select(valid)
        return reference.gradient(batch, self.weights[valid], self.positive_grad[valid])

    def to(self, dtype: torch.dtype | None) -> Case:
        """Return the case with finite logits and scores of another dtype."""
        if dtype is None:
            return self
        return self._replace(
            logits=[layout.finite(level).to(dtype) for level in self.logits],
            scores=self.scores.to(layout.compute_dtype(dtype)),
        )

    def negatives(self) -> Tensor:
        """Return the finite scores of the negatives."""
        parts = pairwise.negatives_of(self.batch)
        return torch.cat([self.scores.new_empty(0), *(part.scores for part in parts)])

    def groups_of_negatives(self) -> Tensor | None:
        """Return the groups of the negatives, in the order of `negatives`."""
        if self.positive_groups is None:
            return None
        found = [self.positive_groups.new_empty(0)]
        for part in pairwise.negatives_of(self.batch):
            assert part.groups is not None  # those of the levels are given
            found.append(part.groups.long())
        return torch.cat(found)

    def groups_of(self, valid: Tensor) -> Tensor | None:
        """Return the groups of some positives."""
        return None if self.positive_groups is None else self.positive_groups[valid]


def find(
    logits: Sequence[Tensor], targets: Sequence[Tensor], delta: float, padding: int = 0
) -> Case:
    """Find the positives of levels, and draw a value, a weight and a gradient for each.

    What is drawn is exact in float32. Padding is put anywhere among the positives.
    """
    device = logits[0].device
    pairs = zip(logits, targets, strict=True)
    number = sum(int(layout.is_positive(*pair, IGNORE).sum()) for pair in pairs)
    index, scores = layout.locate(logits, targets, None, number, True, IGNORE)
    place = torch.randperm(number + padding)[:number].sort().values.to(device)

    def spread(vector: Tensor, filling: float) -> Tensor:
        full = vector.new_full((number + padding,), filling)
        full[place] = vector
        return full

    draw = [(torch.rand(number) + 0.1).double().to(device) for _ in range(3)]
    return Case(
        list(logits),
        list(targets),
        spread(index, -1),
        spread(scores, -torch.inf),
        spread(draw[0], 0.0),
        spread(draw[1], 0.0),
        spread(-draw[2], 0.0),
        delta,
    )


def group(case: Case, groups: Sequence[Tensor]) -> Case:
    """Return the case with groups, in the shapes of the targets."""
    groups = [level.to(case.scores.device) for level in groups]
    positive_groups = layout.gather(groups, case.logits, case.index)
    return case._replace(groups=groups, positive_groups=positive_groups)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move to the device with the same strides, overlapping memory included."""
    whole = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = tensor.as_strided((whole,), (1,), 0).to(device)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def gradient_of(leaf: Tensor) -> Tensor:
    """Return the gradient of a leaf that a backward has reached."""
    assert leaf.grad is not None
    return leaf.grad


def epsilon(case: Case) -> float:
    """Return the epsilon of the dtype in which scores are compared."""
    return torch.finfo(case.scores.dtype).eps


class Rounding(NamedTuple):
    """What an algorithm may add to the error of torch's arithmetic in the same dtype."""

    step: float  # to one H on its slope
    count_terms: int  # numbers of the dtype that are added in a row, for NFP
    gradient_terms: int  # likewise, for one entry of the gradient


def rounding_of_tiles(case: Case, tiles: Tiles | BreakpointTiles) -> Rounding:
    """Return how kernels round that take these sizes."""
    from alrp_triton.kernels.tuning.block_sizes import BreakpointTiles

    if isinstance(tiles, BreakpointTiles):
        return _breakpoint_rounding(case, tiles)
    return _pairwise_rounding(case, tiles)


def _pairwise_rounding(case: Case, tiles: Tiles) -> Rounding:
    """Bound the rounding of the pairwise kernels.

    Sums run in the dtype over a bounded number of terms.

    A block that takes the way of two instructions (float32, |s| scale <= FAST_RANGE, more than a
    few positives) may add half a unit in the last place of 1/2 - s scale, as the kernels say.
    """
    from alrp_triton.kernels.pairwise import FAST_RANGE

    fast = case.scores.dtype == torch.float32 and (case.scores != -torch.inf).sum() > tiles.few
    lanes = tiles.lanes * tiles.count_warps
    return Rounding(
        step=2.0 ** (math.floor(math.log2(FAST_RANGE.value + 0.5)) - 24) if fast else 0.0,
        count_terms=tiles.count_fold + tiles.count_rows + int(math.log2(lanes)),
        gradient_terms=min(tiles.gradient_fold, tiles.gradient_block) + 1,
    )


def _breakpoint_rounding(case: Case, tiles: BreakpointTiles) -> Rounding:
    """Bound the rounding of the breakpoint kernels.

    A distance is rounded to its unit, and what is summed is integer.

    An entry of the gradient is a value and a slope, each rounded, times a distance, and added. Both
    are sums over up to 2P breakpoints in float64; only float64 logits see their rounding.
    """
    from alrp_triton.kernels.breakpoints.bins import pack_levels

    bits = pack_levels(case.logits, 2 * case.scores.numel(), tiles).bits
    exact = case.scores.dtype == torch.float64
    return Rounding(
        step=0.0 if exact else 2.0 ** -(bits + 1),
        count_terms=0,
        gradient_terms=4 + (2 * case.scores.numel() if exact else 0),
    )


class CountTerms(NamedTuple):
    """What a budget of counts is made of whatever the sizes of the kernels are."""

    on_slope: Tensor  # (3, P): negatives, positives, and their values, on the slope of a positive
    torch_error: Tensor  # (3, 1): of one H among them


def count_terms(case: Case) -> CountTerms:
    """Return the costly part of a budget, which a tuner needs once for all candidates."""
    valid = case.scores != -torch.inf
    scores, values, negatives = case.scores[valid], case.values[valid], case.negatives()
    positive_groups, groups_of_negatives = case.groups_of(valid), case.groups_of_negatives()
    reach = reach_of(case)
    on_slope = case.values.new_zeros(3, valid.numel())
    for row, points, weights in (
        (0, negatives, torch.ones_like(negatives, dtype=torch.float64)),
        (1, scores, torch.ones_like(values)),
        (2, scores, values),
    ):
        theirs = groups_of_negatives if row == 0 else positive_groups
        on_slope[row, valid] = _sum_within_groups(
            (points, weights, theirs), (scores, positive_groups), reach
        )
    of_negatives, of_positives = torch_error(case, negatives), torch_error(case, scores)
    errors = on_slope.new_tensor([[of_negatives], [of_positives], [of_positives]])
    return CountTerms(on_slope, errors)


def count_budget(
    case: Case,
    tiles: Tiles | BreakpointTiles,
    exact: Tensor,
    terms: CountTerms | None = None,
) -> Tensor:
    """Bound how far NFP, rank+ and S, (3, P), may be from `exact`, the reference in float64."""
    terms = terms or count_terms(case)
    rounding = rounding_of_tiles(case, tiles)
    budget = pair_error(case, rounding, terms.torch_error) * terms.on_slope
    # A sum of n terms is right to n half units.
    in_sum = 0 if case.delta == 0 else rounding.count_terms * epsilon(case) / 2
    budget[0] += in_sum * exact[0]
    return budget + torch.finfo(torch.float64).eps * exact.abs() * case.scores.numel()


class GradientTerms(NamedTuple):
    """The same of the gradient by one level."""

    on_slope: Tensor  # as the level: weights of the positives that have the logit on their slope
    torch_error: float


def gradient_terms(case: Case) -> list[GradientTerms]:
    """Return the costly part of the gradient's budget, of each level."""
    valid = case.scores != -torch.inf
    scores, weights, reach = case.scores[valid], case.weights[valid], reach_of(case)
    positive_groups = case.groups_of(valid)
    terms = []
    for number, level in enumerate(case.logits):
        finite = layout.finite(level).reshape(-1)
        groups = None
        if positive_groups is not None:
            groups = layout.over_classes(case.groups[number], level).reshape(-1)
        on_slope = _sum_within_groups((scores, weights, positive_groups), (finite, groups), reach)
        terms.append(GradientTerms(on_slope.reshape(level.shape), torch_error(case, finite)))
    return terms


def gradient_budget(
    case: Case,
    tiles: Tiles | BreakpointTiles,
    truth: Sequence[Tensor],
    terms: list[GradientTerms] | None = None,
) -> list[Tensor]:
    """Bound how far the gradient by each level may be from `truth`, the reference in float64."""
    terms = terms or gradient_terms(case)
    rounding = rounding_of_tiles(case, tiles)
    in_sum = rounding.gradient_terms * epsilon(case) / 2
    budgets = []
    for level, exact, (on_slope, error) in zip(case.logits, truth, terms, strict=True):
        spread = pair_error(case, rounding, error) * on_slope + in_sum * exact.abs()
        budgets.append(spread + rounding_of(level, exact, spread))
    return budgets


def rounding_of(out: Tensor, exact: Tensor, spread: Tensor) -> Tensor:
    """Return what writing a result, `exact` to within `spread`, in the dtype of `out` loses."""
    info = torch.finfo(out.dtype)
    last_place = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps / 2
    if out.dtype == torch.bfloat16 and out.device.type == "cpu":
        last_place *= 2  # the interpreter cuts off where a GPU rounds
    return last_place + spread * info.eps


def pair_error(case: Case, rounding: Rounding, of_torch: Error) -> Error:
    """Return the allowed error of one H on its slope; everywhere else it is exact.

    Four times the largest error that torch makes in the same dtype, and what the algorithm adds.
    """
    if case.delta == 0:
        return 0 * of_torch
    return 4 * of_torch + (epsilon(case) / 2 + rounding.step)


def torch_error(case: Case, others: Tensor) -> float:
    """Return the largest error of torch's H among the positives and others on their slopes."""
    scores = case.scores[case.scores != -torch.inf]
    if case.delta == 0 or not scores.numel() or not others.numel():
        return 0.0
    reach = reach_of(case)
    reached = (others >= scores.min() - reach) & (others <= scores.max() + reach)
    others = _thin(others[reached], _COMPARED_OTHERS)
    if not others.numel():
        return 0.0
    compared = _thin(scores, _COMPARED_POSITIVES)[:, None]
    truth = pairwise.step(others.double() - compared.double(), case.delta)
    same = pairwise.step(others - compared, case.delta)
    return (same.double() - truth).abs().max().item()


def _thin(vector: Tensor, most: int) -> Tensor:
    return vector[:: max(1, math.ceil(vector.numel() / most))]


def reach_of(case: Case) -> float:
    """Return how far from a positive a score is on its slope, where H is rounded; or beside it."""
    return case.delta * (1 + epsilon(case))


def _sum_within_groups(
    points: tuple[Tensor, Tensor, Tensor | None],
    queries: tuple[Tensor, Tensor | None],
    reach: float,
) -> Tensor:
    """Call `sum_within` reach of each query, (places, groups), among the points of its group."""
    places, weights, groups = points
    if groups is None or queries[1] is None:
        return sum_within(places, weights, queries[0], reach, reach)
    sums = torch.zeros(queries[0].shape, dtype=torch.float64, device=places.device)
    for name in groups.unique():
        theirs, mine = groups == name, queries[1] == name
        sums[mine] = sum_within(places[theirs], weights[theirs], queries[0][mine], reach, reach)
    return sums


def sum_within(
    points: Tensor, weights: Tensor, queries: Tensor, below: float, above: float
) -> Tensor:
    """Sum, for each query q, the weights of the points in [q - below, q + above]."""
    points, order = points.double().sort()
    sums = torch.nn.functional.pad(weights[order].cumsum(0), (1, 0))
    queries = queries.double()
    rounding = torch.finfo(torch.float64).eps * queries.abs()  # of the ends
    first = torch.searchsorted(points, queries - below - rounding)
    behind = torch.searchsorted(points, queries + above + rounding, right=True)
    return (sums[behind] - sums[first]).clamp(min=0)
