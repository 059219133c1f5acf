"""What the algorithms cost on a GPU: calls of many sizes timed with both, and prices fitted.

The rule that chooses by the prices is the package's (`Costs.choose`), and so are the terms that are
priced. Nothing is timed before its result was held to the reference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import torch

from alrp_triton.kernels.tuning.block_sizes import DTYPES, BreakpointTiles, Tiles
from alrp_triton.kernels.tuning.costs import BreakpointCosts, Costs, PairwiseCosts
from perf import timing
from perf.autotune.candidates import ALGORITHMS, DTYPE_OF, SIDES
from perf.autotune.search import captured
from perf.autotune.verify import Verifier, draw_call
from perf.progress import bar

_ROUNDS = {"cuda": 7, "cpu": 1}
# Beyond so many pairs nobody asks which algorithm is faster, and one run takes long.
_MOST_PAIRS = 3e11


class Call(NamedTuple):
    """A size at which both algorithms are timed."""

    dtype: str  # a class of dtypes
    positives: int
    logits: int
    stage: str = "mid"  # of a training: where most of it is spent


class Timed(NamedTuple):
    """A call's seconds of a forward and backward by each algorithm; what was refused has none."""

    call: Call
    seconds: dict[str, float]
    refused: dict[str, str]


# A call of each end comes first, so that whatever is cut leaves the prices known; then what lies
# about the crossover, which moves to more positives where there are fewer logits.
_LARGE, _MIDDLE, _SMALL = 20_950_000, 1_000_000, 48_000
_SIZES = (
    *((10, _LARGE), (1000, _LARGE), (10, _SMALL), (1000, _SMALL), (10_000, _MIDDLE)),
    *((100, _MIDDLE), (1000, _MIDDLE), (30, _LARGE), (100, _LARGE), (300, _LARGE)),
    *((300, _MIDDLE), (3000, _MIDDLE), (300, _SMALL), (5000, _SMALL)),
    *((10_000, _LARGE), (50_000, _LARGE)),
)
CALLS = tuple(Call(dtype, *size) for size, dtype in product(_SIZES, DTYPES))

# For the interpreter: no more than the fit needs.
REHEARSED_CALLS = tuple(
    Call("float32", *size, "spread") for size in ((3, 40), (9, 40), (3, 200), (9, 120))
)

TilesOf = Callable[[Call], dict[str, Tiles | BreakpointTiles]]


def time_calls(
    calls: Sequence[Call],
    tiles_of: TilesOf,
    device: torch.device,
    until: float,
    progress: bool = True,
) -> list[Timed]:
    """Time calls while there is time; on a GPU as graphs, since a small call would time the host.

    Args:
        calls: the most important first; those that differ in dtype alone follow each other.
        tiles_of: the sizes of both algorithms' kernels for a call.
        device: where it runs.
        until: time.monotonic() from which on no further call begins.
        progress: whether to show it.
    """
    found = []
    for call in bar(calls, "costs", len(calls), progress):
        if time.monotonic() >= until:
            break
        found.append(_time(call, tiles_of(call), device, until))
    return found


def _time(
    call: Call,
    tiles_of: dict[str, Tiles | BreakpointTiles],
    device: torch.device,
    until: float,
) -> Timed:
    dtype = DTYPE_OF[call.dtype]
    verifier = Verifier(draw_call(call.positives, call.logits, call.stage, dtype, device))
    refused, runs = {}, {}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for algorithm, tiles in tiles_of.items():
        if algorithm == "pairwise" and call.positives * call.logits > _MOST_PAIRS:
            continue
        reasons = [verifier.refuses(side, tiles) for side in SIDES]
        if any(reasons):
            refused[algorithm] = next(filter(None, reasons))
            continue
        run = partial(_forward_backward, verifier, tiles)
        runs[algorithm] = run if pool is None else captured(run, pool)
    seconds = timing.interleave(runs, device, _ROUNDS[device.type], until=until)
    return Timed(call, {name: statistics.median(x) for name, x in seconds.items()}, refused)


def _forward_backward(verifier: Verifier, tiles: Tiles | BreakpointTiles) -> None:
    for side in SIDES:
        verifier.call(side, tiles)


# --- the fit ------------------------------------------------------------------------------------


def fit(timed: Sequence[Timed]) -> Costs | None:
    """Fit the prices that explain times best; return None if there are fewer times than prices."""
    pairwise = _fit("pairwise", PairwiseCosts.terms, timed)
    breakpoints = _fit("breakpoints", BreakpointCosts.terms, timed)
    if pairwise is None or breakpoints is None:
        return None
    return Costs(PairwiseCosts(*pairwise), BreakpointCosts(*breakpoints))


def _fit(
    algorithm: str, terms_of: Callable[[int, int], tuple[int, ...]], timed: Sequence[Timed]
) -> list[float] | None:
    known = [x for x in timed if algorithm in x.seconds]
    terms = np.array([terms_of(x.call.positives, x.call.logits) for x in known], float)
    if not known or len(known) < terms.shape[1]:
        return None
    return least_squares(terms, np.array([x.seconds[algorithm] for x in known])).tolist()


def least_squares(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Fit prices, none below 0, of terms (calls, terms): least squares of the relative errors.

    Relative, because a microsecond matters where a call takes ten. Where the prices are that are
    not 0, they are the best of these terms without any constraint; so every choice of terms is
    tried, of which there are few.
    """
    shares = terms / seconds[:, None]  # of the measured time, at a price of 1
    scale = np.linalg.norm(shares, axis=0)
    shares, ones = shares / scale, np.ones(len(seconds))
    number = terms.shape[1]
    best, least = np.zeros(number), np.inf
    for size in range(1, number + 1):
        for chosen in map(list, combinations(range(number), size)):
            prices = np.linalg.lstsq(shares[:, chosen], ones, rcond=None)[0]
            error = np.linalg.norm(shares[:, chosen] @ prices - ones)
            if (prices >= 0).all() and error < least:
                best, least = np.zeros(number), error
                best[chosen] = prices / scale[chosen]
    return best


class Quality(NamedTuple):
    """How well prices explain times, and what is lost by choosing by them, at the calls timed."""

    worst_ratio: dict[str, float]  # by algorithm: of the time to what is predicted, or inversely
    calls: int  # that were timed with both
    slower: int  # of these, how many the rule gives to the slower algorithm
    lost: float  # the share of the faster one's time that this adds, in the mean over all calls
    most_lost: float


def quality(costs: Costs, timed: Sequence[Timed]) -> Quality:
    """Measure how well prices explain the calls timed, and what is lost by choosing by them."""
    worst = {}
    for algorithm in ALGORITHMS:
        ratios = [
            getattr(costs, algorithm).seconds(x.call.positives, x.call.logits)
            / x.seconds[algorithm]
            for x in timed
            if algorithm in x.seconds
        ]
        worst[algorithm] = max((max(x, 1 / x) if x else np.inf for x in ratios), default=1.0)
    both = [x for x in timed if len(x.seconds) == len(ALGORITHMS)]
    lost = [
        x.seconds[costs.choose(x.call.positives, x.call.logits)] / min(x.seconds.values()) - 1
        for x in both
    ]
    return Quality(
        worst_ratio=worst,
        calls=len(both),
        slower=sum(x > 0 for x in lost),
        lost=statistics.fmean(lost) if lost else 0.0,
        most_lost=max(lost, default=0.0),
    )
