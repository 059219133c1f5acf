"""The workloads that are timed: how many logits and positives, and at what stage of a training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# (mean, deviation) of the negatives' and of the positives' logits.
DISTRIBUTIONS = {
    "init": ((-4.6, 0.01), (-4.6, 0.01)),
    "mid": ((-7.0, 1.5), (-1.0, 1.5)),
    "late": ((-9.0, 1.5), (1.5, 1.5)),
    "spread": ((0.0, 2.0), (0.0, 2.0)),
}

_IMAGES = 8  # of a batch, where positives are ranked within their image


class Cell(NamedTuple):
    """One workload: a cell of the table that a benchmark fills."""

    logits: int  # N
    positives: int  # P
    distribution: str
    dtype: str = "float32"
    delta: float = 1.0

    @property
    def pairs(self) -> int:
        """How many pairs of a positive and a logit there are."""
        return self.logits * self.positives

    @property
    def classes(self) -> int:
        """80 as in COCO; fewer where the positives would not find an anchor each."""
        classes = 80
        while classes > 1 and self.logits // classes < 2 * self.positives:
            classes //= 2
        return classes

    def __str__(self) -> str:
        return (
            f"{self.distribution}, N = {self.logits:,}, P = {self.positives:,}, {self.dtype}, "
            f"delta = {self.delta:g}"
        )


def _stages(logits: int, positives: int, dtype: str, delta: float = 1.0) -> list[Cell]:
    return [Cell(logits, positives, name, dtype, delta) for name in DISTRIBUTIONS]


def _both_steps(cells: list[Cell]) -> list[Cell]:
    """Return each cell under the soft step and under the hard one."""
    return [cell._replace(delta=delta) for cell in cells for delta in (1.0, 0.0)]


# Logits a call: RetinaNet at 512 px with 8 images, the same with ATSS, ATSS at 1344 x 800 over a
# global batch of 16, an RPN, a DETR head.
_RETINANET, _ATSS, _GLOBAL, _RPN, _DETR = 20_951_040, 6_983_680, 86_000_000, 1_000_000, 48_000

# The most important come first.
CELLS = {
    "cpu": (
        *_stages(2_000_000, 500, "float32"),
        *_stages(2_000_000, 500, "float32", delta=0.0),
        *_both_steps([Cell(2_000_000, p, "mid") for p in (10, 100, 2000)]),
        *_both_steps([Cell(n, 500, "mid") for n in (300_000, 50_000, 8_000_000)]),
        Cell(2_000_000, 50_000, "mid"),
    ),
    "gpu": (
        *_stages(_RETINANET, 1000, "float32"),
        *_stages(_RETINANET, 1000, "float32", delta=0.0),
        *_stages(_RETINANET, 1000, "bfloat16"),
        *_both_steps([Cell(_RETINANET, p, "mid") for p in (500, 50_000)]),
        *(Cell(_RETINANET, p, "mid", "bfloat16") for p in (500, 50_000)),
        *_both_steps([Cell(_RETINANET, p, "mid") for p in (100, 5000, 10, 1)]),
        *_both_steps([Cell(n, 1000, "mid") for n in (_DETR, _RPN, _ATSS, _GLOBAL)]),
    ),
    "rehearse": (
        *_stages(8000, 10, "float32"),
        *(Cell(8000, p, "mid") for p in (1, 40)),
        *_both_steps([Cell(16_000, 10, "mid")]),
        Cell(8000, 10, "mid", "bfloat16"),
    ),
}


@dataclass(frozen=True)
class Inputs:
    """What a loss of one cell is called with."""

    logits: Tensor  # (N / C, C), in the cell's dtype
    targets: Tensor  # (N / C,) int64 class indices, -1 background, -100 ignored
    loc_errors: Tensor  # (P,) float32
    delta: float

    @cached_property
    def marks(self) -> Tensor:
        """1 / 0 / -1 for each logit, in the logits' dtype: what published code wants."""
        out = torch.zeros_like(self.logits)
        anchors = (self.targets >= 0).nonzero()[:, 0]
        out[anchors, self.targets[anchors]] = 1
        out[self.targets == -100] = -1
        return out

    @cached_property
    def images(self) -> Tensor:
        """(N / C,) int64 the image of each anchor, one image after the other."""
        anchors = torch.arange(self.targets.numel(), device=self.targets.device)
        return anchors * _IMAGES // self.targets.numel()


def draw(cell: Cell, device: torch.device) -> Inputs:
    """Draw the inputs of a cell, on the CPU, so that they are the same on every machine."""
    targets = draw_targets(cell.logits // cell.classes, cell.classes, cell.positives)
    logits = draw_logits(targets, cell.classes, cell.distribution)
    loc_errors = torch.rand(cell.positives, generator=torch.Generator().manual_seed(1))
    dtype = getattr(torch, cell.dtype)
    return Inputs(logits.to(device, dtype), targets.to(device), loc_errors.to(device), cell.delta)


def draw_logits(targets: Tensor, classes: int, distribution: str, seed: int = 0) -> Tensor:
    """Draw float32 logits (N, C) for class indices (N,), as at one stage of a training."""
    generator = torch.Generator().manual_seed(seed)
    negative, positive = DISTRIBUTIONS[distribution]
    logits = torch.randn(targets.numel(), classes, generator=generator)
    logits.mul_(negative[1]).add_(negative[0])
    anchors = (targets >= 0).nonzero()[:, 0]
    scores = torch.randn(anchors.numel(), generator=generator) * positive[1] + positive[0]
    logits[anchors, targets[anchors]] = scores
    return logits


def draw_targets(anchors: int, classes: int, num_positives: int, seed: int = 0) -> Tensor:
    """Draw class indices (N,): positives anywhere, 2 % of the anchors ignored, else background."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(anchors, generator=generator)
    targets = torch.full((anchors,), -1)
    targets[order[:num_positives]] = torch.randint(classes, (num_positives,), generator=generator)
    targets[order[num_positives : num_positives + anchors // 50]] = -100
    return targets
