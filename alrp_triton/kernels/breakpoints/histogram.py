"""How many negatives lie in each interval between two edges, and the sum of their distances.

Logits are read as they lie in memory, without regard to what they are. Under class indices,
positives and ignored anchors are few, and are taken out again afterwards. This is exact, because
everything that is added up over the logits is an integer:

- a logit adds 1 to the number of its interval and its distance to the sum, in units of 2 delta /
  2^bits, rounded; both in one 64-bit word, (number << shift) + distance;
- a word has many copies, one for each lane of a tile and more, so that lanes do not wait for each
  other where all logits fall into one interval, and so many that no field can overflow (`pack`);
- a 16-bit logit adds 1 to the number of its bit pattern, and the patterns are looked up in the end.

So the result does not depend on the order of the additions, and repeats bit by bit, for any number
of programs and any tile size. The distances of float64 logits take two words of their own.

With groups, a tile that lies on one line (its image, say) is counted like any other, among the
edges of that line. In any other tile each logit asks for its own. Bit patterns are not counted
then, since each line would need patterns of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import bits_of, jit, nan_maximum, real
from ..segments import Lines, by_level
from ..tuning.block_sizes import BreakpointTiles
from .dense import (
    PATTERNS,
    have_patterns,
    lay_out_anchors,
    lay_out_lines,
    line_of_tile,
    pattern_of,
    pattern_scores,
    pieces,
    pieces_of,
    read_anchors,
    read_lines,
    read_tile,
)
from .sort import HALVINGS, Edges, find, read_limits

# Units of a distance of float64 logits: 2 delta / 2^30, and the rest in 2 delta / 2^60.
_FINE = tl.constexpr(2.0**30)

_BITS = 24  # of a distance, as long as there is memory for the copies that it needs
_FEWEST_BITS = 16
_MOST_WORDS = 1 << 20  # from which on a distance takes fewer bits instead


class Packing(NamedTuple):
    """How a number and a sum of distances share a word."""

    copies: int  # of each word; a power of two
    bits: int  # of a distance: its unit is 2 delta / 2^bits
    shift: int  # where the number begins


def pack(logits: int, intervals: int, slack: int, lanes: int) -> Packing:
    """As many bits as fit: both fields of a word hold what its copy can get, added or taken away.

    Args:
        logits: N, of all levels.
        intervals: number of words.
        slack: by how much a copy may get more than its share of the logits.
        lanes: least number of copies.
    """
    copies = lanes
    while True:
        most = logits // copies + slack  # that one copy gets
        number = most.bit_length() + 1  # its bits, one of them for the sign
        bits = min(_BITS, 64 - 2 * number)
        if bits == _BITS or (bits >= _FEWEST_BITS and 2 * copies * intervals > _MOST_WORDS):
            return Packing(copies, bits, bits + number)
        copies *= 2


def pack_levels(logits: Sequence[Tensor], intervals: int, tiles: BreakpointTiles) -> Packing:
    """For a call.

    Lanes and anchors go to the copies in turn, so that of what is added a copy gets more than its
    share by two columns of a tile at most, and of what is taken away by eight anchors; of each
    piece that is read at once.
    """
    slack = sum(
        pieces_of(level) * max(2 * tiles.count_rows, 8 * level.shape[1]) for level in logits
    )
    return pack(sum(level.numel() for level in logits), intervals, slack, tiles.lanes)


@triton.jit
def _distance(scores, found, keys, scale, most):
    """How far scores stand above the edge before them, in units, rounded."""
    distance = scores - tl.load((keys - 1) + found)
    return tl.minimum(tl.fma(distance, scale, 0.5), most).to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _add(words, found, copy, scores, mask, SIGN: tl.constexpr, keys, packing):
    """Adds scores to the words of their intervals, or takes them away again."""
    copies, shift, scale, most, edges = packing
    if scores.dtype == tl.float64:
        distance = tl.minimum((scores - tl.load((keys - 1) + found)) * scale, most)
        high = tl.floor(distance)
        low = tl.floor((distance - high) * _FINE)
        at = words + (found - 1)
        tl.atomic_add(at, tl.full(found.shape, SIGN, tl.int64), mask=mask, sem="relaxed")
        tl.atomic_add(at + edges, high.to(tl.int64) * SIGN, mask=mask, sem="relaxed")
        tl.atomic_add(at + 2 * edges, low.to(tl.int64) * SIGN, mask=mask, sem="relaxed")
    else:
        distance = _distance(scores, found, keys, scale, most)
        word = (tl.cast(1, tl.int64) << shift) + distance.to(tl.int64)
        at = (words - copies) + (found * copies + copy)
        tl.atomic_add(at, word * SIGN, mask=mask, sem="relaxed")


@triton.jit
def _add_together(
    words, found, tile, scores, mask, keys, packing, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Adds a tile of scores (ROWS * LANES,) that all lie in one interval, lane by lane."""
    copies, shift, scale, most, _ = packing
    distance = _distance(scores, found, keys, scale, most)
    distance = tl.reshape(tl.where(mask, distance, 0), (ROWS, LANES))
    distance = tl.sum(distance, 0).to(tl.int64)
    number = tl.sum(tl.reshape(mask.to(tl.int32), (ROWS, LANES)), 0).to(tl.int64)
    copy = (tl.arange(0, LANES) + tile * LANES) & (copies - 1)
    at = (words - copies) + (found * copies + copy)
    tl.atomic_add(at, (number << shift) + distance, sem="relaxed")


@triton.jit
def _number_of_nan(s, behind, targets, tile, size, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Of a tile whose places behind the end read as NaN; with targets, among the negatives."""
    nan = s != s
    if targets is not None:
        nan = nan & (read_tile(targets, tile, size, 1.0, False, ROWS * LANES)[0] == 0)
        behind = 0
    return tl.sum(nan.to(tl.int32), 0) - behind


@triton.jit
def _lane(ROWS: tl.constexpr, LANES: tl.constexpr):
    """The lane of each place of a tile."""
    return tl.arange(0, ROWS * LANES) & (LANES - 1)


@triton.jit
def _count_tile(
    tile,
    scores,
    line,
    limits,
    targets,
    words,
    patterns,
    size,
    look_up,
    packing,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds the negatives of a tile that lies on one line."""
    raw, s, highest = scores
    lowest, first, last, keys = limits[0], limits[1], limits[2], look_up[0]

    # 1. A tile that lies below min_P(s) - delta as a whole means nothing to anybody.
    if (highest >= lowest) | (highest != highest):
        negative = s >= lowest
        if targets is not None:
            of_tile, _ = read_tile(targets, tile, size, 1.0, False, ROWS * LANES)
            negative = negative & (of_tile == 0)
        inner = tl.minimum(tl.maximum(s, first), last)

        # 2. The intervals of the lowest and of the highest tell whether all lie in one.
        ends = tl.where(tl.arange(0, 2) == 0, tl.min(s, 0), highest)
        relevant = tl.min((ends >= lowest).to(tl.int32), 0) > 0
        ends = tl.minimum(tl.maximum(ends, first), last)
        ends = find(ends, line, limits, look_up)
        if relevant & (tl.min(ends, 0) == tl.max(ends, 0)) & (s.dtype != tl.float64):
            only = tl.max(ends, 0)
            _add_together(words, only, tile, inner, negative, keys, packing, ROWS, LANES)
        elif patterns is not None:
            at = patterns + (pattern_of(raw) * LANES + _lane(ROWS, LANES))
            tl.atomic_add(at, tl.full(s.shape, 1, tl.int32), mask=negative, sem="relaxed")
        else:
            found = find(inner, line, limits, look_up)
            copy = (_lane(ROWS, LANES) + tile * LANES) & (packing[0] - 1)
            _add(words, found, copy, inner, negative, 1, keys, packing)


@triton.jit
def _count_across_lines(
    tile,
    s,
    line,
    limits,
    targets,
    words,
    size,
    look_up,
    packing,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds the negatives of a tile, each on a line of its own."""
    negative = s >= limits[0]
    if targets is not None:
        of_tile, _ = read_tile(targets, tile, size, 1.0, False, ROWS * LANES)
        negative = negative & (of_tile == 0)
    if tl.max(negative.to(tl.int32), 0) > 0:
        inner = tl.minimum(tl.maximum(s, limits[1]), limits[2])
        found = find(inner, line, limits, look_up)
        copy = (_lane(ROWS, LANES) + tile * LANES) & (packing[0] - 1)
        _add(words, found, copy, inner, negative, 1, look_up[0], packing)


@jit
def _count_kernel(
    logits,  # (size,) as they lie in memory
    targets,  # (size,) beside them, or None under class indices
    lines,  # int32, see `memory.lay_out_lines`; None without groups
    words,  # (2P, copies) int64, is added to; (3, 2P) of float64 logits
    patterns,  # (65,536, LANES) int32, is added to; None but for 16-bit logits without groups
    unordered,  # (1,) int64: the number of NaN, is added to
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
    copies,
    shift,
    scale_bits: tl.int64,
    most_bits: tl.int64,
    edges,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds the negatives of one level to the words of their intervals, or to their patterns."""
    dtype: tl.constexpr = keys.dtype.element_ty
    packing = (copies, shift, real(scale_bits, dtype), real(most_bits, dtype), edges)
    look_up = (keys, table, tl.load(known + HALVINGS), ends, cells)
    sizes = (middle, inner, middle_magic, inner_magic)
    only = read_limits(limits, 0)
    tiles = tl.cdiv(size, ROWS * LANES).to(tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # What is behind the end is NaN, which is not relevant to anything.
        raw, behind = read_tile(logits, tile, size, float("nan"), False, ROWS * LANES)
        s = raw.to(dtype)
        highest = tl.reduce(s, 0, nan_maximum)

        # 1. A NaN has no interval; one that is not ignored leaves no number standing.
        if highest != highest:
            nan = _number_of_nan(s, behind, targets, tile, size, ROWS, LANES).to(tl.int64)
            tl.atomic_add(unordered, nan, mask=nan > 0, sem="relaxed")

        # 2. All else goes to the line that it lies on.
        scores = (raw, s, highest)
        if lines is None:
            _count_tile(
                tile, scores, 0, only, targets, words, patterns, size, look_up, packing,
                ROWS, LANES,
            )  # fmt: skip
        else:
            grouping = (lines, (lines_0, lines_1, lines_2), sizes)
            alone, line, origin = line_of_tile(grouping, tile, size, ROWS * LANES)
            if alone:
                of_line = read_limits(limits, line)
                _count_tile(
                    tile, scores, line, of_line, targets, words, None, size, look_up, packing,
                    ROWS, LANES,
                )  # fmt: skip
            else:
                each = read_lines(grouping, origin, behind, ROWS * LANES)
                of_each = read_limits(limits, each)
                _count_across_lines(
                    tile, s, each, of_each, targets, words, size, look_up, packing, ROWS, LANES
                )


@jit
def _remove_kernel(
    logits,  # (batch, classes, places), one level
    targets,  # (batch, places) class indices
    lines,  # (batch, places) int32; None without groups
    words,  # as in `_count_kernel`, are taken from; so is the next
    unordered,
    keys,
    table,
    known,
    limits,
    ends,
    anchors: tl.int64,
    classes,
    places,
    logits_0: tl.int64,
    logits_1: tl.int64,
    logits_2: tl.int64,
    targets_0: tl.int64,
    targets_1: tl.int64,
    lines_0: tl.int64,
    lines_1: tl.int64,
    ignore_index,
    cells,
    copies,
    shift,
    scale_bits: tl.int64,
    most_bits: tl.int64,
    edges,
    BLOCK: tl.constexpr,
):
    """Takes out again what `_count_kernel` has counted and is no negative."""
    dtype: tl.constexpr = keys.dtype.element_ty
    packing = (copies, shift, real(scale_bits, dtype), real(most_bits, dtype), edges)
    look_up = (keys, table, tl.load(known + HALVINGS), ends, cells)
    row, place, channel, positive, ignored = read_anchors(
        targets, anchors, classes, places, targets_0, targets_1, ignore_index, BLOCK
    )
    line = tl.program_id(0) * 0
    if lines is not None:
        own = lines + row * lines_0 + place * lines_1
        line = tl.load(own, mask=positive | ignored, other=0)
    limits = read_limits(limits, line)
    copy = (tl.arange(0, BLOCK) + tl.program_id(0) * BLOCK) & (copies - 1)
    # Positives at their class, which is the round -1, then ignored anchors class by class.
    start = -tl.max(positive.to(tl.int32), 0)
    for c in range(start, tl.max(ignored.to(tl.int32), 0) * classes):
        mask = tl.where(c < 0, positive, ignored)
        at = row * logits_0 + tl.where(c < 0, channel, c) * logits_1 + place * logits_2
        s = tl.load(logits + at, mask=mask, other=float("-inf")).to(dtype)
        nan = tl.sum((mask & (s != s)).to(tl.int64), 0)
        tl.atomic_add(unordered, -nan, mask=nan > 0, sem="relaxed")
        mask = mask & (s >= limits[0])
        s = tl.minimum(tl.maximum(s, limits[1]), limits[2])
        found = find(s, line, limits, look_up)
        _add(words, found, copy, s, mask, -1, keys, packing)


@jit
def _pattern_sums_kernel(
    logits,  # for its dtype
    patterns,  # (65,536, LANES) int32
    sums,  # (2, 2P) int64: numbers and distances, is added to
    keys,
    table,
    known,
    limits,
    ends,
    cells,
    scale_bits: tl.int64,
    most_bits: tl.int64,
    edges,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Looks up each bit pattern that has been counted."""
    pattern, s = pattern_scores(logits, BLOCK)
    limits = read_limits(limits, 0)
    look_up = (keys, table, tl.load(known + HALVINGS), ends, cells)
    number = tl.load(patterns + pattern[:, None] * LANES + tl.arange(0, LANES)[None, :])
    number = tl.sum(number.to(tl.int64), 1)
    mask = number > 0
    s = tl.minimum(tl.maximum(tl.where(mask, s, 0.0), limits[1]), limits[2])
    found = find(s, 0, limits, look_up)
    distance = _distance(s, found, keys, real(scale_bits, tl.float32), real(most_bits, tl.float32))
    tl.atomic_add(sums + (found - 1), number, mask=mask, sem="relaxed")
    at = sums + edges + (found - 1)
    tl.atomic_add(at, number * distance.to(tl.int64), mask=mask, sem="relaxed")


@jit
def _fold_kernel(
    words,  # as in `_count_kernel`
    sums,  # (2, 2P) int64 of 16-bit logits, or None
    keys,
    high,
    low,
    windows,
    numbers,  # (2P,) float64, out: how many negatives lie in the interval that starts at each edge
    distances,  # (2P,) float64, out: the sum of their distances to the edge itself
    edges,
    copies,
    shift,
    unit_bits: tl.int64,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Puts the copies of the words together."""
    edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = edge < edges
    unit = real(unit_bits, tl.float64)
    number = tl.zeros((BLOCK,), tl.int64)
    distance = tl.zeros((BLOCK,), tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    if keys.dtype.element_ty == tl.float64:
        number += tl.load(words + edge, mask=mask, other=0)
        fine = tl.load(words + 2 * edges + edge, mask=mask, other=0)
        total += (tl.load(words + edges + edge, mask=mask, other=0)).to(tl.float64)
        total = (total + fine.to(tl.float64) / _FINE) * unit
    else:
        one = tl.cast(1, tl.int64) << shift
        for first in range(0, copies, LANES):
            at = edge[:, None] * copies + first + tl.arange(0, LANES)[None, :]
            word = tl.load(words + at, mask=mask[:, None], other=0)
            # Both may be negative in a copy from which more was taken than added.
            part = ((word + one // 2) & (one - 1)) - one // 2
            distance += tl.sum(part, 1)
            number += tl.sum((word - part) >> shift, 1)
        if sums is not None:
            number += tl.load(sums + edge, mask=mask, other=0)
            distance += tl.load(sums + edges + edge, mask=mask, other=0)
        total = distance.to(tl.float64) * unit
    # From the rounded edge to the edge.
    start = tl.load(high + edge, mask=mask, other=0.0)
    rounded = (tl.load(keys + edge, mask=mask, other=0.0).to(tl.float64) - start) - tl.load(
        low + edge, mask=mask, other=0.0
    )
    inside = (tl.load(windows + edge, mask=mask, other=0) != 0) & (number != 0)
    number = number.to(tl.float64)
    tl.store(numbers + edge, number, mask=mask)
    tl.store(distances + edge, tl.where(inside, total + number * rounded, 0.0), mask=mask)


def count_negatives(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    edges: Edges,
    delta: float,
    ignore_index: int,
    tiles: BreakpointTiles,
    lines: Lines | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """How many negatives lie behind each edge, the sum of their distances, and how many are NaN."""
    number = edges.high.numel()
    tile = tiles.count_rows * tiles.lanes
    packing = pack_levels(logits, number, tiles)
    exact = edges.scores.dtype == torch.float64
    units = _FINE.value if exact else 2.0**packing.bits
    patterns, device = None, edges.scores.device
    if have_patterns(logits, lines):
        patterns = torch.zeros((PATTERNS, tiles.lanes), dtype=torch.int32, device=device)
    # One vector, cleared at once.
    sizes = (3 if exact else packing.copies) * number, 0 if patterns is None else 2 * number, 1
    zeros = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
    words, sums, unordered = zeros.split(sizes)
    largest = torch.finfo(edges.scores.dtype).max
    add = {
        "words": words,
        "unordered": unordered,
        "copies": packing.copies,
        "shift": packing.shift,
        "scale_bits": bits_of(min(units / (2 * delta), largest) if delta else 0.0),
        "most_bits": bits_of(units),
        "edges": number,
    }
    for level, target, of_level in zip(logits, targets, by_level(lines, logits), strict=True):
        for piece, beside, line, _ in pieces(level, target, of_level) if level.numel() else ():
            per_logit = beside.dim() == piece.dim()
            programs = min(triton.cdiv(piece.numel(), tile), tiles.programs)
            _count_kernel[(programs,)](
                logits=piece,
                targets=beside if per_logit else None,
                patterns=patterns,
                size=piece.numel(),
                ROWS=tiles.count_rows,
                LANES=tiles.lanes,
                num_warps=1,
                **lay_out_lines(piece, line),
                **add,
                **edges.look_up,
            )
            if not per_logit:
                grid, anchors = lay_out_anchors(piece, beside, ignore_index, tiles.block)
                _remove_kernel[grid](
                    logits=piece,
                    logits_0=piece.stride(0),
                    logits_1=piece.stride(1),
                    logits_2=piece.stride(2),
                    lines=line,
                    lines_0=0 if line is None else line.stride(0),
                    lines_1=0 if line is None else line.stride(1),
                    **anchors,
                    **add,
                    **edges.look_up,
                )
    if patterns is not None:
        _pattern_sums_kernel[(PATTERNS // tiles.patterns,)](
            logits=logits[0],
            patterns=patterns,
            sums=sums,
            scale_bits=add["scale_bits"],
            most_bits=add["most_bits"],
            edges=number,
            BLOCK=tiles.patterns,
            LANES=tiles.lanes,
            **edges.look_up,
        )
    numbers, distances = edges.high.new_empty((2, number))
    _fold_kernel[(triton.cdiv(number, tiles.block),)](
        words=words,
        sums=None if patterns is None else sums,
        keys=edges.keys,
        high=edges.high,
        low=edges.low,
        windows=edges.windows,
        numbers=numbers,
        distances=distances,
        edges=number,
        copies=packing.copies,
        shift=packing.shift,
        unit_bits=bits_of(2 * delta / units),
        BLOCK=tiles.block,
        LANES=tiles.lanes,
    )
    return numbers, distances, unordered
