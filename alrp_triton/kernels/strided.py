"""A level of logits as a kernel reads it, in place, and numbers that no kernel specialises on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .language import divide, finite, magic_of

# What kernels hand on to the functions that they call. The kernels themselves keep flat signatures:
# Triton specialises on the elements of a tuple that is an argument of a launch.


class Axes(NamedTuple):
    """A number for each axis of a level, in the order of its memory."""

    outer: Any
    middle: Any
    inner: Any


class Extent(NamedTuple):
    """How long the inner axes are, and what `language.divide` divides by."""

    middle: Any
    inner: Any
    middle_magic: Any
    inner_magic: Any


class Level(NamedTuple):
    """A level from some logit on."""

    logits: Any
    targets: Any  # in the shape of the logits; stride 0 along the classes if they are class indices
    logits_strides: Axes
    targets_strides: Axes
    extent: Extent
    origin: Axes  # of that logit
    ignore_index: Any


class Groups(NamedTuple):
    """The groups of a level's logits, or their segments."""

    base: Any  # pointer; not "values", which a tuple of Triton's has already
    strides: Any  # `Axes`, or (row, place) of anchors


@triton.jit
def origin_of(start, extent):
    """Return where a share of a level begins: (outer, middle, inner) of its logit `start`."""
    inner = tl.cast(extent.inner, tl.int64)
    row = tl.cast(extent.middle, tl.int64) * inner
    outer = start // row
    rest = start - outer * row
    return Axes(outer, (rest // inner).to(tl.int32), (rest % inner).to(tl.int32))


@triton.jit
def places_of(local, origin, extent):
    """Return the axes of the logits `local` places behind an origin, without a division.

    The outer one counts from the origin.
    """
    row, inner = divide((local + origin.inner).to(tl.uint32), extent.inner, extent.inner_magic)
    row += tl.cast(origin.middle, tl.uint32)
    outer, middle = divide(row, extent.middle, extent.middle_magic)
    return Axes(outer.to(tl.int32), middle.to(tl.int32), inner.to(tl.int32))


@triton.jit
def offset_of(places, strides, WIDE: tl.constexpr):
    """Return where a place is in memory.

    WIDE tells what needs 64 bits: nothing, the outer axis, or all (0, 1, 2).
    """
    o, m, i = places
    if WIDE > 0:
        o = o.to(tl.int64)
    if WIDE > 1:
        m, i = m.to(tl.int64), i.to(tl.int64)
    return o * strides.outer + (m * strides.middle + i * strides.inner)


@triton.jit
def read_logits(level, local, dtype: tl.constexpr, CLASS_AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Read the logits `local` places behind the origin of a level.

    Returns them upcast and finite but for NaN; which of them are negatives; their places, see
    `places_of`.
    """
    # 1. Where they stand.
    outer = level.origin.outer
    places = places_of(local, level.origin, level.extent)
    logits = level.logits + outer * level.logits_strides.outer
    targets = level.targets + outer * level.targets_strides.outer
    scores = tl.load(logits + offset_of(places, level.logits_strides, WIDE))
    target = tl.load(targets + offset_of(places, level.targets_strides, WIDE))

    # 2. Negative is 0 among targets per logit, another class that is not ignored among indices.
    if CLASS_AXIS == -1:
        negative = target == 0
    else:
        if target.dtype.primitive_bitwidth < 32:
            target = target.to(tl.int32)
        channel = places[CLASS_AXIS]
        if CLASS_AXIS == 0:
            channel = outer + channel
        negative = (target != channel) & (target != level.ignore_index)
    return finite(scores.to(dtype)), negative, places


@triton.jit
def read_groups(groups, origin, places, WIDE: tl.constexpr):
    """Read the groups, or segments, of the logits at `places` of `read_logits`."""
    at = groups.base + origin.outer * groups.strides.outer
    return tl.load(at + offset_of(places, groups.strides, WIDE))


class Layout(NamedTuple):
    """A level's axes in the order of its memory: (outer, middle, inner)."""

    class_axis: int  # which of them is the class; -1 for targets per logit
    sizes: dict[str, int]
    strides: dict[str, int]
    wide: int  # offsets pass 2^31 along no axis (0), along the outer one (1), along more (2)


def lay_out(
    logits: Tensor, targets: Tensor, out: Tensor | None = None, groups: Tensor | None = None
) -> Layout:
    """Choose the order in which a level is read: along its fastest axis.

    Args:
        logits: (B, C, M).
        targets: (B, M) or (B, C, M).
        out: like the logits; what is left out has no strides.
        groups: like the targets.
    """
    long = [axis for axis in range(3) if logits.shape[axis] > 1]
    fastest = min(long, key=logits.stride, default=2)
    axes = sorted(range(3), key=lambda axis: (axis == fastest, axis))
    if [axis for axis in axes if axis in long] == long:
        axes = [0, 1, 2]  # axes of length 1 make no difference, and no other variant of a kernel
    if max(logits.shape[axis] for axis in axes[1:]) >= 1 << 30:  # only the outer one may be as long
        axes = sorted(range(3), key=lambda axis: -logits.shape[axis])
    given = {"logits": logits, "targets": targets, "out": out, "groups": groups}
    tensors = {
        name: tensor if tensor.dim() == logits.dim() else tensor[:, None, :].expand(logits.shape)
        for name, tensor in given.items()
        if tensor is not None
    }
    middle, inner = (logits.shape[axis] for axis in axes[1:])
    assert max(middle, inner) < 1 << 30, "a level's inner two axes must be shorter than 2^30"
    return Layout(
        -1 if targets.dim() == logits.dim() else axes.index(1),
        {
            "size": logits.numel(),
            "middle": middle,
            "inner": inner,
            "middle_magic": magic_of(middle),
            "inner_magic": magic_of(inner),
        },
        {
            f"{name}_{place}": tensor.stride(axis)
            for name, tensor in tensors.items()
            for place, axis in enumerate(axes)
        },
        max(
            2 if _span(tensor, axes[1:]) >= 1 << 31 else _span(tensor, axes) >= 1 << 31
            for tensor in tensors.values()
        ),
    )


def is_dense(tensor: Tensor, like: Tensor | None = None) -> bool:
    """Return whether the elements fill a stretch of memory, each in a place of its own.

    With `like`, also whether each stands in the same place as there.
    """
    steps = sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    )
    expected = 1
    for stride, size in steps:
        if stride != expected:
            return False
        expected *= size
    if like is None:
        return True
    return tensor.shape == like.shape and all(
        mine == other or size == 1
        for mine, other, size in zip(tensor.stride(), like.stride(), tensor.shape, strict=True)
    )


def _span(tensor: Tensor, axes: Sequence[int]) -> int:
    """Return how far apart two elements may stand along some axes."""
    return sum((tensor.shape[axis] - 1) * tensor.stride(axis) for axis in axes)
