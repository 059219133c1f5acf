"""A line of scores for each group, ranked by itself.

The lines lie one behind the other, and every sum along them starts anew with each group. Each has
an interval before its first edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Groups times edges up to which a table tells the place of an edge on the line of a group.
TABLE = 1 << 22

# Numbers from the lowest to the highest group up to which a table tells the line of each.
NUMBERS = 1 << 20


@dataclass
class Lines:
    """The lines of the G groups that have positives, and one more without edges for all others."""

    groups: Tensor  # (G,) ascending
    own: Tensor  # (P,) int64: the line of each positive
    codes: Tensor  # (E,) ascending: (E + 1) line + place among all edges, from 1 on
    before: Tensor  # (I,) int64: how many intervals of the line stand before each
    behind: Tensor  # (I,) int64: and how many behind it

    def of(self, groups: Tensor) -> Tensor:
        """The line of each group, int64."""
        groups = groups.to(self.groups.dtype).contiguous()
        first, last = self._range
        if last - first < NUMBERS:
            place = groups.clamp(first, last).sub_(first)
            return self._line_of_number.index_select(0, place.view(-1)).view(place.shape)
        line = torch.searchsorted(self.groups, groups)
        nobody = self.groups.numel()
        return line.where(self.groups[line.clamp(max=nobody - 1)] == groups, nobody)

    @cached_property
    def _range(self) -> tuple[int, int]:
        """A number below all groups and one above them, unless int64 has none."""
        limits = torch.iinfo(self.groups.dtype)
        lowest, highest = int(self.groups[0].item()), int(self.groups[-1].item())
        return max(lowest - 1, limits.min), min(highest + 1, limits.max)

    @cached_property
    def _line_of_number(self) -> Tensor:
        """The line of each number of the range."""
        first, last = self._range
        nobody = self.groups.numel()
        line = self.groups.new_full((last - first + 1,), nobody)
        return line.index_copy_(0, self.groups - first, torch.arange(nobody, device=line.device))

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
        """(G + 1) (E + 1) int32: how many codes lie at or below each; None if that is too many."""
        size = (self.groups.numel() + 1) * (self.codes.numel() + 1)
        if size > TABLE:
            return None
        return self.codes.bincount(minlength=size).cumsum(0).to(torch.int32)


def sort_lines(own_groups: Tensor, by_score: Tensor, place: Tensor) -> tuple[Lines, Tensor]:
    """Puts the edges line by line.

    Args:
        own_groups: (P,) int64.
        by_score: (P,) int64, the positives in order.
        place: (1 or 2, P) int64, the places of their edges among all edges.

    Returns:
        The lines; and the intervals that the edges start, in the shape of `place`.
    """
    groups, own = own_groups.unique(return_inverse=True)
    own_line = own.index_select(0, by_score).expand_as(place)
    in_order = torch.empty_like(place).view(-1)
    in_order[place.view(-1)] = own_line.reshape(-1)
    line, order = in_order.sort(stable=True)
    # Each line has an interval before its first edge.
    interval = torch.empty_like(order)
    interval[order] = torch.arange(1, order.numel() + 1, device=order.device) + line

    intervals = line.bincount(minlength=groups.numel() + 1) + 1
    end = intervals.cumsum(0).repeat_interleave(intervals)
    behind = end - 1 - torch.arange(end.numel(), device=end.device)
    before = intervals.repeat_interleave(intervals) - 1 - behind
    codes = line * (order.numel() + 1) + order + 1
    return Lines(groups, own, codes, before, behind), interval[place]
