"""Finds the sizes of the kernels that are best on this GPU, and writes the file the package reads.

    python -m perf.autotune --out alrp_triton/kernels/tiles     # or into $ALRP_TRITON_TILES
    python -m perf.autotune --dry-run --target sm_90 --out .    # no GPU: by the machine code alone

The road, for each class of sizes and each kernel: candidates, a grid at a time -> compiled, those
that spill left out -> held to the reference, those that are wrong or differ from run to run left
out -> timed side by side in rounds, the better ones longer -> the best of all against the sizes in
use, in fresh rounds. Only a candidate that wins these beyond the noise replaces what was there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alrp_triton.kernels import tiles as tiles_of
from alrp_triton.kernels.tiles import Class, Tiles
from perf import dry_run, heatmap, timing
from perf.candidates import (
    CLASSES,
    GRIDS,
    REHEARSED_CLASSES,
    REHEARSED_GRIDS,
    SIDES,
    Goal,
    Grid,
)
from perf.judge import Judge, draw
from perf.machine_code import LIMITS, Compiled, Task, compiler
from perf.progress import bar
from perf.search import Search


def tune(
    device: torch.device,
    seconds: float,
    classes: Sequence[Goal] | None = None,
    progress: bool = True,
    grids: dict[str, tuple[Grid, ...]] | None = None,
    folder: str | None = None,
) -> dict[str, Any]:
    """Tunes class by class while there is time.

    Args:
        device: the GPU; the CPU walks the same road in the interpreter, where a time means little.
        seconds: after which nothing more begins.
        classes: most important first; those of `perf.candidates` by default.
        progress: whether to show it.
        grids: of each kernel, one after the other; those of `perf.candidates` by default.
        folder: where the file of the sizes in use is looked for, before the package's own;
            $ALRP_TRITON_TILES by default.

    Returns:
        What the file of the GPU holds from now on (machine, date, pairwise, and whatever else it
        held), with `search`, all that was tried, and `left_out`, the classes that were not reached.
    """
    on_gpu, until = device.type == "cuda", time.monotonic() + seconds
    classes = classes or (CLASSES if on_gpu else REHEARSED_CLASSES)
    grids = grids or (GRIDS if on_gpu else REHEARSED_GRIDS)
    result, entries, default = _in_use(device, folder or os.environ.get(tiles_of.FOLDER))
    result |= {"search": [], "left_out": []}
    known = {Class(**_of_lists(x["class"])): x for x in result.get("pairwise", [])}
    found: dict[Class, dict[str, Any]] = {}
    with ExitStack() as stack:
        examine = _nothing_compiled
        if on_gpu:
            examine = partial(stack.enter_context(compiler()).examine, until=until)
        for goal in bar(classes, "classes", len(classes), progress):
            if time.monotonic() >= until:
                result["left_out"].append(str(goal))
                continue
            start = tiles_of.choose(entries, default, goal.dtype, goal.positives, goal.logits)
            judge = Judge(draw(goal, device))
            searches = [Search(goal, side, device, judge, examine, until) for side in SIDES]
            entry = _entry(goal, start, searches, grids, known.get(goal.kind))
            result["search"] += [_taken_down(search, start) for search in searches]
            if any(side in entry["measured"] for side in SIDES):
                found[goal.kind] = entry
            else:
                result["left_out"].append(str(goal))
    result["pairwise"] = list((found | {k: x for k, x in known.items() if k not in found}).values())
    return result


def _in_use(
    device: torch.device, folder: str | None
) -> tuple[dict[str, Any], list[tuple[Class, Tiles]], Tiles]:
    """The content of the file of the sizes in use, its entries, and the default sizes."""
    machine = timing.machine(device)
    default = tiles_of.default_tiles()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        default = tiles_of.default_tiles(properties.warp_size, properties.major)
    path = tiles_of.find_file(machine["device"], folder)
    entries = [] if path is None else tiles_of.read_file(path, default)
    content = {} if path is None else json.loads(path.read_text())
    return content | {"machine": machine, "date": date.today().isoformat()}, entries, default


def _entry(
    goal: Goal,
    start: Tiles,
    searches: list[Search],
    grids: dict[str, tuple[Grid, ...]],
    known: dict[str, Any] | None,
) -> dict[str, Any]:
    """A class's entry of the file; what was measured earlier of a kernel not reached is kept."""
    measured = dict(known["measured"]) if known else {}
    measured |= {"positives": goal.positives, "logits": goal.logits}
    tiles = start
    for search in searches:
        tiles, now = search.run(tiles, grids[search.side])
        if now:
            measured[search.side] = now
    return {"class": goal.kind._asdict(), "tiles": tiles._asdict(), "measured": measured}


def _taken_down(search: Search, start: Tiles) -> dict[str, Any]:
    tried = [
        [x._asdict() | {"tiles": x.tiles._asdict(), "compiled": x.compiled and x.compiled._asdict()}
         for x in grid]
        for grid in search.tried
    ]  # fmt: skip
    return {"goal": str(search.goal), "side": search.side, "start": start._asdict(), "tried": tried}


def _nothing_compiled(tasks: list[Task]) -> list[Compiled | str | None]:
    """Under the interpreter there is no machine code to refuse."""
    return [None] * len(tasks)


def _of_lists(given: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}


# --- what is kept of it -------------------------------------------------------------------------


def write(result: dict[str, Any], folder: Path | str) -> list[Path]:
    """The file that the package reads, all that was tried, and a heat map of it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tiles_of.file_name(result["machine"]["device"])
    kept = {name: x for name, x in result.items() if name not in ("search", "left_out")}
    _replace(path, json.dumps(kept, indent=1))
    tried = path.with_suffix(".search.json")
    _replace(tried, json.dumps({"machine": result["machine"], "search": result["search"]}))
    tiles_of.forget()
    panels = heatmap.of_search(result["search"])
    return [path, tried, *heatmap.save(panels, path.with_suffix(".search.png"))]


def _replace(path: Path, text: str) -> None:
    """At once: a process that reads the file meanwhile finds the old one, or the new."""
    new = path.with_name(path.name + ".new")
    new.write_text(text + "\n")
    new.replace(path)


def gains(result: dict[str, Any]) -> dict[str, float]:
    """By class and kernel, the share of the time that was gained."""
    return {
        f"{_name(entry)}, {side}": entry["measured"][side]["gain"]
        for entry in result["pairwise"]
        for side in SIDES
        if "gain" in entry["measured"].get(side, {})
    }


def to_text(result: dict[str, Any]) -> str:
    """What was gained, class by class, and what was refused or not reached."""
    lines = []
    for entry in result["pairwise"]:
        measured = entry["measured"]
        lines.append(_name(entry))
        for side in SIDES:
            sizes = {n: x for n, x in entry["tiles"].items() if n.startswith(side)}
            if "gain" not in (now := measured.get(side, {})):
                lines.append(f"  {side:8} not measured, {_sizes(sizes)}")
                continue
            lines.append(
                f"  {side:8} {1e6 * now['seconds']:.0f} us, "
                f"{100 * now['gain']:.1f} % less than before, {_sizes(sizes)}"
            )
    for search in result["search"]:
        refused = [x for grid in search["tried"] for x in grid if x["refused"]]
        if wrong := [x for x in refused if x["refused"] != "spills registers"]:
            lines.append(f"{search['goal']}, {search['side']}: {len(wrong)} refused, such as")
            lines.append(f"  {_sizes(wrong[0]['tiles'])}: {wrong[0]['refused']}")
    if result["left_out"]:
        lines.append("no time left for: " + "; ".join(result["left_out"]))
    return "\n".join(lines)


def _name(entry: dict[str, Any]) -> str:
    kind = Class(**_of_lists(entry["class"]))
    return f"{kind.dtype}, P {_band(kind.positives)}, N {_band(kind.logits)}"


def _band(ends: tuple[int, int | None]) -> str:
    return f"from {ends[0]:,}" if ends[1] is None else f"{ends[0]:,} to {ends[1]:,}"


def _sizes(tiles: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in tiles.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=os.environ.get(tiles_of.FOLDER))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--dry-run", action="store_true", help="compile and rank, without a GPU")
    parser.add_argument("--target", default="sm_90", choices=LIMITS, help="of --dry-run")
    options = parser.parse_args(arguments)
    if options.out is None:
        parser.error(f"--out: say where to write, or set {tiles_of.FOLDER}")
    if options.dry_run:
        print("\n".join(map(str, dry_run.run(options.target, options.out))))
        return
    interpreted = bool(os.environ.get("TRITON_INTERPRET"))
    if not (torch.cuda.is_available() or interpreted):
        parser.error("no GPU here: --dry-run ranks by the machine code")
    device = torch.device("cpu" if interpreted else "cuda")
    result = tune(device, 60 * options.minutes, folder=str(options.out))
    print(to_text(result))
    print("\n".join(map(str, write(result, options.out))))


if __name__ == "__main__":
    main()
