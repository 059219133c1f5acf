"""Detections matched to ground truth as COCO does it, for all images and classes at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .boxes import FORMATS, format_of, to_corners

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
    """Match detections to ground truth, image by image and class by class, as COCO does.

    In descending order of score each detection takes, of the ground truths that are still free and
    with which it has an IoU of at least tau, the one with the highest IoU (the later of equal
    ones). Crowds, and ground truths outside of the range of areas, are not to be found: a detection
    that takes one, which it does only if it can have no other, does not count. Neither does an
    unmatched detection outside of the range. Any number of detections can take a crowd, and the IoU
    with a crowd is the share of the detection's own area that lies in it.

    Args:
        preds: for each image a dict of `boxes` (D, 4), corners (x1, y1, x2, y2) in any unit,
            `scores` (D,), floating, and `labels` (D,), integers that int64 holds. Boxes that carry
            another format, as torchvision's `BoundingBoxes` do, are converted (XYWH and CXCYWH). A
            detection that is inside-out has area 0, and no IoU with anything.
        target: for each image a dict of `boxes` (G, 4), `labels` (G,) and, where there are any,
            `iscrowd` (G,), 0 or 1, and `area` (G,), which stands for that of the boxes where the
            range of areas is asked for (COCO has the area of the outline there). An inside-out
            box, which is what a width and height taken for a corner often give, is refused.
            Empty tensors, here and in preds, may have any dtype and device.
        tau: the IoU from which a detection counts as true, in [0, 1).
        max_detections: only so many detections of an image and class count, the highest scored.
        area: the least and the largest area, both included, in squares of the boxes' unit.

    Returns:
        `Matches`, in the order of preds and target, on their device; on the CPU for those of MPS,
        which lacks float64.

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
    tau, max_detections = check_tau(tau), check_max_detections(max_detections)
    area = check_area("area", area)
    found, truths = gather(preds, target)
    return assign(find_candidates(found, truths, tau, max_detections), area)


def find_candidates(
    detections: Detections, truths: Truths, tau: float, max_detections: int
) -> Candidates:
    """Find all pairs within an image and class that reach an IoU of tau."""
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
    """Tell what becomes of the detections where ground truth of this range of areas is wanted."""
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
    """Return which of the pairs are taken: a step for each rank, over all images and classes."""
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
    """Give each detection and each ground truth a number, alike for the same image and class."""
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
    """Yield (i, first[i] + n) for all n < number[i], ascending, in parts; at least one part."""
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
    """Return the IoU of each of (M, 4) boxes with its ground truth.

    With a crowd it is the intersection over the box.
    """
    low = torch.maximum(boxes[:, :2], truths[:, :2])
    high = torch.minimum(boxes[:, 2:], truths[:, 2:])
    inter = _areas(torch.cat([low, high], 1))
    own = _areas(boxes)
    union = torch.where(crowds, own, own + _areas(truths) - inter)
    return torch.where(inter > 0, inter / union, 0.0)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def sort_within(values: Tensor, groups: Tensor, descending: bool = False) -> Tensor:
    """Return the order that sorts by group, and by value within, keeping that of equal ones."""
    order = _sort(values, descending)
    return order[_sort(groups[order])]


def _sort(values: Tensor, descending: bool = False) -> Tensor:
    return values.sort(stable=True, descending=descending).indices


def _positions(values: Tensor) -> Tensor:
    return torch.arange(len(values), device=values.device)


def starts(values: Tensor) -> Tensor:
    """Return True where a run of equal values starts."""
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[1:] = values[1:] != values[:-1]
    return starts


# --- what comes in -----------------------------------------------------------------------------

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)

# What each field may be where it holds anything: an empty tensor's dtype tells nothing, since that
# of `torch.tensor([])` is float32.
_KINDS = {
    "boxes": ("a floating or integer", FLOATING + INTEGER),
    "scores": ("a floating", FLOATING),
    "labels": ("an integer", INTEGER),
    "iscrowd": ("an integer or bool", (*INTEGER, torch.bool)),
    "area": ("a floating or integer", FLOATING + INTEGER),
}

LARGEST = 2.0**500  # of a coordinate: areas and their sums stay finite


def nothing(device: torch.device) -> tuple[Detections, Truths]:
    """Return what there is of no images."""
    boxes, none = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((0, 4), 0))
    integers = none.long()
    return (
        Detections(boxes, none, integers, integers),
        Truths(boxes, integers, none.bool(), none, integers),
    )


def home(device: torch.device) -> torch.device:
    """Return the device, or the CPU in place of one that has no float64, or no numbers at all."""
    return torch.device("cpu") if device.type in ("mps", "meta") else device


def gather(
    preds: Sequence[Image], target: Sequence[Image], device: torch.device | None = None
) -> tuple[Detections, Truths]:
    """Put each field of all images into one tensor, on `device`, else on that of the boxes.

    Raises TypeError or ValueError for what `match_detections` cannot take. Waits for the device
    once, however many images there are. Areas are those of the boxes where none are given, and
    without `iscrowd` nothing is a crowd.
    """
    own = _check_images(preds, target)
    found, truths = nothing(home(own) if device is None else device)
    found = Detections(
        _cat([_corners(image["boxes"]) for image in preds], found.boxes),
        _cat([image["scores"] for image in preds], found.scores),
        _cat([image["labels"] for image in preds], found.labels),
        found.counts.new_tensor([_number(image) for image in preds]),
    )
    numbers = [_number(image) for image in target]
    boxes = _cat([_corners(image["boxes"]) for image in target], truths.boxes)
    no_crowds = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    crowds = _cat(_given(target, "iscrowd", no_crowds.split(numbers)), truths.counts)
    truths = Truths(
        boxes,
        _cat([image["labels"] for image in target], truths.labels),
        crowds.bool(),
        _cat(_given(target, "area", _areas(boxes).split(numbers)), truths.areas),
        truths.counts.new_tensor(numbers),
    )
    _check_values(found, truths, crowds)
    return found, truths


def _number(image: Image) -> int:
    boxes = image["boxes"]
    return len(boxes) if boxes.numel() else 0  # torch.tensor([[]]) is no boxes


def _given(images: Sequence[Image], key: str, otherwise: Sequence[Tensor]) -> list[Tensor]:
    pairs = zip(images, otherwise, strict=True)
    return [part if image.get(key) is None else image[key] for image, part in pairs]


def _cat(parts: Sequence[Tensor], empty: Tensor) -> Tensor:
    """Join all parts to one tensor with the dtype and on the device of `empty`."""
    parts = [_plain(part) for part in parts if part.numel()]
    if not parts:
        return empty
    if any(part.dtype != parts[0].dtype or part.device != parts[0].device for part in parts):
        parts = [_converted(part, empty) for part in parts]  # cat would promote, or refuse
    return _converted(torch.cat(parts), empty)


def _plain(values: Tensor) -> Tensor:
    values = values.detach()
    return values if type(values) is Tensor else values.as_subclass(Tensor)


def _converted(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device).to(like.dtype)  # moved first: where it is may lack the dtype


def _corners(boxes: Tensor) -> Tensor:
    """Return (x1, y1, x2, y2), where the boxes may carry another format."""
    form = format_of(boxes)
    if form == "XYXY" or not boxes.numel():
        return boxes
    # uint8 and 16-bit sums are not exact
    return to_corners(_plain(boxes).to(home(boxes.device)).double(), form)


def _check_images(preds: Sequence[Image], target: Sequence[Image]) -> torch.device:
    """Return the device of all boxes. Raise for what can be known without waiting for it."""
    for name, images in (("preds", preds), ("target", target)):
        if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
            raise TypeError(f"{name}: expected a list of dicts, got {_kind(images)}")
    if len(preds) != len(target):
        raise ValueError(f"target: expected {len(preds)} images like preds, got {len(target)}")
    for i, image in enumerate(preds):
        _check_image(f"preds[{i}]", image, ("scores", "labels"))
    for i, image in enumerate(target):
        _check_image(f"target[{i}]", image, ("labels",), ("iscrowd", "area"))
    devices = [image["boxes"].device for image in (*preds, *target) if image["boxes"].numel()]
    for name, images in (("preds", preds), ("target", target)):
        for i, image in enumerate(images):
            boxes = image["boxes"]
            if boxes.numel() and boxes.device != devices[0]:
                raise ValueError(
                    f"{name}[{i}]['boxes']: expected on {devices[0]} like the first boxes, "
                    f"got {boxes.device}"
                )
    devices += [image["boxes"].device for image in preds]  # where no image has any box
    return devices[0] if devices else torch.device("cpu")


def _check_image(
    name: str, image: Image, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    if not isinstance(image, Mapping):
        raise TypeError(f"{name}: expected a dict of tensors, got {_kind(image)}")
    for key in ("boxes", *required):
        if key not in image:
            raise ValueError(f"{name}: expected the key {key!r}, got {list(image)}")
    _check_boxes(f"{name}['boxes']", image["boxes"])
    device, shape = image["boxes"].device, (_number(image),)
    given = [key for key in optional if image.get(key) is not None]
    for key in (*required, *given):
        field, values = f"{name}[{key!r}]", image[key]
        check_tensor(field, values, key)
        if not values.numel() and shape == (0,):
            continue
        if values.device != device:
            raise ValueError(f"{field}: expected on {device}, got {values.device}")
        if values.shape != shape:
            raise ValueError(
                f"{field}: expected shape {shape} for as many boxes, got {tuple(values.shape)}"
            )


def _check_boxes(field: str, boxes: Tensor) -> None:
    check_tensor(field, boxes, "boxes")
    if format_of(boxes) not in FORMATS:
        raise ValueError(f"{field}: expected format {', '.join(FORMATS)}, got {format_of(boxes)}")
    if boxes.is_meta:
        raise ValueError(f"{field}: expected on a device that holds numbers, got meta")
    if boxes.numel() and (boxes.dim() != 2 or boxes.shape[1] != 4):
        raise ValueError(f"{field}: expected shape (N, 4), got {tuple(boxes.shape)}")


def check_tensor(field: str, values: Any, key: str) -> None:
    """Raise TypeError, by the name `field`, unless it is a tensor that `key` may be."""
    kind, dtypes = _KINDS[key]
    dense = isinstance(values, Tensor) and values.layout == torch.strided and not values.is_nested
    if not dense or (values.numel() and values.dtype not in dtypes):
        raise TypeError(f"{field}: expected {kind} tensor, got {_kind(values)}")


def _check_values(found: Detections, truths: Truths, crowds: Tensor) -> None:
    """Raise ValueError, by image and box, for numbers that mean nothing; wait for the device."""
    finite, corners = "finite numbers up to 2^500", "corners with x1 <= x2 and y1 <= y2"
    wrong = [
        ("preds", "boxes", finite, found.boxes, ~_are_finite(found.boxes)),
        ("preds", "scores", "a number", found.scores, found.scores.isnan()),
        ("target", "boxes", finite, truths.boxes, ~_are_finite(truths.boxes)),
        ("target", "boxes", corners, truths.boxes, _are_inside_out(truths.boxes)),
        ("target", "iscrowd", "0 or 1", crowds, (crowds != 0) & (crowds != 1)),
        ("target", "area", "a finite number, not negative", truths.areas, ~_are_areas(truths)),
    ]
    if not torch.cat([rows for *_, rows in wrong]).any():
        return
    for name, key, expected, values, rows in wrong:
        at = rows.nonzero().flatten().tolist()
        if at:
            ends = (found if name == "preds" else truths).counts.cumsum(0)
            image = int((ends <= at[0]).sum())
            box = at[0] - int(ends[image - 1]) * (image > 0)
            raise ValueError(
                f"{name}[{image}][{key!r}]: expected {expected}, got {values[at[0]].tolist()} "
                f"for box {box}"
            )


def _are_finite(boxes: Tensor) -> Tensor:
    return (boxes.abs() <= LARGEST).all(1)


def _are_inside_out(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] < boxes[:, :2]).any(1)


def _are_areas(truths: Truths) -> Tensor:
    return truths.areas.isfinite() & (truths.areas >= 0)


def _kind(value: Any) -> str:
    """Return what an error says that came."""
    if not isinstance(value, Tensor):
        return "None" if value is None else type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    return f"a {value.dtype if value.layout == torch.strided else value.layout} tensor"


def check_tau(tau: float) -> float:
    """Return the IoU as a float. Raise TypeError or ValueError if one cannot count from it."""
    value = _float("tau", tau, "a number in [0, 1)")
    if not 0 <= value < 1:
        raise ValueError(f"tau: expected a number in [0, 1), got {value}")
    return value


def check_max_detections(number: int) -> int:
    """Return the number, up to 2^62. Raise TypeError or ValueError if it is none."""
    expected = "max_detections: expected an integer of at least 1"
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"{expected}, got {_kind(number)}")
    if number < 1:
        raise ValueError(f"{expected}, got {_float('max_detections', number, ''):g}")
    return min(int(number), 2**62)  # as int64 has it


def check_area(name: str, area: tuple[float, float]) -> tuple[float, float]:
    """Return the range as floats. Raise TypeError or ValueError if it is none."""
    expected = "(least, largest) with 0 <= least <= largest"
    if not isinstance(area, (tuple, list)):
        raise TypeError(f"{name}: expected {expected}, got {_kind(area)}")
    if len(area) != 2:
        raise ValueError(f"{name}: expected {expected}, got {len(area)} entries")
    least, largest = (_float(name, end, expected) for end in area)
    if not 0 <= least <= largest:
        raise ValueError(f"{name}: expected {expected}, got {(least, largest)}")
    return least, largest


def _float(name: str, value: float, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {_kind(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
