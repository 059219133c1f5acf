"""What a call costs with each algorithm, and so which of them "auto" takes on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch

# A positive meets every other one in float64, which takes about so many times as long.
_AMONG_POSITIVES = 4


class Costs(NamedTuple):
    """Seconds of a forward and backward: what any call takes, and what grows with its size."""

    pairwise: float
    pair: float  # a positive and a logit
    breakpoints: float
    logit: float  # a look-up
    positive: float  # two edges to sort and to sum along

    def choose(self, positives: int, logits: int) -> str:
        """The cheaper algorithm for P positives (padding too, since the host knows no better)."""
        pairs = positives * (logits + _AMONG_POSITIVES * positives)
        pairwise = self.pairwise + self.pair * pairs
        breakpoints = self.breakpoints + self.logit * logits + self.positive * positives
        return "pairwise" if pairwise <= breakpoints else "breakpoints"


def costs_of(dtype: torch.dtype) -> Costs:
    """For logits of a dtype on any GPU: estimates, not measured.

    From the instructions that the kernels compile to on sm_90 (4.8 a pair; 110 a float32 logit, 40
    a 16-bit one; 130 a float64 pair, which has no short way), at the rate of an H200, and from the
    number of launches. Only their ratios matter.
    """
    if dtype == torch.float64:
        return Costs(4e-5, 5e-12, 1.2e-4, 4e-11, 2e-9)
    logit = 7e-12 if dtype == torch.float32 else 3e-12
    return Costs(4e-5, 1.7e-13, 1.2e-4, logit, 2e-9)
