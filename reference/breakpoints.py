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

With groups, each has a line of scores of its own. The lines lie one behind the other, and every sum
along them starts anew with each group: without groups there is one line.
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
    over_classes,
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

# Groups times edges up to which a table tells the place of an edge on the line of a group.
TABLE = 1 << 22

# A finite score below every edge.
BELOW = -4 * LARGEST

Index = tuple[slice | Tensor, ...]


@dataclass
class Edges:
    """The 2P edges in ascending order, and the intervals that they cut.

    Each edge ends an interval on the line of its group and starts the next one. Intervals are
    numbered line by line, I = 2P + 1 of them without groups.
    """

    key: Tensor  # (2P,) the smallest number of the scores' dtype that is not below the edge
    high: Tensor  # (I,) float64; high + low is, exactly, where each interval starts
    low: Tensor  # (I,) float64; the first interval of a line has no start: 0
    width: Tensor  # (I,) float64; 0 outside all windows, where nothing depends on it
    lower: Tensor  # (P,) int64: the interval that starts at s_i - delta
    upper: Tensor  # (P,) int64: the interval that starts at s_i + delta
    lines: Lines | None  # None without groups

    @cached_property
    def cells(self) -> Tensor:
        """(CELLS,) int32: how many edges lie below the cell, -1 where an edge falls into it."""
        inside = _cell(self.key, self.key).bincount(minlength=CELLS)
        return torch.where(inside > 0, -1, inside.cumsum(0)).to(torch.int32)

    def running_sum(self, x: Tensor) -> Tensor:
        """(I,) sum over the intervals of the same line up to each."""
        return x.cumsum(0) if self.lines is None else _sum_to(x, self.lines.before)

    def sum_from_above(self, x: Tensor) -> Tensor:
        """(I,) sum over the intervals of the same line from each on."""
        if self.lines is None:
            return x.flip(0).cumsum(0).flip(0)
        return _sum_to(x.flip(0), self.lines.behind.flip(0)).flip(0)


@dataclass
class Lines:
    """The lines of the G groups that have positives, and one more without edges for all others."""

    groups: Tensor  # (G,) ascending
    own: Tensor  # (P,) int64: the line of each positive
    lowest: Tensor  # (G + 1,) the lowest key on each; inf on the last
    codes: Tensor  # (2P,) ascending: (2P + 1) line + place among all edges, from 1 on
    before: Tensor  # (I,) int64: how many intervals of the line stand before each
    behind: Tensor  # (I,) int64: and how many behind it

    def of(self, groups: Tensor) -> Tensor:
        """The line of each group, int64."""
        groups = groups.to(self.groups.dtype).contiguous()
        line = torch.searchsorted(self.groups, groups)
        last = self.groups.numel()
        return line.where(self.groups[line.clamp(max=last - 1)] == groups, last)

    def interval(self, line: Tensor, below: Tensor) -> Tensor:
        """The interval, int32, of scores on their lines, from how many edges lie below each."""
        code = line * (self.codes.numel() + 1) + below
        if self._table is None:
            edges = torch.searchsorted(self.codes, code, right=True, out_int32=True)
        else:
            edges = self._table.index_select(0, code)
        return edges.add_(line)

    @cached_property
    def _table(self) -> Tensor | None:
        """(G + 1) (2P + 1) int32: how many codes lie at or below each; None if that is too many."""
        size = self.lowest.numel() * (self.codes.numel() + 1)
        if size > TABLE:
            return None
        return self.codes.bincount(minlength=size).cumsum(0).to(torch.int32)


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
    edges = _edges(scores, delta, own_groups)
    size = edges.high.numel()
    number = torch.zeros(size, dtype=torch.int64, device=scores.device)
    distance = torch.zeros(size, dtype=torch.float64, device=scores.device)
    unordered = torch.zeros((), dtype=torch.bool, device=scores.device)
    groups = groups or [None] * len(logits)
    for level, target, group in zip(logits, targets, groups, strict=True):
        for _, _, part, line in _relevant(level, target, group, edges, ignore_index):
            negatives = part.view(-1)
            interval = _look_up(negatives, edges, line)
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
    groups: Sequence[Tensor] = (),
    own_groups: Tensor | None = None,
) -> list[Tensor]:
    """The gradient by every logit: arguments and results of `pairwise.gradient`."""
    gradients = [torch.zeros_like(level) for level in logits]
    if scores.numel() == 0:
        return gradients
    edges = _edges(scores, delta, own_groups)
    value, slope = _line(edges, weights.double(), delta)
    groups = groups or [None] * len(logits)
    for level, target, group, out in zip(logits, targets, groups, gradients, strict=True):
        for where, at, part, line in _relevant(level, target, group, edges, ignore_index):
            negatives = part.view(-1)
            interval = _look_up(negatives, edges, line)
            total = value.index_select(0, interval)
            if delta > 0:
                offset = _offset(negatives, interval, edges)
                total.add_(offset.mul_(slope.index_select(0, interval)))
            out[where][at] = total.to(out.dtype).view(part.shape)
    write_positives(gradients, index, own)
    return gradients


def _edges(scores: Tensor, delta: float, own_groups: Tensor | None = None) -> Edges:
    center = scores.double().repeat(2)
    side = torch.full_like(center, delta)
    side[: scores.numel()].neg_()
    high = center + side
    # What rounding took from high (Knuth's two-sum).
    moved = high - center
    low = (center - (high - moved)) + (side - moved)
    order = low.argsort(stable=True)
    order = order[high[order].argsort(stable=True)]
    key = _round_up(high[order], low[order], scores.dtype)

    lines, first = None, torch.zeros_like(order)
    if own_groups is not None:
        lines, order, first = _lines(own_groups, order, key)
    # Each line has an interval before its first edge.
    at = torch.arange(1, order.numel() + 1, device=order.device) + first
    start = torch.empty_like(order)
    start[order] = at
    lower, upper = start.chunk(2)
    high, low = high[order], low[order]
    open_windows = torch.where(order < scores.numel(), 1, -1).cumsum(0)
    width = (high.diff() + low.diff()).where(open_windows[:-1] > 0, 0.0)
    number = order.numel() + (1 if lines is None else lines.lowest.numel())

    def placed(x: Tensor) -> Tensor:
        return x.new_zeros(number).index_copy_(0, at[: x.numel()], x)

    return Edges(key, placed(high), placed(low), placed(width), lower, upper, lines)


def _lines(own_groups: Tensor, order: Tensor, key: Tensor) -> tuple[Lines, Tensor, Tensor]:
    """Puts the edges, in ascending order with their keys, line by line.

    Returns:
        The lines; the edges in their order; the line of each edge in that order.
    """
    groups, own = own_groups.unique(return_inverse=True)
    line, place = own.repeat(2)[order].sort(stable=True)
    edges = line.bincount(minlength=groups.numel() + 1)
    first = edges.cumsum(0) - edges  # the place of the first edge of each line
    lowest = torch.full((edges.numel(),), torch.inf, dtype=key.dtype, device=key.device)
    lowest[:-1] = key[place[first[:-1]]]
    intervals = edges + 1
    end = intervals.cumsum(0).repeat_interleave(intervals)
    number = torch.arange(end.numel(), device=end.device)
    behind = end - 1 - number
    before = intervals.repeat_interleave(intervals) - 1 - behind
    codes = line * (order.numel() + 1) + place + 1
    return Lines(groups, own, lowest, codes, before, behind), order[place], line


def _round_up(high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of `dtype` that is not below high + low."""
    key = high.to(dtype)
    short = (key.double() < high) | ((key.double() == high) & (low > 0))
    key = torch.where(short, key.nextafter(torch.full_like(key, torch.inf)), key)
    # Beyond all scores one number is as good as another: these leave room for `BELOW`.
    return key.clamp(-2 * LARGEST, 2 * LARGEST)


def _relevant(
    logits: Tensor, targets: Tensor, groups: Tensor | None, edges: Edges, ignore_index: int
) -> Iterator[tuple[Index, Index, Tensor, Tensor | None]]:
    """Cuts a level into parts that hold all negatives not wholly below min_P(s) - delta.

    Places are looked at by their highest logit first. Late in training few have a relevant one, and
    those are picked out. Where most have, picking costs more than it saves: a part holds all logits
    of its places, and what is no negative is put below all edges.

    Returns:
        For each part where it stands, as an index into an index of the level; its finite scores, of
        the shape that the two indices give; and their lines, flattened.
    """
    for rows, places, block, block_targets in blocks(logits, targets, SURVEY):
        where = rows, slice(None), places
        line = None
        if groups is not None:
            line = edges.lines.of(groups[rows, ..., places])
        by_place = line is None or line.dim() == 2
        keep = _not_below(finite(block.amax(1)), edges, line if by_place else None)
        if targets.dim() == 2:
            keep.logical_and_(block_targets != ignore_index)
        if keep.count_nonzero() > MOST * keep.numel():
            for row, place, part, part_targets in blocks(block, block_targets):
                scores = finite(part).contiguous()
                exclude_non_negatives(scores, part_targets, ignore_index, fill=BELOW)
                part_line = line
                if line is not None:
                    part_line = over_classes(line[row, ..., place], part).reshape(-1)
                yield where, (row, slice(None), place), scores, part_line
            continue
        step = max(1, layout.CHUNK // logits.shape[1])
        for row, place in zip(*(x.split(step) for x in keep.nonzero(as_tuple=True)), strict=True):
            scores = finite(block[row, :, place])
            picked = line
            if line is not None:
                picked = over_classes(line[row, ..., place, None], scores[..., None])[..., 0]
            mask = _not_below(scores, edges, picked)
            part_targets = block_targets[row, ..., place, None]
            exclude_non_negatives(mask[..., None], part_targets, ignore_index)
            found, channel = mask.nonzero(as_tuple=True)
            if found.numel():
                at = row[found], channel, place[found]
                part_line = picked if picked is None else picked[found, channel]
                yield where, at, scores[found, channel], part_line


def _not_below(scores: Tensor, edges: Edges, line: Tensor | None) -> Tensor:
    """Mask: at or above the lowest edge, of their line or of all, or NaN."""
    lowest = edges.key[0] if line is None else edges.lines.lowest[line]
    return (scores < lowest).logical_not_()


def _look_up(scores: Tensor, edges: Edges, line: Tensor | None = None) -> Tensor:
    """The interval of each score on its line, int32.

    Most scores fall into a cell of the line that no edge falls into, where the table knows how many
    edges lie below. A search decides the rest. Where a cell ends does not matter, since `_cell`
    keeps order: an edge in a lower cell is below the score, one in a higher cell above it.
    """
    if scores.numel() < FEW:
        below = torch.bucketize(scores, edges.key, right=True, out_int32=True)
    else:
        below = edges.cells.index_select(0, _cell(scores, edges.key))
        open_cell = (below < 0).nonzero()[:, 0]
        search = torch.bucketize(scores[open_cell], edges.key, right=True, out_int32=True)
        below[open_cell] = search
    return below if line is None else edges.lines.interval(line, below)


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
    interval = _look_up(scores, edges, edges.lines and edges.lines.own)
    offset = _offset(scores, interval, edges)
    # Where nobody else stands at or above the window, the difference must be 0, not its rounding.
    alone = edges.sum_from_above(interval.bincount(minlength=size))[edges.lower] == 1
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
        number: (I,) number of the examples in each interval, or their summed weight.
        distance: (I,) sum of their distances to `high` of the interval's start.
        delta: half-width of the step.
    """
    from_start = edges.sum_from_above(number)
    if delta == 0:
        return from_start[edges.lower].double()
    from_end = torch.nn.functional.pad(from_start[1:], (0, 1))
    inside = (distance - number * edges.low).where(edges.width > 0, 0.0)
    area = edges.sum_from_above(from_end * edges.width + inside)
    return (area[edges.lower] - area[edges.upper]) / (2 * delta)


def _sum_to(x: Tensor, before: Tensor) -> Tensor:
    """(I,) running sums that start anew with each line.

    By doubling: after a round of length n each sum holds the last 2n summands of its line. So
    nothing of another line is ever added, which would have to be taken away again.
    """
    x = x.clone()
    length = 1
    while length <= int(before.max()):
        x[length:] += x[:-length].where(before[length:] >= length, 0)
        length *= 2
    return x


def _line(edges: Edges, weights: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """(value at `high` of the start, slope), each (I,), of sum_i weights(i) H(s - s_i)."""
    change = weights.new_zeros(edges.high.numel())
    change[edges.lower] = weights
    if delta == 0:
        return edges.running_sum(change), torch.zeros_like(change)
    change[edges.upper] = -weights
    slope = (edges.running_sum(change) / (2 * delta)).where(edges.width > 0, 0.0)
    value = edges.running_sum(slope * edges.width).roll(1)
    if edges.lines is None:
        value[0] = 0
    else:
        value.masked_fill_(edges.lines.before == 0, 0)
    return value - slope * edges.low, slope
