"""A level as it lies in memory: tiles of logits, blocks of anchors, and the bits of 16-bit logits.

What reads a level in this way needs no strides and no division, but does not know what a logit is.
Where class indices tell, that is found out for the few that matter, anchor by anchor.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import magic_of
from ..strided import is_dense, origin_of, places_of, read_groups

PATTERNS = 1 << 16  # of the bits of 16-bit logits

_LONGEST = 1 << 30  # axis along which a place can be told from a number
_PIECE = 1 << 22  # logits that are copied at a time where they do not fill their memory


@triton.jit
def read_tile(values, tile, size, other, ALIGNED: tl.constexpr, NUMBER: tl.constexpr):
    """Read a tile of values as they lie in memory; return it, and how many are behind the end.

    Those read as `other`.

    It is a vector: as a matrix, Triton 3.6 deals it out so that neighbouring threads stand apart.
    ALIGNED: the values begin at a multiple of 16 bytes, and may be read so many at a time.
    """
    start = tl.cast(tile, tl.int64) * NUMBER
    values += start
    if ALIGNED:
        values = tl.multiple_of(values, 16)
    local = tl.arange(0, NUMBER)
    behind = tl.maximum(start + NUMBER - size, 0).to(tl.int32)
    if behind == 0:
        read = tl.load(values + local)
    else:
        read = tl.load(values + local, mask=local < NUMBER - behind, other=other)
    return read, behind


@triton.jit
def write_tile(values, tile, behind, written, ALIGNED: tl.constexpr, NUMBER: tl.constexpr):
    """Write a tile where `read_tile` has read one."""
    values += tl.cast(tile, tl.int64) * NUMBER
    if ALIGNED:
        values = tl.multiple_of(values, 16)
    local = tl.arange(0, NUMBER)
    if behind == 0:
        tl.store(values + local, written)
    else:
        tl.store(values + local, written, mask=local < NUMBER - behind)


@triton.jit
def segment_of_tile(segments, extent, tile, size, NUMBER: tl.constexpr):
    """Return whether one segment has a whole tile; that of its first logit, and where this is.

    It does wherever the segment cannot change between its first logit and its last: along an axis
    of stride 0, as everywhere in an image, or where both have the same place.
    """
    base, strides = segments
    start = tl.cast(tile, tl.int64) * NUMBER
    origin = origin_of(start, extent)
    rest = tl.minimum(start + NUMBER, size) - 1 - origin.outer * extent.middle * extent.inner
    same_outer = rest < tl.cast(extent.middle, tl.int64) * extent.inner
    same_middle = rest < (tl.cast(origin.middle, tl.int64) + 1) * extent.inner
    alone = (same_outer | (strides.outer == 0)) & (same_middle | (strides.middle == 0))
    at = base + origin.outer * strides.outer + origin.middle * strides.middle
    segment = tl.load(at + origin.inner * strides.inner)
    return alone & (strides.inner == 0), segment, origin


@triton.jit
def read_segments(segments, extent, origin, behind, NUMBER: tl.constexpr):
    """Read the segment of each logit of a tile; behind the end, that of the last one."""
    local = tl.minimum(tl.arange(0, NUMBER), NUMBER - 1 - behind)
    return read_groups(segments, origin, places_of(local, origin, extent), 2)


def lay_out_segments(logits: Tensor, segments: Tensor | None) -> dict[str, Any]:
    """Return arguments by which a kernel tells the segment of a logit from its place in memory.

    Args:
        logits: (B, C, M), which fill a stretch of memory.
        segments: (B, M) or (B, C, M) int32; None without groups.
    """
    shape: Sequence[int] = (1, 1, 1)
    strides: Sequence[int] = (0, 0, 0)
    if segments is not None:
        of_axis = logits.stride()
        axes = sorted(range(3), key=lambda axis: (logits.shape[axis] > 1, -of_axis[axis]))
        spread = segments if segments.dim() == 3 else segments[:, None].expand(logits.shape)
        shape = [logits.shape[axis] for axis in axes]
        strides = [spread.stride(axis) if logits.shape[axis] > 1 else 0 for axis in axes]
    return {
        "segments": segments,
        **{f"segments_{place}": stride for place, stride in enumerate(strides)},
        "middle": shape[1],
        "inner": shape[2],
        "middle_magic": magic_of(shape[1]),
        "inner_magic": magic_of(shape[2]),
    }


def is_aligned(*tensors: Tensor) -> bool:
    """Return whether all begin at a multiple of 16 bytes."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@triton.jit
def pattern_of(scores):
    """Return the bits of 16-bit logits as a number from 0 to 65,535."""
    return scores.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def pattern_scores(logits, BLOCK: tl.constexpr):
    """Return a block of all bit patterns of 16-bit logits, as a score."""
    pattern = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = logits.dtype.element_ty
    return pattern, pattern.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


def have_patterns(logits: Sequence[Tensor], segments: Any) -> bool:
    """Return whether bit patterns are looked up: of 16-bit logits, which all have one segment."""
    return segments is None and any(level.numel() and level.element_size() == 2 for level in logits)


def pieces_of(logits: Tensor) -> int:
    """Return how many pieces a level is read in, at most; see `pieces`."""
    return 2 + 3 * logits.numel() // _PIECE


def pieces(
    logits: Tensor, targets: Tensor, segments: Tensor | None, out: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Yield a level as it is if it fills a stretch of memory, else copies of its pieces.

    Yields:
        logits, which fill a stretch of memory; targets, which lie beside them if there is one for
        each; segments, if there are any, for which no axis may be longer than `divide` allows; and,
        given `out`, where the gradient is to be written, beside the logits too.
    """
    beside = targets if targets.dim() == logits.dim() else logits
    dense = is_dense(logits) and is_dense(beside, logits) and (out is None or is_dense(out, logits))
    if dense and (segments is None or max(logits.shape) < _LONGEST):
        yield logits, targets, segments, out
        return
    batch, classes, places = logits.shape
    rows = max(1, _PIECE // (classes * places))
    step = max(1, _PIECE // classes) if rows == 1 else places
    for row in range(0, batch, rows):
        for place in range(0, places, step):
            cut = (slice(row, row + rows), ..., slice(place, place + step))
            piece = logits[cut].contiguous()
            beside = targets[cut].contiguous() if targets.dim() == logits.dim() else targets[cut]
            segment = None if segments is None else segments[cut]
            if out is None:
                yield piece, beside, segment, None
            else:
                gradient = torch.empty_like(piece)
                yield piece, beside, segment, gradient
                out[cut] = gradient
