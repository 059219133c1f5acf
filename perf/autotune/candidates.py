"""What the tuner tunes for, and what it tries: classes of calls, and grids of sizes.

The kernels evaluate a pair, and look up a logit, in one way, so that there is no choice among
primitives here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch

from alrp_triton.kernels.tuning.block_sizes import DTYPES, AnyTiles, Class

ALGORITHMS = ("breakpoints", "pairwise")
SIDES = ("count", "gradient")
DTYPE_OF = {"float32": torch.float32, "16-bit": torch.bfloat16}  # which stands for its class

Grid = Mapping[str, Sequence[int]]
Grids = Mapping[str, Mapping[str, Sequence[Grid]]]  # of each algorithm's sides, in turn


class Goal(NamedTuple):
    """An algorithm and a class, and the call that stands for it."""

    algorithm: str
    kind: Class
    positives: int
    logits: int
    stage: str = "mid"  # of a training: where most of it is spent

    @property
    def dtype(self) -> torch.dtype:
        return DTYPE_OF[self.kind.dtype]

    def grids(self, side: str, grids: Grids) -> list[Grid]:
        """Return the grids of a kernel; only 16-bit logits have patterns."""
        found = grids[self.algorithm][side]
        return [grid for grid in found if "patterns" not in grid or self.kind.dtype == "16-bit"]

    def __str__(self) -> str:
        return f"{self.algorithm}, {self.kind.dtype}, P = {self.positives:,}, N = {self.logits:,}"


# Bands of P by what a block of positives holds and how few detectors have; of N by whether one
# launch is long or short. In the middle of each band a call.
_LARGE, _SMALL = (((1 << 20) + 1, None), 20_950_000), ((1, 1 << 20), 500_000)
_ANY, _FEW, _SOME, _MANY = ((1, None), 1000), ((1, 64), 30), ((65, 1024), 500), ((1025, None), 3000)


def _goals(algorithm: str, *bands: tuple) -> list[Goal]:
    return [
        Goal(algorithm, Class(dtype, band, n_band), positives, logits)
        for ((n_band, logits), (band, positives)), dtype in product(bands, DTYPES)
    ]


# The most frequent come first, and last what "auto" leaves to the other algorithm: with many logits
# and more than a few positives a pair is dearer than a look-up. What a logit costs to look up
# hardly depends on P.
GOALS = (
    *_goals("breakpoints", (_LARGE, _ANY)),
    *_goals("pairwise", (_LARGE, _FEW), (_SMALL, _SOME), (_SMALL, _FEW)),
    *_goals("breakpoints", (_SMALL, _ANY)),
    *_goals("pairwise", (_LARGE, _SOME), (_SMALL, _MANY), (_LARGE, _MANY)),
)

# For the interpreter, whose times say nothing about a GPU: enough to walk the whole road.
REHEARSED_GOALS = (
    Goal("pairwise", Class("float32", (1, 64), (1, 1 << 20)), 5, 60, "spread"),
    Goal("breakpoints", Class("16-bit", (1, None), (1, 1 << 20)), 5, 60, "spread"),
)

# One grid after the other, each around the best of the one before; the count first: `few` and
# `patterns` belong to both. The first grid of each kernel decides the machine code of its inner
# loop, and is what the heat map shows.
#
# The pairwise gradient's loop loads nothing but scalars, which no compiler begins ahead, so that
# stages are a dimension of the count only: there they turn its loads into asynchronous copies.
#
# Breakpoints: what walks over positives and anchors takes a few microseconds whatever its `block`.
GRIDS: Grids = {
    "pairwise": {
        "count": (
            {"count_block": (32, 64, 128), "count_rows": (2, 4, 8), "count_warps": (1, 2, 4)},
            {"count_stages": (1, 2, 3), "few": (8, 16, 32)},
            {"count_programs": (1024, 2048, 4096, 8192, 16384), "count_fold": (16, 32, 64)},
        ),
        "gradient": (
            {
                "gradient_fold": (8, 16, 32),
                "gradient_rows": (2, 4, 8, 16),
                "gradient_warps": (1, 2, 4),
            },
            {"gradient_block": (32, 64, 128, 256)},
        ),
    },
    "breakpoints": {
        "count": (
            {"count_rows": (4, 8, 16, 32), "programs": tuple(1 << n for n in range(11, 18))},
            {"patterns": (128, 256, 512)},
        ),
        "gradient": ({"gradient_rows": (4, 8, 16, 32, 64)},),
    },
}
REHEARSED_GRIDS: Grids = {
    "pairwise": {
        "count": ({"count_block": (64, 128), "count_rows": (2, 4)}, {"count_warps": (1, 2)}),
        "gradient": ({"gradient_fold": (16, 32), "gradient_rows": (4, 8)},),
    },
    "breakpoints": {
        "count": ({"count_rows": (8, 16)}, {"patterns": (1 << 13, 1 << 14)}),
        "gradient": ({"gradient_rows": (16, 32)},),
    },
}


def candidates(best: AnyTiles, grid: Grid) -> list[AnyTiles]:
    """Return `best`, and every other point of a grid around it that the kernels can take."""
    found = [best]
    for sizes in product(*grid.values()):
        candidate = best._replace(**dict(zip(grid, sizes, strict=True)))
        try:
            candidate.check()
        except ValueError:
            continue
        if candidate not in found:
            found.append(candidate)
    return found
