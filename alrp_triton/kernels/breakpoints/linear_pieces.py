"""The gradient by the negatives: between two edges it is a straight ramp, which is looked up."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import bits_of, finite, jit, nan_maximum, real
from ..segments import Lines, by_level
from ..tuning.block_sizes import BreakpointTiles
from .dense import (
    PATTERNS,
    have_patterns,
    is_aligned,
    lay_out_anchors,
    lay_out_lines,
    line_of_tile,
    pattern_of,
    pattern_scores,
    pieces,
    read_anchors,
    read_lines,
    read_tile,
    write_tile,
)
from .scan import integrate
from .sort import ANY_POSITIVE, BAD_WEIGHT, HALVINGS, Edges, find, read_limits


@jit
def _slopes_kernel(
    order,
    scores,
    ranks,
    weights,  # (P,) float64
    jump,  # (1, 2P) float64, out: how the slope of the gradient changes at each edge
    known,  # (_KNOWN,) int32, out
    positives,
    delta_bits: tl.int64,
    BLOCK: tl.constexpr,
):
    """Each positive lays weights(i) / (2 delta) on its window, or a step of weights(i)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < positives
    delta = real(delta_bits, tl.float64)
    s = tl.load(scores + i, mask=mask, other=0.0)
    place = tl.load(order + i, mask=mask, other=0)
    weight = tl.load(weights + place, mask=mask & (s != float("-inf")), other=0.0)
    weight = tl.where(s == s, weight, float("nan"))
    bad = tl.max((weight - weight != 0.0).to(tl.int32), 0)
    tl.atomic_max(known + BAD_WEIGHT, bad, sem="relaxed")
    steep = tl.where(delta == 0.0, weight, weight / (2 * delta))
    tl.store(jump + tl.load(ranks + i, mask=mask, other=0), steep, mask=mask)
    at = tl.load(ranks + positives + i, mask=mask, other=0)
    tl.store(jump + at, tl.where(delta == 0.0, 0.0 * weight, -steep), mask=mask)


@jit
def _ramps_kernel(
    keys,
    high,
    low,
    windows,
    running,  # (1, 2P) float64: the slope behind each edge; under the hard step, the value
    integral,  # (1, 2P) float64: the value at each edge
    ramps,  # (1 + 2P,) int64, or (2, 1 + 2P) float64, out: see `_write_ramp`
    known,
    edges,
    delta_bits: tl.int64,
    BLOCK: tl.constexpr,
):
    """The gradient as a ramp behind each rounded edge."""
    edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = edge < edges
    # 0, or NaN if any weight is not finite: that reaches every logit, since 0 times it is NaN.
    nan = tl.zeros((BLOCK,), tl.float64) + float("nan")
    nothing = tl.where(tl.load(known + BAD_WEIGHT) > 0, nan, 0.0)
    hard = real(delta_bits, tl.float64) == 0.0
    slope = tl.load(running + edge, mask=mask, other=0.0)
    value = tl.where(hard, slope, tl.load(integral + edge, mask=mask, other=0.0))
    inside = tl.load(windows + edge, mask=mask, other=0) != 0
    slope = tl.where(hard, 0.0, tl.where(inside, slope, 0.0))
    start = tl.load(high + edge, mask=mask, other=0.0)
    rounded = tl.load(keys + edge, mask=mask, other=0.0).to(tl.float64) - start
    rounded -= tl.load(low + edge, mask=mask, other=0.0)
    value = tl.where(slope != 0.0, value + slope * rounded, value) + nothing
    _write_ramp(ramps, edge + 1, value, slope, edges, mask)
    # In front of all of them: what a logit gets that is relevant to nobody, and one that is NaN.
    lost = tl.where(tl.load(known + ANY_POSITIVE) > 0, nan, 0.0)
    _write_ramp(ramps, edge, nothing, lost, edges, edge == 0)


@triton.jit
def _write_ramp(ramps, place, value, slope, edges, mask):
    """Value and slope side by side: as 32 bits each they are read at once."""
    if ramps.dtype.element_ty == tl.int64:
        value = value.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        # Where a positive's only negative is barely within reach, its slope may overflow. What the
        # negative gets is then all in the value, as long as the slope is a number.
        slope = finite(slope.to(tl.float32)).to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(ramps + place, value | slope, mask=mask)
    else:
        tl.store(ramps + place, value, mask=mask)
        tl.store(ramps + edges + 1 + place, slope, mask=mask)


@triton.jit
def _read_ramp(ramps, place, edges):
    """(value, slope) that `_write_ramp` has written."""
    if ramps.dtype.element_ty == tl.int64:
        ramp = tl.load(ramps + place)
        value = ramp.to(tl.int32).to(tl.float32, bitcast=True)
        return value, (ramp >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return tl.load(ramps + place), tl.load((ramps + (edges + 1)) + place)


@triton.jit
def _evaluate(s, line, limits, look_up, ramps, edges):
    """The gradient at scores that may be anything; a NaN gets what one relevant to nobody gets."""
    inner = tl.minimum(tl.maximum(s, limits[1]), limits[2])
    found = find(inner, line, limits, look_up)
    value, slope = _read_ramp(ramps, found, edges)
    g = tl.fma(slope, inner - tl.load((look_up[0] - 1) + found), value)
    return tl.where(s >= limits[0], g, _read_ramp(ramps, 0, edges)[0])


@jit
def _pattern_ramps_kernel(
    logits,  # for its dtype
    ramps,
    out,  # (65,536,) of the logits' dtype: the gradient at each bit pattern
    keys,
    table,
    known,
    limits,
    ends,
    cells,
    edges,
    BLOCK: tl.constexpr,
):
    """Evaluates the gradient at every 16-bit logit there is."""
    pattern, s = pattern_scores(logits, BLOCK)
    look_up = (keys, table, tl.load(known + HALVINGS), ends, cells)
    ordered = tl.where(s == s, s, 0.0)
    g = _evaluate(ordered, 0, read_limits(limits, 0), look_up, ramps, edges)
    g = tl.where(s == s, g, _read_ramp(ramps, 0, edges)[1])
    tl.store(out + pattern, g.to(out.dtype.element_ty))


@triton.jit
def _gradient_of_tile(s, highest, line, limits, look_up, ramps, edges):
    """The gradient at a tile of scores that lies on one line; NaN is left to others."""
    g = tl.zeros(s.shape, s.dtype) + _read_ramp(ramps, 0, edges)[0]
    if (highest >= limits[0]) | (highest != highest):
        g = _evaluate(s, line, limits, look_up, ramps, edges)
    return g


@jit
def _gradient_kernel(
    logits,  # (size,) as they lie in memory
    targets,  # (size,) beside them, or None under class indices
    lines,  # int32, see `memory.lay_out_lines`; None without groups
    patterns,  # (65,536,) of 16-bit logits without groups, else None
    ramps,
    out,  # (size,) beside the logits
    keys,
    table,
    known,
    limits,
    ends,
    size: tl.int64,
    lines_0: tl.int64,
    lines_1: tl.int64,
    lines_2: tl.int64,
    middle,
    inner,
    middle_magic: tl.int64,
    inner_magic: tl.int64,
    cells,
    edges,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One tile of a level: dL/ds_j = sum_i weights(i) H(x_ij) (Eq. 5), as if all were negatives."""
    dtype: tl.constexpr = keys.dtype.element_ty
    tile = tl.program_id(0)
    raw, behind = read_tile(logits, tile, size, 0.0, ALIGNED, ROWS * LANES)
    if patterns is not None:
        g = tl.load(patterns + pattern_of(raw))
    else:
        s = raw.to(dtype)
        look_up = (keys, table, tl.load(known + HALVINGS), ends, cells)
        highest = tl.reduce(s, 0, nan_maximum)
        if lines is None:
            g = _gradient_of_tile(s, highest, 0, read_limits(limits, 0), look_up, ramps, edges)
        else:
            sizes = (middle, inner, middle_magic, inner_magic)
            grouping = (lines, (lines_0, lines_1, lines_2), sizes)
            alone, line, origin = line_of_tile(grouping, tile, size, ROWS * LANES)
            if alone:
                of_line = read_limits(limits, line)
                g = _gradient_of_tile(s, highest, line, of_line, look_up, ramps, edges)
            else:
                each = read_lines(grouping, origin, behind, ROWS * LANES)
                g = _evaluate(s, each, read_limits(limits, each), look_up, ramps, edges)
        if highest != highest:
            g = tl.where(s == s, g, _read_ramp(ramps, 0, edges)[1])
    if targets is not None:
        negative = read_tile(targets, tile, size, 1.0, False, ROWS * LANES)[0] == 0
        g = tl.where(negative, g, 0.0)
    write_tile(out, tile, behind, g.to(out.dtype.element_ty), ALIGNED, ROWS * LANES)


@jit
def _clear_kernel(
    targets,  # (batch, places) class indices
    out,  # (batch, classes, places), one level
    anchors: tl.int64,
    classes,
    places,
    out_0: tl.int64,
    out_1: tl.int64,
    out_2: tl.int64,
    targets_0: tl.int64,
    targets_1: tl.int64,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Writes 0 over what `_gradient_kernel` has taken for negatives and is none."""
    row, place, channel, positive, ignored = read_anchors(
        targets, anchors, classes, places, targets_0, targets_1, ignore_index, BLOCK
    )
    nothing = tl.zeros((BLOCK,), out.dtype.element_ty)
    start = -tl.max(positive.to(tl.int32), 0)
    for c in range(start, tl.max(ignored.to(tl.int32), 0) * classes):
        mask = tl.where(c < 0, positive, ignored)
        at = row * out_0 + tl.where(c < 0, channel, c) * out_1 + place * out_2
        tl.store(out + at, nothing, mask=mask)


def write_gradient(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    gradients: Sequence[Tensor],
    edges: Edges,
    weights: Tensor,
    delta: float,
    ignore_index: int,
    tiles: BreakpointTiles,
    lines: Lines | None,
) -> None:
    """Writes the gradient by every negative into the levels' gradients, and 0 everywhere else."""
    ramps = _ramps(edges, weights, delta, tiles)
    number = edges.high.numel()
    patterns = None
    if have_patterns(logits, lines):
        patterns = logits[0].new_empty(PATTERNS)
        _pattern_ramps_kernel[(PATTERNS // tiles.patterns,)](
            logits=logits[0],
            ramps=ramps,
            out=patterns,
            edges=number,
            BLOCK=tiles.patterns,
            **edges.look_up,
        )
    levels = zip(logits, targets, by_level(lines, logits), gradients, strict=True)
    for level, target, of_level, out in levels:
        if not out.numel():
            continue
        for piece, beside, line, slot in pieces(level, target, of_level, out):
            assert slot is not None  # `out` is given
            per_logit = beside.dim() == piece.dim()
            tile = tiles.gradient_rows * tiles.lanes
            _gradient_kernel[(triton.cdiv(piece.numel(), tile),)](
                logits=piece,
                targets=beside if per_logit else None,
                patterns=patterns,
                ramps=ramps,
                out=slot,
                size=piece.numel(),
                edges=number,
                ALIGNED=is_aligned(piece, slot),
                ROWS=tiles.gradient_rows,
                LANES=tiles.lanes,
                num_warps=1,
                **lay_out_lines(piece, line),
                **edges.look_up,
            )
            if not per_logit:
                grid, anchors = lay_out_anchors(piece, beside, ignore_index, tiles.block)
                _clear_kernel[grid](
                    out=slot,
                    out_0=slot.stride(0),
                    out_1=slot.stride(1),
                    out_2=slot.stride(2),
                    **anchors,
                )


def _ramps(edges: Edges, weights: Tensor, delta: float, tiles: BreakpointTiles) -> Tensor:
    """The gradient's value and slope behind each edge, see `_ramps_kernel`."""
    number = edges.high.numel()
    jump = edges.high.new_empty((1, number))
    _slopes_kernel[(triton.cdiv(number // 2, tiles.block),)](
        order=edges.order,
        scores=edges.scores,
        ranks=edges.ranks,
        weights=weights.contiguous(),
        jump=jump,
        known=edges.known,
        positives=number // 2,
        delta_bits=bits_of(delta),
        BLOCK=tiles.block,
    )
    running, integral = integrate(
        jump, None, edges.high, edges.low, edges.windows, edges.starts, each=2, backward=False
    )
    if edges.scores.dtype == torch.float64:
        ramps = jump.new_empty((2, 1 + number))
    else:
        ramps = jump.new_empty(1 + number, dtype=torch.int64)
    _ramps_kernel[(triton.cdiv(number, tiles.block),)](
        keys=edges.keys,
        high=edges.high,
        low=edges.low,
        windows=edges.windows,
        running=running,
        integral=integral,
        ramps=ramps,
        known=edges.known,
        edges=number,
        delta_bits=bits_of(delta),
        BLOCK=tiles.block,
    )
    return ramps
