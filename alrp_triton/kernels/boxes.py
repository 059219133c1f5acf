"""Localisation errors of P pairs of boxes, and their gradient by one side: one launch for each.

Mirrors `alrp_triton.boxes`, the specification. `_overlap` makes X (IoU, GIoU, DIoU or CIoU) of a
pair, and the derivatives of X by the sides and centres that it is made of. The forward kernel drops
these, the backward kernel hands them on to the corners. X is symmetric in the two boxes, so the
gradient by the target boxes is the gradient of the swapped call.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # pairs in a program: P is small, so they spread over many processors
WARPS = 1  # on AMD a pair for each thread, on NVIDIA two

MIN_AREA = tl.constexpr(2.0**-80)  # see `alrp_triton.boxes`
SMALLEST = tl.constexpr(2.0**-30)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
LARGEST_DOUBLE = tl.constexpr(torch.finfo(torch.float64).max)
PI = tl.constexpr(math.pi)
TAN_EIGHTH = tl.constexpr(math.tan(math.pi / 8))

# P, tau, the strides and where a view begins differ from call to call: none makes a new variant.
_VARYING = [
    *("pred", "target", "out", "num_pairs"),
    *("pred_row", "pred_column", "target_row", "target_column", "span"),
]


def errors(pred: Tensor, target: Tensor, kind: str, tau: float) -> Tensor:
    """Return Eloc (P,) of each pair: (P, 4) and (P, 4), any float dtypes and strides."""
    out = pred.new_empty(pred.shape[:1], dtype=_compute_dtype(pred, target))
    _launch(_errors_kernel, pred, target, out, kind, tau)
    return out


def gradient(upstream: Tensor, pred: Tensor, target: Tensor, kind: str, tau: float) -> Tensor:
    """Return the gradient by `pred`, (P, 4), from that by the errors, (P,) of any stride.

    The stride may be 0 too.
    """
    out = pred.new_empty(pred.shape)
    upstream_too: dict[str, Tensor | int] = {
        "upstream": upstream,
        "upstream_stride": upstream.stride(0),
    }
    _launch(_gradient_kernel, pred, target, out, kind, tau, **upstream_too)
    return out


def _compute_dtype(pred: Tensor, target: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (pred.dtype, target.dtype) else torch.float32


def _launch(
    kernel: triton.JITFunction,
    pred: Tensor,
    target: Tensor,
    out: Tensor,
    kind: str,
    tau: float,
    **upstream: Tensor | int,
) -> None:
    num_pairs = pred.shape[0]
    if num_pairs == 0:
        return
    double = _compute_dtype(pred, target) == torch.float64
    with torch.cuda.device_of(pred):
        kernel[(triton.cdiv(num_pairs, BLOCK),)](
            pred=pred,
            target=target,
            out=out,
            **upstream,
            num_pairs=num_pairs,
            pred_row=pred.stride(0),
            pred_column=pred.stride(1),
            target_row=target.stride(0),
            target_column=target.stride(1),
            span=(1.0 if kind == "iou" else 2.0) * (1.0 - tau),
            KIND=kind,
            COMPUTE=tl.float64 if double else tl.float32,
            BLOCK=BLOCK,
            num_warps=WARPS,
            # Products are rounded as torch rounds them: two equal boxes then have IoU 1, exactly.
            enable_fp_fusion=False,
        )


@triton.jit(do_not_specialize=_VARYING)
def _errors_kernel(
    pred,  # (P, 4)
    target,  # (P, 4)
    out,  # (P,)
    num_pairs,
    pred_row,  # strides
    pred_column,
    target_row,
    target_column,
    span: tl.float64,  # of X between Eloc 0 and 1
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    pred_low, pred_high = _load(pred, pair, inside, pred_row, pred_column, COMPUTE)
    target_low, target_high = _load(target, pair, inside, target_row, target_column, COMPUTE)
    broken = _holds_nan(pred_low, pred_high, target_low, target_high)
    scale = _scale(pred_low, pred_high, target_low, target_high)
    pred_low, pred_high = pred_low * _both(scale), pred_high * _both(scale)
    target_low, target_high = target_low * _both(scale), target_high * _both(scale)
    overlap, _, _, _, _ = _overlap(pred_low, pred_high, target_low, target_high, KIND)
    error = _quotient(1 - overlap, tl.full([], span, COMPUTE))
    tl.store(out + pair, tl.where(broken, float("nan"), error), mask=inside)


@triton.jit(do_not_specialize=[*_VARYING, "upstream", "upstream_stride"])
def _gradient_kernel(
    pred,  # (P, 4)
    target,  # (P, 4)
    out,  # (P, 4), contiguous
    upstream,  # (P,)
    num_pairs,
    pred_row,  # strides
    pred_column,
    target_row,
    target_column,
    upstream_stride,
    span: tl.float64,  # of X between Eloc 0 and 1
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    pred_low, pred_high = _load(pred, pair, inside, pred_row, pred_column, COMPUTE)
    target_low, target_high = _load(target, pair, inside, target_row, target_column, COMPUTE)
    broken = _holds_nan(pred_low, pred_high, target_low, target_high)
    scale = _scale(pred_low, pred_high, target_low, target_high)
    pred_low, pred_high = pred_low * _both(scale), pred_high * _both(scale)
    target_low, target_high = target_low * _both(scale), target_high * _both(scale)
    _, by_shared, by_size, by_hull, by_centre = _overlap(
        pred_low, pred_high, target_low, target_high, KIND
    )

    # From sides to corners: a side is high - low, and max and min share a gradient between equals.
    shared = tl.minimum(pred_high, target_high) - tl.maximum(pred_low, target_low)
    by_shared = tl.where(shared < 0, 0.0, by_shared)
    size = pred_high - pred_low
    by_size = tl.where(size < 0, 0.0, by_size)
    by_low = by_centre - by_size - by_shared * _share(pred_low, target_low)
    by_high = by_centre + by_size + by_shared * _share(target_high, pred_high)
    if KIND != "iou":
        low, high = _ordered(pred_low, pred_high)
        other_low, other_high = _ordered(target_low, target_high)
        hull_low = -by_hull * _share(other_low, low)
        hull_high = by_hull * _share(high, other_high)
        by_low += tl.where(size < 0, hull_high, hull_low)
        by_high += tl.where(size < 0, hull_low, hull_high)

    factor = tl.load(upstream + pair * upstream_stride, mask=inside, other=0.0).to(COMPUTE)
    wanted = factor != 0  # or what padding holds would come through, as 0 times NaN
    factor = tl.where(broken, float("nan"), -_quotient(factor, tl.full([], span, COMPUTE)) * scale)
    _store(tl.where(_both(wanted), by_low * _both(factor), 0.0), out + pair * 4, inside)
    _store(tl.where(_both(wanted), by_high * _both(factor), 0.0), out + pair * 4 + 2, inside)


@triton.jit
def _load(boxes, pair, inside, row, column, COMPUTE: tl.constexpr):
    """Load the corners (x1, y1) and (x2, y2), each (BLOCK, 2).

    Joined, so that a thread holds x and y of its pair, and nothing is exchanged between threads.
    """
    x1 = boxes + pair * row
    y1 = x1 + column
    x2 = y1 + column
    y2 = x2 + column
    low = tl.join(tl.load(x1, mask=inside, other=0.0), tl.load(y1, mask=inside, other=0.0))
    high = tl.join(tl.load(x2, mask=inside, other=0.0), tl.load(y2, mask=inside, other=0.0))
    return _finite(low.to(COMPUTE)), _finite(high.to(COMPUTE))


@triton.jit
def _finite(corner):
    """Replace an infinity by the largest number; NaN stays."""
    largest = tl.full([], LARGEST_DOUBLE if corner.dtype == tl.float64 else LARGEST, corner.dtype)
    corner = tl.where(corner > largest, largest, corner)
    return tl.where(corner < -largest, -largest, corner)


@triton.jit
def _holds_nan(pred_low, pred_high, target_low, target_high):
    """Return whether any of the eight coordinates is NaN, (BLOCK,)."""
    found = (pred_low != pred_low) | (pred_high != pred_high)
    found |= (target_low != target_low) | (target_high != target_high)
    x, y = tl.split(found.to(tl.int32))
    return (x | y) != 0


@triton.jit
def _scale(pred_low, pred_high, target_low, target_high):
    """Return what brings a pair's largest coordinate into [2, 4), a power of 2, (BLOCK,)."""
    extent = tl.maximum(tl.abs(pred_low), tl.abs(pred_high))
    extent = tl.maximum(extent, tl.maximum(tl.abs(target_low), tl.abs(target_high)))
    x, y = tl.split(extent)
    extent = tl.maximum(x, y)
    return _per_power(tl.where(extent > SMALLEST, extent, SMALLEST))  # also for NaN


@triton.jit
def _per_power(x):
    """Return 2 / the largest power of 2 that x reaches."""
    if x.dtype == tl.float64:
        exponent = tl.full([], 0x7FF << 52, tl.int64)
        return (exponent - (x.to(tl.int64, bitcast=True) & exponent)).to(tl.float64, bitcast=True)
    else:
        exponent = tl.full([], 0xFF << 23, tl.int32)
        return (exponent - (x.to(tl.int32, bitcast=True) & exponent)).to(tl.float32, bitcast=True)


@triton.jit
def _store(corner, out, inside):
    if out.dtype.element_ty == tl.bfloat16:  # the interpreter has no way there from float64
        corner = corner.to(tl.float32)
    x, y = tl.split(corner)
    tl.store(out, x, mask=inside)
    tl.store(out + 1, y, mask=inside)


@triton.jit
def _overlap(pred_low, pred_high, target_low, target_high, KIND: tl.constexpr):
    """Return X of each pair (BLOCK,), and its derivatives (BLOCK, 2).

    By the sides of the intersection, of pred, and of the hull, and by either corner of pred through
    the distance of the centres. The union is worked into these.
    """
    shared = _clamp(tl.minimum(pred_high, target_high) - tl.maximum(pred_low, target_low))
    size, other_size = _clamp(pred_high - pred_low), _clamp(target_high - target_low)
    inter = _area(shared)
    union = _area(size) + _area(other_size) - inter
    by_hull = tl.zeros_like(pred_low)
    by_centre = tl.zeros_like(pred_low)
    if KIND != "iou":
        low, high = _ordered(pred_low, pred_high)
        other_low, other_high = _ordered(target_low, target_high)
        sides = tl.maximum(high, other_high) - tl.minimum(low, other_low)
    on_line = False
    if KIND == "giou":
        hull = _area(sides)
        on_line = hull < MIN_AREA  # both boxes, so that lengths take the place of areas
        union = tl.where(on_line, _sum(size) + _sum(other_size) - _sum(shared), union)
        hull = tl.where(on_line, _sum(sides), hull)
    iou = _divide(inter, union)
    per_union = _divide(1.0, union)
    overlap = iou
    by_union = -iou * per_union
    if KIND == "giou":
        overlap -= _divide(hull - union, hull)
        per_hull = _divide(1.0, hull)
        by_union += per_hull
        by_hull = -_both(_divide(union, hull) * per_hull) * _by_sides(sides, on_line)
    by_size = _both(by_union) * _by_sides(size, on_line)
    by_shared = _both(per_union) * _other(shared) - _both(by_union) * _by_sides(shared, on_line)
    if KIND == "diou" or KIND == "ciou":
        centres = ((pred_low - target_low) + (pred_high - target_high)) / 2
        diagonal = _sum(sides * sides)
        distance = _divide(_sum(centres * centres), diagonal)
        overlap -= distance
        per_diagonal = _both(_divide(1.0, diagonal))
        by_hull = 2 * _both(distance) * per_diagonal * sides
        by_centre = -per_diagonal * centres
    if KIND == "ciou":
        angle, by_width, by_height = _angle(size)
        other_angle, _, _ = _angle(other_size)
        turn = other_angle - angle
        shape = 4 / (PI * PI) * turn * turn
        alpha = _divide(shape, _clamp(1 - iou) + shape)
        overlap -= alpha * shape
        slope = alpha * (8 / (PI * PI)) * turn
        by_size += tl.join(slope * by_width, slope * by_height)
    return overlap, by_shared, by_size, by_hull, by_centre


@triton.jit
def _both(value):
    """Return the same for both axes."""
    return tl.join(value, value)


@triton.jit
def _clamp(size):
    """Return max(size, 0); NaN stays."""
    return tl.where(size < 0, 0.0, size)


@triton.jit
def _area(sides):
    width, height = tl.split(sides)
    return width * height


@triton.jit
def _sum(sides):
    width, height = tl.split(sides)
    return width + height


@triton.jit
def _other(sides):
    """Return the derivative of an area by its sides: each by the other one."""
    width, height = tl.split(sides)
    return tl.join(height, width)


@triton.jit
def _by_sides(sides, on_line):
    """Return the derivative, by its sides, of an area, or on a line of a length."""
    return tl.where(_both(on_line), 1.0, _other(sides))


@triton.jit
def _quotient(a, b):
    """Return a / b to the nearest; float32 division is 2 units off, and a / a not always 1."""
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _divide(a, b):
    """Return a / b, and 0 where b is next to nothing."""
    nothing = b < MIN_AREA
    return _quotient(tl.where(nothing, 0.0, a), tl.where(nothing, 1.0, b))


@triton.jit
def _ordered(low, high):
    """Return the corners of a box, swapped along the axes where it is inside-out."""
    inside_out = high < low
    return tl.where(inside_out, high, low), tl.where(inside_out, low, high)


@triton.jit
def _share(a, b):
    """Return the derivative of max(a, b), and -a of min(-a, -b), by a: half where they tie."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0)).to(a.dtype)


@triton.jit
def _angle(size):
    """Return arctan(width / height) in [0, pi / 2], and its derivatives by both; 0 for a point.

    In units of the longer side, or the square of a short one would vanish. Reduced to
    |t| <= tan(pi / 8), where the first left-out term of the Taylor series is
    t^(2 TERMS) / (2 TERMS + 1): 1e-9 and 6e-19. (The interpreter has no atan2.)
    """
    TERMS: tl.constexpr = 22 if size.dtype == tl.float64 else 10
    width, height = tl.split(size)
    longest = tl.maximum(width, height)
    point = longest < MIN_AREA
    scale = _per_power(tl.where(point, 1.0, longest))
    width, height = tl.where(point, 0.0, width * scale), tl.where(point, 1.0, height * scale)
    per_square = tl.where(point, 0.0, scale / (width * width + height * height))
    short, long = tl.minimum(width, height), tl.maximum(width, height)
    steep = short > long * TAN_EIGHTH  # arctan(r) = pi / 4 + arctan((r - 1) / (r + 1))
    t = _quotient(tl.where(steep, short - long, short), tl.where(steep, short + long, long))
    series = tl.zeros_like(t)
    for term in tl.static_range(TERMS):
        series = 1 / (2 * (TERMS - term) - 1) - series * t * t
    angle = series * t
    angle = tl.where(steep, PI / 4 + angle, angle)
    angle = tl.where(width > height, PI / 2 - angle, angle)
    return angle, per_square * height, -per_square * width
