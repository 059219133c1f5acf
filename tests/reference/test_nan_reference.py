"""A NaN logit that is not ignored leaves no number standing, in both algorithms of the reference.

Where there is a positive, every value is NaN and so is the gradient at every positive, in all
groups; where there is none, all is 0.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from batches import batch_of, widen
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, error_driven_loss, ndcg_loss, rank_sort_loss
from alrp_triton.loss_terms import ap_errors
from alrp_triton.reference import pairwise
from alrp_triton.reference.breakpoints import ranks as breakpoints
from alrp_triton.reference.breakpoints import relevant, sort

LOSSES = {
    "AP": lambda x, t, values, **given: [ap_loss(x, t, **given)],
    "aLRP": lambda x, t, values, **given: alrp_loss(x, t, values, **given),
    "NDCG": lambda x, t, values, **given: [ndcg_loss(x, t, **given)],
    "Rank & Sort": lambda x, t, values, **given: rank_sort_loss(x, t, values, **given),
    "own": lambda x, t, values, **given: [error_driven_loss(x, t, ap_errors, **given)],
    "skewed": lambda x, t, values, **given: [error_driven_loss(x, t, ap_errors, skew=2.0, **given)],
}
# Targets of a batch, and where of it a NaN stands: at positives, at negatives, at both.
TARGETS = {
    "one positive": [1],
    "one positive, a negative": [1, 0],
    "positives": [1, 1, 1],
    "many": [1, 0, 0, -1, 1, 0, 1, 0, 0, -1] * 8,
}
PLACES = {
    "a positive": lambda t: (t == 1).nonzero()[-1:],
    "two positives": lambda t: (t == 1).nonzero()[:2],
    "all positives": lambda t: (t == 1).nonzero(),
    "a negative": lambda t: (t == 0).nonzero()[:1],
    "all negatives": lambda t: (t == 0).nonzero(),
    "a positive and a negative": lambda t: torch.cat([(t == k).nonzero()[:1] for k in (0, 1)]),
}


BATCHES = [
    (targets, place)
    for targets, marks in TARGETS.items()
    for place, find in PLACES.items()
    if len(find(torch.tensor(marks)))
]
# A skewed distribution evaluates every pair.
ALGORITHMS = [(loss, "pairwise") for loss in LOSSES]
ALGORITHMS += [(loss, "breakpoints") for loss in LOSSES if loss != "skewed"]


def batch(targets: str, place: str, sign: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits with a NaN at that place, and at all that is ignored."""
    targets = torch.tensor(TARGETS[targets])
    logits = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[targets == -1] = math.nan
    logits[PLACES[place](targets)] = math.copysign(
        math.nan, sign
    )  # 0 / 0 is negative on most processors
    return logits, targets


@pytest.mark.parametrize("groups", ["none", "others", "nobody's"])
@pytest.mark.parametrize(("targets", "place"), BATCHES)
@pytest.mark.parametrize(("loss", "algorithm"), ALGORITHMS)
def test_every_value_and_every_positive_is_nan(loss, targets, place, groups, algorithm):
    """Padding, if there is any, keeps its gradient of 0; a NaN may be in a group of its own."""
    logits, marks = batch(targets, place, 1.0, torch.float32)
    given = {}
    if groups != "none":
        given["groups"] = torch.arange(marks.numel()) % 3
    if groups == "nobody's":
        given["groups"][logits.isnan()] = -7
    positives = (marks == 1).nonzero()[:, 0]
    padded = torch.nn.functional.pad(positives, (1, 2), value=-1)
    for where in (positives, padded):
        values = torch.rand(where.numel(), generator=torch.Generator().manual_seed(2))
        values[where < 0] = math.nan
        values.requires_grad_()
        for delta in (0.0, 1.0):
            x = logits.clone().requires_grad_()
            got = LOSSES[loss](
                x, marks, values, delta=delta, positives=where, algorithm=algorithm, **given
            )
            assert all(value.isnan() for value in got)
            for value in got:
                if loss == "aLRP" and value is got[1]:  # its gradient is by the errors alone
                    continue
                (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
                assert gradient[positives].isnan().all()
                assert (gradient[marks == -1] == 0).all()
            if loss == "aLRP":
                (gradient,) = torch.autograd.grad(got[1], values)
                assert (gradient[where < 0] == 0).all()


@pytest.mark.parametrize(("loss", "algorithm"), ALGORITHMS)
def test_without_a_positive_nan_is_nothing(loss, algorithm):
    x = torch.tensor([math.nan, 1.0, -2.0], requires_grad=True)
    for groups in (None, torch.tensor([0, 0, 1])):
        for positives in (None, torch.tensor([-1, -1])):
            values = torch.rand(0 if positives is None else 2)
            got = LOSSES[loss](
                x, torch.zeros(3), values, positives=positives, groups=groups, algorithm=algorithm
            )
            assert all(value == 0 for value in got)
            (gradient,) = torch.autograd.grad(sum(got), x)
            assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("many", [-1.0, 1.0])
@pytest.mark.parametrize("few", [0, sort.SEARCH_BELOW])
@pytest.mark.parametrize("place", PLACES)
def test_nan_spoils_the_same_numbers(place, few, many, sign, dtype):
    """A NaN among the positives spoils all three, one among the negatives NFP; others stay."""
    logits, marks = batch("many", place, sign, dtype)
    levels, targets = [logits.reshape(4, 5, -1)], [marks.reshape(4, 5, -1)]
    values = torch.rand(int((marks == 1).sum()), dtype=torch.float64)
    images = [torch.arange(4).reshape(4, 1, 1).expand_as(targets[0])]
    for groups in ((), images):
        given = batch_of(levels, targets, 1.0, groups)
        expected = pairwise.count(widen(given), values)
        with (
            mock.patch.object(sort, "SEARCH_BELOW", few),
            mock.patch.object(relevant, "MAX_SPARSE_LOGITS", many),
        ):
            got = breakpoints.count(given, values)
        for a, b, ranked in zip(got, expected, (False, True, True), strict=True):
            spoiled = "positive" in place or not ranked
            assert b.isnan().all() if spoiled else not b.isnan().any()
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
