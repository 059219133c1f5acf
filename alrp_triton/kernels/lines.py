"""The gradient by the negatives: between two edges it is a line, which is looked up."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .edges import Edges, find, read_limits
from .levels import bits_of, jit, nan_maximum, real
from .memory import (
    PATTERNS,
    is_aligned,
    lay_out_anchors,
    pattern_of,
    pattern_scores,
    pieces,
    read_anchors,
    read_tile,
    write_tile,
)
from .scan import integrate
from .tiles import BreakpointTiles


@jit
def _slopes_kernel(
    order,
    scores,
    ranks,
    weights,  # (P,) float64
    jump,  # (1, 2P) float64, out: how the slope of the gradient changes at each edge
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
    steep = tl.where(delta == 0.0, weight, weight / (2 * delta))
    tl.store(jump + tl.load(ranks + i, mask=mask, other=0), steep, mask=mask)
    at = tl.load(ranks + positives + i, mask=mask, other=0)
    tl.store(jump + at, tl.where(delta == 0.0, 0.0 * weight, -steep), mask=mask)


@jit
def _lines_kernel(
    keys,
    high,
    low,
    windows,
    running,  # (1, 2P) float64: the slope behind each edge; under the hard step, the value
    integral,  # (1, 2P) float64: the value at each edge
    lines,  # (1 + 2P,) int64, or (2, 1 + 2P) float64, out: see `_write_line`; the first is nothing
    edges,
    delta_bits: tl.int64,
    BLOCK: tl.constexpr,
):
    """The gradient as a line behind each rounded edge; 0 in front of the first."""
    edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = edge < edges
    # 0, or NaN if any weight is not finite: that reaches every logit, since 0 times it is NaN.
    nothing = 0.0 * tl.load(running + edges - 1)
    hard = real(delta_bits, tl.float64) == 0.0
    slope = tl.load(running + edge, mask=mask, other=0.0)
    value = tl.where(hard, slope, tl.load(integral + edge, mask=mask, other=0.0))
    inside = tl.load(windows + edge, mask=mask, other=0) != 0
    slope = tl.where(hard, 0.0, tl.where(inside, slope, 0.0))
    start = tl.load(high + edge, mask=mask, other=0.0)
    rounded = tl.load(keys + edge, mask=mask, other=0.0).to(tl.float64) - start
    rounded -= tl.load(low + edge, mask=mask, other=0.0)
    value = tl.where(slope != 0.0, value + slope * rounded, value) + nothing
    _write_line(lines, edge + 1, value, slope, edges, mask)
    _write_line(lines, edge, nothing + tl.zeros_like(value), tl.zeros_like(slope), edges, edge == 0)


@triton.jit
def _write_line(lines, place, value, slope, edges, mask):
    """Value and slope side by side: as 32 bits each they are read at once."""
    if lines.dtype.element_ty == tl.int64:
        value = value.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        slope = slope.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(lines + place, value | slope, mask=mask)
    else:
        tl.store(lines + place, value, mask=mask)
        tl.store(lines + edges + 1 + place, slope, mask=mask)


@triton.jit
def _read_line(lines, place, edges):
    """(value, slope) that `_write_line` has written."""
    if lines.dtype.element_ty == tl.int64:
        line = tl.load(lines + place)
        value = line.to(tl.int32).to(tl.float32, bitcast=True)
        return value, (line >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return tl.load(lines + place), tl.load((lines + (edges + 1)) + place)


@triton.jit
def _evaluate(s, keys, table, halvings, limits, lines, edges):
    """The gradient at scores that may be anything; `limits[0]` is inf where nobody is positive."""
    nothing, flat = _read_line(lines, 0, edges)
    inner = tl.minimum(tl.maximum(s, limits[1]), limits[2])
    found = find(inner, keys, table, halvings, limits)
    value, slope = _read_line(lines, found, edges)
    g = tl.fma(slope, inner - tl.load((keys - 1) + found), value)
    return tl.where(s >= limits[0], g, nothing + flat)


@jit
def _pattern_lines_kernel(
    logits,  # for its dtype
    lines,
    out,  # (65,536,) of the logits' dtype: the gradient at each bit pattern
    keys,
    table,
    halvings,
    limits,
    edges,
    BLOCK: tl.constexpr,
):
    """Evaluates the gradient at every 16-bit logit there is."""
    pattern, s = pattern_scores(logits, BLOCK)
    limits = read_limits(limits)
    ordered = tl.where(s == s, s, 0.0)
    g = _evaluate(ordered, keys, table, tl.load(halvings), limits, lines, edges)
    g = tl.where(s == s, g, tl.where(limits[0] < float("inf"), float("nan"), 0.0))
    tl.store(out + pattern, g.to(out.dtype.element_ty))


@jit
def _gradient_kernel(
    logits,  # (size,) as they lie in memory
    targets,  # (size,) beside them, or None under class indices
    patterns,  # (65,536,) of 16-bit logits, else None
    lines,
    out,  # (size,) beside the logits
    keys,
    table,
    halvings,
    limits,
    size: tl.int64,
    edges,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One tile of a level: dL/ds_j = sum_i weights(i) H(x_ij) (Eq. 5), as if all were negatives."""
    dtype: tl.constexpr = keys.dtype.element_ty
    tile = tl.program_id(0)
    raw, behind = read_tile(logits, tile, size, 0.0, ALIGNED, ROWS, LANES)
    if patterns is not None:
        g = tl.load(patterns + pattern_of(raw))
    else:
        s = raw.to(dtype)
        limits = read_limits(limits)
        highest = tl.reduce(tl.reduce(s, 0, nan_maximum), 0, nan_maximum)
        g = tl.zeros((ROWS, LANES), dtype) + _read_line(lines, 0, edges)[0]
        nan = (highest != highest) & (limits[0] < float("inf"))
        if (highest >= limits[0]) | nan:
            g = _evaluate(s, keys, table, tl.load(halvings), limits, lines, edges)
        if nan:
            g = tl.where(s == s, g, float("nan"))
    if targets is not None:
        negative = read_tile(targets, tile, size, 1, False, ROWS, LANES)[0] == 0
        g = tl.where(negative, g, 0.0)
    write_tile(out, tile, behind, g.to(out.dtype.element_ty), ALIGNED, ROWS, LANES)


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


def write_lines(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    gradients: Sequence[Tensor],
    edges: Edges,
    weights: Tensor,
    delta: float,
    ignore_index: int,
    tiles: BreakpointTiles,
) -> None:
    """Writes the gradient by every negative into the levels' gradients, and 0 everywhere else."""
    lines = _lines(edges, weights, delta, tiles)
    number = edges.high.numel()
    patterns = None
    for level, target, out in zip(logits, targets, gradients, strict=True):
        for piece, beside, slot in pieces(level, target, out) if level.numel() else ():
            if piece.element_size() == 2 and patterns is None:
                patterns = piece.new_empty(PATTERNS)
                _pattern_lines_kernel[(PATTERNS // tiles.patterns,)](
                    logits=piece,
                    lines=lines,
                    out=patterns,
                    edges=number,
                    BLOCK=tiles.patterns,
                    **edges.look_up,
                )
            per_logit = beside.dim() == piece.dim()
            tile = tiles.gradient_rows * tiles.lanes
            _gradient_kernel[(triton.cdiv(piece.numel(), tile),)](
                logits=piece,
                targets=beside if per_logit else None,
                patterns=patterns,
                lines=lines,
                out=slot,
                size=piece.numel(),
                edges=number,
                ALIGNED=is_aligned(piece, slot),
                ROWS=tiles.gradient_rows,
                LANES=tiles.lanes,
                num_warps=1,
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


def _lines(edges: Edges, weights: Tensor, delta: float, tiles: BreakpointTiles) -> Tensor:
    """The gradient's value and slope behind each edge, see `_lines_kernel`."""
    number = edges.high.numel()
    jump = edges.high.new_empty((1, number))
    _slopes_kernel[(triton.cdiv(number // 2, tiles.block),)](
        order=edges.order,
        scores=edges.scores,
        ranks=edges.ranks,
        weights=weights.contiguous(),
        jump=jump,
        positives=number // 2,
        delta_bits=bits_of(delta),
        BLOCK=tiles.block,
    )
    running, integral = integrate(jump, None, edges.high, edges.low, edges.windows, backward=False)
    if edges.scores.dtype == torch.float64:
        lines = jump.new_empty((2, 1 + number))
    else:
        lines = jump.new_empty(1 + number, dtype=torch.int64)
    _lines_kernel[(triton.cdiv(number, tiles.block),)](
        keys=edges.keys,
        high=edges.high,
        low=edges.low,
        windows=edges.windows,
        running=running,
        integral=integral,
        lines=lines,
        edges=number,
        delta_bits=bits_of(delta),
        BLOCK=tiles.block,
    )
    return lines
