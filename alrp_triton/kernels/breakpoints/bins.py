"""The bins of the histogram: how a number and a sum of distances share an integer, and are added.

A bin has many replicas, one for each lane of a tile and more, so that lanes do not wait for each
other where all logits fall into one interval, and so many that no field can overflow.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tuning.block_sizes import BreakpointTiles
from .dense import pieces_of

# Units of a distance of float64 logits: 2 delta / 2^30, and the rest in 2 delta / 2^60.
FINE = tl.constexpr(2.0**30)

_BITS = 24  # of a distance, as long as there is memory for the replicas that it needs
_FEWEST_BITS = 16
_MAX_BINS = 1 << 20  # from which on a distance takes fewer bits instead


class Packing(NamedTuple):
    """How a number and a sum of distances share a bin."""

    replicas: int  # of each bin; a power of two
    bits: int  # of a distance: its unit is 2 delta / 2^bits
    shift: int  # where the number begins


def pack(logits: int, intervals: int, slack: int, lanes: int) -> Packing:
    """Pack as many bits as fit.

    Both fields of a bin hold what its replica of the histogram can get, added or taken away.

    Args:
        logits: N, of all levels.
        intervals: number of bins.
        slack: by how much a replica may get more than its share of the logits.
        lanes: least number of replicas.
    """
    replicas = lanes
    while True:
        most = logits // replicas + slack  # that one replica gets
        number = most.bit_length() + 1  # its bits, one of them for the sign
        bits = min(_BITS, 64 - 2 * number)
        if bits == _BITS or (bits >= _FEWEST_BITS and 2 * replicas * intervals > _MAX_BINS):
            return Packing(replicas, bits, bits + number)
        replicas *= 2


def pack_levels(logits: Sequence[Tensor], intervals: int, tiles: BreakpointTiles) -> Packing:
    """Choose the packing for a call.

    Lanes go to the replicas in turn, so that of what is added a replica gets more than its share by
    two columns of a tile at most, in each piece that is read at once. What is taken away goes to
    them in turn logit by logit.
    """
    slack = sum(pieces_of(level) * 2 * tiles.count_rows for level in logits)
    return pack(sum(level.numel() for level in logits), intervals, slack, tiles.lanes)


class Packed(NamedTuple):
    """`Packing` as kernels hand it on, and the units of a distance."""

    replicas: Any
    shift: Any
    scale: Any  # units in a distance of 1
    most: Any  # units of a whole window
    breakpoints: Any  # how many there are


@triton.jit
def distance_of(scores, found, keys, scale, most):
    """Return how far scores stand above the breakpoint before them, in units, rounded."""
    distance = scores - tl.load((keys - 1) + found)
    return tl.minimum(tl.fma(distance, scale, 0.5), most).to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def add(bins, found, replica, scores, mask, SIGN: tl.constexpr, keys, packing):
    """Add scores to the bins of their intervals, or take them away again."""
    replicas, shift, scale, most, breakpoints = packing
    if scores.dtype == tl.float64:
        distance = tl.minimum((scores - tl.load((keys - 1) + found)) * scale, most)
        high = tl.floor(distance)
        low = tl.floor((distance - high) * FINE)
        at = bins + (found - 1)
        tl.atomic_add(at, tl.full(found.shape, SIGN, tl.int64), mask=mask, sem="relaxed")
        tl.atomic_add(at + breakpoints, high.to(tl.int64) * SIGN, mask=mask, sem="relaxed")
        tl.atomic_add(at + 2 * breakpoints, low.to(tl.int64) * SIGN, mask=mask, sem="relaxed")
    else:
        distance = distance_of(scores, found, keys, scale, most)
        both = (tl.cast(1, tl.int64) << shift) + distance.to(tl.int64)
        at = (bins - replicas) + (found * replicas + replica)
        tl.atomic_add(at, both * SIGN, mask=mask, sem="relaxed")


@triton.jit
def add_together(
    bins, found, tile, scores, mask, keys, packing, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Add a tile of scores (ROWS * LANES,) that all lie in one interval, lane by lane."""
    replicas, shift, scale, most, _ = packing
    distance = distance_of(scores, found, keys, scale, most)
    distance = tl.reshape(tl.where(mask, distance, 0), (ROWS, LANES))
    distance = tl.sum(distance, 0).to(tl.int64)
    number = tl.sum(tl.reshape(mask.to(tl.int32), (ROWS, LANES)), 0).to(tl.int64)
    replica = (tl.arange(0, LANES) + tile * LANES) & (replicas - 1)
    at = (bins - replicas) + (found * replicas + replica)
    tl.atomic_add(at, (number << shift) + distance, sem="relaxed")
