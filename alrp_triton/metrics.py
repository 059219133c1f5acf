"""What the losses aim at, measured on detections: oLRP, and how scores and IoUs agree.

`LRP` is the metric of Eq. 6. `score_iou_correlation` is rho of the paper's Tables 2 and 5, and
`upper_bound_scores` and `lower_bound_scores` order scores as the two bounds of Table 5 do.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .matching import (
    Detections,
    Image,
    Matches,
    Truths,
    assign,
    check_area,
    check_max_detections,
    check_tau,
    check_tensor,
    find_candidates,
    gather,
    home,
    nothing,
    sort_within,
    starts,
)

try:
    from torchmetrics import Metric
except (ImportError, RuntimeError):  # RuntimeError: its torchvision is for another torch

    class Metric(nn.Module):  # type: ignore[no-redef]
        """The part of `torchmetrics.Metric` that a metric of this module uses, in one process."""

        update: Callable[..., None]
        compute: Callable[[], Any]

        def __init__(self) -> None:
            super().__init__()
            self._names: list[str] = []
            self._device = torch.get_default_device()

        @property
        def device(self) -> torch.device:
            """Where the metric was moved."""
            return self._device

        def add_state(self, name: str, default: list, dist_reduce_fx: str) -> None:
            """Add a list of tensors that updates add to; `dist_reduce_fx` is for many processes."""
            self._names.append(name)
            setattr(self, name, default)

        def reset(self) -> None:
            """Forget all updates."""
            for name in self._names:
                setattr(self, name, [])

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """Add a batch and return the metric of this batch alone."""
            before = {name: getattr(self, name) for name in self._names}
            self.reset()
            self.update(*args, **kwargs)
            result = self.compute()
            for name, earlier in before.items():
                setattr(self, name, earlier + getattr(self, name))
            return result

        def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
            super()._apply(fn, recurse)
            self._device = fn(torch.zeros(1, device=self._device)).device
            return self


COCO_AREAS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}

# What `LRP` collects, by the names of its states.
_STATES = (
    *(f"detection_{field}" for field in Detections._fields),
    *(f"truth_{field}" for field in Truths._fields),
)

_MEASURES = ("olrp", "olrp_loc", "olrp_fp", "olrp_fn")
_RESULTS = ("thresholds", *_MEASURES, *(f"{measure}_per_class" for measure in _MEASURES))


class LRP(Metric):
    """Localisation-Recall-Precision error (Eq. 6) and its optimum oLRP, by class and on average.

        LRP(s) = (N_FP + N_FN + sum over TP of (1 - IoU) / (1 - tau)) / (N_FP + N_FN + N_TP)

    counts the detections of a class that score at least s. oLRP is its minimum over s, 0 at best
    and 1 at worst, and its components are those at the same s:

        oLRP_loc = mean over TP of 1 - IoU       oLRP_fp = N_FP / (N_TP + N_FP) = 1 - precision
        oLRP_fn = N_FN / (N_TP + N_FN) = 1 - recall

    Means are over the classes in which a value is defined. A class none of whose detections is a
    true positive has oLRP = oLRP_fn = 1, and neither the other components nor a threshold; a class
    without ground truth to be found has no value at all. Both are NaN in the values by class.

    What is true or false is decided as COCO does, see `match_detections`.

    A threshold keeps all detections that score the same, as Eq. 6 says. The authors' code goes
    detection by detection and may stop between two of equal score: where 101 detections score 1
    and the first alone is true, with IoU 17/32, its oLRP at tau 0.5 is 0.9375, and this one is
    (100 + 0.9375) / 101 = 0.9994. Scores of 16 bits are equal more often than those that they were
    rounded from.

    With torchmetrics installed this is a `torchmetrics.Metric`: for a `MetricCollection`, and over
    all ranks of a distributed evaluation. Without, it has `update`, `compute`, `reset` and the call
    that does both for a batch, for a single process.
    Detections are kept until `reset()`, in float64 on the metric's device, whatever device they
    come on and whatever dtype the metric is cast to. That device is the CPU until `.to(device)`,
    and for MPS, which lacks float64, stays it. Under NCCL it has to be each rank's GPU.
    An update or a call that raises leaves all as it was.

    Args:
        tau: the IoU from which a detection counts as true, in [0, 1).
        max_detections: only so many detections of an image and class count, the highest scored.
        areas: further ranges of areas to report, name: (least, largest) in squares of the boxes'
            unit; `COCO_AREAS` has COCO's small, medium and large. The names are identifiers with
            which no two results are called the same ("loc" is none: there is an "olrp_loc").

    Returns:
        from `compute()`, a dict of float64 tensors: "olrp", "olrp_loc", "olrp_fp", "olrp_fn" ();
        "olrp_per_class", "olrp_loc_per_class", "olrp_fp_per_class", "olrp_fn_per_class" and
        "thresholds" (C,), the s of each class at which oLRP is reached (the highest, if several),
        and "classes" (C,) int64, the labels seen, ascending. Of each of `areas` the same (but for
        "classes") with its name behind: "olrp_small", "olrp_per_class_small". All NaN where no
        class has ground truth.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> metric = LRP(tau=0.5)
        >>> preds = [{"boxes": torch.tensor([[0.0, 0, 10, 8], [20, 20, 30, 30]]),
        ...           "scores": torch.tensor([0.9, 0.5]), "labels": torch.tensor([1, 1])}]
        >>> target = [{"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1])}]
        >>> metric.update(preds, target)
        >>> result = metric.compute()
        >>> round(result["olrp"].item(), 6)              # (1 - 0.8) / (1 - 0.5), at s = 0.9
        0.4
        >>> result["thresholds"], result["olrp_fp"].item(), result["olrp_fn"].item()
        (tensor([0.9000], dtype=torch.float64), 0.0, 0.0)
        >>> metric.reset()
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        tau: float = 0.5,
        max_detections: int = 100,
        areas: Mapping[str, tuple[float, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        tau, max_detections = check_tau(tau), check_max_detections(max_detections)
        areas = _check_areas(areas)
        super().__init__(**kwargs)
        self.tau = tau
        self.max_detections = max_detections
        self.areas = areas
        for name in _STATES:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, preds: Sequence[Image], target: Sequence[Image]) -> None:
        """Add detections and ground truth of some images, given as in `match_detections`.

        Each image once, with all that was found in it, also those in which nothing was: what they
        have is missed, and counts.
        """
        found, truths = gather(preds, target, home(self.device))
        self._append((*found, *truths))

    def compute(self) -> dict[str, Tensor]:
        """Return the metric over all images since the last `reset()`: see Returns of the class."""
        empty = [none for part in nothing(home(self.device)) for none in part]
        states = [_joined(*pair) for pair in zip(self._states().values(), empty, strict=True)]
        found = Detections(*states[: len(Detections._fields)])
        truths = Truths(*states[len(Detections._fields) :])
        candidates = find_candidates(found, truths, self.tau, self.max_detections)
        classes = torch.cat([found.labels, truths.labels]).unique()
        result: dict[str, Tensor] = {}
        for name, area in {"": (0.0, math.inf), **self.areas}.items():
            values = optimal_lrp(assign(candidates, area), classes, self.tau)
            for measure in _MEASURES:
                values[f"{measure}_per_class"] = values[measure]
                values[measure] = values[measure].nanmean()
            result |= {_result_name(kind, name): values[kind] for kind in _RESULTS}
        return {**result, "classes": classes}

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Add a batch and return the metric of this batch alone."""
        with self._unchanged_by_errors():
            return super().forward(*args, **kwargs)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the images of all ranks (torchmetrics), also where this one has none."""
        if all(isinstance(parts, list) and not parts for parts in self._states().values()):
            found, truths = nothing(home(self.device))
            self._append((*found, *truths))
        super().sync(*args, **kwargs)

    def merge_state(self, *args: Any, **kwargs: Any) -> None:
        """Add the images of another metric (torchmetrics), of any device."""
        with self._unchanged_by_errors():
            super().merge_state(*args, **kwargs)
            self._place(self._states())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Move what is loaded, if torchmetrics was told to save the states, to the metric."""
        super()._load_from_state_dict(*args, **kwargs)
        self._place(self._states())

    def _wrap_compute(self, compute: Callable) -> Callable:
        """Keep (1,) for a single class, of which torchmetrics would make ()."""
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def shaped() -> dict[str, Tensor]:
            result = wrapped()
            means = {_result_name(m, name) for m in _MEASURES for name in ("", *self.areas)}
            return {k: v if k in means else v.reshape(-1) for k, v in result.items()}

        return shaped

    def _apply(self, fn: Callable, *_: Any, **__: Any) -> LRP:
        """Move the states along, but cast none: float64 is what the sums are exact in."""
        states = self._states()
        with self._unchanged_by_errors():
            self._place(dict.fromkeys(states, ()))
            self._computed = None  # or torchmetrics casts it
            super()._apply(fn)  # not `recurse`, which torchmetrics does not know
            self._place(states)
        return self

    def _states(self) -> dict[str, Any]:
        """Return lists of tensors, or one tensor each after torchmetrics gathered them."""
        return {name: getattr(self, name) for name in _STATES}

    def _append(self, states: Iterable[Tensor]) -> None:
        for parts, values in zip(self._states().values(), states, strict=True):
            parts.append(values)

    def _place(self, states: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
        """Take these for the metric's states, moved to where it is."""
        device = home(self.device)
        for name, parts in states.items():
            if isinstance(parts, Tensor):
                setattr(self, name, parts.to(device))
            else:
                setattr(self, name, [part.to(device) for part in parts])

    @contextlib.contextmanager
    def _unchanged_by_errors(self) -> Iterator[None]:
        # torchmetrics empties lists in place, which the metrics of a collection share, and changes
        # settings of its own for the while.
        before = dict(vars(self))
        lists = [(value, [*value]) for value in before.values() if isinstance(value, list)]
        try:
            yield
        except BaseException:
            vars(self).update(before)
            for value, items in lists:
                value[:] = items
            raise


def _check_areas(areas: Any) -> dict[str, tuple[float, float]]:
    """Return the ranges of areas by name.

    Raise TypeError or ValueError if one is none, or if results clash.
    """
    expected = "areas: expected a dict of name: (least, largest)"
    if areas is None:
        return {}
    if not isinstance(areas, Mapping):
        raise TypeError(f"{expected}, got {type(areas).__name__}")
    names = {_result_name(kind, ""): "" for kind in _RESULTS}
    for area in areas:
        if not isinstance(area, str):
            raise TypeError(f"{expected}, got a name that is {type(area).__name__}")
        if not area.isidentifier():
            raise ValueError(f"{expected}, the names identifiers, got {area!r}")
        for kind in _RESULTS:
            name = _result_name(kind, area)
            if name in names:
                other = f"that of {names[name]!r}" if names[name] else "over all areas"
                raise ValueError(
                    f"areas[{area!r}]: expected a name that gives results names of their own, "
                    f"got {name!r}, which is also a result {other}"
                )
            names[name] = area
    return {name: check_area(f"areas[{name!r}]", area) for name, area in areas.items()}


def _result_name(kind: str, area: str) -> str:
    return f"{kind}_{area}" if area else kind


def optimal_lrp(matches: Matches, classes: Tensor, tau: float) -> dict[str, Tensor]:
    """Return oLRP, its components and thresholds of each class, (C,) float64.

    `classes` are ascending.
    """
    device, num_classes = classes.device, len(classes)
    truth_classes = torch.searchsorted(classes, matches.truth_labels[matches.counted])
    positives = torch.bincount(truth_classes, minlength=num_classes)

    # The detections that count, by class and in descending order of score.
    order = (matches.true | matches.false).nonzero().squeeze(1)
    order = order[sort_within(matches.scores[order], matches.labels[order], descending=True)]
    scores, true = matches.scores[order], matches.true[order]
    label = torch.searchsorted(classes, matches.labels[order])

    # Sums in fixed point are exact: the same in any order, on any device. Below 2^62 in all.
    unit = 2.0 ** min(62 - len(order).bit_length(), 52)
    errors = torch.where(true, 1 - matches.ious[order], 0.0) * unit
    tp = _cumsum_within(true.long(), label)
    fp = _cumsum_within((~true).long(), label)
    loc = _cumsum_within(errors.round().long(), label) / unit
    total = fp + positives[label]  # N_FP + N_FN + N_TP
    lrp = (fp + positives[label] - tp + loc / (1 - tau)) / total

    # A threshold keeps all detections that score the same. Without a true positive LRP is 1.
    ends = (starts(scores) | starts(label)).roll(-1)
    at = (ends & (tp > 0)).nonzero().squeeze(1)
    at = at[sort_within(lrp[at], label[at])]
    at = at[starts(label[at])]  # the least of each class; of several the highest score
    label, tp, fp = label[at], tp[at], fp[at]

    def spread(values: Tensor, otherwise: float) -> Tensor:
        by_class = torch.full((num_classes,), otherwise, dtype=torch.float64, device=device)
        by_class[label] = values
        return by_class.where(positives > 0, math.nan)

    return {
        "olrp": spread(lrp[at].clamp(max=1), 1.0),  # above 1 by a rounding
        "olrp_loc": spread(loc[at] / tp, math.nan),
        "olrp_fp": spread(fp / (tp + fp), math.nan),
        "olrp_fn": spread((positives[label] - tp) / positives[label], 1.0),
        "thresholds": spread(scores[at], math.nan),
    }


def _joined(parts: Tensor | list[Tensor], empty: Tensor) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(parts) if parts else empty


def _cumsum_within(values: Tensor, groups: Tensor) -> Tensor:
    """Return running sums of integers, in float64, for each run of ascending `groups`."""
    sums = values.cumsum(0)
    first = torch.searchsorted(groups, groups)
    return (sums - (sums - values)[first]).double()


def score_iou_correlation(scores: Tensor, ious: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return rho of Tables 2 and 5.

    It is Pearson's correlation of the ranks of scores and IoUs, class by class.

    This is Spearman's rank correlation; equal values share their mean rank. Over which detections
    the paper takes it is not said; the true positives at IoU 0.5 of `match_detections` are meant
    here.

    Args:
        scores: (T,) scores of the true positives, or logits; infinite ones are ranked as such.
        ious: (T,) their IoUs with the ground truth that they match.
        labels: (T,) integer classes, over which the mean is taken; None for a single class.

    Returns:
        () float64 in [-1, 1]: the mean over the classes that have at least two different scores and
        two different IoUs, NaN where none has.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> preds = [{"boxes": torch.tensor([[0.0, 0, 8, 8], [20, 0, 28, 6], [40, 0, 48, 7]]),
        ...           "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([1, 1, 1])}]
        >>> target = [{"boxes": torch.tensor([[0.0, 0, 8, 8], [20, 0, 28, 8], [40, 0, 48, 8]]),
        ...            "labels": torch.tensor([1, 1, 1])}]
        >>> from alrp_triton import match_detections
        >>> matches = match_detections(preds, target)
        >>> scores, ious = matches.scores[matches.true], matches.ious[matches.true]
        >>> score_iou_correlation(scores, ious, matches.labels[matches.true]).item()
        0.5
    """
    classes, num_classes = _check_scored(scores, ious, labels)
    a, b = (_centred_ranks(values, classes, num_classes) for values in (scores, ious))
    zeros = torch.zeros(num_classes, dtype=torch.int64, device=scores.device)
    # In two parts, since the sum of the squares of 3 million ranks passes 2^63.
    products, squares, other_squares = (
        zeros.index_add(0, classes, product >> 20).double() * 2.0**20
        + zeros.index_add(0, classes, product & (2**20 - 1)).double()
        for product in (a * b, a * a, b * b)
    )
    spread = (squares * other_squares).sqrt()
    return (products / spread).where(spread > 0, math.nan).nanmean()


def upper_bound_scores(scores: Tensor, ious: Tensor, labels: Tensor | None = None) -> Tensor:
    """Give the same scores to the true positives of each class in the order of their IoUs.

    The upper bound of Table 5: localisation ranks exactly as classification does, rho is 1. True
    and false positives stand where they stood, so AP at the IoU of the matching stays what it was,
    as long as the detections are not matched anew (two of one object may then change roles).

    Args:
        scores: (T,) as in `score_iou_correlation`, as are the next two.
        ious: (T,) of the same detections.
        labels: (T,) their classes; None if there is but one.

    Returns:
        (T,) scores, of the dtype of `scores`; of equal IoUs the former gets the higher score.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> upper_bound_scores(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.6, 0.8, 0.7]))
        tensor([0.7000, 0.9000, 0.8000])
    """
    return _reordered(scores, ious, labels, descending=True)


def lower_bound_scores(scores: Tensor, ious: Tensor, labels: Tensor | None = None) -> Tensor:
    """Give the same scores to the true positives of each class against the order of their IoUs.

    The lower bound of Table 5: localisation ranks inversely to classification, rho is -1. Arguments
    and result as in `upper_bound_scores`.

    Example:
        >>> lower_bound_scores(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.6, 0.8, 0.7]))
        tensor([0.9000, 0.7000, 0.8000])
    """
    return _reordered(scores, ious, labels, descending=False)


def _reordered(scores: Tensor, ious: Tensor, labels: Tensor | None, descending: bool) -> Tensor:
    classes, _ = _check_scored(scores, ious, labels)
    by_score = sort_within(scores, classes, descending=True)
    by_iou = sort_within(ious, classes, descending)
    result = torch.empty_like(scores)
    result[by_iou] = scores[by_score]
    return result


def _centred_ranks(values: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Return twice the rank of each value within its class, less the mean: integers, int64."""
    order = sort_within(values, classes)
    values, sorted_classes = values[order], classes[order]
    new = starts(values) | starts(sorted_classes)
    ties = new.cumsum(0) - 1
    first = new.nonzero().squeeze(1)
    last = torch.cat([first[1:], first.new_tensor([len(values)])]) - 1
    twice = (first + last)[ties]  # twice the mean place of equal values
    ends = torch.bincount(classes, minlength=num_classes).cumsum(0)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    result = torch.empty_like(twice)
    result[order] = twice - (begins + ends - 1)[sorted_classes]
    return result


def _check_scored(scores: Tensor, ious: Tensor, labels: Tensor | None) -> tuple[Tensor, int]:
    """Return the index of each class among those that occur, and their number; check all three."""
    given = {"scores": scores, "ious": ious} | ({} if labels is None else {"labels": labels})
    for name, values in given.items():
        kind = "labels" if name == "labels" else "scores"
        check_tensor(name, values, kind)
        expected = "(T,)" if name == "scores" else f"{tuple(scores.shape)} like scores"
        if values.dim() != 1 or values.shape != scores.shape:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(values.shape)}")
        if values.device != scores.device:
            raise ValueError(f"{name}: expected on {scores.device}, got {values.device}")
        if values.is_meta:
            raise ValueError(f"{name}: expected on a device that holds numbers, got meta")
        if kind == "scores" and values.isnan().any():
            raise ValueError(f"{name}: expected numbers, got NaN")
    if labels is None:
        return torch.zeros_like(scores, dtype=torch.int64), 1
    values, classes = labels.unique(return_inverse=True)
    return classes, len(values)
