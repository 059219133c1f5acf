"""Sums of floats that have the same bits from run to run, on any device.

A CPU adds in the order of the entries. Elsewhere `cumsum` and a weighted `bincount` add in the
order in which threads happen to come, so there all is added by doubling (`sum_along`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def adds_in_order(device: torch.device) -> bool:
    """Return whether torch's own sums are the same from run to run there."""
    return device.type == "cpu"


def running_sum(x: Tensor) -> Tensor:
    """Return prefix sums (..., I) along the last dimension."""
    if adds_in_order(x.device):
        return x.cumsum(-1)
    return sum_along(x, torch.arange(x.shape[-1], device=x.device))


def sum_along(x: Tensor, before: Tensor) -> Tensor:
    """Return prefix sums (..., I) that start anew wherever `before` (I,) is 0.

    It counts the summands of each segment before a place.

    By doubling: after a round of length n each sum holds the last 2n summands of its segment. So
    nothing of another segment is ever added, which would have to be taken away again.
    """
    x = x.clone()
    length = 1
    while length <= int(before.max()):
        x[..., length:] += x[..., :-length].where(before[length:] >= length, 0)
        length *= 2
    return x


def sum_by_place(x: Tensor, place: Tensor, size: int) -> Tensor:
    """Sum, at each place, those of x (n,), n > 0, that have it (n,): (size,) float64."""
    if adds_in_order(x.device):
        return place.bincount(x, minlength=size)
    place, order = place.sort(stable=True)
    number = place.bincount(minlength=size)
    end = number.cumsum(0)
    before = torch.arange(order.numel(), device=x.device) - (end - number).index_select(0, place)
    sums = pad(sum_along(x.double().index_select(0, order), before), (1, 0))
    return sums.index_select(0, end.where(number > 0, 0))
