"""Running sums along the sorted points, and their integral, always added in the same order.

At each point p of a segment something jumps, u_p. With the running sum before it, R_p, which is the
sum of u_q over q < p, and the distance d_p from the point before it (0 where no window lies between
them), the integral is

    I_p = sum_{q <= p} (R_q d_q + more_q).

A pair (u, I) of a stretch is put together with that of the next stretch by

    u = u_1 + u_2,      d = d_1 + d_2,      I = I_1 + I_2 + u_1 d_2,

so stretches are summed side by side first, and each then adds those before it.

With groups, many segments lie one behind the other. Every sum starts anew with each segment:
nothing of another segment is ever added, which would have to be taken away again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import jit

_STRETCH = 512  # points of a program
_BEFORE = 128  # stretches that a program adds at a time
_WARPS = 4
_GROUPED_WARPS = 8  # where segments begin is in registers too


@triton.jit
def _add(fresh_1, sum_1, fresh_2, sum_2):
    """Add sums that start anew at each fresh place, for tl.associative_scan."""
    return fresh_1 | fresh_2, tl.where(fresh_2 > 0, sum_2, sum_1 + sum_2)


@triton.jit
def _running(u, fresh):
    """Return prefix sums of a stretch; `fresh` (int32) is 1 where segments begin, None for one."""
    if fresh is None:
        return tl.cumsum(u, 0)
    else:
        return tl.associative_scan((fresh, u), 0, _add)[1]


@triton.jit
def _begun(fresh, x):
    """Return x, the same for a whole stretch, up to where a segment begins; 0 from there on."""
    if fresh is None:
        return x
    else:
        return tl.where(tl.cumsum(fresh, 0) > 0, 0.0, x)


@triton.jit
def _tail(fresh, x):
    """Return the sum of a stretch from where the last segment begins in it."""
    if fresh is None:
        return tl.sum(x, 0)
    else:
        place = tl.arange(0, x.shape[0])
        last = tl.max(tl.where(fresh > 0, place, 0), 0)
        return tl.sum(tl.where(place >= last, x, 0.0), 0)


@triton.jit
def _fresh(bounds, p, points, each, BACKWARD: tl.constexpr):
    """Return 1 where a segment begins, in the order of the sums."""
    mask = p < points
    at = points - 1 - p if BACKWARD else p
    bound = tl.load(bounds + at // each, mask=mask, other=-1) * each
    begins = at == (bound - 1 if BACKWARD else bound)
    return (begins & mask).to(tl.int32)


@triton.jit
def _read(jump, addend, high, low, windows, points, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Read a stretch: where its points are in memory, their jumps, distances, and what is added."""
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
    row = tl.cast(tl.program_id(1), tl.int64) * points
    u = tl.load(jump + row + at, mask=mask, other=0.0)
    extra = tl.zeros((BLOCK,), tl.float64)
    if addend is not None:
        extra = tl.load(addend + row + at, mask=mask, other=0.0)
    return row + at, mask, u, distance, extra


@jit
def _stretch_kernel(
    jump,  # (sums, points) float64; so is `addend`, or None
    addend,
    high,  # (points,) float64; high + low is where the points lie, ascending
    low,
    windows,  # (points,) int8: whether a window lies between a point and the next
    bounds,  # int32, see `integrate`
    sums,  # (sums, 3, stretches) float64, out: u, d and I of each stretch
    begun,  # (stretches,) int32, out: whether a segment begins in it; None without `bounds`
    points,
    each,
    stretches,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum each stretch as if it were alone, or the last segment that begins in it, if one does."""
    _, _, u, distance, extra = _read(jump, addend, high, low, windows, points, BACKWARD, BLOCK)
    fresh = None
    if bounds is not None:
        p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        fresh = _fresh(bounds, p, points, each, BACKWARD)
        tl.store(begun + tl.program_id(0), tl.max(fresh, 0))
    before = _running(u, fresh) - u
    out = sums + tl.cast(tl.program_id(1), tl.int64) * 3 * stretches + tl.program_id(0)
    tl.store(out, _tail(fresh, u))
    tl.store(out + stretches, _tail(fresh, distance))
    tl.store(out + 2 * stretches, _tail(fresh, before * distance + extra))


@triton.jit
def _before_stretch(sums, begun, stretches, this, BEFORE: tl.constexpr):
    """Return (u, I) of all that lies before a stretch and on the segment that it begins with."""
    total = tl.zeros((), tl.float64)
    area = tl.zeros((), tl.float64)
    for first in range(0, this, BEFORE):
        stretch = first + tl.arange(0, BEFORE)
        mask = stretch < this
        if begun is not None:
            begins = mask & (tl.load(begun + stretch, mask=mask, other=0) > 0)
            last = tl.max(tl.where(begins, stretch, -1), 0)
            mask = mask & (stretch >= last)
            total, area = tl.where(last < 0, total, 0.0), tl.where(last < 0, area, 0.0)
        u = tl.load(sums + stretch, mask=mask, other=0.0)
        distance = tl.load(sums + stretches + stretch, mask=mask, other=0.0)
        alone = tl.load(sums + 2 * stretches + stretch, mask=mask, other=0.0)
        area += tl.sum(alone + (total + (tl.cumsum(u, 0) - u)) * distance, 0)
        total += tl.sum(u, 0)
    return total, area


@jit
def _integral_kernel(
    jump,  # as in `_stretch_kernel`; so is what follows
    addend,
    high,
    low,
    windows,
    bounds,
    sums,
    begun,
    running,  # (sums, points) float64, out: R_p + u_p
    integral,  # (sums, points) float64, out: I_p
    points,
    each,
    stretches,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Add to each stretch what lies before it."""
    sums += tl.cast(tl.program_id(1), tl.int64) * 3 * stretches
    total, area = _before_stretch(sums, begun, stretches, tl.program_id(0), BEFORE)
    at, mask, u, distance, extra = _read(jump, addend, high, low, windows, points, BACKWARD, BLOCK)
    fresh = None
    if bounds is not None:
        p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        fresh = _fresh(bounds, p, points, each, BACKWARD)
    upto = _begun(fresh, total) + _running(u, fresh)
    tl.store(running + at, upto, mask=mask)
    inside = _running((upto - u) * distance + extra, fresh)
    tl.store(integral + at, _begun(fresh, area) + inside, mask=mask)


def integrate(
    jump: Tensor,
    addend: Tensor | None,
    high: Tensor,
    low: Tensor,
    windows: Tensor,
    bounds: Tensor | None,
    each: int,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Return the prefix sum, each point's own jump included, and the integral up to each point.

    Args:
        jump: (sums, points) float64; several sums share the points.
        addend: (sums, points) float64, added to the integral as it is; None for nothing.
        high, low: (points,) float64; high + low is where the points lie, ascending on each segment.
        windows: (points,) int8; 0 where the stretch behind a point counts for nothing.
        bounds: (P,) int32, of the sorted positives: where the segment of each begins, or, backward,
            where it ends; None for one segment.
        each: how many points of a segment there are for each positive on it.
        backward: from the last point to the first.

    Returns:
        running, integral: (sums, points) float64.
    """
    number, points = jump.shape
    stretches = triton.cdiv(points, _STRETCH)
    running, integral = torch.empty_like(jump), torch.empty_like(jump)
    grouped = bounds is not None
    common = {
        "jump": jump,
        "addend": addend,
        "high": high,
        "low": low,
        "windows": windows,
        "bounds": bounds,
        "sums": jump.new_empty((number, 3, stretches)),
        "begun": jump.new_empty(stretches, dtype=torch.int32) if grouped else None,
        "points": points,
        "each": each,
        "stretches": stretches,
        "BACKWARD": backward,
        "BLOCK": _STRETCH,
        "num_warps": _GROUPED_WARPS if grouped else _WARPS,
    }
    _stretch_kernel[(stretches, number)](**common)
    _integral_kernel[(stretches, number)](
        **common, running=running, integral=integral, BEFORE=_BEFORE
    )
    return running, integral
