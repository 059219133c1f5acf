"""l(i), l*(i) and Z of each loss: all that tells one ranking loss from another.

An errors function takes `Counts` and returns `Errors`; Algorithm 1 (`error_driven`) does the rest.
The sorting error of Rank & Sort lies among the positives and takes `SortingCounts` besides.
Its vectors are (P,) float64 and may hold padding, whose entries are masked out afterwards.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class SortingCounts:
    """The positives that i sees above itself, told apart by their quality q; (P,) float64."""

    worse: Tensor  # sum_{k in P, q_k < q_i} H(x_ik): what the sorting error is spread over
    better: Tensor  # sum_{k in P, k != i, q_k >= q_i} H(x_ik)
    better_values: Tensor  # sum_{k in P, k != i, q_k >= q_i} values(k) H(x_ik)


class Errors(NamedTuple):
    """A loss L = (1/Z) sum_i l(i), with the targets l*(i) that a perfect ranking would reach."""

    error: Tensor  # l(i), (P,)
    target: Tensor | float  # l*(i), (P,), or the same for all
    normaliser: Tensor | float  # Z, scalar


def ap_errors(counts: Counts) -> Errors:
    """Return the errors of AP Loss, Eq. 2: l = NFP / rank, the missing precision; l* = 0."""
    return Errors(counts.nfp / counts.rank, 0.0, counts.num_positives)


def alrp_errors(counts: Counts) -> Errors:
    """Return the errors of aLRP Loss, Eq. 10: l = (NFP + Eloc + S) / rank; l* = Eloc / rank.

    The values are Eloc.
    """
    rank = counts.rank
    own = counts.values / rank
    return Errors((counts.nfp + counts.value_sum) / rank + own, own, counts.num_positives)


def ndcg_errors(counts: Counts) -> Errors:
    """Return the errors of NDCG Loss with binary relevance.

    l = Gmax/|P| - 1/log2(1 + rank), l* is the same at rank+, and Z = Gmax.

    Gmax is the sum of the discounts 1/log2(1 + r) of the first |P| ranks r.
    """
    place = torch.arange(1, counts.nfp.numel() + 1, dtype=torch.float64, device=counts.nfp.device)
    ideal = _discount(place).where(place <= counts.num_positives, 0.0).sum()
    each = ideal / counts.num_positives
    return Errors(each - _discount(counts.rank), each - _discount(counts.rank_positive), ideal)


def _discount(rank: Tensor) -> Tensor:
    return 1 / torch.log2(1 + rank)


def sorting_errors(counts: Counts, sorting: SortingCounts) -> Errors:
    """Return the sorting error of Rank & Sort, with values = 1 - q.

    l is their mean over i and the positives above it, l* the mean over those of them with
    q_k >= q_i. (Its ranking error is that of AP Loss.)
    """
    current = (counts.values + counts.value_sum) / counts.rank_positive
    current = torch.add(current, counts.nfp, alpha=0)  # NaN, if it is: a negative was no number
    target = (counts.values + sorting.better_values) / (1 + sorting.better)
    return Errors(current, target, counts.num_positives)
