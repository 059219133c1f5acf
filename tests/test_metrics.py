"""Matching, oLRP and rank correlation, held to computations by hand and to plain Python."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import alrp_triton
from alrp_triton import (
    COCO_AREAS,
    LRP,
    lower_bound_scores,
    match_detections,
    matching,
    score_iou_correlation,
    upper_bound_scores,
)

ROOT = Path(__file__).parents[1]
ALL = (0.0, math.inf)
MEASURES = ("olrp", "olrp_loc", "olrp_fp", "olrp_fn")


def detections(*rows) -> dict[str, torch.Tensor]:
    """Of rows (x1, y1, x2, y2, score, label)."""
    table = torch.from_numpy(np.array(rows, dtype=float).reshape(-1, 6))
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


def truths(*rows) -> dict[str, torch.Tensor]:
    """Of rows (x1, y1, x2, y2, label, is a crowd)."""
    table = torch.from_numpy(np.array(rows, dtype=float).reshape(-1, 6))
    return {
        "boxes": table[:, :4],
        "labels": table[:, 4].long(),
        "iscrowd": table[:, 5].bool(),
    }


def evaluate(preds, target, **settings) -> dict[str, torch.Tensor]:
    metric = LRP(**settings)
    metric.update(preds, target)
    return metric.compute()


def random_images(images: int, seed: int = 0, grid: float | None = None, most: int = 12):
    """Detections around the ground truth and elsewhere; rounded to a grid, ties abound."""
    rng = np.random.default_rng(seed)
    preds, target = [], []
    for _ in range(images):
        number = rng.integers(0, most + 1)
        corners = rng.uniform(0, 200, (number, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 150, (number, 2))], 1)
        labels = rng.integers(1, 6, number)
        near = rng.integers(0, number, rng.integers(0, 3 * most) if number else 0)
        found = boxes[near] + rng.normal(0, 8, (len(near), 4))
        elsewhere = rng.uniform(0, 100, (rng.integers(0, most), 2))
        found = np.concatenate(
            [found, np.concatenate([elsewhere, elsewhere + rng.uniform(5, 99)], 1)]
        )
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        given = np.concatenate([labels[near], rng.integers(1, 6, len(elsewhere))])
        scores = rng.uniform(0, 1, len(found))
        if grid is not None:
            boxes, found, scores = boxes // grid * grid, found // grid * grid, scores.round(1)
        preds.append(detections(*np.column_stack([found, scores, given])))
        crowds = rng.uniform(0, 1, number) < 0.15
        target.append(truths(*np.column_stack([boxes, labels, crowds])))
    return preds, target


# --- the same in plain Python ------------------------------------------------------------------


def plain_iou(box, truth, crowd) -> float:
    width = min(box[2], truth[2]) - max(box[0], truth[0])
    height = min(box[3], truth[3]) - max(box[1], truth[1])
    if width <= 0 or height <= 0:
        return 0.0
    own = (box[2] - box[0]) * (box[3] - box[1])
    other = (truth[2] - truth[0]) * (truth[3] - truth[1])
    return width * height / (own if crowd else own + other - width * height)


def plain_area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def plain_match(preds, target, label, tau, area=ALL, most=100, least_score=-math.inf):
    """Of a class, one after the other: IoU of each true positive, number of false ones and of
    ground truths, from the detections that score enough.
    """
    ious, false, positives = [], 0, 0
    for found, truth in zip(preds, target, strict=True):
        rows = [
            (score, box)
            for box, score, own in zip(
                found["boxes"].tolist(),
                found["scores"].tolist(),
                found["labels"].tolist(),
                strict=True,
            )
            if own == label
        ]
        rows = sorted(rows, key=lambda row: -row[0])[:most]
        rows = [(score, box) for score, box in rows if score >= least_score]
        kept = truth["labels"] == label
        boxes, crowds = truth["boxes"][kept].tolist(), truth["iscrowd"][kept].tolist()
        ignored = [
            crowd or not area[0] <= plain_area(box) <= area[1]
            for box, crowd in zip(boxes, crowds, strict=True)
        ]
        positives += ignored.count(False)
        taken = [False] * len(boxes)
        for _, box in rows:
            choices = [
                (not ignored[g], iou, g)
                for g in range(len(boxes))
                if (iou := plain_iou(box, boxes[g], crowds[g])) >= tau and not taken[g]
            ]
            if choices:
                counts, iou, g = max(choices)
                taken[g] = not crowds[g]
                if counts:
                    ious.append(iou)
            elif area[0] <= plain_area(box) <= area[1]:
                false += 1
    return ious, false, positives


def plain_lrp(preds, target, label, tau, area=ALL, most=100):
    """Eq. 6 at every score: oLRP, its components and the threshold, NaN where there is none."""
    scores = {s for found in preds for s in found["scores"][found["labels"] == label].tolist()}
    best = (math.nan, math.nan, math.nan, math.nan, math.nan)
    for score in sorted(scores, reverse=True):
        ious, false, positives = plain_match(preds, target, label, tau, area, most, score)
        if not ious:
            continue
        errors = sum(1 - iou for iou in ious)
        missed = positives - len(ious)
        lrp = (false + missed + errors / (1 - tau)) / (false + positives)
        if not lrp >= best[0] - 1e-13:
            best = (
                lrp,
                errors / len(ious),
                false / (false + len(ious)),
                missed / positives,
                score,
            )
    if math.isnan(best[0]) and plain_match(preds, target, label, tau, area, most)[2]:
        return 1.0, math.nan, math.nan, 1.0, math.nan
    return best


def check_against_plain_python(preds, target, tau, area=ALL, most=100) -> None:
    result = evaluate(preds, target, tau=tau, max_detections=most, areas={"part": area})
    expected = [
        plain_lrp(preds, target, label, tau, area, most) for label in result["classes"].tolist()
    ]
    table = np.array(expected).reshape(-1, 5)
    for measure, column in zip((*MEASURES, "thresholds"), table.T, strict=True):
        name = "thresholds" if measure == "thresholds" else f"{measure}_per_class"
        np.testing.assert_allclose(result[f"{name}_part"], column, rtol=0, atol=1e-12)
        if measure in MEASURES:
            mean = column[~np.isnan(column)].mean() if (~np.isnan(column)).any() else math.nan
            assert result[f"{measure}_part"].item() == pytest.approx(mean, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("area", [ALL, (1000.0, 8000.0)], ids=["all", "medium"])
def test_random_images_against_plain_python(tau, area):
    check_against_plain_python(*random_images(12, seed=3), tau, area)


@pytest.mark.parametrize("most", [1, 3])
def test_few_detections_of_an_image_and_class(most):
    check_against_plain_python(*random_images(12, seed=4), 0.5, most=most)


coordinate = st.integers(0, 6)
box = st.tuples(coordinate, coordinate, st.integers(1, 4), st.integers(1, 4)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
detection = st.tuples(box, st.integers(0, 4), st.integers(0, 1)).map(lambda d: (*d[0], *d[1:]))
truth = st.tuples(box, st.integers(0, 1), st.sampled_from([0, 0, 0, 1])).map(
    lambda t: (*t[0], *t[1:])
)
image = st.tuples(st.lists(detection, max_size=6), st.lists(truth, max_size=5))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(image, max_size=3),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.sampled_from([ALL, (2.0, 6.0), (0.0, 4.0)]),
    st.sampled_from([1, 2, 100]),
)
def test_ties_of_scores_and_ious_against_plain_python(images, tau, area, most):
    preds = [detections(*found) for found, _ in images]
    target = [truths(*known) for _, known in images]
    check_against_plain_python(preds, target, tau, area, most)


# --- by hand -----------------------------------------------------------------------------------

# IoU of an (w x 10) part of a 10 x 10 box is w / 10.
BY_HAND = (
    [
        detections(
            (0, 0, 9, 10, 0.9, 1),  # IoU 0.9 with the first object of class 1
            (0, 0, 8, 10, 0.8, 1),  # IoU 0.8 with the same, which is taken: false
            (20, 0, 27, 10, 0.7, 1),  # IoU 0.7 with the second
            (60, 60, 70, 70, 0.3, 1),  # false
            (0, 0, 10, 10, 0.9, 5),  # no object of class 5
        ),
        detections((0, 0, 6, 10, 0.2, 2), (40, 0, 45, 10, 0.95, 2), (50, 0, 60, 10, 0.9, 2)),
    ],
    [
        truths((0, 0, 10, 10, 1, 0), (20, 0, 30, 10, 1, 0), (40, 40, 50, 50, 1, 0)),
        truths((0, 0, 10, 10, 2, 0), (40, 0, 70, 10, 2, 1), (0, 0, 10, 10, 3, 0)),
    ],
)


def test_by_hand():
    """Class 1, three objects, by threshold (the last is no better than the third):

        s    TP  FP  FN   sum of (1 - IoU) / 0.5     LRP
        0.9   1   0   2   0.2                        2.2 / 3 = 0.7333
        0.8   1   1   2   0.2                        3.2 / 4 = 0.8
        0.7   2   1   1   0.2 + 0.6 = 0.8            2.8 / 4 = 0.7
        0.3   2   2   1   0.8                        3.8 / 5 = 0.76

    Class 2: both detections in the crowd do not count; IoU 0.6, LRP = 0.8 / 1.
    Class 3: no detection, LRP = 1. Class 5: no object, no value.
    """
    result = evaluate(*BY_HAND)
    expected = {
        "classes": [1, 2, 3, 5],
        "olrp_per_class": [0.7, 0.8, 1, math.nan],
        "olrp_loc_per_class": [0.2, 0.4, math.nan, math.nan],
        "olrp_fp_per_class": [1 / 3, 0, math.nan, math.nan],
        "olrp_fn_per_class": [1 / 3, 0, 1, math.nan],
        "thresholds": [0.7, 0.2, math.nan, math.nan],
        "olrp": 2.5 / 3,
        "olrp_loc": 0.3,
        "olrp_fp": 1 / 6,
        "olrp_fn": 4 / 9,
    }
    assert set(result) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(result[name], values, rtol=1e-14, err_msg=name)
        assert result[name].dtype == (torch.int64 if name == "classes" else torch.float64)


def test_fig_1():
    """The ten anchors of Fig. 1 as detections of five objects: LRP at the fourth is the least."""
    result = evaluate(
        [
            detections(
                *((20 * i, 0, 20 * i + 20 * iou, 10, 1 - i / 10, 0) for i, iou in FIG_1.items())
            )
        ],
        [truths(*((20 * i, 0, 20 * i + 20, 10, 0, 0) for i in (0, 2, 5, 9, 10)))],
    )
    # At 0.5: 3 TP with errors 0.1 + 0.4 + 0.7, 3 FP, 2 FN. At 0.8: 2 TP, 1 FP, 3 FN: 4.5 / 6.
    # At 1.0: 1 TP, 4 FN: 4.1 / 5. At 0.1: 4 TP, 6 FP, 1 FN: 9.2 / 11.
    assert result["olrp"].item() == pytest.approx(4.5 / 6)
    assert result["thresholds"].tolist() == [pytest.approx(0.8)]


FIG_1 = {0: 0.95, 1: 0.01, 2: 0.8, 3: 0.01, 4: 0.01, 5: 0.65, 6: 0.01, 7: 0.01, 8: 0.01, 9: 0.5}


def test_a_threshold_keeps_all_that_score_the_same():
    """A false and a true positive at the same score: no threshold has the one without the other."""
    wrong, right = (50, 50, 60, 60, 0.5, 0), (0, 0, 10, 10, 0.5, 0)
    target = [truths((0, 0, 10, 10, 0, 0))]
    for rows in ((wrong, right), (right, wrong)):
        result = evaluate([detections(*rows)], target)
        assert result["olrp"].item() == 0.5
        assert result["olrp_fp"].item() == 0.5


def test_olrp_stays_at_1():
    """True positives that are as bad as can be; (1 - tau) / (1 - tau) rounded is not in the way."""
    for tau, width in ((0.7, 7), (0.9, 9), (0.3, 3)):
        result = evaluate(
            [detections((0, 0, width, 10, 0.5, 0), (50, 50, 51, 51, 0.9, 0))],
            [truths((0, 0, 10, 10, 0, 0))],
            tau=tau,
        )
        assert result["olrp"].item() == pytest.approx(1)
        assert result["olrp"].item() <= 1
        assert result["thresholds"].tolist() == [0.5]
        assert result["olrp_loc"].item() == pytest.approx(1 - tau)


def test_areas_have_the_ground_truths_own_area():
    preds, target = [detections((0, 0, 50, 50, 0.5, 0))], [truths((0, 0, 50, 50, 0, 0))]
    of_box = evaluate(preds, target, areas=COCO_AREAS)
    assert of_box["olrp_medium"].item() == 0
    assert math.isnan(of_box["olrp_small"].item())
    outline = evaluate(preds, [target[0] | {"area": torch.tensor([900.0])}], areas=COCO_AREAS)
    assert outline["olrp_small"].item() == 0
    assert math.isnan(outline["olrp_medium"].item())
    assert outline["olrp"].item() == 0
    edge = evaluate(preds, [target[0] | {"area": torch.tensor([1024.0])}], areas=COCO_AREAS)
    assert edge["olrp_small"].item() == edge["olrp_medium"].item() == 0  # both ends are included


def test_matches_are_in_the_order_given():
    matches = match_detections(*BY_HAND)
    assert matches.true.tolist() == [True, False, True, False, False, True, False, False]
    assert matches.false.tolist() == [False, True, False, True, True, False, False, False]
    np.testing.assert_allclose(matches.ious, [0.9, 0, 0.7, 0, 0, 0.6, 1, 1])
    assert matches.labels.tolist() == [1, 1, 1, 1, 5, 2, 2, 2]
    assert matches.counted.tolist() == [True, True, True, True, False, True]
    assert matches.truth_labels.tolist() == [1, 1, 1, 2, 2, 3]


# --- updates -----------------------------------------------------------------------------------


def assert_same(one: dict, two: dict) -> None:
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_several_updates_are_one():
    preds, target = random_images(9)
    together = evaluate(preds, target, areas=COCO_AREAS)
    metric = LRP(areas=COCO_AREAS)
    for part in (slice(0, 1), slice(1, 6), slice(6, 6), slice(6, 9)):
        metric.update(preds[part], target[part])
    assert_same(metric.compute(), together)
    metric.reset()
    metric.update(*random_images(3, seed=8))
    assert_same(metric.compute(), evaluate(*random_images(3, seed=8), areas=COCO_AREAS))


def test_a_call_returns_the_batch_and_adds_it():
    preds, target = random_images(6)
    metric = LRP()
    for part in (slice(0, 2), slice(2, 6)):
        assert_same(metric(preds[part], target[part]), evaluate(preds[part], target[part]))
    assert_same(metric.compute(), evaluate(preds, target))


def test_the_order_of_images_detections_and_ground_truths_does_not_matter():
    """To the last bit, where no scores and no IoUs are equal."""
    preds, target = random_images(9, seed=1)
    expected = evaluate(preds, target, areas=COCO_AREAS)
    shuffled = np.random.default_rng(0)
    for _ in range(3):
        images = shuffled.permutation(len(preds))
        mixed = [
            [
                {name: values[order] for name, values in image.items()}
                for image in (part[i] for i in images)
                for order in [torch.from_numpy(shuffled.permutation(len(image["labels"])))]
            ]
            for part in (preds, target)
        ]
        assert_same(evaluate(*mixed, areas=COCO_AREAS), expected)


def test_parts_of_the_pairs_do_not_matter(monkeypatch):
    preds, target = random_images(9, seed=2, grid=10)
    expected = match_detections(preds, target, 0.2)
    for at_once in (1, 7, 100):
        monkeypatch.setattr(matching, "PAIRS_AT_ONCE", at_once)
        for got, whole in zip(match_detections(preds, target, 0.2), expected, strict=True):
            assert torch.equal(got, whole)


def test_nothing_at_all():
    for metric in (LRP(), LRP()):
        metric.update([], [])
        result = metric.compute()
        assert all(math.isnan(result[name].item()) for name in MEASURES)
        assert result["olrp_per_class"].shape == result["classes"].shape == (0,)


def test_no_detections_or_no_ground_truth():
    nothing = {"boxes": torch.tensor([]), "labels": torch.tensor([], dtype=torch.int64)}
    no_detections = nothing | {"scores": torch.tensor([])}
    one = [truths((0, 0, 9, 9, 4, 0))]
    result = evaluate([no_detections], one)
    assert (result["olrp"].item(), result["olrp_fn"].item()) == (1, 1)
    assert math.isnan(result["olrp_loc"].item())
    assert math.isnan(result["olrp_fp"].item())
    result = evaluate([detections((0, 0, 9, 9, 0.5, 4))], [nothing])
    assert math.isnan(result["olrp"].item())
    assert result["classes"].tolist() == [4]
    # A missed object in an image without detections counts as in any other.
    more = evaluate([detections((0, 0, 9, 9, 0.5, 4)), no_detections], one * 2)
    assert (more["olrp"].item(), more["olrp_fn"].item()) == (0.5, 0.5)


def test_dtypes_and_strides():
    preds, target = random_images(4, seed=5, grid=4)
    expected = evaluate(preds, target)
    for dtype in (torch.float32, torch.float16):
        converted = [
            {
                "boxes": found["boxes"].to(dtype).t().contiguous().t(),
                "scores": found["scores"].float().requires_grad_(),
                "labels": found["labels"].int(),
            }
            for found in preds
        ]
        got = evaluate(converted, [t | {"boxes": t["boxes"].long()} for t in target])
        np.testing.assert_array_equal(got["olrp_per_class"], expected["olrp_per_class"])
        assert not got["olrp"].requires_grad


GOOD = {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2).long(), "scores": torch.zeros(2)}


@pytest.mark.parametrize(
    ("preds", "target", "error", "message"),
    [
        (GOOD, [GOOD], TypeError, r"preds: expected a list of dicts, got dict"),
        ([GOOD], [], ValueError, r"target: expected 1 images like preds, got 0"),
        ([GOOD["boxes"]], [GOOD], TypeError, r"preds\[0\]: expected a dict of tensors"),
        ([{"boxes": GOOD["boxes"]}], [GOOD], ValueError, r"preds\[0\]: expected the key 'scores'"),
        ([GOOD], [GOOD | {"boxes": torch.zeros(2, 5)}], ValueError, r"target\[0\]\['boxes'\]"),
        ([GOOD | {"boxes": [[0] * 4] * 2}], [GOOD], TypeError, r"\['boxes'\].*got list"),
        ([GOOD | {"scores": torch.zeros(3)}], [GOOD], ValueError, r"\['scores'\].*\(2,\).*\(3,\)"),
        ([GOOD | {"scores": torch.zeros(2).int()}], [GOOD], TypeError, r"\['scores'\].*int32"),
        ([GOOD | {"labels": torch.zeros(2)}], [GOOD], TypeError, r"\['labels'\].*float32"),
        ([GOOD], [GOOD | {"labels": torch.ones(2).bool()}], TypeError, r"\['labels'\].*bool"),
        ([GOOD], [GOOD | {"iscrowd": torch.zeros(2)}], TypeError, r"\['iscrowd'\].*float32"),
        ([GOOD], [GOOD | {"iscrowd": torch.zeros(1).int()}], ValueError, r"\['iscrowd'\]"),
        ([GOOD], [GOOD | {"area": torch.zeros(2, 1)}], ValueError, r"target\[0\]\['area'\]"),
        ([GOOD | {"scores": torch.zeros(2, device="meta")}], [GOOD], ValueError, "on cpu.*meta"),
    ],
)
def test_wrong_input_is_named(preds, target, error, message):
    metric = LRP()
    with pytest.raises(error, match=message):
        metric.update(preds, target)
    with pytest.raises(error, match=message):
        match_detections(preds, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, t: p["scores"].fill_(math.nan), "preds: scores"),
        (lambda p, t: p["boxes"].fill_(math.nan), "preds: boxes"),
        (lambda p, t: t["boxes"].fill_(math.inf), "target: boxes"),
    ],
)
def test_nan_is_never_a_plausible_number(change, message):
    preds, target = ({name: values.clone() for name, values in part[0].items()} for part in BY_HAND)
    change(preds, target)
    metric = LRP()
    metric.update([preds], [target])
    with pytest.raises(ValueError, match=message):
        metric.compute()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"tau": 1.0}, "tau"),
        ({"tau": math.nan}, "tau"),
        ({"max_detections": 0}, "max_detections"),
        ({"areas": {"odd": (2.0, 1.0)}}, r"areas\['odd'\]"),
    ],
)
def test_wrong_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        LRP(**settings)


# --- other implementations ---------------------------------------------------------------------


def average_precision(matches: matching.Matches, points: int = 101) -> float:
    """COCO's: precision made monotone, at evenly spaced recalls, mean over classes."""
    values = []
    for label in matches.truth_labels[matches.counted].unique():
        positives = int((matches.truth_labels[matches.counted] == label).sum())
        seen = (matches.labels == label) & (matches.true | matches.false)
        order = matches.scores[seen].argsort(stable=True, descending=True)
        true = matches.true[seen][order].double().cumsum(0)
        precision = true / torch.arange(1, len(true) + 1)
        precision = precision.flip(0).cummax(0).values.flip(0) if len(true) else precision
        at = np.searchsorted((true / positives).numpy(), np.linspace(0, 1, points))
        values.append(np.append(precision.numpy(), 0.0)[np.minimum(at, len(true))].mean())
    return float(np.mean(values))


def coco_evaluation(preds, target):
    faster_coco_eval = pytest.importorskip("faster_coco_eval")

    def rows(images, field):
        for i, image in enumerate(images):
            for n, (x1, y1, x2, y2) in enumerate(image["boxes"].tolist()):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                of_image = {"image_id": i, "category_id": int(image["labels"][n])}
                yield {**box, **of_image, field: image[field + "s" * (field == "score")][n].item()}

    dataset = {
        "images": [{"id": i} for i in range(len(preds))],
        "categories": [{"id": label} for label in range(1, 6)],
        "annotations": [
            {**row, "iscrowd": int(row["iscrowd"]), "id": i + 1}
            for i, row in enumerate(rows(target, "iscrowd"))
        ],
    }
    ground_truth = faster_coco_eval.COCO(dataset)
    found = ground_truth.loadRes([*rows(preds, "score")])
    coco = faster_coco_eval.COCOeval_faster(ground_truth, found, "bbox")
    coco.evaluate()
    coco.accumulate()
    return coco


@pytest.mark.parametrize("grid", [None, 4], ids=["distinct", "ties"])
def test_average_precision_is_cocos(grid):
    """At three IoUs and in all ranges of areas, as faster-coco-eval finds it."""
    preds, target = random_images(40, seed=6, grid=grid)
    precision = coco_evaluation(preds, target).eval["precision"]  # IoU, recall, class, area, most
    for row, tau in ((0, 0.5), (5, 0.75), (8, 0.9)):
        for column, area in enumerate([ALL, *COCO_AREAS.values()]):
            expected = precision[row, :, :, column, -1]
            matches = match_detections(preds, target, tau, area=area)
            assert average_precision(matches) == pytest.approx(
                expected[expected > -1].mean(), abs=1e-12
            )


@pytest.mark.skipif("ALRP_COCO100" not in os.environ, reason="ALRP_COCO100: folder with the data")
def test_the_authors_figures_on_coco():
    """oLRP of the COCO API's fake detections, as the authors give it, to every digit shown.

    All four come out over the 99 images with detections. Image 1063 has one object and none, and
    with it oLRP is 0.501, so their figures seem to leave it out. AP50 of all 100 images is 0.697.
    """
    folder = Path(os.environ["ALRP_COCO100"])
    annotations = json.loads((folder / "annotations.json").read_text())
    results = json.loads((folder / "fakebbox_results.json").read_text())
    images = {image["id"]: ([], []) for image in annotations["images"]}
    for row in results:
        images[row["image_id"]][0].append((*row["bbox"], row["score"], row["category_id"]))
    for row in annotations["annotations"]:
        images[row["image_id"]][1].append((*row["bbox"], row["category_id"], row["iscrowd"]))
    assert len(images) == 100

    def loaded(make, rows):
        image = make(*rows)
        image["boxes"][:, 2:] += image["boxes"][:, :2]
        return image

    seen = [rows for rows in images.values() if rows[0]]
    for chosen, figures in (
        (seen, [0.499, 0.133, 0.127, 0.229]),
        (images.values(), [0.501, 0.133, 0.127, 0.231]),
    ):
        preds = [loaded(detections, rows) for rows, _ in chosen]
        target = [loaded(truths, rows) for _, rows in chosen]
        result = evaluate(preds, target)
        assert [round(result[name].item(), 3) for name in MEASURES] == figures
    assert round(average_precision(match_detections(preds, target)), 3) == 0.697


# --- rank correlation and the bounds of Table 5 ------------------------------------------------


def random_positives(number=200, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores, ious = torch.rand(2, number, generator=generator, dtype=torch.float64)
    if ties:
        scores, ious = (scores * 9).round() / 9, (ious * 5).round() / 5
    return scores, ious, torch.randint(7, (number,), generator=generator)


@pytest.mark.parametrize("ties", [False, True])
def test_correlation_is_spearmans(ties):
    stats = pytest.importorskip("scipy.stats")
    scores, ious, labels = random_positives(ties=ties)
    expected = [
        stats.spearmanr(scores[labels == label], ious[labels == label]).statistic
        for label in labels.unique()
    ]
    rho = score_iou_correlation(scores, ious, labels)
    assert rho.item() == pytest.approx(np.mean(expected), abs=1e-14)
    of_one = score_iou_correlation(scores.float(), ious, None)
    assert of_one.item() == pytest.approx(stats.spearmanr(scores, ious).statistic, abs=1e-14)


def test_correlation_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert score_iou_correlation(scores, torch.tensor([0.9, 0.6, 0.8, 0.7])).item() == 0.4
    assert score_iou_correlation(scores, -scores).item() == -1
    # Class 3 has one positive, class 4 two with the same IoU: only class 0 counts.
    scores, ious = torch.tensor([0.9, 0.8, 0.5, 0.4, 0.3]), torch.tensor([0.6, 0.7, 0.5, 0.8, 0.8])
    labels = torch.tensor([0, 0, 3, 4, 4])
    assert score_iou_correlation(scores, ious, labels).item() == -1
    for none in (slice(0, 0), slice(2, 3), slice(3, 5)):
        assert math.isnan(score_iou_correlation(scores[none], ious[none], labels[none]).item())


def test_correlation_of_many_is_exact():
    scores = torch.rand(1_000_000, dtype=torch.float64)
    assert score_iou_correlation(scores, scores * 2).item() == 1
    assert score_iou_correlation(scores, -scores).item() == -1


def test_the_bounds_of_table_5():
    scores, ious, labels = random_positives()
    upper = upper_bound_scores(scores, ious, labels)
    lower = lower_bound_scores(scores, ious, labels)
    assert score_iou_correlation(upper, ious, labels).item() == 1
    assert score_iou_correlation(lower, ious, labels).item() == -1
    for label in labels.unique():
        own = labels == label
        for bound in (upper, lower):
            assert torch.equal(bound[own].sort().values, scores[own].sort().values)
    assert torch.equal(
        upper_bound_scores(scores, ious), scores.sort().values[ious.argsort().argsort()]
    )


def test_the_bounds_keep_ap50_and_bound_ap75():
    """Without matching anew, as in Table 5: AP50 stays what it is, AP75 lies between the bounds."""
    matches = match_detections(*random_images(60, seed=7))
    true = matches.true
    good = true & (matches.ious >= 0.75)
    bad = (true & ~good) | matches.false
    precisions = []
    for bound in (lower_bound_scores, lambda scores, *_: scores, upper_bound_scores):
        scores = matches.scores.clone()
        scores[true] = bound(scores[true], matches.ious[true], matches.labels[true])
        moved = matches._replace(scores=scores)
        assert average_precision(moved) == pytest.approx(average_precision(matches), abs=1e-12)
        precisions.append(average_precision(moved._replace(true=good, false=bad)))
    assert precisions == sorted(precisions)
    assert len(set(precisions)) == 3


@pytest.mark.parametrize(
    "function", [score_iou_correlation, upper_bound_scores, lower_bound_scores]
)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.5], torch.zeros(1)), TypeError, "scores: expected a floating tensor, got list"),
        ((torch.zeros(1), torch.zeros(1).int()), TypeError, "ious: expected a floating tensor"),
        ((torch.zeros(1, 1), torch.zeros(1)), ValueError, r"scores: expected shape \(T,\)"),
        ((torch.zeros(2), torch.zeros(1)), ValueError, r"ious: expected shape \(2,\) like scores"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2)), TypeError, "labels: expected an int"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(1).int()), ValueError, "labels: expected"),
        ((torch.zeros(1) / 0, torch.zeros(1)), ValueError, "scores: expected numbers, got NaN"),
    ],
)
def test_wrong_positives_are_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


# --- size, torchmetrics ------------------------------------------------------------------------


def test_coco_sized_in_under_a_minute():
    """5000 images of 100 detections each, in all ranges of areas."""
    rng = np.random.default_rng(0)
    preds, target = [], []
    for _ in range(5000):
        corners = rng.uniform(0, 500, (7, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 150, (7, 2))], 1)
        labels = rng.integers(0, 80, 7)
        near = rng.integers(0, 7, 100)
        found = boxes[near] + rng.normal(0, 5, (100, 4))
        preds.append(detections(*np.column_stack([found, rng.uniform(0, 1, 100), labels[near]])))
        target.append(truths(*np.column_stack([boxes, labels, np.zeros(7)])))
    start = time.perf_counter()
    result = evaluate(preds, target, areas=COCO_AREAS)
    assert time.perf_counter() - start < 60
    assert 0 < result["olrp"].item() < 1


def run_fresh(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_without_torchmetrics():
    """The same numbers and the same calls, in a process that cannot import it."""
    process = run_fresh(
        """
        import sys
        sys.modules["torchmetrics"] = None
        from tests.test_metrics import *
        metric = LRP(areas=COCO_AREAS)
        assert type(metric).__mro__[1].__module__ == "alrp_triton.metrics"
        test_several_updates_are_one()
        test_a_call_returns_the_batch_and_adds_it()
        test_by_hand()
        test_nothing_at_all()
        before = evaluate(*random_images(2))
        metric = LRP()
        metric(*random_images(2))
        try:
            metric([GOOD["boxes"]], [GOOD])
        except TypeError:
            assert_same(metric.compute(), before)  # a batch that is refused changes nothing
        print(before["olrp"].item())
        """
    )
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert float(printed) == evaluate(*random_images(2))["olrp"].item()


def test_in_a_metric_collection():
    torchmetrics = pytest.importorskip("torchmetrics")
    preds, target = random_images(5)
    collection = torchmetrics.MetricCollection({"usual": LRP(), "strict": LRP(tau=0.75)})
    collection.update(preds, target)
    result = collection.compute()
    for tau in (0.5, 0.75):
        values = [value.item() for name, value in result.items() if name.endswith("olrp")]
        assert evaluate(preds, target, tau=tau)["olrp"].item() in values
    metric = LRP()
    assert isinstance(metric, torchmetrics.Metric)
    metric.update(preds[:2], target[:2])
    again = pickle.loads(pickle.dumps(metric))
    again.update(preds[2:], target[2:])
    assert_same(again.compute(), evaluate(preds, target))


@pytest.mark.parametrize("first", [0, 2, 5])
def test_states_of_two_metrics_merge(first):
    """Also where one of them has seen nothing, and after a move or a copy."""
    pytest.importorskip("torchmetrics")
    preds, target = random_images(5, seed=9)
    metric, other = LRP(areas=COCO_AREAS), LRP(areas=COCO_AREAS)
    for part, images in ((metric, slice(0, first)), (other, slice(first, 5))):
        if preds[images]:
            part.update(preds[images], target[images])
    metric.merge_state(other)
    assert_same(metric.compute(), evaluate(preds, target, areas=COCO_AREAS))
    assert_same(metric.to("cpu").clone().compute(), metric.compute())


def test_one_class_keeps_its_dimension():
    result = evaluate([detections((0, 0, 9, 9, 0.5, 4))], [truths((0, 0, 9, 9, 4, 0))])
    assert result["olrp"].shape == ()
    assert all(result[name].shape == (1,) for name in result if name not in MEASURES)


def test_over_ranks(tmp_path):
    """Of three processes two see 2 and 3 images and one none: all compute what one would."""
    pytest.importorskip("torchmetrics")
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    ranks = [
        run_fresh(
            """
            import sys
            import torch.distributed as dist
            from tests.test_metrics import *
            rank, file = int(sys.argv[1]), sys.argv[2]
            dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
            preds, target = random_images(5, seed=9)
            metric = LRP(areas=COCO_AREAS)
            own = [slice(0, 2), slice(2, 5), None][rank]
            if own:
                metric.update(preds[own], target[own])
            result = metric.compute()
            print([result[name].tolist() for name in ("olrp", "olrp_small", "thresholds")])
            dist.destroy_process_group()
            """,
            str(rank),
            str(tmp_path / "rendezvous"),
        )
        for rank in range(3)
    ]
    expected = evaluate(*random_images(5, seed=9), areas=COCO_AREAS)
    for process in ranks:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert printed.strip() == str(
            [expected[name].tolist() for name in ("olrp", "olrp_small", "thresholds")]
        )


def test_metrics_are_loaded_when_asked_for():
    process = run_fresh(
        """
        import sys, alrp_triton
        print("torchmetrics" in sys.modules, "alrp_triton.metrics" in sys.modules)
        print(alrp_triton.LRP.__name__)
        """
    )
    printed, _ = process.communicate(timeout=300)
    assert printed.split() == ["False", "False", "LRP"]
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = alrp_triton.nothing


@pytest.mark.gpu
def test_on_a_gpu():
    """The same numbers, also where only deterministic algorithms are allowed."""
    images = random_images(9, seed=10, grid=4)
    on_gpu = [[{k: v.cuda() for k, v in image.items()} for image in part] for part in images]
    torch.use_deterministic_algorithms(True)
    try:
        metric = LRP(areas=COCO_AREAS)
        metric.update(*on_gpu)
        result = metric.compute()
        matches = match_detections(*on_gpu)
        true = [part[matches.true] for part in (matches.scores, matches.ious, matches.labels)]
        rho, bound = score_iou_correlation(*true), upper_bound_scores(*true)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, values in evaluate(*images, areas=COCO_AREAS).items():
        assert result[name].is_cuda
        np.testing.assert_allclose(result[name].cpu(), values, rtol=1e-14)
    on_cpu = [part.cpu() for part in true]
    assert rho.item() == score_iou_correlation(*on_cpu).item()
    assert torch.equal(bound.cpu(), upper_bound_scores(*on_cpu))
