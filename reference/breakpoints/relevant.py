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
from .sort import BELOW_ALL, Breakpoints
from .workspace import Workspace

# Logits that are surveyed at once, before any is worked on.
SURVEY = 1 << 21

# Where no more than this share of the runs hold a relevant logit, these are picked out.
MAX_SPARSE_RUNS = 0.25

# Elsewhere too, unless more than this share of the logits is relevant: then a block is worked on as
# a whole.
MAX_SPARSE_LOGITS = 0.05


class Part(NamedTuple):
    """Some logits of a block."""

    scores: Tensor  # (n,) finite or NaN; what is no negative stands below every breakpoint
    segments: Tensor | None  # (n,) int64, None without groups
    at: tuple[slice | Tensor, ...]  # their place in the block, which may be one piece of it

    def write(self, out: Tensor, total: Tensor) -> None:
        """Write total (n,) into a block of a level."""
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

    def parts(
        self, breakpoints: Breakpoints, ignore_index: int, workspace: Workspace
    ) -> Iterator[Part]:
        """Yield all negatives not wholly below min_P(s) - delta, and the others too where many are.

        Args:
            breakpoints: of the positives.
            ignore_index: of the level.
            workspace: what a part may stand in, until the next.
        """
        if self.runs is None:
            return _by_piece(self, breakpoints, ignore_index, workspace)
        return _by_run(self, self.runs, breakpoints, ignore_index)


def survey(
    logits: Tensor, targets: Tensor, groups: Tensor | None, breakpoints: Breakpoints
) -> Iterator[Block]:
    """Cut a level into blocks, and find where in each the relevant logits are."""
    for rows, places, block_logits, block_targets in blocks(logits, targets, SURVEY):
        highest = run_maxima(block_logits.reshape(-1))
        ordered = not highest.amax().isnan()
        runs = _not_below(highest.to(breakpoints.key.dtype), breakpoints, ordered)
        many = _are_many(runs, block_logits, breakpoints)
        yield Block(
            where=(rows, slice(None), places),
            logits=block_logits,
            targets=block_targets,
            groups=None if groups is None else groups[rows, ..., places],
            ordered=ordered,
            runs=None if many else runs,
        )


def _are_many(runs: Tensor, logits: Tensor, breakpoints: Breakpoints) -> bool:
    """Return whether many logits are relevant, by a sample; given the runs in which some are."""
    if runs.numel() * RUN <= MAX_SPARSE_RUNS * logits.numel():
        return False
    sample = logits.reshape(-1)[::RUN].to(breakpoints.key.dtype)
    return int((sample >= breakpoints.lowest).count_nonzero()) > MAX_SPARSE_LOGITS * sample.numel()


def _by_run(
    block: Block, runs: Tensor, breakpoints: Breakpoints, ignore_index: int
) -> Iterator[Part]:
    """Pick few relevant logits out of some runs, then ask what they are."""
    flat = block.logits.reshape(-1)
    for some in runs.split(max(1, layout.CHUNK // RUN)):
        scores = in_runs(flat, some).to(breakpoints.key.dtype)
        found = _not_below(scores, breakpoints, block.ordered)
        if found.numel() == 0:
            continue
        at = unravel(where_in_runs(some, found), block.logits.shape)
        scores = finite(scores.index_select(0, found))
        scores = scores.where(is_negative(at, block.targets, ignore_index), BELOW_ALL)
        segments = None
        if block.groups is not None:
            assert breakpoints.segments is not None  # the positives have groups too
            segments = breakpoints.segments.of(at_logits(block.groups, at))
        yield Part(scores, segments, at)


def _by_piece(
    block: Block, breakpoints: Breakpoints, ignore_index: int, workspace: Workspace
) -> Iterator[Part]:
    """Yield all logits, a piece of the block at a time, where many are relevant."""
    for rows, places, piece, targets in blocks(block.logits, block.targets):
        scores = workspace("scores", piece, breakpoints.key.dtype)
        shaped = finite(piece, out=scores.view(piece.shape))
        exclude_non_negatives(shaped, targets, ignore_index, fill=BELOW_ALL)
        segments = None
        if block.groups is not None:
            assert breakpoints.segments is not None  # the positives have groups too
            segments = breakpoints.segments.of(block.groups[rows, ..., places])
            segments = over_classes(segments, piece).reshape(-1)
        yield Part(scores, segments, (rows, slice(None), places))


def _not_below(x: Tensor, breakpoints: Breakpoints, ordered: bool) -> Tensor:
    """Return which logits x (n,) are not below all breakpoints, int64.

    NaN is not, if there may be any.
    """
    found = x >= breakpoints.lowest if ordered else ~(x < breakpoints.lowest)
    return found.nonzero()[:, 0]
