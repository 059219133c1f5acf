"""What a NaN among the logits does to every loss, in every algorithm on every backend.

Where there is a positive, and a logit that is not ignored is NaN, every value is NaN, and so is the
gradient at every positive, in all groups. Without a positive all is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alrp_triton import (
    alrp_loss,
    ap_loss,
    backend,
    error_driven_loss,
    ndcg_loss,
    rank_sort_loss,
)
from alrp_triton.loss_terms import ap_errors

IGNORE = -100
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

PAIRS = [(impl, algorithm) for impl in ("torch", "triton") for algorithm in backend.ALGORITHMS[1:]]


LOSSES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "ap": lambda *call, each, **settings: (ap_loss(*call, **settings),),
    "ndcg": lambda *call, each, **settings: (ndcg_loss(*call, **settings),),
    "skewed": lambda *call, each, **settings: (
        error_driven_loss(*call, ap_errors, skew=2.0, **settings),
    ),
    "alrp": lambda *call, each, **settings: alrp_loss(*call, each, **settings),
    "rank sort": lambda *call, each, **settings: rank_sort_loss(*call, each, **settings),
}

# Targets of anchors of one class, and their groups: positives in groups 1 and 2, and in 3 nobody.
_MIXED = ([0, -1, 0, -1, IGNORE, -1, -1, 0, -1], [1, 1, 2, 2, 1, 3, 3, 1, 2])
_POSITIVES = ([0, 0, 0, IGNORE], [1, 2, 1, 3])
_ALONE = ([0], [1])
_NOBODY = ([-1, -1, IGNORE, -1], [1, 2, 1, 3])


class Call:
    """A call of a loss on given anchors, and what comes of it."""

    def __init__(self, anchors: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
        self.targets, self.groups = (torch.tensor(x, device=DEVICE) for x in anchors)
        self.logits = torch.randn(len(anchors[0]), 1, device=DEVICE).to(dtype)

    def run(
        self, run: tuple[tuple[str, str], str], grouped: bool = False, padding: int = 0
    ) -> tuple[list[Tensor], Tensor]:
        """Return the values, and the gradient of their sum by the logits."""
        (impl, algorithm), loss = run
        places = (self.targets == 0).nonzero()[:, 0]
        settings: dict[str, Any] = {"impl": impl, "algorithm": algorithm}
        if grouped:
            settings["groups"] = self.groups
        if padding:
            settings["positives"] = torch.cat([places.new_full((padding,), -1), places])
        each = torch.linspace(0.2, 0.8, places.numel() + padding, device=DEVICE)
        leaf = self.logits.clone().requires_grad_()
        values = LOSSES[loss](leaf, self.targets, each=each, **settings)
        (gradient,) = torch.autograd.grad(sum(values), leaf)
        return [value.detach() for value in values], gradient[:, 0]


# The skewed distribution has no other algorithm than to evaluate every pair.
RUNS = [
    (pair, loss)
    for pair in PAIRS
    for loss in LOSSES
    if (loss, pair[1]) != ("skewed", "breakpoints")
]


@pytest.fixture(params=RUNS, ids=lambda run: " ".join((*run[0], run[1])))
def run(request: pytest.FixtureRequest) -> tuple[tuple[str, str], str]:
    """Return a backend with an algorithm, and a loss: each with each."""
    if request.param[0][0] == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.mark.parametrize(
    ("anchors", "place", "dtype", "grouped", "padding"),
    [
        (_MIXED, 0, torch.float32, True, 0),  # a positive
        (_MIXED, 7, torch.bfloat16, False, 2),
        (_MIXED, 6, torch.float32, True, 2),  # a negative in whose group nobody is positive
        (_MIXED, 8, torch.float16, False, 0),
        (_POSITIVES, 1, torch.float64, True, 0),  # without any negative
        (_ALONE, 0, torch.float32, False, 3),
    ],
)
def test_a_nan_leaves_no_value_standing(
    anchors: tuple[list[int], list[int]],
    place: int,
    dtype: torch.dtype,
    grouped: bool,
    padding: int,
    run: tuple[tuple[str, str], str],
) -> None:
    call = Call(anchors, dtype)
    call.logits[place] = torch.nan
    values, gradient = call.run(run, grouped, padding)
    assert all(value.isnan() for value in values)
    assert gradient[call.targets == 0].isnan().all()
    assert (gradient[call.targets == IGNORE] == 0).all()


def test_a_nan_that_is_ignored_is_not_there(run: tuple[tuple[str, str], str]) -> None:
    call = Call(_MIXED, torch.float32)
    values, gradient = call.run(run, grouped=True)
    call.logits[call.targets == IGNORE] = torch.nan
    others, other = call.run(run, grouped=True)
    assert all(torch.equal(*both) for both in zip(values, others, strict=True))
    assert torch.equal(gradient, other)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "grouped", "padding"),
    [(torch.float32, True, 2), (torch.float16, False, 2), (torch.float32, True, 0)],
)
def test_without_a_positive_all_is_0(
    dtype: torch.dtype, grouped: bool, padding: int, run: tuple[tuple[str, str], str]
) -> None:
    call = Call(_NOBODY, dtype)
    call.logits[0], call.logits[2:] = torch.inf, torch.nan
    values, gradient = call.run(run, grouped, padding)
    assert all(value == 0 for value in values)
    assert (gradient == 0).all()
