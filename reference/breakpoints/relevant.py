"""Which logits matter: the negatives that are not wholly below all windows.

Late in training these are few. A survey of the highest of each run of logits finds them at the
speed of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .. import layout
from ..layout import (
    at_logits,
    blocks,
    exclude_non_negatives,
    finite,
    is_negative,
    over_classes,
    unravel,
)
from .block_maxima import RUN, in_runs, run_maxima, where_in_runs
from .sort import BELOW_ALL, Edges
from .workspace import Scratch

# Logits that are surveyed at once, before any is worked on.
SURVEY = 1 << 21

# Where no more than this share of the runs hold a relevant logit, these are picked out.
SCARCE = 0.25

# Elsewhere too, unless more than this share of the logits is relevant: then a block is worked on as
# a whole.
MANY = 0.05


class Part(NamedTuple):
    """Some logits of a block."""

    scores: Tensor  # (n,) finite or NaN; what is no negative stands below every edge
    lines: Tensor | None  # (n,) int64, None without groups
    at: tuple[slice | Tensor, ...]  # their place in the block, which may be one piece of it

    def write(self, out: Tensor, total: Tensor) -> None:
        """Writes total (n,) into a block of a level."""
        if isinstance(self.at[0], slice):
            piece = out[self.at]
            piece.copy_(total.view(piece.shape))
        else:
            out[self.at] = total.to(out.dtype)


class Block(NamedTuple):
    """A part of a level that was surveyed at once."""

    where: tuple[slice, slice, slice]  # in the level
    logits: Tensor  # (B, C, M)
    targets: Tensor  # (B, M) or (B, C, M)
    groups: Tensor | None  # in the shape of the targets
    ordered: bool  # whether no logit is NaN
    runs: Tensor | None  # the runs in which a logit is relevant; None if many are

    def parts(self, edges: Edges, ignore_index: int, scratch: Scratch) -> Iterator[Part]:
        """All negatives not wholly below min_P(s) - delta, and where many are, the others too.

        Args:
            edges: of the positives.
            ignore_index: of the level.
            scratch: what a part may stand in, until the next.
        """
        if self.runs is None:
            return _by_piece(self, edges, ignore_index, scratch)
        return _by_run(self, self.runs, edges, ignore_index)


def survey(logits: Tensor, targets: Tensor, groups: Tensor | None, edges: Edges) -> Iterator[Block]:
    """Cuts a level into blocks, and finds where in each the relevant logits are."""
    for rows, places, block_logits, block_targets in blocks(logits, targets, SURVEY):
        highest = run_maxima(block_logits.reshape(-1))
        ordered = not highest.amax().isnan()
        runs = _not_below(highest.to(edges.key.dtype), edges, ordered)
        many = _are_many(runs, block_logits, edges)
        yield Block(
            where=(rows, slice(None), places),
            logits=block_logits,
            targets=block_targets,
            groups=None if groups is None else groups[rows, ..., places],
            ordered=ordered,
            runs=None if many else runs,
        )


def _are_many(runs: Tensor, logits: Tensor, edges: Edges) -> bool:
    """Whether many logits are relevant, by a sample; given the runs in which some are."""
    if runs.numel() * RUN <= SCARCE * logits.numel():
        return False
    sample = logits.reshape(-1)[::RUN].to(edges.key.dtype)
    return int((sample >= edges.lowest).count_nonzero()) > MANY * sample.numel()


def _by_run(block: Block, runs: Tensor, edges: Edges, ignore_index: int) -> Iterator[Part]:
    """Where few logits are relevant: picks them out of some runs, then asks what they are."""
    flat = block.logits.reshape(-1)
    for some in runs.split(max(1, layout.CHUNK // RUN)):
        scores = in_runs(flat, some).to(edges.key.dtype)
        found = _not_below(scores, edges, block.ordered)
        if found.numel() == 0:
            continue
        at = unravel(where_in_runs(some, found), block.logits.shape)
        scores = finite(scores.index_select(0, found))
        scores = scores.where(is_negative(at, block.targets, ignore_index), BELOW_ALL)
        lines = None
        if block.groups is not None:
            assert edges.lines is not None  # the positives have groups too
            lines = edges.lines.of(at_logits(block.groups, at))
        yield Part(scores, lines, at)


def _by_piece(block: Block, edges: Edges, ignore_index: int, scratch: Scratch) -> Iterator[Part]:
    """Where many are: all logits, a piece of the block at a time."""
    for rows, places, piece, targets in blocks(block.logits, block.targets):
        scores = scratch("scores", piece, edges.key.dtype)
        shaped = finite(piece, out=scores.view(piece.shape))
        exclude_non_negatives(shaped, targets, ignore_index, fill=BELOW_ALL)
        lines = None
        if block.groups is not None:
            assert edges.lines is not None  # the positives have groups too
            lines = edges.lines.of(block.groups[rows, ..., places])
            lines = over_classes(lines, piece).reshape(-1)
        yield Part(scores, lines, (rows, slice(None), places))


def _not_below(x: Tensor, edges: Edges, ordered: bool) -> Tensor:
    """Which logits x (n,) are not below all edges, int64; NaN is not, if there may be any."""
    found = x >= edges.lowest if ordered else ~(x < edges.lowest)
    return found.nonzero()[:, 0]
