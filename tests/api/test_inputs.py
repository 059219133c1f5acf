"""What every input gets, row by row of README.md, and every form of logits and targets."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from batches import IGNORE, detector_batch, relative_error

from alrp_triton import (
    ALRPLoss,
    alrp_loss,
    ap_loss,
    error_driven_loss,
    inputs,
    ndcg_loss,
    rank_sort_loss,
    set_backend,
)
from alrp_triton.integrations.authors import RankSort, aLRPLoss

ALGORITHMS = ("pairwise", "breakpoints")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Show whatever is allocated and not written as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    return request.param


def both(logits, targets, loc_errors, **settings):
    """Return (cls, loc, gradient by logits, gradient by loc_errors) of fresh leaves."""
    levels = logits if isinstance(logits, list) else [logits]
    leaves = [level.detach().clone().requires_grad_() for level in levels]
    loc_leaf = loc_errors.detach().clone().requires_grad_()
    cls, loc = alrp_loss(
        leaves if isinstance(logits, list) else leaves[0], targets, loc_leaf, **settings
    )
    (cls + loc).backward()
    gradients = [leaf.grad for leaf in leaves]
    return cls, loc, gradients if isinstance(logits, list) else gradients[0], loc_leaf.grad


def test_no_positive_is_zero_and_attached(algorithm):
    for shape in ((10, 3), (0, 3), (4, 3, 5), (4, 0)):
        logits = torch.randn(shape, requires_grad=True)
        boxes = torch.zeros(0, requires_grad=True)
        targets = torch.full((shape[0], *shape[2:]), -1)
        cls, loc = alrp_loss(logits, targets, boxes, algorithm=algorithm)
        assert cls.item() == 0
        assert loc.item() == 0
        (cls + 50 * loc).backward()
        assert (logits.grad == 0).all()
        assert boxes.grad.shape == (0,)
        loss = ap_loss(logits, targets, algorithm=algorithm)
        assert loss.item() == 0
        loss.backward()


def test_no_positive_in_the_module():
    logits = torch.randn(10, 3, requires_grad=True)
    boxes = torch.zeros(0, 4, requires_grad=True)
    out = ALRPLoss()(logits, torch.full((10,), 3), boxes, torch.zeros(0, 4))
    out.loss.backward()
    assert out.loss.item() == 0
    assert (logits.grad == 0).all()
    assert boxes.grad.shape == (0, 4)


@pytest.mark.parametrize("negatives", ["none", "all ignored", "irrelevant"])
def test_no_relevant_negative(negatives, algorithm):
    logits = torch.tensor([[2.0], [0.5], [-9.0], [-8.0]])
    targets = torch.tensor([0, 0, -1, -1])
    if negatives == "none":
        logits, targets = logits[:2], targets[:2]
    elif negatives == "all ignored":
        targets[2:] = IGNORE
    cls, loc, gradient, loc_gradient = both(
        logits, targets, torch.tensor([0.2, 0.6]), algorithm=algorithm
    )
    assert cls.item() == 0
    # rank+ is 1 and 2 - 1/2 * (0.5 / 1): H(x) of -1.5 is 0 and of 1.5 is 1.
    assert abs(loc.item() - (0.2 / 1 + (0.6 + 0.2) / 2) / 2) < 1e-7
    assert (gradient == 0).all()
    assert relative_error(loc_gradient, torch.tensor([(1 + 1 / 2) / 2, 1 / 4])) < 1e-6


def test_ignored_anchors_are_as_if_not_there(algorithm):
    logits, targets = detector_batch("spread", 120, 4, 15)
    loc_errors = torch.rand(15)
    ignored = targets == IGNORE
    assert ignored.any()
    poisoned = logits.clone()
    poisoned[ignored] = math.nan
    poisoned[ignored.nonzero()[0]] = math.inf
    cls, loc, gradient, loc_gradient = both(poisoned, targets, loc_errors, algorithm=algorithm)
    kept = both(logits[~ignored], targets[~ignored], loc_errors, algorithm=algorithm)
    assert cls == kept[0]
    assert loc == kept[1]
    assert (gradient[ignored] == 0).all()
    assert torch.equal(gradient[~ignored], kept[2])
    assert torch.equal(loc_gradient, kept[3])


def test_ignore_index_may_be_any_class_index(algorithm):
    logits, targets = detector_batch("spread", 120, 4, 15)
    loc_errors = torch.rand(15)
    expected = both(logits, targets, loc_errors, algorithm=algorithm)
    minus_two = torch.where(targets == IGNORE, -2, targets)
    got = both(logits, minus_two, loc_errors, ignore_index=-2, algorithm=algorithm)
    assert torch.equal(got[2], expected[2])
    # Within [0, C): the anchors of that class are out, and no positives.
    keep = targets[targets >= 0] != 2
    got = both(logits, targets, loc_errors[keep], ignore_index=2, algorithm=algorithm)
    assert (got[2][targets == 2] == 0).all()


def test_background_is_any_other_value(algorithm):
    logits, targets = detector_batch("spread", 120, 4, 15)
    expected = both(logits, targets, torch.ones(15), algorithm=algorithm)
    for background in (4, -5, 2**40):
        other = torch.where(targets == -1, background, targets)
        got = both(logits, other, torch.ones(15), algorithm=algorithm)
        assert torch.equal(got[2], expected[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [0.0, 0.25, 1.0])
def test_infinite_logits_rank_like_very_large_ones(delta, dtype, algorithm):
    logits, targets = detector_batch("spread", 60, 3, 12)
    logits = logits.to(dtype)
    logits[::5, 0], logits[::7, 1] = -math.inf, math.inf
    large = 60000.0
    finite = logits.clamp(-large, large)
    loc_errors = torch.rand(12)
    got = both(logits, targets, loc_errors, delta=delta, algorithm=algorithm)
    expected = both(finite, targets, loc_errors, delta=delta, algorithm=algorithm)
    assert all(x.isfinite().all() for x in got)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("where", ["negative", "positive", "far below"])
def test_a_nan_logit_gives_a_nan_loss(where, delta, algorithm):
    logits, targets = detector_batch("mid", 60, 3, 12)
    if where == "positive":
        anchor = int((targets >= 0).nonzero()[3])
        logits[anchor, targets[anchor]] = math.nan
    else:
        anchor = int((targets == -1).nonzero()[3])
        logits[anchor, 1] = math.nan
        if where == "far below":
            logits[targets == -1] = -1000
            logits[anchor, 1] = math.nan
    logits.requires_grad_()
    cls, loc = alrp_loss(logits, targets, torch.rand(12), delta, algorithm=algorithm)
    assert cls.isnan()
    assert loc.isnan()
    assert ap_loss(logits, targets, delta, algorithm=algorithm).isnan()
    cls.backward()
    assert logits.grad.isnan().any()
    assert (logits.grad[targets == IGNORE] == 0).all()


def test_nan_loc_error_gives_a_nan_loc(algorithm):
    logits, targets = detector_batch("mid", 60, 3, 12)
    loc_errors = torch.rand(12)
    loc_errors[4] = math.nan
    _, loc = alrp_loss(logits, targets, loc_errors, algorithm=algorithm)
    assert loc.isnan()


@pytest.mark.parametrize("delta", [0.5, 2.0])
def test_step_at_its_corners(delta, algorithm):
    """x = -delta, 0, delta exactly, and one float on either side of the corners."""
    positive = torch.tensor(0.75)
    x = torch.tensor([-delta, 0.0, delta])
    around = torch.stack([positive + x, (positive + x).nextafter(torch.tensor(9.0))])
    logits = torch.cat([positive.reshape(1), around.flatten()])
    targets = torch.zeros(7)
    targets[0] = 1
    counted = []

    def keep(counts):
        counted.append(counts.nfp)
        return counts.nfp, counts.nfp * 0, 1.0

    for j in range(1, 7):
        pair = logits[[0, j]]
        error_driven_loss(pair, targets[[0, j]], keep, delta=delta, algorithm=algorithm)
    gap = logits[1:].double() - 0.75
    expected = (gap / (2 * delta) + 0.5).clamp(0, 1)
    assert (torch.cat(counted) - expected).abs().max() < 1e-7
    assert counted[0] == 0
    assert counted[1] == 0.5
    assert counted[2] == 1


def test_hard_step_counts_ties(algorithm):
    logits = torch.tensor([0.5, 0.5, 0.5, 0.4999])
    targets = torch.tensor([1, 1, 0, 0])
    ranks = []

    def keep(counts):
        ranks.append(counts.rank)
        return counts.nfp, counts.nfp * 0, 1.0

    error_driven_loss(logits, targets, keep, delta=0.0, algorithm=algorithm)
    assert ranks[0].tolist() == [3, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_compute_as_if_upcast(dtype, algorithm):
    logits, targets = detector_batch("mid", 400, 4, 30)
    logits = logits.to(dtype)
    loc_errors = torch.rand(30, dtype=torch.float64)
    got = both(logits, targets, loc_errors, algorithm=algorithm)
    expected = both(logits.double(), targets, loc_errors, algorithm="pairwise")
    assert got[0].dtype == torch.float32
    assert got[2].dtype == dtype
    assert relative_error(got[0], expected[0]) < torch.finfo(torch.float32).eps
    # One rounding: half a unit in the last place, below the normal range of its smallest number.
    unit = torch.finfo(dtype)
    budget = expected[2].abs() * unit.eps / 2 + unit.tiny * unit.eps / 2
    slack = 1e-6 * expected[2].abs()  # float32 evaluation of H before that rounding
    assert ((got[2].double() - expected[2]).abs() <= budget + slack).all()


def test_float64_is_computed_in_float64(algorithm):
    logits, targets = detector_batch("mid", 200, 4, 30)
    got = both(logits.double(), targets, torch.rand(30, dtype=torch.float64), algorithm=algorithm)
    assert all(x.dtype == torch.float64 for x in got)


def as_maps(x):
    """View (240, 4) anchors as maps (4, 4, 6, 10), permuted."""
    return x.reshape(4, 6, 10, 4).permute(0, 3, 1, 2)


# name: (the (240, 4) logits laid out, the shape of their targets)
FORMS = {
    "anchors": lambda x: (x, (240,)),
    "one dimension": lambda x: (x.reshape(8, 30, 4).transpose(1, 2), (8, 30)),
    "two dimensions": lambda x: (as_maps(x), (4, 6, 10)),
    "channels last": lambda x: (
        as_maps(x).contiguous(memory_format=torch.channels_last),
        (4, 6, 10),
    ),
    "contiguous maps": lambda x: (as_maps(x).contiguous(), (4, 6, 10)),
    "not viewable": lambda x: (as_maps(x).contiguous()[:, :, :, :9], (4, 6, 9)),
    "every second": lambda x: (torch.stack([x, x + 1], 1).flatten(0, 1)[::2], (240,)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_gives_the_same(form, algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    laid_out, shape = FORMS[form](logits)
    if form == "not viewable":  # the last column of the maps is cut off
        keep = (torch.arange(240) % 10 < 9).nonzero()[:, 0]
        logits, targets = logits[keep], targets[keep]
        with pytest.raises(RuntimeError):
            laid_out.view(4, 4, 54)
    loc_errors = torch.rand(int((targets >= 0).sum()))
    expected = both(logits, targets, loc_errors, algorithm=algorithm)

    leaf = laid_out.detach().requires_grad_()
    before = leaf.detach().clone()
    cls, _ = alrp_loss(leaf, targets.reshape(shape), loc_errors, algorithm=algorithm)
    cls.backward()
    assert relative_error(cls, expected[0]) < 1e-6
    assert torch.equal(leaf, before)  # inputs are never written to
    assert relative_error(leaf.grad.movedim(1, -1).reshape(-1, 4), expected[2]) < 1e-6


def test_levels_rank_as_one_list(algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    loc_errors = torch.rand(30)
    whole = both(logits, targets, loc_errors, algorithm=algorithm)
    cuts = (160, 64, 0, 16)
    got = both(list(logits.split(cuts)), list(targets.split(cuts)), loc_errors, algorithm=algorithm)
    assert relative_error(got[0], whole[0]) < 1e-6
    assert relative_error(torch.cat(got[2]), whole[2]) < 1e-6
    assert relative_error(got[3], whole[3]) < 1e-6


def test_a_map_with_anchors_in_its_channels_needs_no_permute(algorithm):
    """(B, A * C, H, W) as view(B * A, C, H, W) with targets (B * A, H, W): no copy is made."""
    batch, anchors, classes, height, width = 2, 3, 4, 5, 8
    maps = torch.randn(batch, anchors * classes, height, width, requires_grad=True)
    targets = torch.randint(-1, classes, (batch * anchors, height, width))
    view = maps.view(batch * anchors, classes, height, width)
    num_positives = int((targets >= 0).sum())
    loc_errors = torch.rand(num_positives)
    cls, _ = alrp_loss(view, targets, loc_errors, algorithm=algorithm)
    cls.backward()
    flat = view.detach().permute(0, 2, 3, 1).reshape(-1, classes)
    expected = both(flat, targets.reshape(-1), loc_errors, algorithm=algorithm)
    assert relative_error(cls, expected[0]) < 1e-6
    got = maps.grad.view_as(view).permute(0, 2, 3, 1).reshape(-1, classes)
    assert relative_error(got, expected[2]) < 1e-6


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int8, torch.float32, torch.float64, torch.float16]
)
def test_targets_for_each_logit(dtype, algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    expected = both(logits, targets, torch.ones(30), algorithm=algorithm)
    marks = torch.nn.functional.one_hot(targets.clamp(min=0), 4) * (targets >= 0)[:, None]
    marks[targets == IGNORE] = -1
    marks = marks.to(dtype)
    for shape in ((240, 4), (240 * 4,), (10, 4, 6, 4), (1, 240, 4)):
        got = both(logits.reshape(shape), marks.reshape(shape), torch.ones(30), algorithm=algorithm)
        assert relative_error(got[0], expected[0]) < 1e-6
        assert relative_error(got[2].reshape(240, 4), expected[2]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_class_indices_of_any_integer_dtype(dtype, algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    targets[targets == IGNORE] = -1
    expected = both(logits, targets, torch.ones(30), algorithm=algorithm)
    if dtype == torch.uint8:
        targets = torch.where(targets < 0, 4, targets)
    got = both(logits, targets.to(dtype), torch.ones(30), algorithm=algorithm)
    assert torch.equal(got[2], expected[2])


def test_bool_targets_for_each_logit():
    logits = torch.tensor([0.1, 0.3, 0.2])
    got = both(logits, torch.tensor([True, False, False]), torch.ones(1), delta=0.0)
    assert abs(got[0].item() - 2 / 3) < 1e-7


def test_given_positives_save_the_search(algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    loc_errors = torch.rand(30)
    expected = both(logits, targets, loc_errors, algorithm=algorithm)
    positives = (targets >= 0).nonzero()[:, 0]
    for given in (positives, positives.int()):
        got = both(logits, targets, loc_errors, positives=given, algorithm=algorithm)
        assert torch.equal(got[2], expected[2])
    shuffled = torch.randperm(30)
    got = both(
        logits, targets, loc_errors[shuffled], positives=positives[shuffled], algorithm=algorithm
    )
    assert relative_error(got[1], expected[1]) < 1e-6
    assert relative_error(got[3], expected[3][shuffled]) < 1e-6
    assert torch.equal(ap_loss(logits, targets, positives=positives), ap_loss(logits, targets))


def test_padded_positives_over_levels(algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    loc_errors = torch.rand(30)
    cuts = (160, 80)
    levels, level_targets = list(logits.split(cuts)), list(targets.split(cuts))
    expected = both(levels, level_targets, loc_errors, algorithm=algorithm)
    positives = torch.full((40,), -1)
    padded = torch.full((40,), math.nan)  # what stands beside padding is never looked at
    slots = torch.randperm(40)[:30].sort().values
    positives[slots], padded[slots] = (targets >= 0).nonzero()[:, 0], loc_errors
    got = both(levels, level_targets, padded, positives=positives, algorithm=algorithm)
    assert torch.equal(got[0], expected[0])
    assert relative_error(got[1], expected[1]) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(got[2], expected[2], strict=True))
    assert relative_error(got[3][slots], expected[3]) < 1e-6
    nothing = torch.full((7,), -1)
    cls, loc, gradient, _ = both(logits, targets, torch.zeros(7), positives=nothing)
    assert cls == loc == 0
    assert (gradient == 0).all()


def test_upstream_gradient_is_linear(algorithm):
    logits, targets = detector_batch("mid", 240, 4, 30)
    logits = logits.double().requires_grad_()
    cls, _ = alrp_loss(logits, targets, torch.rand(30), algorithm=algorithm)
    (once,) = torch.autograd.grad(cls, logits, retain_graph=True)
    (again,) = torch.autograd.grad(cls, logits, retain_graph=True)
    assert torch.equal(once, again)  # a second backward works
    (scaled,) = torch.autograd.grad(-3.7 * cls, logits, retain_graph=True)
    assert relative_error(scaled, -3.7 * once) < 1e-12
    (expanded,) = torch.autograd.grad(
        cls.expand(4, 5), logits, torch.tensor(2.0).expand(4, 5), retain_graph=True
    )
    assert relative_error(expanded, 40 * once) < 1e-6  # a stride-0 upstream gradient


def test_loss_scale_in_float16(algorithm):
    """GradScaler's 65 536 multiplies the gradient before it is rounded to float16, not after."""
    logits, targets = detector_batch("mid", 12_000, 4, 30)
    logits, loc_errors = logits.half(), torch.rand(30)
    exact = both(logits.double(), targets, loc_errors, algorithm="pairwise")[2]
    logits.requires_grad_()
    cls, _ = alrp_loss(logits, targets, loc_errors, algorithm=algorithm)
    loss = cls / 1024  # one small term among others
    (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 65536.0, logits)
    assert ((plain == 0) & (scaled != 0)).any()  # lost without the scale
    exact = exact * 64
    normal = exact.abs() > torch.finfo(torch.float16).tiny
    assert relative_error(scaled[normal], exact[normal]) < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("upstream", ["constant", "differentiable"])
def test_second_derivative_is_a_clear_error(upstream, algorithm):
    logits, targets = detector_batch("mid", 60, 3, 12)
    logits.requires_grad_()
    cls, _ = alrp_loss(logits, targets, torch.rand(12), algorithm=algorithm)
    value = cls if upstream == "constant" else cls.square()
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_no_grad_returns_the_true_value(algorithm):
    logits, targets = detector_batch("mid", 60, 3, 12)
    loc_errors = torch.rand(12)
    expected = both(logits, targets, loc_errors, algorithm=algorithm)
    logits.requires_grad_()
    with torch.no_grad():
        got = alrp_loss(logits, targets, loc_errors, algorithm=algorithm)
    assert not got[0].requires_grad
    assert torch.equal(got[0], expected[0].detach())
    assert torch.equal(got[1], expected[1].detach())


def test_repeats_bitwise(algorithm):
    logits, targets = detector_batch("spread", 2000, 20, 200)
    loc_errors = torch.rand(200)
    first = both(logits, targets, loc_errors, algorithm=algorithm)
    for _ in range(3):
        again = both(logits, targets, loc_errors, algorithm=algorithm)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_order_of_the_anchors_does_not_matter(algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    logits = logits.double()
    order = torch.randperm(240)
    loc_errors = torch.rand(240, dtype=torch.float64)
    expected = both(logits, targets, loc_errors[targets >= 0], algorithm=algorithm)
    got = both(
        logits[order], targets[order], loc_errors[order][targets[order] >= 0], algorithm=algorithm
    )
    assert relative_error(got[0], expected[0]) < 1e-12
    assert relative_error(got[1], expected[1]) < 1e-12
    assert relative_error(got[2], expected[2][order]) < 1e-10


def test_shift_of_all_scores_changes_nothing(algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    logits = (logits.double() * 64).round() / 64  # so that shifting rounds nothing
    expected = both(logits, targets, torch.ones(30), algorithm=algorithm)
    got = both(logits + 32, targets, torch.ones(30), algorithm=algorithm)
    assert relative_error(got[0], expected[0]) < 1e-12
    assert relative_error(got[2], expected[2]) < 1e-10


def test_zero_gradient_below_the_lowest_positive(algorithm):
    logits, targets = detector_batch("late", 240, 4, 30)
    anchors = (targets >= 0).nonzero()[:, 0]
    lowest = logits[anchors, targets[anchors]].min() - 1.0
    gradient = both(logits, targets, torch.ones(30), algorithm=algorithm)[2]
    assert (logits < lowest).any()
    assert (gradient[logits < lowest] == 0).all()


def test_loc_gradient_is_the_derivative(algorithm):
    logits, targets = detector_batch("spread", 60, 3, 12)
    logits = logits.double()
    for delta in (0.0, 1.0):
        torch.autograd.gradcheck(
            lambda loc_errors, delta=delta: alrp_loss(
                logits, targets, loc_errors, delta, algorithm=algorithm
            )[1],
            torch.rand(12, dtype=torch.float64, requires_grad=True),
        )


LOGITS, TARGETS, LOC_ERRORS = torch.zeros(6, 3), torch.tensor([0, 2, -1, -1, 9, 1]), torch.zeros(3)
WRONG = [
    ({"logits": [[0.0]]}, TypeError, "logits: expected a tensor"),
    ({"logits": [], "targets": []}, ValueError, "logits: expected at least one level"),
    ({"logits": torch.zeros(6, 3, dtype=torch.int32)}, TypeError, "logits: .*got int32"),
    ({"logits": [LOGITS, LOGITS.double()], "targets": [TARGETS] * 2}, TypeError, "one dtype"),
    ({"logits": [LOGITS, LOGITS]}, ValueError, "targets: expected one tensor for each of the 2"),
    ({"targets": TARGETS[:5]}, ValueError, r"targets: expected shape \(6,\) .*got \(5,\)"),
    ({"targets": TARGETS.float()}, TypeError, "targets: expected integer .*float32"),
    ({"targets": TARGETS.to("meta")}, ValueError, "targets: expected on cpu .*got meta"),
    ({"logits": torch.zeros(6)}, None, ""),
    ({"loc_errors": torch.zeros(4)}, ValueError, "loc_errors: expected 3 entries.*got 4"),
    ({"loc_errors": torch.zeros(2)}, ValueError, "loc_errors: expected 3 entries.*got 2"),
    ({"loc_errors": torch.zeros(3, 1)}, ValueError, r"loc_errors: expected shape \(P,\)"),
    ({"loc_errors": torch.zeros(3).long()}, TypeError, "loc_errors: expected a floating .*int64"),
    ({"loc_errors": [0.0] * 3}, TypeError, "loc_errors: expected a floating tensor, got list"),
    ({"loc_errors": LOC_ERRORS.to("meta")}, ValueError, "loc_errors: expected on cpu"),
    ({"delta": -1.0}, ValueError, "delta: .*got -1.0"),
    ({"delta": math.nan}, ValueError, "delta: .*got nan"),
    ({"delta": math.inf}, ValueError, "delta: .*got inf"),
    ({"delta": "1"}, TypeError, "delta: expected a number, got str"),
    ({"positives": torch.tensor([0, 1])}, ValueError, r"loc_errors: expected shape \(2,\)"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an integer, got float"),
    ({"positives": [0, 1, 5]}, TypeError, "positives: expected an int64 tensor, got list"),
    ({"positives": torch.tensor([0.0, 1, 5])}, TypeError, "positives: expected int64, got .*float"),
    ({"positives": torch.tensor([[0, 1, 5]])}, ValueError, "positives: expected shape"),
    ({"positives": torch.tensor([0, 1, 2])}, ValueError, "positives: every entry"),
    ({"positives": torch.tensor([0, 1, 600])}, ValueError, "positives: every entry"),
    ({"positives": torch.tensor([0, 5, -1])}, ValueError, "positives: expected all 3 .*got 2"),
    ({"positives": torch.tensor([0, 1, 1])}, ValueError, "positives: expected every position once"),
    ({"positives": torch.tensor([0, 1, -7])}, ValueError, "positives: every entry"),
    ({"impl": "cuda"}, ValueError, "impl: expected one of auto, triton, torch, got 'cuda'"),
    ({"algorithm": "sort"}, ValueError, "algorithm: expected one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_names_the_argument(change, error, message):
    arguments = {"logits": LOGITS, "targets": TARGETS, "loc_errors": LOC_ERRORS} | change
    if error is None:  # class indices cannot be told from marks: one dimension holds marks
        arguments["loc_errors"] = torch.zeros(1)
        alrp_loss(**arguments)
        return
    with pytest.raises(error, match=message):
        alrp_loss(**arguments)


def test_wrong_errors_function_is_named():
    with pytest.raises(TypeError, match="errors_fn: expected a function of Counts, got str"):
        error_driven_loss(LOGITS, TARGETS, "ap")


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda c: (c.nfp[:1], c.nfp, 1.0), ValueError, r"l of shape \(3,\).*got \(1,\)"),
        (lambda c: (c.nfp, c.nfp[:, None], 1.0), ValueError, r"l\* of shape .*got \(3, 1\)"),
        (lambda c: (c.nfp, 0.0, c.rank), ValueError, r"Z of shape \(\), got \(3,\)"),
        (lambda c: (c.nfp.to("meta"), 0.0, 1.0), ValueError, "l on cpu, got meta"),
        (lambda c: ([0.1] * 3, 0.0, 1.0), TypeError, "l as a tensor or a number, got list"),
        (lambda c: (c.nfp, None, 1.0), TypeError, r"l\* as a tensor or a number, got NoneType"),
        (lambda c: (c.nfp, 0.0, "3"), TypeError, "Z as a tensor or a number, got str"),
        (lambda c: (c.nfp, 0.0), TypeError, r"it to return \(l, l\*, Z\), got tuple of 2"),
        (lambda c: c.nfp, TypeError, r"it to return \(l, l\*, Z\), got Tensor"),
        (lambda c: None, TypeError, r"it to return \(l, l\*, Z\), got NoneType"),
    ],
)
def test_what_an_errors_function_may_not_return(returned, error, message):
    with pytest.raises(error, match=f"^errors_fn: expected {message}"):
        error_driven_loss(LOGITS, TARGETS, returned)


@pytest.mark.parametrize(
    "form",
    [
        lambda error, counts: (error.float(), 0.0, 12),
        lambda error, counts: [error, torch.tensor(0), len(counts.nfp)],
        lambda error, counts: (error, torch.zeros(12, dtype=torch.float16), torch.tensor(12.0)),
    ],
)
def test_errors_function_may_return_numbers_and_other_dtypes(algorithm, form):
    logits, targets = detector_batch("mid", 200, 3, 12)
    logits.requires_grad_()
    loss = error_driven_loss(
        logits, targets, lambda c: form(c.nfp / c.rank, c), algorithm=algorithm
    )
    (got,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(ap_loss(logits, targets, algorithm=algorithm), logits)
    assert loss.dim() == 0
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


def test_an_error_for_all_positives_may_be_a_scalar():
    """Every positive gets the tensor or number, negatives being near, and the loss is it."""
    logits, targets = detector_batch("init", 200, 3, 12)
    for error in (0.5, torch.tensor(0.5)):
        leaf = logits.clone().requires_grad_()
        loss = error_driven_loss(leaf, targets, lambda c, e=error: (e, 0.0, c.num_positives))
        loss.backward()
        anchors = (targets >= 0).nonzero()[:, 0]
        assert loss == 0.5
        assert torch.equal(leaf.grad[anchors, targets[anchors]], torch.full((12,), -0.5 / 12))


def test_an_errors_function_may_write_into_its_counts():
    """The update is made of what was counted, and stays balanced."""
    logits, targets = detector_batch("mid", 200, 3, 12)
    logits.requires_grad_()
    loss = error_driven_loss(logits, targets, lambda c: (c.nfp.div_(c.rank), 0.0, 12))
    (got,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(ap_loss(logits, targets), logits)
    assert torch.equal(got, expected)


def test_backend_set_once_for_a_program():
    with pytest.raises(ValueError, match="impl: expected one of"):
        set_backend(impl="numpy")
    logits, targets = detector_batch("mid", 60, 3, 12)
    try:
        set_backend(impl="torch", algorithm="pairwise")
        expected = ap_loss(logits, targets)
    finally:
        set_backend()
    assert torch.equal(ap_loss(logits, targets, impl="torch", algorithm="pairwise"), expected)


@pytest.mark.parametrize(
    ("dtype", "ignore_index"), [(torch.int8, -100), (torch.int8, 300), (torch.uint8, -100)]
)
def test_class_indices_of_few_bits(dtype, ignore_index):
    """More classes than int8 can count, or an ignore_index out of its range: nothing wraps."""
    logits = torch.randn(40, 130, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(40) * 3
    targets[30:] = 130 if dtype == torch.uint8 else -1
    settings = {"ignore_index": ignore_index}
    assert ap_loss(logits, targets.to(dtype), **settings) == ap_loss(logits, targets, **settings)


class Odd:
    """Nothing that any argument takes."""


def _sparse(*shape):
    return torch.zeros(shape).to_sparse()


# What an argument may be given instead. Made anew for each use: some can be used up.
ODD_VALUES = {
    "None": lambda: None,
    "True": lambda: True,
    "a string": lambda: "x",
    "NaN": lambda: math.nan,
    "inf": lambda: math.inf,
    "-1": lambda: -1,
    "an integer beyond 64 bits": lambda: 2**70,
    "an integer beyond float": lambda: 10**400,
    "an integer beyond str": lambda: -(10**5000),
    "a complex number": lambda: 1j,
    "a fraction": lambda: Fraction(1, 3),
    "an empty list": list,
    "an empty tuple": tuple,
    "a list of numbers": lambda: [1],
    "a list of lists": lambda: [[LOGITS]],
    "a dict": dict,
    "a set": set,
    "an object": Odd,
    "a numpy float": lambda: np.float32(0.5),
    "a numpy integer": lambda: np.int64(1),
    "a numpy bool": lambda: np.bool_(True),
    "a numpy array": lambda: np.zeros(3),
    "0-d": lambda: torch.tensor(0.5),
    "2-d": lambda: torch.zeros(2, 2),
    "no entries": lambda: torch.zeros(0),
    "integers": lambda: torch.zeros(3, dtype=torch.int64),
    "bools": lambda: torch.zeros(6, dtype=torch.bool),
    "uint8": lambda: torch.zeros(6, dtype=torch.uint8),
    "uint16": lambda: torch.zeros(6, dtype=torch.uint16),
    "uint64": lambda: torch.zeros(6, dtype=torch.uint64),
    "float8": lambda: torch.zeros(3).to(torch.float8_e4m3fn),
    "float8 logits": lambda: torch.zeros(6, 3).to(torch.float8_e5m2),
    "complex numbers": lambda: torch.zeros(6, 3, dtype=torch.complex64),
    "sparse": lambda: _sparse(6, 3),
    "sparse vector": lambda: _sparse(3),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged),
    "masked": lambda: torch.masked.masked_tensor(LOGITS, LOGITS == 0),
    "quantised": lambda: torch.quantize_per_tensor(LOGITS, 0.1, 0, torch.quint8),
    "meta": lambda: LOGITS.to("meta"),
    "meta vector": lambda: LOC_ERRORS.to("meta"),
    "meta scalar": lambda: torch.zeros((), device="meta"),
    "a list with a number": lambda: [LOGITS, 1],
}

COMMON = {"logits": LOGITS, "targets": TARGETS, "delta": 1.0, "ignore_index": -100} | {
    "positives": torch.tensor([0, 1, 5]), "groups": None, "impl": "auto", "algorithm": "auto",
}  # fmt: skip


def own_errors(counts):
    return counts.nfp / counts.rank, 0.0, counts.num_positives


FUNCTIONS = {
    "alrp_loss": (alrp_loss, COMMON | {"loc_errors": LOC_ERRORS}),
    "ap_loss": (ap_loss, COMMON),
    "ndcg_loss": (ndcg_loss, COMMON),
    "rank_sort_loss": (rank_sort_loss, COMMON | {"quality": LOC_ERRORS}),
    "error_driven_loss": (
        error_driven_loss,
        COMMON | {"errors_fn": own_errors, "values": LOC_ERRORS, "skew": 0.0},
    ),
    "set_backend": (set_backend, {"impl": "auto", "algorithm": "auto"}),
}


def gives_finite_values_or_names_an_argument(call, names):
    """Check that a call gives finite values, or an error that names one of its arguments.

    It gives nothing else: neither an error of another form, nor a number that is none.
    """
    message = ""
    try:
        results = call()
    except (TypeError, ValueError) as error:
        results, message = None, str(error)
    assert not message or message.split(":")[0] in names, message
    results = results if isinstance(results, (tuple, list)) else [results]
    assert all(result.isfinite().all() for result in results if result is not None)


@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_odd_values_of_every_argument(function, value):
    function, arguments = FUNCTIONS[function]
    for name in arguments:
        # One error is another's cause: with other targets, the positives are wrong.
        others = {"targets", "positives"} if name in ("logits", "targets", "ignore_index") else ()
        others = {"positives", *others} if name in ("loc_errors", "quality", "values") else others
        made = ODD_VALUES[value]()
        try:
            gives_finite_values_or_names_an_argument(
                lambda given=arguments | {name: made}: function(**given), {name, *others}
            )
        finally:
            set_backend()


@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize("place", ["l", "l*", "Z", "all"])
def test_odd_values_from_an_errors_function(place, value):
    def errors(counts):
        made = ODD_VALUES[value]()
        parts = {"l": counts.nfp, "l*": 0.0, "Z": 1.0} | {place: made}
        return made if place == "all" else (parts["l"], parts["l*"], parts["Z"])

    gives_finite_values_or_names_an_argument(
        lambda: error_driven_loss(LOGITS, TARGETS, errors), {"errors_fn"}
    )


def test_a_normaliser_may_be_0_where_there_is_no_positive():
    with pytest.raises(ValueError, match="errors_fn: expected Z other than 0"):
        error_driven_loss(LOGITS, TARGETS, lambda c: (c.nfp, 0.0, 0))
    nothing = torch.full((6,), -1)
    assert error_driven_loss(LOGITS, nothing, lambda c: (c.nfp, 0.0, len(c.nfp))) == 0


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)]
)
def test_numbers_of_every_kind(number, algorithm):
    logits, targets = detector_batch("mid", 60, 3, 12)
    assert ap_loss(logits, targets, number, algorithm=algorithm) == ap_loss(
        logits, targets, 0.5, algorithm=algorithm
    )
    by_index = ap_loss(logits, targets, ignore_index=np.int32(-1), algorithm=algorithm)
    assert by_index == ap_loss(logits, targets, ignore_index=-1, algorithm=algorithm)
    one = [error_driven_loss(logits, targets, own_errors, skew=s) for s in (number, 0.5)]
    assert one[0] == one[1]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("loc_errors", alrp_loss),
        ("quality", rank_sort_loss),
        ("values", lambda *a: error_driven_loss(a[0], a[1], own_errors, a[2])),
        ("regression_losses", lambda x, t, e: aLRPLoss.apply(x[:, 0], (t == 0) * 1, e)),
    ],
)
def test_a_wrong_number_is_told_beside_the_right_one(name, call):
    found = 1 if name == "regression_losses" else 3
    with pytest.raises(ValueError, match=f"^{name}: expected {found} entries, .* got 5$"):
        call(LOGITS, TARGETS, torch.zeros(5))


@pytest.mark.parametrize("call", [
    lambda: RankSort.apply(torch.zeros(3), torch.zeros(3), "x"),
    lambda: RankSort.apply(torch.zeros(3), torch.zeros(3), -1.0),
])  # fmt: skip
def test_the_authors_name_of_delta(call):
    with pytest.raises((TypeError, ValueError), match=r"^delta_RS: expected"):
        call()


@pytest.mark.parametrize("form", ["levels", "padded", "positions shuffled"])
def test_positives_are_all_and_each_once(form, algorithm):
    """Fewer, or one twice, would be the loss of another batch."""
    logits, targets = detector_batch("spread", 240, 4, 30)
    found = (targets >= 0).nonzero()[:, 0]
    loc_errors = torch.rand(30)
    if form == "positions shuffled":
        found = found[torch.randperm(30)]
    elif form == "padded":
        found = torch.cat([found, torch.full((5,), -1)])
        loc_errors = torch.cat([loc_errors, torch.zeros(5)])
    if form == "levels":
        logits, targets = list(logits.split([200, 40])), list(targets.split([200, 40]))
    settings = {"algorithm": algorithm}
    alrp_loss(logits, targets, loc_errors, positives=found, **settings)
    for wrong in (found[1:], found[:10]):
        with pytest.raises(ValueError, match=r"^positives: expected all 30 positives of targets"):
            alrp_loss(logits, targets, loc_errors[: len(wrong)], positives=wrong, **settings)
    twice = torch.where(found == found[3], found[7], found)
    with pytest.raises(ValueError, match=r"^positives: expected every position once"):
        ap_loss(logits, targets, positives=twice, **settings)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grouped", [False, True])
def test_what_stands_in_padded_rows_is_never_seen(grouped, garbage, algorithm):
    """No value and no gradient of any loss sees it: a buffer may be uninitialised there."""
    logits, targets = detector_batch("spread", 120, 4, 15)
    found, values = (targets >= 0).nonzero()[:, 0], torch.rand(15)
    slots = torch.randperm(20)[:15].sort().values
    positives = torch.full((20,), -1).index_put((slots,), found)
    padded = torch.full((20,), garbage).index_put((slots,), values)
    groups = torch.arange(120) % 3 if grouped else None

    def own(counts):
        wrong = torch.where(counts.rank_positive > 0, counts.values / counts.values, 1.0)
        return (counts.nfp + counts.value_sum) / counts.rank, 0 * wrong, counts.num_positives

    losses = {
        "alrp": lambda x, v, **k: alrp_loss(x, targets, v, **k),
        "rank_sort": lambda x, v, **k: rank_sort_loss(x, targets, v, **k),
        "own": lambda x, v, **k: (error_driven_loss(x, targets, own, v, **k),),
        "skewed": lambda x, v, **k: (error_driven_loss(x, targets, own, v, skew=2.0, **k),),
    }
    for name, loss in losses.items():
        results = []
        algorithm_ = "pairwise" if name == "skewed" else algorithm
        for given, places in ((values, None), (padded, positives)):
            leaf, value_leaf = logits.clone().requires_grad_(), given.clone().requires_grad_()
            parts = loss(leaf, value_leaf, positives=places, groups=groups, algorithm=algorithm_)
            sum(parts).backward()
            results.append((*parts, leaf.grad))
            if name == "alrp" and places is not None:
                assert (value_leaf.grad[positives < 0] == 0).all()
                assert value_leaf.grad.isfinite().all()
        for right, got in zip(*results, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_targets_and_groups(dtype, algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    targets = torch.where(targets < 0, 4, targets)
    groups = torch.arange(240) % 5
    settings = {"algorithm": algorithm}
    expected = both(logits, targets, torch.ones(30), groups=groups, **settings)
    got = both(logits, targets.to(dtype), torch.ones(30), groups=groups.to(dtype), **settings)
    assert torch.equal(got[2], expected[2])
    marks = (torch.nn.functional.one_hot(targets, 5)[:, :4]).to(dtype)
    assert torch.equal(
        both(logits, marks, torch.ones(30), groups=groups[:, None], **settings)[2], expected[2]
    )


def test_an_unsigned_index_beyond_int64_is_background():
    targets = torch.tensor([0, 1, 2**62, 7], dtype=torch.uint64)
    targets[2:3].view(torch.int64).fill_(-100)  # 2^64 - 100
    logits = torch.randn(4, 2)
    plain = torch.tensor([0, 1, -1, -1])
    assert ap_loss(logits, targets) == ap_loss(logits, plain)


@pytest.mark.parametrize("ignore_index", [255, 2])
def test_uint8_labels_of_segmentation(ignore_index, algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    labels = torch.where(targets == IGNORE, ignore_index, targets)
    labels = torch.where(labels == -1, 200, labels)
    number = int(((labels < 4) & (labels != ignore_index)).sum())
    settings = {"ignore_index": ignore_index, "algorithm": algorithm}
    expected = both(logits, labels, torch.ones(number), **settings)
    got = both(logits, labels.to(torch.uint8), torch.ones(number), **settings)
    assert torch.equal(got[2], expected[2])
    assert (got[2][labels == ignore_index] == 0).all()


def test_bool_groups_are_two(algorithm):
    logits, targets = detector_batch("spread", 240, 4, 30)
    groups = torch.arange(240) % 2
    losses = [ap_loss(logits, targets, groups=g, algorithm=algorithm) for g in (groups, groups > 0)]
    assert losses[0] == losses[1]


def test_targets_that_require_a_gradient_get_none():
    marks = torch.zeros(6, 3)
    marks[0, 1] = 1
    expected = ap_loss(LOGITS + marks, marks)
    marks.requires_grad_()
    loss = ap_loss((LOGITS + marks.detach()).requires_grad_(), marks)
    assert loss == expected
    loss.backward()
    assert marks.grad is None


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_head_enters_without_a_copy_in_both_formats(channels_last):
    """Each format has its view; `_lay_out` makes no copy of either."""
    batch, anchors, classes, height, width = 2, 3, 4, 5, 8
    maps = torch.randn(batch, anchors * classes, height, width)
    if channels_last:
        maps = maps.contiguous(memory_format=torch.channels_last)
        logits = maps.permute(0, 2, 3, 1).view(-1, classes)
    else:
        logits = maps.view(batch * anchors, classes, height, width)
    targets = torch.zeros(*logits.shape[:1], *logits.shape[2:])
    level, _ = inputs._lay_out(logits, targets.long(), logits, -100)
    assert level.data_ptr() == maps.data_ptr()
    assert level.numel() == maps.numel()


LOSSES = {
    "alrp": lambda x, t, v: sum(alrp_loss(x, t, v)),
    "ap": lambda x, t, v: ap_loss(x, t),
    "ndcg": lambda x, t, v: ndcg_loss(x, t),
    "rank_sort": lambda x, t, v: sum(rank_sort_loss(x, t, v)),
    "own": lambda x, t, v: error_driven_loss(x, t, own_errors, v),
    "skewed": lambda x, t, v: error_driven_loss(x, t, own_errors, v, skew=1.0),
}


@pytest.fixture(params=LOSSES)
def case(request):
    """Return (a loss of logits and values, logits, values, the gradient by the logits)."""
    logits, targets = detector_batch("spread", 60, 3, 12)
    values, leaf = torch.rand(12), logits.clone().requires_grad_()
    LOSSES[request.param](leaf, targets, values).backward()
    return lambda x, v: LOSSES[request.param](x, targets, v), logits, values, leaf.grad


def test_transforms_that_go_backward_give_the_gradient(case):
    loss, logits, values, gradient = case
    torch.testing.assert_close(torch.func.grad(loss)(logits, values), gradient)
    torch.testing.assert_close(torch.func.jacrev(loss)(logits, values), gradient)
    _, pull = torch.func.vjp(lambda x: loss(x, values), logits)
    torch.testing.assert_close(pull(torch.tensor(-2.0))[0], -2 * gradient)
    stacked = torch.func.jacrev(lambda x: torch.stack([loss(x, values), 3 * loss(x, values)]))
    torch.testing.assert_close(stacked(logits), torch.stack([gradient, 3 * gradient]))
    functional = torch.autograd.functional.jacobian(lambda x: loss(x, values), logits)
    torch.testing.assert_close(functional, gradient)


def test_parameters_of_a_functional_call_get_the_gradient(case):
    loss, logits, values, _ = case
    layer = torch.nn.Linear(3, 3)
    parameters = dict(layer.named_parameters())

    def run(parameters):
        return loss(logits + torch.func.functional_call(layer, parameters, (logits,)), values)

    got = torch.func.grad(run)(parameters)
    run(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(got[name], parameter.grad)


def forward_mode(loss, logits):
    with torch.autograd.forward_ad.dual_level():
        return loss(torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits)))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: forward_mode(f, x),
        lambda f, x: forward_mode(f, x.clone().requires_grad_()),
        lambda f, x: torch.autograd.functional.jacobian(
            f, x, strategy="forward-mode", vectorize=True
        ),
    ],
)
def test_forward_mode_by_the_logits_is_a_clear_error(case, transform, context):
    loss, logits, values, _ = case
    with context(), pytest.raises(RuntimeError, match="no forward-mode derivative by its logits"):
        transform(lambda x: loss(x, values), logits)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x), "second"),
        (lambda f, x: torch.func.hessian(f)(x), "forward-mode"),
        (lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x), "second"),
        (lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x,)), "forward-mode|second"),
        (lambda f, x: torch.autograd.functional.hessian(f, x), "second"),
        (lambda f, x: torch.autograd.functional.hvp(f, x, x), "second"),
        (lambda f, x: torch.func.vmap(f)(torch.stack([x, x])), "torch.vmap"),
        (lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x])), "torch.vmap"),
        (
            lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
            "one upstream gradient at a time",
        ),
    ],
)
def test_other_transforms_are_a_clear_error(case, transform, message):
    loss, logits, values, _ = case
    with pytest.raises(RuntimeError, match=message):
        transform(lambda x: loss(x, values), logits)


def test_vmap_over_other_arguments_is_a_clear_error():
    def values(v):
        return alrp_loss(LOGITS, TARGETS, v)

    def groups(g):
        return ap_loss(LOGITS, TARGETS, groups=g)

    for function, batched in ((values, torch.rand(2, 3)), (groups, torch.zeros(2, 6).long())):
        with pytest.raises(RuntimeError, match=r"torch\.vmap"):
            torch.func.vmap(function)(batched)


def test_loc_is_differentiated_in_forward_mode(algorithm):
    """It is linear in loc_errors: jvp is the gradient times the tangent."""
    logits, targets = detector_batch("spread", 60, 3, 12)
    loc_errors, tangent = torch.rand(12), torch.randn(12)
    settings = {"algorithm": algorithm}
    gradient = both(logits, targets, loc_errors, **settings)[3]
    for leaf in (logits, logits.clone().requires_grad_()):
        got = torch.func.jvp(
            lambda e, x=leaf: alrp_loss(x, targets, e, **settings), (loc_errors,), (tangent,)
        )[1]
        assert got[0] == 0
        torch.testing.assert_close(got[1].detach(), (gradient * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(loc_errors, tangent)
        loc = alrp_loss(logits, targets, dual, **settings)[1]
        got = torch.autograd.forward_ad.unpack_dual(loc).tangent
    torch.testing.assert_close(got, (gradient * tangent).sum())


def test_losses_are_no_views_and_may_be_scaled_in_place():
    """FSDP warns of views, whose changes in place autograd may refuse."""
    logits, targets = detector_batch("spread", 60, 3, 12)
    leaf = logits.clone().requires_grad_()
    calls = (
        lambda: alrp_loss(leaf, targets, torch.rand(12).requires_grad_()),
        lambda: (ap_loss(leaf, targets),),
        lambda: rank_sort_loss(leaf, targets, torch.rand(12)),
    )
    assert not any(part._is_view() for call in calls for part in call())
    for call in calls:
        for loss in call()[: 1 if call is calls[0] else None]:  # loc has no gradient by the logits
            (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            loss *= 3
            (scaled,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            (again,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            torch.testing.assert_close(scaled, 3 * once)
            assert torch.equal(again, scaled)
