"""A skewed error distribution: `reference/skewed.py` in Triton, name by name.

Every pair of a positive i and a negative j is evaluated: H(x_ij) in the dtype of the scores, the
margin m_ij = x_ij + delta and its power in float64, and so are the sums, always in the same order.
A tile of logits whose highest is below the lowest window of a block of positives is skipped. With
groups, a pair of two groups counts nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.layout import Batch
from .language import bits_of, jit, real
from .pairwise import step
from .positives import write_positive_grads
from .strided import (
    Axes,
    Extent,
    Groups,
    Level,
    lay_out,
    offset_of,
    origin_of,
    read_groups,
    read_logits,
)

_BLOCK = 1  # positives that meet a tile at once: with more, some compilers spill registers
_LANES = 128  # logits of a tile
_WARPS = 4
_PROGRAMS = 4096  # about how many shares the work of `mass` is cut into


@triton.jit
def _read_positives(scores, powers, positive_groups, first, positives, BLOCK: tl.constexpr):
    """Read a block of positives: scores (inf for padding), powers, groups if any, lowest score."""
    i = first + tl.arange(0, BLOCK)
    s = tl.load(scores + i, mask=i < positives, other=float("-inf"))
    valid = s != float("-inf")
    s = tl.where(valid, s, float("inf"))
    power = tl.load(powers + i, mask=i < positives, other=0.0)
    group = i
    if positive_groups is not None:
        group = tl.load(positive_groups + i, mask=i < positives, other=0)
    return s, power, group, tl.min(s, 0)


@triton.jit
def _read_tile(
    level, groups, local, end, dtype: tl.constexpr, CLASS_AXIS: tl.constexpr, WIDE: tl.constexpr
):
    """Read a tile of logits: -inf where no negative is; which are NaN; groups, if any; places."""
    inside = tl.minimum(local, end - 1)
    v, negative, places = read_logits(level, inside, dtype, CLASS_AXIS, WIDE)
    negative = negative & (local < end)
    nan = negative & (v != v)
    group = inside
    if groups is not None:
        group = read_groups(groups, level.origin, places, WIDE).to(tl.int64)
    return tl.where(negative & (v == v), v, float("-inf")), nan, group, places


@triton.jit
def _shares(tile, block, scale, delta, GROUPED: tl.constexpr, HARD: tl.constexpr):
    """Return H(x_ij) m_ij^power(i) (BLOCK, LANES) in float64; 0 between two groups."""
    v, group = tile
    s, power, own_group = block
    h = step(v[None, :], s[:, None], scale, False, HARD).to(tl.float64)
    if GROUPED:
        h = tl.where(group[None, :] == own_group[:, None], h, 0.0)
    margin = (v.to(tl.float64)[None, :] - s.to(tl.float64)[:, None]) + delta
    power = power[:, None]
    raised = tl.exp2(power * tl.log2(tl.where(margin > 0.0, margin, 1.0)))
    return h * tl.where(margin > 0.0, raised, tl.where(power == 0.0, 1.0, 0.0))


@jit
def _mass_kernel(
    logits,  # (outer, middle, inner), one level
    targets,  # the same shape; stride 0 along the classes if they are class indices
    groups,  # likewise, or None
    scores,  # (P,) finite, or NaN; -inf for padding
    powers,  # (P,) float64
    positive_groups,  # (P,) int64, or None
    partials,  # (splits, P) float64, is added to
    positives,
    splits,
    size: tl.int64,
    middle,
    inner,
    middle_magic: tl.int64,
    inner_magic: tl.int64,
    logits_0,
    logits_1,
    logits_2,
    targets_0,
    targets_1,
    targets_2,
    groups_0,
    groups_1,
    groups_2,
    ignore_index,
    delta_bits: tl.int64,
    scale_bits: tl.int64,
    CLASS_AXIS: tl.constexpr,
    HARD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sum mass(i) of a block of positives in a share of one level's logits."""
    dtype: tl.constexpr = scores.dtype.element_ty
    scale, delta = real(scale_bits, dtype), real(delta_bits, tl.float64)
    first = tl.program_id(0) * BLOCK
    s, power, own_group, lowest = _read_positives(
        scores, powers, positive_groups, first, positives, BLOCK
    )

    # 1. The share: whole tiles, as many for each.
    most = tl.cdiv(tl.cdiv(size, LANES), splits)
    start = tl.cast(tl.program_id(1), tl.int64) * most * LANES
    end = tl.maximum(tl.minimum(size - start, most * LANES), 0).to(tl.int32)
    extent = Extent(middle, inner, middle_magic, inner_magic)
    origin = origin_of(start, extent)
    logits_strides = Axes(logits_0, logits_1, logits_2)
    targets_strides = Axes(targets_0, targets_1, targets_2)
    level = Level(logits, targets, logits_strides, targets_strides, extent, origin, ignore_index)
    grouping = None
    if groups is not None:
        grouping = Groups(groups, Axes(groups_0, groups_1, groups_2))

    # 2. Tile by tile. A NaN has no share, and leaves no sum standing.
    total = tl.zeros((BLOCK,), tl.float64)
    seen = tl.zeros((LANES,), tl.int32)
    for t in range(tl.cdiv(end, LANES)):
        local = t * LANES + tl.arange(0, LANES)
        v, nan, group, _ = _read_tile(level, grouping, local, end, dtype, CLASS_AXIS, WIDE)
        seen |= nan.to(tl.int32)
        if tl.max(v, 0) - lowest >= -real(delta_bits, dtype):
            block = (s, power, own_group)
            shares = _shares((v, group), block, scale, delta, groups is not None, HARD)
            total += tl.sum(shares, 1)
    total = tl.where((tl.max(seen, 0) > 0) | (s != s), float("nan"), total)
    i = first + tl.arange(0, BLOCK)
    at = partials + tl.cast(tl.program_id(1), tl.int64) * positives + i
    mask = i < positives
    tl.store(at, tl.load(at, mask=mask) + total, mask=mask)


@jit
def _gradient_kernel(
    logits,  # as in `_mass_kernel`, and so are all arguments of these names
    targets,
    groups,
    scores,
    powers,
    positive_groups,
    weights,  # (P,) float64
    out,  # like logits
    positives,
    size: tl.int64,
    middle,
    inner,
    middle_magic: tl.int64,
    inner_magic: tl.int64,
    logits_0,
    logits_1,
    logits_2,
    targets_0,
    targets_1,
    targets_2,
    groups_0,
    groups_1,
    groups_2,
    out_0,
    out_1,
    out_2,
    ignore_index,
    delta_bits: tl.int64,
    scale_bits: tl.int64,
    CLASS_AXIS: tl.constexpr,
    HARD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write a tile of a level: sum_i weights(i) H(x_ij) m_ij^powers(i) at negatives, else 0."""
    dtype: tl.constexpr = scores.dtype.element_ty
    scale, delta = real(scale_bits, dtype), real(delta_bits, tl.float64)
    start = tl.cast(tl.program_id(0), tl.int64) * LANES
    extent = Extent(middle, inner, middle_magic, inner_magic)
    origin = origin_of(start, extent)
    logits_strides = Axes(logits_0, logits_1, logits_2)
    targets_strides = Axes(targets_0, targets_1, targets_2)
    level = Level(logits, targets, logits_strides, targets_strides, extent, origin, ignore_index)
    grouping = None
    if groups is not None:
        grouping = Groups(groups, Axes(groups_0, groups_1, groups_2))
    end = tl.minimum(size - start, LANES).to(tl.int32)
    local = tl.arange(0, LANES)
    v, nan, group, places = _read_tile(level, grouping, local, end, dtype, CLASS_AXIS, WIDE)
    negative = nan | (v > float("-inf"))
    highest = tl.max(v, 0)

    # 1. Block by block of positives. A weight or a score that is not finite reaches every logit.
    total = tl.zeros((LANES,), tl.float64)
    reached = 0
    for first in range(0, positives, BLOCK):
        s, power, own_group, lowest = _read_positives(
            scores, powers, positive_groups, first, positives, BLOCK
        )
        i = first + tl.arange(0, BLOCK)
        w = tl.load(weights + i, mask=(i < positives) & (s != float("inf")), other=0.0)
        w = tl.where(s == s, w, float("nan"))
        reached |= (lowest < float("inf")).to(tl.int32) | tl.max((s != s).to(tl.int32), 0)
        spoiled = tl.max((w - w != 0.0).to(tl.int32), 0) > 0
        if spoiled | (highest - lowest >= -real(delta_bits, dtype)):
            block = (s, power, own_group)
            shares = _shares((v, group), block, scale, delta, groups is not None, HARD)
            total += tl.sum(shares * w[:, None], 0)

    # 2. Rounded once; by way of float32, as torch rounds to 16 bits.
    total = tl.where(nan & (reached > 0), float("nan"), total)
    total = tl.where(negative, total, 0.0)
    at = out + origin.outer * out_0 + offset_of(places, Axes(out_0, out_1, out_2), WIDE)
    tl.store(at, total.to(dtype).to(out.dtype.element_ty), mask=local < end)


def _common(batch: Batch, powers: Tensor) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    scores, delta, groups = batch.scores, batch.delta, batch.positive_groups
    return {
        "scores": scores.contiguous(),
        "powers": powers.contiguous(),
        "positive_groups": None if groups is None else groups.contiguous(),
        "positives": scores.numel(),
        "ignore_index": batch.ignore_index,
        "delta_bits": bits_of(delta),
        "scale_bits": bits_of(min(0.5 / delta, torch.finfo(scores.dtype).max) if delta else 1.0),
        "HARD": delta == 0,
        "BLOCK": _BLOCK,
        "LANES": _LANES,
        "num_warps": _WARPS,
    }


def _of_level(
    logits: Tensor, targets: Tensor, groups: Tensor | None, out: Tensor | None
) -> dict[str, Any]:
    """Return arguments that describe a level."""
    layout = lay_out(logits, targets, out, groups)
    none = {} if groups is not None else dict.fromkeys(("groups_0", "groups_1", "groups_2"), 0)
    return {
        "logits": logits,
        "targets": targets,
        "groups": groups,
        **layout.sizes,
        **layout.strides,
        **none,
        "CLASS_AXIS": layout.class_axis,
        "WIDE": layout.wide,
    }


def mass(batch: Batch, powers: Tensor) -> Tensor:
    """Return what the shares of a positive's negatives sum to, as `reference.skewed.mass`.

    Args:
        batch: its scores are -inf for padding, anywhere, and its index -1.
        powers: as there.

    Returns:
        (P,) float64; 0 for padding. A NaN among the negatives makes all of it NaN.
    """
    positives = batch.scores.numel()
    blocks = triton.cdiv(positives, _BLOCK)
    longest = max((level.numel() for level in batch.logits), default=0)
    if not positives or not longest:
        return torch.zeros_like(powers)
    splits = min(triton.cdiv(_PROGRAMS, blocks), triton.cdiv(longest, _LANES), 1 << 15)
    splits = max(splits, triton.cdiv(longest, 1 << 30))  # places in a share are 32-bit
    shape = (splits, positives)
    partials = torch.zeros(shape, dtype=torch.float64, device=batch.scores.device)
    common = _common(batch, powers)
    with torch.cuda.device_of(batch.scores):
        for level, target, group in batch.levels():
            if level.numel():
                _mass_kernel[(blocks, splits)](
                    partials=partials,
                    splits=splits,
                    **common,
                    **_of_level(level, target, group, None),
                )
    return torch.where(batch.scores == -torch.inf, 0.0, partials.sum(0))


def gradient(batch: Batch, weights: Tensor, positive_grad: Tensor, powers: Tensor) -> list[Tensor]:
    """Return the gradient by every logit, as `reference.skewed.gradient`; with padding, if any.

    Args:
        batch: as in `mass`.
        weights, positive_grad, powers: as there.
    """
    gradients = [torch.empty_like(level) for level in batch.logits]
    common = _common(batch, powers)
    with torch.cuda.device_of(batch.scores):
        for level, out in zip(batch.levels(), gradients, strict=True):
            if out.numel():
                _gradient_kernel[(triton.cdiv(out.numel(), _LANES),)](
                    weights=weights.contiguous(),
                    out=out,
                    **common,
                    **_of_level(*level, out),
                )
        write_positive_grads(gradients, batch.index, positive_grad)
    return gradients
