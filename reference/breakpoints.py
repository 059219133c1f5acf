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
from torch.nn.functional import pad

from . import layout
from .layout import (
    LARGEST,
    at_logits,
    blocks,
    exclude_non_negatives,
    finite,
    is_negative,
    over_classes,
    unravel,
    write_positives,
)

# Cells of the table that tells most scores their interval without a search: so many, and so many
# for each edge. With 50,000 positives 2^16 cells would leave most scores to the search.
CELLS = 1 << 16
CELLS_PER_EDGE = 4

# So few scores are searched for one by one: the table would cost more.
FEW = 1 << 14

# Logits that are surveyed at once, before any is worked on.
SURVEY = 1 << 20

# What stands in one column of a survey. A maximum down columns is taken at the speed of memory.
FOLD = 16

# Where more than this share of the columns has a relevant logit, a block is worked on whole.
MOST = 0.7

# Groups times edges up to which a table tells the place of an edge on the line of a group.
TABLE = 1 << 22

# A finite score below every edge.
BELOW = -4 * LARGEST

# More than any number of edges.
OPEN = torch.iinfo(torch.int32).max

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
    lower: Tensor  # (P,) int64: the interval that starts at s_i - delta
    upper: Tensor  # (P,) int64: the interval that starts at s_i + delta
    lines: Lines | None  # None without groups

    @cached_property
    def cells(self) -> Tensor:
        """int32: how many edges lie below each cell, `OPEN` where an edge falls into it."""
        inside = _cell(self.key, self.key).bincount(minlength=_number_of_cells(self.key))
        return torch.where(inside > 0, OPEN, inside.cumsum(0)).to(torch.int32)

    @cached_property
    def width(self) -> Tensor:
        """(I,) float64; 0 outside all windows, where nothing depends on it."""
        windows = torch.zeros_like(self.high)
        windows[self.lower], windows[self.upper] = 1.0, -1.0
        inside = self.running_sum(windows)[:-1] > 0
        return pad((self.high.diff() + self.low.diff()).where(inside, 0.0), (0, 1))

    def running_sum(self, x: Tensor) -> Tensor:
        """(..., I) sum over the intervals of the same line up to each."""
        return x.cumsum(-1) if self.lines is None else _sum_to(x, self.lines.before)

    def sum_from_above(self, x: Tensor) -> Tensor:
        """(..., I) sum over the intervals of the same line from each on."""
        if self.lines is None:
            return x.flip(-1).cumsum(-1).flip(-1)
        return _sum_to(x.flip(-1), self.lines.behind.flip(0)).flip(-1)


@dataclass
class Lines:
    """The lines of the G groups that have positives, and one more without edges for all others."""

    groups: Tensor  # (G,) ascending
    own: Tensor  # (P,) int64: the line of each positive
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
        size = (self.groups.numel() + 1) * (self.codes.numel() + 1)
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
    # In rows: the negatives, the positives, and the positives' values.
    number, distance = torch.zeros((2, 3, size), dtype=torch.float64, device=scores.device)
    unordered = torch.zeros((), dtype=torch.bool, device=scores.device)
    groups = groups or [None] * len(logits)
    for level, target, group in zip(logits, targets, groups, strict=True):
        for _, _, part, line in _relevant(level, target, group, edges, ignore_index):
            negatives = part.reshape(-1)
            interval = _look_up(negatives, edges, line)
            number[0] += interval.bincount(minlength=size)
            if delta > 0:
                offset = _offset(negatives, interval, edges)
                distance[0] += interval.bincount(offset, minlength=size)
            unordered |= negatives.amax().isnan()
    interval = _look_up(scores, edges, edges.lines and edges.lines.own)
    values = torch.stack([torch.ones_like(values), values]).double()
    offset = _offset(scores, interval, edges)
    for row, weights in enumerate(values, start=1):
        number[row] = interval.bincount(weights, minlength=size)
        if delta > 0:
            distance[row] = interval.bincount(weights * offset, minlength=size)

    from_start = edges.sum_from_above(number)
    nfp, *others = _window_mean(edges, from_start, number, distance, delta)
    others = torch.stack(others) - values * (1.0 if delta == 0 else 0.5)  # what i sees of itself
    # Where nobody else stands at or above the window, that must be 0, not its rounding.
    others.masked_fill_(from_start[1, edges.lower] == 1, 0.0)

    # NaN has no place in any order, so it leaves no number standing that it was compared with.
    unranked = scores.isnan().any()
    nfp = nfp.masked_fill(unranked | unordered, torch.nan)
    others, value_sum = others.masked_fill_(unranked, torch.nan)
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
            negatives = part.reshape(-1)
            interval = _look_up(negatives, edges, line)
            if delta == 0:
                total = value.to(out.dtype).index_select(0, interval)
            else:
                offset = _offset(negatives, interval, edges)
                rise = offset.mul_(slope.index_select(0, interval))
                total = rise.add_(value.index_select(0, interval)).to(out.dtype)
            out[where][at] = total.view(part.shape)
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
    order = high.argsort(stable=True)
    if low.any():
        order = low.argsort(stable=True)
        order = order[high[order].argsort(stable=True)]
    high, low = high[order], low[order]
    key = _round_up(high, low, scores.dtype)

    at = torch.arange(1, order.numel() + 1, device=order.device)
    lines, number = None, order.numel() + 1
    if own_groups is not None:
        lines, place, line = _lines(own_groups, order)
        order, high, low = order[place], high[place], low[place]
        # Each line has an interval before its first edge.
        at += line
        number += lines.groups.numel()
    start = torch.empty_like(order).index_copy_(0, order, at)
    lower, upper = start.chunk(2)

    def placed(x: Tensor) -> Tensor:
        return x.new_zeros(number).index_copy_(0, at, x)

    return Edges(key, placed(high), placed(low), lower, upper, lines)


def _lines(own_groups: Tensor, order: Tensor) -> tuple[Lines, Tensor, Tensor]:
    """Puts the edges, in ascending order, line by line.

    Returns:
        The lines; the places among all edges of the edges line by line; and their lines.
    """
    groups, own = own_groups.unique(return_inverse=True)
    line, place = own.repeat(2)[order].sort(stable=True)
    intervals = line.bincount(minlength=groups.numel() + 1) + 1
    end = intervals.cumsum(0).repeat_interleave(intervals)
    behind = end - 1 - torch.arange(end.numel(), device=end.device)
    before = intervals.repeat_interleave(intervals) - 1 - behind
    codes = line * (order.numel() + 1) + place + 1
    return Lines(groups, own, codes, before, behind), place, line


def _round_up(high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of `dtype` that is not below high + low."""
    key = high.to(dtype)
    short = (high - key) + low > 0  # the difference is exact
    key = torch.where(short, key.nextafter(key.new_full((), torch.inf)), key)
    # Beyond all scores one number is as good as another: these leave room for `BELOW`.
    return key.clamp(-2 * LARGEST, 2 * LARGEST)


def _relevant(
    logits: Tensor, targets: Tensor, groups: Tensor | None, edges: Edges, ignore_index: int
) -> Iterator[tuple[Index, Index, Tensor, Tensor | None]]:
    """Cuts a level into parts that hold all negatives not wholly below min_P(s) - delta.

    Late in training few logits are relevant, and those are picked out. Where many are, picking
    costs more than it saves: a part holds all logits of its places. Either way, what is no negative
    is put below all edges.

    Returns:
        For each part where it stands, as an index into an index of the level; its finite scores, of
        the shape that the two indices give; and their lines, flattened.
    """
    lowest = edges.key[0]
    for rows, places, block, block_targets in blocks(logits, targets, SURVEY):
        where = rows, slice(None), places
        block_groups = None if groups is None else groups[rows, ..., places]
        flat = block.reshape(-1)
        columns = _not_below(finite(_column_maxima(flat)), lowest)
        if columns.numel() * FOLD > MOST * flat.numel():
            scores = finite(block)
            exclude_non_negatives(scores, block_targets, ignore_index, fill=BELOW)
            for row, place, part, _ in blocks(scores, block_targets):
                line = None
                if groups is not None:
                    line = edges.lines.of(block_groups[row, ..., place])
                    line = over_classes(line, part).reshape(-1)
                yield where, (row, slice(None), place), part, line
            continue
        for some in columns.split(layout.CHUNK // FOLD):
            at = _in_columns(flat, some)
            scores = finite(flat.index_select(0, at))
            found = _not_below(scores, lowest)
            if found.numel():
                at, scores = unravel(at[found], block.shape), scores[found]
                negative = is_negative(at, block_targets, ignore_index)
                line = None
                if groups is not None:
                    line = edges.lines.of(at_logits(block_groups, at))
                yield where, at, scores.where(negative, BELOW), line


def _column_maxima(x: Tensor) -> Tensor:
    """The highest of each column, if x (n,) stands in `FOLD` rows, the last of them shorter."""
    step = -(-x.numel() // FOLD)
    rest = x.numel() % step
    highest = x[: x.numel() - rest].view(-1, step).amax(0)
    if rest:
        torch.maximum(highest[:rest], x[-rest:], out=highest[:rest])
    return highest


def _not_below(x: Tensor, bound: Tensor) -> Tensor:
    """Where x (n,) is at least `bound`, or NaN; int64."""
    return (x < bound).logical_not_().nonzero()[:, 0]


def _in_columns(x: Tensor, columns: Tensor) -> Tensor:
    """The places in x of what stands in some columns, int64."""
    step = -(-x.numel() // FOLD)
    at = (torch.arange(0, x.numel(), step, device=x.device)[:, None] + columns).view(-1)
    return at if x.numel() % step == 0 else at[at < x.numel()]


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
        at = _in_columns(below, (_column_maxima(below) == OPEN).nonzero()[:, 0])
        at = at[below.index_select(0, at) == OPEN]
        search = torch.bucketize(scores[at], edges.key, right=True, out_int32=True)
        below.index_copy_(0, at, search)
    return below if line is None else edges.lines.interval(line, below)


def _offset(scores: Tensor, interval: Tensor, edges: Edges) -> Tensor:
    """Float64 distances to `high` of the interval's lower edge."""
    return scores.to(torch.float64, copy=True).sub_(edges.high.index_select(0, interval))


def _cell(scores: Tensor, key: Tensor) -> Tensor:
    """The cell of each score, int32: they cut the line between the outer edges.

    The first and the last hold what lies outside, where no edge is, and the last NaN.
    """
    cells = _number_of_cells(key)
    width = (key[-1] - key[0]).clamp(min=torch.finfo(key.dtype).tiny * cells) / (cells - 3)
    cell = (scores - (key[0] - 1.5 * width)).mul_(1 / width).clamp_(0, cells - 1)
    return cell.nan_to_num_(cells - 1).to(torch.int32)


def _number_of_cells(key: Tensor) -> int:
    return max(CELLS, CELLS_PER_EDGE * key.numel())


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
        return from_start[..., edges.lower]
    from_end = pad(from_start[..., 1:], (0, 1))
    inside = (distance - number * edges.low).where(edges.width > 0, 0.0)
    area = edges.sum_from_above(from_end * edges.width + inside)
    return (area[..., edges.lower] - area[..., edges.upper]) / (2 * delta)


def _sum_to(x: Tensor, before: Tensor) -> Tensor:
    """(..., I) running sums that start anew with each line.

    By doubling: after a round of length n each sum holds the last 2n summands of its line. So
    nothing of another line is ever added, which would have to be taken away again.
    """
    x = x.clone()
    length = 1
    while length <= int(before.max()):
        x[..., length:] += x[..., :-length].where(before[length:] >= length, 0)
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
