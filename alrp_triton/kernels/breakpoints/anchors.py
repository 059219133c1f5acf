"""The anchors of a level of class indices, block by block: which are positive, which ignored.

Both are few beside the logits. A positive anchor is no negative at one class, an ignored one at all
of them; the logits of ignored anchors are dealt out to all lanes, or most would wait for a few.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..language import divide, magic_of


class Anchors(NamedTuple):
    """The anchors of a level of class indices, as kernels hand them on: see `strided`."""

    targets: Any  # (rows, places)
    strides: Any  # of these
    places: Any
    blocks: Any  # of a row
    blocks_magic: Any  # what `language.divide` divides by; so is the next
    classes: Any
    classes_magic: Any
    ignore_index: Any


@triton.jit
def read_anchors(anchors, block, BLOCK: tl.constexpr):
    """Read a block of anchors of one row.

    Returns (row, place of the first; class index of each, which are positive, which are ignored).
    """
    row, block = divide(tl.cast(block, tl.uint32), anchors.blocks, anchors.blocks_magic)
    row, first = row.to(tl.int64), block.to(tl.int64) * BLOCK
    place = first + tl.arange(0, BLOCK)
    at = anchors.targets + row * anchors.strides[0] + place * anchors.strides[1]
    channel = tl.load(at, mask=place < anchors.places, other=-1).to(tl.int64)
    ignored = (place < anchors.places) & (channel == anchors.ignore_index)
    positive = (channel >= 0) & (channel < anchors.classes) & ~ignored
    return row, first, channel, positive, ignored


@triton.jit
def gather_ignored(ignored, BLOCK: tl.constexpr):
    """Return where in a block its ignored anchors stand, one after the other, on the first lanes.

    Lane k searches for the anchor up to which there are k + 1.
    """
    upto = tl.cumsum(ignored.to(tl.int32), 0)
    order = tl.zeros((BLOCK,), tl.int32)
    for power in tl.static_range(10):
        if (512 >> power) < BLOCK:
            fewer = tl.gather(upto, order + ((512 >> power) - 1), 0) <= tl.arange(0, BLOCK)
            order = tl.where(fewer, order + (512 >> power), order)
    return order


@triton.jit
def ignored_logits(order, number, first, anchors, BLOCK: tl.constexpr):
    """Return the next logits of a block's ignored anchors, from the one numbered `first` on.

    They are dealt out to the lanes anchor by anchor, class by class, so that no lane idles. Returns
    (place of the anchor in the block, class, which lanes have one).
    """
    logit = first + tl.arange(0, BLOCK)
    anchor, channel = divide(logit.to(tl.uint32), anchors.classes, anchors.classes_magic)
    inside = logit < number * anchors.classes
    anchor = tl.gather(order, tl.minimum(anchor.to(tl.int32), BLOCK - 1), 0)
    return anchor, channel.to(tl.int64), inside


def lay_out_anchors(
    targets: Tensor, classes: int, ignore_index: int, block: int, **beside: Tensor | None
) -> tuple[int, dict[str, Any]]:
    """Lay the anchors of a level of class indices out in rows, one long row if all strides allow.

    Args:
        targets: (B, M).
        classes: C.
        ignore_index: of class indices.
        block: how many anchors a program takes.
        beside: (B, M) or (B, C, M) tensors by name, whose strides are needed too.

    Returns:
        How many blocks there are; and the arguments of a kernel, with two strides of each tensor.
    """
    rows, places = targets.shape
    given = {"targets": targets, **beside}
    strides = {
        name: (0, 0) if x is None else (x.stride(0), x.stride(-1)) for name, x in given.items()
    }
    if places == 1:
        rows, places = 1, rows
        strides = {name: (0, row) for name, (row, _) in strides.items()}
    elif all(row == places * place for row, place in strides.values()):
        rows, places = 1, rows * places
    blocks = max(1, triton.cdiv(places, block))
    return rows * blocks, {
        "anchor_targets": targets,
        "places": places,
        "row_blocks": blocks,
        "row_blocks_magic": magic_of(blocks),
        "classes": classes,
        "classes_magic": magic_of(max(1, classes)),
        "ignore_index": ignore_index,
        **{f"{name}_row": row for name, (row, _) in strides.items()},
        **{f"{name}_place": place for name, (_, place) in strides.items()},
    }
