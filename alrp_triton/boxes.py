"""Localisation errors of boxes: Eloc of the paper from IoU and its kin."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import backend, ops

KINDS = ("iou", "giou", "diou", "ciou")
FORMATS = ("XYXY", "XYWH", "CXCYWH")

# Each pair is computed in units of its largest coordinate (see `_comparable`). An area, or a side,
# below MIN_AREA there counts as none, and pairs below SMALLEST are not enlarged any further: then
# no quotient and no gradient passes the largest float32.
MIN_AREA = 2.0**-80
SMALLEST = 2.0**-30

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def localisation_errors(
    pred_boxes: Tensor,
    target_boxes: Tensor,
    kind: str = "giou",
    tau: float = 0.5,
    impl: str = "auto",
) -> Tensor:
    """Return Eloc of each pair of boxes (Sec. 2.2), differentiable by both.

        Eloc = (1 - IoU) / (1 - tau)           kind "iou"
        Eloc = (1 - X) / 2 / (1 - tau)         X = GIoU, DIoU or CIoU

    GIoU and DIoU reach down to -1, CIoU to -1.5, at extreme aspect ratios. CIoU compares the angles
    arctan(width / height), which are pi / 2 for a box without height, and 0 for one without width.

    Args:
        pred_boxes: (P, 4) predicted boxes (x1, y1, x2, y2) in any unit, floating. 16-bit boxes are
            computed in float32.
        target_boxes: (P, 4) their ground truth, same unit. Of boxes that carry a `format`, as
            torchvision's `BoundingBoxes` do, (x, y, w, h) and (cx, cy, w, h) are converted.
        kind: "iou", "giou", "diou" or "ciou".
        tau: the IoU from which a detection counts as true, in [0, 1); 0 keeps errors in [0, 1]
            (CIoU's in [0, 1.25]).
        impl: "torch" (any device), "triton" (CUDA or ROCm tensors; one launch forward and one
            backward, no second derivative), or "auto" to choose by the device; see `set_backend`.

    Returns:
        (P,) errors, float32 (float64 for float64 boxes). They are finite, and so are the gradients,
        whatever the boxes are, but for NaN:

        - A box that is empty or inside-out (x2 < x1, in the ground truth too) has area 0, and so
          IoU 0 with any other. A side that is inside-out has length 0.
        - The errors follow where a box goes that loses its width or its height. Where they cannot,
          since the limit depends on the way there, a box that is but a point has the angle 0, and
          two boxes on one line, or in one point, have IoU 0. GIoU then compares lengths along the
          line, and neither GIoU nor DIoU costs more for two that are one point.
        - Sizes do not matter, from 2^-70 to the largest number of the dtype, which an
          infinity counts as. A side shorter than 2^-80 of the largest coordinate is none.
        - NaN stays NaN: the error, and the gradient by both boxes of the pair.
        - Where no gradient comes from above (it is 0, as that of padding), none comes out, whatever
          the boxes hold. So padded rows need not be initialised.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: if impl="triton" cannot run here.

    Example:
        >>> pred = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> target = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
        >>> localisation_errors(pred, target, kind="iou", tau=0.0)
        tensor([0.5000])
    """
    pred_boxes = as_corners(pred_boxes, "pred_boxes")
    target_boxes = as_corners(target_boxes, "target_boxes")
    _check(pred_boxes, target_boxes, kind, tau)
    backend.check_backend(impl, "auto")
    if backend.choose_impl(impl, pred_boxes.device) == "triton":
        return _TritonErrors.apply(pred_boxes, target_boxes, kind, float(tau))
    overlap = box_overlap(pred_boxes, target_boxes, kind)
    span = 1.0 if kind == "iou" else 2.0
    return (1 - overlap) / (span * (1 - float(tau)))


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
    """Return IoU, GIoU, DIoU or CIoU (P,) of each pair of boxes, (P, 4) and (P, 4).

    It is differentiable by both.
    """
    dtype = torch.promote_types(pred_boxes.dtype, target_boxes.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    boxes = torch.cat([pred_boxes.to(dtype), target_boxes.to(dtype)], 1)
    # Forward mode is for eager calls alone: torch.compile takes no function that has it.
    spoil = _Spoil if torch.compiler.is_compiling() else _SpoilWithTangent
    return spoil.apply(_overlap(boxes, kind), boxes, boxes.isnan().any(1))


class _Spoil(torch.autograd.Function):
    """NaN for pairs that hold NaN: the overlap, and the gradient if there is one from above.

    Only here both are known. `_overlap` gives neither, since 0 times NaN would reach padding too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(overlap: Tensor, boxes: Tensor, broken: Tensor) -> Tensor:
        return torch.where(broken, torch.nan, overlap)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (broken,) = ctx.saved_tensors
        spoilt = torch.zeros_like(upstream).masked_fill(broken & (upstream != 0), torch.nan)
        return upstream.masked_fill(broken, 0.0), spoilt[:, None].expand(-1, 8), None


class _SpoilWithTangent(_Spoil):
    """Also for forward mode."""

    @staticmethod
    def jvp(ctx: Any, by_overlap: Tensor, *_: Tensor | None) -> Tensor:
        (broken,) = ctx.saved_tensors
        return by_overlap.masked_fill(broken, torch.nan)


def _overlap(boxes: Tensor, kind: str) -> Tensor:
    """Return the overlap of pairs (P, 8), finite with a finite gradient whatever they hold."""
    # (P, pred or target, x or y)
    low, high = _comparable(boxes).unflatten(1, (2, 2, 2)).unbind(2)
    own = high - low
    shared = high.amin(1) - low.amax(1)
    if kind == "iou":
        areas, _ = _areas(own, shared)
        inter, union = _inter_and_union(areas)
        return _divide(inter, union)
    # The smallest box around both contains what an inside-out box spans.
    inside_out = own < 0
    first, last = torch.where(inside_out, high, low), torch.where(inside_out, low, high)
    around = last.amax(1) - first.amin(1)
    areas, sides = _areas(own, shared, around)
    if kind == "giou":
        on_line = areas[:, 3:] < MIN_AREA  # both boxes, so that lengths take the place of areas
        sizes = torch.where(on_line, sides.sum(2), areas)
        _, union = _inter_and_union(sizes)
        return _divide(areas[:, 2], union) - _divide(sizes[:, 3] - union, sizes[:, 3])

    inter, union = _inter_and_union(areas)
    iou = _divide(inter, union)
    # Differences first: far from the origin, sums would round the distance of the centres away.
    apart = (low[:, 0] - low[:, 1]) + (high[:, 0] - high[:, 1])
    diou = iou - _divide((apart / 2).square().sum(1), around.square().sum(1))
    if kind == "diou":
        return diou
    pred_angle, target_angle = _angle(sides[:, :2]).unbind(1)
    shape = (4 / math.pi**2) * (target_angle - pred_angle) ** 2
    held = shape.detach()  # not no_grad, which forward mode passes by
    alpha = _divide(held, (1 - iou.detach()).clamp(min=0) + held)
    return diou - alpha * shape


def _comparable(boxes: Tensor) -> Tensor:
    """Return pairs in units of their largest coordinate: no area overflows or vanishes in them.

    A unit is a power of 2, so nothing is rounded. An overlap does not depend on it, so gradients
    are right with the unit held. NaN becomes 0, an infinity the largest number.
    """
    boxes = boxes.nan_to_num(nan=0.0)
    extent = boxes.detach().abs().amax(1, keepdim=True)
    return boxes * _per_power(extent.clamp(min=SMALLEST))


def _per_power(x: Tensor) -> Tensor:
    """Return 2 / the largest power of 2 that x reaches, exactly: it brings x into [2, 4)."""
    return 4 * torch.frexp(x).mantissa / x


def _areas(own: Tensor, shared: Tensor, *around: Tensor) -> tuple[Tensor, Tensor]:
    """Return areas of both boxes, what they share, and the box around (P, 3 or 4), and sides.

    Sides are (P, 3 or 4, 2). A negative one is 0.
    """
    sides = torch.cat([own, torch.stack([shared, *around], 1)], 1)
    # Not clamp: its gradient at 0 changed between versions of torch.
    sides = torch.where(sides < 0, 0.0, sides)
    # Not prod: its backward waits for the device.
    width, height = sides.unbind(2)
    return width * height, sides


def _inter_and_union(areas: Tensor) -> tuple[Tensor, Tensor]:
    pred, target, inter = areas.unbind(1)[:3]
    return inter, pred + target - inter


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 with gradient 0 where b is next to nothing."""
    nothing = b < MIN_AREA
    return torch.where(nothing, 0.0, a) / torch.where(nothing, 1.0, b)


def _angle(sides: Tensor) -> Tensor:
    """Return arctan(width / height), in [0, pi / 2], of sides (..., 2).

    It is 0 with gradient 0 for a point.
    """
    longest = sides.detach().amax(-1, keepdim=True)
    point = longest < MIN_AREA
    # In units of the longer side: the square of a short one would vanish.
    width, height = (sides * _per_power(torch.where(point, 1.0, longest))).unbind(-1)
    point = point.squeeze(-1)
    return torch.atan2(torch.where(point, 0.0, width), torch.where(point, 1.0, height))


def as_corners(boxes: Tensor, name: str) -> Tensor:
    """Return boxes as plain corners (x1, y1, x2, y2), by the format that they may carry.

    Raises:
        ValueError: naming the argument `name`, if boxes of that format have no such corners.
    """
    if getattr(boxes, "format", None) is None or not isinstance(boxes, Tensor):
        return boxes
    form = format_of(boxes)
    if form not in FORMATS:
        raise ValueError(f"{name}: expected format {', '.join(FORMATS)}, got {form}")
    return to_corners(boxes.as_subclass(Tensor), form)


def format_of(boxes: Tensor) -> str:
    """Return the format, an enumeration's name, that boxes such as `BoundingBoxes` carry."""
    form = getattr(boxes, "format", None) or "XYXY"
    return str(getattr(form, "name", form)).upper()


def to_corners(boxes: Tensor, form: str) -> Tensor:
    """Return corners (x1, y1, x2, y2) of plain boxes of one of `FORMATS`."""
    if form == "XYXY":
        return boxes
    start, size = boxes[..., :2], boxes[..., 2:]
    low = start if form == "XYWH" else start - size / 2
    return torch.cat([low, low + size], -1)


def _check(pred_boxes: Tensor, target_boxes: Tensor, kind: str, tau: float) -> None:
    check_kind(kind, tau)
    for name, boxes in (("pred_boxes", pred_boxes), ("target_boxes", target_boxes)):
        if not isinstance(boxes, Tensor):
            raise TypeError(f"{name}: expected a floating tensor, got {type(boxes).__name__}")
        if boxes.dtype not in _DTYPES:
            raise TypeError(
                f"{name}: expected a floating tensor of float32, bfloat16, float16 or float64, "
                f"got {boxes.dtype}"
            )
        if boxes.layout != torch.strided or boxes.is_nested:
            layout = "a nested tensor" if boxes.is_nested else boxes.layout
            raise TypeError(f"{name}: expected a dense tensor, got {layout}")
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
    """Raise TypeError or ValueError if there is no such error; to the caller `kind` is `name`."""
    if not isinstance(kind, str):
        raise TypeError(f"{name}: expected one of {', '.join(KINDS)}, got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"{name}: expected one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(tau, bool) or not isinstance(tau, Real):
        raise TypeError(f"tau: expected a number in [0, 1), got {type(tau).__name__}")
    if not 0 <= tau < 1:
        raise ValueError(f"tau: expected a number in [0, 1), got {tau}")
