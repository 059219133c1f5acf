"""Whether a candidate of the tuner computes what it should: asked before any time is taken.

The measure is that of every kernel (`budgets`); what does not depend on the sizes is computed once
for all candidates.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from alrp_triton.kernels import breakpoints, pairwise
from alrp_triton.kernels.tuning.block_sizes import BreakpointTiles, Tiles
from alrp_triton.testing.cases import Size, draw_case, poisoned, truth_for, worst, worst_of
from alrp_triton.testing.kernel_tolerance import (
    Case,
    CountTerms,
    GradientTerms,
    count_budget,
    count_terms,
    gradient_budget,
    gradient_terms,
)
from alrp_triton.testing.launches import same

from .candidates import Goal


def draw(goal: Goal, device: torch.device) -> Case:
    """Draw the call that stands for a class."""
    return draw_call(goal.positives, goal.logits, goal.stage, goal.dtype, device)


def draw_call(
    positives: int, logits: int, stage: str, dtype: torch.dtype, device: torch.device
) -> Case:
    """Draw a call of P positives and about N logits.

    It has 80 classes where each positive has anchors.
    """
    classes = 80 if logits >= 160 * positives else 2
    return draw_case(Size(logits // classes, classes, positives), stage, dtype, device)


class Verifier:
    """Holds results of one call to the truth."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._reference = truth_for(case)
        if not self._count_terms.on_slope[0].any():
            raise ValueError("no negative is near a positive: an error would not show")

    def call(self, side: str, tiles: Tiles | BreakpointTiles) -> list[Tensor]:
        """Call count or gradient by the kernels that take these sizes."""
        kernels = breakpoints if isinstance(tiles, BreakpointTiles) else pairwise
        if side == "count":
            return list(kernels.count(*self.case.count_input, tiles))
        return kernels.gradient(*self.case.gradient_input, tiles)

    def refuses(self, side: str, tiles: Tiles | BreakpointTiles) -> str | None:
        """Run a candidate twice; return why it may not be chosen, or None."""
        with poisoned():
            first, second = self.call(side, tiles), self.call(side, tiles)
        ratio = (self._of_count if side == "count" else self._of_gradient)(first, tiles)
        if not ratio <= 1:  # NaN too
            return f"wrong: off by {ratio:.3g} times its budget"
        return None if same(first, second) else "two runs differ"

    def _of_count(self, got: list[Tensor], tiles: Tiles | BreakpointTiles) -> float:
        budget = count_budget(self.case, tiles, self._counts, self._count_terms)
        return worst(torch.stack(got), self._counts, budget)

    def _of_gradient(self, got: list[Tensor], tiles: Tiles | BreakpointTiles) -> float:
        truth = self._gradients
        return worst_of(got, truth, gradient_budget(self.case, tiles, truth, self._gradient_terms))

    @cached_property
    def _counts(self) -> Tensor:
        return self.case.expected_count(torch.float64, self._reference)

    @cached_property
    def _gradients(self) -> list[Tensor]:
        return self.case.expected_gradient(torch.float64, self._reference)

    @cached_property
    def _count_terms(self) -> CountTerms:
        return count_terms(self.case)

    @cached_property
    def _gradient_terms(self) -> list[GradientTerms]:
        return gradient_terms(self.case)
