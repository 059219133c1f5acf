"""A skewed error distribution: the further a negative is above a positive, the more error it gets.

Sec. 3 of the paper leaves open how the error of a positive is spread over the negatives above it.
Here p(j|i) is proportional to H(x_ij) m_ij^power, with the margin m_ij = x_ij + delta by which the
negative exceeds the lower end of the positive's window. Power 0 is the uniform distribution of
`pairwise`. Margins are raised in float64, where no power up to `MAX_POWER` overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Batch, write_positives
from .pairwise import chunks, negatives_of, step, within

# The largest power. A margin is below 2^127, and as many logits as there may be sum to a double.
MAX_POWER = 4.0


def mass(batch: Batch, powers: Tensor) -> Tensor:
    """Return what the shares of a positive's negatives sum to before they are normalised.

    Args:
        batch: of P positives, without padding.
        powers: (P,) float64, the power of the margin, in [0, `MAX_POWER`].

    Returns:
        (P,) float64: sum_{j in N} H(x_ij) m_ij^powers(i).
    """
    total = torch.zeros_like(powers)
    for part in negatives_of(batch):
        for i in chunks(batch.scores, part.scores):
            h = _share(part.scores, batch.scores[i, None], powers[i, None], batch.delta)
            total[i] += within(h, batch, i, part.groups).sum(1)
    return total


def gradient(batch: Batch, weights: Tensor, positive_grad: Tensor, powers: Tensor) -> list[Tensor]:
    """Return the gradient by every logit, in the logits' dtype.

    Args:
        batch: of P positives, without padding.
        weights: (P,) float64, D(i) / (Z mass(i)).
        positive_grad: (P,) float64, as in `pairwise.gradient`.
        powers: as in `mass`.

    Returns:
        One tensor a level: sum_i weights(i) H(x_ij) m_ij^powers(i) at negatives, positive_grad(i)
        at positives, 0 at ignored.
    """
    gradients = [torch.zeros_like(level) for level in batch.logits]
    for part in negatives_of(batch):
        total = part.scores.new_zeros(part.scores.shape, dtype=torch.float64)
        for i in chunks(batch.scores, part.scores):
            h = _share(part.scores, batch.scores[i, None], powers[i, None], batch.delta)
            total += (within(h, batch, i, part.groups) * weights[i, None]).sum(0)
        part.write(gradients, total)
    write_positives(gradients, batch.index, positive_grad)
    return gradients


def _share(negatives: Tensor, scores: Tensor, powers: Tensor, delta: float) -> Tensor:
    """Return H(x_ij) m_ij^powers(i) in float64."""
    margin = (negatives.double() - scores.double() + delta).clamp(min=0)
    return step(negatives - scores, delta).double() * margin.pow(powers)
