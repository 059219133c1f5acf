"""What a call costs with each algorithm, and so which of them "auto" takes on a GPU.

An algorithm has a few terms by which its cost grows, and a price in seconds for each. The prices
are fitted to what was measured on a GPU (`perf.autotune`, read by `tuned`), or estimated here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PairwiseCosts(NamedTuple):
    """Prices, in seconds of a forward and backward, where every positive meets every logit."""

    call: float  # launches
    logit: float  # read twice, and its gradient written
    pair: float  # a positive and a logit
    own_pair: float  # a positive and a positive, in float64

    @staticmethod
    def terms(positives: int, logits: int) -> tuple[int, ...]:
        """Return how much a call has of what is priced."""
        return 1, logits, positives * logits, positives * positives

    def seconds(self, positives: int, logits: int) -> float:
        """Return the seconds of a call of P positives and N logits."""
        return _sum_up(self, self.terms(positives, logits))


class BreakpointCosts(NamedTuple):
    """Prices, in seconds of a forward and backward, where a logit is looked up."""

    call: float
    logit: float  # a look-up, and another in backward
    positive: float  # two breakpoints to sort and to sum along

    @staticmethod
    def terms(positives: int, logits: int) -> tuple[int, ...]:
        """Return how much a call has of what is priced."""
        return 1, logits, positives

    def seconds(self, positives: int, logits: int) -> float:
        """Return the seconds of a call of P positives and N logits."""
        return _sum_up(self, self.terms(positives, logits))


class Costs(NamedTuple):
    """Of both algorithms. What groups add to a logit, a pair and a positive is in neither."""

    pairwise: PairwiseCosts
    breakpoints: BreakpointCosts

    def choose(self, positives: int, logits: int) -> str:
        """Return the cheaper algorithm for P positives (padding too: the host knows no better)."""
        pairwise = self.pairwise.seconds(positives, logits)
        breakpoints = self.breakpoints.seconds(positives, logits)
        return "pairwise" if pairwise <= breakpoints else "breakpoints"


def default_costs(dtype: torch.dtype) -> Costs:
    """Return costs for logits of a dtype on an unknown GPU: estimates, not measured.

    From the instructions that the kernels compile to on sm_90 (4.8 a pair; 105 a float32 logit, 35
    a 16-bit one, rounded up; 130 a float64 pair, which has no short way), at the rate of an H200,
    and from the number of launches. PairwiseCosts reads behind its pairs, where there are enough
    for the choice to matter; a pair in float64 takes four times as long. Only the ratios matter.
    """
    if dtype == torch.float64:
        return Costs(PairwiseCosts(4e-5, 0.0, 5e-12, 2e-11), BreakpointCosts(1.2e-4, 4e-11, 2e-9))
    logit = 7e-12 if dtype == torch.float32 else 3e-12
    return Costs(PairwiseCosts(4e-5, 0.0, 1.7e-13, 6.8e-13), BreakpointCosts(1.2e-4, logit, 2e-9))


def _sum_up(prices: tuple[float, ...], terms: tuple[int, ...]) -> float:
    return sum(price * term for price, term in zip(prices, terms, strict=True))
