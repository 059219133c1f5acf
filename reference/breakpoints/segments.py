"""A segment of scores for each group, ranked by itself.

The segments lie one behind the other, and every sum along them starts anew with each group. Each
has an interval before its first breakpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Groups times breakpoints up to which a table tells the place of a breakpoint on the segment of a
# group.
TABLE = 1 << 22

# Numbers from the lowest to the highest group up to which a table tells the segment of each.
NUMBERS = 1 << 20


@dataclass
class Segments:
    """The segments of the G groups with positives, and one without breakpoints for all others."""

    groups: Tensor  # (G,) ascending
    positives: Tensor  # (P,) int64: the segment of each positive
    codes: Tensor  # (E,) ascending: (E + 1) segment + place among all breakpoints, from 1 on
    before: Tensor  # (I,) int64: how many intervals of the segment stand before each
    behind: Tensor  # (I,) int64: and how many behind it

    def of(self, groups: Tensor) -> Tensor:
        """Return the segment of each group, int64."""
        groups = groups.to(self.groups.dtype).contiguous()
        first, last = self._range
        if last - first < NUMBERS:
            place = groups.clamp(first, last).sub_(first)
            return self._segment_of_number.index_select(0, place.view(-1)).view(place.shape)
        segment = torch.searchsorted(self.groups, groups)
        nobody = self.groups.numel()
        return segment.where(self.groups[segment.clamp(max=nobody - 1)] == groups, nobody)

    @cached_property
    def _range(self) -> tuple[int, int]:
        """A number below all groups and one above them, unless int64 has none."""
        limits = torch.iinfo(self.groups.dtype)
        lowest, highest = int(self.groups[0].item()), int(self.groups[-1].item())
        return max(lowest - 1, limits.min), min(highest + 1, limits.max)

    @cached_property
    def _segment_of_number(self) -> Tensor:
        """The segment of each number of the range."""
        first, last = self._range
        nobody = self.groups.numel()
        segment = self.groups.new_full((last - first + 1,), nobody)
        return segment.index_copy_(
            0, self.groups - first, torch.arange(nobody, device=segment.device)
        )

    def interval(self, segment: Tensor, below: Tensor) -> Tensor:
        """Return the interval (int32) of scores, from how many breakpoints lie below each."""
        code = segment * (self.codes.numel() + 1) + below
        if self._table is None:
            breakpoints = torch.searchsorted(self.codes, code, right=True, out_int32=True)
        else:
            breakpoints = self._table.index_select(0, code)
        return breakpoints.add_(segment)

    @cached_property
    def _table(self) -> Tensor | None:
        """(G + 1) (E + 1) int32: how many codes lie at or below each; None if that is too many."""
        size = (self.groups.numel() + 1) * (self.codes.numel() + 1)
        if size > TABLE:
            return None
        return self.codes.bincount(minlength=size).cumsum(0).to(torch.int32)


def sort_segments(
    positive_groups: Tensor, by_score: Tensor, place: Tensor
) -> tuple[Segments, Tensor]:
    """Put the breakpoints in order segment by segment.

    Args:
        positive_groups: (P,) int64.
        by_score: (P,) int64, the positives in order.
        place: (1 or 2, P) int64, the places of their breakpoints among all breakpoints.

    Returns:
        The segments; and the intervals that the breakpoints start, in the shape of `place`.
    """
    groups, segments = positive_groups.unique(return_inverse=True)
    by_place = segments.index_select(0, by_score).expand_as(place)
    in_order = torch.empty_like(place).view(-1)
    in_order[place.view(-1)] = by_place.reshape(-1)
    segment, order = in_order.sort(stable=True)
    # Each segment has an interval before its first breakpoint.
    interval = torch.empty_like(order)
    interval[order] = torch.arange(1, order.numel() + 1, device=order.device) + segment

    intervals = segment.bincount(minlength=groups.numel() + 1) + 1
    end = intervals.cumsum(0).repeat_interleave(intervals)
    behind = end - 1 - torch.arange(end.numel(), device=end.device)
    before = intervals.repeat_interleave(intervals) - 1 - behind
    codes = segment * (order.numel() + 1) + order + 1
    return Segments(groups, segments, codes, before, behind), interval[place]
