"""What a benchmark found: as JSON, as Markdown tables, and as a picture of time against P and N."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .targets import compared
from .variants import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

_COLUMNS = (
    "distribution",
    "N",
    "P",
    "variant",
    "ms",
    "least to most",
    f"its time / {OURS}'s",
    "share of the floor",
    "extra MB",
    "error of the gradient",
    "of the value",
)

SUFFIXES = ("json", "md", "png")  # of what is written

_GOAL_COLUMNS = ("what", "to reach", "found", "reached", "where")

_HOST_COLUMNS = (
    "variant",
    "us of the host",
    "least",
    "its time / fused focal's",
    "operations of the device",
    "allocations",
    "waits",
)

_HOST_NOTE = (
    "Forward + backward of a small call on a runtime whose kernels do nothing: Python, torch and "
    "Triton's\nlauncher are real, the driver's share is missing. No time of a GPU; only the ratio "
    "means anything.\n"
)

_NOTES = f"""\
Each row is forward + backward of one call. ms: median of the runs, which are interleaved with those
of the other variants; a variant whose gradient or value is not the reference's gets no time. its
time / {OURS}'s: median over the rounds that both ran in; below 1 it is faster than this package.
Share of the floor: the time of the least memory traffic (two reads of the logits, one write of the
gradient) at the bandwidth of a copy, over the median. Extra MB: peak memory beyond what was there
before the call and the gradient itself; on a CPU the growth of the process. Freed memory: whether
the process keeps it between calls, as a GPU's allocator does. Errors: largest deviation of the
gradient from float64, over the largest gradient, and that of the value, over it or over 1. The
focal losses rank nothing; they are held to their own formula. Sort-and-bucket is exact for
delta = 0 and an approximation otherwise: where that shows in its error, it gets no time.
"""


def write(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, NAME.png; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in SUFFIXES]
    try:
        picture(report).savefig(paths[2], dpi=150)
    except ImportError:
        paths.pop()
        why = "matplotlib is not installed"
        report["dropped"].append({"variant": "the picture", "why": why, "cells": []})
    paths[0].write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    paths[1].write_text(to_markdown(report))
    return paths


def to_markdown(report: dict[str, Any]) -> str:
    """Format the goals, a table for each dtype and delta with the losing rows too, and the rest."""
    facts = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    parts = [f"{facts}; a copy moves {report['bandwidth'] / 1e9:.3g} GB/s\n"]
    call = report.get("retinanet")
    if call:
        parts.append(_describe(call))
    if goals := report.get("goals"):
        parts.append(f"## To be reached\n\n{_table(_GOAL_COLUMNS, map(_goal_cells, goals))}\n")
    for dtype, delta in dict.fromkeys((row["dtype"], row["delta"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["dtype"], row["delta"]) == (dtype, delta)]
        parts.append(f"## {dtype}, delta = {delta:g}\n\n{_table(_COLUMNS, map(_cells, rows))}\n")
    if algorithms := [*compared(report["rows"])]:
        parts.append(f"## Pairwise against breakpoints\n\n{_both_algorithms(algorithms)}\n")
    if host := report.get("host"):
        parts.append(f"## Host time on a runtime whose kernels do nothing\n\n{_host(host)}\n")
    if report["dropped"]:
        left_out = "\n".join(map(_say_dropped, report["dropped"]))
        parts.append(f"## Left out\n\n{left_out}\n")
    parts.append(_NOTES)
    return "\n".join(parts)


def _describe(call: dict[str, Any]) -> str:
    extra = call["forward_extra_share"]
    share = "an unknown share" if extra is None else f"{extra:.2f}"
    return (
        f"RetinaNet at 512 px, {call['boxes']} boxes: N = {call['N']:,}, P = {call['P']}, "
        f"{call['ignored']:,} ignored: forward {1e3 * call['forward_s']:.3g} ms, with backward "
        f"{1e3 * call['forward_backward_s']:.3g} ms; beyond the logits, forward takes {share} of "
        "their memory\n"
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _both_algorithms(cells: list[tuple[str, dict[str, float]]]) -> str:
    """Make a table of the milliseconds of both, and of what was chosen, cell by cell."""
    columns = list(dict.fromkeys(variant for _, seconds in cells for variant in seconds))
    rows = [
        (cell, *(f"{1e3 * seconds[x]:.3g}" if x in seconds else "-" for x in columns))
        for cell, seconds in cells
    ]
    return _table(("cell", *(f"{name}, ms" for name in columns)), rows)


def _host(host: dict[str, Any]) -> str:
    if "why" in host:
        return f"Not measured: {host['why']}"
    rows = [
        (
            row["variant"],
            f"{row['microseconds']:.0f}",
            f"{row['least_microseconds']:.0f}",
            f"{row['times_focal']:.3g}",
            str(row["operations"]),
            str(row["allocations"]),
            str(row["synchronisations"]),
        )
        for row in host["rows"]
    ]
    return f"{_HOST_NOTE}\n{_table(_HOST_COLUMNS, rows)}"


def _goal_cells(goal: dict[str, Any]) -> tuple[str, ...]:
    bound, reached = "-", "-"
    if goal["bound"] is not None:
        bound = f"at {'least' if goal['at_least'] else 'most'} {goal['bound']:g}"
        reached = "yes" if goal["reached"] else "no"
    where = f"{goal['cell']} (worst of {goal['cells']})"
    return goal["what"], bound, f"{goal['found']:.3g}", reached, where


def _cells(row: Row) -> tuple[str, ...]:
    timed: tuple[str, ...] = ("not the reference's", "-", "-", "-", "-")
    if row["parity"]:
        extra = row["extra_bytes"]
        timed = (
            f"{row['seconds'] * 1e3:.3g}",
            f"{row['least'] * 1e3:.3g} to {row['most'] * 1e3:.3g}",
            "-" if row["ratio"] is None else f"{row['ratio']:.3g}",
            f"{row['share']:.1%}",
            "-" if extra is None else f"{extra / 1e6:.3g}",
        )
    errors = (
        "NaN" if row[column] is None else f"{row[column]:.0e}"
        for column in ("error", "value_error")
    )
    return (
        row["distribution"],
        f"{row['N']:,}",
        f"{row['P']:,}",
        row["variant"],
        *timed,
        *errors,
    )


def _say_dropped(left_out: dict[str, Any]) -> str:
    cells = left_out["cells"]
    where = f" ({cells[0]})" if cells else ""
    more = f" and {len(cells) - 1} cells more" if len(cells) > 1 else ""
    return f"- {left_out['variant']}: {left_out['why']}{where}{more}"


def picture(report: dict[str, Any]) -> Figure:
    """Draw time against P at the N with most of them, and against N likewise, with the floor."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["distribution"] == "mid" and row["parity"]]
    rows = [row for row in rows if row["dtype"] == "float32"]
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, x, fixed in zip(figure.subplots(1, 2), "PN", "NP", strict=True):
        value = _most_common(rows, fixed)
        _draw(axes, [row for row in rows if row[fixed] == value], x)
        label = {"P": "positives P", "N": "logits N"}[x]
        axes.set(xlabel=label, ylabel="ms, forward + backward", xscale="log", yscale="log")
        axes.set_title("nothing measured" if value is None else f"{fixed} = {value:,}")
        axes.grid(alpha=0.3)
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(list(lines.values()), list(lines), loc="outside right center", fontsize="small")
    about = report["machine"]
    figure.suptitle(
        f"{about['device']}, CPU threads: {about['threads']}, torch {about['torch']}; "
        "float32 logits in the middle of a training"
    )
    return figure


def _most_common(rows: list[Row], key: str) -> int | None:
    """Return the value of `key` under which there are most different cells."""
    other = {"N": "P", "P": "N"}[key]
    values = Counter(value for value, _ in {(row[key], row[other]) for row in rows})
    return values.most_common(1)[0][0] if values else None


def _styles() -> dict[str, tuple[str, str, str]]:
    """Return colour, line and marker of each variant, in the order of the legend."""
    from ..palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

    return {
        OURS: (BLUE, "-", "o"),
        "pairwise, triton": (SKY, "-", "s"),
        "breakpoints, triton": (SKY, "-", "D"),
        "pairwise, torch": (SKY, ":", "s"),
        "breakpoints, torch": (SKY, ":", "D"),
        "published loop": (VERMILION, "-", "^"),
        "sort and bucket": (PURPLE, "-", "v"),
        "sort and bucket, filtered": (PURPLE, ":", "v"),
        "focal, torchvision": (ORANGE, "-", "x"),
        "focal, fused": (GREEN, "-", "+"),
        "": (BLACK, "-", "*"),  # any other
    }


def _draw(axes: Axes, rows: list[Row], x: str) -> None:
    """Draw a line for each variant with its range, then the floor."""
    for variant, delta in _series(rows):
        line = [row for row in rows if (row["variant"], row["delta"]) == (variant, delta)]
        line.sort(key=lambda row: row[x])
        places = [row[x] for row in line]
        median, least, most = (
            [1e3 * row[column] for row in line] for column in ("seconds", "least", "most")
        )
        styles = _styles()
        color, style, marker = styles.get(variant, styles[""])
        axes.plot(
            places,
            median,
            linestyle="--" if variant == OURS and delta == 0 else style,
            marker=marker,
            color=color,
            linewidth=2.5 if variant == OURS else 1.3,
            zorder=3 if variant == OURS else 2,
            label=variant if delta else f"{variant} (delta = 0)",
        )
        axes.fill_between(places, least, most, color=color, alpha=0.12, linewidth=0)
    floor = sorted({(row[x], 1e3 * row["floor"]) for row in rows})
    if floor:
        axes.plot(*zip(*floor, strict=True), "--", color="gray", label="memory-traffic floor")


def _series(rows: list[Row]) -> list[tuple[str, float]]:
    """Return what gets a line, as (variant, delta), in the order of `_styles`.

    Under the soft step, but for what is right under the hard one only; then this package stands
    beside it a second time.
    """
    most = {}
    for variant in {row["variant"] for row in rows}:
        deltas = Counter(row["delta"] for row in rows if row["variant"] == variant)
        most[variant] = max(deltas, key=lambda delta: (deltas[delta], delta))
    series = set(most.items())
    if 0 in most.values() and any(row["variant"] == OURS and row["delta"] == 0 for row in rows):
        series.add((OURS, 0.0))
    order = [*_styles()]
    return sorted(
        series,
        key=lambda one: (order.index(one[0]) if one[0] in order else len(order), one[0], -one[1]),
    )
