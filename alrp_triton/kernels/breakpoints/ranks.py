"""Counts and sums between the sorted breakpoints: `reference/breakpoints/ranks.py` in Triton.

H is piecewise linear, so NFP(i) needs only how many negatives lie in each interval between two
breakpoints, and the sum of their distances to its start; and the gradient by s_j is linear in each
interval. A logit is read once and looked up: what the positives cost does not grow with N.

    breakpoints       sorts the 2P breakpoints s_i - delta, s_i + delta, and finds a score among
    them intervals   counts the negatives between them, in integers scan        sums along the
    points linear_pieces       writes the gradient groups      gives each group a segment of its own

Nothing waits for the device, nothing is P x P, and results repeat bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference.layout import Batch
from ..language import bits_of, jit, real
from ..positives import write_positive_grads
from ..segments import segments_of
from ..tuning.block_sizes import BreakpointTiles
from ..tuning.files import breakpoint_tiles_for, kind_of
from .histogram import count_negatives
from .linear_pieces import write_gradient
from .scan import integrate
from .sort import NAN_SCORE, add_exactly, bounds_of, sort_breakpoints


@jit
def _points_kernel(
    order,  # (P,) int64, as in `Breakpoints`; so are the next three
    scores,
    ranks,
    windows,
    values,  # (P,) float64
    numbers,  # (2P,) float64: how many negatives lie behind each breakpoint, and the sum of their
    distances,  # distances to it
    jump,  # (3, 3P) float64, out: by how much the number of negatives, that of positives and the
    # sum of their values change at each point
    addend,  # (3, 3P) float64, out: those distances, and nothing of the other two
    high,  # (3P,) float64, out: where the points lie; so is the next
    low,
    opened,  # (3P,) int8, out: whether a window lies behind each of them
    positives,
    delta_bits: tl.int64,
    BLOCK: tl.constexpr,
):
    """Put positives and breakpoints in one order: in between no rank among positives changes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < positives
    delta = real(delta_bits, tl.float64)
    s = tl.load(scores + i, mask=mask, other=0.0).to(tl.float64)
    valid = s != float("-inf")
    place = tl.load(order + i, mask=mask, other=0)
    value = tl.load(values + place, mask=mask & valid, other=0.0)
    nothing = tl.zeros((BLOCK,), tl.float64)
    for side in tl.static_range(3):
        at = tl.load(ranks + (2 + side) * positives + i, mask=mask, other=0)
        point, rest = add_exactly(s, (side - 1) * delta)
        if side == 1:
            behind, distance = valid, nothing
            column = (nothing, valid.to(tl.float64), value)
        else:
            rank = tl.load(ranks + side // 2 * positives + i, mask=mask, other=0)
            behind = tl.load(windows + rank, mask=mask, other=0) != 0
            distance = tl.load(distances + rank, mask=mask, other=0.0)
            column = (tl.load(numbers + rank, mask=mask, other=0.0), nothing, nothing)
        tl.store(high + at, point, mask=mask)
        tl.store(low + at, rest, mask=mask)
        tl.store(opened + at, behind.to(tl.int8), mask=mask)
        _store_column(jump, at, column, positives, mask)
        _store_column(addend, at, (distance, nothing, nothing), positives, mask)


@triton.jit
def _store_column(out, at, column, positives, mask):
    """Store three numbers at each of some points, of (3, 3P)."""
    for row in tl.static_range(3):
        tl.store(out + row * 3 * positives + at, column[row], mask=mask)


@jit
def _finish_kernel(
    order,  # as in `_points_kernel`
    scores,
    ends,  # as in `Breakpoints`; so is the next
    flags,
    ranks,
    values,
    unordered,  # (1,) int64: how many negatives are NaN
    running,  # (3, 3P) float64: what lies at or above each point, see `jump`
    integral,  # (3, 3P) float64: of that, from the last point down, over the windows
    nfp,  # (P,) float64, out; so are the next two
    rank_positive,
    value_sum,
    positives,
    delta_bits: tl.int64,
    BLOCK: tl.constexpr,
):
    """Sum a positive's H: it is the mean over its window of how many lie at or above."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < positives
    delta = real(delta_bits, tl.float64)
    s = tl.load(scores + i, mask=mask, other=0.0)
    valid = s != float("-inf")
    place = tl.load(order + i, mask=mask, other=0)
    value = tl.load(values + place, mask=mask & valid, other=0.0)
    lower = tl.load(ranks + 2 * positives + i, mask=mask, other=0)
    upper = tl.load(ranks + 4 * positives + i, mask=mask, other=0)
    row = 3 * positives
    count = _window_mean(running, integral, lower, upper, mask, delta)
    running, integral = running + row, integral + row
    others = _window_mean(running, integral, lower, upper, mask, delta)
    running, integral = running + row, integral + row
    total = _window_mean(running, integral, lower, upper, mask, delta)

    # 1. The others: less itself, for which H is 1/2 (1 under the hard step). Exactly nothing where
    # nobody else stands at or above the window.
    itself = tl.where(delta == 0.0, 1.0, 0.5)
    _, end = bounds_of(ends, ends, i, positives)
    alone = lower - tl.load(ranks + i, mask=mask, other=0) == end - 1
    others = tl.where(alone, 0.0, others - itself)
    total = tl.where(alone, 0.0, total - itself * value)

    # 2. NaN has no place in any order.
    nan = tl.where(tl.load(flags + NAN_SCORE) > 0, float("nan"), 0.0).to(tl.float64)
    count += nan + tl.where(tl.load(unordered) != 0, float("nan"), 0.0)
    tl.store(nfp + place, tl.where(valid, count, 0.0), mask=mask)
    tl.store(rank_positive + place, tl.where(valid, 1.0 + others + nan, 1.0), mask=mask)
    tl.store(value_sum + place, tl.where(valid, total + nan, 0.0), mask=mask)


@triton.jit
def _window_mean(running, integral, lower, upper, mask, delta):
    """Return the mean between two breakpoints, by the integral; of a hard step, the lower value."""
    at_point = tl.load(running + lower, mask=mask, other=0.0)
    area = tl.load(integral + lower, mask=mask, other=0.0)
    area -= tl.load(integral + upper, mask=mask, other=0.0)
    return tl.where(delta == 0.0, at_point, area / (2 * delta))


def choose_tiles(batch: Batch, tiles: BreakpointTiles | None = None) -> BreakpointTiles:
    """Return the sizes for a call, those of its class if none are given."""
    return tiles or breakpoint_tiles_for(batch.scores.device, *kind_of(batch))


def count(
    batch: Batch, values: Tensor, tiles: BreakpointTiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return NFP(i), rank+(i) and S(i), as `reference.breakpoints.count`; with padding, if any.

    Args:
        batch: its scores are -inf for padding, anywhere, and its index -1.
        values: as there.
        tiles: sizes of the kernels, if not those of the call's class on the device.

    Returns:
        Three (P,) float64 tensors; 0, 1 and 0 for padding. A NaN among the negatives makes NFP NaN,
        a NaN score everything.
    """
    scores = batch.scores
    counts = [torch.empty_like(scores, dtype=torch.float64) for _ in range(3)]
    nfp, rank_positive, value_sum = counts
    if not scores.numel():
        return nfp, rank_positive, value_sum
    tiles = choose_tiles(batch, tiles)
    with torch.cuda.device_of(scores):
        segments = segments_of(batch)
        breakpoints = sort_breakpoints(scores, batch.delta, segments and segments.positives)
        numbers, distances, unordered = count_negatives(batch, breakpoints, tiles, segments)
        grid = (triton.cdiv(scores.numel(), tiles.block),)
        common = {
            "order": breakpoints.order,
            "scores": breakpoints.scores,
            "ranks": breakpoints.ranks,
            "values": values.contiguous(),
            "positives": scores.numel(),
            "delta_bits": bits_of(batch.delta),
            "BLOCK": tiles.block,
        }
        jump, addend = numbers.new_empty((2, 3, 3 * scores.numel()))
        high, low = numbers.new_empty((2, 3 * scores.numel()))
        opened = breakpoints.windows.new_empty(3 * scores.numel())
        _points_kernel[grid](
            **common,
            windows=breakpoints.windows,
            numbers=numbers,
            distances=distances,
            jump=jump,
            addend=addend,
            high=high,
            low=low,
            opened=opened,
        )
        running, integral = integrate(
            jump, addend, high, low, opened, breakpoints.ends, each=3, backward=True
        )
        _finish_kernel[grid](
            **common,
            ends=breakpoints.ends,
            flags=breakpoints.flags,
            unordered=unordered,
            running=running,
            integral=integral,
            nfp=nfp,
            rank_positive=rank_positive,
            value_sum=value_sum,
        )
    return nfp, rank_positive, value_sum


def gradient(
    batch: Batch, weights: Tensor, positive_grad: Tensor, tiles: BreakpointTiles | None = None
) -> list[Tensor]:
    """Return the gradient by every logit, as `reference.breakpoints.gradient`; padded or not.

    A weight that is not finite makes the gradient of every negative NaN.

    Args:
        batch, tiles: as in `count`.
        weights, positive_grad: as there.
    """
    if not batch.scores.numel():
        return [torch.zeros_like(level) for level in batch.logits]
    gradients = [torch.empty_like(level) for level in batch.logits]
    tiles = choose_tiles(batch, tiles)
    with torch.cuda.device_of(batch.scores):
        segments = segments_of(batch)
        breakpoints = sort_breakpoints(batch.scores, batch.delta, segments and segments.positives)
        write_gradient(batch, gradients, breakpoints, weights, tiles, segments)
        write_positive_grads(gradients, batch.index, positive_grad)
    return gradients
