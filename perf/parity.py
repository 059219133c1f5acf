"""Whether a count and a gradient are right, at any size: the tuner asks before it takes a time.

The truth is `reference.breakpoints` in float64. What a kernel may be off by is derived as in the
tests of the kernels, but from sorted scores, never from all pairs: H is off by at most
`STEP_ERROR`, only inside the window of a positive, and sums are rounded as often as they add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from alrp_triton.reference import breakpoints, layout
from torch import Tensor

from alrp_triton.kernels import pairwise as kernels
from alrp_triton.kernels.tiles import Tiles
from perf.workloads import draw_logits, draw_targets

DELTA, IGNORE = 1.0, -100
_EPSILON = torch.finfo(torch.float32).eps

# In float32: half a unit in the last place of 1/2 - s scale, which a block may add (see the
# kernels), and 3/2 units of 2^-24 for the difference, the scale and the sum that are rounded.
STEP_ERROR = 2.0 ** (math.floor(math.log2(kernels.FAST_RANGE.value + 0.5)) - 24) + 0.75 * _EPSILON

# The truth's own rounding: what `breakpoints` is held to in float64.
_OF_TRUTH = 1e-9


@dataclass(frozen=True)
class Inputs:
    """A call of count and gradient on one level (anchors, classes, 1)."""

    logits: Tensor
    targets: Tensor  # (anchors, 1)
    index: Tensor  # (P,), as the next four
    scores: Tensor
    values: Tensor
    weights: Tensor
    own: Tensor

    def count(self, tiles: Tiles) -> list[Tensor]:
        """NFP, rank+ and S by the kernels."""
        levels = [self.logits], [self.targets]
        return list(kernels.count(*levels, self.scores, self.values, DELTA, IGNORE, tiles))

    def gradient(self, tiles: Tiles) -> list[Tensor]:
        """The gradient by the kernels."""
        levels = [self.logits], [self.targets]
        vectors = (self.index, self.scores, self.weights, self.own)
        return kernels.gradient(*levels, *vectors, DELTA, IGNORE, tiles)


def draw(
    dtype: torch.dtype, positives: int, logits: int, device: torch.device, stage: str
) -> Inputs:
    """P positives among about N logits, as at a stage of a training."""
    classes = 80 if logits >= 160 * positives else 2
    targets = draw_targets(logits // classes, classes, positives)
    level = draw_logits(targets, classes, stage)[:, :, None].to(device, dtype)
    targets = targets[:, None].to(device)
    index, scores = layout.locate([level], [targets], None, positives, True, IGNORE)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.rand(3, positives, generator=generator, dtype=torch.float64).to(device)
    return Inputs(level, targets, index, scores, vectors[0], vectors[1], -vectors[2])


class Judge:
    """Holds results of one call to the truth."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._scores = inputs.scores.double()
        self._logits = layout.finite(inputs.logits).double()
        if not self._count_truth[0][0].any():
            raise ValueError("no negative is near a positive: an error would not show")

    def refuses(self, side: str, tiles: Tiles) -> str | None:
        """Runs a candidate twice; why it may not be chosen, or None."""
        call = getattr(self.inputs, side)
        first, second = call(tiles), call(tiles)
        if not all(torch.equal(*pair) for pair in zip(first, second, strict=True)):
            return "two runs differ"
        truth, allowed = self._count(tiles) if side == "count" else self._gradient(tiles)
        for got, exact, budget in zip(first, truth, allowed, strict=True):
            excess = ((got.double() - exact).abs() - budget).max().item()
            if not excess <= 0:  # NaN too
                return f"wrong: {excess:.1e} beyond its budget"
        return None

    def _count(self, tiles: Tiles) -> tuple[list[Tensor], list[Tensor]]:
        truth, errors = self._count_truth
        chain = tiles.count_fold + tiles.count_rows
        chain += int(math.log2(tiles.lanes * tiles.count_warps))
        rounding = (chain * _EPSILON / 2, 0.0, 0.0)  # ranks and values are summed in float64
        return truth, [
            error + (r + _OF_TRUTH) * exact.abs()
            for exact, error, r in zip(truth, errors, rounding, strict=True)
        ]

    def _gradient(self, tiles: Tiles) -> tuple[list[Tensor], list[Tensor]]:
        exact, error = self._gradient_truth
        out = torch.finfo(self.inputs.logits.dtype)
        unit = out.eps / 2
        if self.inputs.logits.dtype == torch.bfloat16 and exact.device.type == "cpu":
            unit = out.eps  # the interpreter cuts off where a GPU rounds
        rounding = (tiles.gradient_fold + 1) * _EPSILON / 2 + _OF_TRUTH
        budget = (error + rounding * exact.abs()) * (1 + out.eps)
        budget += unit * (exact.abs() + out.smallest_normal) + _OF_TRUTH * exact.abs().max() * unit
        return [exact], [budget]

    @cached_property
    def _count_truth(self) -> tuple[list[Tensor], list[Tensor]]:
        """NFP, rank+, S, and what errors of H may add up to in each."""
        given = self.inputs
        truth = breakpoints.count(
            [self._logits], [given.targets], self._scores, given.values, DELTA, IGNORE
        )
        mask = torch.ones_like(given.logits, dtype=torch.bool)
        negatives = self._logits[layout.exclude_non_negatives(mask, given.targets, IGNORE)]
        ones = torch.ones_like(self._scores)
        points = (
            (negatives, torch.ones_like(negatives)),
            (self._scores, ones),
            (self._scores, given.values),
        )
        errors = [STEP_ERROR * _in_window(self._scores, *point) for point in points]
        return list(truth), errors

    @cached_property
    def _gradient_truth(self) -> tuple[Tensor, Tensor]:
        """The gradient, and what errors of H may add up to in it."""
        given = self.inputs
        levels = [self._logits], [given.targets]
        vectors = (given.index, self._scores, given.weights, given.own)
        (exact,) = breakpoints.gradient(*levels, *vectors, DELTA, IGNORE)
        return exact, STEP_ERROR * _in_window(self._logits, self._scores, given.weights)


def _in_window(at: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Sum of the weights (non-negative) of the points so near that H may be inexact."""
    reach = DELTA * (1 + 8 * _EPSILON)  # an error of STEP_ERROR moves a step's end by 5.5 of these
    points, order = points.sort()
    below = torch.nn.functional.pad(weights[order].cumsum(0), (1, 0))
    last = torch.searchsorted(points, (at + reach).contiguous(), right=True)
    return below[last] - below[torch.searchsorted(points, (at - reach).contiguous())]
