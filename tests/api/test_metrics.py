"""Matching, oLRP and rank correlation, held to computations by hand and to plain Python."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import alrp_triton
from alrp_triton import (
    COCO_AREAS,
    LRP,
    lower_bound_scores,
    match_detections,
    matching,
    metrics,
    score_iou_correlation,
    upper_bound_scores,
)

ROOT = Path(__file__).parents[2]
ALL = (0.0, math.inf)
MEASURES = ("olrp", "olrp_loc", "olrp_fp", "olrp_fn")


def detections(*rows) -> dict[str, torch.Tensor]:
    """Make detections of rows (x1, y1, x2, y2, score, label)."""
    table = torch.from_numpy(np.array(rows, dtype=float).reshape(-1, 6))
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


def truths(*rows) -> dict[str, torch.Tensor]:
    """Make ground truth of rows (x1, y1, x2, y2, label, is a crowd)."""
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
    """Draw detections around the ground truth and elsewhere; rounded to a grid, ties abound."""
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
    """Match a class, one detection after the other.

    Returns:
        The IoU of each true positive, the number of false ones and of ground truths, from the
        detections that score enough.
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
    """Evaluate Eq. 6 at every score.

    Returns:
        oLRP, its components and the threshold, NaN where there is none.
    """
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


def test_a_tie_of_101_is_one_threshold():
    """100 false ones score what the only true one scores, whose error at IoU 17/32 is 15/16.

    Detection by detection one could stop after the first, at 15/16.
    """
    right, wrong = (0, 0, 17, 10, 1, 0), [(50, 50, 60, 60, 1, 0)] * 100
    target = [truths((0, 0, 32, 10, 0, 0))]
    tied = evaluate([detections(right, *wrong)], target, max_detections=101)
    assert tied["olrp"].item() == (100 + 15 / 16) / 101
    assert tied["thresholds"].tolist() == [1]
    below = [(*box[:4], 0.999, 0) for box in wrong]
    apart = evaluate([detections(right, *below)], target, max_detections=101)
    assert apart["olrp"].item() == 15 / 16
    # bfloat16 has 8 bits: 0.999 is 1 there.
    rounded = detections(right, *below)
    rounded["scores"] = rounded["scores"].bfloat16()
    assert_same(evaluate([rounded], target, max_detections=101), tied)


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
    """Results are equal to the last bit, where no scores and no IoUs are equal."""
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
TRUTH = {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2).long()}
TRUTH |= {"iscrowd": torch.zeros(2).long(), "area": torch.zeros(2)}


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
    ("part", "key", "value", "message"),
    [
        ("preds", "scores", math.nan, r"preds[1]['scores']: expected a number, got nan for box 1"),
        ("preds", "boxes", math.nan, "preds[1]['boxes']: expected finite numbers up to 2^500, got"),
        ("preds", "boxes", -math.inf, "preds[1]['boxes']: expected finite numbers up to 2^500"),
        ("preds", "boxes", 1e200, "preds[1]['boxes']: expected finite numbers up to 2^500"),
        ("target", "boxes", math.inf, "target[1]['boxes']: expected finite numbers"),
        ("target", "boxes", math.nan, "target[1]['boxes']: expected finite numbers"),
        ("target", "iscrowd", 7, "target[1]['iscrowd']: expected 0 or 1, got 7 for box 1"),
        ("target", "iscrowd", -1, "target[1]['iscrowd']: expected 0 or 1, got -1 for box 1"),
        ("target", "area", -1.0, "target[1]['area']: expected a finite number, not negative, got"),
        ("target", "area", math.nan, "target[1]['area']: expected a finite number, not negative"),
        ("target", "area", math.inf, "target[1]['area']: expected a finite number, not negative"),
    ],
)
def test_numbers_that_mean_nothing_are_named_when_they_come(part, key, value, message):
    """An error names image and box, before anything is added; the first image has none."""
    nothing = {name: torch.tensor([]) for name in GOOD}
    wrong = {name: values.clone() for name, values in (GOOD | TRUTH).items()}
    wrong[key] = wrong[key].double() if wrong[key].is_floating_point() else wrong[key]
    wrong[key][1] = value
    images = {"preds": [nothing, GOOD], "target": [nothing, TRUTH]} | {part: [nothing, wrong]}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        match_detections(**images)
    assert " for box 1" in str(error.value)
    metric = LRP()
    metric.update(*BY_HAND)
    for call in (metric.update, metric):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**images)
    assert_same(metric.compute(), evaluate(*BY_HAND))


def test_an_update_waits_for_the_device_once():
    """It does so however many images it has."""

    def waits(images: int) -> int:
        preds, target = random_images(images, seed=11)
        return count_operators(lambda: LRP().update(preds, target), "aten._local_scalar_dense")

    assert waits(1) == waits(40) == 1


WRONG_SETTINGS = {
    "tau": [
        None,
        "0.5",
        math.nan,
        math.inf,
        -0.1,
        1,
        10**400,
        -(10**400),
        True,
        0.5j,
        [0.5],
        torch.tensor(0.5),
        np.array(0.5),
        object(),
    ],
    "max_detections": [
        "3",
        None,
        True,
        0,
        -1,
        -(10**400),
        1.5,
        100.0,
        math.inf,
        math.nan,
        [1],
        torch.tensor(3),
        object(),
    ],
}
WRONG_AREAS = [None, 3, "ab", b"ab", (), (1,), (1, 2, 3), (2, 1), (-1, 2), (math.nan, 1)]
WRONG_AREAS += [(0, math.nan), ("0", "1"), (None, 1), (True, 2), torch.tensor([0.0, 1]), {0, 1}]
WRONG_AREAS += [np.array([0.0, 1]), (10**400, 0), (torch.tensor(0.0), 1), iter((0, 1))]
CLASHES = ["loc", "fp", "fn", "per_class", "loc_per_class", "fp_per_class"]
WRONG_NAMES = ["", " ", "a b", "1", "a-b", 3, None, (0, 1), *CLASHES]


def assert_form(name: str, call) -> None:
    """Check that a call raises, and says which argument, what was expected and what came."""
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert re.match(re.escape(name) + r"[^:]*: expected .+, got .+", str(error.value)), error.value


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, bad in WRONG_SETTINGS.items() for value in bad],
    ids=lambda value: str(value)[:20],
)
def test_wrong_settings_are_named(name, value):
    assert_form(name, lambda: LRP(**{name: value}))
    assert_form(name, lambda: match_detections([], [], **{name: value}))


@pytest.mark.parametrize("area", WRONG_AREAS, ids=lambda value: str(value)[:20])
def test_wrong_areas_are_named(area):
    assert_form("areas['odd']", lambda: LRP(areas={"odd": area}))
    assert_form("area", lambda: match_detections([], [], area=area))


@pytest.mark.parametrize("areas", [*([(0, 1)], "small", 3, {"a"}, iter([]), torch.zeros(2))])
def test_areas_are_a_dict(areas):
    assert_form("areas", lambda: LRP(areas=areas))


@pytest.mark.parametrize("name", WRONG_NAMES, ids=str)
def test_names_of_areas_make_names_of_results(name):
    assert_form("areas", lambda: LRP(areas={"fine": (0, 1), name: (1, 2)}))


def test_no_two_results_have_one_name():
    """olrp_loc of "small" and olrp of "loc_small" would be one."""
    for names in (("small", "loc_small"), ("loc_small", "small"), ("a", "per_class_a")):
        assert_form("areas", lambda names=names: LRP(areas=dict.fromkeys(names, ALL)))
    result = evaluate(*BY_HAND, areas=dict.fromkeys(("small", "classes", "olrp", "loca"), ALL))
    assert len(result) == 1 + 9 * 5
    for name in ("small", "classes", "olrp", "loca"):
        for kind in ("thresholds", *MEASURES, *(f"{m}_per_class" for m in MEASURES)):
            np.testing.assert_array_equal(result[f"{kind}_{name}"], result[kind])


def test_settings_of_numpy_are_numbers():
    preds, target = random_images(4)
    settings = {"tau": np.float32(0.5), "max_detections": np.int64(3)}
    got = evaluate(preds, target, areas={"some": [np.float32(0), 1e9]}, **settings)
    expected = evaluate(preds, target, max_detections=3)
    assert_same({name: got[name] for name in expected}, expected)
    unlimited = evaluate(preds, target, max_detections=10**400, areas={"all": (0, 10**400)})
    assert unlimited["olrp"].item() == unlimited["olrp_all"].item()


WRONG_IMAGES = [None, 3, "ab", {"boxes": 1}.items, iter([]), set(), torch.zeros(2, 4)]
WRONG_IMAGES += [np.zeros(2), GOOD, object()]
WRONG_FIELDS = [None, 3, [0.0, 0.0], [[0.0] * 4] * 2, (1, 2), np.zeros((2, 4)), "ab", object()]
WRONG_FIELDS += [torch.zeros(()), torch.zeros(1), torch.zeros(2, 1, 4), torch.zeros(3, 1).long()]
WRONG_FIELDS += [torch.zeros(2, 5), torch.zeros(2, dtype=torch.complex64)]
WRONG_FIELDS += [torch.zeros(2, 4).to_sparse(), torch.zeros(2, 4, device="meta")]
WRONG_FIELDS += [torch.zeros(8)]
WRONG_DTYPES = {
    "boxes": [torch.bool, torch.complex64],
    "scores": [torch.bool, torch.int64, torch.uint8, torch.complex64],
    "labels": [torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.complex64],
    "iscrowd": [torch.float32, torch.complex64],
    "area": [torch.bool, torch.complex64],
}


@pytest.mark.parametrize("name", ["preds", "target"])
@pytest.mark.parametrize("images", WRONG_IMAGES, ids=lambda images: type(images).__name__)
def test_wrong_images_are_named(name, images):
    good = {"preds": [GOOD], "target": [GOOD]}
    assert_form(name, lambda: match_detections(**good | {name: images}))
    assert_form(
        f"{name}[1]",
        lambda: match_detections(
            **{k: [GOOD, GOOD] for k in good} | {name: [GOOD, None if images is GOOD else images]}
        ),
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name, image in (("preds", GOOD), ("target", TRUTH)) for key in image],
)
def test_wrong_fields_are_named(name, key):
    """Each kind of wrong value in the second of three images, of a class and a call alike."""
    good = {"preds": [GOOD] * 3, "target": [TRUTH] * 3}
    nested = torch.nested.nested_tensor([torch.zeros(4)] * 2)
    wrong = [nested, *WRONG_FIELDS, *(torch.zeros(2, 4)[:, 0].to(t) for t in WRONG_DTYPES[key])]
    if key == "boxes":
        wrong[-len(WRONG_DTYPES[key]) :] = [torch.zeros(2, 4, dtype=t) for t in WRONG_DTYPES[key]]
    metric = LRP()
    metric.update(**good)
    before = metric.compute()
    for value in wrong:
        if value is None and key in ("iscrowd", "area"):
            continue  # none are given
        images = [*good[name]]
        images[1] = images[1] | {key: value}
        for call in (match_detections, metric.update, metric):
            assert_form(f"{name}[1]['{key}']", lambda c=call, i=images: c(**good | {name: i}))
    if key not in ("iscrowd", "area"):
        missing = {k: v for k, v in good[name][1].items() if k != key} | {7: None}
        images = [good[name][0], missing, good[name][2]]
        assert_form(f"{name}[1]", lambda: match_detections(**good | {name: images}))
    assert_same(metric.compute(), before)


# --- what data sets and heads hand over --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (0, 1), (1, 0)], ids=str)
def test_an_empty_tensor_has_no_dtype_and_no_shape(dtype, shape):
    """torchvision's reference conversion leaves an image without annotations so."""
    preds, target = random_images(5, seed=12)
    nothing = dict.fromkeys(TRUTH, torch.zeros(shape, dtype=dtype))
    none = dict.fromkeys(GOOD, torch.zeros(shape, dtype=dtype))
    expected = evaluate(preds, target)
    empty = {key: values[:0] for key, values in GOOD.items()}
    misses = evaluate([empty, *preds], [target[0], *target])
    for place in (0, 2, 5):
        around = [
            [*part[:place], one, *part[place:]] for part, one in ((preds, none), (target, nothing))
        ]
        metric = LRP()
        metric.update(*around)
        assert_same(metric.compute(), expected)
        matches = match_detections(*around)
        for got, whole in zip(matches, match_detections(preds, target), strict=True):
            assert got.dtype == whole.dtype
            assert torch.equal(got, whole)
    assert_same(evaluate([none, *preds], [target[0], *target]), misses)
    assert math.isnan(evaluate([none], [nothing])["olrp"].item())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("integers", [torch.uint8, torch.int16, torch.uint16, torch.int64], ids=str)
def test_dtypes_of_images_may_differ(dtype, integers):
    """Nothing is rounded to the dtype of another image: 4097 has 13 bits, 2^24 + 1 has 25."""
    own = {"boxes": torch.tensor([[0, 0, 2**24 + 1, 4097]]), "labels": torch.tensor([2**62])}
    preds, target = random_images(3, seed=13, grid=4)

    def cast(image):
        kinds = {"boxes": dtype, "scores": dtype, "labels": integers, "iscrowd": integers}
        return {key: values.to(kinds[key]) for key, values in image.items()}

    preds, target = [cast(image) for image in preds], [cast(image) for image in target]
    alone = evaluate(preds, target)
    for order in (slice(None), slice(None, None, -1)):
        found = [*preds, own | {"scores": torch.tensor([0.3], dtype=torch.float64)}][order]
        metric = LRP()
        metric.update(found, [*target, own][order])
        result = metric.compute()
        assert result["classes"][-1].item() == 2**62
        assert result["olrp_per_class"][-1].item() == 0
        assert result["thresholds"][-1].item() == 0.3
        np.testing.assert_array_equal(result["olrp_per_class"][:-1], alone["olrp_per_class"])


@pytest.mark.parametrize("label", [2**62, -(2**62), 2**63 - 1, -(2**63), -1])
def test_labels_are_any_integers(label):
    def relabelled(image):
        return image | {"labels": torch.where(image["labels"] == 3, label, image["labels"])}

    preds, target = random_images(4, seed=14)
    result = evaluate([*map(relabelled, preds)], [*map(relabelled, target)])
    expected = evaluate(preds, target)
    place = result["classes"].tolist().index(label)
    assert result["olrp_per_class"][place] == expected["olrp_per_class"][2]
    assert result["olrp"].item() == pytest.approx(expected["olrp"].item(), abs=1e-15)


class Carrying(torch.Tensor):
    """Boxes that carry their format, as those of torchvision do."""


def carrying(boxes: torch.Tensor, form) -> torch.Tensor:
    result = boxes.as_subclass(Carrying)
    result.format = form
    return result


def torchvision_boxes(boxes: torch.Tensor, form: str) -> torch.Tensor:
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    return tv_tensors.BoundingBoxes(boxes, format=form, canvas_size=(400, 400))


def in_format(boxes: torch.Tensor, form: str) -> torch.Tensor:
    low, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    first = {"XYXY": low, "XYWH": low, "CXCYWH": low + sides / 2}[form]
    return torch.cat([first, boxes[:, 2:] if form == "XYXY" else sides], 1)


@pytest.mark.parametrize("make", [carrying, torchvision_boxes])
@pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
def test_boxes_are_read_in_the_format_that_they_carry(make, form):
    preds, target = random_images(6, seed=15, grid=4)
    expected = evaluate(preds, target, areas=COCO_AREAS)
    given = [
        [image | {"boxes": make(in_format(image["boxes"], form), form)} for image in part]
        for part in (preds, target)
    ]
    for mixed in (given, (given[0], target), ([*given[0][:3], *preds[3:]], given[1])):
        assert_same(evaluate(*mixed, areas=COCO_AREAS), expected)
    matches = match_detections(*given)
    assert all(type(part) is torch.Tensor for part in matches)


def test_formats_are_read_before_anything_is_rounded():
    """uint8 ends at 255, and 2049 is no float16."""
    for boxes, corners in (
        (torch.tensor([[200, 200, 100, 100]], dtype=torch.uint8), [[200.0, 200, 300, 300]]),
        (torch.tensor([[2048, 0, 1, 1]], dtype=torch.float16), [[2048.0, 0, 2049, 1]]),
    ):
        image = {"boxes": torch.tensor(corners), "labels": torch.tensor([1])}
        found = image | {"scores": torch.tensor([0.5]), "boxes": carrying(boxes, "xywh")}
        assert match_detections([found], [image]).ious.tolist() == [1]


@pytest.mark.parametrize("form", ["XYWHR", "CXCYWHR", "XYXYXYXY"])
def test_rotated_boxes_are_refused(form):
    boxes = torchvision_boxes(torch.ones(2, len(form) if form == "XYXYXYXY" else 5), form)
    for name in ("preds", "target"):
        images = {"preds": [GOOD], "target": [TRUTH]}
        images[name] = [images[name][0] | {"boxes": boxes}]
        message = rf"^{name}\[0\]\['boxes'\]: expected format XYXY, XYWH, CXCYWH, got {form}$"
        with pytest.raises(ValueError, match=message):
            match_detections(**images)


def test_inside_out_ground_truth_is_refused():
    """x, y, width and height taken for corners: 250, 100, 20, 30 has x2 < x1."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [250, 100, 20, 30], [9, 9, 0, 9]])
    image = {"boxes": boxes, "labels": torch.zeros(3).long()}
    nothing = dict.fromkeys(GOOD, torch.tensor([]))
    message = (
        "target[1]['boxes']: expected corners with x1 <= x2 and y1 <= y2, "
        "got [250.0, 100.0, 20.0, 30.0] for box 1"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        LRP().update([nothing] * 3, [nothing, image, nothing])
    widths = image | {
        "boxes": carrying(torch.tensor([[5.0, 5, 0, 3], [5, 5, 2, -1], [1, 1, 1, 1]]), "XYWH")
    }
    with pytest.raises(ValueError, match=re.escape("got [5.0, 5.0, 7.0, 4.0] for box 1")):
        LRP().update([nothing], [widths])


def test_degenerate_detections_are_false():
    """Networks emit them: they have area 0, and no IoU with anything."""
    target = [truths((0, 0, 10, 10, 1, 0))]
    right = (0, 0, 10, 8, 0.5, 1)
    for odd in ((10, 10, 0, 0, 0.9, 1), (0, 10, 10, 0, 0.9, 1), (3, 3, 3, 9, 0.9, 1)):
        matches = match_detections([detections(odd, right)], target)
        assert matches.true.tolist() == [False, True]
        assert matches.false.tolist() == [True, False]
        assert matches.ious.tolist() == [0, 0.8]
        assert not match_detections([detections(odd)], target, area=(1, 99)).false.any()


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic": lambda: swapped(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "float64": lambda: swapped(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: swapped(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
}


@contextlib.contextmanager
def swapped(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_settings_of_torch_change_nothing(context):
    """Wherever they begin: the metric is made, updated and computed within or without."""
    preds, target = random_images(6, seed=16, grid=4)
    for found in preds:
        found["scores"].requires_grad_()
    expected = evaluate(preds, target, areas=COCO_AREAS)
    matches = match_detections(preds, target)
    true = [part[matches.true] for part in (matches.scores, matches.ious, matches.labels)]
    rho, bound = score_iou_correlation(*true), upper_bound_scores(*true)
    with context():
        inside = LRP(areas=COCO_AREAS)
        inside.update(preds[:3], target[:3])
        assert_same(
            inside(preds[3:], target[3:]), evaluate(preds[3:], target[3:], areas=COCO_AREAS)
        )
        result = inside.compute()
        assert torch.equal(score_iou_correlation(*true), rho)
        assert torch.equal(upper_bound_scores(*true), bound)
        for got, whole in zip(match_detections(preds, target), matches, strict=True):
            assert torch.equal(got, whole)
        pickled = pickle.dumps(inside)
    assert_same(result, expected)
    inside.update([], [])
    assert_same(inside.compute(), expected)
    assert_same(pickle.loads(pickled).compute(), expected)


# --- where and in what precision it is kept ----------------------------------------------------


def test_no_cast_touches_what_is_kept():
    preds, target = random_images(6, seed=17)
    expected = evaluate(preds, target)
    casts = [
        lambda metric: metric.to(torch.bfloat16),
        lambda metric: metric.half(),
        lambda metric: metric.bfloat16(),
        lambda metric: torch.nn.ModuleList([metric]).to(torch.float16),
        lambda metric: torch.nn.ModuleList([metric]).half(),
        lambda metric: metric.to("cpu", torch.float16),
        lambda metric: metric.to_empty(device="cpu"),
        lambda metric: torch.nn.ModuleList([metric]).to_empty(device="cpu"),
    ]
    if hasattr(LRP, "set_dtype"):
        casts.append(lambda metric: metric.set_dtype(torch.float16))
    for cast in casts:
        metric = LRP()
        metric.update(preds[:4], target[:4])
        partial = metric.compute()
        cast(metric)
        assert_same(metric.compute(), partial)
        metric.update(preds[4:], target[4:])
        assert_same(metric.compute(), expected)
        assert all(
            values.dtype == torch.float64
            for name, values in metric.compute().items()
            if name != "classes"
        )


@pytest.fixture
def elsewhere(monkeypatch):
    """Return a device that isn't the CPU: meta, taken for one that holds numbers."""
    monkeypatch.setattr(metrics, "home", lambda device: device)


def kept(metric: LRP) -> list[torch.Tensor]:
    parts = [getattr(metric, name) for name in metrics._STATES]
    return [one for part in parts for one in (part if isinstance(part, list) else [part])]


def test_all_is_kept_where_the_metric_is(monkeypatch, elsewhere):
    """Images of any device, no images, what was there before a move, and what is merged."""
    monkeypatch.setattr(matching, "_check_values", lambda *_: None)  # which meta cannot
    preds, target = random_images(4, seed=18)
    empty = dict.fromkeys(GOOD, torch.tensor([]))
    metric = LRP()
    metric.update(preds, target)
    metric.update([], [])
    assert all(values.device.type == "cpu" for values in kept(metric))
    assert metric.to("meta").device.type == "meta"
    metric.update(preds, target)
    metric.update([empty], [empty])
    metric.update([], [])
    assert all(values.device.type == "meta" for values in kept(metric))
    assert {len(getattr(metric, name)) for name in metrics._STATES} == {5}
    metric.reset()
    metric.update([], [])
    assert len(kept(metric)) == len(metrics._STATES)
    assert all(values.device.type == "meta" for values in kept(metric))
    again = pickle.loads(pickle.dumps(metric))
    again.update(preds, target)
    assert all(values.device.type == "meta" for values in kept(again))


def test_what_is_merged_moves_here(monkeypatch, elsewhere):
    pytest.importorskip("torchmetrics")
    preds, target = random_images(4, seed=18)
    metric, other = LRP().to("meta"), LRP()
    other.update(preds, target)
    metric.merge_state(other)
    assert all(values.device.type == "meta" for values in kept(metric))
    before = kept(other)
    with pytest.raises(ValueError, match="truth_counts"):
        other.merge_state({name: [torch.zeros(1)] for name in metrics._STATES[:-1]})
    assert [*map(id, kept(other))] == [*map(id, before)]


def test_what_is_loaded_moves_here(elsewhere):
    pytest.importorskip("torchmetrics")
    metric, other = LRP().to("meta"), LRP()
    for one in (metric, other):
        one.persistent(True)
    other.update(*random_images(4, seed=18))
    metric.load_state_dict(other.state_dict())
    assert len(kept(metric)) == len(metrics._STATES)
    assert all(values.device.type == "meta" for values in kept(metric))


def test_ranks_without_images_gather_from_their_own_device(monkeypatch, elsewhere):
    """NCCL needs that; the dtypes are those of the others."""
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(matching, "_check_values", lambda *_: None)
    preds, target = random_images(2)
    dtypes = [torch.float64, torch.float64, torch.int64, torch.int64]
    dtypes += [torch.float64, torch.int64, torch.bool, torch.float64, torch.int64]
    for images in (None, slice(0, 0), slice(0, 2)):
        seen = []

        def gather(values, group, seen=seen):
            seen.append(values)
            return [values]

        metric = LRP(distributed_available_fn=lambda: True, dist_sync_fn=gather).to("meta")
        if images:
            metric.update(preds[images], target[images])
        metric.sync(gather)
        assert [values.device.type for values in seen] == ["meta"] * 9
        assert [values.dtype for values in seen] == dtypes
        assert [values.shape[1:] for values in seen if values.dim() > 1] == [(4,)] * 2
        metric.unsync()


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_a_device_without_float64_or_numbers_leaves_all_on_the_cpu(device):
    preds, target = random_images(3, seed=19)
    metric = LRP()
    metric._device = torch.device(device)
    metric.update(preds, target)
    metric.update([], [])
    assert_same(metric.compute(), evaluate(preds, target))


def test_a_call_that_raises_changes_nothing():
    """What was kept and how it is computed stay, whether the batch is refused or breaks off."""
    preds, target = random_images(6, seed=20)
    metric = LRP(areas=COCO_AREAS)
    metric.update(preds[:2], target[:2])
    metric(preds[2:4], target[2:4])
    before = metric.compute()
    settings = {name: value for name, value in vars(metric).items() if not callable(value)}
    calls = [lambda: metric([GOOD], [GOOD | {"boxes": torch.ones(2, 4) * math.nan}])]
    calls += [lambda: metric([GOOD], None), lambda: metric([None], [GOOD])]
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=r"^(preds|target)"):
            call()
        for name, value in settings.items():
            assert vars(metric)[name] is value
        assert_same(metric.compute(), before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "optimal_lrp", None)  # breaks off after the update
        with pytest.raises(TypeError):
            metric(preds[4:], target[4:])
    assert_same(metric.compute(), before)
    metric.update(preds[4:], target[4:])
    assert_same(metric.compute(), evaluate(preds, target, areas=COCO_AREAS))


def test_a_refused_batch_leaves_a_collection_as_it_was():
    """Its metrics share what they keep, since their states are the same."""
    torchmetrics = pytest.importorskip("torchmetrics")
    preds, target = random_images(4, seed=21)

    def collected():
        return torchmetrics.MetricCollection({"usual": LRP(), "strict": LRP(tau=0.75)})

    collection, expected = collected(), collected()
    for one in (collection, expected):
        one.update(preds[:2], target[:2])
    for _ in range(2):
        with pytest.raises(ValueError, match="scores"):
            collection([GOOD | {"scores": GOOD["scores"] / 0}], [GOOD])
    for one in (collection, expected):
        one.update(preds[2:], target[2:])
    assert_same(collection.compute(), expected.compute())


def test_scripted_models_may_hold_the_metric():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.metric = LRP(areas=COCO_AREAS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        assert torch.jit.script(Model())(torch.zeros(1)).item() == 1


# --- other implementations ---------------------------------------------------------------------


def average_precision(matches: matching.Matches, points: int = 101) -> float:
    """Return COCO's AP: precision made monotone, at evenly spaced recalls, mean over classes."""
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
    """It is what faster-coco-eval finds at three IoUs and in all ranges of areas."""
    preds, target = random_images(40, seed=6, grid=grid)
    precision = coco_evaluation(preds, target).eval["precision"]  # IoU, recall, class, area, most
    for row, tau in ((0, 0.5), (5, 0.75), (8, 0.9)):
        for column, area in enumerate([ALL, *COCO_AREAS.values()]):
            expected = precision[row, :, :, column, -1]
            matches = match_detections(preds, target, tau, area=area)
            assert average_precision(matches) == pytest.approx(
                expected[expected > -1].mean(), abs=1e-12
            )


def test_degenerate_boxes_are_cocos():
    """Detections and ground truth without an area: the former false, the latter missed."""
    preds, target = random_images(40, seed=6, grid=4)
    for found, truth in zip(preds, target, strict=True):
        found["boxes"][::5, 2:] = found["boxes"][::5, :2]
        found["boxes"][1::5, 2] = found["boxes"][1::5, 0]
        truth["boxes"][::4, 3] = truth["boxes"][::4, 1]
    precision = coco_evaluation(preds, target).eval["precision"]
    for column, area in enumerate([ALL, *COCO_AREAS.values()]):
        expected = precision[0, :, :, column, -1]
        got = average_precision(match_detections(preds, target, area=area))
        assert got == pytest.approx(expected[expected > -1].mean(), abs=1e-12)


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
    """Of 3.1 million ranks the squares sum up to more than 2^63."""
    scores = torch.rand(3_100_000, dtype=torch.float64)
    assert score_iou_correlation(scores, -2 * scores).item() == -1


def test_any_scores_are_ranked():
    """Infinite ones, 16-bit ones, those of a graph, and huge and negative labels."""
    scores = torch.tensor([math.inf, 2.0, 1.0, -math.inf])
    ious = torch.tensor([0.9, 0.8, 0.7, 0.6])
    labels = torch.tensor([2**63 - 1, -(2**63), 2**63 - 1, -(2**63)])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own = scores.to(dtype).requires_grad_()
        assert score_iou_correlation(own, ious.to(dtype)).item() == 1
        assert score_iou_correlation(own, -ious, labels).item() == -1
        assert lower_bound_scores(own, ious).tolist() == scores.flip(0).tolist()
        assert upper_bound_scores(own, ious, labels).dtype == dtype
    assert math.isnan(score_iou_correlation(torch.full((3,), math.inf), ious[:3]).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_no_positives_have_no_dtype(dtype):
    none = torch.zeros(0, dtype=dtype)
    assert math.isnan(score_iou_correlation(none, none, none).item())
    assert (
        upper_bound_scores(none, none).shape == lower_bound_scores(none, none, none).shape == (0,)
    )


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
        ((torch.zeros(1), torch.zeros(1) / 0), ValueError, "ious: expected numbers, got NaN"),
        ((None, torch.zeros(1)), TypeError, "scores: expected a floating tensor, got None"),
        ((torch.zeros(1), np.zeros(1)), TypeError, "ious: expected a floating tensor, got nda"),
        ((torch.zeros(1), torch.zeros(1), [1]), TypeError, "labels: expected an integer tensor"),
        ((torch.zeros(2).to_sparse(), torch.zeros(2)), TypeError, "scores: .*, got a torch.sparse"),
        ((torch.zeros(2, device="meta"),) * 2, ValueError, "scores: expected on .*, got meta"),
        ((torch.zeros(1), torch.zeros(1, device="meta")), ValueError, "ious: expected on cpu, got"),
    ],
)
def test_wrong_positives_are_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


# --- size, torchmetrics ------------------------------------------------------------------------


def count_operators(call, name: str = "") -> int:
    """Count the operators of torch that it dispatches, of this name or all."""
    found = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            found.append(str(operator.overloadpacket))
            return operator(*args, **(kwargs or {}))

    with Counter():
        call()
    return len(found) if not name else found.count(name)


def images_like_cocos(images: int, most: int):
    """Draw images of 7 objects and as many detections as given, the last of one class."""
    rng = np.random.default_rng(0)
    preds, target = [], []
    for _ in range(images):
        corners = rng.uniform(0, 500, (7, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 150, (7, 2))], 1)
        labels = rng.integers(0, 80, 7)
        near = rng.integers(0, 7, most)
        found = boxes[near] + rng.normal(0, 5, (most, 4))
        preds.append(detections(*np.column_stack([found, rng.uniform(0, 1, most), labels[near]])))
        target.append(truths(*np.column_stack([boxes, labels, np.zeros(7)])))
    preds[-1]["labels"][:], target[-1]["labels"][:] = 3, 3
    return preds, target


def test_work_does_not_grow_with_the_images(monkeypatch):
    """Steps are as many as one image and class has detections, pairs those of one such."""
    pairs = []
    ious = matching._ious
    monkeypatch.setattr(matching, "_ious", lambda *a: pairs.append(len(a[0])) or ious(*a))

    def steps(images: int) -> int:
        pairs.clear()
        preds, target = images_like_cocos(images, 30)
        metric = LRP(areas=COCO_AREAS)
        metric.update(preds, target)
        number = count_operators(metric.compute)
        assert sum(pairs) == sum(
            int((found["labels"][:, None] == truth["labels"]).sum())
            for found, truth in zip(preds, target, strict=True)
        )
        return number

    assert steps(60) <= 1.01 * steps(2)


def test_coco_sized():
    """5000 images of 100 detections each, in all ranges of areas: pairs come in bounded parts."""
    preds, target = images_like_cocos(5000, 100)
    result = evaluate(preds, target, areas=COCO_AREAS)
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
        from tests.api.test_metrics import *
        metric = LRP(areas=COCO_AREAS)
        assert type(metric).__mro__[1].__module__ == "alrp_triton.metrics"
        test_several_updates_are_one()
        test_a_call_returns_the_batch_and_adds_it()
        test_by_hand()
        test_nothing_at_all()
        test_a_call_that_raises_changes_nothing()
        test_no_cast_touches_what_is_kept()
        test_scripted_models_may_hold_the_metric()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "home", lambda device: device)
            test_all_is_kept_where_the_metric_is(patch, None)
        for device in ("mps", "meta"):
            test_a_device_without_float64_or_numbers_leaves_all_on_the_cpu(device)
        print(evaluate(*random_images(2))["olrp"].item())
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
    """One of them may have seen nothing, and either may have been moved or copied."""
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
            from tests.api.test_metrics import *
            rank, file = int(sys.argv[1]), sys.argv[2]
            dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
            preds, target = random_images(5, seed=9)
            metric = LRP(areas=COCO_AREAS)
            own = [slice(0, 2), slice(2, 5), None][rank]
            if own:
                metric.update(preds[own], target[own])
                metric.update([], [])
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
        metric = LRP(areas=COCO_AREAS).to("cuda")
        metric.update(*on_gpu)
        metric.update([], [])
        result = metric.compute()
        matches = match_detections(*on_gpu)
        true = [part[matches.true] for part in (matches.scores, matches.ious, matches.labels)]
        rho, bound = score_iou_correlation(*true), upper_bound_scores(*true)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, values in evaluate(*images, areas=COCO_AREAS).items():
        assert result[name].is_cuda
        np.testing.assert_allclose(result[name].cpu(), values, rtol=1e-14)
    assert_same(evaluate(*on_gpu), evaluate(*images))  # kept where the metric is: on the CPU
    on_cpu = [part.cpu() for part in true]
    assert rho.item() == score_iou_correlation(*on_cpu).item()
    assert torch.equal(bound.cpu(), upper_bound_scores(*on_cpu))
