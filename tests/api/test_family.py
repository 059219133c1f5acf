"""Every loss of the family against Algorithm 1 written out over all pairs, with groups and skew."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from batches import DISTRIBUTIONS, detector_batch, relative_error
from conftest import HAS_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alrp_triton import (
    ALRPLoss,
    APLoss,
    NDCGLoss,
    RankSortLoss,
    alrp_loss,
    ap_loss,
    error_driven_loss,
    localisation_errors,
    ndcg_loss,
    rank_sort_loss,
    set_backend,
)
from alrp_triton.loss_terms import Counts, Errors, alrp_errors, ap_errors, ndcg_errors

ALGORITHMS = ("pairwise", "breakpoints")
DELTAS = (0.0, 1e-3, 0.5, 1.0)
LOSSES = ("ap", "alrp", "ndcg", "rank_sort", "own")
EPS = torch.finfo(torch.float32).eps
DEVICE = "cuda" if HAS_GPU else "cpu"


class Batch(NamedTuple):
    """One flat list of float64 logits; levels of them in one test."""

    logits: Tensor  # (n,)
    targets: Tensor  # (n,) 1 / 0 / -1
    groups: Tensor | None  # (n,)
    values: Tensor  # (P,) in [0, 1]
    delta: float
    skew: float

    @property
    def settings(self) -> dict:
        """Keywords of every loss."""
        return {"delta": self.delta, "groups": self.groups}


class Truth(NamedTuple):
    """What Algorithm 1 gives."""

    loss: Tensor  # by Theorem 1: the sum of the primary terms l(i) p(j|i) / Z over all pairs
    gradient: Tensor


def step(x: Tensor, delta: float) -> Tensor:
    return (x >= 0).double() if delta == 0 else (x / (2 * delta) + 0.5).clamp(0, 1)


def above(batch: Batch, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return H(x) of positives (rows) and `others` (columns) of one group, and the margins."""
    mine = batch.targets == 1
    x = batch.logits[others] - batch.logits[mine][:, None]
    h = step(x, batch.delta)
    if batch.groups is not None:
        h = h * (batch.groups[others] == batch.groups[mine][:, None])
    return h, (x + batch.delta).clamp(min=0)


def among_positives(batch: Batch) -> Tensor:
    """Return H(x_ik), 0 for k = i."""
    return above(batch, batch.targets == 1)[0].fill_diagonal_(0)


def counts_of(batch: Batch) -> Counts:
    h, others = above(batch, batch.targets == 0)[0], among_positives(batch)
    number = torch.tensor(float(len(others)), dtype=torch.float64)
    return Counts(h.sum(1), 1 + others.sum(1), batch.values, others @ batch.values, number)


def algorithm_1(h: Tensor, share: Tensor, errors: Errors) -> tuple[Tensor, Tensor, Tensor]:
    """Spread errors over those above: (loss, gradient by positives, gradient by the others).

    Args:
        h: (P, M) H(x_ij).
        share: (P, M) what p(j|i) is proportional to, if there is any.
        errors: of the positives.
    """
    share = torch.where(share.sum(1, keepdim=True) > 0, share, h)
    reached = h.sum(1) > 0
    p = share[reached] / share[reached].sum(1, keepdim=True)
    primary = errors.error[reached, None] * p
    difference = torch.where(reached, errors.error - errors.target, 0.0) / errors.normaliser
    # The error of a positive that nobody stands above has nowhere to go.
    loss = (primary.sum() + errors.error[~reached].sum()) / errors.normaliser
    return loss, -difference, difference[reached] @ p


def ranking(batch: Batch, errors: Errors) -> Truth:
    """Spread the errors over the negatives."""
    h, margin = above(batch, batch.targets == 0)
    loss, by_positives, by_negatives = algorithm_1(h, h * margin**batch.skew, errors)
    gradient = torch.zeros_like(batch.logits)
    gradient[batch.targets == 1] = by_positives
    gradient[batch.targets == 0] = by_negatives
    return Truth(loss, gradient)


def sorting(batch: Batch) -> Truth:
    """Spread the sorting error of Rank & Sort over the worse positives."""
    quality, h = batch.values, among_positives(batch)
    h.fill_diagonal_(1)
    fine = h * (quality >= quality[:, None])
    error = h @ (1 - quality) / h.sum(1)
    target = fine @ (1 - quality) / fine.sum(1)
    worse = h - fine
    loss, own, passed = algorithm_1(worse, worse, Errors(error, target, len(quality)))
    gradient = torch.zeros_like(batch.logits)
    gradient[batch.targets == 1] = own + passed
    return Truth(loss, gradient)


def own_loss(counts: Counts) -> tuple[Tensor, Tensor, Tensor]:
    """Return l, l* and Z that nobody has thought of: a root of the rank, values as a margin."""
    worst = counts.rank.sqrt() + counts.value_sum.sin()
    return worst, counts.rank_positive.sqrt() - counts.values, counts.num_positives**2 + 1


ERRORS = {"ap": ap_errors, "alrp": alrp_errors, "ndcg": ndcg_errors, "own": own_loss}


def truth_of(loss: str, batch: Batch) -> list[Truth]:
    counts = counts_of(batch)
    if loss == "rank_sort":
        return [ranking(batch, ap_errors(counts)), sorting(batch)]
    return [ranking(batch, Errors(*ERRORS[loss](counts)))]


def call(loss: str, batch: Batch, logits: Tensor, **settings) -> tuple[Tensor, ...]:
    """Call the public function that `truth_of` describes."""
    settings = {**batch.settings, **settings}
    if batch.skew or loss == "own":
        arguments = logits, batch.targets, ERRORS[loss], batch.values
        return (error_driven_loss(*arguments, skew=batch.skew, **settings),)
    if loss == "alrp":
        cls, loc = alrp_loss(logits, batch.targets, batch.values, **settings)
        return (cls + loc,)
    if loss == "rank_sort":
        return rank_sort_loss(logits, batch.targets, batch.values, **settings)
    return ({"ap": ap_loss, "ndcg": ndcg_loss}[loss](logits, batch.targets, **settings),)


@st.composite
def batches(draw, skew: bool = False):
    """Draw a list with ties or outliers, 0 to 12 positives, and groups of several kinds."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.integers(1, 60))
    logits = torch.randn(size, dtype=torch.float64, generator=generator)
    regime = draw(st.sampled_from(["normal", "ties", "equal", "outlier"]))
    if regime == "ties":
        logits = (2 * logits).round() / 2
    elif regime == "equal":
        logits.fill_(0.5)
    elif regime == "outlier":
        logits[0] = draw(st.sampled_from([-40.0, 1e4]))
    targets = (torch.rand(size, generator=generator) < draw(st.sampled_from([0.1, 0.5]))).long()
    targets[torch.rand(size, generator=generator) > 0.9] = -1
    kind = draw(st.sampled_from(["none", "one", "few", "many"]))
    groups = None
    if kind != "none":
        most = {"one": 1, "few": 3, "many": 1000}[kind]
        groups = torch.randint(-most, 1, (size,), generator=generator) * 2**40
    values = torch.rand(int((targets == 1).sum()), dtype=torch.float64, generator=generator)
    values = (values * 4).round() / 4 if draw(st.booleans()) else values  # ties, 0 and 1
    power = draw(st.sampled_from([0.5, 1.0, 2.0, 4.0])) if skew else 0.0
    return Batch(logits, targets, groups, values, draw(st.sampled_from(DELTAS)), power)


def check(loss: str, batch: Batch, accuracy: float = 1e-9, balance: float = 1e-12, **settings):
    """Check values (Theorem 1), every entry of the gradients, and their balance (Theorem 2)."""
    expected = truth_of(loss, batch)
    for part, truth in enumerate(expected):
        leaf = batch.logits.clone().requires_grad_()
        got = call(loss, batch, leaf, **settings)
        assert len(got) == len(expected)
        got[part].backward()
        if not batch.values.numel():
            assert got[part] == 0
            assert (leaf.grad == 0).all()
            continue
        assert abs(got[part] - truth.loss) <= accuracy * truth.loss.abs().clamp(min=1)
        assert (leaf.grad - truth.gradient).abs().max() <= accuracy * truth.gradient.abs().max()
        assert leaf.grad.sum().abs() <= balance * leaf.grad.abs().sum()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=100, deadline=None)
@given(batch=batches())
def test_every_loss_is_algorithm_1(loss, algorithm, batch):
    check(loss, batch, algorithm=algorithm)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_algorithm_1_on_the_kernels(loss, algorithm, grouped):
    """Logits are float64; breakpoints place a logit in fixed point, as finely as float32 does."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, dtype=torch.float64, generator=generator).to(DEVICE)
    targets = torch.zeros_like(logits, dtype=torch.int64)
    targets[::5], targets[3::7] = 1, -1
    values = torch.rand(60, dtype=torch.float64, generator=generator).to(DEVICE)[targets == 1]
    groups = torch.arange(60, device=DEVICE) % 4 - 1 if grouped else None
    for delta in DELTAS:
        batch = Batch(logits, targets, groups, values, delta, 0.0)
        check(loss, batch, 64 * EPS, 64 * EPS, impl="triton", algorithm=algorithm)


@pytest.mark.parametrize("loss", ["ap", "alrp", "ndcg", "own"])
@settings(max_examples=100, deadline=None)
@given(batch=batches(skew=True))
def test_every_loss_is_algorithm_1_with_a_skewed_distribution(loss, batch):
    check(loss, batch)


@pytest.mark.parametrize("margin", [10.0**-n for n in (80, 130, 136, 150, 155, 160, 162, 170, 300)])
@pytest.mark.parametrize("skew", [1.0, 2.0, 4.0])
def test_margins_whose_powers_are_hardly_numbers(skew, margin):
    """A share is that of the powers as long as these are 2^-900 together, and then that of ties."""
    logits = torch.tensor([0.0, margin, 2 * margin, -1.0], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 0, 0, 0])
    error_driven_loss(logits, targets, ap_errors, delta=0.0, skew=skew).backward()
    tied = skew * math.log(margin) + math.log(1 + 2**skew) < -900 * math.log(2)
    near, far = (1, 1) if tied else (1, 2**skew)
    expected = [2 / 3 * part / (near + far) for part in (-near - far, near, far, 0)]
    assert logits.grad.tolist() == pytest.approx(expected, rel=1e-9, abs=0)


@settings(max_examples=100, deadline=None)
@given(
    batch=st.one_of(batches(), batches(skew=True)),
    coefficients=st.lists(st.floats(-2, 2), min_size=8, max_size=8),
)
def test_any_errors_are_balanced(batch, coefficients):
    """Both theorems hold for any l and l*, sensible or not, in groups and skewed."""
    a = torch.tensor(coefficients, dtype=torch.float64)

    def errors_fn(counts):
        features = torch.stack([counts.nfp, counts.rank.log(), counts.values, counts.value_sum])
        return a[:4] @ features, a[4:] @ features, 1 + counts.num_positives

    leaf = batch.logits.clone().requires_grad_()
    arguments = leaf, batch.targets, errors_fn, batch.values
    loss = error_driven_loss(*arguments, skew=batch.skew, **batch.settings)
    loss.backward()
    assert leaf.grad.sum().abs() <= 1e-11 * leaf.grad.abs().sum()
    if batch.values.numel():
        counts = counts_of(batch)
        expected = ranking(batch, Errors(*errors_fn(counts)))
        # l and l* may cancel: what they are made of is rounded, not their difference.
        tolerance = 1e-12 * (1 + counts.rank.sum() + counts.value_sum.sum())
        assert abs(loss - expected.loss) <= tolerance
        assert (leaf.grad - expected.gradient).abs().max() <= tolerance


# By hand: scores 4, 3, 2, 1 of a positive, a negative, a positive and a negative, hard step.
HAND = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
HAND_TARGETS = torch.tensor([1, 0, 1, 0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ndcg_by_hand(algorithm):
    logits = HAND.clone().requires_grad_()
    loss = ndcg_loss(logits, HAND_TARGETS, delta=0.0, algorithm=algorithm)
    ideal = 1 + 1 / math.log2(3)
    assert abs(loss.item() - (1 - (1 + 1 / 2) / ideal)) < 1e-12  # the second positive is third
    loss.backward()
    moved = (1 / math.log2(3) - 1 / 2) / ideal
    expected = torch.tensor([0, moved, -moved, 0], dtype=torch.float64)
    assert relative_error(logits.grad, expected) < 1e-12
    perfect = ndcg_loss(HAND, torch.tensor([1, 1, 0, 0]), delta=0.0, algorithm=algorithm)
    assert abs(perfect.item()) < 1e-12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rank_and_sort_by_hand(algorithm):
    logits = HAND.clone().requires_grad_()
    quality = torch.tensor([0.0, 0.8])  # IoU 0 is a positive all the same
    settings = {"delta": 0.0, "algorithm": algorithm}
    ranking_part, sorting_part = rank_sort_loss(logits, HAND_TARGETS, quality, **settings)
    assert abs(ranking_part.item() - (0 + 1 / 3) / 2) < 1e-12
    # The second sees itself (0.2) and a worse one (1): 0.6, where 0.2 would be due.
    assert abs(sorting_part.item() - (1 + 0.6) / 2) < 1e-7
    (3 * ranking_part + 5 * sorting_part).backward()
    expected = torch.tensor([5 * 0.2, 3 / 6, -3 / 6 - 5 * 0.2, 0], dtype=torch.float64)
    assert (logits.grad - expected).abs().max() < 1e-7


def test_groups_are_ranked_one_by_one():
    """The truth is AP of each image alone, weighted by its positives: values and gradients."""
    parts = [detector_batch("spread", 50, 4, number, seed=number) for number in (1, 5, 9)]
    logits = torch.stack([part for part, _ in parts]).double()  # (3, 50, 4)
    targets = torch.stack([part for _, part in parts])
    leaf = logits.clone().requires_grad_()
    images = torch.arange(3)[:, None]
    loss = ap_loss(leaf.transpose(1, 2), targets, groups=images)
    loss.backward()
    total = 0
    for image, number in enumerate((1, 5, 9)):
        alone = logits[image].clone().requires_grad_()
        part = ap_loss(alone, targets[image]) * number / 15
        part.backward()
        total += part.item()
        assert relative_error(leaf.grad[image], alone.grad) < 1e-11
    assert abs(loss.item() - total) < 1e-12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_group_is_no_group(loss, algorithm):
    logits, targets = detector_batch("spread", 200, 4, 20)
    marks = torch.zeros_like(logits, dtype=torch.int64)
    anchors = (targets >= 0).nonzero()[:, 0]
    marks[anchors, targets[anchors]] = 1
    values = torch.rand(20, dtype=torch.float64)
    results = []
    for groups in (None, torch.full((1, 1), 7, dtype=torch.int8)):
        leaf = logits.clone().requires_grad_()
        batch = Batch(leaf, marks, groups, values, 0.5, 0.0)
        got = call(loss, batch, leaf, algorithm=algorithm)
        sum(got).backward()
        results.append((got, leaf.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_one_positive_a_group():
    """As many groups as positives, and no table over groups times edges."""
    logits, targets = detector_batch("spread", 3000, 2, 2000)
    groups = torch.arange(3000)
    leaf = logits.double().requires_grad_()
    loss = ap_loss(leaf, targets, groups=groups)
    loss.backward()
    anchors = (targets >= 0).nonzero()[:, 0]
    own = logits[anchors, targets[anchors]].double()
    other = logits[anchors, 1 - targets[anchors]].double()
    nfp = step(other - own, 1.0)
    error = nfp / (1 + nfp)
    assert relative_error(loss, error.mean()) < 1e-12
    assert relative_error(leaf.grad[anchors, targets[anchors]], -error / 2000) < 1e-12
    assert relative_error(leaf.grad[anchors, 1 - targets[anchors]], error / 2000) < 1e-12


def test_values_of_a_group_do_not_feel_the_others():
    """A group with millions of times the error of another leaves its last digits alone."""
    logits = torch.cat([torch.full((200_000,), 3.0), torch.tensor([0.0, 0.1, 0.2])]).double()
    targets = torch.zeros(200_003, dtype=torch.int64)
    targets[[0, -3]] = 1
    groups = (torch.arange(200_003) >= 200_000).long()
    for flipped in (groups, 1 - groups):  # first line or last
        leaf = logits.clone().requires_grad_()
        ap_loss(leaf, targets, groups=flipped, algorithm="breakpoints").backward()
        nfp = step(logits[-2:], 1.0)
        expected = nfp / (1 + nfp.sum()) / 2
        assert relative_error(leaf.grad[-2:], expected) < 1e-14


def test_nan_in_a_group_without_positives_is_nan():
    logits = torch.tensor([1.0, 0.0, math.nan])
    targets, groups = torch.tensor([1, 0, 0]), torch.tensor([0, 0, 1])
    for algorithm in ALGORITHMS:
        assert ap_loss(logits, targets, groups=groups, algorithm=algorithm).isnan()


def test_harder_negatives_get_more():
    """With power 2 twice the margin gets four times the share; NFP, and so the loss, stay."""
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    targets = torch.tensor([1, 0, 0, 0])
    shares = []
    for skew in (0.0, 1.0, 2.0):
        leaf = logits.clone().requires_grad_()
        loss = error_driven_loss(leaf, targets, ap_errors, delta=0.0, skew=skew)
        loss.backward()
        assert loss.item() == 0.75
        shares.append(leaf.grad[1:] / leaf.grad[1:].sum())
    expected = [[1 / 3, 1 / 3, 1 / 3], [1 / 6, 2 / 6, 3 / 6], [1 / 14, 4 / 14, 9 / 14]]
    assert relative_error(torch.stack(shares), torch.tensor(expected).double()) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_skew_of_infinite_and_tied_logits(dtype):
    logits = torch.tensor([math.inf, 1.0, 1.0, -math.inf, 0.5, 1.0, math.inf], dtype=dtype)
    targets = torch.tensor([0, 1, 0, 1, -1, 0, 1])
    for delta in (0.0, 1.0):
        for skew in (0.5, 4.0):
            leaf = logits.clone().requires_grad_()
            loss = error_driven_loss(leaf, targets, ap_errors, delta=delta, skew=skew)
            loss.backward()
            assert leaf.grad.isfinite().all()
            assert leaf.grad.double().sum().abs() < 4 * torch.finfo(dtype).eps
            assert leaf.grad[2] == leaf.grad[5]
            assert leaf.grad[3] < 0 < leaf.grad[0]


def test_what_a_skew_may_be():
    logits, targets = torch.randn(5), torch.tensor([1, 0, 0, 1, 0])
    for skew in (-0.5, 4.5, math.nan):
        with pytest.raises(ValueError, match="skew"):
            error_driven_loss(logits, targets, ap_errors, skew=skew)
    with pytest.raises(TypeError, match="skew"):
        error_driven_loss(logits, targets, ap_errors, skew="2")
    with pytest.raises(ValueError, match="breakpoints"):
        error_driven_loss(logits, targets, ap_errors, skew=1.0, algorithm="breakpoints")
    error_driven_loss(logits, targets, ap_errors, skew=0.0, algorithm="breakpoints")
    set_backend(algorithm="breakpoints")
    try:
        with pytest.raises(ValueError, match="breakpoints"):
            error_driven_loss(logits, targets, ap_errors, skew=1.0)
    finally:
        set_backend()


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        (torch.zeros(10), TypeError, "groups: expected integers"),
        (torch.zeros(9, dtype=torch.int64), ValueError, r"groups: .* \(10,\).* \(9,\)"),
        ([torch.zeros(10, dtype=torch.int64)] * 2, ValueError, "groups: expected one tensor"),
        (7, TypeError, "groups: expected a tensor"),
        (torch.zeros(10, dtype=torch.int64, device="meta"), ValueError, "groups: .*meta"),
    ],
)
def test_wrong_groups(groups, error, match):
    with pytest.raises(error, match=match):
        ap_loss(torch.randn(10, 3), torch.zeros(10, dtype=torch.int64), groups=groups)


def test_wrong_quality():
    logits, targets = torch.randn(10, 3), torch.full((10,), -1)
    targets[3] = 1
    with pytest.raises(TypeError, match="quality"):
        rank_sort_loss(logits, targets, torch.tensor([1]))
    with pytest.raises(ValueError, match="quality"):
        rank_sort_loss(logits, targets, torch.rand(1, 1))
    with pytest.raises(ValueError, match=r"^quality: expected 1 entries, .* got 3$"):
        rank_sort_loss(logits, targets, torch.rand(3))
    assert rank_sort_loss(logits, targets, torch.tensor([math.nan]))[1].isnan()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_and_levels_with_groups(loss, algorithm):
    """Levels of maps, class indices and groups by image as a view give what one list gives."""
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, 3, *size, generator=generator) for size in ((4, 5), (2, 2))]
    targets = [torch.randint(-1, 3, (2, *x.shape[2:]), generator=generator) for x in logits]
    flat = torch.cat([x.flatten(2).transpose(1, 2).reshape(-1, 3) for x in logits])
    flat_targets = torch.cat([x.flatten() for x in targets])
    images = torch.arange(2)[:, None, None]
    flat_groups = torch.cat([images.expand(x.shape).flatten() for x in targets])
    positives = (flat_targets >= 0).nonzero()[:, 0]
    values = torch.rand(len(positives), generator=generator)
    leaf = flat.clone().requires_grad_()
    expected = call(loss, Batch(leaf, flat_targets, flat_groups, values, 1.0, 0.0), leaf)
    sum(expected).backward()
    leaves = [x.clone().requires_grad_() for x in logits]
    pad = torch.nn.functional.pad
    padded = pad(values, (0, 6), value=math.nan)
    batch = Batch(leaves, targets, [images, images.to(torch.int16)], padded, 1.0, 0.0)
    slots = pad(positives, (0, 6), value=-1)
    got = call(loss, batch, leaves, positives=slots, algorithm=algorithm)
    sum(got).backward()
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, expected, strict=True))
    gradients = [x.grad.flatten(2).transpose(1, 2).reshape(-1, 3) for x in leaves]
    assert relative_error(torch.cat(gradients), leaf.grad) < 1e-5


@pytest.mark.parametrize("skew", [0.0, 2.0])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_16_bit_logits_are_computed_as_if_upcast(distribution, skew):
    logits, targets = detector_batch(distribution, 100, 4, 10)
    groups = torch.arange(100) % 3
    gradients = []
    for x in (logits.bfloat16(), logits.bfloat16().float()):
        leaf = x.requires_grad_()
        error_driven_loss(leaf, targets, ap_errors, groups=groups, skew=skew).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1].bfloat16())


@pytest.mark.parametrize("groups", [None, torch.arange(4)[:, None]])
@pytest.mark.parametrize(("loss", "skew"), [*((loss, 0.0) for loss in LOSSES), ("own", 2.0)])
def test_between_forward_and_backward_only_the_input_is_kept(loss, skew, groups):
    """Beside it there are a few numbers for each positive: nothing of N entries, nothing P x P."""
    logits = torch.randn(4, 12_000, requires_grad=True)
    targets = torch.zeros(4, 12_000, dtype=torch.int64)
    targets[:, ::160] = 1
    batch = Batch(logits, targets, groups, torch.rand(300, dtype=torch.float64), 1.0, skew)
    given = {x.untyped_storage().data_ptr() for x in (logits, targets)}
    if groups is not None:
        given.add(groups.untyped_storage().data_ptr())
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = sum(call(loss, batch, logits))
    assert logits.untyped_storage().data_ptr() in kept
    added = sum(size for pointer, size in kept.items() if pointer not in given)
    assert added <= 10 * 8 * 300
    total.backward()
    assert logits.grad.abs().sum() > 0


def test_modules_are_the_functions():
    logits, targets = detector_batch("spread", 100, 4, 10)
    quality, groups = torch.rand(10), torch.arange(100) % 3
    settings = {"groups": groups, "ignore_index": -100}
    assert APLoss(0.5)(logits, targets, groups=groups) == ap_loss(logits, targets, 0.5, **settings)
    assert NDCGLoss()(logits, targets, groups=groups) == ndcg_loss(logits, targets, **settings)
    out = RankSortLoss()(logits, targets, quality, groups=groups)
    assert out[1:] == rank_sort_loss(logits, targets, quality, 0.5, **settings)
    assert out.loss == out.ranking + out.sorting
    boxes = torch.rand(10, 4).cumsum(1)
    alrp = ALRPLoss()(logits, targets, boxes, boxes + 0.1, groups=groups)
    errors = localisation_errors(boxes, boxes + 0.1)
    assert alrp[1:3] == alrp_loss(logits, targets, errors, **settings)


def test_second_derivative_raises():
    logits, targets = detector_batch("spread", 100, 4, 10)
    logits.requires_grad_()
    total = sum(rank_sort_loss(logits, targets, torch.rand(10)))
    (gradient,) = torch.autograd.grad(total, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("algorithm", ["pairwise", "breakpoints"])
@pytest.mark.parametrize("above", [5e-324, 1e-300, 2.0**-905, 2.0**-890])
def test_a_negative_a_hair_inside_the_window_gets_a_finite_gradient(algorithm, above):
    """Of two positives at 1 and delta = 1, negatives above 0 are seen by H = above / 2."""
    logits = torch.tensor([1.0, 1.0, above], dtype=torch.float64, requires_grad=True)
    errors = torch.tensor([0.3, 0.7], dtype=torch.float64)
    cls, loc = alrp_loss(logits, torch.tensor([1, 1, 0]), errors, impl="torch", algorithm=algorithm)
    (cls + loc).backward()
    assert logits.grad.isfinite().all()
    assert abs(float(logits.grad.sum())) <= 1e-15  # Theorem 2
    if algorithm == "breakpoints":  # pair by pair the logit is rounded away beside 1
        assert bool(logits.grad[2] > 0) == (above > 2.0**-899)
