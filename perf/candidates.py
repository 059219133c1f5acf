"""What the tuner tunes for, and what it tries: classes of calls, and grids of sizes.

The pairwise kernels evaluate a pair in one way, so there is no choice among primitives here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch

from alrp_triton.kernels.tiles import Class, Tiles

SIDES = ("count", "gradient")


class Goal(NamedTuple):
    """A class, and the call that stands for it."""

    kind: Class
    positives: int
    logits: int
    stage: str = "mid"  # of a training: where most of it is spent

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.kind.dtype == "float32" else torch.bfloat16

    def __str__(self) -> str:
        return f"{self.kind.dtype}, P = {self.positives:,}, N = {self.logits:,}"


# Bands of P by what a block of positives holds and how few detectors have; of N by whether one
# launch is long or short. In the middle of each band a call; the most frequent come first.
_POSITIVES = (((65, 1024), 500), ((1025, None), 3000), ((1, 64), 30))
_LOGITS = ((((1 << 20) + 1, None), 20_950_000), ((1, 1 << 20), 500_000))
_DTYPES = ("float32", "16-bit")
CLASSES = tuple(
    Goal(Class(dtype, band, n_band), positives, logits)
    for (n_band, logits), (band, positives), dtype in product(_LOGITS, _POSITIVES, _DTYPES)
)

# For the interpreter, whose times say nothing about a GPU: enough to walk the whole road.
REHEARSED_CLASSES = (Goal(Class("float32", (1, 64), (1, 1 << 20)), 5, 60, "spread"),)

Grid = Mapping[str, Sequence[int]]

# One grid after the other, each around the best of the one before; the count first: `few` belongs
# to both. The first grid of each kernel decides the machine code of its inner loop, and is what the
# heat map shows. The gradient's loop loads nothing but scalars, which no compiler begins ahead, so
# that stages are a dimension of the count only: there they turn its loads into asynchronous copies.
GRIDS: dict[str, tuple[Grid, ...]] = {
    "count": (
        {"count_block": (32, 64, 128), "count_rows": (2, 4, 8), "count_warps": (1, 2, 4)},
        {"count_stages": (1, 2, 3), "few": (8, 16, 32)},
        {"count_programs": (1024, 2048, 4096, 8192, 16384), "count_fold": (16, 32, 64)},
    ),
    "gradient": (
        {"gradient_fold": (8, 16, 32), "gradient_rows": (2, 4, 8, 16), "gradient_warps": (1, 2, 4)},
        {"gradient_block": (32, 64, 128, 256)},
    ),
}
REHEARSED_GRIDS: dict[str, tuple[Grid, ...]] = {
    "count": ({"count_block": (64, 128), "count_rows": (2, 4)}, {"count_warps": (1, 2)}),
    "gradient": ({"gradient_fold": (16, 32), "gradient_rows": (4, 8)},),
}


def candidates(best: Tiles, grid: Grid) -> list[Tiles]:
    """`best`, and every other point of a grid around it that the kernels can take."""
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
