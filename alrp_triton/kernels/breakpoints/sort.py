"""The sorted breakpoints of all positives, and the look-up of a score among them.

Positive i changes its mind about a score at two breakpoints only, s_i - delta and s_i + delta, and
all 2P of them in ascending order cut the line of scores into intervals. A breakpoint is kept twice:
exactly, as the unevaluated sum `high + low` of two floats, for everything that is summed along it;
and rounded up to the logits' dtype (`key`), so that a logit lies at or above the breakpoint exactly
where it is not below the key.

With groups, each has a segment of scores of its own (`groups`): the positives are sorted segment by
segment, and so are their breakpoints. A segment of the positives from place a on has the
breakpoints from 2a on, and its share of the table. Without groups there is one segment, from 0 on.

Everything happens on the device. Padding (-inf) sorts to the front of its segment, with breakpoints
at -inf that no interval starts from; a NaN sorts to the end and leaves the order meaningless, but
never an index out of bounds.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import LARGEST, bits_of, jit, real

_SORTED = 128  # positives of a program that places their breakpoints
_CELLS = 256  # cells of a program that fills the table
_MOST_CELLS = 1 << 16

# What `Breakpoints.flags` holds, by place.
HALVINGS = tl.constexpr(0)  # how often a search has to halve what a cell of the table holds
ANY_POSITIVE = tl.constexpr(1)  # whether there is a positive that is not padding
NAN_SCORE = tl.constexpr(2)  # whether the score of one is NaN
BAD_WEIGHT = tl.constexpr(3)  # whether the weight of one is not finite
_FLAGS = 4


# What kernels hand on; no argument of a launch, see `strided`.


class Limits(NamedTuple):
    """Where the breakpoints of a segment lie, or of many."""

    lowest: Any  # relevant logit; NaN where nothing is, which not even an infinite one reaches
    first: Any  # breakpoint, as its key
    last: Any
    scale: Any  # cells a unit


class LookUp(NamedTuple):
    """What a score is found by, see `Breakpoints`."""

    keys: Any
    table: Any
    halvings: Any
    ends: Any
    cells: Any


@triton.jit
def add_exactly(a, b):
    """Return a + b as high + low, exactly (Knuth's two-sum); an infinite a stays as it is."""
    high = a + b
    moved = high - a
    low = (a - (high - moved)) + (b - moved)
    return high, tl.where(tl.abs(a) == float("inf"), 0.0, low)


@triton.jit
def _round_up(high, low, dtype: tl.constexpr):
    """Return the smallest number of a dtype that is not below high + low."""
    key = high.to(dtype)
    wide = key.to(tl.float64)
    short = (wide < high) | ((wide == high) & (low > 0.0))
    bits = key.to(tl.int64 if dtype == tl.float64 else tl.int32, bitcast=True)
    bits = tl.where(key > 0.0, bits + 1, tl.where(key < 0.0, bits - 1, 1)).to(bits.dtype)
    return tl.where(short, bits.to(dtype, bitcast=True), key)


@triton.jit
def bounds_of(starts, ends, i, positives):
    """Return from where to where the segment of the positive in place i of the sorted reaches."""
    start, end = i * 0, i * 0 + positives
    if ends is not None:
        start = tl.load(starts + i, mask=i < positives, other=0)
        end = tl.load(ends + i, mask=i < positives, other=0)
    return start, end


@triton.jit
def _search(scores, segment, steps, high, low, INCLUSIVE: tl.constexpr):
    """Return how many sorted scores of a segment are below high + low (a vector), or not above."""
    start, end = segment
    found = tl.zeros(high.shape, tl.int32)
    for halving in range(steps):
        at = start + found + ((1 << (steps - 1 - halving)) - 1)
        score = tl.load(scores + at, mask=at < end, other=float("nan")).to(tl.float64)
        if INCLUSIVE:
            before = (score < high) | ((score == high) & (low >= 0.0))
        else:
            before = (score < high) | ((score == high) & (low > 0.0))
        found = tl.where(before, at + 1 - start, found)
    return found


@jit
def _merge_kernel(
    scores,  # (P,) segment by segment, ascending
    starts,  # (P,) int32: where the segment of each begins, and ends; None without groups
    ends,
    keys,  # (breakpoints,) out, in the dtype of the scores; behind the 2P breakpoints it holds inf
    high,  # (2P,) float64, out; so is the next
    low,
    windows,  # (2P,) int8, out: whether the interval that starts here lies in any window
    ranks,  # (5, P) int32, out: of s_i - delta and s_i + delta among breakpoints; of s_i - delta,
    # s_i and s_i + delta among breakpoints and scores together
    limits,  # (P + 1, 4) of the logits' dtype, out: see `Breakpoints`
    flags,  # (_FLAGS,) int32, out
    positives,
    steps,
    cells,
    delta_bits: tl.int64,
    BLOCK: tl.constexpr,
):
    """Place the two breakpoints of each positive by counting what stands before them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < positives
    _write_rest(keys + 2 * positives, limits + 4 * positives, i, positives, steps)
    s = tl.load(scores + i, mask=mask, other=float("inf")).to(tl.float64)
    delta = real(delta_bits, tl.float64)
    segment = bounds_of(starts, ends, i, positives)
    start, end = segment

    finite = s > float("-inf")
    out = (keys, high, low, windows)

    # 1. The merged order: among equals s_i - delta comes first, then s_i, then s_i + delta. Behind
    # s_i - delta a window is open.
    far_high, far_low = add_exactly(s, -2 * delta)
    lower = start + i + _search(scores, segment, steps, far_high, far_low, False)
    point_high, point_low = add_exactly(s, -delta)
    below = _search(scores, segment, steps, point_high, point_low, False)
    tl.store(ranks + i, lower, mask=mask)
    tl.store(ranks + 2 * positives + i, lower + start + below, mask=mask)
    _write_breakpoint(out, lower, point_high, point_low, finite, mask)

    # 2. Behind s_i + delta one is if more windows have opened than closed.
    far_high, far_low = add_exactly(s, 2 * delta)
    opened = _search(scores, segment, steps, far_high, far_low, True)
    upper = start + i + opened
    point_high, point_low = add_exactly(s, delta)
    upto = _search(scores, segment, steps, point_high, point_low, True)
    tl.store(ranks + positives + i, upper, mask=mask)
    tl.store(ranks + 3 * positives + i, 2 * start + i + below + upto, mask=mask)
    tl.store(ranks + 4 * positives + i, upper + start + upto, mask=mask)
    inside = finite & (opened > i - start + 1)
    upper_key = _write_breakpoint(out, upper, point_high, point_low, inside, mask)

    # 3. The segment from its first breakpoint to its last, by its last positive. Without one that
    # is ordered it has no length, and nothing is relevant on it.
    padding = _search(scores, segment, steps, tl.where(mask, float("-inf"), 0.0), 0.0 * i, True)
    ends_here = mask & (i == end - 1)
    first = tl.load(scores + start + padding, mask=ends_here & finite, other=0.0).to(tl.float64)
    first, first_low = add_exactly(first, -delta)
    first = _round_up(first, first_low, keys.dtype.element_ty)
    # What lies beyond LARGEST is ranked as LARGEST. So -inf is relevant where -LARGEST is.
    last = tl.where(finite, tl.minimum(upper_key, LARGEST), first)
    lowest = tl.where(first > -LARGEST, first, float("-inf"))
    number = cells * (end - start)
    width = tl.maximum(last - first, number * 1.2e-38)  # which keeps the scale finite
    at = limits + 4 * start
    tl.store(at, tl.where(finite, lowest, float("nan")), mask=ends_here)
    tl.store(at + 1, first, mask=ends_here)
    tl.store(at + 2, last, mask=ends_here)
    # Not even a division that is off by two units may lead behind the last cell.
    tl.store(at + 3, (number - 1) * (1 - 2.0**-20) / width, mask=ends_here)

    # 4. What concerns all segments.
    nan = mask & (s != s)
    tl.atomic_max(flags + NAN_SCORE, tl.max(nan.to(tl.int32), 0), sem="relaxed")
    valid = mask & (s != float("-inf"))
    tl.atomic_max(flags + ANY_POSITIVE, tl.max(valid.to(tl.int32), 0), sem="relaxed")


@triton.jit
def _write_breakpoint(out, at, point_high, point_low, inside, mask):
    """Write breakpoints to their places, and whether a window is open; return their keys."""
    keys, high, low, windows = out
    key = _round_up(point_high, point_low, keys.dtype.element_ty)
    tl.store(keys + at, key, mask=mask)
    tl.store(high + at, point_high, mask=mask)
    tl.store(low + at, point_low, mask=mask)
    tl.store(windows + at, inside.to(tl.int8), mask=mask)
    return key


@triton.jit
def _write_rest(keys, limits, i, positives, steps):
    """Write what is behind the last breakpoint, where a search may look, and nobody's segment."""
    for part in tl.static_range(4):
        behind = part * positives + i
        tl.store(keys + behind, float("inf"), mask=(i < positives) & (behind < (1 << steps)))
    tl.store(limits + i, tl.where(i == 0, float("nan"), 0.0), mask=i < 4)


@triton.jit
def _cell_bits(scores, limits):
    """Return the cell of scores between the first and the last breakpoint, rounded, as bits.

    It is the last bits of a float of 2^23 and more (float64: 2^52), less those of `_bits_before`.
    """
    distance = scores - limits.first
    if scores.dtype == tl.float64:
        return tl.fma(distance, limits.scale, 4503599627370496.0).to(tl.int64, bitcast=True)
    else:
        return tl.fma(distance, limits.scale, 8388608.0).to(tl.int32, bitcast=True)


@triton.jit
def _bits_before(dtype: tl.constexpr):
    """Return the bits of the cell 0."""
    if dtype == tl.float64:
        return 0x4330000000000000
    else:
        return 0x4B000000


@triton.jit
def read_limits(limits, segment):
    """Return the limits of a segment, or of many."""
    at = limits + 4 * segment
    return Limits(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))


@triton.jit
def within(scores, limits):
    """Move scores that lie beyond the first or the last breakpoint there."""
    return tl.minimum(tl.maximum(scores, limits.first), limits.last)


@jit
def _table_kernel(
    keys,  # (breakpoints,) ascending on each segment
    limits,
    starts,
    ends,
    table,  # (cells P + 1,) int32, out: the first breakpoint in no lower cell of its segment
    flags,  # (_FLAGS,) int32
    positives,
    steps,
    cells,
    BLOCK: tl.constexpr,
):
    """Tell each cell of a segment its first breakpoint."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment, behind = bounds_of(starts, ends, at // cells, positives)
    limits = read_limits(limits, segment)
    cell, first, number = at - cells * segment, 2 * segment, 2 * (behind - segment)
    zero = _bits_before(keys.dtype.element_ty)
    start = tl.zeros((BLOCK,), tl.int32)
    end = tl.zeros((BLOCK,), tl.int32)
    for halving in range(steps):
        step = 1 << (steps - 1 - halving)
        place = start + (step - 1)
        key = tl.load(keys + first + place, mask=place < number, other=float("nan"))
        before = (key < limits.first) | (
            (key <= limits.last) & (_cell_bits(key, limits) - zero < cell)
        )
        start = tl.where(before, place + 1, start)
        place = end + (step - 1)
        key = tl.load(keys + first + place, mask=place < number, other=float("nan"))
        before = (key < limits.first) | (
            (key <= limits.last) & (_cell_bits(key, limits) - zero <= cell)
        )
        end = tl.where(before, place + 1, end)
    # The cell behind all others is that of a segment without positives, which asks for some
    # breakpoint. So does a segment with a NaN; elsewhere no score is below the first breakpoint.
    nobody = at == cells * positives
    found = tl.where(nobody, 1, tl.maximum(first + start, 1))
    tl.store(table + at, found, mask=at <= cells * positives)
    most = tl.max(tl.where(at < cells * positives, end - start, 0), 0)
    needed = tl.zeros((), tl.int32)
    for power in tl.static_range(31):
        needed += (most >= (1 << power)).to(tl.int32)
    tl.atomic_max(flags + HALVINGS, needed, sem="relaxed")


@triton.jit
def find(scores, segment, limits, look_up):
    """Count the breakpoints not above each score, of its segment and of all before it.

    Args:
        scores: between the first and the last breakpoint of their segment.
        segment: where the segment begins, one for all scores or one for each; None without groups.
        limits: of the segment, see `read_limits`.
        look_up: of the call.
    """
    keys, ends = look_up.keys, look_up.ends
    table = look_up.table - _bits_before(scores.dtype)
    if ends is not None:
        table += segment * look_up.cells
    found = tl.load(table + _cell_bits(scores, limits))
    step = (1 << look_up.halvings) >> 1
    while step > 0:
        key = tl.load((keys + (step - 1)) + found)
        before = key <= scores
        if ends is not None:  # the breakpoints of the next segment follow
            before = before & (found + step <= 2 * tl.load(ends + segment))
        found = tl.where(before, found + step, found)
        step = step >> 1
    return found


class Breakpoints(NamedTuple):
    """The 2P breakpoints by segment, ascending, and the table that finds a score among them."""

    order: Tensor  # (P,) int64: the positives segment by segment, by ascending score
    scores: Tensor  # (P,) in that order
    starts: (
        Tensor | None
    )  # (P,) int32, in that order: where their segment begins; None without groups
    ends: Tensor | None  # (P + 1,) int32: where it ends; 0 behind them all
    keys: Tensor  # (2P and more,) of the scores' dtype, each breakpoint rounded up, then inf
    high: Tensor  # (2P,) float64; high + low is each breakpoint exactly
    low: Tensor  # (2P,) float64
    windows: Tensor  # (2P,) int8: whether the interval that starts here lies in any window
    ranks: Tensor  # (5, P) int32, see `_merge_kernel`
    limits: Tensor  # (P + 1, 4) of the scores' dtype: of the segment that begins at a positive,
    # see `read_limits`; nothing is relevant on one that has none, nor on the segment P
    table: Tensor  # (cells P + 1,) int32, see `_table_kernel`
    cells: int  # of the table for each positive
    flags: Tensor  # (_FLAGS,) int32, see above

    @property
    def look_up(self) -> dict[str, Any]:
        """What a kernel takes to find scores, by name."""
        names = ("keys", "table", "flags", "limits", "ends", "cells")
        return {name: getattr(self, name) for name in names}


def sort_breakpoints(
    scores: Tensor, delta: float, positive_segments: Tensor | None = None
) -> Breakpoints:
    """Sort the breakpoints of P > 0 positives; nothing waits for the device.

    Args:
        scores: (P,) finite scores, -inf for padding.
        delta: half-width of the step.
        positive_segments: (P,) int32, see `groups.Segments`; None for one segment.
    """
    positives, device = scores.numel(), scores.device
    ascending, order = torch.sort(scores, stable=True)
    starts = ends = None
    if positive_segments is not None:
        starts, by_line = torch.sort(positive_segments[order], stable=True)
        order, ascending = order[by_line], ascending[by_line]
        ends = torch.searchsorted(starts, starts, right=True, out_int32=True)
        ends = torch.nn.functional.pad(ends, (0, 1))
    breakpoints = 2 * positives
    steps = breakpoints.bit_length()
    total = min(max(_CELLS, triton.next_power_of_2(4 * breakpoints)), _MOST_CELLS)
    cells = max(1, total // positives)
    laid_out = Breakpoints(
        order=order,
        scores=ascending,
        starts=starts,
        ends=ends,
        keys=scores.new_empty(breakpoints + (1 << steps)),
        high=torch.empty(breakpoints, dtype=torch.float64, device=device),
        low=torch.empty(breakpoints, dtype=torch.float64, device=device),
        windows=torch.empty(breakpoints, dtype=torch.int8, device=device),
        ranks=torch.empty((5, positives), dtype=torch.int32, device=device),
        limits=scores.new_empty((positives + 1, 4)),
        table=torch.empty(cells * positives + 1, dtype=torch.int32, device=device),
        cells=cells,
        flags=torch.zeros(_FLAGS, dtype=torch.int32, device=device),
    )
    common = {
        "starts": starts,
        "ends": ends,
        "keys": laid_out.keys,
        "limits": laid_out.limits,
        "flags": laid_out.flags,
        "positives": positives,
        "steps": steps,
        "cells": cells,
    }
    _merge_kernel[(triton.cdiv(positives, _SORTED),)](
        scores=ascending,
        high=laid_out.high,
        low=laid_out.low,
        windows=laid_out.windows,
        ranks=laid_out.ranks,
        delta_bits=bits_of(delta),
        BLOCK=_SORTED,
        **common,
    )
    _table_kernel[(triton.cdiv(cells * positives + 1, _CELLS),)](
        table=laid_out.table, BLOCK=_CELLS, **common
    )
    return laid_out
