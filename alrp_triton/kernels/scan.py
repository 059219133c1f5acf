"""Running sums along the sorted line, and their integral, always added in the same order.

At each point p of a line something jumps, u_p. With the running sum before it, R_p, which is the
sum of u_q over q < p, and the distance d_p from the point before it (0 where no window lies between
them), the integral is

    I_p = sum_{q <= p} (R_q d_q + more_q).

A pair (u, I) of a stretch of the line is put together with that of the next stretch by

    u = u_1 + u_2,      d = d_1 + d_2,      I = I_1 + I_2 + u_1 d_2,

so stretches are summed side by side first, and each then adds those before it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .levels import jit

_STRETCH = 512  # points of a program
_BEFORE = 128  # stretches that a program adds at a time
_WARPS = 4


@triton.jit
def _read(jump, more, high, low, windows, points, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """A stretch: where its points are in memory, their jumps, distances, and what is more."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = p < points
    # Backward, a point's distance is to the one that follows it in memory.
    at = points - 1 - p if BACKWARD else p
    start = at if BACKWARD else at - 1
    between = mask & (start >= 0) & (start < points - 1)
    between = between & (tl.load(windows + start, mask=between, other=0) != 0)
    ahead = tl.load(high + start + 1, mask=between, other=0.0)
    behind = tl.load(high + start, mask=between, other=0.0)
    distance = ahead - behind
    ahead = tl.load(low + start + 1, mask=between, other=0.0)
    behind = tl.load(low + start, mask=between, other=0.0)
    distance += ahead - behind
    line = tl.cast(tl.program_id(1), tl.int64) * points
    u = tl.load(jump + line + at, mask=mask, other=0.0)
    extra = tl.zeros((BLOCK,), tl.float64)
    if more is not None:
        extra = tl.load(more + line + at, mask=mask, other=0.0)
    return line + at, mask, u, distance, extra


@jit
def _stretch_kernel(
    jump,  # (lines, points) float64; so is `more`, or None
    more,
    high,  # (points,) float64; high + low is where the points lie, ascending
    low,
    windows,  # (points,) int8: whether a window lies between a point and the next
    sums,  # (lines, 3, stretches) float64, out: u, d and I of each stretch
    points,
    stretches,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each stretch as if it were alone."""
    _, _, u, distance, extra = _read(jump, more, high, low, windows, points, BACKWARD, BLOCK)
    before = tl.cumsum(u, 0) - u
    out = sums + tl.cast(tl.program_id(1), tl.int64) * 3 * stretches + tl.program_id(0)
    tl.store(out, tl.sum(u, 0))
    tl.store(out + stretches, tl.sum(distance, 0))
    tl.store(out + 2 * stretches, tl.sum(before * distance + extra, 0))


@jit
def _integral_kernel(
    jump,  # as in `_stretch_kernel`; so is what follows
    more,
    high,
    low,
    windows,
    sums,
    running,  # (lines, points) float64, out: R_p + u_p
    integral,  # (lines, points) float64, out: I_p
    points,
    stretches,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Adds to each stretch what lies before it."""
    this = tl.program_id(0)
    sums += tl.cast(tl.program_id(1), tl.int64) * 3 * stretches
    total = tl.zeros((), tl.float64)
    area = tl.zeros((), tl.float64)
    for first in range(0, this, BEFORE):
        stretch = first + tl.arange(0, BEFORE)
        u = tl.load(sums + stretch, mask=stretch < this, other=0.0)
        distance = tl.load(sums + stretches + stretch, mask=stretch < this, other=0.0)
        alone = tl.load(sums + 2 * stretches + stretch, mask=stretch < this, other=0.0)
        area += tl.sum(alone + (total + (tl.cumsum(u, 0) - u)) * distance, 0)
        total += tl.sum(u, 0)
    at, mask, u, distance, extra = _read(jump, more, high, low, windows, points, BACKWARD, BLOCK)
    upto = total + tl.cumsum(u, 0)
    tl.store(running + at, upto, mask=mask)
    tl.store(integral + at, area + tl.cumsum((upto - u) * distance + extra, 0), mask=mask)


def integrate(
    jump: Tensor,
    more: Tensor | None,
    high: Tensor,
    low: Tensor,
    windows: Tensor,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """The running sum, each point's own jump included, and the integral up to each point.

    Args:
        jump: (lines, points) float64; several lines share the points.
        more: (lines, points) float64, added to the integral as it is; None for nothing.
        high, low: (points,) float64; high + low is where the points lie, ascending.
        windows: (points,) int8; 0 where the stretch behind a point counts for nothing.
        backward: from the last point to the first.

    Returns:
        running, integral: (lines, points) float64.
    """
    lines, points = jump.shape
    stretches = triton.cdiv(points, _STRETCH)
    sums = jump.new_empty((lines, 3, stretches))
    running, integral = torch.empty_like(jump), torch.empty_like(jump)
    common = {
        "jump": jump,
        "more": more,
        "high": high,
        "low": low,
        "windows": windows,
        "sums": sums,
        "points": points,
        "stretches": stretches,
        "BACKWARD": backward,
        "BLOCK": _STRETCH,
        "num_warps": _WARPS,
    }
    _stretch_kernel[(stretches, lines)](**common)
    _integral_kernel[(stretches, lines)](
        **common, running=running, integral=integral, BEFORE=_BEFORE
    )
    return running, integral
