"""Counts and sums between the sorted breakpoints: `reference/breakpoints/ranks.py` in Triton.

H is piecewise linear, so NFP(i) needs only how many negatives lie in each interval between two
edges, and the sum of their distances to its start; and the gradient by s_j is a line in each
interval. A logit is read once and looked up: what the positives cost does not grow with N.

    edges       sorts the 2P edges s_i - delta, s_i + delta, and finds a score among them
    intervals   counts the negatives between them, in integers
    scan        sums along the line
    ramps       writes the gradient
    groups      gives each group a line of its own

Nothing waits for the device, nothing is P x P, and results repeat bit by bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import bits_of, jit, real
from ..positives import write_own
from ..segments import lines_of
from ..tuning.block_sizes import BreakpointTiles
from ..tuning.files import breakpoint_tiles_for
from .histogram import count_negatives
from .linear_pieces import write_gradient
from .scan import integrate
from .sort import NAN_SCORE, add_exactly, bounds_of, sort_edges


@jit
def _points_kernel(
    order,  # (P,) int64, as in `Edges`; so are the next three
    scores,
    ranks,
    windows,
    values,  # (P,) float64
    numbers,  # (2P,) float64: how many negatives lie behind each edge, and the sum of their
    distances,  # distances to it
    jump,  # (3, 3P) float64, out: by how much the number of negatives, that of positives and the
    # sum of their values change at each point
    more,  # (3, 3P) float64, out: those distances, and nothing of the other two
    high,  # (3P,) float64, out: where the points lie; so is the next
    low,
    opened,  # (3P,) int8, out: whether a window lies behind each of them
    positives,
    delta_bits: tl.int64,
    BLOCK: tl.constexpr,
):
    """Positives and edges in one order: between them the rank among positives does not change."""
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
            edge = tl.load(ranks + side // 2 * positives + i, mask=mask, other=0)
            behind = tl.load(windows + edge, mask=mask, other=0) != 0
            distance = tl.load(distances + edge, mask=mask, other=0.0)
            column = (tl.load(numbers + edge, mask=mask, other=0.0), nothing, nothing)
        tl.store(high + at, point, mask=mask)
        tl.store(low + at, rest, mask=mask)
        tl.store(opened + at, behind.to(tl.int8), mask=mask)
        _store_column(jump, at, column, positives, mask)
        _store_column(more, at, (distance, nothing, nothing), positives, mask)


@triton.jit
def _store_column(out, at, column, positives, mask):
    """Three numbers at each of some points, of (3, 3P)."""
    for row in tl.static_range(3):
        tl.store(out + row * 3 * positives + at, column[row], mask=mask)


@jit
def _finish_kernel(
    order,  # as in `_points_kernel`
    scores,
    ends,  # as in `Edges`; so is the next
    known,
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
    """A positive's sum over H is the mean over its window of how many lie at or above."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < positives
    delta = real(delta_bits, tl.float64)
    s = tl.load(scores + i, mask=mask, other=0.0)
    valid = s != float("-inf")
    place = tl.load(order + i, mask=mask, other=0)
    value = tl.load(values + place, mask=mask & valid, other=0.0)
    lower = tl.load(ranks + 2 * positives + i, mask=mask, other=0)
    upper = tl.load(ranks + 4 * positives + i, mask=mask, other=0)
    line = 3 * positives
    count = _window_mean(running, integral, lower, upper, mask, delta)
    running, integral = running + line, integral + line
    others = _window_mean(running, integral, lower, upper, mask, delta)
    running, integral = running + line, integral + line
    total = _window_mean(running, integral, lower, upper, mask, delta)

    # 1. The others: less itself, for which H is 1/2 (1 under the hard step). Exactly nothing where
    # nobody else stands at or above the window.
    itself = tl.where(delta == 0.0, 1.0, 0.5)
    _, end = bounds_of(ends, ends, i, positives)
    alone = lower - tl.load(ranks + i, mask=mask, other=0) == end - 1
    others = tl.where(alone, 0.0, others - itself)
    total = tl.where(alone, 0.0, total - itself * value)

    # 2. NaN has no place in any order.
    nan = tl.where(tl.load(known + NAN_SCORE) > 0, float("nan"), 0.0).to(tl.float64)
    count += nan + tl.where(tl.load(unordered) != 0, float("nan"), 0.0)
    tl.store(nfp + place, tl.where(valid, count, 0.0), mask=mask)
    tl.store(rank_positive + place, tl.where(valid, 1.0 + others + nan, 1.0), mask=mask)
    tl.store(value_sum + place, tl.where(valid, total + nan, 0.0), mask=mask)


@triton.jit
def _window_mean(running, integral, lower, upper, mask, delta):
    """The mean between two edges, from the integral; under the hard step, the value at the edge."""
    at_edge = tl.load(running + lower, mask=mask, other=0.0)
    area = tl.load(integral + lower, mask=mask, other=0.0)
    area -= tl.load(integral + upper, mask=mask, other=0.0)
    return tl.where(delta == 0.0, at_edge, area / (2 * delta))


def choose_tiles(logits: Sequence[Tensor], scores: Tensor) -> BreakpointTiles:
    """The sizes for a call, those of its class."""
    dtype = logits[0].dtype if logits else scores.dtype
    size = sum(level.numel() for level in logits)
    return breakpoint_tiles_for(scores.device, dtype, scores.numel(), size)


def count(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    scores: Tensor,
    values: Tensor,
    delta: float,
    ignore_index: int,
    tiles: BreakpointTiles | None = None,
    groups: Sequence[Tensor] = (),
    own_groups: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """NFP(i), rank+(i) and S(i), as `reference.breakpoints.count`; scores may hold padding.

    Args:
        logits, targets, values, delta, ignore_index, groups, own_groups: as there.
        scores: (P,) finite scores of the positives, -inf for padding, anywhere.
        tiles: sizes of the kernels, if not those of the call's class on the device.

    Returns:
        Three (P,) float64 tensors; 0, 1 and 0 for padding. A NaN among the negatives makes NFP NaN,
        a NaN score everything.
    """
    positives = scores.numel()
    nfp, rank_positive, value_sum = (
        torch.empty_like(scores, dtype=torch.float64) for _ in range(3)
    )
    if not positives:
        return nfp, rank_positive, value_sum
    tiles = tiles or choose_tiles(logits, scores)
    with torch.cuda.device_of(scores):
        lines = lines_of(groups, own_groups)
        edges = sort_edges(scores, delta, lines and lines.own)
        numbers, distances, unordered = count_negatives(
            logits, targets, edges, delta, ignore_index, tiles, lines
        )
        grid = (triton.cdiv(positives, tiles.block),)
        common = {
            "order": edges.order,
            "scores": edges.scores,
            "ranks": edges.ranks,
            "values": values.contiguous(),
            "positives": positives,
            "delta_bits": bits_of(delta),
            "BLOCK": tiles.block,
        }
        jump, more = numbers.new_empty((2, 3, 3 * positives))
        high, low = numbers.new_empty((2, 3 * positives))
        opened = edges.windows.new_empty(3 * positives)
        _points_kernel[grid](
            **common,
            windows=edges.windows,
            numbers=numbers,
            distances=distances,
            jump=jump,
            more=more,
            high=high,
            low=low,
            opened=opened,
        )
        running, integral = integrate(
            jump, more, high, low, opened, edges.ends, each=3, backward=True
        )
        _finish_kernel[grid](
            **common,
            ends=edges.ends,
            known=edges.known,
            unordered=unordered,
            running=running,
            integral=integral,
            nfp=nfp,
            rank_positive=rank_positive,
            value_sum=value_sum,
        )
    return nfp, rank_positive, value_sum


def gradient(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    index: Tensor,
    scores: Tensor,
    weights: Tensor,
    own: Tensor,
    delta: float,
    ignore_index: int,
    tiles: BreakpointTiles | None = None,
    groups: Sequence[Tensor] = (),
    own_groups: Tensor | None = None,
) -> list[Tensor]:
    """The gradient by every logit, as `reference.breakpoints.gradient`; with padding, if any.

    A weight that is not finite makes the gradient of every negative NaN.

    Args:
        logits, targets, weights, own, delta, ignore_index, groups, own_groups: as there.
        index: (P,) int64 positions in the flattened logits of all levels, -1 for padding.
        scores: (P,) finite scores of the positives, -inf for padding.
        tiles: sizes of the kernels, if not those of the call's class on the device.
    """
    if not scores.numel():
        return [torch.zeros_like(level) for level in logits]
    gradients = [torch.empty_like(level) for level in logits]
    tiles = tiles or choose_tiles(logits, scores)
    with torch.cuda.device_of(scores):
        lines = lines_of(groups, own_groups)
        edges = sort_edges(scores, delta, lines and lines.own)
        write_gradient(
            logits, targets, gradients, edges, weights, delta, ignore_index, tiles, lines
        )
        write_own(gradients, index, own)
    return gradients
