"""Block sizes of the kernels: defaults, and what was found best on a GPU (tiles/<gpu>.json).

`python -m perf.autotune` writes such a file. A user's own, in the directory that the environment
variable ALRP_TRITON_TILES names, takes the place of the one shipped; without either, the defaults
hold. A file has a list for each algorithm, an entry for each class of sizes that was tuned:

    {"pairwise": [{"class": {"dtype": "float32", "positives": [65, 1024], "logits": [1, null]},
                   "tiles": {"count_block": 64, ...}, ...}], ...}

P and N choose the entry, and nothing else: a kernel has as many variants as its entries differ.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = "ALRP_TRITON_TILES"  # the environment variable that names a user's directory

DTYPES = ("float32", "16-bit")  # what sizes are tuned for

_SECTIONS = {"machine", "date", "pairwise", "breakpoints", "model"}
_ENTRY = {"class", "tiles", "measured"}


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
        """Raises ValueError if a kernel could not take these sizes, or sum in float32 over them."""
        for name, size in self._asdict().items():
            if type(size) is not int or size < 1 or (size & (size - 1) and name != "count_stages"):
                raise ValueError(f"{name}: expected a power of two, got {size!r}")
        if self.few > min(self.count_block, self.gradient_block):
            raise ValueError(f"few: expected no more than the blocks, got {self.few}")
        if self.gradient_fold > self.gradient_block:
            raise ValueError(f"gradient_fold: expected no more than the block, got {self}")
        if self.count_fold * self.count_rows * self.count_warps * self.lanes >= 1 << 24:
            raise ValueError(f"count_fold: float32 cannot sum so many, got {self}")


class Class(NamedTuple):
    """A class of calls that share their sizes; ends are included, None is no end."""

    dtype: str  # of the logits: float32 or 16-bit
    positives: tuple[int, int | None]
    logits: tuple[int, int | None]

    def holds(self, dtype: torch.dtype, positives: int, logits: int) -> bool:
        """Whether a call of P positives (padding too) and N logits belongs to the class."""
        return self.dtype == dtype_class(dtype) and all(
            least <= number and (most is None or number <= most)
            for number, (least, most) in ((positives, self.positives), (logits, self.logits))
        )


def dtype_class(dtype: torch.dtype) -> str:
    """The dtype of a class; float64 has none, and keeps the defaults, cut down by the launcher."""
    return "16-bit" if dtype in (torch.float16, torch.bfloat16) else str(dtype).split(".")[1]


def tiles_for(device: torch.device, dtype: torch.dtype, positives: int, logits: int) -> Tiles:
    """The sizes for a call of P positives and N logits; the CPU (interpreter) has defaults.

    Raises:
        ValueError: if the file for this GPU is not as described above.
    """
    if device.type != "cuda":
        return default_tiles()
    properties = torch.cuda.get_device_properties(device)
    default = default_tiles(properties.warp_size, properties.major)
    entries = _tuned(properties.name, default, os.environ.get(FOLDER))
    return choose(entries, default, dtype, positives, logits)


def choose(
    entries: list[tuple[Class, Tiles]],
    default: Tiles,
    dtype: torch.dtype,
    positives: int,
    logits: int,
) -> Tiles:
    """The first entry whose class holds the call, or the default."""
    for kind, tiles in entries:
        if kind.holds(dtype, positives, logits):
            return tiles
    return default


def default_tiles(lanes: int = 32, major: int = 9) -> Tiles:
    """The sizes for an unknown GPU of a warp size and a major compute capability."""
    if lanes == 64:  # the compiler for AMD keeps a whole tile in registers
        return Tiles(lanes=64, count_block=64, count_rows=2, gradient_block=64, gradient_rows=4)
    if major >= 10:  # packed float32 instructions take registers in pairs
        return Tiles(count_block=64, count_rows=2, gradient_block=64)
    return Tiles()


def file_name(gpu: str) -> str:
    """Of the file for a GPU: NVIDIA-H200.json."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", gpu).strip("-") + ".json"


def find_file(gpu: str, folder: str | None) -> Path | None:
    """The user's file for a GPU, or that shipped, or None."""
    folders = [Path(folder)] if folder else []
    for place in [*folders, Path(__file__).with_name("tiles")]:
        if (path := place / file_name(gpu)).exists():
            return path
    return None


def forget() -> None:
    """Reads the files again at the next call; for whoever has just written one."""
    _tuned.cache_clear()


@cache
def _tuned(gpu: str, default: Tiles, folder: str | None) -> list[tuple[Class, Tiles]]:
    path = find_file(gpu, folder)
    return [] if path is None else read_file(path, default)


def read_file(path: Path, default: Tiles) -> list[tuple[Class, Tiles]]:
    """The pairwise entries of a file; a size that an entry leaves out is the default.

    Raises:
        ValueError: naming the file, if it is broken or holds what nobody reads.
    """
    try:
        content = json.loads(path.read_text())
        _expect(content, _SECTIONS)
        return [_entry(entry, default) for entry in content.get("pairwise", [])]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a file of tuned sizes ({error!r}); remove it, or write it again with "
            "python -m perf.autotune"
        ) from error


def _entry(entry: dict[str, Any], default: Tiles) -> tuple[Class, Tiles]:
    _expect(entry, _ENTRY)
    _expect(entry["class"], set(Class._fields))
    _expect(entry["tiles"], set(Tiles._fields))
    dtype = entry["class"]["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    tiles = default._replace(**entry["tiles"])
    tiles.check()
    (p_least, p_most), (n_least, n_most) = (entry["class"][x] for x in ("positives", "logits"))
    return Class(dtype, (p_least, p_most), (n_least, n_most)), tiles


def _expect(given: dict[str, Any], known: set[str]) -> None:
    if unknown := set(given) - known:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")


class BreakpointTiles(NamedTuple):
    """Sizes of the breakpoint kernels, each a power of two.

    A program that reads logits is one warp, and its tile has `count_rows * lanes` logits, or
    `gradient_rows * lanes`.
    """

    lanes: int = 32  # threads of a warp
    count_rows: int = 16
    gradient_rows: int = 32
    programs: int = 1 << 14  # at most so many share the tiles of a level
    block: int = 128  # positives, edges or anchors of a program
    patterns: int = 512  # of the bits of 16-bit logits, of a program


def breakpoint_tiles(device: torch.device, dtype: torch.dtype) -> BreakpointTiles:
    """The sizes for logits of a dtype on a device; nothing is tuned yet."""
    if device.type == "cuda":
        lanes = torch.cuda.get_device_properties(device).warp_size
        return default_breakpoint_tiles(lanes, dtype)
    # The interpreter takes as long for a small program as for a large one.
    return default_breakpoint_tiles(32, dtype)._replace(patterns=1 << 14)


def default_breakpoint_tiles(lanes: int, dtype: torch.dtype) -> BreakpointTiles:
    """The sizes for an unknown GPU of a warp size."""
    if dtype == torch.float64:  # no more than registers hold
        return BreakpointTiles(lanes, count_rows=4, gradient_rows=4)
    return BreakpointTiles(lanes, gradient_rows=16 if lanes == 64 else 32)
