"""The sorted breakpoints of all positives, and the look-up of a score among them.

Positive i changes its mind about a score at two edges only, s_i - delta and s_i + delta, and all 2P
of them in ascending order cut the line of scores into intervals. An edge is kept twice: exactly, as
the unevaluated sum `high + low` of two floats, for everything that is summed along the line; and
rounded up to the logits' dtype (`key`), so that a logit lies at or above the edge exactly where it
is not below the key.

Everything happens on the device. Padding (-inf) sorts to the front, with edges at -inf that no
interval starts from; a NaN sorts to the end and leaves the order meaningless, but never an index
out of bounds.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .levels import LARGEST, bits_of, jit, real

_SORTED = 128  # positives of a program that places their edges
_CELLS = 256  # cells of a program that fills the table
_MOST_CELLS = 1 << 16


@triton.jit
def add_exactly(a, b):
    """a + b as high + low, exactly (Knuth's two-sum); an infinite a stays as it is."""
    high = a + b
    moved = high - a
    low = (a - (high - moved)) + (b - moved)
    return high, tl.where(tl.abs(a) == float("inf"), 0.0, low)


@triton.jit
def _round_up(high, low, dtype: tl.constexpr):
    """The smallest number of a dtype that is not below high + low."""
    key = high.to(dtype)
    wide = key.to(tl.float64)
    short = (wide < high) | ((wide == high) & (low > 0.0))
    bits = key.to(tl.int64 if dtype == tl.float64 else tl.int32, bitcast=True)
    bits = tl.where(key > 0.0, bits + 1, tl.where(key < 0.0, bits - 1, 1)).to(bits.dtype)
    return tl.where(short, bits.to(dtype, bitcast=True), key)


@triton.jit
def _search(scores, positives, steps, high, low, INCLUSIVE: tl.constexpr):
    """How many of the sorted scores are below high + low, or not above it; high is a vector."""
    found = tl.zeros(high.shape, tl.int32)
    for halving in range(steps):
        at = found + ((1 << (steps - 1 - halving)) - 1)
        score = tl.load(scores + at, mask=at < positives, other=float("nan")).to(tl.float64)
        if INCLUSIVE:
            before = (score < high) | ((score == high) & (low >= 0.0))
        else:
            before = (score < high) | ((score == high) & (low > 0.0))
        found = tl.where(before, at + 1, found)
    return found


@jit
def _merge_kernel(
    scores,  # (P,) ascending
    keys,  # (edges,) out, in the dtype of the scores; behind the 2P edges it holds inf
    high,  # (2P,) float64, out; so is the next
    low,
    windows,  # (2P,) int8, out: whether the interval that starts here lies in any window
    ranks,  # (5, P) int32, out: of s_i - delta and s_i + delta among the edges; of s_i - delta,
    # s_i and s_i + delta among edges and scores together
    limits,  # (4,) of the logits' dtype, out: see `Edges`
    positives,
    steps,
    cells,
    delta_bits: tl.int64,
    BLOCK: tl.constexpr,
):
    """Places the two edges of each positive by counting what stands before them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < positives
    s = tl.load(scores + i, mask=mask, other=float("inf")).to(tl.float64)
    delta = real(delta_bits, tl.float64)

    # 1. The merged order: among equals s_i - delta comes first, then s_i, then s_i + delta.
    lower_high, lower_low = add_exactly(s, -delta)
    upper_high, upper_low = add_exactly(s, delta)
    far_high, far_low = add_exactly(s, -2 * delta)
    far_below = _search(scores, positives, steps, far_high, far_low, False)
    below = _search(scores, positives, steps, lower_high, lower_low, False)
    upto = _search(scores, positives, steps, upper_high, upper_low, True)
    far_high, far_low = add_exactly(s, 2 * delta)
    far_upto = _search(scores, positives, steps, far_high, far_low, True)
    lower, upper = i + far_below, i + far_upto
    tl.store(ranks + i, lower, mask=mask)
    tl.store(ranks + positives + i, upper, mask=mask)
    tl.store(ranks + 2 * positives + i, lower + below, mask=mask)
    tl.store(ranks + 3 * positives + i, i + below + upto, mask=mask)
    tl.store(ranks + 4 * positives + i, upper + upto, mask=mask)

    # 2. The edges in that order. Behind s_i - delta a window is open; behind s_i + delta one is if
    # more windows have opened than closed.
    finite = s > float("-inf")
    dtype: tl.constexpr = keys.dtype.element_ty
    lower_key = _round_up(lower_high, lower_low, dtype)
    upper_key = _round_up(upper_high, upper_low, dtype)
    tl.store(keys + lower, lower_key, mask=mask)
    tl.store(keys + upper, upper_key, mask=mask)
    tl.store(high + lower, lower_high, mask=mask)
    tl.store(high + upper, upper_high, mask=mask)
    tl.store(low + lower, lower_low, mask=mask)
    tl.store(low + upper, upper_low, mask=mask)
    tl.store(windows + lower, finite.to(tl.int8), mask=mask)
    tl.store(windows + upper, (finite & (far_upto > i + 1)).to(tl.int8), mask=mask)

    # 3. The line from the first edge to the last, by the last positive.
    padding = _search(scores, positives, steps, tl.where(mask, float("-inf"), 0.0), 0.0 * i, True)
    any_finite = finite & mask & (i == positives - 1)
    first = tl.load(scores + padding, mask=any_finite, other=0.0).to(tl.float64)
    first, first_low = add_exactly(first, -delta)
    first = _round_up(first, first_low, dtype)
    # Not less than what keeps the scale finite.
    last = tl.minimum(upper_key, LARGEST)  # which +inf is ranked as
    width = tl.maximum(last - first, cells * 1.2e-38)
    # A logit of -inf is ranked as -LARGEST, and so may be relevant.
    lowest = tl.where(first > -LARGEST / 2, first, float("-inf"))
    tl.store(limits + 0 * i, lowest, mask=any_finite)
    tl.store(limits + 1 + 0 * i, first, mask=any_finite)
    tl.store(limits + 2 + 0 * i, last, mask=any_finite)
    tl.store(limits + 3 + 0 * i, (cells - 1) / width, mask=any_finite)


@triton.jit
def _cell_bits(scores, limits):
    """The cell of the table that scores between the first and the last edge fall into, rounded.

    It is the last bits of a float of 2^23 and more (float64: 2^52), less those of `_bits_before`.
    """
    distance = scores - limits[1]
    if scores.dtype == tl.float64:
        return tl.fma(distance, limits[3], 4503599627370496.0).to(tl.int64, bitcast=True)
    else:
        return tl.fma(distance, limits[3], 8388608.0).to(tl.int32, bitcast=True)


@triton.jit
def _bits_before(dtype: tl.constexpr):
    """The bits of the cell 0."""
    if dtype == tl.float64:
        return 0x4330000000000000
    else:
        return 0x4B000000


@triton.jit
def read_limits(limits):
    """(lowest relevant logit, first edge, last edge, cells a unit): scalars."""
    return tl.load(limits), tl.load(limits + 1), tl.load(limits + 2), tl.load(limits + 3)


@jit
def _table_kernel(
    keys,  # (edges,) ascending
    limits,
    table,  # (cells,) int32, out: how many edges stand in lower cells
    halvings,  # (1,) int32: becomes how often a search has to halve what a cell holds
    edges,
    steps,
    BLOCK: tl.constexpr,
):
    """Tells each cell of the line its first edge."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    limits = read_limits(limits)
    zero = _bits_before(keys.dtype.element_ty)
    start = tl.zeros((BLOCK,), tl.int32)
    end = tl.zeros((BLOCK,), tl.int32)
    for halving in range(steps):
        step = 1 << (steps - 1 - halving)
        at = start + (step - 1)
        key = tl.load(keys + at, mask=at < edges, other=float("nan"))
        before = (key < limits[1]) | ((key <= limits[2]) & (_cell_bits(key, limits) - zero < cell))
        start = tl.where(before, at + 1, start)
        at = end + (step - 1)
        key = tl.load(keys + at, mask=at < edges, other=float("nan"))
        before = (key < limits[1]) | ((key <= limits[2]) & (_cell_bits(key, limits) - zero <= cell))
        end = tl.where(before, at + 1, end)
    tl.store(table + cell, start)
    most = tl.max(end - start, 0)
    needed = tl.zeros((), tl.int32)
    for power in tl.static_range(18):
        needed += (most >= (1 << power)).to(tl.int32)
    tl.atomic_max(halvings, needed, sem="relaxed")


@triton.jit
def find(scores, keys, table, halvings, limits):
    """How many edges are not above each score; scores lie between the first and the last edge."""
    found = tl.load((table - _bits_before(scores.dtype)) + _cell_bits(scores, limits))
    step = (1 << halvings) >> 1
    while step > 0:
        key = tl.load((keys + (step - 1)) + found)
        found = tl.where(key <= scores, found + step, found)
        step = step >> 1
    return found


class Edges(NamedTuple):
    """The 2P edges in ascending order, and the table that finds a score's place among them."""

    order: Tensor  # (P,) int64: the positives by ascending score
    scores: Tensor  # (P,) in that order
    keys: Tensor  # (2P and more,) of the scores' dtype, each edge rounded up, then inf
    high: Tensor  # (2P,) float64; high + low is each edge exactly
    low: Tensor  # (2P,) float64
    windows: Tensor  # (2P,) int8: whether the interval that starts here lies in any window
    ranks: Tensor  # (5, P) int32, see `_merge_kernel`
    look_up: dict[str, Any]  # what `find` takes, by name


def sort_edges(scores: Tensor, delta: float) -> Edges:
    """Sorts the edges of P > 0 finite scores, -inf for padding; nothing waits for the device."""
    positives = scores.numel()
    ascending, order = torch.sort(scores, stable=True)
    edges = 2 * positives
    steps = edges.bit_length()
    cells = min(max(_CELLS, triton.next_power_of_2(4 * edges)), _MOST_CELLS)
    device = scores.device
    # A search may look as far behind the last edge as it has steps.
    keys = scores.new_full((edges + (1 << steps),), torch.inf)
    high, low = torch.empty((2, edges), dtype=torch.float64, device=device)
    windows = torch.empty(edges, dtype=torch.int8, device=device)
    ranks = torch.empty((5, positives), dtype=torch.int32, device=device)
    limits = scores.new_zeros(4)
    limits[0] = torch.inf
    halvings = torch.zeros(1, dtype=torch.int32, device=device)
    table = torch.empty(cells, dtype=torch.int32, device=device)
    _merge_kernel[(triton.cdiv(positives, _SORTED),)](
        scores=ascending,
        keys=keys,
        high=high,
        low=low,
        windows=windows,
        ranks=ranks,
        limits=limits,
        positives=positives,
        steps=steps,
        cells=cells,
        delta_bits=bits_of(delta),
        BLOCK=_SORTED,
    )
    _table_kernel[(cells // _CELLS,)](
        keys=keys,
        limits=limits,
        table=table,
        halvings=halvings,
        edges=edges,
        steps=steps,
        BLOCK=_CELLS,
    )
    look_up = {"keys": keys, "table": table, "halvings": halvings, "limits": limits}
    return Edges(order, ascending, keys, high, low, windows, ranks, look_up)
