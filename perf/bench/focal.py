"""Sigmoid focal loss, which people train with instead: torchvision's, one fused by torch.compile,
and the formula in float64 that both are held to.

Each is the sum over the logits that are not ignored, over the number of positives. 16-bit logits
are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from alrp_triton.testing.workloads import Inputs

from .parity import Truth

ALPHA, GAMMA = 0.25, 2.0  # torchvision's defaults, those of RetinaNet


def eager(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """Call torchvision's function as its RetinaNet does: on the anchors that are not ignored."""
    from torchvision.ops import sigmoid_focal_loss

    valid = inputs.targets != -100
    marks = inputs.marks[valid].float()

    def loss(logits: Tensor) -> Tensor:
        total = sigmoid_focal_loss(logits[valid].float(), marks, ALPHA, GAMMA, reduction="sum")
        return total / inputs.loc_errors.numel()

    return loss


def fused(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """Return one kernel forward and one backward; each reads logits and class indices once."""
    compiled = _compiled(inputs.logits.shape, inputs.logits.dtype, inputs.logits.device)
    return lambda logits: compiled(logits, inputs.targets) / inputs.loc_errors.numel()


@lru_cache(maxsize=1)
def _compiled(
    shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Compile for one shape at a time: torch refuses a function that was compiled for too many."""
    torch.compiler.reset()
    return torch.compile(_expression, dynamic=False, fullgraph=True)


def _expression(logits: Tensor, targets: Tensor) -> Tensor:
    mark = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
    wrong = torch.where(mark, -logits.float(), logits.float())
    loss = torch.sigmoid(wrong).square() * torch.nn.functional.softplus(wrong)
    loss = torch.where(mark, ALPHA, 1 - ALPHA) * loss
    return torch.where((targets != -100)[:, None], loss, 0.0).sum()


def exact(inputs: Inputs) -> Truth:
    """Evaluate the formula in float64, with the derivative by hand.

    With u the logit of the wrong answer (s for a negative, -s for a positive) and a its weight:

        loss = a sigmoid(u)^gamma softplus(u)
        dloss/du = a sigmoid(u)^gamma (gamma sigmoid(-u) softplus(u) + sigmoid(u))
    """
    marks = inputs.marks.double()
    sign = torch.where(marks == 1, -1.0, 1.0)
    alpha = torch.where(marks == 1, ALPHA, 1 - ALPHA).double()
    weight = alpha * (marks >= 0) / inputs.loc_errors.numel()
    u = sign * inputs.logits.double()
    softplus = u.clamp(min=0) + (-u.abs()).exp().log1p()
    sigmoid = u.sigmoid()
    weight = weight * sigmoid**GAMMA
    slope = GAMMA * (-u).sigmoid() * softplus + sigmoid
    value = float((weight * softplus).sum())
    return Truth(value, marks.numel(), sign * weight * slope, gradient_terms=1)
