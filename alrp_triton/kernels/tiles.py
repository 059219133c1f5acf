"""Block sizes of the kernels: defaults, and what was found best on a GPU (tiles/<gpu>.json)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Sizes of the pairwise kernels, each a power of two. A program is one warp.

    A tile of the count has `count_rows * lanes` logits, which meet `block` positives at once, or
    `few` in a block that has no more. A tile of the gradient has `gradient_rows * lanes` logits.
    Sums run in float32 over `fold` tiles (count) or `fold` positives (gradient), then in float64.
    """

    lanes: int = 32  # threads of a warp
    block: int = 128
    few: int = 32
    count_rows: int = 4
    gradient_rows: int = 8
    fold: int = 32
    programs: int = 4096  # about how many shares the count's work is cut into


def tiles_for(device: torch.device) -> Tiles:
    """The sizes for a device, the CPU (interpreter) included."""
    if device.type != "cuda":
        return default_tiles()
    properties = torch.cuda.get_device_properties(device)
    return _read(properties.name, properties.warp_size, properties.major)


def default_tiles(lanes: int = 32, major: int = 9) -> Tiles:
    """The sizes for an unknown GPU of a warp size and a major compute capability."""
    if lanes == 64:  # the compiler for AMD keeps a whole tile in registers
        return Tiles(lanes=64, block=64, count_rows=2, gradient_rows=4)
    if major >= 10:  # packed float32 instructions take registers in pairs
        return Tiles(block=64, count_rows=2)
    return Tiles()


@cache
def _read(gpu: str, lanes: int, major: int) -> Tiles:
    path = Path(__file__).with_name("tiles") / (gpu.replace(" ", "-") + ".json")
    tuned = json.loads(path.read_text())["pairwise"] if path.exists() else {}
    return default_tiles(lanes, major)._replace(**tuned)
