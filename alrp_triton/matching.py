"""Detections matched to ground truth as COCO does it, for all images and classes at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Image = Mapping[str, Tensor]  # what is known of one image, by the names below

PAIRS_AT_ONCE = 2**21  # pairs of boxes whose IoU is in memory together: some 400 MB


class Detections(NamedTuple):
    """The D detections of B images, image after image."""

    boxes: Tensor  # (D, 4) float64, xyxy
    scores: Tensor  # (D,) float64
    labels: Tensor  # (D,) int64
    counts: Tensor  # (B,) int64, detections of each image


class Truths(NamedTuple):
    """The G ground truths of B images, image after image."""

    boxes: Tensor  # (G, 4) float64, xyxy
    labels: Tensor  # (G,) int64
    crowds: Tensor  # (G,) bool
    areas: Tensor  # (G,) float64
    counts: Tensor  # (B,) int64, ground truths of each image


class Matches(NamedTuple):
    """What became of D detections and G ground truths, in the order in which they were given."""

    scores: Tensor  # (D,) float64
    labels: Tensor  # (D,) int64
    ious: Tensor  # (D,) float64, with the matched ground truth; 0 where there is none
    true: Tensor  # (D,) bool, true positives
    false: Tensor  # (D,) bool, false positives; a detection that is neither does not count
    truth_labels: Tensor  # (G,) int64
    counted: Tensor  # (G,) bool, ground truths that are to be found


class Candidates(NamedTuple):
    """The M pairs of a detection and a ground truth that may match, best first for a detection.

    They do not depend on the range of areas. Detections are numbered in the order of `order`.
    """

    detections: Detections
    truths: Truths
    order: Tensor  # (D',) detections that are looked at: by image and class, descending in score
    ranks: Tensor  # (D',) their places within their image and class
    detection: Tensor  # (M,) index into `order`
    truth: Tensor  # (M,) index into `truths`
    ious: Tensor  # (M,) float64


def match_detections(
    preds: Sequence[Image],
    target: Sequence[Image],
    tau: float = 0.5,
    max_detections: int = 100,
    area: tuple[float, float] = (0.0, math.inf),
) -> Matches:
    """Matches detections to ground truth, image by image and class by class, as COCO does.

    In descending order of score each detection takes, of the ground truths that are still free and
    with which it has an IoU of at least tau, the one with the highest IoU (the later of equal
    ones). Crowds, and ground truths outside of the range of areas, are not to be found: a detection
    that takes one, which it does only if it can have no other, does not count. Neither does an
    unmatched detection outside of the range. Any number of detections can take a crowd, and the IoU
    with a crowd is the share of the detection's own area that lies in it.

    Args:
        preds: for each image a dict of `boxes` (D, 4), corners (x1, y1, x2, y2) in any unit,
            `scores` (D,), floating, and `labels` (D,), integer.
        target: for each image a dict of `boxes` (G, 4), `labels` (G,) and, where there are any,
            `iscrowd` (G,), 0 or 1, and `area` (G,), which stands for that of the boxes where the
            range of areas is asked for (COCO has the area of the outline there).
        tau: the IoU from which a detection counts as true, in [0, 1).
        max_detections: only so many detections of an image and class count, the highest scored.
        area: the least and the largest area, both included, in squares of the boxes' unit.

    Returns:
        `Matches`, in the order of preds and target, on their device, which must have float64.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> preds = [{"boxes": torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 10], [20, 20, 30, 30]]),
        ...           "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([1, 1, 1])}]
        >>> target = [{"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1])}]
        >>> matches = match_detections(preds, target)
        >>> matches.true, matches.ious
        (tensor([ True, False, False]), tensor([0.8000, 0.0000, 0.0000], dtype=torch.float64))
    """
    check_images(preds, target)
    check_setting(tau, max_detections)
    check_area("area", area)
    found, truths = gather_detections(preds), gather_truths(target)
    return assign(find_candidates(found, truths, tau, max_detections), area)


def find_candidates(
    detections: Detections, truths: Truths, tau: float, max_detections: int
) -> Candidates:
    """All pairs within an image and class that reach an IoU of tau."""
    check_values(detections, truths)
    groups, truth_groups = _groups(detections, truths)
    order = sort_within(detections.scores, groups, descending=True)
    sorted_groups = groups[order]
    ranks = _positions(order) - torch.searchsorted(sorted_groups, sorted_groups)
    kept = ranks < max_detections
    order, ranks, sorted_groups = order[kept], ranks[kept], sorted_groups[kept]

    truth_order = _sort(truth_groups)
    truth_groups = truth_groups[truth_order]
    first = torch.searchsorted(truth_groups, sorted_groups)
    number = torch.searchsorted(truth_groups, sorted_groups, right=True) - first
    least = min(tau, 1 - 1e-10)  # as COCO has it: IoU 1 is missed by a rounding at times
    pairs = []
    for detection, place in _pairs(first, number):
        truth = truth_order[place]
        ious = _ious(detections.boxes[order[detection]], truths.boxes[truth], truths.crowds[truth])
        near = ious >= least
        pairs.append((detection[near], truth[near], ious[near]))
    detection, truth, ious = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    best_first = _sort(ious.flip(0), descending=True)  # flipped: the later of equal ones
    detection, truth, ious = (part.flip(0)[best_first] for part in (detection, truth, ious))
    return Candidates(detections, truths, order, ranks, detection, truth, ious)


def assign(candidates: Candidates, area: tuple[float, float]) -> Matches:
    """What becomes of the detections, where ground truth of this range of areas is to be found."""
    detections, truths, order = candidates.detections, candidates.truths, candidates.order
    least, largest = area
    ignored = truths.crowds | (truths.areas < least) | (truths.areas > largest)
    taken = _take(candidates, ignored)
    found, truth = order[candidates.detection[taken]], candidates.truth[taken]

    # In the order given. Detections that were not looked at stay neither true nor false.
    ious = torch.zeros_like(detections.scores)
    ious[found] = candidates.ious[taken]
    true = torch.zeros_like(detections.labels, dtype=torch.bool)
    true[found] = ~ignored[truth]
    false = torch.zeros_like(true)
    areas = _areas(detections.boxes[order])
    false[order] = (areas >= least) & (areas <= largest)
    false[found] = False
    return Matches(detections.scores, detections.labels, ious, true, false, truths.labels, ~ignored)


def _take(candidates: Candidates, ignored: Tensor) -> Tensor:
    """Which of the pairs are taken: a step for each rank, over all images and classes."""
    truths, ranks = candidates.truths, candidates.ranks
    # By rank, then by detection, then what is to be found before what is not; then best first.
    key = ranks[candidates.detection] * len(ranks) + candidates.detection
    turn = _sort(key * 2 + ignored[candidates.truth])
    detection, truth = candidates.detection[turn], candidates.truth[turn]
    steps = torch.arange(int(ranks.max()) + 2 if len(ranks) else 1, device=ranks.device)
    edges = torch.searchsorted(ranks[detection], steps).tolist()
    gone = torch.zeros_like(truths.crowds)
    taken = [turn[:0]]
    for start, stop in itertools.pairwise(edges):
        free = start + (~gone[truth[start:stop]]).nonzero().squeeze(1)
        best = free[starts(detection[free])]
        gone[truth[best]] = ~truths.crowds[truth[best]]
        taken.append(turn[best])
    return torch.cat(taken)


def _groups(detections: Detections, truths: Truths) -> tuple[Tensor, Tensor]:
    """A number for each detection and each ground truth: the same for the same image and class."""
    labels = torch.cat([detections.labels, truths.labels])
    values, classes = labels.unique(return_inverse=True)
    images = torch.cat(
        [
            torch.repeat_interleave(_positions(counts), counts)
            for counts in (detections.counts, truths.counts)
        ]
    )
    groups = images * max(len(values), 1) + classes
    return groups[: len(detections.labels)], groups[len(detections.labels) :]


def _pairs(first: Tensor, number: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(i, first[i] + n) for all n < number[i], ascending, in parts; at least one part."""
    ends = number.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    cuts = ends.new_tensor(range(PAIRS_AT_ONCE, total, PAIRS_AT_ONCE))
    for part in _positions(first).tensor_split(torch.searchsorted(ends, cuts).tolist()):
        numbers = number[part]
        before = torch.repeat_interleave(numbers.cumsum(0) - numbers, numbers)
        yield (
            torch.repeat_interleave(part, numbers),
            torch.repeat_interleave(first[part], numbers) + _positions(before) - before,
        )


def _ious(boxes: Tensor, truths: Tensor, crowds: Tensor) -> Tensor:
    """IoU of each of (M, 4) boxes with its ground truth; with a crowd, intersection over box."""
    low = torch.maximum(boxes[:, :2], truths[:, :2])
    high = torch.minimum(boxes[:, 2:], truths[:, 2:])
    inter = _areas(torch.cat([low, high], 1))
    own = _areas(boxes)
    union = torch.where(crowds, own, own + _areas(truths) - inter)
    return torch.where(inter > 0, inter / union, 0.0)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def sort_within(values: Tensor, groups: Tensor, descending: bool = False) -> Tensor:
    """The order that sorts by group, and by value within a group, keeping that of equal ones."""
    order = _sort(values, descending)
    return order[_sort(groups[order])]


def _sort(values: Tensor, descending: bool = False) -> Tensor:
    return values.sort(stable=True, descending=descending).indices


def _positions(values: Tensor) -> Tensor:
    return torch.arange(len(values), device=values.device)


def starts(values: Tensor) -> Tensor:
    """True where a run of equal values starts."""
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[1:] = values[1:] != values[:-1]
    return starts


# --- what comes in -----------------------------------------------------------------------------


def gather_detections(preds: Sequence[Image]) -> Detections:
    """One tensor for all images of each field."""
    return Detections(
        torch.cat([_boxes(image["boxes"]) for image in preds] or [torch.zeros(0, 4).double()]),
        _cat([image["scores"].double() for image in preds], torch.float64),
        _cat([image["labels"].long() for image in preds], torch.int64),
        _counts(preds),
    )


def gather_truths(target: Sequence[Image]) -> Truths:
    """One tensor for all images of each field; areas are those of the boxes where none are given.

    Without `iscrowd` nothing is a crowd.
    """
    boxes = [_boxes(image["boxes"]) for image in target]
    crowds = [_optional(image, "iscrowd", torch.zeros_like(image["labels"])) for image in target]
    areas = [
        _optional(image, "area", _areas(own)) for image, own in zip(target, boxes, strict=True)
    ]
    return Truths(
        torch.cat(boxes or [torch.zeros(0, 4).double()]),
        _cat([image["labels"].long() for image in target], torch.int64),
        _cat([crowd.bool() for crowd in crowds], torch.bool),
        _cat([area.double() for area in areas], torch.float64),
        _counts(target),
    )


def _boxes(boxes: Tensor) -> Tensor:
    return boxes.detach().double().reshape(-1, 4)  # torch.tensor([]) is no boxes


def _cat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.detach() for part in parts] or [torch.zeros(0, dtype=dtype)])


def _counts(images: Sequence[Image]) -> Tensor:
    device = images[0]["boxes"].device if images else None
    return torch.tensor([len(image["boxes"]) for image in images], dtype=torch.int64, device=device)


def _optional(image: Image, key: str, otherwise: Tensor) -> Tensor:
    given = image.get(key)
    return otherwise if given is None else given


def check_images(preds: Sequence[Image], target: Sequence[Image]) -> None:
    """Raises TypeError or ValueError, by its name, for what `match_detections` cannot take."""
    for name, images in (("preds", preds), ("target", target)):
        if not isinstance(images, Sequence):
            raise TypeError(f"{name}: expected a list of dicts, got {type(images).__name__}")
    if len(preds) != len(target):
        raise ValueError(f"target: expected {len(preds)} images like preds, got {len(target)}")
    for i, image in enumerate(preds):
        _check_image(f"preds[{i}]", image, ("scores", "labels"))
    for i, image in enumerate(target):
        _check_image(f"target[{i}]", image, ("labels",), ("iscrowd", "area"))
    devices = [image["boxes"].device for image in (*preds, *target)]
    for device in devices:
        if device != devices[0]:
            raise ValueError(
                f"preds, target: expected on one device, got {devices[0]} and {device}"
            )


_DTYPES = {
    "boxes": "real",
    "scores": "floating",
    "labels": "integer",
    "iscrowd": "integer or bool",
    "area": "real",
}


def _check_image(
    name: str, image: Image, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    if not isinstance(image, Mapping):
        raise TypeError(f"{name}: expected a dict of tensors, got {type(image).__name__}")
    for key in ("boxes", *required):
        if key not in image:
            raise ValueError(f"{name}: expected the key {key!r}, got {sorted(image)}")
    boxes = image["boxes"]
    given = [key for key in optional if image.get(key) is not None]
    for key in ("boxes", *required, *given):
        field = f"{name}[{key!r}]"
        values = image[key]
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        if not isinstance(values, Tensor) or not _fits(values.dtype, _DTYPES[key]):
            raise TypeError(f"{field}: expected a tensor, {_DTYPES[key]}, got {got}")
        if values.device != boxes.device:
            raise ValueError(f"{field}: expected on {boxes.device}, got {values.device}")
        if key == "boxes":
            if values.shape[1:] != (4,) and values.shape != (0,):
                raise ValueError(f"{field}: expected shape (N, 4), got {tuple(values.shape)}")
        elif values.shape != boxes.shape[:1]:
            raise ValueError(
                f"{field}: expected shape {tuple(boxes.shape[:1])} for as many boxes, "
                f"got {tuple(values.shape)}"
            )


def _fits(dtype: torch.dtype, kind: str) -> bool:
    if kind == "floating":
        return dtype.is_floating_point
    if kind == "real":
        return not dtype.is_complex and dtype != torch.bool
    if dtype == torch.bool:
        return kind == "integer or bool"
    return not dtype.is_floating_point and not dtype.is_complex


def check_values(detections: Detections, truths: Truths) -> None:
    """Raises ValueError for a NaN, and for boxes that are not finite; waits for the device."""
    for name, values in (
        ("preds: boxes", detections.boxes),
        ("target: boxes", truths.boxes),
        ("target: area", truths.areas),
    ):
        if not values.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or an infinity")
    if detections.scores.isnan().any():
        raise ValueError("preds: scores: expected numbers, got NaN")


def check_setting(tau: float, max_detections: int) -> None:
    """Raises ValueError if `match_detections` cannot take them."""
    if not 0 <= tau < 1:
        raise ValueError(f"tau: expected a number in [0, 1), got {tau}")
    if max_detections < 1:
        raise ValueError(f"max_detections: expected at least 1, got {max_detections}")


def check_area(name: str, area: tuple[float, float]) -> None:
    """Raises ValueError if it is not a range."""
    if len(area) != 2 or not 0 <= area[0] <= area[1]:
        raise ValueError(f"{name}: expected 0 <= least <= largest, got {area}")
