"""Whether a loss computes what it should: its value and gradient beside the truth in float64.

The benchmark measures losses of all kinds by the same rule, other people's too, that it knows
nothing of but their result: what float32 sums of as many terms may be off by. The package's own
kernels have narrower budgets, derived from how each adds and steps: `budgets`, `loss_budget`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from alrp_triton import alrp_loss
from alrp_triton.testing.workloads import Inputs

# Up to so many pairs the truth is the specification itself, evaluated pair by pair.
_SPECIFIED = 1 << 24


class Truth(NamedTuple):
    """What a loss of some inputs is in float64, and how long the sums are that it is made of."""

    value: float
    value_terms: int  # the most numbers that are added one after the other, for the value
    gradient: Tensor  # by the logits
    gradient_terms: int  # likewise, for one entry of it


class Parity(NamedTuple):
    """How far a result is from the truth, and how far rounding alone may take it."""

    error: float  # largest |gradient - truth| over the largest |truth|
    tolerance: float  # of it, before the one rounding of each entry in the gradient's dtype
    value_error: float  # |value - truth| over |truth|, or over 1 if that is larger
    value_tolerance: float
    holds: bool


def ranking(inputs: Inputs, by_image: bool = False) -> Truth:
    """Return cls of aLRP, and the gradient that rides on it, of the logits upcast to float64."""
    leaf = inputs.logits.double().requires_grad_()
    positives = inputs.loc_errors.numel()
    pairs = leaf.numel() * positives
    cls, _ = alrp_loss(
        leaf,
        inputs.targets,
        inputs.loc_errors.double(),
        inputs.delta,
        impl="torch",
        groups=inputs.images if by_image else None,
        algorithm="pairwise" if pairs <= _SPECIFIED else "breakpoints",
    )
    cls.backward()
    assert leaf.grad is not None
    return Truth(float(cls.detach()), positives, leaf.grad, positives)


def compare(value: Tensor, gradient: Tensor, truth: Truth) -> Parity:
    """Hold a loss to the truth.

    float32 arithmetic may leave the error of a sum: in the value, and in each entry of the gradient
    beside the largest one. On top of it, the gradient is rounded once: it has to be the rounding,
    in its dtype, of a number that is no further from the truth than that.
    """
    largest = float(truth.gradient.abs().max())
    tolerance = _left_by_float32(truth.gradient_terms)
    least, most = (
        (truth.gradient + sign * tolerance * largest).to(gradient.dtype) for sign in (-1, 1)
    )
    value_error = abs(float(value.detach()) - truth.value) / max(abs(truth.value), 1.0)
    value_tolerance = _left_by_float32(truth.value_terms)
    # NaN compares as false, and so does not hold.
    holds = bool(((least <= gradient) & (gradient <= most)).all())
    difference = float((gradient.double() - truth.gradient).abs_().max())
    return Parity(
        error=difference / largest if difference else 0.0,
        tolerance=tolerance,
        value_error=value_error,
        value_tolerance=value_tolerance,
        holds=holds and value_error <= value_tolerance,
    )


def _left_by_float32(terms: int) -> float:
    """Return the relative error that a sum of `terms` numbers may have.

    n independent roundings of up to u = 2^-24 each leave less than 8 sqrt(n) u, with probability
    1 - 2 exp(-8^2 / 2) (Higham and Mary, 2019): over 20 million sums at once that is 5e-7 short of
    certain. Sixteen of them are for what makes a term.
    """
    return 8 * math.sqrt(terms + 16) * torch.finfo(torch.float32).eps / 2
