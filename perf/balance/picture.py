"""The picture of `python -m perf.balance`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.tables import significant

from ..palette import BLACK, BLUE, SKY, VERMILION
from ..train.plots import _smooth


def save_balance(ratios: dict[str, np.ndarray], losses: dict[str, np.ndarray], path: Path) -> None:
    """Draw Fig. 4 of the paper, a row per loss: who pulls harder in each iteration, and the loss.

    Args:
        ratios: by title, (iterations,) gradient magnitudes of negatives over positives.
        losses: by title, (iterations,) classification loss.
        path: of the picture.
    """
    figure = Figure(figsize=(12, 2.4 * len(ratios) + 0.8), layout="constrained")
    grid = figure.subplots(len(ratios), 2, sharex=True, squeeze=False, width_ratios=(1.6, 1))
    for (pull, level), (title, ratio) in zip(grid, ratios.items(), strict=True):
        pull.sharey(grid[0, 0])  # the ratios compare, the levels of the losses do not
        _draw_pull(pull, ratio)
        least, greatest = significant(ratio.min()), significant(ratio.max())
        pull.set_title(f"{title}: negatives / positives from {least} to {greatest}", loc="left")
        _draw_loss(level, losses[title])
        level.set_title(f"{title}: classification loss", loc="left")
    for text, color, side in (("negatives", BLUE, 1), ("positives", VERMILION, -1)):
        _beside_one(grid[0, 0], f"{text} pull harder", color, side)
    for axes in grid[-1]:
        axes.set_xlabel("iteration")
    figure.savefig(path, dpi=150)


def _draw_pull(axes: Axes, ratio: np.ndarray) -> None:
    """Draw the ratio on a log axis; fill from it to 1 in the colour of who pulls harder."""
    iterations = np.arange(1, len(ratio) + 1)
    for bound, color in ((np.maximum, BLUE), (np.minimum, VERMILION)):
        axes.fill_between(iterations, 1, bound(ratio, 1), color=color, alpha=0.55, linewidth=0)
    axes.plot(iterations, ratio, color=BLACK, linewidth=0.7)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("ratio of summed\n|dL/ds| (log scale)")
    axes.grid(alpha=0.3)


def _beside_one(axes: Axes, text: str, color: str, side: int) -> None:
    """Write text at the right, over (`side` 1) or under (-1) the level at which the ratio is 1."""
    axes.annotate(
        text, (0.99, 1), xycoords=axes.get_yaxis_transform(), xytext=(0, 26 * side),
        textcoords="offset points", color=color, horizontalalignment="right",
        verticalalignment="center",
    )  # fmt: skip


def _draw_loss(axes: Axes, loss: np.ndarray) -> None:
    """Draw every iteration thinly, and means over a fiftieth of them."""
    axes.plot(np.arange(1, len(loss) + 1), loss, color=SKY, linewidth=0.8)
    axes.plot(*_smooth(loss, max(len(loss) // 50, 1)), color=BLACK, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
