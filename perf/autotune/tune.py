"""The tuner that `python -m perf.autotune` starts: sizes class by class, then the costs.

The road, for each class of sizes and each kernel: candidates, a grid at a time -> compiled, those
that spill left out -> held to the reference, those that are wrong or differ from run to run left
out -> timed side by side in rounds, the better ones longer -> the best of all against the sizes in
use, in fresh rounds. Only a candidate that wins these beyond the noise replaces what was there.

Then calls of many sizes are timed with both algorithms, and the prices are fitted by which "auto"
chooses. They replace those in use unless they would lose more time at the calls just timed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alrp_triton.kernels.tuning import files
from alrp_triton.kernels.tuning.block_sizes import BreakpointTiles, Tiles, choose
from alrp_triton.kernels.tuning.costs import Costs, default_costs
from alrp_triton.kernels.tuning.files import Defaults, Tuned
from perf import timing
from perf.autotune import fit_costs, heatmap
from perf.autotune.candidates import (
    ALGORITHMS,
    DTYPE_OF,
    GOALS,
    GRIDS,
    REHEARSED_GOALS,
    REHEARSED_GRIDS,
    SIDES,
    Goal,
    Grids,
)
from perf.autotune.fit_costs import CALLS, REHEARSED_CALLS, Call, Timed
from perf.autotune.search import Search
from perf.autotune.verify import Verifier, draw
from perf.machine_code.occupancy import Compiled, Task, compiler
from perf.progress import bar

_FOR_COSTS = 0.3  # of the time
_BESIDE = (".search.json", ".search.png")  # suffixes of what is written beside it
_NOT_IN_THE_FILE = ("search", "fits", "left_out")


def tune(
    device: torch.device,
    seconds: float,
    goals: Sequence[Goal] | None = None,
    progress: bool = True,
    grids: Grids | None = None,
    folder: str | None = None,
    calls: Sequence[Call] | None = None,
) -> dict[str, Any]:
    """Tune class by class while there is time, then fit the costs.

    Args:
        device: the GPU; the CPU walks the same road in the interpreter, where a time means little.
        seconds: after which nothing more begins.
        goals: most important first; those of `perf.autotune.candidates` by default.
        progress: whether to show it.
        grids: of each kernel, one after the other; those of `perf.autotune.candidates` by default.
        folder: where the file of the sizes in use is looked for, before the package's own;
            $ALRP_TRITON_TILES by default.
        calls: that the costs are fitted to; those of `perf.autotune.fit_costs` by default.

    Returns:
        What the file of the GPU holds from now on (machine, date, pairwise, breakpoints, costs),
        with `search`, all sizes that were tried; `fits`, the times of calls and the prices fitted
        to them; and `left_out`, what was not reached.
    """
    on_gpu, begun = device.type == "cuda", time.monotonic()
    goals = (GOALS if on_gpu else REHEARSED_GOALS) if goals is None else goals
    calls = (CALLS if on_gpu else REHEARSED_CALLS) if calls is None else calls
    grids = grids or (GRIDS if on_gpu else REHEARSED_GRIDS)
    start = find_in_use(device, folder or os.environ.get(files.FOLDER))
    result = start.content | {"search": [], "fits": [], "left_out": []}
    shown = bar(goals, "classes", len(goals), progress)
    for_sizes = seconds * (1 - _FOR_COSTS) if calls else seconds
    _tune_sizes(result, start, device, shown, grids, begun + for_sizes)
    _fit_costs(result, start, device, calls, begun + seconds, progress)
    return result


class InUse(NamedTuple):
    """What has to be beaten: what the file of a GPU holds, or the defaults."""

    content: dict[str, Any]  # of the file, as it is, with the machine and the date of today
    tuned: Tuned
    defaults: Defaults

    def entry(self, goal: Goal) -> dict[str, Any] | None:
        """Return the entry of exactly this class, if the file has one."""
        found = self.content.get(goal.algorithm, [])
        return next((entry for entry in found if entry["class"] == _kind(goal)), None)


def find_in_use(device: torch.device, folder: Path | str | None) -> InUse:
    """Return what has to be beaten: what the device's file holds, or the package's own, or none.

    Raises:
        ValueError: if the file is not one of the tuner's.
    """
    machine = timing.machine(device)
    defaults = files.defaults_for(device, torch.float32)
    path = files.find_file(machine["device"], None if folder is None else str(folder))
    of_file = files.UNTUNED if path is None else files.read_file(path, defaults)
    content = {} if path is None else json.loads(path.read_text())
    content |= {"machine": machine, "date": date.today().isoformat()}
    return InUse(content, of_file, defaults)


def _tune_sizes(
    result: dict[str, Any],
    in_use: InUse,
    device: torch.device,
    goals: Iterable[Goal],
    grids: Grids,
    until: float,
) -> None:
    """Tune the classes that are reached, and put their entries before the others."""
    found: dict[str, list[dict[str, Any]]] = {algorithm: [] for algorithm in ALGORITHMS}
    with ExitStack() as stack:
        examine = _nothing_compiled
        if device.type == "cuda":
            examine = partial(stack.enter_context(compiler()).examine, until=until)
        for goal in goals:
            if time.monotonic() >= until:
                result["left_out"].append(str(goal))
                continue
            start = _tiles(in_use.tuned, in_use.defaults, goal.dtype, goal.positives, goal.logits)
            verifier = Verifier(draw(goal, device))
            searches = [Search(goal, side, device, verifier, examine, until) for side in SIDES]
            entry = _entry(goal, start[goal.algorithm], searches, grids, in_use.entry(goal))
            result["search"] += [_taken_down(x, start[goal.algorithm]) for x in searches]
            if any(side in entry["measured"] for side in SIDES):
                found[goal.algorithm].append(entry)
            else:
                result["left_out"].append(str(goal))
    for algorithm, entries in found.items():
        kinds = [entry["class"] for entry in entries]
        others = [x for x in result.get(algorithm, []) if x["class"] not in kinds]
        result[algorithm] = entries + others


def _tiles(
    of_file: Tuned, defaults: Defaults, dtype: torch.dtype, positives: int, logits: int
) -> dict[str, Tiles | BreakpointTiles]:
    """Return the sizes of both algorithms' kernels for a call."""
    return {
        algorithm: choose(
            getattr(of_file, algorithm), getattr(defaults, algorithm), dtype, positives, logits
        )
        for algorithm in ALGORITHMS
    }


def _entry(
    goal: Goal,
    start: Tiles | BreakpointTiles,
    searches: list[Search],
    grids: Grids,
    known: dict[str, Any] | None,
) -> dict[str, Any]:
    """Make a class's entry of the file; keep what was measured earlier of a kernel not reached."""
    measured = dict(known.get("measured", {})) if known else {}
    measured |= {"positives": goal.positives, "logits": goal.logits}
    tiles = start
    for search in searches:
        tiles, now = search.run(tiles, goal.grids(search.side, grids))
        if now:
            measured[search.side] = now
    return {"class": _kind(goal), "tiles": tiles._asdict(), "measured": measured}


def _kind(goal: Goal) -> dict[str, Any]:
    """Describe a class as it stands in a file."""
    dtype, positives, logits = goal.kind
    return {"dtype": dtype, "positives": list(positives), "logits": list(logits)}


def _fit_costs(
    result: dict[str, Any],
    in_use: InUse,
    device: torch.device,
    calls: Sequence[Call],
    until: float,
    progress: bool,
) -> None:
    """Time calls by the sizes just found, and put the prices of each class of dtypes."""
    of_file = {name: x for name, x in result.items() if name not in _NOT_IN_THE_FILE}
    now = files.parse(of_file, in_use.defaults)

    def tiles_of(call: Call) -> dict[str, Tiles | BreakpointTiles]:
        return _tiles(now, in_use.defaults, DTYPE_OF[call.dtype], call.positives, call.logits)

    times = fit_costs.time_calls(calls, tiles_of, device, until, progress)
    costs = result.setdefault("costs", {})
    for dtype in dict.fromkeys(call.dtype for call in calls):
        timed = [x for x in times if x.call.dtype == dtype]
        fitted = fit_costs.fit(timed)
        if fitted is None:
            result["left_out"].append(f"costs, {dtype}")
            continue
        before = in_use.tuned.costs.get(dtype) or default_costs(DTYPE_OF[dtype])
        measured, earlier = (fit_costs.quality(x, timed) for x in (fitted, before))
        taken = measured.lost <= earlier.lost
        fit = {"dtype": dtype, "taken": taken, "costs": _as_objects(fitted)}
        fit |= {"measured": measured._asdict(), "before": earlier._asdict()}
        result["fits"].append(fit | {"calls": [_of_call(x) for x in timed]})
        if taken:
            costs[dtype] = fit["costs"] | {"measured": fit["measured"]}


def _as_objects(costs: Costs) -> dict[str, Any]:
    return {algorithm: prices._asdict() for algorithm, prices in costs._asdict().items()}


def _of_call(timed: Timed) -> dict[str, Any]:
    return timed.call._asdict() | {"seconds": timed.seconds, "refused": timed.refused}


def _taken_down(search: Search, start: Tiles | BreakpointTiles) -> dict[str, Any]:
    tried = [
        [x._asdict() | {"tiles": x.tiles._asdict(), "compiled": x.compiled and x.compiled._asdict()}
         for x in grid]
        for grid in search.tried
    ]  # fmt: skip
    return {
        "goal": str(search.goal),
        "algorithm": search.goal.algorithm,
        "side": search.side,
        "start": start._asdict(),
        "tried": tried,
    }


def _nothing_compiled(tasks: list[Task]) -> list[Compiled | str | None]:
    """Return None for every task: under the interpreter there is no machine code to refuse."""
    return [None] * len(tasks)


# --- what is kept of it -------------------------------------------------------------------------


def written(device: torch.device) -> list[str]:
    """Name the files that `write` leaves."""
    path = Path(files.file_name(timing.machine(device)["device"]))
    return [str(path.with_suffix(suffix)) for suffix in (".json", *_BESIDE)]


def write(result: dict[str, Any], folder: Path | str) -> list[Path]:
    """Write the file that the package reads, all that was tried and timed, and a heat map of it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / files.file_name(result["machine"]["device"])
    kept = {name: x for name, x in result.items() if name not in _NOT_IN_THE_FILE}
    _replace(path, json.dumps(kept, indent=1))
    tried, picture = (path.with_suffix(suffix) for suffix in _BESIDE)
    shown = {name: result[name] for name in ("machine", "search", "fits")}
    _replace(tried, json.dumps(shown))
    files.forget()
    panels = heatmap.of_search(result["search"])
    return [path, tried, *heatmap.save(panels, picture)]


def _replace(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it meanwhile finds the old one, or the new."""
    new = path.with_name(path.name + ".new")
    new.write_text(text + "\n")
    new.replace(path)


def gains(result: dict[str, Any]) -> dict[str, float]:
    """Return the share of the time that was gained, by algorithm, class and kernel."""
    return {
        f"{algorithm}, {_name(entry)}, {side}": entry["measured"][side]["gain"]
        for algorithm, entry in _entries(result)
        for side in SIDES
        if "gain" in entry.get("measured", {}).get(side, {})
    }


def to_text(result: dict[str, Any]) -> str:
    """Tell what was gained, class by class, what was refused or not reached, and how costs fit."""
    lines = []
    for algorithm, entry in _entries(result):
        measured = entry.get("measured", {})
        lines.append(f"{algorithm}, {_name(entry)}")
        for side in SIDES:
            others = tuple(f"{other}_" for other in SIDES if other != side)
            sizes = {n: x for n, x in entry["tiles"].items() if not n.startswith(others)}
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
    lines += [line for fit in result["fits"] for line in _of_fit(fit)]
    if result["left_out"]:
        lines.append("no time left for: " + "; ".join(result["left_out"]))
    return "\n".join(lines)


def _entries(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (algorithm, entry) of all sizes."""
    for algorithm in ALGORITHMS:
        for entry in result[algorithm]:
            yield algorithm, entry


def _of_fit(fit: dict[str, Any]) -> Iterator[str]:
    new = "new costs" if fit["taken"] else "the costs stay, since those fitted lose more"
    yield f"{fit['dtype']}: {new}"
    worst = fit["measured"]["worst_ratio"]
    yield "  off by at most " + ", ".join(f"{x:.2f} times ({name})" for name, x in worst.items())
    for name, key in (("by the fit", "measured"), ("before", "before")):
        found = fit[key]
        lost, most = (100 * found[x] for x in ("lost", "most_lost"))
        yield (
            f"  {name}, the slower algorithm for {found['slower']} of {found['calls']} calls: "
            f"{lost:.1f} % lost in the mean, {most:.1f} % at most"
        )
    for call in fit["calls"]:
        for algorithm, why in call["refused"].items():
            yield f"  P = {call['positives']:,}, N = {call['logits']:,}: {algorithm} {why}"


def _name(entry: dict[str, Any]) -> str:
    dtype, positives, logits = (entry["class"][name] for name in ("dtype", "positives", "logits"))
    return f"{dtype}, P {_band(positives)}, N {_band(logits)}"


def _band(ends: Sequence[int | None]) -> str:
    return f"from {ends[0]:,}" if ends[1] is None else f"{ends[0]:,} to {ends[1]:,}"


def _sizes(tiles: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in tiles.items())
