"""l(i), l*(i) and Z of each loss: all that tells one ranking loss from another.

An errors function takes `Counts` and returns `Errors`; Algorithm 1 (`error_driven`) does the rest.
Its vectors are (P,) float64 and may hold padding, whose entries are masked out afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """What each positive i sees at or above itself; (P,) float64 but for `num_positives`."""

    nfp: Tensor  # NFP(i) = sum_{j in N} H(x_ij)
    rank_positive: Tensor  # rank+(i) = 1 + sum_{k in P, k != i} H(x_ik)
    values: Tensor  # values(i), the caller's number for each positive (0 without any)
    value_sum: Tensor  # S(i) = sum_{k in P, k != i} values(k) H(x_ik)
    num_positives: Tensor  # |P|, float64 scalar, padding not counted

    @property
    def rank(self) -> Tensor:
        """rank(i) = rank+(i) + NFP(i), Eq. 3."""
        return self.rank_positive + self.nfp


class Errors(NamedTuple):
    """A loss L = (1/Z) sum_i l(i), with the targets l*(i) that a perfect ranking would reach."""

    error: Tensor  # l(i), (P,)
    target: Tensor  # l*(i), (P,)
    normaliser: Tensor | float  # Z, scalar


ErrorsFunction = Callable[[Counts], Errors]


def ap_errors(counts: Counts) -> Errors:
    """AP Loss, Eq. 2: l = NFP / rank, the missing precision; l* = 0."""
    return Errors(counts.nfp / counts.rank, torch.zeros_like(counts.nfp), counts.num_positives)


def alrp_errors(counts: Counts) -> Errors:
    """aLRP Loss, Eq. 10, with values = Eloc: l = (NFP + Eloc + S) / rank; l* = Eloc / rank."""
    own = counts.values / counts.rank
    return Errors((counts.nfp + counts.value_sum) / counts.rank + own, own, counts.num_positives)
