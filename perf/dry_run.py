"""Ranks candidates for a GPU that is not there, by instructions a pair and occupancy.

What it cannot see is memory, and how well instructions hide each other: it narrows the choice down,
and only a time decides. Nothing that it finds is written where the package reads.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from alrp_triton.kernels.tiles import Tiles, default_tiles
from perf import heatmap
from perf.candidates import GRIDS, SIDES, Grid, candidates
from perf.machine_code import Compiled, Compiler, Task, compiler

_DTYPES = ("float32", "bfloat16")
_SHOWN = 8  # of the best candidates, in the table


def default_for(target: str) -> Tiles:
    """The default sizes for a target."""
    if target.startswith("gfx"):
        return default_tiles(64)
    return default_tiles(32, int(target.removeprefix("sm_")) // 10)


def run(target: str, folder: Path, grids: dict[str, tuple[Grid, ...]] = GRIDS) -> list[Path]:
    """Compiles every candidate, prints the best of each kernel and dtype, writes JSON and PNG."""
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("--dry-run compiles: unset TRITON_INTERPRET, under which nothing does")
    folder.mkdir(parents=True, exist_ok=True)
    rankings = []
    with compiler() as pool:
        pairs = [(side, dtype) for side in SIDES for dtype in _DTYPES]
        for side, dtype in pairs:
            rankings.append(rank(side, dtype, target, pool, grids[side]))
            print(to_text(rankings[-1]), flush=True)
    path = folder / f"dry-run-{target}.json"
    path.write_text(json.dumps(rankings, indent=1) + "\n")
    return [path, *heatmap.save(heatmap.of_rankings(rankings), path.with_suffix(".png"))]


def rank(
    side: str, dtype: str, target: str, pool: Compiler, grids: tuple[Grid, ...]
) -> dict[str, Any]:
    """All candidates of a kernel, best first, each grid around the best of the one before.

    Sizes that are in no machine code, such as the number of programs, are left as they are.
    """
    start = best = default_for(target)
    seen: dict[Task, Compiled | str | None] = {}
    for grid in grids:
        found = [Task(side, dtype, tiles, target) for tiles in candidates(best, grid)]
        codes = {task.code(): task for task in reversed(found)}  # the first of the same code
        tasks = [task for task in reversed(codes.values()) if task not in seen]
        seen |= dict(zip(tasks, pool.examine(tasks, shown=f"{side} {dtype}"), strict=True))
        best = min(seen, key=lambda task: _cost(seen[task])).tiles
    order = sorted(seen, key=lambda task: _cost(seen[task]))
    return {
        "kernel": side,
        "dtype": dtype,
        "target": target,
        "default": start._asdict(),
        "candidates": [_row(task.tiles, seen[task]) for task in order],
    }


def _cost(code: Compiled | str | None) -> tuple[float, int]:
    """Sound ones first; the registers tell apart what the loops do not."""
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
    """The best candidates and the default, as a table."""
    rows, side = ranking["candidates"], ranking["kernel"]
    refused = sum(row["refused"] is not None for row in rows)
    lines = [
        f"{side}, {ranking['dtype']} logits, {ranking['target']}: {len(rows)} candidates, "
        f"{refused} refused",
        "rank  cost  instructions/pair  warps/SM  registers  shared  sizes",
    ]
    for number, row in enumerate(rows, 1):
        is_default = row["tiles"] == ranking["default"]
        if row["refused"] or not (number <= _SHOWN or is_default):
            continue
        sizes = {n: x for n, x in row["tiles"].items() if n == "few" or n.startswith(side)}
        per_pair = "-" if row["per_pair"] is None else f"{row['per_pair']:.2f}"
        lines.append(
            f"{number:4}  {row['cost']:4.2f}  {per_pair:>17}  {row['warps']:8}  "
            f"{row['registers']:9}  {row['shared']:6}  "
            + " ".join(f"{name}={size}" for name, size in sizes.items())
            + ("  (default)" if is_default else "")
        )
    return "\n".join(lines)
