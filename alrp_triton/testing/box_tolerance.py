"""How far a localisation error may be from the truth, shared by the tests and perf.gpu."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from alrp_triton.boxes import localisation_errors


class Backend(NamedTuple):
    """Where and how localisation errors are computed."""

    impl: str
    device: str


TORCH = Backend("torch", "cpu")


class Result(NamedTuple):
    """What a call gives: (P,) errors, and the gradients (P, 4) by either side."""

    errors: Tensor
    by_pred: Tensor
    by_target: Tensor


def evaluate(
    backend: Backend,
    pred: Tensor,
    target: Tensor,
    kind: str = "giou",
    tau: float = 0.5,
    upstream: Tensor | None = None,
) -> Result:
    """Return errors and both gradients, on the CPU; `upstream` is 1 unless told."""
    pred = pred.detach().to(backend.device).requires_grad_()
    target = target.detach().to(backend.device).requires_grad_()
    errors = localisation_errors(pred, target, kind, tau, impl=backend.impl)
    upstream = torch.ones_like(errors) if upstream is None else upstream.to(errors)
    gradients = torch.autograd.grad(errors, (pred, target), upstream)
    return Result(*(x.detach().cpu() for x in (errors, *gradients)))


def random_boxes(pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw proper boxes with sides of 1 to 9, exact in 16 bits: apart, overlapping, nested."""
    generator = torch.Generator().manual_seed(seed)

    def some() -> Tensor:
        low = torch.randint(0, 8 * 8, (pairs, 2), generator=generator) / 8
        return torch.cat(
            [low, low + 1 + torch.randint(0, 8 * 8, (pairs, 2), generator=generator) / 8], 1
        )

    return some(), some()


def grid_boxes() -> tuple[Tensor, Tensor]:
    """Return all 6561 pairs of boxes with corners in {0, 1, 2}: ties, empty and inside-out ones."""
    boxes = torch.tensor(list(product(range(3), repeat=4)), dtype=torch.float64)
    return boxes.repeat_interleave(len(boxes), 0), boxes.repeat(len(boxes), 1)


def deviation(got: Tensor, truth: Tensor) -> float:
    """Return the largest error of a pair, over the largest entry of any."""
    got, truth = got.double(), truth.double()
    assert got.shape == truth.shape
    assert got.isfinite().all()
    return float((got - truth).abs().max() / truth.abs().max())


def deviations(
    got: Result, pred: Tensor, target: Tensor, kind: str, tau: float = 0.5
) -> dict[str, tuple[float, float]]:
    """Return, of each part of a result, its deviation from float64 and the budget for that.

    The rounding of torch in float32, against float64, is counted in units of the last place. A
    result gets twice as many of the dtype it is computed in, and one for what it is stored in.
    """
    wide = evaluate(TORCH, pred.double(), target.double(), kind, tau)
    narrow = evaluate(TORCH, pred.float(), target.float(), kind, tau)
    computed = torch.finfo(got.errors.dtype).eps
    found = {}
    for part, mine, single, truth in zip(Result._fields, got, narrow, wide, strict=True):
        units = deviation(single, truth) / torch.finfo(torch.float32).eps
        budget = (2 * units + 1) * computed + torch.finfo(mine.dtype).eps
        found[part] = deviation(mine, truth), budget
    return found
