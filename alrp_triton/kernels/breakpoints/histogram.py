"""How many negatives lie in each interval between two breakpoints, and the sum of their distances.

Logits are read as they lie in memory, without regard to what they are. Under class indices,
positives and ignored anchors are few, and are taken out again. This is exact, because
everything that is added up over the logits is an integer:

- a logit adds 1 to the number of its interval and its distance to the sum, in units of 2 delta /
  2^bits, rounded; both in one 64-bit bin, (number << shift) + distance;
- a bin has many replicas, one for each lane of a tile and more, so that lanes do not wait for each
  other where all logits fall into one interval, and so many that no field can overflow
  (`bins.pack`);
- a 16-bit logit adds 1 to the number of its bit pattern, and the patterns are looked up in the end.

So the result does not depend on the order of the additions, and repeats bit by bit, for any number
of programs and any tile size. The distances of float64 logits take two bins of their own.

With groups, a tile that lies on one segment (its image, say) is counted like any other, among the
breakpoints of that segment. In any other tile each logit asks for its own. Bit patterns are not
counted then, since each segment would need patterns of its own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference.layout import Batch
from ..language import bits_of, jit, nan_maximum, real
from ..segments import Segments, by_level
from ..strided import Axes, Extent, Groups
from ..tuning.block_sizes import BreakpointTiles
from .anchors import Anchors, gather_ignored, ignored_logits, lay_out_anchors, read_anchors
from .bins import FINE, Packed, add, add_together, distance_of, pack_levels
from .dense import (
    PATTERNS,
    have_patterns,
    lay_out_segments,
    pattern_of,
    pattern_scores,
    pieces,
    read_segments,
    read_tile,
    segment_of_tile,
)
from .sort import HALVINGS, Breakpoints, LookUp, find, read_limits, within


@triton.jit
def _number_of_nan(s, behind, targets, tile, size, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Count the NaN of a tile, whose places behind the end read as NaN.

    With targets, count those among the negatives.
    """
    nan = s != s
    if targets is not None:
        nan = nan & (read_tile(targets, tile, size, 1.0, False, ROWS * LANES)[0] == 0)
        behind = 0
    return tl.sum(nan.to(tl.int32), 0) - behind


@triton.jit
def _lane(ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return the lane of each place of a tile."""
    return tl.arange(0, ROWS * LANES) & (LANES - 1)


@triton.jit
def _count_tile(
    tile,
    scores,
    segment,
    limits,
    targets,
    bins,
    patterns,
    size,
    look_up,
    packing,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Add the negatives of a tile that lies on one segment."""
    raw, s, highest = scores
    lowest, keys = limits.lowest, look_up.keys

    # 1. A tile that lies below min_P(s) - delta as a whole means nothing to anybody.
    if (highest >= lowest) | (highest != highest):
        negative = s >= lowest
        if targets is not None:
            of_tile, _ = read_tile(targets, tile, size, 1.0, False, ROWS * LANES)
            negative = negative & (of_tile == 0)
        inner = within(s, limits)

        # 2. The intervals of the lowest and of the highest tell whether all lie in one.
        ends = tl.where(tl.arange(0, 2) == 0, tl.min(s, 0), highest)
        relevant = tl.min((ends >= lowest).to(tl.int32), 0) > 0
        ends = within(ends, limits)
        ends = find(ends, segment, limits, look_up)
        if relevant & (tl.min(ends, 0) == tl.max(ends, 0)) & (s.dtype != tl.float64):
            only = tl.max(ends, 0)
            add_together(bins, only, tile, inner, negative, keys, packing, ROWS, LANES)
        elif patterns is not None:
            at = patterns + (pattern_of(raw) * LANES + _lane(ROWS, LANES))
            tl.atomic_add(at, tl.full(s.shape, 1, tl.int32), mask=negative, sem="relaxed")
        else:
            found = find(inner, segment, limits, look_up)
            replica = (_lane(ROWS, LANES) + tile * LANES) & (packing.replicas - 1)
            add(bins, found, replica, inner, negative, 1, keys, packing)


@triton.jit
def _count_across_segments(
    tile,
    s,
    segment,
    limits,
    targets,
    bins,
    size,
    look_up,
    packing,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Add the negatives of a tile, each on a segment of its own."""
    negative = s >= limits.lowest
    if targets is not None:
        of_tile, _ = read_tile(targets, tile, size, 1.0, False, ROWS * LANES)
        negative = negative & (of_tile == 0)
    if tl.max(negative.to(tl.int32), 0) > 0:
        inner = within(s, limits)
        found = find(inner, segment, limits, look_up)
        replica = (_lane(ROWS, LANES) + tile * LANES) & (packing.replicas - 1)
        add(bins, found, replica, inner, negative, 1, look_up.keys, packing)


@triton.jit
def _count_tiles(
    level,
    groups,
    extent,
    out,
    limits,
    look_up,
    packing,
    programs,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Add the negatives of every `programs`th tile of a level to the bins of their intervals."""
    logits, targets, size = level
    bins, patterns, unordered = out
    only = read_limits(limits, 0)
    tiles = tl.cdiv(size, ROWS * LANES).to(tl.int32)
    for tile in range(tl.program_id(0), tiles, programs):
        # What is behind the end is NaN, which is not relevant to anything.
        raw, behind = read_tile(logits, tile, size, float("nan"), False, ROWS * LANES)
        s = raw.to(look_up.keys.dtype.element_ty)
        highest = tl.reduce(s, 0, nan_maximum)

        # 1. A NaN has no interval; one that is not ignored leaves no number standing.
        if highest != highest:
            nan = _number_of_nan(s, behind, targets, tile, size, ROWS, LANES).to(tl.int64)
            tl.atomic_add(unordered, nan, mask=nan > 0, sem="relaxed")

        # 2. All else goes to the segment that it lies on.
        scores = (raw, s, highest)
        if groups.base is None:
            _count_tile(
                tile, scores, 0, only, targets, bins, patterns, size, look_up, packing,
                ROWS, LANES,
            )  # fmt: skip
        else:
            alone, segment, origin = segment_of_tile(groups, extent, tile, size, ROWS * LANES)
            if alone:
                of_segment = read_limits(limits, segment)
                _count_tile(
                    tile, scores, segment, of_segment, targets, bins, None, size, look_up, packing,
                    ROWS, LANES,
                )  # fmt: skip
            else:
                each = read_segments(groups, extent, origin, behind, ROWS * LANES)
                of_each = read_limits(limits, each)
                _count_across_segments(
                    tile, s, each, of_each, targets, bins, size, look_up, packing, ROWS, LANES
                )


@triton.jit
def _remove(logits, segment, replica, mask, out, limits, look_up, packing):
    """Take logits that are no negatives out of the bins again."""
    bins, unordered = out
    s = tl.load(logits, mask=mask, other=float("-inf")).to(look_up.keys.dtype.element_ty)
    nan = tl.sum((mask & (s != s)).to(tl.int64), 0)
    tl.atomic_add(unordered, -nan, mask=nan > 0, sem="relaxed")
    limits = read_limits(limits, segment)
    mask = mask & (s >= limits.lowest)
    s = within(s, limits)
    found = find(s, segment, limits, look_up)
    add(bins, found, replica & (packing.replicas - 1), s, mask, -1, look_up.keys, packing)


@triton.jit
def _remove_anchors(
    anchors, block, level, groups, out, limits, look_up, packing, BLOCK: tl.constexpr
):
    """Take a block of anchors out: positives at their class, ignored ones at all classes.

    They take turns at the replicas in the order of their logits, so that none gets more than its
    share.
    """
    logits, strides = level
    row, start, channel, positive, ignored = read_anchors(anchors, block, BLOCK)
    logits += row * strides.outer + start * strides.inner
    lane = tl.arange(0, BLOCK)
    # Of numbers that may overflow: the last bits are what counts.
    number = (row * anchors.places + start).to(tl.int32)
    segment = tl.zeros((BLOCK,), tl.int32)
    if groups.base is not None:
        base = groups.base + row * groups.strides[0] + start * groups.strides[1]
        segment = tl.load(base + lane * groups.strides[1], mask=positive | ignored, other=0)
    if tl.max(positive.to(tl.int32), 0) > 0:
        replica = (number + lane) * anchors.classes + channel.to(tl.int32)
        here = logits + channel * strides.middle + lane * strides.inner
        _remove(here, segment, replica, positive, out, limits, look_up, packing)
    many = tl.sum(ignored.to(tl.int32), 0)
    if many > 0:
        order = gather_ignored(ignored, BLOCK)
        for first in range(0, many * anchors.classes, BLOCK):
            anchor, channel, mask = ignored_logits(order, many, first, anchors, BLOCK)
            here = logits + channel * strides.middle + anchor * strides.inner
            replica = (number + anchor) * anchors.classes + channel.to(tl.int32)
            theirs = tl.gather(segment, anchor, 0)
            _remove(here, theirs, replica, mask, out, limits, look_up, packing)


@jit
def _count_kernel(
    logits,  # one level: (size,) as they lie in memory, (batch, classes, places) by its strides
    targets,  # (size,) beside them, or None under class indices
    anchor_targets,  # (batch, places) class indices, or None
    segments,  # int32, see `dense.lay_out_segments`; None without groups
    bins,  # (2P, replicas) int64, is added to; (3, 2P) of float64 logits
    patterns,  # (65,536, LANES) int32, is added to; None but for 16-bit logits without groups
    unordered,  # (1,) int64: the number of NaN, is added to
    keys,
    table,
    flags,
    limits,
    ends,
    tile_programs,  # those behind them take out what is no negative
    size: tl.int64,
    segments_0: tl.int64,
    segments_1: tl.int64,
    segments_2: tl.int64,
    middle,
    inner,
    middle_magic: tl.int64,
    inner_magic: tl.int64,
    places: tl.int64,
    row_blocks,
    row_blocks_magic: tl.int64,
    classes,
    classes_magic: tl.int64,
    ignore_index,
    targets_row: tl.int64,
    targets_place: tl.int64,
    logits_row: tl.int64,
    logits_class: tl.int64,
    logits_place: tl.int64,
    segments_row: tl.int64,
    segments_place: tl.int64,
    cells,
    replicas,
    shift,
    scale_bits: tl.int64,
    most_bits: tl.int64,
    breakpoints,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Count the negatives of one level in the bins of their intervals, or in their patterns.

    Under class indices all logits are counted, and those of positives and of ignored anchors taken
    out again by other programs: in integers, so that it does not matter who comes first.
    """
    dtype: tl.constexpr = keys.dtype.element_ty
    scale, most = real(scale_bits, dtype), real(most_bits, dtype)
    packing = Packed(replicas, shift, scale, most, breakpoints)
    look_up = LookUp(keys, table, tl.load(flags + HALVINGS), ends, cells)
    program = tl.program_id(0)
    # What both branches name must be of one type, so each has names of its own.
    if program < tile_programs:
        extent = Extent(middle, inner, middle_magic, inner_magic)
        groups = Groups(segments, Axes(segments_0, segments_1, segments_2))
        level, out = (logits, targets, size), (bins, patterns, unordered)
        _count_tiles(
            level, groups, extent, out, limits, look_up, packing, tile_programs, ROWS, LANES
        )
    elif anchor_targets is not None:
        given = Anchors(
            anchor_targets, (targets_row, targets_place), places, row_blocks, row_blocks_magic,
            classes, classes_magic, ignore_index,
        )  # fmt: skip
        of_anchors = Groups(segments, (segments_row, segments_place))
        strided = logits, Axes(logits_row, logits_class, logits_place)
        block, less = program - tile_programs, (bins, unordered)
        _remove_anchors(given, block, strided, of_anchors, less, limits, look_up, packing, LANES)


@jit
def _pattern_sums_kernel(
    logits,  # for its dtype
    patterns,  # (65,536, LANES) int32
    sums,  # (2, 2P) int64: numbers and distances, is added to
    keys,
    table,
    flags,
    limits,
    ends,
    cells,
    scale_bits: tl.int64,
    most_bits: tl.int64,
    breakpoints,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Look up each bit pattern that has been counted."""
    pattern, s = pattern_scores(logits, BLOCK)
    limits = read_limits(limits, 0)
    look_up = LookUp(keys, table, tl.load(flags + HALVINGS), ends, cells)
    number = tl.load(patterns + pattern[:, None] * LANES + tl.arange(0, LANES)[None, :])
    number = tl.sum(number.to(tl.int64), 1)
    mask = number > 0
    s = within(tl.where(mask, s, 0.0), limits)
    found = find(s, 0, limits, look_up)
    distance = distance_of(
        s, found, keys, real(scale_bits, tl.float32), real(most_bits, tl.float32)
    )
    tl.atomic_add(sums + (found - 1), number, mask=mask, sem="relaxed")
    at = sums + breakpoints + (found - 1)
    tl.atomic_add(at, number * distance.to(tl.int64), mask=mask, sem="relaxed")


@jit
def _fold_kernel(
    bins,  # as in `_count_kernel`
    sums,  # (2, 2P) int64 of 16-bit logits, or None
    keys,
    high,
    low,
    windows,
    numbers,  # (2P,) float64, out: how many negatives lie in the interval behind each breakpoint
    distances,  # (2P,) float64, out: the sum of their distances to the breakpoint itself
    breakpoints,
    replicas,
    shift,
    unit_bits: tl.int64,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sum the replicas of the histogram, bin by bin."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < breakpoints
    unit = real(unit_bits, tl.float64)
    number = tl.zeros((BLOCK,), tl.int64)
    distance = tl.zeros((BLOCK,), tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    if keys.dtype.element_ty == tl.float64:
        number += tl.load(bins + place, mask=mask, other=0)
        fine = tl.load(bins + 2 * breakpoints + place, mask=mask, other=0)
        total += (tl.load(bins + breakpoints + place, mask=mask, other=0)).to(tl.float64)
        total = (total + fine.to(tl.float64) / FINE) * unit
    else:
        one = tl.cast(1, tl.int64) << shift
        for first in range(0, replicas, LANES):
            at = place[:, None] * replicas + first + tl.arange(0, LANES)[None, :]
            bin = tl.load(bins + at, mask=mask[:, None], other=0)
            # Both may be negative in a replica from which more was taken than added.
            part = ((bin + one // 2) & (one - 1)) - one // 2
            distance += tl.sum(part, 1)
            number += tl.sum((bin - part) >> shift, 1)
        if sums is not None:
            number += tl.load(sums + place, mask=mask, other=0)
            distance += tl.load(sums + breakpoints + place, mask=mask, other=0)
        total = distance.to(tl.float64) * unit
    # From the rounded breakpoint to the breakpoint.
    start = tl.load(high + place, mask=mask, other=0.0)
    rounded = (tl.load(keys + place, mask=mask, other=0.0).to(tl.float64) - start) - tl.load(
        low + place, mask=mask, other=0.0
    )
    inside = (tl.load(windows + place, mask=mask, other=0) != 0) & (number != 0)
    number = number.to(tl.float64)
    tl.store(numbers + place, number, mask=mask)
    tl.store(distances + place, tl.where(inside, total + number * rounded, 0.0), mask=mask)


# The arguments of `lay_out_anchors` where nothing is taken out.
_NO_ANCHORS: dict[str, Any] = {"anchor_targets": None} | dict.fromkeys(
    (
        "places", "row_blocks", "row_blocks_magic", "classes", "classes_magic", "ignore_index",
        "targets_row", "targets_place", "logits_row", "logits_class", "logits_place",
        "segments_row", "segments_place",
    ),
    0,
)  # fmt: skip


def _of_anchors(
    logits: Tensor, targets: Tensor, segments: Tensor | None, ignore_index: int, block: int
) -> tuple[int, dict[str, Any]]:
    """Return how many blocks of anchors are taken out, and the arguments by which they are."""
    if targets.dim() == logits.dim():
        return 0, _NO_ANCHORS
    beside = {"logits": logits, "segments": segments}
    blocks, arguments = lay_out_anchors(targets, logits.shape[1], ignore_index, block, **beside)
    return blocks, {**arguments, "logits_class": logits.stride(1)}


def count_negatives(
    batch: Batch, breakpoints: Breakpoints, tiles: BreakpointTiles, segments: Segments | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of negatives behind each breakpoint, their summed distances; of NaN."""
    logits, delta = batch.logits, batch.delta
    number = breakpoints.high.numel()
    tile = tiles.count_rows * tiles.lanes
    packing = pack_levels(logits, number, tiles)
    exact = breakpoints.scores.dtype == torch.float64
    units = FINE.value if exact else 2.0**packing.bits
    patterns, device = None, breakpoints.scores.device
    if have_patterns(logits, segments):
        patterns = torch.zeros((PATTERNS, tiles.lanes), dtype=torch.int32, device=device)
    # One vector, cleared at once.
    sizes = (3 if exact else packing.replicas) * number, 0 if patterns is None else 2 * number, 1
    zeros = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
    bins, sums, unordered = zeros.split(sizes)
    largest = torch.finfo(breakpoints.scores.dtype).max
    add = {
        "bins": bins,
        "unordered": unordered,
        "replicas": packing.replicas,
        "shift": packing.shift,
        "scale_bits": bits_of(min(units / (2 * delta), largest) if delta else 0.0),
        "most_bits": bits_of(units),
        "breakpoints": number,
    }
    for level, target, of_level in by_level(batch, segments):
        for piece, beside, segment, _ in pieces(level, target, of_level) if level.numel() else ():
            programs = min(triton.cdiv(piece.numel(), tile), tiles.programs)
            blocks, anchors = _of_anchors(piece, beside, segment, batch.ignore_index, tiles.lanes)
            _count_kernel[(programs + blocks,)](
                logits=piece,
                targets=beside if beside.dim() == piece.dim() else None,
                patterns=patterns,
                tile_programs=programs,
                size=piece.numel(),
                ROWS=tiles.count_rows,
                LANES=tiles.lanes,
                num_warps=1,
                **anchors,
                **lay_out_segments(piece, segment),
                **add,
                **breakpoints.look_up,
            )
    if patterns is not None:
        _pattern_sums_kernel[(PATTERNS // tiles.patterns,)](
            logits=logits[0],
            patterns=patterns,
            sums=sums,
            scale_bits=add["scale_bits"],
            most_bits=add["most_bits"],
            breakpoints=number,
            BLOCK=tiles.patterns,
            LANES=tiles.lanes,
            **breakpoints.look_up,
        )
    numbers, distances = breakpoints.high.new_empty((2, number))
    _fold_kernel[(triton.cdiv(number, tiles.block),)](
        bins=bins,
        sums=None if patterns is None else sums,
        keys=breakpoints.keys,
        high=breakpoints.high,
        low=breakpoints.low,
        windows=breakpoints.windows,
        numbers=numbers,
        distances=distances,
        breakpoints=number,
        replicas=packing.replicas,
        shift=packing.shift,
        unit_bits=bits_of(2 * delta / units),
        BLOCK=tiles.block,
        LANES=tiles.lanes,
    )
    return numbers, distances, unordered
