"""A skewed error distribution: the further a negative is above a positive, the more error it gets.

Sec. 3 of the paper leaves open how the error of a positive is spread over the negatives above it.
Here p(j|i) is proportional to H(x_ij) m_ij^power, with the margin m_ij = x_ij + delta by which the
negative exceeds the lower edge of the positive's window. Power 0 is the uniform distribution of
`pairwise`. Margins are raised in float64, where no power up to `MOST` overflows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import write_positives
from .pairwise import chunks, negatives_of, step, within

# The largest power. A margin is below 2^127, and as many logits as there may be sum to a double.
MOST = 4.0


def mass(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    scores: Tensor,
    powers: Tensor,
    delta: float,
    ignore_index: int,
    groups: Sequence[Tensor] = (),
    own_groups: Tensor | None = None,
) -> Tensor:
    """What the shares of a positive's negatives sum to before they are normalised.

    Args:
        logits, targets, scores, delta, ignore_index, groups, own_groups: as in `pairwise.count`.
        powers: (P,) float64, the power of the margin, in [0, `MOST`].

    Returns:
        (P,) float64: sum_{j in N} H(x_ij) m_ij^powers(i).
    """
    total = torch.zeros_like(powers)
    for part in negatives_of(logits, targets, ignore_index, groups):
        for i in chunks(scores, part.scores):
            h = _share(part.scores, scores[i, None], powers[i, None], delta)
            total[i] += within(h, own_groups, i, part.groups).sum(1)
    return total


def gradient(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    index: Tensor,
    scores: Tensor,
    weights: Tensor,
    own: Tensor,
    powers: Tensor,
    delta: float,
    ignore_index: int,
    groups: Sequence[Tensor] = (),
    own_groups: Tensor | None = None,
) -> list[Tensor]:
    """The gradient by every logit, in the logits' dtype.

    Args:
        logits, targets, index, scores, own, delta, ignore_index, groups, own_groups: as in
            `pairwise.gradient`.
        weights: (P,) float64, D(i) / (Z mass(i)).
        powers: as in `mass`.

    Returns:
        One tensor a level: sum_i weights(i) H(x_ij) m_ij^powers(i) at negatives, own(i) at
        positives, 0 at ignored.
    """
    gradients = [torch.zeros_like(level) for level in logits]
    for part in negatives_of(logits, targets, ignore_index, groups):
        total = part.scores.new_zeros(part.scores.shape, dtype=torch.float64)
        for i in chunks(scores, part.scores):
            h = _share(part.scores, scores[i, None], powers[i, None], delta)
            total += (within(h, own_groups, i, part.groups) * weights[i, None]).sum(0)
        part.write(gradients, total)
    write_positives(gradients, index, own)
    return gradients


def _share(negatives: Tensor, scores: Tensor, powers: Tensor, delta: float) -> Tensor:
    """H(x_ij) m_ij^powers(i) in float64."""
    margin = (negatives.double() - scores.double() + delta).clamp(min=0)
    return step(negatives - scores, delta).double() * margin.pow(powers)
