"""Which logits matter: the negatives that are not wholly below all windows.

Late in training these are few. A survey of the highest of each run of logits finds them at the
speed of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from . import layout
from .edges import Edges
from .layout import (
    at_logits,
    blocks,
    exclude_non_negatives,
    is_negative,
    over_classes,
    unravel,
)
from .runs import RUN, in_runs, run_maxima, where_in_runs
from .scratch import Scratch

# Logits that are surveyed at once, before any is worked on.
SURVEY = 1 << 21

# Where more than this share of the logits is relevant, a block is worked on as a whole.
MANY = 0.05


Index = tuple[slice, slice, slice]


class Part(NamedTuple):
    """Some logits of a level."""

    scores: Tensor  # (n,) finite or NaN; what is no negative stands below every edge
    lines: Tensor | None  # (n,) int64, None without groups
    ordered: bool  # whether none of the scores is NaN, for all that is known
    where: tuple[Index, ...]  # indices that lead to a block of the level, one after the other
    at: tuple[Tensor, ...] | None  # coordinates in that, None for all of it

    def write(self, out: Tensor, total: Tensor) -> None:
        """Writes total (n,) into a level."""
        for index in self.where:
            out = out[index]
        if self.at is None:
            out.copy_(total.view(out.shape))
        else:
            out[self.at] = total.to(out.dtype)


class _Block(NamedTuple):
    logits: Tensor  # (B, C, M)
    targets: Tensor  # (B, M) or (B, C, M)
    groups: Tensor | None  # in the shape of the targets
    ordered: bool  # whether no logit is NaN


def relevant(
    logits: Tensor,
    targets: Tensor,
    groups: Tensor | None,
    edges: Edges,
    ignore_index: int,
    scratch: Scratch,
) -> Iterator[Part]:
    """Cuts a level into parts that hold all negatives not wholly below min_P(s) - delta.

    Args:
        logits, targets, groups, ignore_index: of the level.
        edges: of the positives.
        scratch: what a part may stand in, until the next.
    """
    for rows, places, block_logits, block_targets in blocks(logits, targets, SURVEY):
        highest = run_maxima(block_logits.reshape(-1))
        ordered = not highest.amax().isnan()
        runs = _not_below(edges.within_bounds(highest), edges, ordered)
        block_groups = None if groups is None else groups[rows, ..., places]
        block = _Block(block_logits, block_targets, block_groups, ordered)
        if _are_many(runs, block, edges):
            parts = _by_piece(block, edges, ignore_index, scratch)
        else:
            parts = _by_run(block, runs, edges, ignore_index)
        for part in parts:
            yield part._replace(where=((rows, slice(None), places), *part.where))


def _are_many(runs: Tensor, block: _Block, edges: Edges) -> bool:
    """Whether many logits are relevant, by a sample; given the runs in which some are."""
    if runs.numel() * RUN <= MANY * block.logits.numel():
        return False
    sample = edges.within_bounds(block.logits.reshape(-1)[::RUN])
    return int((sample >= edges.key[0]).count_nonzero()) > MANY * sample.numel()


def _by_run(block: _Block, runs: Tensor, edges: Edges, ignore_index: int) -> Iterator[Part]:
    """Where few logits are relevant: picks them out of some runs, then asks what they are."""
    flat = block.logits.reshape(-1)
    for some in runs.split(max(1, layout.CHUNK // RUN)):
        scores = edges.within_bounds(in_runs(flat, some))
        found = _not_below(scores, edges, block.ordered)
        if found.numel() == 0:
            continue
        at = unravel(where_in_runs(some, found), block.logits.shape)
        scores = scores.index_select(0, found)
        scores = scores.where(is_negative(at, block.targets, ignore_index), edges.bounds[0])
        lines = None if block.groups is None else edges.lines.of(at_logits(block.groups, at))
        yield Part(scores, lines, block.ordered, (), at)


def _by_piece(block: _Block, edges: Edges, ignore_index: int, scratch: Scratch) -> Iterator[Part]:
    """Where many are: all logits, a piece of the block at a time."""
    for rows, places, piece, targets in blocks(block.logits, block.targets):
        scores = scratch("scores", piece, edges.key.dtype)
        shaped = edges.within_bounds(piece, out=scores.view(piece.shape))
        exclude_non_negatives(shaped, targets, ignore_index, fill=edges.bounds[0])
        lines = None
        if block.groups is not None:
            lines = edges.lines.of(block.groups[rows, ..., places])
            lines = over_classes(lines, piece).reshape(-1)
        yield Part(scores, lines, block.ordered, ((rows, slice(None), places),), None)


def _not_below(x: Tensor, edges: Edges, ordered: bool) -> Tensor:
    """Where x (n,) is not below all edges, int64; NaN is not, if there may be any."""
    lowest = edges.key[0]
    found = x >= lowest if ordered else ~(x < lowest)
    return found.nonzero()[:, 0]
