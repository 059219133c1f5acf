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

Two things keep this as accurate as evaluating every pair. An edge is kept as the unevaluated sum
`high + low` of two floats, which is exact, so no edge is ever rounded to the wrong side of a score.
And all that is summed along the line is non-negative (for non-negative values and weights), over
windows only, so that nothing large cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import layout
from .layout import (
    LARGEST,
    blocks,
    exclude_non_negatives,
    finite,
    write_positives,
)

# Cells of the table that tells most scores their interval without a search.
CELLS = 1 << 16

# So few scores are searched for one by one: the table would cost more.
FEW = 1 << 12

# Logits whose places are looked at at once, before any is worked on.
SURVEY = 1 << 21

# Where more than this share of the places has a relevant logit, a part is worked on whole. Picking
# the relevant logits out took 1.4 to 1.7 times as long in mid training, and a fourth in late.
MOST = 0.9

# A finite score below every edge.
BELOW = -4 * LARGEST

Index = tuple[slice | Tensor, ...]


@dataclass
class Edges:
    """The 2P edges in ascending order. Interval b ends at edge b, and so starts at edge b - 1."""

    key: Tensor  # (2P,) the smallest number of the scores' dtype that is not below the edge
    high: Tensor  # (2P + 1,) float64; high + low is, exactly, where each interval starts
    low: Tensor  # (2P + 1,) float64; the first interval has no start: 0
    width: Tensor  # (2P + 1,) float64; 0 outside all windows, where nothing depends on it
    lower: Tensor  # (P,) int64: the interval that starts at s_i - delta
    upper: Tensor  # (P,) int64: the interval that starts at s_i + delta

    @cached_property
    def cells(self) -> Tensor:
        """(CELLS,) int32: the interval that holds the cell, -1 where an edge falls into it."""
        inside = _cell(self.key, self.key).bincount(minlength=CELLS)
        return torch.where(inside > 0, -1, inside.cumsum(0)).to(torch.int32)


def count(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    scores: Tensor,
    values: Tensor,
    delta: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """NFP(i), rank+(i) and S(i): arguments and results of `pairwise.count`."""
    if scores.numel() == 0:
        empty = scores.new_zeros(0, dtype=torch.float64)
        return empty, empty.clone(), empty.clone()
    edges = _edges(scores, delta)
    size = edges.high.numel()
    number = torch.zeros(size, dtype=torch.int64, device=scores.device)
    distance = torch.zeros(size, dtype=torch.float64, device=scores.device)
    unordered = torch.zeros((), dtype=torch.bool, device=scores.device)
    for level, target in zip(logits, targets, strict=True):
        for _, _, part in _relevant(level, target, edges, ignore_index):
            negatives = part.view(-1)
            interval = _look_up(negatives, edges)
            number += interval.bincount(minlength=size)
            if delta > 0:
                offset = _offset(negatives, interval, edges)
                distance += interval.bincount(offset, minlength=size)
            unordered |= negatives.amax().isnan()
    nfp = _window_mean(edges, number, distance, delta)
    others, value_sum = _sums_over_others(
        edges, scores, (torch.ones_like(nfp), values.double()), delta
    )

    # NaN has no place in any order, so it leaves no number standing that it was compared with.
    unranked = scores.isnan().any()
    nfp = nfp.masked_fill(unranked | unordered, torch.nan)
    others, value_sum = (x.masked_fill(unranked, torch.nan) for x in (others, value_sum))
    return nfp, 1 + others, value_sum


def gradient(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    index: Tensor,
    scores: Tensor,
    weights: Tensor,
    own: Tensor,
    delta: float,
    ignore_index: int,
) -> list[Tensor]:
    """The gradient by every logit: arguments and results of `pairwise.gradient`."""
    gradients = [torch.zeros_like(level) for level in logits]
    if scores.numel() == 0:
        return gradients
    edges = _edges(scores, delta)
    value, slope = _line(edges, weights.double(), delta)
    for level, target, out in zip(logits, targets, gradients, strict=True):
        for where, at, part in _relevant(level, target, edges, ignore_index):
            negatives = part.view(-1)
            interval = _look_up(negatives, edges)
            total = value.index_select(0, interval)
            if delta > 0:
                offset = _offset(negatives, interval, edges)
                total.add_(offset.mul_(slope.index_select(0, interval)))
            out[where][at] = total.to(out.dtype).view(part.shape)
    write_positives(gradients, index, own)
    return gradients


def _edges(scores: Tensor, delta: float) -> Edges:
    center = scores.double().repeat(2)
    side = torch.full_like(center, delta)
    side[: scores.numel()].neg_()
    high = center + side
    # What rounding took from high (Knuth's two-sum).
    moved = high - center
    low = (center - (high - moved)) + (side - moved)
    order = low.argsort(stable=True)
    order = order[high[order].argsort(stable=True)]
    high, low = high[order], low[order]
    start = torch.empty_like(order)
    start[order] = torch.arange(1, order.numel() + 1, device=order.device)
    lower, upper = start.chunk(2)

    open_windows = torch.where(order < scores.numel(), 1, -1).cumsum(0)
    width = (high.diff() + low.diff()).where(open_windows[:-1] > 0, 0.0)
    pad = torch.nn.functional.pad
    return Edges(
        key=_round_up(high, low, scores.dtype),
        high=pad(high, (1, 0)),
        low=pad(low, (1, 0)),
        width=pad(width, (1, 1)),
        lower=lower,
        upper=upper,
    )


def _round_up(high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of `dtype` that is not below high + low."""
    key = high.to(dtype)
    short = (key.double() < high) | ((key.double() == high) & (low > 0))
    key = torch.where(short, key.nextafter(torch.full_like(key, torch.inf)), key)
    # Beyond all scores one number is as good as another: these leave room for `BELOW`.
    return key.clamp(-2 * LARGEST, 2 * LARGEST)


def _relevant(
    logits: Tensor, targets: Tensor, edges: Edges, ignore_index: int
) -> Iterator[tuple[Index, Index, Tensor]]:
    """Cuts a level into parts that hold all negatives not wholly below min_P(s) - delta.

    Places are looked at by their highest logit first. Late in training few have a relevant one, and
    those are picked out. Where most have, picking costs more than it saves: a part holds all logits
    of its places, and what is no negative is put below all edges.

    Returns:
        For each part where it stands, as an index into an index of the level; its finite scores, of
        the shape that the two indices give.
    """
    for rows, places, block, block_targets in blocks(logits, targets, SURVEY):
        where = rows, slice(None), places
        keep = _not_below(finite(block.amax(1)), edges)
        if targets.dim() == 2:
            keep.logical_and_(block_targets != ignore_index)
        if keep.count_nonzero() > MOST * keep.numel():
            for row, place, part, part_targets in blocks(block, block_targets):
                scores = finite(part).contiguous()
                exclude_non_negatives(scores, part_targets, ignore_index, fill=BELOW)
                yield where, (row, slice(None), place), scores
            continue
        step = max(1, layout.CHUNK // logits.shape[1])
        for row, place in zip(*(x.split(step) for x in keep.nonzero(as_tuple=True)), strict=True):
            scores = finite(block[row, :, place])
            mask = _not_below(scores, edges)
            part_targets = block_targets[row, ..., place, None]
            exclude_non_negatives(mask[..., None], part_targets, ignore_index)
            found, channel = mask.nonzero(as_tuple=True)
            if found.numel():
                yield where, (row[found], channel, place[found]), scores[found, channel]


def _not_below(scores: Tensor, edges: Edges) -> Tensor:
    """Mask: at or above the lowest edge, or NaN."""
    return (scores < edges.key[0]).logical_not_()


def _look_up(scores: Tensor, edges: Edges) -> Tensor:
    """The interval of each score, int32.

    Most scores fall into a cell of the line that no edge falls into, where the table knows the
    interval. A search decides the rest. Where a cell ends does not matter, since `_cell` keeps
    order: an edge in a lower cell is below the score, one in a higher cell above it.
    """
    if scores.numel() < FEW:
        return torch.bucketize(scores, edges.key, right=True, out_int32=True)
    interval = edges.cells.index_select(0, _cell(scores, edges.key))
    open_cell = (interval < 0).nonzero()[:, 0]
    interval[open_cell] = torch.bucketize(scores[open_cell], edges.key, right=True, out_int32=True)
    return interval


def _offset(scores: Tensor, interval: Tensor, edges: Edges) -> Tensor:
    """Float64 distances to `high` of the interval's lower edge."""
    return scores.to(torch.float64, copy=True).sub_(edges.high.index_select(0, interval))


def _cell(scores: Tensor, key: Tensor) -> Tensor:
    """The cell of each score, int32: `CELLS` of them cut the line between the outer edges.

    The first and the last hold what lies outside, where no edge is, and the last NaN.
    """
    width = (key[-1] - key[0]).clamp(min=torch.finfo(key.dtype).tiny * CELLS) / (CELLS - 3)
    cell = (scores - (key[0] - 1.5 * width)).mul_(1 / width).clamp_(0, CELLS - 1)
    return cell.nan_to_num_(CELLS - 1).to(torch.int32)


def _sums_over_others(
    edges: Edges, scores: Tensor, values: Sequence[Tensor], delta: float
) -> list[Tensor]:
    """(P,) for each of the values: sum_{k != i} values(k) H(x_ik).

    It is the sum over all positives, less what i sees of itself.
    """
    size = edges.high.numel()
    interval = _look_up(scores, edges)
    offset = _offset(scores, interval, edges)
    # Where nobody else stands at or above the window, the difference must be 0, not its rounding.
    alone = _sum_from_above(interval.bincount(minlength=size))[edges.lower] == 1
    sums = []
    for x in values:
        number = interval.bincount(x, minlength=size)
        distance = interval.bincount(x * offset, minlength=size)
        itself = x if delta == 0 else x / 2
        others = _window_mean(edges, number, distance, delta) - itself
        sums.append(others.masked_fill(alone, 0))
    return sums


def _window_mean(edges: Edges, number: Tensor, distance: Tensor, delta: float) -> Tensor:
    """(P,) mean over the window of i of G(t), the number of examples at or above t.

    Args:
        edges: of the positives.
        number: (2P + 1,) number of the examples in each interval, or their summed weight.
        distance: (2P + 1,) sum of their distances to `high` of the interval's start.
        delta: half-width of the step.
    """
    from_start = _sum_from_above(number)
    if delta == 0:
        return from_start[edges.lower].double()
    from_end = torch.nn.functional.pad(from_start[1:], (0, 1))
    inside = (distance - number * edges.low).where(edges.width > 0, 0.0)
    area = _sum_from_above(from_end * edges.width + inside)
    return (area[edges.lower] - area[edges.upper]) / (2 * delta)


def _sum_from_above(x: Tensor) -> Tensor:
    return x.flip(0).cumsum(0).flip(0)


def _line(edges: Edges, weights: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """(value at `high` of the start, slope), each (2P + 1,), of sum_i weights(i) H(s - s_i)."""
    change = weights.new_zeros(edges.high.numel())
    change[edges.lower] = weights
    if delta == 0:
        return change.cumsum(0), torch.zeros_like(change)
    change[edges.upper] = -weights
    slope = (change.cumsum(0) / (2 * delta)).where(edges.width > 0, 0.0)
    value = (slope * edges.width).cumsum(0).roll(1)
    value[0] = 0
    return value - slope * edges.low, slope
