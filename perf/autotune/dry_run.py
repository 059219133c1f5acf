"""Ranks candidates for a GPU that is not there, by instructions a pair or logit and occupancy.

What it cannot see is memory, and how well instructions hide each other: it narrows the choice down,
and only a time decides. Nothing that it finds is written where the package reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from alrp_triton.kernels.tuning.block_sizes import (
    BreakpointTiles,
    Tiles,
    default_breakpoint_tiles,
    default_tiles,
)
from perf.autotune import heatmap
from perf.autotune.candidates import ALGORITHMS, GRIDS, SIDES, Grid, Grids, candidates
from perf.machine_code.occupancy import Compiled, Compiler, Task, compiler

_DTYPES = ("float32", "bfloat16")
_ITEMS = {"breakpoints": "logit", "pairwise": "pair"}  # of which a kernel does one at a time
_SHOWN = 8  # of the best candidates, in the table


def default_for(algorithm: str, target: str) -> Tiles | BreakpointTiles:
    """Return the default sizes for a target."""
    is_amd = target.startswith("gfx")
    if algorithm == "breakpoints":
        return default_breakpoint_tiles(64 if is_amd else 32, torch.float32)
    return default_tiles(64) if is_amd else default_tiles(32, int(target.removeprefix("sm_")) // 10)


def files(target: str) -> list[str]:
    """Name the files that `run` leaves."""
    return [f"dry-run-{target}.json", f"dry-run-{target}.png"]


def run(target: str, folder: Path, grids: Grids = GRIDS) -> list[Path]:
    """Compile every candidate, print the best of each kernel and dtype, and write JSON and PNG."""
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("--dry-run compiles: unset TRITON_INTERPRET, under which nothing does")
    folder.mkdir(parents=True, exist_ok=True)
    rankings = []
    with compiler() as pool:
        for algorithm, side, dtype in product(ALGORITHMS, SIDES, _DTYPES):
            start = default_for(algorithm, target)
            rankings.append(rank(start, side, dtype, target, pool, grids[algorithm][side]))
            print(to_text(rankings[-1]), flush=True)
    path, picture = (folder / name for name in files(target))
    path.write_text(json.dumps(rankings, indent=1) + "\n")
    return [path, *heatmap.save(heatmap.of_rankings(rankings), picture)]


def rank(
    start: Tiles | BreakpointTiles,
    side: str,
    dtype: str,
    target: str,
    pool: Compiler,
    grids: Sequence[Grid],
) -> dict[str, Any]:
    """Rank all candidates of a kernel, best first, each grid around the best of the one before.

    Sizes that are in no machine code, such as the number of programs, are left as they are.
    """
    best, algorithm = start, Task(side, dtype, start, target).algorithm
    seen: dict[Task, Compiled | str | None] = {}
    for grid in grids:
        found = [Task(side, dtype, tiles, target) for tiles in candidates(best, grid)]
        first = {task.code(): task for task in reversed(found)}  # of the same code
        tasks = [task for task in reversed(first.values()) if task not in seen]
        if tasks:
            codes = pool.examine(tasks, shown=f"{algorithm} {side} {dtype}")
            seen |= dict(zip(tasks, codes, strict=True))
        best = min(seen, key=lambda task: _cost(seen[task])).tiles
    order = sorted(seen, key=lambda task: _cost(seen[task]))
    return {
        "algorithm": algorithm,
        "item": _ITEMS[algorithm],
        "kernel": side,
        "dtype": dtype,
        "target": target,
        "default": start._asdict(),
        "candidates": [_row(task.tiles, seen[task]) for task in order],
    }


def _cost(code: Compiled | str | None) -> tuple[float, int]:
    """Return a sort key: sound code first, then by loops, then by registers.

    The registers tell apart what the loops do not.
    """
    if not isinstance(code, Compiled) or code.spills:
        return float("inf"), 0
    return code.cost(), code.registers


def _row(tiles: Tiles, code: Compiled | str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"tiles": tiles._asdict()}
    if not isinstance(code, Compiled):
        return row | {"refused": code or "the compiler's process died"}
    refused = "spills registers" if code.spills else None
    return row | {"refused": refused, "cost": code.cost()} | code._asdict()


def to_text(ranking: dict[str, Any]) -> str:
    """Format the best candidates and the default as a table."""
    rows, side, item = ranking["candidates"], ranking["kernel"], ranking["item"]
    refused = sum(row["refused"] is not None for row in rows)
    lines = [
        f"{ranking['algorithm']} {side}, {ranking['dtype']} logits, {ranking['target']}: "
        f"{len(rows)} candidates, {refused} refused",
        f"rank   cost  {'instructions/' + item:>18}  warps/SM  registers  shared  sizes",
    ]
    for number, row in enumerate(rows, 1):
        is_default = row["tiles"] == ranking["default"]
        if row["refused"] or not (number <= _SHOWN or is_default):
            continue
        sizes = {n: x for n, x in row["tiles"].items() if n == "few" or n.startswith(side)}
        instructions = "-" if row["instructions"] is None else f"{row['instructions']:.2f}"
        lines.append(
            f"{number:4}  {row['cost']:5.2f}  {instructions:>18}  {row['warps']:8}  "
            f"{row['registers']:9}  {row['shared']:6}  "
            + " ".join(f"{name}={size}" for name, size in sizes.items())
            + ("  (default)" if is_default else "")
        )
    return "\n".join(lines)
