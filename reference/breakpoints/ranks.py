"""The same numbers as `pairwise` in O((N + P) log P), exact, with torch operators on any device.

H is piecewise linear. Positive i changes its mind about a score s at two edges only: below s_i -
delta it counts nothing, above s_i + delta it counts one, and between them (its window) it counts
linearly. Sorting the 2P edges of all positives cuts the line of scores into 2P + 1 intervals, and
inside one interval all positives are linear at once. So

- NFP(i) is the mean over the window of i of G(t) = number of negatives at or above t, since H(x) is
  the mean of [t <= s]. It needs only how many negatives each interval holds, and the sum of their
  distances to the interval's lower edge;
- the gradient by s_j is a piecewise linear function of s_j: look its interval up, then
  value + slope * distance to the lower edge.

Two things keep this as accurate as evaluating every pair. No edge is ever rounded (`edges`). And
all that is summed along the line is non-negative (for non-negative values and weights), over
windows only, so that nothing large cancels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import write_positives
from .relevant import Part, survey
from .sort import Edges, Steps, sort_edges
from .sums import sum_by_place
from .workspace import Scratch

# Neighbours are counted in so many rows in turn, a power of two. Most fall into the same interval,
# and a processor waits for a number that it has just written. With more intervals rows cost more
# than the wait.
LANES = 4
MOST_IN_LANES = 1 << 12


@torch.no_grad()
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
    """NFP(i), rank+(i) and S(i): arguments and results of `pairwise.count`."""
    if scores.numel() == 0:
        empty = scores.new_zeros(0, dtype=torch.float64)
        return empty, empty.clone(), empty.clone()
    edges, scratch = _sort_edges(logits, scores, delta, own_groups), Scratch()
    # In rows: the negatives, the positives, and the positives' values.
    number, distance = scores.new_zeros((2, 3, edges.high.numel()), dtype=torch.float64)
    unordered = False
    if logits:
        number[0], distance[0], unordered = _sum_negatives(
            logits, targets, groups, edges, delta, ignore_index, scratch
        )
    own_lines = None if edges.lines is None else edges.lines.own
    interval = edges.look_up(scores, own_lines, scratch)
    values = torch.stack([torch.ones_like(values), values]).double()
    offset = _offset(scores, interval, edges, scratch) if delta > 0 else None
    for row, value in enumerate(values, start=1):
        number[row] = sum_by_place(value, interval, number.shape[1])
        if offset is not None:
            distance[row] = sum_by_place(value * offset, interval, number.shape[1])

    from_start = edges.sum_from_above(number)
    means = _window_mean(edges, from_start, number, distance, delta)
    others = means[1:] - values * (1.0 if delta == 0 else 0.5)  # without what i sees of itself
    # Where nobody else stands at or above the window, that must be 0, not its rounding.
    others.masked_fill_(from_start[1].index_select(0, edges.lower) == 1, 0.0)

    # NaN has no place in any order, so it leaves no number standing that it was compared with.
    unranked = scores.isnan().any()
    nfp = means[0].masked_fill(unranked | unordered, torch.nan)
    others.masked_fill_(unranked, torch.nan)
    return nfp, 1 + others[0], others[1].clone()  # three vectors of their own


@torch.no_grad()
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
    """The gradient by every logit: arguments and results of `pairwise.gradient`."""
    if scores.numel() == 0:
        return [torch.zeros_like(level) for level in logits]
    gradients = [torch.empty_like(level) for level in logits]
    edges, scratch = _sort_edges(logits, scores, delta, own_groups), Scratch()
    value, slope = _line(edges, weights.double(), delta)
    steps = Steps(edges, value.to(gradients[0].dtype))

    def evaluate(part: Part, ordered: bool) -> Tensor:
        looked_up = part.scores, part.lines, scratch, ordered
        if delta == 0:
            return steps(*looked_up)
        interval = edges.look_up(*looked_up)
        total = _offset(part.scores, interval, edges, scratch)
        return total.mul_(_of(slope, interval, scratch)).add_(_of(value, interval, scratch))

    level_groups: Sequence[Tensor | None] = groups or [None] * len(logits)
    for level, target, group, out in zip(logits, targets, level_groups, gradients, strict=True):
        for block in survey(level, target, group, edges):
            of_block = out[block.where]
            if block.runs is not None:  # parts do not cover it
                of_block.zero_()
            for part in block.parts(edges, ignore_index, scratch):
                part.write(of_block, evaluate(part, block.ordered))
    write_positives(gradients, index, own)
    return gradients


def _sort_edges(
    logits: Sequence[Tensor], scores: Tensor, delta: float, own_groups: Tensor | None
) -> Edges:
    return sort_edges(scores, delta, own_groups, sum(level.numel() for level in logits))


def _sum_negatives(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    groups: Sequence[Tensor],
    edges: Edges,
    delta: float,
    ignore_index: int,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, bool]:
    """How many negatives each interval holds, and the sum of their offsets; whether one is NaN."""
    size, unordered = edges.high.numel(), False
    lanes = LANES if size <= MOST_IN_LANES else 1
    apart = torch.zeros(0, dtype=torch.int32, device=edges.high.device)
    number, distance = edges.high.new_zeros((2, lanes * size))
    level_groups: Sequence[Tensor | None] = groups or [None] * len(logits)
    surveyed = (
        (part, block.ordered)
        for level, target, group in zip(logits, targets, level_groups, strict=True)
        for block in survey(level, target, group, edges)
        for part in block.parts(edges, ignore_index, scratch)
    )
    for part, ordered in surveyed:
        many = part.scores.numel()
        if many > apart.numel():
            apart = torch.arange(many, dtype=torch.int32, device=apart.device)
            apart.bitwise_and_(lanes - 1).mul_(size)
        interval = edges.look_up(part.scores, part.lines, scratch, ordered)
        offset = _offset(part.scores, interval, edges, scratch) if delta > 0 else None
        interval.add_(apart[:many])
        number += interval.bincount(minlength=lanes * size)
        if offset is not None:
            distance += sum_by_place(offset, interval, lanes * size)
        unordered = unordered or (not ordered and bool(part.scores.isnan().any()))
    return number.view(lanes, size).sum(0), distance.view(lanes, size).sum(0), unordered


def _of(x: Tensor, interval: Tensor, scratch: Scratch) -> Tensor:
    """What x (I,) holds of each interval (n,)."""
    return torch.index_select(x, 0, interval, out=scratch("of interval", interval, x.dtype))


def _offset(scores: Tensor, interval: Tensor, edges: Edges, scratch: Scratch) -> Tensor:
    """Float64 distances (n,) to `high` of the interval's lower edge."""
    offset = scratch("offset", scores, torch.float64).copy_(scores)
    return offset.sub_(_of(edges.high, interval, scratch))


def _along(x: Tensor, interval: Tensor) -> Tensor:
    """What the rows of x (..., I) hold of some intervals (P,); `index_select` takes far longer."""
    return x.gather(-1, interval.expand(*x.shape[:-1], -1))


def _window_mean(
    edges: Edges, from_start: Tensor, number: Tensor, distance: Tensor, delta: float
) -> Tensor:
    """(..., P) mean over the window of i of G(t), the number of examples at or above t.

    Args:
        edges: of the positives.
        from_start: (..., I) number of the examples at or above the start of each interval.
        number: (..., I) number of those in it, or their summed weight.
        distance: (..., I) sum of their distances to `high` of the interval's start.
        delta: half-width of the step.
    """
    if delta == 0:
        return _along(from_start, edges.lower)
    inside = torch.addcmul(distance, number, edges.low, value=-1.0)
    inside.masked_fill_(edges.width == 0, 0.0)
    from_end = pad(from_start[..., 1:], (0, 1))
    area = edges.sum_from_above(from_end.mul_(edges.width).add_(inside))
    mean = _along(area, edges.lower).sub_(_along(area, edges.upper))
    return mean.div_(2 * delta)


def _line(edges: Edges, weights: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """(value at `high` of the start, slope), each (I,), of sum_i weights(i) H(s - s_i)."""
    change = torch.zeros_like(edges.high).index_copy_(0, edges.lower, weights)
    if delta == 0:
        return edges.running_sum(change), torch.zeros_like(change)
    change.index_copy_(0, edges.upper, -weights)
    slope = (edges.running_sum(change) / (2 * delta)).where(edges.width > 0, 0.0)
    value = edges.running_sum(slope * edges.width).roll(1)
    if edges.lines is None:
        value[0] = 0
    else:
        value.masked_fill_(edges.lines.before == 0, 0)
    return value - slope * edges.low, slope
