"""A RetinaNet-sized call on boxes: those of COCO images if they are there, drawn ones otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alrp_triton import alrp_loss
from alrp_triton.testing.workloads import draw_logits

from ..timing import Times, interleave, peak_memory

Images = list[tuple[Tensor, Tensor]]  # boxes (G, 4) and classes (G,) of each

_IMAGES = 4
_CLASSES = 80


def retinanet_call(
    images: Images | None = None, device: torch.device | None = None
) -> dict[str, Any]:
    """Time a call of RetinaNet's size, on real boxes if there are any.

    Returns:
        Seconds, and what forward takes of memory.
    """
    device = device or torch.device("cpu")
    targets = retinanet_targets(images or drawn_images(_IMAGES))
    logits = draw_logits(targets, _CLASSES, "mid").to(device)
    loc_errors = torch.rand(int((targets >= 0).sum())).to(device)
    ignored = int((targets == -100).sum()) * 80
    targets = targets.to(device)

    def forward() -> Tensor:
        leaf = logits.detach().requires_grad_()
        cls, loc = alrp_loss(leaf, targets, loc_errors.detach().requires_grad_())
        return cls + loc

    extra = peak_memory(forward, device)
    calls: dict[str, Callable[[], object]] = {
        "forward": forward,
        "both": lambda: forward().backward(),
    }
    seconds = interleave(calls, device, rounds=3)
    return {
        "boxes": "COCO's" if images else "drawn",
        "N": logits.numel(),
        "P": loc_errors.numel(),
        "ignored": ignored,
        "forward_s": Times.of(seconds["forward"]).median,
        "forward_backward_s": Times.of(seconds["both"]).median,
        "forward_extra_share": None if extra is None else extra / logits.nbytes,
    }


def retinanet_targets(images: Images, size: int = 512) -> Tensor:
    """Return class indices (N,) of RetinaNet's anchors over square images, all images in turn.

    Two scales and three ratios at each place of strides 8 to 128; positive from IoU 0.5 on, and the
    best anchor of each box; ignored between 0.4 and 0.5.

    Args:
        images: for each its boxes (G, 4), xyxy in pixels of the resized image, and classes (G,).
        size: side of the images in pixels.
    """
    anchors = torch.cat([_anchors(size, stride) for stride in (8, 16, 32, 64, 128)])
    return torch.cat([_assign(anchors, boxes, classes) for boxes, classes in images])


def coco_images(annotations: Path, number: int = _IMAGES, size: int = 512) -> Images:
    """Read boxes and classes of the images with most boxes from a COCO annotation file.

    Raises:
        ValueError: if it has no boxes, or not COCO's classes; and whatever reading it raises.
    """
    data = json.loads(annotations.read_text())
    classes = {c: i for i, c in enumerate(sorted({a["category_id"] for a in data["annotations"]}))}
    if not 1 <= len(classes) <= _CLASSES:
        raise ValueError(f"expected boxes of at most {_CLASSES} categories, got {len(classes)}")
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
        if not (boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()):
            raise ValueError(f"image {image_id}: expected boxes [x, y, width, height] with an area")
        images.append((boxes, torch.tensor([classes[a["category_id"]] for a in found[image_id]])))
    if not images:
        raise ValueError("expected an image with boxes that are no crowd")
    return images


def drawn_images(number: int, classes: int = _CLASSES, size: int = 512) -> Images:
    """Draw boxes as COCO has them on average: seven an image, most of them small."""
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
