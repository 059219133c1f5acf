"""Looks for the best sizes of one kernel for one class: compiled, checked, timed, and decided.

Nothing is timed before its result was held to the reference, and nothing replaces the sizes in use
that is not better beyond the noise.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from alrp_triton.kernels.tuning.block_sizes import BreakpointTiles, Tiles
from perf import timing
from perf.autotune.candidates import Goal, Grid, candidates
from perf.autotune.verify import Verifier
from perf.machine_code.occupancy import Compiled, Task, target_of

# (rounds, share of the candidates that go on): all of them shortly, few of them longer.
RACE = ((3, 0.25), (7, 0.0))
DUEL = 25  # rounds of the best candidate against the sizes in use

# A candidate has won a round if it took at most this share of the other's time: what is gained
# below that is not worth another variant of a kernel, and may come from the order in the round.
_WON = 0.99
_CHANCE = 0.01  # how often a candidate that is as good may replace what is in use


def better(candidate: Sequence[float], incumbent: Sequence[float]) -> bool:
    """Return whether a candidate is faster beyond the noise: a sign test over the rounds of both.

    Of two calls equally fast each wins a round with probability 1/2 at most, however the noise is
    distributed and whatever disturbs both runs of a round. So many rounds won, or more, must then
    have a probability below `_CHANCE`: 19 of 25, or 7 of 7.
    """
    rounds = list(zip(candidate, incumbent, strict=True))
    won = sum(a <= _WON * b for a, b in rounds)
    as_many = sum(math.comb(len(rounds), k) for k in range(won, len(rounds) + 1))
    return as_many / 2 ** len(rounds) < _CHANCE


Sizes = Tiles | BreakpointTiles


class Tried(NamedTuple):
    """What became of a candidate."""

    tiles: Sizes
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
        verifier: Verifier,
        examine: Callable[[list[Task]], list[Compiled | str | None]],
        until: float,
    ) -> None:
        self.goal, self.side, self.device, self.until = goal, side, device, until
        self.verifier, self.examine = verifier, examine
        self.tried: list[list[Tried]] = []  # of each grid
        self._start: Sizes | None = None  # sizes in use, which only a wrong result or time ousts
        self._calls: dict[Sizes, Callable[[], object]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, start: Sizes, grids: Sequence[Grid]) -> tuple[Sizes, dict[str, Any]]:
        """Return the sizes to use from now on, and what was measured of them.

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

    def _best_of(self, found: list[Sizes]) -> Sizes:
        """Return the fastest of the sound candidates; the first if none is, or no time is left."""
        tried = {tiles: self._check(tiles, code) for tiles, code in self._compile(found)}
        sound = [x.tiles for x in tried.values() if x.checked and not x.refused]
        best, seconds = found[0], dict[Sizes, float]()
        if sound and self._time_is_left():
            best, seconds = self._race(sound)
        self.tried.append([x._replace(seconds=seconds.get(x.tiles)) for x in tried.values()])
        return best

    def _compile(self, found: list[Sizes]) -> Iterator[tuple[Sizes, Compiled | str | None]]:
        target = target_of(self.device)
        tasks = [Task(self.side, str(self.goal.dtype).split(".")[1], x, target) for x in found]
        return zip(found, self.examine(tasks), strict=True)

    def _check(self, tiles: Sizes, code: Compiled | str | None) -> Tried:
        """Hold a candidate to the reference, before which it is not timed."""
        if isinstance(code, str):
            return Tried(tiles, refused=code)
        if code is not None and code.spills and tiles != self._start:
            return Tried(tiles, code, "spills registers")
        if not self._time_is_left():
            return Tried(tiles, code)
        try:
            refused = self.verifier.refuses(self.side, tiles)
        except Exception as error:  # too much shared memory, say: it concerns this candidate only
            refused = f"does not run: {type(error).__name__}: {str(error)[:200]}"
        return Tried(tiles, code, refused, checked=True)

    def _race(self, sound: list[Sizes]) -> tuple[Sizes, dict[Sizes, float]]:
        """Return the fastest, and the median time of each in the last rounds that it was in."""
        seconds: dict[Sizes, float] = {}
        for rounds, share in RACE:
            times = self._time(sound, rounds)
            medians = {x: statistics.median(t) for x, t in zip(sound, times, strict=True)}
            seconds |= medians
            order = sorted(sound, key=medians.__getitem__)
            sound = order[: max(1, math.ceil(len(order) * share))]
        return sound[0], seconds

    def _time(self, found: list[Sizes], rounds: int) -> list[list[float]]:
        """Time every candidate side by side, round by round, and return the seconds of each."""
        calls = {str(number): self._call(tiles) for number, tiles in enumerate(found)}
        times = timing.interleave(calls, self.device, rounds, until=self.until)
        return list(times.values())

    def _call(self, tiles: Sizes) -> Callable[[], object]:
        """Return a run of a candidate, on a GPU as a CUDA graph: a small class would time the host.

        The graphs share their memory, as they run one after the other and nobody reads results.
        """
        if tiles not in self._calls:
            call = partial(self.verifier.call, self.side, tiles)
            self._calls[tiles] = call if self._pool is None else captured(call, self._pool)
        return self._calls[tiles]


def captured(call: Callable[[], object], pool: Any) -> Callable[[], object]:
    """Capture a call in a CUDA graph and return its replay; the graphs of a pool share memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay
