"""The gradient by the negatives: linear between two breakpoints, so that its piece is looked up."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference.layout import Batch
from ..language import bits_of, finite, jit, nan_maximum, real
from ..segments import Segments, by_level
from ..strided import Axes, Extent, Groups
from ..tuning.block_sizes import BreakpointTiles
from .anchors import Anchors, gather_ignored, ignored_logits, lay_out_anchors, read_anchors
from .dense import (
    PATTERNS,
    have_patterns,
    is_aligned,
    lay_out_segments,
    pattern_of,
    pattern_scores,
    pieces,
    read_segments,
    read_tile,
    segment_of_tile,
    write_tile,
)
from .scan import integrate
from .sort import (
    ANY_POSITIVE,
    BAD_WEIGHT,
    HALVINGS,
    Breakpoints,
    LookUp,
    find,
    read_limits,
    within,
)


@jit
def _slopes_kernel(
    order,
    scores,
    ranks,
    weights,  # (P,) float64
    jump,  # (1, 2P) float64, out: how the slope of the gradient changes at each breakpoint
    flags,  # (_FLAGS,) int32, out
    positives,
    delta_bits: tl.int64,
    BLOCK: tl.constexpr,
):
    """Lay weights(i) / (2 delta) on the window of each positive, or a step of weights(i)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < positives
    delta = real(delta_bits, tl.float64)
    s = tl.load(scores + i, mask=mask, other=0.0)
    place = tl.load(order + i, mask=mask, other=0)
    weight = tl.load(weights + place, mask=mask & (s != float("-inf")), other=0.0)
    weight = tl.where(s == s, weight, float("nan"))
    bad = tl.max((weight - weight != 0.0).to(tl.int32), 0)
    tl.atomic_max(flags + BAD_WEIGHT, bad, sem="relaxed")
    steep = tl.where(delta == 0.0, weight, weight / (2 * delta))
    tl.store(jump + tl.load(ranks + i, mask=mask, other=0), steep, mask=mask)
    at = tl.load(ranks + positives + i, mask=mask, other=0)
    tl.store(jump + at, tl.where(delta == 0.0, 0.0 * weight, -steep), mask=mask)


@jit
def _linear_pieces_kernel(
    keys,
    high,
    low,
    windows,
    running,  # (1, 2P) float64: the slope behind each breakpoint; under the hard step, the value
    integral,  # (1, 2P) float64: the value at each breakpoint
    linear_pieces,  # (1 + 2P,) int64, or (2, 1 + 2P) float64, out: see `_write_piece`
    flags,
    breakpoints,
    delta_bits: tl.int64,
    BLOCK: tl.constexpr,
):
    """Make the gradient a linear piece behind each rounded breakpoint."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < breakpoints
    # 0, or NaN if any weight is not finite: that reaches every logit, since 0 times it is NaN.
    nan = tl.zeros((BLOCK,), tl.float64) + float("nan")
    nothing = tl.where(tl.load(flags + BAD_WEIGHT) > 0, nan, 0.0)
    hard = real(delta_bits, tl.float64) == 0.0
    slope = tl.load(running + place, mask=mask, other=0.0)
    value = tl.where(hard, slope, tl.load(integral + place, mask=mask, other=0.0))
    inside = tl.load(windows + place, mask=mask, other=0) != 0
    slope = tl.where(hard, 0.0, tl.where(inside, slope, 0.0))
    start = tl.load(high + place, mask=mask, other=0.0)
    rounded = tl.load(keys + place, mask=mask, other=0.0).to(tl.float64) - start
    rounded -= tl.load(low + place, mask=mask, other=0.0)
    value = tl.where(slope != 0.0, value + slope * rounded, value) + nothing
    _write_piece(linear_pieces, place + 1, value, slope, breakpoints, mask)
    # In front of all of them: what a logit gets that is relevant to nobody, and one that is NaN.
    lost = tl.where(tl.load(flags + ANY_POSITIVE) > 0, nan, 0.0)
    _write_piece(linear_pieces, place, nothing, lost, breakpoints, place == 0)


@triton.jit
def _write_piece(linear_pieces, place, value, slope, breakpoints, mask):
    """Write value and slope side by side: as 32 bits each they are read at once."""
    if linear_pieces.dtype.element_ty == tl.int64:
        value = value.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        # Where a positive's only negative is barely within reach, its slope may overflow. What the
        # negative gets is then all in the value, as long as the slope is a number.
        slope = finite(slope.to(tl.float32)).to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(linear_pieces + place, value | slope, mask=mask)
    else:
        tl.store(linear_pieces + place, value, mask=mask)
        tl.store(linear_pieces + breakpoints + 1 + place, slope, mask=mask)


@triton.jit
def _read_piece(linear_pieces, place, breakpoints):
    """Read (value, slope) that `_write_piece` has written."""
    if linear_pieces.dtype.element_ty == tl.int64:
        piece = tl.load(linear_pieces + place)
        value = piece.to(tl.int32).to(tl.float32, bitcast=True)
        return value, (piece >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return tl.load(linear_pieces + place), tl.load((linear_pieces + (breakpoints + 1)) + place)


@triton.jit
def _evaluate(s, segment, limits, look_up, linear_pieces, breakpoints):
    """Return the gradient at any scores; a NaN gets what one relevant to nobody gets."""
    inner = within(s, limits)
    found = find(inner, segment, limits, look_up)
    value, slope = _read_piece(linear_pieces, found, breakpoints)
    g = tl.fma(slope, inner - tl.load((look_up.keys - 1) + found), value)
    return tl.where(s >= limits.lowest, g, _read_piece(linear_pieces, 0, breakpoints)[0])


@jit
def _pattern_gradient_kernel(
    logits,  # for its dtype
    linear_pieces,
    out,  # (65,536,) of the logits' dtype: the gradient at each bit pattern
    keys,
    table,
    flags,
    limits,
    ends,
    cells,
    breakpoints,
    BLOCK: tl.constexpr,
):
    """Evaluate the gradient at every 16-bit logit there is."""
    pattern, s = pattern_scores(logits, BLOCK)
    look_up = LookUp(keys, table, tl.load(flags + HALVINGS), ends, cells)
    ordered = tl.where(s == s, s, 0.0)
    g = _evaluate(ordered, 0, read_limits(limits, 0), look_up, linear_pieces, breakpoints)
    g = tl.where(s == s, g, _read_piece(linear_pieces, 0, breakpoints)[1])
    tl.store(out + pattern, g.to(out.dtype.element_ty))


@triton.jit
def _gradient_of_tile(s, highest, segment, limits, look_up, linear_pieces, breakpoints):
    """Return the gradient at a tile of scores on one segment; NaN is left to others."""
    g = tl.zeros(s.shape, s.dtype) + _read_piece(linear_pieces, 0, breakpoints)[0]
    if (highest >= limits.lowest) | (highest != highest):
        g = _evaluate(s, segment, limits, look_up, linear_pieces, breakpoints)
    return g


@jit
def _gradient_kernel(
    logits,  # (size,) as they lie in memory
    targets,  # (size,) beside them, or None under class indices
    segments,  # int32, see `dense.lay_out_segments`; None without groups
    patterns,  # (65,536,) of 16-bit logits without groups, else None
    linear_pieces,
    out,  # (size,) beside the logits
    keys,
    table,
    flags,
    limits,
    ends,
    size: tl.int64,
    segments_0: tl.int64,
    segments_1: tl.int64,
    segments_2: tl.int64,
    middle,
    inner,
    middle_magic: tl.int64,
    inner_magic: tl.int64,
    cells,
    breakpoints,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write one tile: dL/ds_j = sum_i weights(i) H(x_ij) (Eq. 5), as if all were negatives."""
    dtype: tl.constexpr = keys.dtype.element_ty
    tile = tl.program_id(0)
    raw, behind = read_tile(logits, tile, size, 0.0, ALIGNED, ROWS * LANES)
    if patterns is not None:
        g = tl.load(patterns + pattern_of(raw))
    else:
        s = raw.to(dtype)
        look_up = LookUp(keys, table, tl.load(flags + HALVINGS), ends, cells)
        highest = tl.reduce(s, 0, nan_maximum)
        if segments is None:
            g = _gradient_of_tile(
                s, highest, 0, read_limits(limits, 0), look_up, linear_pieces, breakpoints
            )
        else:
            extent = Extent(middle, inner, middle_magic, inner_magic)
            groups = Groups(segments, Axes(segments_0, segments_1, segments_2))
            alone, segment, origin = segment_of_tile(groups, extent, tile, size, ROWS * LANES)
            if alone:
                of_segment = read_limits(limits, segment)
                g = _gradient_of_tile(
                    s, highest, segment, of_segment, look_up, linear_pieces, breakpoints
                )
            else:
                each = read_segments(groups, extent, origin, behind, ROWS * LANES)
                g = _evaluate(
                    s, each, read_limits(limits, each), look_up, linear_pieces, breakpoints
                )
        if highest != highest:
            g = tl.where(s == s, g, _read_piece(linear_pieces, 0, breakpoints)[1])
    if targets is not None:
        negative = read_tile(targets, tile, size, 1.0, False, ROWS * LANES)[0] == 0
        g = tl.where(negative, g, 0.0)
    write_tile(out, tile, behind, g.to(out.dtype.element_ty), ALIGNED, ROWS * LANES)


@jit
def _clear_kernel(
    anchor_targets,  # (rows, places) class indices
    out,  # (rows, classes, places), one level
    places: tl.int64,
    row_blocks,
    row_blocks_magic: tl.int64,
    classes,
    classes_magic: tl.int64,
    ignore_index,
    targets_row: tl.int64,
    targets_place: tl.int64,
    out_row: tl.int64,
    out_class: tl.int64,
    out_place: tl.int64,
    BLOCK: tl.constexpr,
):
    """Write 0 over what `_gradient_kernel` has taken for negatives and is none."""
    given = Anchors(
        anchor_targets, (targets_row, targets_place), places, row_blocks, row_blocks_magic,
        classes, classes_magic, ignore_index,
    )  # fmt: skip
    row, start, channel, positive, ignored = read_anchors(given, tl.program_id(0), BLOCK)
    out += row * out_row + start * out_place
    nothing = tl.zeros((BLOCK,), out.dtype.element_ty)
    at = out + channel * out_class + tl.arange(0, BLOCK) * out_place
    tl.store(at, nothing, mask=positive)
    number = tl.sum(ignored.to(tl.int32), 0)
    if classes >= BLOCK:  # one anchor occupies all lanes
        lane = tl.arange(0, BLOCK)
        for _ in range(number):
            anchor = tl.min(tl.where(ignored, lane, BLOCK), 0)
            ignored = ignored & (lane != anchor)
            for first in range(0, classes, BLOCK):
                at = out + (first + lane).to(tl.int64) * out_class + anchor * out_place
                tl.store(at, nothing, mask=first + lane < classes)
    elif number > 0:
        order = gather_ignored(ignored, BLOCK)
        for first in range(0, number * classes, BLOCK):
            anchor, channel, mask = ignored_logits(order, number, first, given, BLOCK)
            tl.store(out + channel * out_class + anchor * out_place, nothing, mask=mask)


def write_gradient(
    batch: Batch,
    gradients: Sequence[Tensor],
    breakpoints: Breakpoints,
    weights: Tensor,
    tiles: BreakpointTiles,
    segments: Segments | None,
) -> None:
    """Write the gradient by every negative into the levels' gradients, and 0 everywhere else."""
    logits = batch.logits
    linear_pieces = _linear_pieces(breakpoints, weights, batch.delta, tiles)
    number = breakpoints.high.numel()
    patterns = None
    if have_patterns(logits, segments):
        patterns = logits[0].new_empty(PATTERNS)
        _pattern_gradient_kernel[(PATTERNS // tiles.patterns,)](
            logits=logits[0],
            linear_pieces=linear_pieces,
            out=patterns,
            breakpoints=number,
            BLOCK=tiles.patterns,
            **breakpoints.look_up,
        )
    for level, out in zip(by_level(batch, segments), gradients, strict=True):
        if not out.numel():
            continue
        for piece, beside, segment, slot in pieces(*level, out):
            assert slot is not None  # `out` is given
            per_logit = beside.dim() == piece.dim()
            tile = tiles.gradient_rows * tiles.lanes
            _gradient_kernel[(triton.cdiv(piece.numel(), tile),)](
                logits=piece,
                targets=beside if per_logit else None,
                patterns=patterns,
                linear_pieces=linear_pieces,
                out=slot,
                size=piece.numel(),
                breakpoints=number,
                ALIGNED=is_aligned(piece, slot),
                ROWS=tiles.gradient_rows,
                LANES=tiles.lanes,
                num_warps=1,
                **lay_out_segments(piece, segment),
                **breakpoints.look_up,
            )
            if not per_logit:
                classes, ignored = piece.shape[1], batch.ignore_index
                blocks, anchors = lay_out_anchors(beside, classes, ignored, tiles.lanes, out=slot)
                _clear_kernel[(blocks,)](
                    out=slot,
                    out_class=slot.stride(1),
                    BLOCK=tiles.lanes,
                    num_warps=1,
                    **anchors,
                )


def _linear_pieces(
    breakpoints: Breakpoints, weights: Tensor, delta: float, tiles: BreakpointTiles
) -> Tensor:
    """Return the gradient's value and slope behind each breakpoint, see `_linear_pieces_kernel`."""
    number = breakpoints.high.numel()
    jump = breakpoints.high.new_empty((1, number))
    _slopes_kernel[(triton.cdiv(number // 2, tiles.block),)](
        order=breakpoints.order,
        scores=breakpoints.scores,
        ranks=breakpoints.ranks,
        weights=weights.contiguous(),
        jump=jump,
        flags=breakpoints.flags,
        positives=number // 2,
        delta_bits=bits_of(delta),
        BLOCK=tiles.block,
    )
    running, integral = integrate(
        jump,
        None,
        breakpoints.high,
        breakpoints.low,
        breakpoints.windows,
        breakpoints.starts,
        each=2,
        backward=False,
    )
    if breakpoints.scores.dtype == torch.float64:
        linear_pieces = jump.new_empty((2, 1 + number))
    else:
        linear_pieces = jump.new_empty(1 + number, dtype=torch.int64)
    _linear_pieces_kernel[(triton.cdiv(number, tiles.block),)](
        keys=breakpoints.keys,
        high=breakpoints.high,
        low=breakpoints.low,
        windows=breakpoints.windows,
        running=running,
        integral=integral,
        linear_pieces=linear_pieces,
        flags=breakpoints.flags,
        breakpoints=number,
        delta_bits=bits_of(delta),
        BLOCK=tiles.block,
    )
    return linear_pieces
