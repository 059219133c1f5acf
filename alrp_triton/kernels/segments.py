"""Groups as segments: where a logit is ranked, in a number that kernels can index by.

A positive is ranked among the examples of its own group alone, so each group has a segment of
scores of its own. Groups may be any integers; with the positives sorted by group, a segment has the
number of its first positive. On the segment P nobody stands: it is that of every group without a
positive.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.layout import Batch


class Segments(NamedTuple):
    """The segment of every positive and every logit."""

    positives: Tensor  # (P,) int32
    levels: Sequence[Tensor]  # int32, like the groups; stride 0 where these have it


def segments_of(batch: Batch) -> Segments | None:
    """Look the groups up; nothing waits for the device.

    Returns:
        None without groups, and without positives, whom groups could tell apart.

    What `expand` repeats is looked up once: the image of each anchor costs as many numbers as there
    are images.
    """
    groups = batch.positive_groups
    if groups is None or groups.numel() == 0:
        return None
    ascending = groups.sort().values
    positives = torch.searchsorted(ascending, groups, out_int32=True)
    return Segments(positives, [_look_up(level, ascending) for level in batch.groups])


def by_level(
    batch: Batch, segments: Segments | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield the logits, the targets and the segments, if there are any, of each level."""
    if segments is not None:
        batch = batch._replace(groups=segments.levels)
    return batch.levels()


def _look_up(groups: Tensor, ascending: Tensor) -> Tensor:
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in groups.stride())
    names = groups[once].long().contiguous()
    segment = torch.searchsorted(ascending, names, out_int32=True)
    last = ascending.numel() - 1
    known = ascending[segment.clamp(max=last)] == names
    return segment.where(known, last + 1).expand(groups.shape)
