"""A level as it lies in memory: tiles of logits, blocks of anchors, and the bits of 16-bit logits.

What reads a level in this way needs no strides and no division, but does not know what a logit is.
Where class indices tell, that is found out for the few that matter, anchor by anchor.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .levels import is_dense

PATTERNS = 1 << 16  # of the bits of 16-bit logits

_PIECE = 1 << 22  # logits that are copied at a time where they do not fill their memory
_WARPS = 4  # of a program that walks over anchors


@triton.jit
def read_tile(
    values, tile, size, other, ALIGNED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """A tile of values as they lie in memory, and how many of them are behind the end: `other`.

    ALIGNED: the values begin at a multiple of 16 bytes, and may be read so many at a time.
    """
    start = tl.cast(tile, tl.int64) * (ROWS * LANES)
    values += start
    if ALIGNED:
        values = tl.multiple_of(values, 16)
    local = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    behind = tl.maximum(start + ROWS * LANES - size, 0).to(tl.int32)
    if behind == 0:
        read = tl.load(values + local)
    else:
        read = tl.load(values + local, mask=local < ROWS * LANES - behind, other=other)
    return read, behind


@triton.jit
def write_tile(
    values, tile, behind, written, ALIGNED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Writes a tile where `read_tile` has read one."""
    values += tl.cast(tile, tl.int64) * (ROWS * LANES)
    if ALIGNED:
        values = tl.multiple_of(values, 16)
    local = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if behind == 0:
        tl.store(values + local, written)
    else:
        tl.store(values + local, written, mask=local < ROWS * LANES - behind)


def is_aligned(*tensors: Tensor) -> bool:
    """Whether all begin at a multiple of 16 bytes."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@triton.jit
def pattern_of(scores):
    """The bits of 16-bit logits as a number from 0 to 65,535."""
    return scores.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def pattern_scores(logits, BLOCK: tl.constexpr):
    """A block of all bit patterns of 16-bit logits, as a score."""
    pattern = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = logits.dtype.element_ty
    return pattern, pattern.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def read_anchors(
    targets, anchors, classes, places, targets_0, targets_1, ignore_index, BLOCK: tl.constexpr
):
    """A block of anchors: (row, place, class index, which are positive, which are ignored)."""
    anchor = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = anchor < anchors
    row, place = anchor // places, anchor % places
    channel = tl.load(targets + row * targets_0 + place * targets_1, mask=mask, other=0)
    channel = channel.to(tl.int64)
    ignored = mask & (channel == ignore_index)
    positive = mask & (channel >= 0) & (channel < classes) & (channel != ignore_index)
    return row, place, channel, positive, ignored


def pieces_of(logits: Tensor) -> int:
    """How many pieces a level is read in, at most; see `pieces`."""
    return 2 + 3 * logits.numel() // _PIECE


def pieces(
    logits: Tensor, targets: Tensor, out: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """A level as it is if it fills a stretch of memory, else copies of its pieces, in turn.

    Yields:
        logits, which fill a stretch of memory; targets, which lie beside them if there is one for
        each; and, given `out`, where their gradient is to be written, beside them too.
    """
    beside = targets if targets.dim() == logits.dim() else logits
    if is_dense(logits) and is_dense(beside, logits) and (out is None or is_dense(out, logits)):
        yield logits, targets, out
        return
    batch, classes, places = logits.shape
    rows = max(1, _PIECE // (classes * places))
    step = max(1, _PIECE // classes) if rows == 1 else places
    for row in range(0, batch, rows):
        for place in range(0, places, step):
            cut = (slice(row, row + rows), ..., slice(place, place + step))
            piece = logits[cut].contiguous()
            beside = targets[cut].contiguous() if targets.dim() == logits.dim() else targets[cut]
            if out is None:
                yield piece, beside, None
            else:
                gradient = torch.empty_like(piece)
                yield piece, beside, gradient
                out[cut] = gradient


def lay_out_anchors(
    logits: Tensor, targets: Tensor, ignore_index: int, block: int
) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, arguments) of a kernel that walks over the anchors of a level of class indices."""
    grid = (triton.cdiv(targets.numel(), block),)
    return grid, {
        "targets": targets,
        "anchors": targets.numel(),
        "classes": logits.shape[1],
        "places": logits.shape[2],
        "targets_0": targets.stride(0),
        "targets_1": targets.stride(1),
        "ignore_index": ignore_index,
        "BLOCK": block,
        "num_warps": _WARPS,
    }
