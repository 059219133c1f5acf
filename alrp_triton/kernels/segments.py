"""Groups as lines: where a logit is ranked, in a number that kernels can index by.

A positive is ranked among the examples of its own group alone, so each group has a line of scores
of its own. Groups may be any integers; with the positives sorted by group, a line has the number of
its first positive. On the line P nobody stands: it is that of every group without a positive.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Lines(NamedTuple):
    """The line of every positive and every logit."""

    own: Tensor  # (P,) int32
    levels: list[Tensor]  # int32, in the shapes of the targets, with stride 0 where groups have it


def lines_of(groups: Sequence[Tensor], own_groups: Tensor | None) -> Lines | None:
    """Looks the groups up; nothing waits for the device.

    Args:
        groups: integers in the shapes of the targets, for each level.
        own_groups: (P,) int64 of the positives; None without groups.

    Returns:
        None without groups, and without positives, whom groups could tell apart.

    What `expand` repeats is looked up once: the image of each anchor costs as many numbers as there
    are images.
    """
    if own_groups is None or own_groups.numel() == 0:
        return None
    ascending = own_groups.sort().values
    own = torch.searchsorted(ascending, own_groups, out_int32=True)
    return Lines(own, [_look_up(level, ascending) for level in groups])


def by_level(lines: Lines | None, levels: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The lines of each level's logits; None for each without groups."""
    return [None] * len(levels) if lines is None else lines.levels


def _look_up(groups: Tensor, ascending: Tensor) -> Tensor:
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in groups.stride())
    names = groups[once].long().contiguous()
    line = torch.searchsorted(ascending, names, out_int32=True)
    last = ascending.numel() - 1
    known = ascending[line.clamp(max=last)] == names
    return line.where(known, last + 1).expand(groups.shape)
