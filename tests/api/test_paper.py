"""The numbers that the paper prints, those of the authors' code, and the two theorems."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from batches import DISTRIBUTIONS, detector_batch, relative_error

from alrp_triton import alrp_loss, ap_loss, error_driven_loss, localisation_errors
from alrp_triton.loss_terms import alrp_errors, ap_errors

AUTHORS = np.load(Path(__file__).parents[1] / "data" / "authors.npz")
CASES = ("init", "mid", "late", "small_delta", "ties", "ignore", "one_pos", "one_neg")
ALGORITHMS = ("pairwise", "breakpoints")

# Fig. 1: ten anchors with scores 1.0 down to 0.1; the positives and their IoU in three outputs.
FIGURE_SCORES = torch.arange(10, 0, -1, dtype=torch.float64) / 10
FIGURE_POSITIVES = [0, 2, 5, 9]
FIGURE_IOU = {
    "R1": ([0.95, 0.80, 0.65, 0.50], 0.53),
    "R2": ([0.80, 0.65, 0.50, 0.95], 0.6925),
    "R3": ([0.50, 0.65, 0.80, 0.95], 0.8925),
}


def authors(case: str, field: str) -> torch.Tensor:
    return torch.from_numpy(AUTHORS[f"{case}/{field}"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.05])  # below the scores' distance all are one step
@pytest.mark.parametrize("output", FIGURE_IOU)
def test_figure_1(output, delta, algorithm):
    iou, expected = FIGURE_IOU[output]
    targets = torch.zeros(10)
    targets[FIGURE_POSITIVES] = 1
    loc_errors = (1 - torch.tensor(iou, dtype=torch.float64)) / (1 - 0.5)
    cls, loc = alrp_loss(FIGURE_SCORES, targets, loc_errors, delta, algorithm=algorithm)
    assert abs(float(cls + loc) - expected) < 1e-12
    # The negatives stand at ranks 2, 4, 5, 7, 8, 9: the figure prints 0.36.
    assert abs(float(cls) - (0 / 1 + 1 / 3 + 3 / 6 + 6 / 10) / 4) < 1e-12
    ap = ap_loss(FIGURE_SCORES, targets, delta, algorithm=algorithm)
    assert float(ap) == float(cls)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("output", FIGURE_IOU)
def test_figure_1_with_the_smooth_step(output, algorithm):
    """At delta = 1 every anchor of the figure sees every other one: Eq. 10 and 11 by hand."""
    iou, _ = FIGURE_IOU[output]
    s = FIGURE_SCORES.tolist()
    loc_error = [2 * (1 - x) for x in iou]
    cls = loc = 0.0
    for own, i in zip(loc_error, FIGURE_POSITIVES, strict=True):
        h = [(x - s[i]) / 2 + 0.5 for x in s]
        nfp = sum(h[j] for j in range(10) if j not in FIGURE_POSITIVES)
        rank = 1 + nfp + sum(h[k] for k in FIGURE_POSITIVES if k != i)
        pairs = zip(loc_error, FIGURE_POSITIVES, strict=True)
        cls += nfp / rank / 4
        loc += (own + sum(e * h[k] for e, k in pairs if k != i)) / rank / 4
    targets = torch.zeros(10)
    targets[FIGURE_POSITIVES] = 1
    loc_errors = torch.tensor(loc_error, dtype=torch.float64)
    got = alrp_loss(FIGURE_SCORES, targets, loc_errors, delta=1.0, algorithm=algorithm)
    assert abs(float(got[0]) - cls) < 1e-12
    assert abs(float(got[1]) - loc) < 1e-12


def test_figure_1_tells_apart_what_other_losses_cannot():
    errors = {}
    for output, (iou, _) in FIGURE_IOU.items():
        width = torch.tensor(iou, dtype=torch.float64)
        target = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64).repeat(4, 1)
        pred = target.clone()
        pred[:, 2] = width  # a box inside another one: IoU is the width
        errors[output] = localisation_errors(pred, target, kind="iou", tau=0.0).mean()
    assert all(abs(float(error) - 0.275) < 1e-12 for error in errors.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES)
def test_published_alrp(case, algorithm):
    logits = authors(case, "logits").requires_grad_()
    targets, delta = authors(case, "targets"), float(authors(case, "delta"))
    loc_errors = authors(case, "loc_errors")
    cls, _ = alrp_loss(logits, targets, loc_errors, delta, algorithm=algorithm)
    cls.backward()
    assert relative_error(cls, authors(case, "alrp_cls")) < 1e-10
    assert relative_error(logits.grad, authors(case, "alrp_grad")) < 1e-10


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES)
def test_published_ranks(case, algorithm):
    ranks = []

    def keep_rank(counts):
        ranks.append(counts.rank)
        return ap_errors(counts)

    delta = float(authors(case, "delta"))
    logits, targets = authors(case, "logits"), authors(case, "targets")
    error_driven_loss(logits, targets, keep_rank, delta=delta, algorithm=algorithm)
    assert relative_error(ranks[0], authors(case, "alrp_rank")) < 1e-10


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES)
def test_published_ap_where_interpolation_changes_nothing(case, algorithm):
    logits = authors(case, "logits").requires_grad_()
    targets, delta = authors(case, "targets"), float(authors(case, "delta"))
    loss = ap_loss(logits, targets, delta, algorithm=algorithm)
    loss.backward()
    interpolated = bool(authors(case, "ap") < loss - 1e-9)
    assert interpolated == (case == "small_delta")  # precision falls somewhere in this case alone
    if interpolated:
        return
    assert relative_error(loss, authors(case, "ap")) < 1e-10
    assert relative_error(logits.grad, authors(case, "ap_grad")) < 1e-10


@pytest.mark.parametrize("errors_fn", [ap_errors, alrp_errors])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_theorem_1(distribution, errors_fn):
    """L = (1/Z) sum_i l(i) is also the sum of the primary terms l(i) p(j|i) over all i and j."""
    logits, targets = detector_batch(distribution, 300, 5, 20)
    logits = logits.double()
    values = torch.rand(20, dtype=torch.float64)
    kept = []

    def keep(counts):
        kept.append(counts)
        return errors_fn(counts)

    loss = error_driven_loss(logits, targets, keep, values)
    counts = kept[0]
    positive = torch.zeros_like(logits, dtype=torch.bool)
    anchors = (targets >= 0).nonzero()[:, 0]
    positive[anchors, targets[anchors]] = True
    negatives = logits[~positive & (targets != -100)[:, None]]
    h = ((negatives - logits[positive][:, None]) / 2 + 0.5).clamp(0, 1)
    mass = torch.where(counts.nfp[:, None] > 0, h / counts.nfp[:, None], 1 / negatives.numel())
    primary = errors_fn(counts).error[:, None] * mass
    assert relative_error(loss, primary.sum() / 20) < 1e-12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("delta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_theorem_2(distribution, delta, algorithm):
    """Positives and negatives receive gradients of the same summed magnitude, and of known sign."""
    logits, targets = detector_batch(distribution, 400, 5, 25)
    logits = logits.double().requires_grad_()
    cls, _ = alrp_loss(logits, targets, torch.rand(25), delta, algorithm=algorithm)
    cls.backward()
    pushed_up = logits.grad[logits.grad < 0].abs().sum()
    pushed_down = logits.grad[logits.grad > 0].sum()
    assert pushed_up > 0
    assert relative_error(pushed_down, pushed_up) < 1e-12
    anchors = (targets >= 0).nonzero()[:, 0]
    assert (logits.grad[anchors, targets[anchors]] <= 0).all()


def test_theorem_2_at_ten_million_logits():
    logits, targets = detector_batch("mid", 125_000, 80, 600)
    logits.requires_grad_()
    cls, _ = alrp_loss(logits, targets, torch.rand(600))
    cls.backward()
    gradient = logits.grad.double()
    positives, negatives = -gradient[gradient < 0].sum(), gradient[gradient > 0].sum()
    assert positives > 0.1
    assert relative_error(negatives, positives) < 1e-6


def test_gradient_sums_to_about_the_loss():
    """Sec. 4.2 rests on it: sum over P of |dL/ds| is the loss less what the target keeps."""
    logits, targets = detector_batch("mid", 500, 5, 25)
    logits = logits.double().requires_grad_()
    cls, _ = alrp_loss(logits, targets, torch.zeros(25))
    cls.backward()
    gradient = logits.grad
    assert relative_error(-gradient[gradient < 0].sum(), cls) < 1e-12
