"""What was found best on a GPU: the sizes of its kernels, and what the algorithms cost on it.

`python -m perf.autotune` writes such a file, tiles/<gpu>.json. A user's own, in the directory that
the environment variable ALRP_TRITON_TILES names, takes the place of the one shipped; without
either, the defaults hold, as they do for whatever a file leaves out. An algorithm has a list of
sizes, an entry for each class of calls that was tuned; a class of dtypes has the costs of both:

    {"pairwise": [{"class": {"dtype": "float32", "positives": [65, 1024], "logits": [1, null]},
                   "tiles": {"count_block": 64, ...}, ...}],
     "breakpoints": [{"class": ..., "tiles": {"count_rows": 8, ...}, ...}],
     "costs": {"float32": {"pairwise": {"call": ..., "pair": ..., ...},
                           "breakpoints": {"call": ..., "logit": ..., ...}, ...}}}

P, N and the dtype choose sizes and algorithm, and nothing else: a kernel has as many variants as
its entries differ.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...reference.layout import Batch
from .block_sizes import (
    DTYPES,
    AnyTiles,
    BreakpointTiles,
    Class,
    Tiles,
    choose,
    default_breakpoint_tiles,
    default_tiles,
    dtype_class,
)
from .costs import BreakpointCosts, Costs, PairwiseCosts, default_costs

FOLDER = "ALRP_TRITON_TILES"  # the environment variable that names a user's directory

_DEAREST = 1e6  # seconds that anything may cost


class Tuned(NamedTuple):
    """What a file holds."""

    pairwise: list[tuple[Class, Tiles]]
    breakpoints: list[tuple[Class, BreakpointTiles]]
    costs: dict[str, Costs]  # by the class of dtypes


UNTUNED = Tuned([], [], {})


class Defaults(NamedTuple):
    """The sizes where nothing is tuned."""

    pairwise: Tiles
    breakpoints: BreakpointTiles


def kind_of(batch: Batch) -> tuple[torch.dtype, int, int]:
    """Return what a call's class is told by: dtype of the logits, P (padding too) and N."""
    dtype = batch.logits[0].dtype if batch.logits else batch.scores.dtype
    return dtype, batch.scores.numel(), sum(level.numel() for level in batch.logits)


def tiles_for(device: torch.device, dtype: torch.dtype, positives: int, logits: int) -> Tiles:
    """Return the pairwise kernels' sizes for a call of P positives (padding too) and N logits.

    Raises:
        ValueError: if the file for this GPU is not as described above, or ALRP_TRITON_TILES names
            no directory.
    """
    default = defaults_for(device, dtype).pairwise
    return choose(_of_device(device).pairwise, default, dtype, positives, logits)


def breakpoint_tiles_for(
    device: torch.device, dtype: torch.dtype, positives: int, logits: int
) -> BreakpointTiles:
    """Return the breakpoint kernels' sizes for such a call; raise as `tiles_for` does."""
    default = defaults_for(device, dtype).breakpoints
    return choose(_of_device(device).breakpoints, default, dtype, positives, logits)


def costs_for(device: torch.device, dtype: torch.dtype) -> Costs:
    """Return what a call costs that has logits of a dtype; raise as `tiles_for` does."""
    return _of_device(device).costs.get(dtype_class(dtype)) or default_costs(dtype)


def defaults_for(device: torch.device, dtype: torch.dtype) -> Defaults:
    """Return the defaults by what a GPU tells of itself; for the interpreter, an NVIDIA one's."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        lanes, major = properties.warp_size, properties.major
        return Defaults(default_tiles(lanes, major), default_breakpoint_tiles(lanes, dtype))
    # The interpreter takes as long for a small program as for a large one.
    breakpoints = default_breakpoint_tiles(32, dtype)._replace(patterns=1 << 14)
    return Defaults(default_tiles(), breakpoints)


def file_name(gpu: str) -> str:
    """Return the name of the file for a GPU: NVIDIA-H200.json."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", gpu).strip("-") + ".json"


def find_file(gpu: str, folder: str | None) -> Path | None:
    """Return the user's file for a GPU, or that shipped, or None."""
    folders = [Path(folder)] if folder else []
    for place in [*folders, Path(__file__).parents[1] / "tiles"]:
        if os.path.lexists(path := place / file_name(gpu)):
            return path
    return None


def forget() -> None:
    """Read the files again at the next call; for whoever has just written one."""
    _of_gpu.cache_clear()


def _of_device(device: torch.device) -> Tuned:
    if device.type != "cuda":
        return UNTUNED
    # What is tuned is float32 and 16-bit, whose defaults are the same.
    defaults = defaults_for(device, torch.float32)
    name = torch.cuda.get_device_properties(device).name
    return _of_gpu(name, defaults, os.environ.get(FOLDER))


@cache
def _of_gpu(gpu: str, defaults: Defaults, folder: str | None) -> Tuned:
    if folder and not os.path.isdir(folder):
        raise ValueError(f"{FOLDER}: expected a directory that exists, got {folder!r}")
    path = find_file(gpu, folder)
    return UNTUNED if path is None else read_file(path, defaults)


# --- the file -----------------------------------------------------------------------------------


def read_file(path: Path, defaults: Defaults) -> Tuned:
    """Read a file; a size that an entry leaves out is the default.

    Raises:
        ValueError: naming the file and the place in it, if it is broken, holds what nobody reads,
            or cannot be read.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), defaults)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a file of tuned sizes and costs: {error}; remove it, or write it again "
            "with python -m perf.autotune"
        ) from error


def parse(content: Any, defaults: Defaults) -> Tuned:
    """Read the content of such a file; its errors name the place alone."""
    _expect(content, optional=("machine", "date", "pairwise", "breakpoints", "costs"))
    return Tuned(
        _entries(content, "pairwise", defaults.pairwise),
        _entries(content, "breakpoints", defaults.breakpoints),
        _costs(content.get("costs", {})),
    )


def _entries(
    content: dict[str, Any], section: str, default: AnyTiles
) -> list[tuple[Class, AnyTiles]]:
    entries = content.get(section, [])
    if not isinstance(entries, list):
        raise ValueError(f"{section}: expected a list, got {reprlib.repr(entries)}")
    found = []
    for number, entry in enumerate(entries):
        try:
            found.append(_entry(entry, default))
        except ValueError as error:
            raise ValueError(f"{section}[{number}]: {error}") from error
    return found


def _entry(entry: Any, default: AnyTiles) -> tuple[Class, AnyTiles]:
    _expect(entry, required=("class", "tiles"), optional=("measured",))
    _expect(entry["class"], required=Class._fields)
    _expect(entry["tiles"], optional=default._fields)
    dtype, positives, logits = (entry["class"][name] for name in Class._fields)
    _expect_dtype(dtype)
    tiles = default._replace(**entry["tiles"])
    tiles.check()
    return Class(dtype, _band("positives", positives), _band("logits", logits)), tiles


def _band(name: str, ends: Any) -> tuple[int, int | None]:
    if isinstance(ends, list) and len(ends) == 2 and type(ends[0]) is int and ends[0] >= 0:
        least, most = ends
        if most is None or (type(most) is int and least <= most):
            return least, most
    raise ValueError(f"{name}: expected [least, most] or [least, null], got {reprlib.repr(ends)}")


def _costs(content: Any) -> dict[str, Costs]:
    _expect(content, optional=DTYPES)
    found = {}
    for dtype, entry in content.items():
        try:
            _expect(entry, required=Costs._fields, optional=("measured",))
            pairwise = PairwiseCosts(**_prices(entry, "pairwise", PairwiseCosts._fields))
            breakpoints = BreakpointCosts(**_prices(entry, "breakpoints", BreakpointCosts._fields))
            found[dtype] = Costs(pairwise, breakpoints)
        except ValueError as error:
            raise ValueError(f"costs of {dtype}: {error}") from error
    return found


def _prices(entry: dict[str, Any], algorithm: str, names: tuple[str, ...]) -> dict[str, float]:
    prices = entry[algorithm]
    _expect(prices, required=names)
    for name, price in prices.items():
        if type(price) not in (int, float) or not 0 <= price <= _DEAREST:
            raise ValueError(f"{algorithm}: {name}: expected seconds, got {reprlib.repr(price)}")
    return prices


def _expect_dtype(dtype: Any) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {reprlib.repr(dtype)}")


def _expect(given: Any, required: Iterable[str] = (), optional: Iterable[str] = ()) -> None:
    """Raise ValueError unless this is an object with these entries."""
    if not isinstance(given, dict):
        raise ValueError(f"expected an object, got {reprlib.repr(given)}")
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"missing {', '.join(missing)}")
    if unknown := sorted(set(given) - {*required, *optional}):
        raise ValueError(f"unknown {', '.join(unknown)}")
