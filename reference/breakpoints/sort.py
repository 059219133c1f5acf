"""The positives' breakpoints in order, the intervals that they cut, and the interval of any score.

A breakpoint, s_i - delta or s_i + delta, is where positive i changes its mind about a score
(`breakpoints`). It is kept as the unevaluated sum `high + low` of two floats, which is exact, so no
breakpoint is ever rounded to the wrong side of a score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import LARGEST
from .block_maxima import find
from .segments import Segments, sort_segments
from .sums import running_sum, sum_along
from .workspace import Workspace

# Cells of the table that tells most scores their interval without a search.
CELLS = 1 << 16
CELLS_PER_BREAKPOINT = (
    4  # if that is more: with 50,000 positives 2^16 would leave most to the search
)
SCORES_PER_CELL = 4  # at least so many: fewer scores do not pay for a table as fine as that
FEWEST_CELLS = 64
MOST_CELLS = 1 << 24  # so that each has its number in float32

# Most breakpoints are all but one in so many at either end. Where all together reach so many times
# as far as most, the cells reach so many times the length of most beyond these.
AT_AN_END = 8
FAR = 1024
REACH = 8

# So few scores are searched for one by one, and sorted as they are: the table, or integers made of
# them, would cost more.
SEARCH_BELOW = 1 << 14

# Below all breakpoints, and finite in every dtype: where something is put that shall count nowhere.
BELOW_ALL = -4 * LARGEST

# Added to what a cell holds if a breakpoint falls into it. More than any number of breakpoints.
HAS_BREAKPOINT = 1 << 30


@dataclass
class Breakpoints:
    """The E breakpoints in ascending order, and the intervals that they cut.

    A positive has two, or one under the hard step. Each breakpoint ends an interval on the segment
    of its group and starts the next one. Intervals are numbered segment by segment, I = E + 1 of
    them without groups.
    """

    key: Tensor  # (E,) the smallest number of the scores' dtype that is not below the breakpoint
    high: Tensor  # (I,) float64; high + low is, exactly, where each interval starts
    low: Tensor  # (I,) float64; the first interval of a segment has no start: 0
    lower: Tensor  # (P,) int64: the interval that starts at s_i - delta
    upper: Tensor  # (P,) int64: the interval that starts at s_i + delta
    segments: Segments | None  # None without groups
    cells: int  # of the table

    @cached_property
    def width(self) -> Tensor:
        """(I,) float64; 0 outside all windows, where nothing depends on it."""
        change = torch.zeros_like(self.high)
        change.index_fill_(0, self.lower, 1.0).index_fill_(0, self.upper, -1.0)
        inside = self.running_sum(change)[:-1] > 0
        return pad((self.high.diff() + self.low.diff()).where(inside, 0.0), (0, 1))

    def running_sum(self, x: Tensor) -> Tensor:
        """Return the prefix sum (..., I) over the intervals of the same segment up to each."""
        return running_sum(x) if self.segments is None else sum_along(x, self.segments.before)

    def sum_from_above(self, x: Tensor) -> Tensor:
        """Return the sum (..., I) over the intervals of the same segment from each on."""
        if self.segments is None:
            return running_sum(x.flip(-1)).flip(-1)
        return sum_along(x.flip(-1), self.segments.behind.flip(0)).flip(-1)

    @cached_property
    def lowest(self) -> float:
        """The smallest logit that is not below all breakpoints; -inf is ranked as -`LARGEST`."""
        first = self.key[0].item()
        return first if first > -LARGEST else -torch.inf

    def look_up(
        self, scores: Tensor, segment: Tensor | None, workspace: Workspace, ordered: bool = False
    ) -> Tensor:
        """Return the interval of each score (n,) on its segment, int32.

        Most scores fall into a cell of the line of scores that no breakpoint falls into, where the
        table knows how many breakpoints lie below. Where a cell ends does not matter, since `_cell`
        keeps order: a breakpoint in a lower cell is below the score, one in a higher cell above it.

        Args:
            scores: in the dtype of the breakpoints; NaN are given some interval.
            segment: int64; None without groups.
            workspace: where the intervals may stand.
            ordered: whether it is known that no score is NaN.
        """
        if scores.numel() < SEARCH_BELOW:
            below = torch.bucketize(scores, self.key, right=True, out_int32=True)
        else:
            cell = self._cell(scores, workspace, ordered)
            below = workspace("below", cell, torch.int32)
            torch.index_select(self._cells, 0, cell, out=below)
            at = find(below, lambda x: x >= HAS_BREAKPOINT)
            found = self._search(scores.index_select(0, at), cell.index_select(0, at))
            below.index_copy_(0, at, found)
        if segment is None:
            return below
        assert self.segments is not None  # `segment` comes from them
        return self.segments.interval(segment, below)

    def _search(self, scores: Tensor, cell: Tensor) -> Tensor:
        """Return how many breakpoints lie below each score of a cell, int32.

        Mostly all that lie below the end of the cell, or one less.
        """
        below = self._cells.index_select(0, cell) % HAS_BREAKPOINT
        below -= (scores < self._last.index_select(0, below)).int()
        at = (scores < self._last.index_select(0, below)).nonzero()[:, 0]
        search = torch.bucketize(scores.index_select(0, at), self.key, right=True, out_int32=True)
        return below.index_copy_(0, at, search)

    @cached_property
    def _last(self) -> Tensor:
        """(E + 1,) the highest of so many breakpoints: of none, below all scores."""
        return pad(self.key, (1, 0), value=-torch.inf)

    @cached_property
    def _cells(self) -> Tensor:
        """int32: how many breakpoints lie below the end of each cell.

        `HAS_BREAKPOINT` is added where one lies inside.
        """
        inside = self._cell(self.key, Workspace(), ordered=True)
        inside = inside.bincount(minlength=self.cells)
        return inside.cumsum(0).add_(inside.clamp_(max=1), alpha=HAS_BREAKPOINT).to(torch.int32)

    @cached_property
    def _grid(self) -> tuple[float, float]:
        """Where the cells begin, and how many there are to a unit of the score.

        They reach from below all breakpoints to above them; but where a few breakpoints are far
        away, from below most to above most, or these would share a few cells. Scores beyond have
        the first cell or the last, where they are searched for.
        """
        first, last = self.key[0].item(), self.key[-1].item()
        few = max(2, self.key.numel() // AT_AN_END)
        if self.key.numel() > 2 * few:
            low, high = self.key[few].item(), self.key[-1 - few].item()
            if 0 < FAR * (high - low) < last - first:
                reach = REACH * (high - low)
                first, last = max(first, low - reach), min(last, high + reach)
        unit = torch.finfo(self.key.dtype)
        margin = max(
            1.5 * (last - first) / (self.cells - 4),
            2 * unit.eps * max(-first, last),
            self.cells * unit.tiny,
        )
        return first - margin, (self.cells - 1) / (last - first + 2 * margin)

    def _cell(self, scores: Tensor, workspace: Workspace, ordered: bool) -> Tensor:
        """Return the cell of each score (n,), int32; cells cut the line where the breakpoints are.

        Each of the four steps keeps order, however it is rounded. The clamp is the last before the
        place is cut to an integer, and `MOST_CELLS` is exact in every dtype: so no score, at
        infinity or beside the breakpoints by a rounding, has a cell that is not in the table.
        """
        begin, per_unit = self._grid
        place = torch.sub(scores, begin, out=workspace("place", scores, scores.dtype))
        place.mul_(per_unit).clamp_(0, self.cells - 1)
        if not ordered:
            place.nan_to_num_()
        return workspace("cell", scores, torch.int32).copy_(place)


@dataclass
class Steps:
    """A function of the score that is constant in each interval."""

    breakpoints: Breakpoints
    values: Tensor  # (I,)

    def __call__(
        self, scores: Tensor, segment: Tensor | None, workspace: Workspace, ordered: bool = False
    ) -> Tensor:
        """Return the values (n,) of scores: arguments as of `Breakpoints.look_up`.

        Most scores need not know their interval: a table by cells tells the value.
        """
        if segment is not None or scores.numel() < SEARCH_BELOW:
            interval = self.breakpoints.look_up(scores, segment, workspace, ordered)
            return self.values.index_select(0, interval)
        cell = self.breakpoints._cell(scores, workspace, ordered)
        found = workspace("of cell", cell, self.values.dtype)
        torch.index_select(self._cells, 0, cell, out=found)
        at = find(found, torch.isnan)
        interval = self.breakpoints._search(scores.index_select(0, at), cell.index_select(0, at))
        return found.index_copy_(0, at, self.values.index_select(0, interval))

    @cached_property
    def _cells(self) -> Tensor:
        """The value in each cell, NaN where a breakpoint falls into it."""
        below = self.breakpoints._cells
        return self.values.index_select(0, below % HAS_BREAKPOINT).masked_fill_(
            below >= HAS_BREAKPOINT, torch.nan
        )


def sort_breakpoints(
    scores: Tensor, delta: float, positive_groups: Tensor | None = None, looked_up: int = 0
) -> Breakpoints:
    """Sort the breakpoints of positives with finite scores (P,), on the segments of their groups.

    NaN stands in front of everything, which keeps what is made of the breakpoints finite.

    Args:
        looked_up: about how many scores will be, which decides how fine the table is.
    """
    scores = scores.nan_to_num(nan=LARGEST)
    by_score = _argsort(scores)
    ascending = scores.index_select(0, by_score)
    # All that follows has a row for the lower breakpoints and one for the upper breakpoints,
    # ascending, and until they are merged one for the bounds of `_merge`. Under the hard step it
    # has one row.
    high = ascending.double()[None]
    low, key = torch.zeros_like(high), ascending[None]
    place = torch.arange(scores.numel(), device=scores.device)[None]
    if delta > 0:
        high, low = _sum(high, high.new_tensor([[-delta], [delta], [-2 * delta]]))
        key = _round_up(high, low, scores.dtype)
        place = _merge(ascending, key[2])
        high, low, key = high[:2], low[:2], key[:2]

    at, segments, number = place + 1, None, place.numel() + 1
    if positive_groups is not None:
        segments, at = sort_segments(positive_groups, by_score, place)
        number += segments.groups.numel()
    start = torch.empty_like(at).scatter_(1, by_score.expand_as(at), at)

    def put(x: Tensor, size: int, places: Tensor) -> Tensor:
        return x.new_zeros(size).index_copy_(0, places.view(-1), x.reshape(-1))

    return Breakpoints(
        key=put(key, place.numel(), place),
        high=put(high, number, at),
        low=put(low, number, at),
        lower=start[0],
        upper=start[-1],
        segments=segments,
        cells=min(
            max(CELLS, CELLS_PER_BREAKPOINT * place.numel()),
            max(FEWEST_CELLS, looked_up // SCORES_PER_CELL),
            MOST_CELLS,
        ),
    )


def _argsort(scores: Tensor) -> Tensor:
    """Sort stably. Many are sorted as integers, several times faster."""
    if scores.numel() < SEARCH_BELOW:
        return scores.argsort(stable=True)
    as_int = torch.int64 if scores.dtype == torch.float64 else torch.int32
    bits = (scores + 0.0).view(as_int)  # -0 as 0
    falling = bits >> (torch.iinfo(as_int).bits - 1)  # all bits set where the score is negative
    return (bits ^ (falling & torch.iinfo(as_int).max)).sort(stable=True).indices


def _merge(scores: Tensor, bound: Tensor) -> Tensor:
    """Return places of all lower and all upper breakpoints, (2, P) int64, of positives in order.

    The upper breakpoint of k lies below the lower breakpoint of i where s_k < s_i - 2 delta, and so
    below `bound` (P,), the smallest score that is not less. Equal ones keep the order of the
    scores.
    """
    order = _argsort(torch.cat([bound, scores]))
    place = torch.arange(order.numel(), device=order.device)
    return torch.empty_like(order).index_copy_(0, order, place).view(2, -1)


def _sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return (high, low): the sum in float64, and what rounding took from it (Knuth's two-sum)."""
    high = x + y
    moved = high - x
    return high, (x - (high - moved)) + (y - moved)


def _round_up(high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the smallest number of `dtype` that is not below high + low."""
    key = high.to(dtype)
    short = (high - key) + low > 0  # the difference is exact
    key = torch.where(short, key.nextafter(key.new_full((), torch.inf)), key)
    # Beyond all scores one number is as good as another: these are above `BELOW_ALL`.
    return key.clamp(-2 * LARGEST, 2 * LARGEST)
