"""Inputs for timing: logits of a stage of training, and the anchors of a detector on real boxes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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


class Cell(NamedTuple):
    """One workload: a cell of the table that a benchmark fills."""

    logits: int  # N
    positives: int  # P
    distribution: str
    dtype: str = "float32"
    delta: float = 1.0

    @property
    def pairs(self) -> int:
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


def _sweeps(
    over_positives: tuple[int, ...],
    over_logits: tuple[int, ...],
    logits: int,
    positives: int,
    delta: float = 1.0,
) -> list[Cell]:
    """Over P at one N and over N at one P, in the middle of a training."""
    return [
        *(Cell(logits, p, "mid", delta=delta) for p in over_positives),
        *(Cell(n, positives, "mid", delta=delta) for n in over_logits),
    ]


def _set(*parts: list[Cell]) -> tuple[Cell, ...]:
    """Each cell once, in the order given: the most important come first."""
    return tuple(dict.fromkeys(cell for part in parts for cell in part))


# Logits a call: RetinaNet at 512 px with 8 images, the same with ATSS, ATSS at 1344 x 800 over a
# global batch of 16, an RPN, a DETR head.
_RETINANET, _ATSS, _GLOBAL, _RPN, _DETR = 20_951_040, 6_983_680, 86_000_000, 1_000_000, 48_000
_GPU_SWEEPS = (
    (500, 50_000, 100, 5000, 1, 10, 1000),
    (_DETR, _RPN, _ATSS, _GLOBAL, _RETINANET),
    _RETINANET,
    1000,
)
_CPU_SWEEPS = ((10, 100, 500, 2000), (50_000, 300_000, 2_000_000, 8_000_000), 2_000_000, 500)

CELLS = {
    "cpu": _set(
        _stages(2_000_000, 500, "float32"),
        _stages(2_000_000, 500, "float32", delta=0.0),
        _sweeps(*_CPU_SWEEPS),
        _sweeps((10, 100, 500, 2000), (50_000, 300_000), 2_000_000, 500, delta=0.0),
    ),
    "gpu": _set(
        _stages(_RETINANET, 1000, "float32"),
        _stages(_RETINANET, 1000, "bfloat16"),
        _stages(_RETINANET, 1000, "float32", delta=0.0),
        _sweeps(*_GPU_SWEEPS),
        _sweeps(*_GPU_SWEEPS, delta=0.0),
    ),
    "rehearse": _set(
        _stages(8000, 10, "float32"),
        _sweeps((1, 40), (), 8000, 10),
        [Cell(8000, 10, "mid", delta=0.0), Cell(16_000, 10, "mid")],
        [Cell(8000, 10, "mid", "bfloat16")],
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


def draw(cell: Cell, device: torch.device) -> Inputs:
    """The inputs of a cell: drawn on the CPU, so that they are the same on every machine."""
    targets = draw_targets(cell.logits // cell.classes, cell.classes, cell.positives)
    logits = draw_logits(targets, cell.classes, cell.distribution)
    loc_errors = torch.rand(cell.positives, generator=torch.Generator().manual_seed(1))
    dtype = getattr(torch, cell.dtype)
    return Inputs(logits.to(device, dtype), targets.to(device), loc_errors.to(device), cell.delta)


def draw_logits(targets: Tensor, classes: int, distribution: str, seed: int = 0) -> Tensor:
    """float32 logits (N, C) for class indices (N,), as at one stage of a training."""
    generator = torch.Generator().manual_seed(seed)
    negative, positive = DISTRIBUTIONS[distribution]
    logits = torch.randn(targets.numel(), classes, generator=generator)
    logits.mul_(negative[1]).add_(negative[0])
    anchors = (targets >= 0).nonzero()[:, 0]
    scores = torch.randn(anchors.numel(), generator=generator) * positive[1] + positive[0]
    logits[anchors, targets[anchors]] = scores
    return logits


def draw_targets(anchors: int, classes: int, num_positives: int, seed: int = 0) -> Tensor:
    """Class indices (N,): positives anywhere, 2 % of the anchors ignored, background elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(anchors, generator=generator)
    targets = torch.full((anchors,), -1)
    targets[order[:num_positives]] = torch.randint(classes, (num_positives,), generator=generator)
    targets[order[num_positives : num_positives + anchors // 50]] = -100
    return targets


def retinanet_targets(images: list[tuple[Tensor, Tensor]], size: int = 512) -> Tensor:
    """Class indices (N,) of RetinaNet's anchors over square images, all images in turn.

    Two scales and three ratios at each place of strides 8 to 128; positive from IoU 0.5 on, and the
    best anchor of each box; ignored between 0.4 and 0.5.

    Args:
        images: for each its boxes (G, 4), xyxy in pixels of the resized image, and classes (G,).
        size: side of the images in pixels.
    """
    anchors = torch.cat([_anchors(size, stride) for stride in (8, 16, 32, 64, 128)])
    return torch.cat([_assign(anchors, boxes, classes) for boxes, classes in images])


def coco_images(annotations: Path, number: int, size: int = 512) -> list[tuple[Tensor, Tensor]]:
    """Boxes and classes of the images with most boxes in a COCO annotation file."""
    data = json.loads(annotations.read_text())
    classes = {c: i for i, c in enumerate(sorted({a["category_id"] for a in data["annotations"]}))}
    shapes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    found: dict[int, list] = {}
    for annotation in data["annotations"]:
        if not annotation.get("iscrowd"):
            found.setdefault(annotation["image_id"], []).append(annotation)
    images = []
    for image_id in sorted(found, key=lambda i: -len(found[i]))[:number]:
        boxes = torch.tensor([a["bbox"] for a in found[image_id]], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        boxes *= torch.tensor(shapes[image_id]).repeat(2).reciprocal() * size
        images.append((boxes, torch.tensor([classes[a["category_id"]] for a in found[image_id]])))
    return images


def drawn_images(number: int, classes: int = 80, size: int = 512) -> list[tuple[Tensor, Tensor]]:
    """Boxes as COCO has them on average: seven an image, most of them small."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for _ in range(number):
        side = size * torch.rand(7, 2, generator=generator).pow(2).clamp(min=0.02)
        low = torch.rand(7, 2, generator=generator) * (size - side)
        boxes = torch.cat([low, low + side], 1)
        images.append((boxes, torch.randint(classes, (7,), generator=generator)))
    return images


def _anchors(size: int, stride: int) -> Tensor:
    scales = 4 * stride * torch.tensor([1.0, 2**0.5])
    ratios = torch.tensor([0.5, 1.0, 2.0]).sqrt()
    sides = torch.stack([scales[:, None] / ratios, scales[:, None] * ratios], -1).reshape(-1, 2)
    place = (torch.arange(size // stride) + 0.5) * stride
    y, x = torch.meshgrid(place, place, indexing="ij")
    centers = torch.stack([x, y], -1).reshape(-1, 1, 2)
    return torch.cat([centers - sides / 2, centers + sides / 2], -1).reshape(-1, 4)


def _assign(anchors: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
    low = torch.maximum(anchors[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(anchors[:, None, 2:], boxes[None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (anchors, boxes)]
    iou = inter / (areas[0][:, None] + areas[1] - inter)
    best, which = iou.max(1)
    targets = torch.full((anchors.shape[0],), -1)
    targets[best >= 0.4] = -100
    targets[best >= 0.5] = classes[which[best >= 0.5]]
    targets[iou.argmax(0)] = classes
    return targets
