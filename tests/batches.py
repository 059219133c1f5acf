"""Inputs that several tests share, and how results are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from alrp_triton.reference import layout
from alrp_triton.reference.layout import Batch

IGNORE = -100

# (mean, deviation) of negatives and of positives at stages of a training.
DISTRIBUTIONS = {
    "init": ((-4.6, 0.01), (-4.6, 0.01)),
    "mid": ((-7.0, 1.5), (-1.0, 1.5)),
    "late": ((-9.0, 1.5), (1.5, 1.5)),
    "spread": ((0.0, 2.0), (0.0, 2.0)),
}


def halved(*axes: Iterable[Any]) -> list[Any]:
    """Return each combination of the values, for parametrize; every second one is marked `full`.

    As on a chessboard: each value remains, and of three axes each pair of values.
    """
    cases = []
    for places in itertools.product(*map(enumerate, axes)):
        numbers, values = zip(*places, strict=True)
        cases.append(pytest.param(*values, marks=pytest.mark.full if sum(numbers) % 2 else ()))
    return cases


def detector_batch(
    distribution: str, anchors: int, classes: int, num_positives: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return float32 logits (anchors, classes), and class indices: -1 background, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    negative, positive = DISTRIBUTIONS[distribution]
    logits = torch.randn(anchors, classes, generator=generator)
    order = torch.randperm(anchors, generator=generator)
    targets = torch.full((anchors,), -1)
    chosen = order[:num_positives]
    targets[chosen] = torch.randint(classes, (num_positives,), generator=generator)
    targets[order[num_positives : num_positives + anchors // 50]] = IGNORE
    scores = logits[chosen, targets[chosen]] * positive[1] + positive[0]
    logits = logits.mul_(negative[1]).add_(negative[0])
    logits[chosen, targets[chosen]] = scores
    return logits, targets


def batch_of(
    logits: list[Tensor], targets: list[Tensor], delta: float = 1.0, groups: Sequence[Tensor] = ()
) -> Batch:
    """Return what the operators take, of levels (B, C, M)."""
    pairs = zip(logits, targets, strict=True)
    size = sum(int(layout.is_positive(*pair, IGNORE).sum()) for pair in pairs)
    index, scores = layout.locate(logits, targets, None, size, True, IGNORE)
    positive_groups = layout.gather(groups, logits, index) if groups else None
    return Batch(logits, targets, index, scores, delta, IGNORE, groups, positive_groups)


def to_batch(logits: Tensor, targets: Tensor, delta: float = 1.0) -> Batch:
    """Return what the operators take, of (N, C) logits."""
    levels = [logits.detach().reshape(*logits.shape, 1)]
    return batch_of(levels, [targets.reshape(-1, 1)], delta)


def widen(batch: Batch) -> Batch:
    """Return the batch with logits and scores in float64."""
    logits = [level.double() for level in batch.logits]
    return batch._replace(logits=logits, scores=batch.scores.double())


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest |got - expected| / |expected|, entry by entry; 0 where both are equal."""
    got, expected = got.detach().double().reshape(-1), expected.detach().double().reshape(-1)
    assert got.shape == expected.shape
    error = (got - expected).abs() / expected.abs()
    error = torch.where(got == expected, 0.0, error)
    return float(error.max()) if error.numel() else 0.0
