"""Heat maps of the tuner: one panel for each kernel and class, over its two main sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The sizes that decide a kernel's inner loop: a block of positives, and rows of logits; the
# breakpoint kernels have rows alone, and the number of programs decides how long they stay.
AXES = {
    ("pairwise", "count"): ("count_block", "count_rows"),
    ("pairwise", "gradient"): ("gradient_fold", "gradient_rows"),
    ("breakpoints", "count"): ("programs", "count_rows"),
    ("breakpoints", "gradient"): ("lanes", "gradient_rows"),
}


class Panel(NamedTuple):
    """The best value at each pair of sizes; what is not there was refused or not reached."""

    title: str
    axes: tuple[str, str]
    cells: dict[tuple[int, int], float]
    tried: set[tuple[int, int]]
    marked: tuple[int, int]  # the sizes at the start
    form: str
    reverse: bool = False  # more is better


def of_search(searches: list[dict[str, Any]]) -> list[Panel]:
    """Make a panel of time over two sizes, relative to the best.

    There is one for each class and kernel that was reached.
    """
    panels = []
    for search in searches:
        rows = search["tried"][0] if search["tried"] else []
        least = min((x["seconds"] for x in rows if x["seconds"]), default=None)
        if least is None:
            continue
        relative = [(x["tiles"], x["seconds"] and x["seconds"] / least) for x in rows]
        title = f"{search['side']}, {search['goal']}\ntime / best ({1e6 * least:.0f} us)"
        axes = AXES[search["algorithm"], search["side"]]
        panels.append(_panel(title, axes, relative, search["start"], "{:.2f}"))
    return panels


def of_rankings(rankings: list[dict[str, Any]]) -> list[Panel]:
    """Make panels of instructions a pair or logit and of resident warps, by kernel and dtype."""
    panels = []
    for ranking in rankings:
        of_item = f"instructions a {ranking['item']}"
        name = f"{ranking['algorithm']} {ranking['kernel']}, {ranking['dtype']}"
        name += f", {ranking['target']}"
        sound = [x for x in ranking["candidates"] if not x["refused"]]
        for field, label in (("instructions", of_item), ("warps", "warps at once")):
            values = [(x["tiles"], x[field]) for x in sound]
            values += [(x["tiles"], None) for x in ranking["candidates"] if x["refused"]]
            form, more = ("{:.2f}", False) if field == "instructions" else ("{:.0f}", True)
            title = f"{name}\n{label}, best over the other sizes"
            axes = AXES[ranking["algorithm"], ranking["kernel"]]
            panels.append(_panel(title, axes, values, ranking["default"], form, more))
    return [panel for panel in panels if panel.cells]


def _panel(
    title: str,
    axes: tuple[str, str],
    values: Sequence[tuple[dict[str, int], float | None]],
    marked: dict[str, int],
    form: str,
    reverse: bool = False,
) -> Panel:
    first, second = axes
    cells: dict[tuple[int, int], float] = {}
    for tiles, value in values:
        if value is not None:
            at = tiles[first], tiles[second]
            cells[at] = (max if reverse else min)(value, cells.get(at, value))
    tried = {(tiles[first], tiles[second]) for tiles, _ in values}
    in_use = marked[first], marked[second]
    return Panel(title, axes, cells, tried, in_use, form, reverse)


def save(panels: list[Panel], path: Path) -> list[Path]:
    """Draw the panels and save them; skip it without matplotlib, or without anything to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    if not panels:
        return []
    columns = min(4, len(panels)) if len(panels) % 4 == 0 else min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle("Framed: the sizes at the start. x: refused or not reached", fontsize=9)
    figure.savefig(path, dpi=130)
    return [path]


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    from ..palette import VERMILION

    firsts, seconds = (sorted({at[axis] for at in panel.tried}) for axis in (0, 1))
    table = [[panel.cells.get((a, b), float("nan")) for b in seconds] for a in firsts]
    axes.imshow(table, cmap="viridis" if panel.reverse else "viridis_r", aspect="auto")
    for y, a in enumerate(firsts):
        for x, b in enumerate(seconds):
            value = panel.cells.get((a, b))
            text = "x" if value is None else panel.form.format(value)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.75}
            axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box)
            if (a, b) == panel.marked:
                place, size = (x - 0.47, y - 0.47), 0.94
                frame = Rectangle(place, size, size, fill=False, lw=3, edgecolor=VERMILION)
                axes.add_patch(frame)
    axes.set_xticks(range(len(seconds)), seconds)
    axes.set_yticks(range(len(firsts)), firsts)
    axes.set(xlabel=panel.axes[1], ylabel=panel.axes[0])
    axes.set_title(panel.title, fontsize=9)
