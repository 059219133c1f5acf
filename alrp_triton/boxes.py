"""Localisation errors of boxes: Eloc of the paper from IoU and its kin."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import ops

KINDS = ("iou", "giou", "diou", "ciou")

# An area below this counts as none: no quotient by it, and no gradient, passes the largest float32.
NOTHING = 2.0**-100


def localisation_errors(
    pred_boxes: Tensor,
    target_boxes: Tensor,
    kind: str = "giou",
    tau: float = 0.5,
    impl: str = "auto",
) -> Tensor:
    """Eloc of each pair of boxes (Sec. 2.2), differentiable by both.

        Eloc = (1 - IoU) / (1 - tau)           kind "iou"
        Eloc = (1 - X) / 2 / (1 - tau)         X = GIoU, DIoU or CIoU

    GIoU and DIoU reach down to -1, CIoU to -1.5, at extreme aspect ratios.

    Args:
        pred_boxes: (P, 4) predicted boxes (x1, y1, x2, y2) in any unit, floating. 16-bit boxes are
            computed in float32.
        target_boxes: (P, 4) their ground truth, same unit.
        kind: "iou", "giou", "diou" or "ciou".
        tau: the IoU from which a detection counts as true, in [0, 1); 0 keeps errors in [0, 1]
            (CIoU's in [0, 1.25]).
        impl: "torch" (any device), "triton" (CUDA or ROCm tensors; one launch forward and one
            backward, no second derivative), or "auto" to choose by the device; see `set_backend`.

    Returns:
        (P,) errors, float32 (float64 for float64 boxes). Empty or inside-out boxes have area 0, and
        areas below 2^-100 are none: they give finite errors with finite gradients. NaN stays NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: if impl="triton" cannot run here.

    Example:
        >>> pred = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> target = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
        >>> localisation_errors(pred, target, kind="iou", tau=0.0)
        tensor([0.5000])
    """
    _check(pred_boxes, target_boxes, kind, tau)
    ops.check_backend(impl, "auto")
    if ops.choose_impl(impl, pred_boxes.device) == "triton":
        return _TritonErrors.apply(pred_boxes, target_boxes, kind, float(tau))
    overlap = box_overlap(pred_boxes, target_boxes, kind)
    span = 1.0 if kind == "iou" else 2.0
    return (1 - overlap) / (span * (1 - tau))


class _TritonErrors(torch.autograd.Function):
    """The Triton path: an operator for the errors, one for the gradient by either side."""

    @staticmethod
    def forward(
        ctx: Any, pred_boxes: Tensor, target_boxes: Tensor, kind: str, tau: float
    ) -> Tensor:
        ctx.save_for_backward(pred_boxes, target_boxes)
        ctx.settings = (kind, tau)
        return ops.box_errors(pred_boxes, target_boxes, kind, tau)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        pred, target = ctx.saved_tensors
        by_pred = by_target = None
        if ctx.needs_input_grad[0]:
            by_pred = _TritonGradient.apply(upstream, pred, target, *ctx.settings)
        if ctx.needs_input_grad[1]:  # an overlap is the same seen from the other box
            by_target = _TritonGradient.apply(upstream, target, pred, *ctx.settings)
        return by_pred, by_target, None, None


class _TritonGradient(torch.autograd.Function):
    """Refuses a second derivative, where `once_differentiable` would leave it out in silence."""

    @staticmethod
    def forward(
        ctx: Any, upstream: Tensor, pred: Tensor, target: Tensor, kind: str, tau: float
    ) -> Tensor:
        return ops.box_gradient(upstream, pred, target, kind, tau)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "localisation_errors: impl='triton' has no second derivative, use impl='torch'"
        )


def box_overlap(pred_boxes: Tensor, target_boxes: Tensor, kind: str = "giou") -> Tensor:
    """IoU, GIoU, DIoU or CIoU of each pair of boxes, (P, 4) and (P, 4) to (P,), differentiable."""
    dtype = torch.promote_types(pred_boxes.dtype, target_boxes.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    pred, target = pred_boxes.to(dtype), target_boxes.to(dtype)
    pred_low, pred_high = pred[:, :2], pred[:, 2:]
    target_low, target_high = target[:, :2], target[:, 2:]

    inter = _area(torch.minimum(pred_high, target_high) - torch.maximum(pred_low, target_low))
    union = _area(pred_high - pred_low) + _area(target_high - target_low) - inter
    iou = _divide(inter, union)
    if kind == "iou":
        return iou
    low, high = _ordered(pred_low, pred_high)
    other_low, other_high = _ordered(target_low, target_high)
    sides = torch.maximum(high, other_high) - torch.minimum(low, other_low)
    if kind == "giou":
        hull = _area(sides)
        return iou - _divide(hull - union, hull)

    centres = ((pred_low + pred_high) - (target_low + target_high)) / 2
    diou = iou - _divide(centres.square().sum(1), sides.square().sum(1))
    if kind == "diou":
        return diou
    shape = (4 / math.pi**2) * (_angle(target_low, target_high) - _angle(pred_low, pred_high)) ** 2
    with torch.no_grad():
        alpha = _divide(shape, (1 - iou).clamp(min=0) + shape)
    return diou - alpha * shape


def _area(sides: Tensor) -> Tensor:
    # Not clamp: its gradient at 0 changed between versions of torch. Not prod: its backward waits
    # for the device.
    width, height = torch.where(sides < 0, 0.0, sides).unbind(1)
    return width * height


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 with gradient 0 where b is next to nothing."""
    nothing = b < NOTHING
    return torch.where(nothing, 0.0, a) / torch.where(nothing, 1.0, b)


def _ordered(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The corners, swapped along the axes where a box is inside-out, so that a hull contains it."""
    inside_out = high < low
    return torch.where(inside_out, high, low), torch.where(inside_out, low, high)


def _angle(low: Tensor, high: Tensor) -> Tensor:
    """arctan(width / height), and 0 with gradient 0 for an empty or inside-out box."""
    empty = _area(high - low) < NOTHING
    width, height = (high - low).unbind(1)
    return torch.atan2(torch.where(empty, 0.0, width), torch.where(empty, 1.0, height))


def _check(pred_boxes: Tensor, target_boxes: Tensor, kind: str, tau: float) -> None:
    check_kind(kind, tau)
    for name, boxes in (("pred_boxes", pred_boxes), ("target_boxes", target_boxes)):
        if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
            got = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {got}")
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name}: expected shape (P, 4), got {tuple(boxes.shape)}")
    if pred_boxes.shape != target_boxes.shape:
        raise ValueError(
            f"target_boxes: expected shape {tuple(pred_boxes.shape)} like pred_boxes, "
            f"got {tuple(target_boxes.shape)}"
        )
    if pred_boxes.device != target_boxes.device:
        raise ValueError(
            f"target_boxes: expected on {pred_boxes.device} like pred_boxes, "
            f"got {target_boxes.device}"
        )


def check_kind(kind: str, tau: float, name: str = "kind") -> None:
    """Raises TypeError or ValueError if there is no such error; to the caller `kind` is `name`."""
    if not isinstance(kind, str):
        raise TypeError(f"{name}: expected one of {', '.join(KINDS)}, got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"{name}: expected one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(tau, bool) or not isinstance(tau, Real):
        raise TypeError(f"tau: expected a number in [0, 1), got {type(tau).__name__}")
    if not 0 <= tau < 1:
        raise ValueError(f"tau: expected a number in [0, 1), got {tau}")
