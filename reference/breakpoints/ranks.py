"""The same numbers as `pairwise` in O((N + P) log P), exact, with torch operators on any device.

H is piecewise linear. Positive i changes its mind about a score s at two breakpoints only: below
s_i - delta it counts nothing, above s_i + delta it counts one, and between them (its window) it
counts linearly. Sorting the 2P breakpoints of all positives cuts the line of scores into 2P + 1
intervals, and inside one interval all positives are linear at once. So

- NFP(i) is the mean over the window of i of G(t) = number of negatives at or above t, since H(x) is
  the mean of [t <= s]. It needs only a histogram: how many negatives each interval holds, and the
  sum of their distances to the breakpoint at its lower end;
- the gradient by s_j is a piecewise linear function of s_j: look its interval up, then
  value + slope * distance to that breakpoint.

Two things keep this as accurate as evaluating every pair. No breakpoint is ever rounded (`sort`).
And all that is summed from breakpoint to breakpoint, prefix sums all, is non-negative (for
non-negative values and weights), over windows only, so that nothing large cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import Batch, write_positives
from .relevant import Part, survey
from .sort import Breakpoints, Steps, sort_breakpoints
from .sums import sum_by_place
from .workspace import Workspace

# Neighbours are counted in so many rows in turn, a power of two. Most fall into the same interval,
# and a processor waits for a number that it has just written. With more intervals rows cost more
# than the wait.
LANES = 4
MOST_IN_LANES = 1 << 12


@torch.no_grad()
def count(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return NFP(i), rank+(i) and S(i): arguments and results of `pairwise.count`."""
    scores, delta = batch.scores, batch.delta
    if scores.numel() == 0:
        empty = scores.new_zeros(0, dtype=torch.float64)
        return empty, empty.clone(), empty.clone()
    breakpoints, workspace = _sort_breakpoints(batch), Workspace()
    # In rows: the negatives, the positives, and the positives' values.
    number, distance = scores.new_zeros((2, 3, breakpoints.high.numel()), dtype=torch.float64)
    unordered = False
    if batch.logits:
        number[0], distance[0], unordered = _sum_negatives(batch, breakpoints, workspace)
    segments = None if breakpoints.segments is None else breakpoints.segments.positives
    interval = breakpoints.look_up(scores, segments, workspace)
    values = torch.stack([torch.ones_like(values), values]).double()
    offset = _offset(scores, interval, breakpoints, workspace) if delta > 0 else None
    for row, value in enumerate(values, start=1):
        number[row] = sum_by_place(value, interval, number.shape[1])
        if offset is not None:
            distance[row] = sum_by_place(value * offset, interval, number.shape[1])

    from_start = breakpoints.sum_from_above(number)
    means = _window_mean(breakpoints, from_start, number, distance, delta)
    others = means[1:] - values * (1.0 if delta == 0 else 0.5)  # without what i sees of itself
    # Where nobody else stands at or above the window, that must be 0, not its rounding.
    others.masked_fill_(from_start[1].index_select(0, breakpoints.lower) == 1, 0.0)

    # NaN has no place in any order, so it leaves no number standing that it was compared with.
    unranked = scores.isnan().any()
    nfp = means[0].masked_fill(unranked | unordered, torch.nan)
    others.masked_fill_(unranked, torch.nan)
    return nfp, 1 + others[0], others[1].clone()  # three vectors of their own


@torch.no_grad()
def gradient(batch: Batch, weights: Tensor, positive_grad: Tensor) -> list[Tensor]:
    """Return the gradient by every logit: arguments and results of `pairwise.gradient`."""
    if batch.scores.numel() == 0:
        return [torch.zeros_like(level) for level in batch.logits]
    gradients = [torch.empty_like(level) for level in batch.logits]
    breakpoints, workspace = _sort_breakpoints(batch), Workspace()
    value, slope = _linear_pieces(breakpoints, weights.double(), batch.delta)
    steps = Steps(breakpoints, value.to(gradients[0].dtype))

    def evaluate(part: Part, ordered: bool) -> Tensor:
        looked_up = part.scores, part.segments, workspace, ordered
        if batch.delta == 0:
            return steps(*looked_up)
        interval = breakpoints.look_up(*looked_up)
        total = _offset(part.scores, interval, breakpoints, workspace)
        return total.mul_(_of(slope, interval, workspace)).add_(_of(value, interval, workspace))

    for level, out in zip(batch.levels(), gradients, strict=True):
        for block in survey(*level, breakpoints):
            of_block = out[block.where]
            if block.runs is not None:  # parts do not cover it
                of_block.zero_()
            for part in block.parts(breakpoints, batch.ignore_index, workspace):
                part.write(of_block, evaluate(part, block.ordered))
    write_positives(gradients, batch.index, positive_grad)
    return gradients


def _sort_breakpoints(batch: Batch) -> Breakpoints:
    looked_up = sum(level.numel() for level in batch.logits)
    return sort_breakpoints(batch.scores, batch.delta, batch.positive_groups, looked_up)


def _sum_negatives(
    batch: Batch, breakpoints: Breakpoints, workspace: Workspace
) -> tuple[Tensor, Tensor, bool]:
    """Return the histogram of the negatives, the sums of their offsets; whether one is NaN."""
    size, unordered = breakpoints.high.numel(), False
    lanes = LANES if size <= MOST_IN_LANES else 1
    apart = torch.zeros(0, dtype=torch.int32, device=breakpoints.high.device)
    number, distance = breakpoints.high.new_zeros((2, lanes * size))
    surveyed = (
        (part, block.ordered)
        for level in batch.levels()
        for block in survey(*level, breakpoints)
        for part in block.parts(breakpoints, batch.ignore_index, workspace)
    )
    for part, ordered in surveyed:
        many = part.scores.numel()
        if many > apart.numel():
            apart = torch.arange(many, dtype=torch.int32, device=apart.device)
            apart.bitwise_and_(lanes - 1).mul_(size)
        interval = breakpoints.look_up(part.scores, part.segments, workspace, ordered)
        offset = _offset(part.scores, interval, breakpoints, workspace) if batch.delta > 0 else None
        interval.add_(apart[:many])
        number += interval.bincount(minlength=lanes * size)
        if offset is not None:
            distance += sum_by_place(offset, interval, lanes * size)
        unordered = unordered or (not ordered and bool(part.scores.isnan().any()))
    return number.view(lanes, size).sum(0), distance.view(lanes, size).sum(0), unordered


def _of(x: Tensor, interval: Tensor, workspace: Workspace) -> Tensor:
    """Return what x (I,) holds of each interval (n,)."""
    return torch.index_select(x, 0, interval, out=workspace("of interval", interval, x.dtype))


def _offset(
    scores: Tensor, interval: Tensor, breakpoints: Breakpoints, workspace: Workspace
) -> Tensor:
    """Return float64 distances (n,) to `high` of the interval's lower breakpoint."""
    offset = workspace("offset", scores, torch.float64).copy_(scores)
    return offset.sub_(_of(breakpoints.high, interval, workspace))


def _along(x: Tensor, interval: Tensor) -> Tensor:
    """Return what rows of x (..., I) hold of some intervals (P,).

    `index_select` would take far longer.
    """
    return x.gather(-1, interval.expand(*x.shape[:-1], -1))


def _window_mean(
    breakpoints: Breakpoints, from_start: Tensor, number: Tensor, distance: Tensor, delta: float
) -> Tensor:
    """Return the mean (..., P) over the window of i of G(t), how many examples are at or above t.

    Args:
        breakpoints: of the positives.
        from_start: (..., I) number of the examples at or above the start of each interval.
        number: (..., I) number of those in it, or their summed weight.
        distance: (..., I) sum of their distances to `high` of the interval's start.
        delta: half-width of the step.
    """
    if delta == 0:
        return _along(from_start, breakpoints.lower)
    inside = torch.addcmul(distance, number, breakpoints.low, value=-1.0)
    inside.masked_fill_(breakpoints.width == 0, 0.0)
    from_end = pad(from_start[..., 1:], (0, 1))
    area = breakpoints.sum_from_above(from_end.mul_(breakpoints.width).add_(inside))
    mean = _along(area, breakpoints.lower).sub_(_along(area, breakpoints.upper))
    return mean.div_(2 * delta)


def _linear_pieces(
    breakpoints: Breakpoints, weights: Tensor, delta: float
) -> tuple[Tensor, Tensor]:
    """Return (value at `high` of the start, slope), each (I,), of sum_i weights(i) H(s - s_i)."""
    change = torch.zeros_like(breakpoints.high).index_copy_(0, breakpoints.lower, weights)
    if delta == 0:
        return breakpoints.running_sum(change), torch.zeros_like(change)
    change.index_copy_(0, breakpoints.upper, -weights)
    slope = (breakpoints.running_sum(change) / (2 * delta)).where(breakpoints.width > 0, 0.0)
    value = breakpoints.running_sum(slope * breakpoints.width).roll(1)
    if breakpoints.segments is None:
        value[0] = 0
    else:
        value.masked_fill_(breakpoints.segments.before == 0, 0)
    return value - slope * breakpoints.low, slope
