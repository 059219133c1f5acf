"""What the package has to reach, and what the rows of a benchmark say of it, missed goals and all.

A goal is held in every cell of its kind, and the worst of them is what is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from alrp_triton.testing.workloads import DISTRIBUTIONS, Cell

from .variants import OURS

Row = dict[str, Any]

_MOST_GROWTH = 2.0
_LEAST_SHARE = 0.5  # of the memory-traffic floor
MOST_MEMORY = 0.02, 32 << 20  # beyond logits and gradient: share of the logits, and bytes
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Rival(NamedTuple):
    """A variant to be faster than, in float32."""

    variant: str
    times: float | None  # None: nothing is promised
    distributions: tuple[str, ...] = tuple(DISTRIBUTIONS)

    def __str__(self) -> str:
        everywhere = len(self.distributions) == len(DISTRIBUTIONS)
        return self.variant + ("" if everywhere else f" ({', '.join(self.distributions)})")


class Standard(NamedTuple):
    """Where goals are held, in every distribution, and how many times faster than others to be."""

    logits: int
    positives: int
    few: int  # positives; with `many` of them a call should take little longer
    many: int
    rivals: tuple[Rival, ...]
    on_a_gpu: bool  # where memory traffic is what binds, and what is allocated is known


_ON_A_GPU = (
    Rival("focal, fused", 1.0),
    Rival("focal, torchvision", 4.0),
    Rival("published loop", 1000.0),
    Rival("sort and bucket", 20.0),
    Rival("sort and bucket, filtered", None),
)
_ON_A_CPU = (
    Rival("published loop", 5.0),
    Rival("sort and bucket", 3.0),
    Rival("sort and bucket, filtered", None),
    # What was published could be made better: where nothing can be filtered we lead all the same.
    Rival("sort and bucket, filtered", 3.0, ("init", "spread")),
)
# By the name of the cells.
STANDARDS = {
    "cpu": Standard(2_000_000, 500, 500, 50_000, _ON_A_CPU, False),
    "gpu": Standard(20_951_040, 1000, 500, 50_000, _ON_A_GPU, True),
    "rehearse": Standard(8000, 10, 1, 40, _ON_A_GPU, True),
}


class Figure(NamedTuple):
    """What one cell says of a goal."""

    found: float
    cell: str


class Goal(NamedTuple):
    """What is to be reached, and the figure of each cell where it was measured."""

    what: str
    figures: Iterator[Figure]
    bound: float | None  # None: nothing is promised
    at_least: bool = False  # the bound is; else at most


def verify(rows: Sequence[Row], standard: Standard) -> list[dict[str, Any]]:
    """Verify each goal of which something was measured, by the worst that was found."""
    judged = []
    for what, figures, bound, at_least in _goals(rows, standard):
        if found := list(figures):
            worst, cell = (min if at_least else max)(found)
            row = {"what": what, "bound": bound, "at_least": at_least, "reached": None}
            if bound is not None:
                row["reached"] = worst >= bound if at_least else worst <= bound
            judged.append(row | {"found": worst, "cell": cell, "cells": len(found)})
    return judged


def missed(goals: Sequence[Row]) -> list[str]:
    """List the goals that were not reached, a line each."""
    return [
        f"{goal['what']}: {goal['found']:.3g}, to reach "
        f"{'at least' if goal['at_least'] else 'at most'} {goal['bound']:g} ({goal['cell']})"
        for goal in goals
        if goal["reached"] is False
    ]


def _goals(rows: Sequence[Row], standard: Standard) -> Iterator[Goal]:
    ours = [row for row in rows if row["variant"] == OURS and row["seconds"] is not None]
    usual = [row for row in ours if _is_of(row, standard)]
    for rival in standard.rivals:
        theirs = [row for row in rows if row["variant"] == rival.variant and _is_of(row, standard)]
        figures = [
            Figure(row["ratio"], name_of(row))
            for row in theirs
            if row["ratio"] is not None
            and row["dtype"] == "float32"
            and row["distribution"] in rival.distributions
        ]
        what = f"times faster than {rival}, float32"
        yield Goal(what, iter(figures), rival.times, at_least=True)
    dtypes = dict.fromkeys(row["dtype"] for row in ours)
    if standard.on_a_gpu:
        for dtype in dtypes:
            shares = [Figure(row["share"], name_of(row)) for row in usual if row["dtype"] == dtype]
            what = f"share of the memory-traffic floor, {dtype}"
            yield Goal(what, iter(shares), _LEAST_SHARE, at_least=True)
        yield Goal("peak memory over 2 % of the logits and 32 MB", _memory(ours), 1.0)
    for dtype in dtypes:
        what = f"time at P = {standard.many:,} over that at P = {standard.few:,}, {dtype}"
        yield Goal(what, _growth(ours, standard, dtype), _MOST_GROWTH)
    yield Goal("time over that of the faster algorithm of both", _chosen(rows), None)


def _is_of(row: Row, standard: Standard) -> bool:
    return (row["N"], row["P"]) == (standard.logits, standard.positives)


def _growth(ours: Sequence[Row], standard: Standard, dtype: str) -> Iterator[Figure]:
    seconds = {
        (row["distribution"], row["delta"], row["P"]): row
        for row in ours
        if row["N"] == standard.logits and row["dtype"] == dtype
    }
    for (distribution, delta, positives), row in seconds.items():
        few = seconds.get((distribution, delta, standard.few))
        if positives == standard.many and few is not None:
            yield Figure(row["seconds"] / few["seconds"], name_of(row))


def _memory(ours: Sequence[Row]) -> Iterator[Figure]:
    share, constant = MOST_MEMORY
    for row in ours:
        if row["extra_bytes"] is not None:
            allowed = share * row["N"] * _BYTES[row["dtype"]] + constant
            yield Figure(row["extra_bytes"] / allowed, name_of(row))


def _chosen(rows: Sequence[Row]) -> Iterator[Figure]:
    for cell, seconds in compared(rows):
        if OURS in seconds:
            faster = min(x for variant, x in seconds.items() if variant != OURS)
            yield Figure(seconds[OURS] / faster, cell)


def compared(rows: Sequence[Row]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the cells in which a backend was timed with both algorithms.

    Each comes with the seconds of both, and of ours.
    """
    cells: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["seconds"] is not None:
            cells.setdefault(name_of(row), {})[row["variant"]] = row["seconds"]
    for name, seconds in cells.items():
        for backend in ("triton", "torch"):
            both = [f"{algorithm}, {backend}" for algorithm in ("pairwise", "breakpoints")]
            if all(variant in seconds for variant in both):
                shown = [*both, OURS]
                yield name, {x: seconds[x] for x in shown if x in seconds}
                break  # ours runs in the first of them that can


def name_of(row: Row) -> str:
    """Name the cell of a row."""
    return str(Cell(row["N"], row["P"], row["distribution"], row["dtype"], row["delta"]))
