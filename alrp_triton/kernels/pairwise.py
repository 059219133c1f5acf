"""Every positive with every logit: `reference/pairwise.py` in Triton, name by name.

Notation: positives i, k with scores s_i; negatives j; x_ij = s_j - s_i; H the step of half-width
delta (Sec. 2.1). A program cuts its logits into tiles [rows, lanes], a thread for each lane, and
evaluates H once for each pair of a logit of the tile and a positive of a block, in registers.

Two ways to the same H. The difference first,

    H = clamp((s_j - s_i) scale + 1/2, 0, 1),       scale = 1 / (2 delta),

is as good as float32 allows, at three instructions a pair with the sum. The other,

    H = clamp(s_j scale + (1/2 - s_i scale), 0, 1),

takes two, and rounds 1/2 - s_i scale: an error of half a unit in the last place of that
number. A block of positives takes it where |s_i| scale <= FAST_RANGE in the whole block, so that
the error stays below 2.4e-7, and the difference elsewhere (small delta, large scores, one of delta
exactly; float64 always).

Sums run in float32 over a bounded number of terms, then in float64, always in the same order:
results repeat bit by bit, whatever the number of programs. Nothing waits for the device: how many
positives are not padding, and how the logits are shared out, is read there.

With groups, H of a pair of two groups is 0; their segments (`groups`) are compared, a number each.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.layout import Batch
from .language import bits_of, jit, nan_maximum, real
from .positives import write_positive_grads
from .segments import Segments, by_level, segments_of
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
from .tuning.block_sizes import Tiles
from .tuning.files import kind_of, tiles_for

# How far |s_i| scale may reach in a block of positives that takes the way of two instructions.
FAST_RANGE = tl.constexpr(4.0)

# Positives of a program that sums their ranks.
_RANKED = 8

# Positives that the gradient sums at a time, at most, where a pair takes a comparison: under the
# hard step, and with groups. With more, registers run out.
_HARD_FOLD = 16
_GROUPED_FOLD = 8

# Positives of a block that meet logits of several groups.
_MOST_GROUPED = 64

# What a block of positives is: how its row of the table is to be read.
_FAST = tl.constexpr(0)  # 1/2 - s_i scale
_EXACT = tl.constexpr(1)  # s_i
_SMALL = tl.constexpr(2)  # s_i, and no positive end_of_positives the first `SMALL_BLOCK` places


@triton.jit
def step(scores, shift, scale, FAST: tl.constexpr, HARD: tl.constexpr):
    """Return H(x) of logits and a row of the table, broadcast together. No NaN.

    See `_prepare_kernel` for the table.
    """
    if HARD:
        return tl.where(scores >= shift, 1.0, 0.0).to(scores.dtype)
    h = tl.fma(scores, scale, shift) if FAST else tl.fma(scores - shift, scale, 0.5)
    return tl.minimum(tl.maximum(h, 0.0), 1.0)


@triton.jit
def _shares(valid_end, programs, least_splits, most_splits, BLOCK: tl.constexpr):
    """Cut the count's work: blocks of positives, and shares of each level's logits."""
    blocks = tl.cdiv(tl.load(valid_end), BLOCK)
    splits = tl.minimum(programs // tl.maximum(blocks, 1), most_splits)
    return blocks, tl.maximum(splits, least_splits)


@jit
def _prepare_kernel(
    scores,  # (P,) finite, or NaN; -inf for padding
    weights,  # (P,) float64, or None
    table,  # (4, padded): what the pair loop reads of a positive; weights; of a block lowest, mode
    valid_end,  # (1,) int32, 0: becomes 1 + the last place that is not padding
    positives,
    padded: tl.int64,
    scale_bits: tl.int64,
    BLOCK: tl.constexpr,
    SMALL_BLOCK: tl.constexpr,
    HARD: tl.constexpr,
):
    """Decide how a block of positives is evaluated."""
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    i = tl.cast(block, tl.int64) * BLOCK + place
    s = tl.load(scores + i, mask=i < positives, other=float("-inf"))
    valid = s != float("-inf")
    scale = real(scale_bits, s.dtype)

    # 1. Two instructions a pair, or three.
    reach = tl.max(tl.where(valid, tl.abs(s), 0.0), 0) * scale
    shift = (0.5 - s.to(tl.float64) * scale.to(tl.float64)).to(s.dtype)
    # A shift of 0 would keep an H as small as a logit may be, and its reciprocal would overflow.
    fast = (reach <= FAST_RANGE) & (tl.min(tl.where(valid, tl.abs(shift), 1.0), 0) > 0.0)
    mode = tl.where(fast & (not HARD) & (s.dtype == tl.float32), _FAST, _EXACT)
    mode = tl.where(tl.max((valid & (place >= SMALL_BLOCK)).to(tl.int32), 0) > 0, mode, _SMALL)
    shift = tl.where(mode == _FAST, shift, s)
    # Padding has H = 0 with every logit.
    nothing = tl.where(mode == _FAST, float("-inf"), float("inf"))
    tl.store(table + i, tl.where(valid, shift, nothing))

    # 2. The lowest score: a logit more than delta below it means nothing to the block. But a weight
    # or a score that is not finite reaches every logit.
    lowest = tl.min(tl.where(valid, s, float("inf")), 0)
    if weights is not None:
        w = tl.load(weights + i, mask=i < positives, other=0.0)
        w = tl.where(s == s, w, float("nan"))
        lowest = tl.where(tl.max((w - w != 0.0).to(tl.int32), 0) > 0, float("-inf"), lowest)
        tl.store(table + padded + i, w.to(s.dtype))
    tl.store(table + 2 * padded + block, lowest)
    tl.store(table + 3 * padded + block, mode.to(s.dtype))
    tl.atomic_max(valid_end, tl.max(tl.where(valid, i + 1, 0), 0).to(tl.int32), sem="relaxed")


class Block(NamedTuple):
    """A block of positives, as the count takes it; not an argument of a launch, see `strided`."""

    table: Any  # see `_prepare_kernel`
    lowest: Any  # score
    scale: Any
    delta: Any
    segments: Any  # of all positives; None without groups
    first: Any  # place of its first positive


@triton.jit
def _count_tiles(
    level,
    segments,
    share,
    block,
    partials,
    FAST: tl.constexpr,
    NUMBER: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    HARD: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FOLD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the sum of H over the negatives of a share of a level to partials (NUMBER,)."""
    tiles, end = share
    scale, lowest, delta = block.scale, block.lowest, block.delta
    p = tl.arange(0, NUMBER)
    s = tl.load(block.table + block.first + p)
    positive_segment = s
    if block.segments is not None:
        positive_segment = tl.load(block.segments + block.first + p)
    # Read as a vector: a matrix from computed places Triton 3.6 reads in pieces of a few lanes.
    lane = tl.arange(0, ROWS * LANES)
    nfp = tl.zeros((NUMBER,), tl.float64)
    seen = tl.full((LANES,), float("-inf"), s.dtype)
    for chunk in range(0, tiles, FOLD):
        short = tl.zeros((NUMBER, LANES), s.dtype)
        for t in tl.range(chunk, tl.minimum(chunk + FOLD, tiles), num_stages=STAGES):
            # 1. A tile of logits. Whatever is no negative becomes -inf, for which H is 0.
            local = t * (ROWS * LANES) + lane
            v, negative, places = read_logits(
                level, tl.minimum(local, end - 1), s.dtype, CLASS_AXIS, WIDE
            )
            v = tl.where(negative & (local < end), v, float("-inf"))
            v = tl.reshape(v, (ROWS, LANES))

            # 2. A NaN stays in `seen`, since the clamp of H would lose it.
            highest = tl.reduce(v, 0, nan_maximum)
            seen = nan_maximum(seen, highest)

            # 3. NFP(i) = sum_j H(x_ij), Eq. 3, if there is any x_ij >= -delta at all.
            if tl.max((highest - lowest >= -delta).to(tl.int32), 0) > 0:
                h = step(v[:, None, :], s[None, :, None], scale, FAST, HARD)
                if block.segments is not None:
                    segment = read_groups(segments, level.origin, places, WIDE)
                    segment = tl.reshape(segment, (ROWS, LANES))
                    h = tl.where(segment[:, None, :] == positive_segment[None, :, None], h, 0.0)
                short += tl.sum(h, 0)
        nfp += tl.sum(short, 1).to(tl.float64)
    nfp = tl.where(tl.max((seen != seen).to(tl.int32), 0) > 0, float("nan"), nfp)
    tl.store(partials + p, tl.load(partials + p) + nfp)


@triton.jit
def _count_block(
    level,
    segments,
    share,
    block,
    mode,
    out,
    CLASS_AXIS: tl.constexpr,
    HARD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FOLD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Call `_count_tiles` by the way that `_prepare_kernel` chose for the block."""
    if mode == _SMALL:
        _count_tiles(
            level, segments, share, block, out, False, SMALL_BLOCK, CLASS_AXIS, HARD, WIDE,
            ROWS, LANES, FOLD, STAGES,
        )  # fmt: skip
    elif mode == _EXACT:
        if BLOCK > SMALL_BLOCK:
            _count_tiles(
                level, segments, share, block, out, False, BLOCK, CLASS_AXIS, HARD, WIDE,
                ROWS, LANES, FOLD, STAGES,
            )  # fmt: skip
    elif not HARD and block.lowest.dtype == tl.float32:
        _count_tiles(
            level, segments, share, block, out, True, BLOCK, CLASS_AXIS, HARD, WIDE,
            ROWS, LANES, FOLD, STAGES,
        )  # fmt: skip


@jit
def _count_kernel(
    logits,  # (outer, middle, inner), one level
    targets,  # the same shape; stride 0 along the classes if they are class indices
    segments,  # likewise, int32; None without groups
    table,  # (4, padded), of `_prepare_kernel`
    positive_segments,  # (padded,) int32; None without groups
    valid_end,  # (1,)
    partials,  # (items, BLOCK) float64, NFP of a block in a share of the logits; is added to
    padded: tl.int64,
    programs,
    least_splits,
    most_splits,
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
    segments_0,
    segments_1,
    segments_2,
    ignore_index,
    delta_bits: tl.int64,
    scale_bits: tl.int64,
    CLASS_AXIS: tl.constexpr,
    HARD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FOLD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Count NFP(i) of each block of positives in each share of one level's logits."""
    dtype: tl.constexpr = table.dtype.element_ty
    scale, delta = real(scale_bits, dtype), real(delta_bits, dtype)
    extent = Extent(middle, inner, middle_magic, inner_magic)
    logits_strides = Axes(logits_0, logits_1, logits_2)
    targets_strides = Axes(targets_0, targets_1, targets_2)
    grouping = Groups(segments, Axes(segments_0, segments_1, segments_2))
    blocks, splits = _shares(valid_end, programs, least_splits, most_splits, BLOCK)
    most = tl.cdiv(tl.cdiv(size, ROWS * LANES), splits)  # tiles of a share
    for item in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        # 1. A share of the logits. The blocks take turns at it, and so find it in the cache.
        start = tl.cast(item // blocks, tl.int64) * most * (ROWS * LANES)
        end = tl.minimum(size - start, most * (ROWS * LANES)).to(tl.int32)
        share = (tl.cdiv(end, ROWS * LANES), end)
        origin = origin_of(start, extent)
        level = Level(
            logits, targets, logits_strides, targets_strides, extent, origin, ignore_index
        )

        # 2. A block of positives.
        this = tl.cast(item % blocks, tl.int64)
        lowest = tl.load(table + 2 * padded + this)
        mode = tl.load(table + 3 * padded + this)
        block = Block(table, lowest, scale, delta, positive_segments, this * BLOCK)
        out = partials + tl.cast(item, tl.int64) * BLOCK
        _count_block(
            level, grouping, share, block, mode, out, CLASS_AXIS, HARD, WIDE, BLOCK, SMALL_BLOCK,
            ROWS, LANES, FOLD, STAGES,
        )  # fmt: skip


@jit
def _rank_kernel(
    scores,  # (P,), as in `_prepare_kernel`
    values,  # (P,) float64
    positive_segments,  # (padded,) int32; None without groups
    valid_end,  # (1,)
    partials,  # (items, BLOCK) float64, summed over all levels
    nfp,  # (P,) float64, out; so are the next two
    rank_positive,
    value_sum,
    positives,
    programs,
    least_splits,
    most_splits,
    scale_bits: tl.int64,
    HARD: tl.constexpr,
    BLOCK: tl.constexpr,
    NUMBER: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sum rank+(i) and S(i) of `NUMBER` positives, and their NFP(i) from its shares."""
    i = tl.cast(tl.program_id(0), tl.int64) * NUMBER + tl.arange(0, NUMBER)
    s_i = tl.load(scores + i, mask=i < positives, other=float("-inf"))
    valid = s_i != float("-inf")
    s_i = tl.where(valid, s_i, float("inf"))
    scale = real(scale_bits, s_i.dtype)
    lane = tl.arange(0, LANES)
    segment_i = i
    if positive_segments is not None:
        segment_i = tl.load(positive_segments + i, mask=i < positives, other=-1)

    # 1. rank+(i) = 1 + sum_{k != i} H(x_ik), Eq. 3; S(i) = sum_{k != i} values(k) H(x_ik), Eq. 10.
    rank = tl.zeros((NUMBER, LANES), tl.float64)
    total = tl.zeros((NUMBER, LANES), tl.float64)
    poison = tl.zeros((LANES,), tl.int32)
    end_of_positives = tl.load(valid_end)
    for first in range(0, end_of_positives, LANES):
        k = tl.cast(first, tl.int64) + lane
        s_k = tl.load(scores + k, mask=k < end_of_positives, other=float("-inf"))
        value = tl.load(values + k, mask=(k < end_of_positives) & (s_k != float("-inf")), other=0.0)
        poison |= (s_k != s_k).to(tl.int32)
        h = step(s_k[None, :], s_i[:, None], scale, False, HARD).to(tl.float64)
        if positive_segments is not None:
            segment = tl.load(positive_segments + k, mask=k < end_of_positives, other=-1)
            h = tl.where(segment[None, :] == segment_i[:, None], h, 0.0)
        h = tl.where(k[None, :] == i[:, None], 0.0, h)
        rank += h
        total += h * value[None, :]

    # 2. NFP(i): the shares in their order.
    blocks, splits = _shares(valid_end, programs, least_splits, most_splits, BLOCK)
    counted = tl.zeros((NUMBER, LANES), tl.float64)
    for first in range(0, splits, LANES):
        item = tl.cast(first + lane, tl.int64)[None, :] * blocks + (i // BLOCK)[:, None]
        mask = (first + lane < splits)[None, :] & (i < end_of_positives)[:, None]
        counted += tl.load(partials + item * BLOCK + (i % BLOCK)[:, None], mask=mask, other=0.0)

    # 3. A NaN score leaves no number standing; padding has none.
    nan = tl.where(tl.max(poison, 0) > 0, float("nan"), 0.0)
    mask = i < positives
    tl.store(nfp + i, tl.where(valid, tl.sum(counted, 1) + nan, 0.0), mask=mask)
    tl.store(rank_positive + i, tl.where(valid, 1 + tl.sum(rank, 1) + nan, 1.0), mask=mask)
    tl.store(value_sum + i, tl.where(valid, tl.sum(total, 1) + nan, 0.0), mask=mask)


@triton.jit
def _add_block(
    v,
    segment,
    block,
    number,
    scale,
    total,
    FAST: tl.constexpr,
    HARD: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Add sum_i weights(i) H(x_ij) over `number` positives to total, like v, FOLD at a time."""
    table, positive_segments, start, padded = block
    shift = table + start
    for first in range(0, number, FOLD):
        short = tl.zeros(v.shape, v.dtype)
        for p in tl.static_range(FOLD):
            s, w = tl.load(shift + first + p), tl.load(shift + padded + first + p)
            if positive_segments is not None:
                w = tl.where(segment == tl.load(positive_segments + start + first + p), w, 0.0)
            short = tl.fma(step(v, s, scale, FAST, HARD), w, short)
        total += short.to(tl.float64)
    return total


@jit
def _gradient_kernel(
    logits,  # (outer, middle, inner), one level
    targets,  # the same shape; stride 0 along the classes if they are class indices
    segments,  # likewise, int32; None without groups
    table,  # (4, padded), of `_prepare_kernel`
    positive_segments,  # (padded,) int32; None without groups
    valid_end,  # (1,)
    out,  # like logits
    padded: tl.int64,
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
    segments_0,
    segments_1,
    segments_2,
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
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Write a tile of a level: dL/ds_j = sum_i weights(i) H(x_ij) at negatives (Eq. 5), else 0."""
    dtype: tl.constexpr = table.dtype.element_ty
    scale, delta = real(scale_bits, dtype), real(delta_bits, dtype)
    start = tl.cast(tl.program_id(0), tl.int64) * (ROWS * LANES)
    extent = Extent(middle, inner, middle_magic, inner_magic)
    origin = origin_of(start, extent)

    # 1. The tile. A NaN goes straight into the sum, since the clamp of H would lose it.
    logits_strides = Axes(logits_0, logits_1, logits_2)
    targets_strides = Axes(targets_0, targets_1, targets_2)
    level = Level(logits, targets, logits_strides, targets_strides, extent, origin, ignore_index)
    end = tl.minimum(size - start, ROWS * LANES).to(tl.int32)
    local = tl.arange(0, ROWS * LANES)  # a vector, as in `_count_tiles`
    inside = local < end
    v, negative, places = read_logits(level, tl.minimum(local, end - 1), dtype, CLASS_AXIS, WIDE)
    end_of_positives = tl.load(valid_end)
    total = tl.where(negative & (v != v) & (end_of_positives > 0), float("nan"), 0.0).to(tl.float64)
    v = tl.where(negative & inside & (v == v), v, float("-inf"))
    highest = tl.max(v, 0)
    segment = local
    if segments is not None:
        groups = Groups(segments, Axes(segments_0, segments_1, segments_2))
        segment = read_groups(groups, origin, places, WIDE)

    # 2. Block by block of positives, those that all lie above by more than delta left out.
    for first in range(0, end_of_positives, BLOCK):
        block = (table, positive_segments, first, padded)
        lowest = tl.load(table + 2 * padded + first // BLOCK)
        mode = tl.load(table + 3 * padded + first // BLOCK)
        number = tl.minimum(end_of_positives - first, BLOCK)
        if segments is not None:  # what is not finite reaches the logits of other groups too
            total += tl.where(lowest == float("-inf"), float("nan"), 0.0)
        if highest - lowest >= -delta:
            if (not HARD and dtype == tl.float32) and mode == _FAST:
                total = _add_block(v, segment, block, number, scale, total, True, HARD, FOLD)
            else:
                total = _add_block(v, segment, block, number, scale, total, False, HARD, FOLD)

    # 3. Rounded once; by way of float32, as torch rounds to 16 bits.
    total = tl.where(negative, total, 0.0)
    at = out + origin.outer * out_0 + offset_of(places, Axes(out_0, out_1, out_2), WIDE)
    tl.store(at, total.to(dtype).to(out.dtype.element_ty), mask=inside)


class _Prepared(NamedTuple):
    table: Tensor  # (4, padded), see `_prepare_kernel`
    valid_end: Tensor  # (1,) int32
    common: dict[str, Any]  # arguments that every kernel takes


def choose_tiles(batch: Batch, tiles: Tiles | None = None) -> Tiles:
    """Return the sizes for a call, those of its class if none are given."""
    scores, grouped = batch.scores, batch.positive_groups is not None
    tiles = tiles or tiles_for(scores.device, *kind_of(batch))
    if scores.dtype == torch.float64:  # no more than registers hold
        return tiles._replace(
            few=min(tiles.few, 2 if grouped else 16),
            count_block=min(tiles.count_block, 4 if grouped else 16),
            count_rows=1,
            count_stages=1,
            gradient_block=min(tiles.gradient_block, 16),
            gradient_rows=1,
        )
    if grouped:  # the segment of every logit is in a register too
        return tiles._replace(
            few=min(tiles.few, 16),
            count_block=min(tiles.count_block, _MOST_GROUPED),
            count_rows=min(tiles.count_rows, 2),
            gradient_rows=min(tiles.gradient_rows, 4),
        )
    return tiles


def _prepare(
    batch: Batch, weights: Tensor | None, segments: Segments | None, block: int, few: int
) -> _Prepared:
    scores, delta = batch.scores, batch.delta
    blocks = triton.cdiv(scores.numel(), block)
    table = scores.new_empty((4, blocks * block))
    positive_segments = None
    if segments is not None:
        padding = table.shape[1] - scores.numel()
        positive_segments = torch.nn.functional.pad(segments.positives, (0, padding), value=-1)
    valid_end = torch.zeros(1, dtype=torch.int32, device=scores.device)
    common = {
        "scale_bits": bits_of(min(0.5 / delta, torch.finfo(scores.dtype).max) if delta else 1.0),
        "HARD": delta == 0,
        "BLOCK": block,
    }
    _prepare_kernel[(blocks,)](
        scores=scores.contiguous(),
        weights=None if weights is None else weights.contiguous(),
        table=table,
        valid_end=valid_end,
        positives=scores.numel(),
        padded=table.shape[1],
        SMALL_BLOCK=few,
        num_warps=1,
        **common,
    )
    return _Prepared(table, valid_end, {"positive_segments": positive_segments, **common})


def _of_level(
    logits: Tensor, targets: Tensor, segments: Tensor | None, out: Tensor | None = None
) -> dict[str, Any]:
    """Return arguments that describe a level."""
    layout = lay_out(logits, targets, out, segments)
    strides = {name.replace("groups", "segments"): x for name, x in layout.strides.items()}
    return {
        "logits": logits,
        "targets": targets,
        "segments": segments,
        "segments_0": 0,
        "segments_1": 0,
        "segments_2": 0,
        **layout.sizes,
        **strides,
        "CLASS_AXIS": layout.class_axis,
        "WIDE": layout.wide,
    }


def count(
    batch: Batch, values: Tensor, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return NFP(i), rank+(i) and S(i), as `reference.pairwise.count`; with padding, if any.

    Args:
        batch: its scores are -inf for padding, anywhere, and its index -1.
        values: as there.
        tiles: sizes of the kernels, if not those of the call's class on the device.

    Returns:
        Three (P,) float64 tensors; 0, 1 and 0 for padding. A NaN among the negatives makes NFP NaN,
        a NaN score everything.
    """
    scores = batch.scores
    nfp, rank_positive, value_sum = (
        torch.empty_like(scores, dtype=torch.float64) for _ in range(3)
    )
    if not scores.numel():
        return nfp, rank_positive, value_sum
    with torch.cuda.device_of(scores):
        tiles = choose_tiles(batch, tiles)
        segments = segments_of(batch)
        prepared = _prepare(batch, None, segments, tiles.count_block, tiles.few)
        partials, shares = _count_shares(batch, segments, prepared, tiles)
        _rank_kernel[(triton.cdiv(scores.numel(), _RANKED),)](
            scores=scores.contiguous(),
            values=values.contiguous(),
            valid_end=prepared.valid_end,
            partials=partials,
            nfp=nfp,
            rank_positive=rank_positive,
            value_sum=value_sum,
            positives=scores.numel(),
            **shares,
            NUMBER=_RANKED,
            LANES=tiles.lanes,
            num_warps=1,
            **prepared.common,
        )
    return nfp, rank_positive, value_sum


def _count_shares(
    batch: Batch, segments: Segments | None, prepared: _Prepared, tiles: Tiles
) -> tuple[Tensor, dict[str, int]]:
    """Count in shares of the logits: NFP of each block in each, and how `_shares` cuts them."""
    table, device = prepared.table, batch.scores.device
    lanes = tiles.lanes * tiles.count_warps
    levels = [level for level in by_level(batch, segments) if level[0].numel()]
    longest = max((level[0].numel() for level in levels), default=0)
    blocks = table.shape[1] // tiles.count_block
    shares = {
        "programs": tiles.count_programs,
        "least_splits": triton.cdiv(longest, 1 << 30),  # places in a share are 32-bit
        "most_splits": triton.cdiv(longest, tiles.count_rows * lanes),
    }
    items = max(tiles.count_programs, blocks * shares["least_splits"])
    items = min(items, blocks * shares["most_splits"])
    partials = torch.zeros((items, tiles.count_block), dtype=torch.float64, device=device)
    for level in levels:
        _count_kernel[(items,)](
            table=table,
            valid_end=prepared.valid_end,
            partials=partials,
            padded=table.shape[1],
            ignore_index=batch.ignore_index,
            delta_bits=bits_of(batch.delta),
            **shares,
            **_of_level(*level),
            SMALL_BLOCK=tiles.few,
            ROWS=tiles.count_rows,
            LANES=lanes,
            FOLD=tiles.count_fold,
            STAGES=tiles.count_stages,
            num_warps=tiles.count_warps,
            **prepared.common,
        )
    return partials, shares


def gradient(
    batch: Batch, weights: Tensor, positive_grad: Tensor, tiles: Tiles | None = None
) -> list[Tensor]:
    """Return the gradient by every logit, as `reference.pairwise.gradient`; with padding, if any.

    Args:
        batch, tiles: as in `count`.
        weights, positive_grad: as there.
    """
    gradients = [torch.empty_like(level) for level in batch.logits]
    with torch.cuda.device_of(batch.scores):
        tiles = choose_tiles(batch, tiles)
        block, rows = tiles.gradient_block, tiles.gradient_rows
        segments = segments_of(batch)
        table, valid_end, common = _prepare(batch, weights, segments, block, tiles.few)
        lanes = tiles.lanes * tiles.gradient_warps
        fold = min(tiles.gradient_fold, block, _HARD_FOLD if batch.delta == 0 else block)
        if segments is not None:
            fold = min(fold, _GROUPED_FOLD)
        for level, out in zip(by_level(batch, segments), gradients, strict=True):
            if out.numel():
                _gradient_kernel[(triton.cdiv(out.numel(), rows * lanes),)](
                    table=table,
                    valid_end=valid_end,
                    out=out,
                    padded=table.shape[1],
                    ignore_index=batch.ignore_index,
                    delta_bits=bits_of(batch.delta),
                    **_of_level(*level, out),
                    ROWS=rows,
                    LANES=lanes,
                    FOLD=fold,
                    num_warps=tiles.gradient_warps,
                    **common,
                )
        write_positive_grads(gradients, batch.index, positive_grad)
    return gradients
