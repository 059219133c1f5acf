"""The authors' losses on this package's road: their numbers, and what their heads do with them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from batches import relative_error
from conftest import HAS_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss, set_backend
from alrp_triton.integrations.authors import AP_loss, APLoss, RankSort, aLRPLoss
from alrp_triton.reference import pairwise
from alrp_triton.testing import kernel_tolerance as budgets
from alrp_triton.testing.loss_tolerance import (
    SECOND_ORDER,
    LossResult,
    Uncertain,
    loss_budget,
    update_budget,
)
from alrp_triton.testing.rank_sort_tolerance import rank_sort_budget

AUTHORS = np.load(Path(__file__).parents[1] / "data" / "authors.npz")
DEVICE = "cuda" if HAS_GPU else "cpu"
CASES = ("init", "mid", "late", "small_delta", "ties", "ignore", "one_pos", "one_neg")
SMALL = CASES[3:]  # what the interpreter has time for
BACKENDS = [
    *(("torch", algorithm, case) for algorithm in ("pairwise", "breakpoints") for case in CASES),
    *(("triton", algorithm, case) for algorithm in ("pairwise", "breakpoints") for case in SMALL),
]
LOSSES = {
    "alrp": lambda logits, targets: aLRPLoss.apply(logits, targets, _errors(targets))[0],
    "ap": APLoss.apply,
    "rank_sort": lambda logits, targets: sum(RankSort.apply(logits, targets)),
}


def _errors(targets: Tensor) -> Tensor:
    return torch.linspace(0.1, 0.9, int((targets == 1).sum()), device=targets.device)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[tuple[str, str, str]]:
    """Return (impl, algorithm, case), the first two set for the program."""
    impl, algorithm, _ = request.param
    if impl == "triton":
        pytest.importorskip("triton")
    set_backend(impl, algorithm)
    yield request.param
    set_backend()


class Golden(NamedTuple):
    """A case of the golden numbers, float64."""

    logits: Tensor  # (M,)
    targets: Tensor  # (M,) 1 / 0 / -1
    loc_errors: Tensor  # (P,)
    quality: Tensor  # (P,)
    delta: float
    rs_delta: float
    alrp_cls: Tensor
    alrp_rank: Tensor
    alrp_grad: Tensor
    alrp_loc_hard: Tensor
    alrp_loc_hard_grad: Tensor
    ap: Tensor
    ap_grad: Tensor
    rs_rank: Tensor
    rs_sort: Tensor
    rs_grad: Tensor

    @property
    def iou_targets(self) -> Tensor:
        """With the IoU in place of the 1."""
        marks = self.targets.double()
        return marks.masked_scatter(self.targets == 1, self.quality)

    @property
    def scores(self) -> Tensor:
        """(P,) of the positives."""
        return self.logits[self.targets == 1]

    @property
    def descending(self) -> Tensor:
        """(P,) the order in which the loc errors were summed: dloc/dEloc falls along it.

        Equal scores stood as `torch.argsort` left them there, which it does not promise to repeat.
        """
        return self.alrp_loc_hard_grad.argsort(descending=True)


def golden(case: str) -> Golden:
    fields = {name: torch.from_numpy(AUTHORS[f"{case}/{name}"]) for name in Golden._fields}
    fields = {name: x.to(DEVICE) for name, x in fields.items()}
    return Golden(**fields)._replace(
        delta=float(fields["delta"]), rs_delta=float(fields["rs_delta"])
    )


def leaf_of(logits: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return logits.to(dtype, copy=True).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_published_numbers(backend):
    """All of the three losses agree to 1e-10, entry by entry and relative."""
    case = golden(backend[-1])
    leaf = leaf_of(case.logits)
    cls_loss, rank, _ = aLRPLoss.apply(leaf, case.targets, case.loc_errors, case.delta)
    cls_loss.backward()
    assert relative_error(cls_loss, case.alrp_cls) < 1e-10
    assert relative_error(rank, case.alrp_rank) < 1e-10
    assert relative_error(leaf.grad, case.alrp_grad) < 1e-10

    leaf = leaf_of(case.logits)
    loss = APLoss.apply(leaf, case.targets, case.delta)
    loss.backward()
    assert relative_error(loss, case.ap) < 1e-10
    assert relative_error(leaf.grad, case.ap_grad) < 1e-10

    leaf = leaf_of(case.logits)
    ranking, sorting = RankSort.apply(leaf, case.iou_targets, case.rs_delta)
    (ranking + sorting).backward()
    assert relative_error(ranking, case.rs_rank) < 1e-10
    assert relative_error(sorting, case.rs_sort) < 1e-10
    assert relative_error(leaf.grad, case.rs_grad) < 1e-10


class Rounded(NamedTuple):
    """A golden case in float32, whose logits are exact there, and what its budgets are made of."""

    golden: Golden
    leaf: Tensor
    case: budgets.Case
    tiles: Any

    def check(self, value: Tensor, exact: Tensor, budget: Tensor) -> None:
        """Check a result in float32."""
        assert value.dtype == torch.float32
        assert ((value.detach().double() - exact).abs() <= budget).all()

    def check_gradient(self, exact: Tensor, budget: list[Tensor]) -> None:
        """Check the gradient by the logits."""
        self.check(self.leaf.grad, exact, budget[0].reshape(exact.shape))
        self.leaf.grad = None


def rounded(backend: tuple[str, str, str], delta: str, values: Callable) -> Rounded:
    from alrp_triton.kernels.tuning.block_sizes import default_breakpoint_tiles, default_tiles

    _, algorithm, name = backend
    exact = golden(name)
    leaf = leaf_of(exact.logits, torch.float32)
    level = leaf.detach().reshape(-1, 1, 1)
    case = budgets.find([level], [exact.targets.reshape(-1, 1, 1)], getattr(exact, delta))
    tiles = default_tiles()
    if algorithm == "breakpoints":
        tiles = default_breakpoint_tiles(32, torch.float32)
    return Rounded(exact, leaf, case._replace(values=values(exact)), tiles)


def as_level(gradient: Tensor) -> list[Tensor]:
    return [gradient.reshape(-1, 1, 1)]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_published_alrp_in_float32(backend):
    pytest.importorskip("triton")  # the budgets ask the kernels what they round
    this = rounded(backend, "delta", lambda exact: exact.loc_errors)
    exact = this.golden
    cls_loss, rank, _ = aLRPLoss.apply(this.leaf, exact.targets, exact.loc_errors, exact.delta)
    cls_loss.backward()
    values = torch.stack([exact.alrp_cls, exact.alrp_loc_hard])
    truth = LossResult(values, as_level(exact.alrp_grad), torch.zeros_like(exact.loc_errors))
    budget = loss_budget("alrp", this.case, this.tiles, truth, pairwise)
    this.check(cls_loss, exact.alrp_cls, budget.values[0])
    this.check_gradient(exact.alrp_grad, budget.by_logits)
    counts = this.case.expected_count(torch.float64)
    d_counts = budgets.count_budget(this.case, this.tiles, counts)
    unit = torch.finfo(torch.float32).eps
    this.check(rank, exact.alrp_rank, d_counts[0] + d_counts[1] + unit * exact.alrp_rank)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_published_ap_in_float32(backend):
    """The lowest error among those below is as far off as the farthest of them, at most."""
    pytest.importorskip("triton")
    this = rounded(backend, "delta", lambda exact: torch.zeros_like(exact.loc_errors))
    exact = this.golden
    loss = APLoss.apply(this.leaf, exact.targets, exact.delta)
    loss.backward()
    counts = this.case.expected_count(torch.float64)
    (nfp, rank_positive, _), off = counts, budgets.count_budget(this.case, this.tiles, counts)
    rank = nfp + rank_positive
    error = (off[0] + nfp / rank * (off[0] + off[1])) / rank
    order = exact.scores.argsort()
    interpolated, d_interpolated = torch.zeros_like(counts[:2])
    interpolated[order] = (nfp / rank)[order].cummin(0).values
    d_interpolated[order] = error[order].cummax(0).values
    budget = update_budget(
        this.case,
        this.tiles,
        as_level(exact.ap_grad),
        Uncertain(nfp, off[0]),
        Uncertain(interpolated, d_interpolated),
        pairwise,
    )
    unit = torch.finfo(torch.float32).eps
    this.check(loss, exact.ap, SECOND_ORDER * d_interpolated.mean() + unit * exact.ap)
    this.check_gradient(exact.ap_grad, budget)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_published_rank_sort_in_float32(backend):
    pytest.importorskip("triton")
    this = rounded(backend, "rs_delta", lambda exact: 1 - exact.quality)
    exact = this.golden
    values = RankSort.apply(this.leaf, exact.iou_targets, exact.rs_delta)
    sum(values).backward()
    truth = LossResult(
        torch.stack([exact.rs_rank, exact.rs_sort]), as_level(exact.rs_grad), exact.quality[:0]
    )
    budget = rank_sort_budget(this.case, exact.quality, this.tiles, truth, 0.5, 1e-10)
    this.check(torch.stack(values), truth.values, budget.values)
    this.check_gradient(exact.rs_grad, budget.by_logits)


def alrp_head(regression_losses: Tensor, rank: Tensor, descending: Tensor) -> Tensor:
    """Return the localisation value as heads for aLRP make it: hard order over smooth rank.

    The mean over positives, from the highest score on, of the summed losses so far over the rank.
    """
    return (regression_losses[descending].cumsum(0) / rank[descending].detach()).mean()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_alrp_head(backend):
    """What heads do with rank and order is the published localisation value and its gradient."""
    case = golden(backend[-1])
    regression_losses = leaf_of(case.loc_errors)
    _, rank, order = aLRPLoss.apply(case.logits, case.targets, regression_losses, case.delta)
    descending = case.descending
    assert torch.equal(case.scores[order.flip(0)], case.scores[descending])
    if backend[-1] != "ties":
        assert torch.equal(order.flip(0), descending)
    assert torch.equal(order, torch.argsort(case.scores))  # as published, ties too
    loc_loss = alrp_head(regression_losses, rank, descending)
    loc_loss.backward()
    assert relative_error(loc_loss, case.alrp_loc_hard) < 1e-10
    assert relative_error(regression_losses.grad, case.alrp_loc_hard_grad) < 1e-10


class ALRPHead:
    """What the heads for aLRP do with the maps of all levels, and how they balance themselves."""

    def __init__(self, num_classes: int, period: int) -> None:
        self.aLRP_Loss = aLRPLoss()
        self.num_classes, self.period = num_classes, period
        self.weight, self.history = 50.0, []

    def flatten(
        self, maps: list[Tensor], labels: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Put logits and marks of all levels in one row.

        Args:
            maps: (B, A*C, H, W) each.
            labels: (B, H, W, A) each, C for background.
            weights: like labels, 0 for ignored anchors.
        """
        rows = [x.permute(0, 2, 3, 1).reshape(-1, self.num_classes) for x in maps]
        label = torch.cat([x.reshape(-1) for x in labels])
        weight = torch.cat([x.reshape(-1) for x in weights])
        marks = torch.zeros(len(label), self.num_classes, dtype=torch.int64)
        marks[label < self.num_classes, label[label < self.num_classes]] = 1
        marks[weight == 0] = -1
        return torch.cat(rows).reshape(-1), marks.reshape(-1)

    def loss(self, logits: Tensor, marks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss_cls, loss_bbox), the latter weighted, of a loss of the box of each positive.

        The iteration that ends a period has the new weight already.
        """
        loss_cls, rank, order = self.aLRP_Loss.apply(logits, marks, boxes)
        ordered = boxes[order.detach()].flip(dims=[0])
        rank = rank[order.detach()].detach().flip(dims=[0])
        loss_bbox = (torch.cumsum(ordered, dim=0) / rank).mean()
        self.history.append((float(loss_cls.item()), float(loss_bbox.item())))
        if len(self.history) == self.period:
            cls, loc = np.mean(self.history, axis=0)
            self.weight, self.history = (loc + cls) / loc, []
        loss_bbox *= self.weight
        return loss_cls, loss_bbox


def head_batch(seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Draw two levels of two images, three anchors and four classes: maps, labels and weights."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (6, 5), (3, 2)
    maps = [2 * torch.randn(2, 3 * 4, *hw, generator=generator).double() for hw in sizes]
    labels = [torch.randint(5, (2, *hw, 3), generator=generator) for hw in sizes]
    for x in labels:
        x[torch.rand(x.shape, generator=generator) < 0.8] = 4
    weights = [torch.ones(x.shape) for x in labels]
    weights[0][(torch.rand(labels[0].shape, generator=generator) < 0.1) & (labels[0] == 4)] = 0
    return maps, labels, weights


def as_class_indices(labels: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Return (B * A, H, W) each, as `alrp_loss` takes them without flattening anything."""
    return [
        label.masked_fill(weight == 0, -100).permute(0, 3, 1, 2).flatten(0, 1)
        for label, weight in zip(labels, weights, strict=True)
    ]


def test_alrp_head_on_levels_over_three_periods():
    """Losses, weights and every gradient by hand; cls is that of `alrp_loss` on the maps."""
    head, period, weight, seen = ALRPHead(num_classes=4, period=2), 2, 50.0, []
    for iteration in range(6):
        maps, labels, weights = head_batch(iteration)
        maps = [x.requires_grad_() for x in maps]
        logits, marks = head.flatten(maps, labels, weights)
        boxes = torch.rand(int((marks == 1).sum())).double().requires_grad_()
        loss_cls, loss_bbox = head.loss(logits, marks, boxes)
        (3 * (loss_cls + loss_bbox)).backward()

        plain = Plain(logits.detach(), marks.double(), 1.0, 1e-5)
        errors = boxes.detach()
        cls, gradient = plain.alrp(errors)
        above = plain.step(plain.logits - plain.logits[marks == 1][:, None])
        above[:, marks == 1] = above[:, marks == 1].fill_diagonal_(1)
        rank = above[:, marks >= 0].sum(1)
        scores = plain.logits[marks == 1]
        no_lower = (scores >= scores[:, None]).double()  # no two are equal
        loc = (no_lower @ errors / rank).mean()
        seen.append((cls, loc))
        if len(seen) == period:
            total_cls, total_loc = map(sum, zip(*seen, strict=True))
            weight, seen = (total_cls + total_loc) / total_loc, []

        assert relative_error(loss_cls, cls) < 1e-10
        assert relative_error(loss_bbox, weight * loc) < 1e-10
        by_boxes = weight * (no_lower / rank[:, None]).sum(0) / len(errors)
        assert relative_error(boxes.grad, 3 * by_boxes) < 1e-10

        leaves = [x.detach().clone().requires_grad_() for x in maps]
        levels = [x.view(2 * 3, 4, *x.shape[2:]) for x in leaves]
        targets = as_class_indices(labels, weights)
        spread = spread_to_levels(errors, labels)
        ours, _ = alrp_loss(levels, targets, spread, 1.0)
        (3 * ours).backward()
        assert relative_error(ours, loss_cls) < 1e-12
        by_maps = head.flatten([x.grad for x in maps], labels, weights)[0]
        assert (by_maps - 3 * gradient).abs().max() <= 1e-12 * by_maps.abs().max()
        for map_, leaf in zip(maps, leaves, strict=True):
            assert (map_.grad - leaf.grad).abs().max() <= 1e-12 * leaf.grad.abs().max()


def spread_to_levels(errors: Tensor, labels: list[Tensor]) -> Tensor:
    """Reorder the losses of the boxes from (B, H, W, A) anchors to (B * A, H, W)."""
    parts = []
    for label, own in zip(labels, errors.split([int((x < 4).sum()) for x in labels]), strict=True):
        dense = torch.zeros(label.shape, dtype=errors.dtype).masked_scatter(label < 4, own)
        parts.append(dense.permute(0, 3, 1, 2)[(label < 4).permute(0, 3, 1, 2)])
    return torch.cat(parts)


def test_alrp_head_with_a_scaled_loss():
    """GradScaler scales so; the losses stay, the gradients are multiplied."""
    maps, labels, weights = head_batch(0)
    gradients = []
    for scale in (1.0, 65536.0):
        leaves = [x.float().clone().requires_grad_() for x in maps]
        boxes = torch.linspace(0.1, 0.9, sum(int((x < 4).sum()) for x in labels)).requires_grad_()
        head = ALRPHead(num_classes=4, period=2)
        losses = head.loss(*head.flatten(leaves, labels, weights), boxes)
        (scale * sum(losses)).backward()
        gradients.append([x.grad / scale for x in (*leaves, boxes)])
    assert all(map(torch.equal, *gradients))  # a power of 2


class RankSortHead:
    """What the heads for Rank & Sort do: box losses weighed by score, and brought to its size."""

    def __init__(self) -> None:
        self.loss_rank = RankSort()

    def loss(self, logits: Tensor, targets: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Return the loss of logits (M,), targets with the IoU, and a loss of each box."""
        ranking, sorting = self.loss_rank.apply(logits, targets, 0.5)
        weights = logits.detach()[targets > 0].sigmoid()
        box = (weights * boxes).sum() / weights.sum()
        box *= (ranking + sorting).detach() / float(box.item())
        return {"loss_rank": ranking, "loss_sort": sorting, "loss_bbox": box}


def test_rank_sort_head():
    case = golden("mid")
    leaf, boxes = leaf_of(case.logits), leaf_of(case.loc_errors)
    losses = RankSortHead().loss(leaf, case.iou_targets, boxes)
    sum(losses.values()).backward()
    classification = case.rs_rank + case.rs_sort
    assert relative_error(losses["loss_bbox"], classification) < 1e-10
    assert relative_error(leaf.grad, case.rs_grad) < 1e-10
    weights = case.scores.sigmoid()
    expected = classification * weights / (weights @ case.loc_errors)
    assert relative_error(boxes.grad, expected) < 1e-10


@pytest.mark.parametrize("case", [case for case in CASES if case != "small_delta"])
def test_ap_loss_of_the_repository_of_that_name(case):
    """It is called in an autograd function's forward, for (B, A, C) logits; delta is 1 there."""
    exact = golden(case)
    with torch.no_grad():
        gradient, loss = AP_loss(exact.logits.reshape(1, -1, 1), exact.targets.reshape(1, -1, 1))
    assert gradient.shape == (1, len(exact.logits), 1)
    assert loss.shape == (1,)
    assert not gradient.requires_grad
    assert not loss.requires_grad
    assert relative_error(gradient, exact.ap_grad) < 1e-10
    assert relative_error(loss, exact.ap) < 1e-10


class Plain(NamedTuple):
    """The published arithmetic, one positive after the other, on what the golden numbers lack."""

    logits: Tensor  # (M,)
    targets: Tensor  # (M,) the IoU, 0, or -1
    delta: float
    eps: float

    def step(self, x: Tensor) -> Tensor:
        """Return H(x)."""
        if self.delta == 0:
            return (x >= 0).double()
        return (x / (2 * self.delta) + 0.5).clamp(0, 1)

    def alrp(self, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Return cls_loss and its gradient."""
        positive, negative = self.targets > 0, self.targets == 0
        gradient, values = torch.zeros_like(self.logits), []
        for i in positive.nonzero()[:, 0]:
            h = self.step(self.logits - self.logits[i])
            h[i] = 0
            false = h[negative].sum()
            rank = 1 + h[positive].sum() + false
            values.append(false / rank)
            if false > self.eps:
                update = (false + h[positive] @ errors) / rank / positive.sum()
                gradient[i] -= update
                gradient[negative] += update * h[negative] / false
        return torch.stack(values).mean(), gradient

    def ap(self) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient."""
        positive, negative = self.targets > 0, self.targets == 0
        gradient, precision, shares = torch.zeros_like(self.logits), {}, {}
        for i in positive.nonzero()[:, 0].tolist():
            h = self.step(self.logits - self.logits[i])
            h[i] = 1
            precision[i] = h[positive].sum() / h[self.targets >= 0].sum()
            shares[i] = h[negative] / h[negative].sum().clamp(min=1e-300)
        errors = []
        for i in precision:
            below = [precision[k] for k in precision if self.logits[k] <= self.logits[i]]
            errors.append(1 - max(below))
            gradient[i] -= errors[-1] / len(precision)
            gradient[negative] += errors[-1] * shares[i] / len(precision)
        return torch.stack(errors).mean(), gradient

    def rank_sort(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return both values and the gradient of their sum."""
        positive, negative = self.targets > 0, self.targets == 0
        gradient, ranking, sorting = torch.zeros_like(self.logits), [], []
        number = positive.sum()
        for i in positive.nonzero()[:, 0]:
            h = self.step(self.logits - self.logits[i])  # of itself H(0)
            false, among = h[negative].sum(), h * positive
            ranking.append(false / (false + among.sum()))
            if false > self.eps:
                gradient[i] -= ranking[-1] / number
                gradient += ranking[-1] * h * negative / false / number
            fine = among * (self.targets >= self.targets[i])
            cost = 1 - self.targets
            sorting.append(among @ cost / among.sum() - fine @ cost / fine.sum())
            worse = among - fine
            if worse.sum() > self.eps:
                gradient[i] -= sorting[-1] / number
                gradient += sorting[-1] * worse / worse.sum() / number
        return torch.stack(ranking).mean(), torch.stack(sorting).mean(), gradient


@st.composite
def plain_cases(draw):
    """Draw ties, both steps, equal IoU, 0 and 1 among them, an eps that matters; some positive."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.integers(1, 40))
    logits = torch.randn(size, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        logits = (2 * logits).round() / 2
    iou = torch.rand(size, dtype=torch.float64, generator=generator)
    iou = (4 * iou).round() / 4 if draw(st.booleans()) else iou
    kind = torch.rand(size, generator=generator)
    targets = torch.where(kind < 0.4, iou, torch.where(kind < 0.9, 0.0, -1.0))
    targets[0] = 0.75
    delta, eps = draw(st.sampled_from([0.0, 1e-3, 0.5, 1.0])), draw(st.sampled_from([1e-10, 0.7]))
    return Plain(logits, targets, delta, eps)


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got.detach() - expected).abs().max() <= 1e-10)


@settings(max_examples=200, deadline=None)
@given(plain_cases())
def test_plain_loops(plain):
    positive = plain.targets > 0
    marks = torch.where(positive, 1.0, plain.targets)
    errors = plain.targets[positive]
    leaf = leaf_of(plain.logits)
    cls_loss, gradient = plain.alrp(errors)
    got = aLRPLoss.apply(leaf, marks, errors, delta=plain.delta, eps=plain.eps)[0]
    got.backward()
    assert close(got, cls_loss)
    assert close(leaf.grad, gradient)

    leaf = leaf_of(plain.logits)
    loss, gradient = plain.ap()
    got = APLoss.apply(leaf, marks, delta=plain.delta)
    got.backward()
    assert close(got, loss)
    assert close(leaf.grad, gradient)

    leaf = leaf_of(plain.logits)
    ranking, sorting, gradient = plain.rank_sort()
    got = RankSort.apply(leaf, plain.targets, delta_RS=plain.delta, eps=plain.eps)
    sum(got).backward()
    assert close(got[0], ranking)
    assert close(got[1], sorting)
    assert close(leaf.grad, gradient)


def draw(positives: int, size: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw logits, and targets with the IoU of the positives; a few ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator)
    targets = torch.zeros(size)
    place = torch.randperm(size, generator=generator)
    targets[place[:positives]] = torch.rand(positives, generator=generator) * 0.9 + 0.1
    targets[place[positives : positives + 10]] = -1
    return logits.to(DEVICE), targets.to(DEVICE)


def marks_of(loss: str, targets: Tensor) -> Tensor:
    return targets if loss == "rank_sort" else torch.where(targets > 0, 1, targets)


def test_what_differs_from_the_functions():
    """It is what the docstrings say; where nothing does, the numbers are theirs."""
    logits, targets = (x.double() for x in draw(20))
    marks, quality = marks_of("ap", targets), targets[targets > 0]
    cls_loss, rank, order = aLRPLoss.apply(logits, marks, quality)
    cls, loc = alrp_loss(logits, marks, quality)
    assert torch.equal(cls_loss, cls)
    assert relative_error(alrp_head(quality, rank, order.flip(0)), loc) > 1e-3
    assert APLoss.apply(logits, marks, 0.1) < ap_loss(logits, marks, 0.1) - 1e-3
    ranking, sorting = RankSort.apply(logits, targets)
    expected = rank_sort_loss(logits, marks, quality)
    assert relative_error(ranking, expected[0]) > 1e-3
    assert relative_error(sorting, expected[1]) > 1e-3
    hard = RankSort.apply(logits, targets, 0.0)[0]
    assert relative_error(hard, rank_sort_loss(logits, marks, quality, 0.0)[0]) < 1e-12


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_rank_sort_of_equal_iou_is_ap_with_the_self_term(delta):
    """The published bucketed AP approximates this: nothing to sort, and no interpolation."""
    logits, targets = (x.double() for x in draw(20))
    marks, leaf = marks_of("ap", targets), leaf_of(logits)
    ranking, sorting = RankSort.apply(leaf, marks, delta)
    h = Plain(logits, marks, delta, 0.0).step(logits - logits[marks == 1][:, None])
    false, among = h[:, marks == 0].sum(1), h[:, marks == 1].sum(1)
    assert relative_error(ranking, (false / (false + among)).mean()) < 1e-12
    assert sorting == 0
    ranking.backward()
    assert relative_error(leaf.grad[marks == 1], -false / (false + among) / 20) < 1e-12


def test_a_positive_with_iou_0_is_background():
    logits, targets = draw(20)
    positives = (targets > 0).nonzero()[:, 0]
    got = []
    for mark in (0.0, -0.5, float("nan"), -1.0):
        leaf, marked = leaf_of(logits), targets.clone()
        marked[positives[4]] = mark
        sum(RankSort.apply(leaf, marked)).backward()
        got.append(leaf.grad)
    assert got[0][positives[4]] > 0  # pushed down
    assert all(torch.equal(x, got[3]) for x in got[1:3])  # as if it was not there
    assert got[3][positives[4]] == 0


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("size", [0, 30])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_positive(loss, size, impl):
    """Zeros, attached, with zero gradients: nothing to crash on."""
    if impl == "triton":
        pytest.importorskip("triton")
    leaf, targets = leaf_of(torch.randn(size, device=DEVICE)), torch.zeros(size, device=DEVICE)
    targets[size // 2 :] = -1
    set_backend(impl)
    try:
        value = LOSSES[loss](leaf, targets)
        assert value == 0
        value.backward()
        assert leaf.grad.shape == (size,)
        assert (leaf.grad == 0).all()
        _, rank, order = aLRPLoss.apply(leaf, targets, targets[:0])
        assert rank.shape == order.shape == (0,)
        gradient, value = AP_loss(leaf, targets)
        assert (gradient == 0).all()
        assert value.tolist() == [0]
    finally:
        set_backend()


def test_no_negative():
    logits, targets = draw(20)
    targets = torch.where(targets == 0, -1, targets)
    marks = marks_of("ap", targets)
    leaf = leaf_of(logits)
    for value in (LOSSES["alrp"](leaf, marks), APLoss.apply(leaf, marks)):
        assert value == 0
        (gradient,) = torch.autograd.grad(value, leaf)
        assert (gradient == 0).all()
    ranking, sorting = RankSort.apply(leaf, targets)
    assert ranking == 0
    assert sorting > 0
    (gradient,) = torch.autograd.grad(ranking + sorting, leaf)
    assert gradient[targets > 0].abs().sum() > 0
    assert (gradient[targets < 0] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_upstream_gradient_scales(loss):
    logits, targets = draw(20)
    targets, leaf = marks_of(loss, targets), leaf_of(logits)
    value = LOSSES[loss](leaf, targets)
    (once,) = torch.autograd.grad(value, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(value, leaf, torch.tensor(-3.0, dtype=torch.float64))
    assert once.abs().sum() > 0
    assert relative_error(again, -3 * once) < 1e-14


def test_the_gradient_of_rank_sort_rides_on_the_ranking_value():
    logits, targets = draw(20)
    leaf = leaf_of(logits)
    ranking, sorting = RankSort.apply(leaf, targets)
    (both,) = torch.autograd.grad(ranking + sorting, leaf, retain_graph=True)
    (first,) = torch.autograd.grad(2 * ranking, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(sorting, leaf)
    assert relative_error(first, 2 * both) < 1e-14
    assert (second == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients(without, loss):
    """A validation gets the same value, attached to nothing."""
    logits, targets = draw(20)
    leaf, targets = leaf_of(logits), marks_of(loss, targets)
    with without():
        value = LOSSES[loss](leaf, targets)
    assert not value.requires_grad
    assert torch.equal(value, LOSSES[loss](leaf, targets))


@pytest.mark.parametrize("loss", LOSSES)
def test_values_may_be_changed_in_place(loss):
    """Heads weigh them so."""
    logits, targets = draw(20)
    leaf = leaf_of(logits)
    value = LOSSES[loss](leaf, marks_of(loss, targets))
    if loss == "rank_sort":
        value, _ = RankSort.apply(leaf, targets)
    (expected,) = torch.autograd.grad(3 * value, leaf, retain_graph=True)
    value *= 3
    value.backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_under_autocast(loss, dtype):
    """Half logits compute as if upcast, also under autocast; a gradient of their own dtype."""
    logits, targets = draw(20)
    logits, targets = logits.to(dtype), marks_of(loss, targets)
    half, wide = logits.clone().requires_grad_(), leaf_of(logits, torch.float32)
    with torch.autocast(DEVICE, dtype=dtype):
        value = LOSSES[loss](half, targets)
    value.backward()
    expected = LOSSES[loss](wide, targets)
    expected.backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert half.grad.dtype == dtype
    assert torch.equal(half.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float16, torch.float64])
def test_targets_of_any_dtype_and_shape(dtype):
    logits, targets = draw(20)
    marks = marks_of("ap", targets)
    for loss in LOSSES:
        expected = LOSSES[loss](logits, marks)
        shaped = logits.reshape(10, 4, 5), marks.to(dtype).reshape(10, 4, 5)
        assert torch.equal(LOSSES[loss](*shaped), expected)


def test_order_of_positives_in_strided_logits():
    """The IoU are looked up where the positives stand, however both lie in memory."""
    logits, targets = draw(20)
    expected = RankSort.apply(logits, targets)
    turned = logits.reshape(20, 10).T.contiguous().T
    assert all(map(torch.equal, RankSort.apply(turned, targets.reshape(20, 10)), expected))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_logit_gives_a_nan_loss(loss):
    logits, targets = draw(20)
    targets = marks_of(loss, targets)
    for place in ((targets > 0).nonzero()[3], (targets == 0).nonzero()[3]):
        spoilt = logits.clone()
        spoilt[place] = torch.nan
        assert LOSSES[loss](spoilt, targets).isnan()


@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_calls_are_named(loss):
    logits, targets = draw(20)
    with pytest.raises(ValueError, match="targets: expected the shape of logits"):
        LOSSES[loss](logits.reshape(20, 10), torch.zeros(20, device=DEVICE))
    with pytest.raises(TypeError, match="logits: expected a tensor, got list"):
        LOSSES[loss]([logits], marks_of(loss, targets))
    with pytest.raises(TypeError, match="logits: expected float32"):
        LOSSES[loss](logits.long(), marks_of(loss, targets))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda right: None,
        lambda right: 1.0,
        lambda right: right.tolist(),
        lambda right: right.to(torch.complex64),
        lambda right: right.to_sparse(),
        lambda right: torch.nested.nested_tensor([right]),
    ],
    ids=["none", "number", "list", "complex", "sparse", "nested"],
)
@pytest.mark.parametrize("name", ["logits", "targets"])
def test_what_is_no_tensor_of_numbers_is_named(loss, wrong, name):
    logits, targets = draw(20)
    targets = marks_of(loss, targets)
    given = {"logits": logits, "targets": targets}
    errors = torch.rand(20, device=DEVICE)
    given[name] = wrong(given[name])
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        aLRPLoss.apply(*given.values(), errors) if loss == "alrp" else LOSSES[loss](*given.values())


@pytest.mark.parametrize(
    "eps", [None, "1", True, [1], torch.tensor(1.0), 1j, float("nan"), -1e-9, 10**400]
)
def test_a_wrong_eps_is_named(eps):
    logits, targets = draw(20)
    for call in (
        lambda: aLRPLoss.apply(logits, marks_of("alrp", targets), targets[targets > 0], eps=eps),
        lambda: RankSort.apply(logits, targets, eps=eps),
    ):
        with pytest.raises(
            (TypeError, ValueError), match=r"^eps: expected a number( from 0 on)?, got"
        ):
            call()


def test_eps_of_any_real_type():
    logits, targets = draw(20)
    expected = RankSort.apply(logits, targets, eps=0.5)
    for eps in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        assert all(map(torch.equal, RankSort.apply(logits, targets, eps=eps), expected))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_second_derivative(loss):
    logits, targets = draw(20)
    leaf = leaf_of(logits)
    value = LOSSES[loss](leaf, marks_of(loss, targets))
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def test_wrong_regression_losses_are_named():
    logits, targets = draw(20)
    marks = marks_of("alrp", targets)
    with pytest.raises(ValueError, match=r"regression_losses: expected shape \(P,\)"):
        aLRPLoss.apply(logits, marks, torch.rand(20, 1, device=DEVICE))
    with pytest.raises(ValueError, match=r"^regression_losses: expected \d+ entries, .* got 19"):
        aLRPLoss.apply(logits.cpu(), marks.cpu(), torch.rand(19))
    with pytest.raises(TypeError, match="regression_losses: expected a floating tensor"):
        aLRPLoss.apply(logits, marks, torch.ones(20).long())


class Operators(TorchDispatchMode):
    """Counts what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note the operator down and run it."""
        self.seen[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loop_over_positives_and_no_waiting(loss):
    """As many operators for 5 positives as for 90; the host asks for their number at most."""
    seen = []
    for positives in (5, 90):
        logits, targets = draw(positives)
        targets, leaf = marks_of(loss, targets), logits.clone().requires_grad_()
        with Operators() as operators:
            if loss == "alrp":
                errors = torch.ones(positives, device=DEVICE)
                value = aLRPLoss.apply(leaf, targets, errors)[0]
            else:
                value = LOSSES[loss](leaf, targets)
            value.backward()
        seen.append(operators.seen)
    assert seen[0] == seen[1]
    assert seen[0]["alrp_triton::count"] == seen[0]["alrp_triton::gradient"] == 1
    assert seen[0]["alrp_triton::sorting_count"] == (loss == "rank_sort")
    assert seen[0]["aten::_local_scalar_dense"] == (loss != "alrp")
    assert not seen[0].keys() & {"aten::nonzero", "aten::masked_select", "aten::unique_dim"}


@pytest.mark.gpu
def test_alrp_never_waits():
    logits, targets = draw(20)
    marks, errors = marks_of("alrp", targets), torch.rand(20, device=DEVICE)
    leaf = logits.clone().requires_grad_()
    aLRPLoss.apply(leaf, marks, errors)[0].backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        cls_loss, rank, order = aLRPLoss.apply(leaf, marks, errors)
        (cls_loss + alrp_head(errors, rank, order.flip(0))).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles(loss):
    """It is one graph: AP and Rank & Sort make room for every logit, most of it padding."""
    logits, targets = draw(20)
    targets = marks_of(loss, targets)
    errors = torch.linspace(0.1, 0.9, 20, device=DEVICE)

    def call(logits, targets):
        if loss == "alrp":
            return aLRPLoss.apply(logits, targets, errors)[0]
        return LOSSES[loss](logits, targets)

    eager, compiled = leaf_of(logits), leaf_of(logits)
    call(eager, targets).backward()
    torch.compile(call, fullgraph=True)(compiled, targets).backward()
    assert relative_error(compiled.grad, eager.grad) < 1e-12


def test_runs_without_triton():
    """It runs in a process of its own: nothing on the way imports it."""
    code = """
import sys
sys.modules["triton"] = None  # any import of it raises
import torch
from alrp_triton.integrations.authors import APLoss, RankSort, aLRPLoss
logits, targets = torch.randn(9, requires_grad=True), torch.tensor([1.0, 0, 0, 1, 0, 0, 0, -1, 0])
cls_loss, rank, order = aLRPLoss().apply(logits, targets, torch.rand(2))
(cls_loss + APLoss().apply(logits, targets) + sum(RankSort().apply(logits, targets))).backward()
print(logits.grad.abs().sum().item() > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
