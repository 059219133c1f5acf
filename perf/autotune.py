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
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    candidates,
)
from perf.machine_code import LIMITS, Compiled, Task, compiler
from perf.parity import Judge, draw
from perf.progress import bar

# (rounds, share of the candidates that go on): all of them shortly, few of them longer.
RACE = ((3, 0.25), (7, 0.0))
DUEL = 25  # rounds of the best candidate against the sizes in use

# A candidate has won a round if it took at most this share of the other's time: what is gained
# below that is not worth another variant of a kernel, and may come from the order in the round.
_WON = 0.99
_CHANCE = 0.01  # how often a candidate that is as good may replace what is in use


def better(candidate: Sequence[float], incumbent: Sequence[float]) -> bool:
    """Whether a candidate is faster beyond the noise: a sign test over the rounds of both.

    Of two calls equally fast each wins a round with probability 1/2 at most, however the noise is
    distributed and whatever disturbs both runs of a round. So many rounds won, or more, must then
    have a probability below `_CHANCE`: 19 of 25, or 7 of 7.
    """
    rounds = list(zip(candidate, incumbent, strict=True))
    won = sum(a <= _WON * b for a, b in rounds)
    as_many = sum(math.comb(len(rounds), k) for k in range(won, len(rounds) + 1))
    return as_many / 2 ** len(rounds) < _CHANCE


class Tried(NamedTuple):
    """What became of a candidate."""

    tiles: Tiles
    compiled: Compiled | None = None
    refused: str | None = None
    checked: bool = False  # not refused, but perhaps not reached
    seconds: float | None = None  # median of the last rounds it was in


class Search:
    """Looks for the best sizes of one kernel for one class, and takes down all that it tried."""

    def __init__(
        self,
        goal: Goal,
        side: str,
        device: torch.device,
        judge: Judge,
        examine: Callable[[list[Task]], list[Compiled | str | None]],
        until: float,
    ) -> None:
        self.goal, self.side, self.device, self.until = goal, side, device, until
        self.judge, self.examine = judge, examine
        self.tried: list[list[Tried]] = []  # of each grid
        self._start: Tiles | None = None  # sizes in use, which only a wrong result or time ousts
        self._calls: dict[Tiles, Callable[[], object]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, start: Tiles, grids: Sequence[Grid]) -> tuple[Tiles, dict[str, Any]]:
        """The sizes to use from now on, and what was measured of them.

        `start` stays unless another is better beyond the noise, or `start` itself is refused.
        """
        best = self._start = start
        for grid in grids:
            if self._time_is_left():
                best = self._best_of(candidates(best, grid))
        of_start = [x for grid in self.tried for x in grid if x.tiles == start]
        if any(x.refused for x in of_start):
            return best, {"refused before": of_start[0].refused}
        if best == start or not self._time_is_left():
            seconds = [x.seconds for x in of_start if x.seconds is not None]
            return start, {"seconds": seconds[-1], "gain": 0.0} if seconds else {}
        before, after = self._time([start, best], DUEL)
        if not better(after, before):
            return start, {"seconds": statistics.median(before), "gain": 0.0}
        gain = 1 - statistics.median(a / b for a, b in zip(after, before, strict=True))
        return best, {"seconds": statistics.median(after), "gain": gain}

    def _time_is_left(self) -> bool:
        return time.monotonic() < self.until

    def _best_of(self, found: list[Tiles]) -> Tiles:
        """The fastest of the sound candidates; the first if none is, or no time is left."""
        tried = {tiles: self._check(tiles, code) for tiles, code in self._compile(found)}
        sound = [x.tiles for x in tried.values() if x.checked and not x.refused]
        best, seconds = found[0], dict[Tiles, float]()
        if sound and self._time_is_left():
            best, seconds = self._race(sound)
        self.tried.append([x._replace(seconds=seconds.get(x.tiles)) for x in tried.values()])
        return best

    def _compile(self, found: list[Tiles]) -> Iterator[tuple[Tiles, Compiled | str | None]]:
        target = dry_run.target_of(self.device)
        tasks = [Task(self.side, str(self.goal.dtype).split(".")[1], x, target) for x in found]
        return zip(found, self.examine(tasks), strict=True)

    def _check(self, tiles: Tiles, code: Compiled | str | None) -> Tried:
        """Held to the reference; no candidate is timed before."""
        if isinstance(code, str):
            return Tried(tiles, refused=code)
        if code is not None and code.spills and tiles != self._start:
            return Tried(tiles, code, "spills registers")
        if not self._time_is_left():
            return Tried(tiles, code)
        try:
            refused = self.judge.refuses(self.side, tiles)
        except Exception as error:  # too much shared memory, say: it concerns this candidate only
            refused = f"does not run: {type(error).__name__}: {str(error)[:200]}"
        return Tried(tiles, code, refused, checked=True)

    def _race(self, sound: list[Tiles]) -> tuple[Tiles, dict[Tiles, float]]:
        """The fastest, and the median of each in the last rounds it was in."""
        seconds: dict[Tiles, float] = {}
        for rounds, share in RACE:
            times = self._time(sound, rounds)
            medians = {x: statistics.median(t) for x, t in zip(sound, times, strict=True)}
            seconds |= medians
            order = sorted(sound, key=medians.__getitem__)
            sound = order[: max(1, math.ceil(len(order) * share))]
        return sound[0], seconds

    def _time(self, found: list[Tiles], rounds: int) -> list[list[float]]:
        """Seconds of each, round by round, side by side."""
        calls = {str(number): self._call(tiles) for number, tiles in enumerate(found)}
        times = timing.interleave(calls, self.device, rounds, until=self.until)
        return list(times.values())

    def _call(self, tiles: Tiles) -> Callable[[], object]:
        """A run of a candidate, on a GPU as a CUDA graph: a small class would time the host.

        The graphs share their memory, as they run one after the other and nobody reads results.
        """
        if tiles not in self._calls:
            call = partial(getattr(self.judge.inputs, self.side), tiles)
            self._calls[tiles] = call if self._pool is None else _captured(call, self._pool)
        return self._calls[tiles]


def _captured(call: Callable[[], object], pool: Any) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay


# --- all classes --------------------------------------------------------------------------------


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
            judge = Judge(draw(goal.dtype, goal.positives, goal.logits, device, goal.stage))
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


def to_text(result: dict[str, Any]) -> str:
    """What was gained, class by class, and what was refused or not reached."""
    lines = []
    for entry in result["pairwise"]:
        measured, kind = entry["measured"], Class(**_of_lists(entry["class"]))
        lines.append(f"{kind.dtype}, P {_band(kind.positives)}, N {_band(kind.logits)}")
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
