"""Pictures of trainings: curves over iterations, balance, detections beside ground truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION


def save_curves(alrp: np.ndarray | None, ratios: dict[str, np.ndarray], path: Path) -> None:
    """Draw the aLRP Loss and its parts (Fig. 3 of the paper), and the balance (Fig. 4, left).

    Args:
        alrp: (iterations, 3) with cls, loc and the self-balancing weight; None leaves Fig. 3 out.
        ratios: by title, (iterations,) gradient magnitudes of negatives over positives.
        path: of the picture.
    """
    panels = 1 if alrp is None else 2
    figure = Figure(figsize=(6.2 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if alrp is not None:
        _draw_alrp(axes[0], alrp)
    _draw_ratios(axes[-1], ratios)
    figure.savefig(path, dpi=150)


def _draw_alrp(axes: Axes, alrp: np.ndarray) -> None:
    cls, loc, weight = alrp.T
    total = cls + loc
    window = max(len(total) // 100, 1)  # iterations averaged for a point
    curves = [
        (total, "aLRP", BLACK, "-"),
        (cls, "aLRP cls", BLUE, "-"),
        (loc, "aLRP loc", VERMILION, "-"),
        (weight * loc, "weight * aLRP loc (self-balanced)", ORANGE, "--"),
    ]
    for values, label, color, style in curves:
        axes.plot(*_smooth(values, window), style, color=color, label=label)
    axes.set(title="aLRP Loss and its parts", xlabel="iteration", ylabel="loss")
    # The weight of an early period, when the losses still change fast, can overshoot.
    axes.set_ylim(0, 1.75 * total.max())
    right = axes.twinx()
    right.plot(
        *_smooth(total / loc, window), ":", color=GREEN, label="aLRP / aLRP loc (right axis)"
    )
    right.set_yscale("log")
    right.set_ylabel("aLRP / aLRP loc (log scale)")
    handles = [*axes.get_lines(), *right.get_lines()]
    axes.legend(handles=handles, fontsize="small", ncols=2, loc="upper right", framealpha=1)


def _draw_ratios(axes: Axes, ratios: dict[str, np.ndarray]) -> None:
    # aLRP's and AP's lines coincide at 1: a broad one under a dashed one shows both.
    styles = [(BLUE, "-", 3.5), (ORANGE, "--", 1.8)]
    styles += [(color, "-", 0.8) for color in (VERMILION, GREEN, PURPLE)]
    for order, ((title, ratio), (color, style, width)) in enumerate(
        zip(ratios.items(), styles, strict=False)
    ):
        iterations = np.arange(1, len(ratio) + 1)
        axes.plot(iterations, ratio, style, color=color, linewidth=width, label=title, zorder=order)
    axes.set_yscale("log")
    axes.set(
        title="Gradient magnitude, negatives / positives",
        xlabel="iteration",
        ylabel="ratio of sums (log scale)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _smooth(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return means over consecutive windows, at the middle of each."""
    count = len(values) // window
    means = values[: count * window].reshape(count, window).mean(axis=1)
    return (np.arange(count) + 0.5) * window, means


def save_detections(
    images: list[Tensor],
    truths: list[dict[str, Tensor]],
    detections: dict[str, list[dict[str, Tensor]]],
    thresholds: dict[str, float],
    path: Path,
) -> None:
    """Draw a row of canvases per loss under a row of ground truth.

    Args:
        images: (1, H, W) in [0, 1] each.
        truths: per image `boxes` and `labels`.
        detections: by title, per image `boxes`, `labels` and `scores`.
        thresholds: by title, the score from which a detection is drawn.
        path: of the picture.
    """
    rows = {"Ground truth": truths, **detections}
    figure = Figure(figsize=(2.1 * len(images) + 0.4, 2.15 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    colors = ORANGE, *[SKY] * len(detections)
    for axes_row, (title, found), color in zip(grid, rows.items(), colors, strict=True):
        axes_row[0].set_ylabel(title)
        for axes, image, boxes in zip(axes_row, images, found, strict=True):
            axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            _draw_boxes(axes, boxes, color, thresholds.get(title))
    figure.savefig(path, dpi=110)


def _draw_boxes(axes: Axes, found: dict[str, Tensor], color: str, threshold: float | None) -> None:
    for i, (x1, y1, x2, y2) in enumerate(found["boxes"].tolist()):
        if threshold is not None and found["scores"][i] < threshold:
            continue
        # Pixel centres are at whole numbers in imshow, hence the half.
        corner = (x1 - 0.5, y1 - 0.5)
        axes.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, color=color, linewidth=1.5))
        axes.text(
            *corner,
            str(found["labels"][i].item()),
            fontsize=8,
            verticalalignment="bottom",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8},
        )
