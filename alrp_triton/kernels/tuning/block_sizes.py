"""Block sizes of the kernels: what they are, what they may be, and defaults for an unknown GPU.

What was found best on a known GPU is read by `tuned`, class of calls by class of calls.
"""

from __future__ import annotations

import reprlib
from typing import NamedTuple, TypeVar

import torch

DTYPES = ("float32", "16-bit")  # what sizes are tuned for

_MOST_ENTRIES = 1 << 20  # of a tensor in a kernel, says Triton

# The largest size of each kind, and 1024 of what is not here: above them nothing is any faster, and
# compilers, memory or the grid give out.
_MOST = {
    "lanes": 64,
    "count_warps": 32,
    "gradient_warps": 32,
    "count_stages": 8,
    "count_fold": 1 << 20,
    "count_programs": 1 << 20,
    "programs": 1 << 20,
    "patterns": 1 << 16,
}


class Tiles(NamedTuple):
    """Sizes of the pairwise kernels, each a power of two.

    A tile of the count has `count_rows * lanes * count_warps` logits, which meet `count_block`
    positives at once, or `few` in a block that has no more; its loads begin `count_stages` - 1
    tiles ahead. A tile of the gradient has `gradient_rows * lanes * gradient_warps` logits and is
    loaded once, so that there is nothing to begin ahead; it skips `gradient_block` positives at a
    time. Sums run in float32 over `count_fold` tiles or `gradient_fold` positives, then in float64.
    """

    lanes: int = 32  # threads of a warp
    few: int = 32
    count_block: int = 128
    count_rows: int = 4
    count_warps: int = 1
    count_stages: int = 1
    count_fold: int = 32
    count_programs: int = 4096  # about how many shares the work is cut into
    gradient_block: int = 128
    gradient_rows: int = 8
    gradient_warps: int = 1
    gradient_fold: int = 32

    def check(self) -> None:
        """Raise ValueError if a kernel could not take these sizes, or sum in float32 over them."""
        _expect_sizes(self, but="count_stages")
        if self.few > min(self.count_block, self.gradient_block):
            raise ValueError(f"few: expected no more than the blocks, got {self.few}")
        if self.gradient_fold > self.gradient_block:
            raise ValueError(f"gradient_fold: expected no more than the block, got {self}")
        tile = self.count_rows * self.lanes * self.count_warps
        of_gradient = self.gradient_rows * self.lanes * self.gradient_warps
        if max(tile * self.count_block, of_gradient) > _MOST_ENTRIES:
            raise ValueError(f"count_block, gradient_rows: no tensor may be so large, got {self}")
        if self.count_fold * tile >= 1 << 24:
            raise ValueError(f"count_fold: float32 cannot sum so many, got {self}")


class BreakpointTiles(NamedTuple):
    """Sizes of the breakpoint kernels, each a power of two.

    A program that reads logits is one warp, and its tile has `count_rows * lanes` logits, or
    `gradient_rows * lanes`.
    """

    lanes: int = 32  # threads of a warp
    count_rows: int = 16
    gradient_rows: int = 32
    programs: int = 1 << 14  # at most so many share the tiles of a level
    block: int = 128  # positives, breakpoints or anchors of a program
    patterns: int = 512  # of the bits of 16-bit logits, of a program

    def check(self) -> None:
        """Raise ValueError if a kernel could not take these sizes, or sum in integers by them."""
        _expect_sizes(self)
        if self.count_rows > 128:
            raise ValueError(
                f"count_rows: 32 bits cannot sum so many distances, got {self.count_rows}"
            )
        if self.patterns * self.lanes > _MOST_ENTRIES:
            raise ValueError(f"patterns: no tensor may be so large, got {self}")


AnyTiles = TypeVar("AnyTiles", Tiles, BreakpointTiles)


def _expect_sizes(tiles: Tiles | BreakpointTiles, but: str = "") -> None:
    """Raise ValueError unless all are powers of two (`but` any number) that a GPU could take."""
    for name, size in tiles._asdict().items():
        most = _MOST.get(name, 1024)
        if type(size) is not int or size < 1 or (size & (size - 1) and name != but):
            raise ValueError(f"{name}: expected a power of two, got {reprlib.repr(size)}")
        if size > most:
            raise ValueError(f"{name}: expected at most {most}, got {reprlib.repr(size)}")


class Class(NamedTuple):
    """A class of calls that share their sizes; ends are included, None is no end."""

    dtype: str  # of the logits: float32 or 16-bit
    positives: tuple[int, int | None]
    logits: tuple[int, int | None]

    def holds(self, dtype: torch.dtype, positives: int, logits: int) -> bool:
        """Return whether a call of P positives (padding too) and N logits belongs to the class."""
        return self.dtype == dtype_class(dtype) and all(
            least <= number and (most is None or number <= most)
            for number, (least, most) in ((positives, self.positives), (logits, self.logits))
        )


def dtype_class(dtype: torch.dtype) -> str:
    """Return the dtype of a class; float64 has none, and keeps the defaults."""
    return "16-bit" if dtype in (torch.float16, torch.bfloat16) else str(dtype).split(".")[1]


def choose(
    entries: list[tuple[Class, AnyTiles]],
    default: AnyTiles,
    dtype: torch.dtype,
    positives: int,
    logits: int,
) -> AnyTiles:
    """Return the first entry whose class holds the call, or the default."""
    for kind, tiles in entries:
        if kind.holds(dtype, positives, logits):
            return tiles
    return default


def default_tiles(lanes: int = 32, major: int = 9) -> Tiles:
    """Return the sizes for an unknown GPU of a warp size and a major compute capability."""
    if lanes == 64:  # the compiler for AMD keeps a whole tile in registers
        return Tiles(lanes=64, count_block=64, count_rows=2, gradient_block=64, gradient_rows=4)
    if major >= 10:  # packed float32 instructions take registers in pairs
        return Tiles(count_block=64, count_rows=2, gradient_block=64)
    return Tiles()


def default_breakpoint_tiles(lanes: int, dtype: torch.dtype) -> BreakpointTiles:
    """Return the sizes for logits of a dtype on an unknown GPU of a warp size."""
    if dtype == torch.float64:  # no more than registers hold
        return BreakpointTiles(lanes, count_rows=4, gradient_rows=4)
    return BreakpointTiles(lanes, gradient_rows=16 if lanes == 64 else 32)
