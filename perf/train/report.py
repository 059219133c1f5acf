"""The table of a training comparison: a row per loss, mean and spread over seeds."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from ..tables import aligned, facts, machine, significant

MEASURES = ("AP", "AP50", "AP75", "AP90", "oLRP", "rho", "ms/it", "loss share")

NOTES = """\
AP as COCO defines it, in percent. oLRP: optimal LRP error at IoU 0.5, mean over classes, in
percent, lower is better. rho: Spearman's rank correlation of score and IoU over true positives (IoU
0.5), mean over classes. neg/pos: summed gradient magnitude by the logits of negatives over that of
positives, lowest to highest iteration. ms/it: median of forward, loss, backward and optimiser;
drawing the canvases is not counted. loss share: of these, the time in the loss, forward and
backward. +-: standard deviation over seeds.
"Focal" is torchvision's own loss. Learning rates and data were chosen after seeing results; seeds
differ by several AP, and which loss leads depends on --steps and --opt.
"""


@dataclass
class Result:
    """One evaluated run: `measures` by the names of MEASURES, missing ones left out."""

    title: str
    seed: int
    steps: int
    interrupted: bool
    measures: dict[str, float]
    ratio_range: tuple[float, float]


def table(results: list[Result]) -> str:
    """Make a Markdown table whose columns are aligned, so that it also reads well in a terminal."""
    rows = [["loss", *MEASURES[:6], "neg/pos", *MEASURES[6:]]]
    for title in dict.fromkeys(result.title for result in results):
        rows.append(_row([result for result in results if result.title == title]))
    return aligned(rows)


def save(results: list[Result], settings: dict, folder: Path) -> None:
    """Write results.json (everything) and results.md (the table and how to read it)."""
    runs = [{**vars(result), "measures": _finite(result.measures)} for result in results]
    document = {"settings": settings, "machine": machine(), "runs": runs}
    (folder / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    (folder / "results.md").write_text(f"{table(results)}\n\n{NOTES}\n{facts(settings)}\n")


def _finite(measures: dict[str, float]) -> dict[str, float | None]:
    """Return a number that JSON can hold: None for NaN and infinity."""
    return {name: value if math.isfinite(value) else None for name, value in measures.items()}


def _row(results: list[Result]) -> list[str]:
    cells = {
        name: _cell(name, [result.measures.get(name) for result in results]) for name in MEASURES
    }
    low = min(result.ratio_range[0] for result in results)
    high = max(result.ratio_range[1] for result in results)
    title = results[0].title
    stopped = [result.steps for result in results if result.interrupted]
    if stopped:
        title += f" (stopped at {stopped[0]})"
    values = [cells[name] for name in MEASURES]
    return [title, *values[:6], f"{significant(low)} to {significant(high)}", *values[6:]]


def _cell(name: str, values: list[float | None]) -> str:
    if any(value is None or not math.isfinite(value) for value in values):
        return "-"
    scale, digits = {"rho": (1, 2), "ms/it": (1, 0), "loss share": (100, 0)}.get(name, (100, 1))
    numbers = [scale * value for value in values]
    text = f"{statistics.fmean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" +- {statistics.stdev(numbers):.{digits}f}"
    return text + " %" * (name == "loss share")
