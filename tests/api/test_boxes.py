"""Localisation errors of boxes, in torch and in Triton: values, gradients, and every odd box."""

from __future__ import annotations

import enum
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library

import alrp_triton
from alrp_triton import backend
from alrp_triton.boxes import KINDS, MIN_AREA, as_corners, box_overlap, localisation_errors
from alrp_triton.testing.box_tolerance import (
    TORCH,
    Backend,
    Result,
    deviation,
    deviations,
    evaluate,
    grid_boxes,
    random_boxes,
)

HAS_GPU = torch.cuda.is_available()
ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


TRITON = pytest.param(
    Backend("triton", "cpu"),
    id="interpreter",
    marks=pytest.mark.skipif(
        HAS_GPU or not backend._INTERPRETS, reason="kernels are compiled here, not interpreted"
    ),
)
GPU = pytest.param(Backend("triton", "cuda"), id="gpu", marks=pytest.mark.gpu)
TORCH_GPU = pytest.param(Backend("torch", "cuda"), id="torch-gpu", marks=pytest.mark.gpu)

every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(TORCH, id="torch"), TRITON, GPU, TORCH_GPU]
)
kernels_only = pytest.mark.parametrize("backend", [TRITON, GPU])
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Show whatever is allocated and not written as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def compilation_log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled") / "log"


@pytest.fixture(scope="module", autouse=True)
def compilation(request, compilation_log):
    """Run `print_compiled` in a process without the interpreter, beside the other tests."""
    wanted = any("machine_code" in item.fixturenames for item in request.session.items)
    if not wanted or importlib.util.find_spec("triton") is None:
        yield None
        return
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "api")])
    command = [sys.executable, "-c", "import test_boxes; test_boxes.print_compiled()"]
    with compilation_log.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def large_programs(monkeypatch):
    """Enlarge the programs: to the interpreter one of a pair costs as much as one of a thousand."""
    if not HAS_GPU and importlib.util.find_spec("triton"):
        monkeypatch.setattr(importlib.import_module("alrp_triton.kernels.boxes"), "BLOCK", 1024)


def generic_boxes(pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw boxes as above without a tie: no corner is level with one of the other box."""
    pred, target = random_boxes(pairs, seed)
    return pred + torch.tensor([1, 3, 5, 7]) / 64, target


def check_budget(got: Result, pred: Tensor, target: Tensor, kind: str, tau: float = 0.5) -> None:
    for part, (found, budget) in deviations(got, pred, target, kind, tau).items():
        assert found <= budget, (part, kind)


# --- values ------------------------------------------------------------------------------------

_FLAT = 4 / math.pi**2 * math.atan(2) ** 2  # pi / 2 - arctan(1 / 2) = arctan(2)
_TURN = 4 / math.pi**2 * math.atan(1 / 3) ** 2  # arctan(2) - arctan(1) = arctan(1/3)

# (pred, target, IoU, GIoU, DIoU, CIoU), by hand.
BY_HAND = {
    "equal": ((0, 0, 2, 2), (0, 0, 2, 2), 1, 1, 1, 1),
    "overlap": ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7, 1 / 7 - 2 / 9, 1 / 7 - 1 / 9, 1 / 7 - 1 / 9),
    "apart": ((0, 0, 1, 1), (2, 0, 3, 1), 0, -1 / 3, -4 / 10, -4 / 10),
    "touching": ((0, 0, 1, 1), (1, 0, 2, 1), 0, 0, -1 / 5, -1 / 5),
    "nested": ((0, 0, 4, 2), (0, 0, 2, 2), 0.5, 0.5, 0.45, 0.45 - _TURN**2 / (0.5 + _TURN)),
    "point inside": ((1, 1, 1, 1), (0, 0, 2, 2), 0, 0, 0, -1 / 4 * 1 / 5),
    "inside-out": ((2, 2, 0, 0), (0, 0, 2, 2), 0, 0, 0, -1 / 4 * 1 / 5),
    "inside-out and far": ((9, 0, 0, 1), (3, 0, 4, 1), 0, -8 / 9, -1 / 82, -1 / 82 - 1 / 20),
    "points apart": ((0, 0, 0, 0), (3, 4, 3, 4), 0, -1, -1, -1),
    "one point": ((1, 1, 1, 1), (1, 1, 1, 1), 0, 0, 0, 0),
    # On one line lengths take the place of areas in GIoU: it goes where [0, 0, 1, h] goes.
    "points on a line": ((0, 0, 0, 0), (3, 0, 3, 0), 0, -1, -1, -1),
    "apart on a line": ((0, 0, 1, 0), (2, 0, 3, 0), 0, -1 / 3, -4 / 9, -4 / 9),
    "touching on a line": ((0, 0, 1, 0), (1, 0, 2, 0), 0, 0, -1 / 4, -1 / 4),
    # The angles are pi / 2 and 0, those of the squares pi / 4: 4 / pi^2 (pi / 4)^2 = 1 / 4.
    "no height": ((0, 1, 2, 1), (0, 0, 2, 2), 0, 0, 0, -1 / 4 * 1 / 5),
    "no width": ((1, 0, 1, 2), (0, 0, 2, 2), 0, 0, 0, -1 / 4 * 1 / 5),
    "no height, upright": ((0, 1, 1, 1), (0, 0, 1, 2), 0, 0, 0, -(_FLAT**2) / (1 + _FLAT)),
    "height inside-out": (
        (0, 1, 1, 0),
        (0, 0, 1, 2),
        0,
        0,
        -1 / 20,
        -1 / 20 - _FLAT**2 / (1 + _FLAT),
    ),
    "across each other": ((0, 1, 2, 1), (1, 0, 1, 2), 0, -1, 0, -1 / 2),
}


@every_backend
@every_kind
@pytest.mark.parametrize("case", BY_HAND)
def test_values_by_hand(backend, kind, case):
    pred, target, *overlaps = BY_HAND[case]
    pred, target = (torch.tensor([x], dtype=torch.float64) for x in (pred, target))
    overlap = overlaps[KINDS.index(kind)]
    errors = evaluate(backend, pred, target, kind, tau=0.5).errors
    expected = (1 - overlap) / 0.5 if kind == "iou" else (1 - overlap) / 2 / 0.5
    assert errors.item() == pytest.approx(expected, rel=8 * torch.finfo(torch.float64).eps)


@every_backend
def test_gradient_by_hand(backend):
    # I = 1, U = 7; moving x2 adds 1 to I and 2 to the area: (1 * 7 - 1 * (2 - 1)) / 49.
    pred, target = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 1, 3, 3]])
    result = evaluate(backend, pred.double(), target.double(), "iou", tau=0.0)
    expected = torch.tensor([[-2.0, -2, -6, -6]]).double() / 49
    torch.testing.assert_close(result.by_pred, expected)
    torch.testing.assert_close(result.by_target, -expected.flip(1))


@every_backend
@every_kind
def test_equal_boxes_are_perfect_and_stay_so(backend, kind):
    boxes, _ = random_boxes(100)
    for given_boxes in (boxes, boxes / 3, boxes * 1e-3 + 7):
        result = evaluate(backend, given_boxes, given_boxes, kind)
        assert (result.errors == 0).all()
        # The terms of the gradient are at most 2 / side each, and cancel.
        side = (given_boxes[:, 2:] - given_boxes[:, :2]).min()
        assert result.by_pred.abs().max() <= 8 * torch.finfo(torch.float32).eps * 2 / side


@every_backend
@every_kind
def test_far_from_the_origin(backend, kind):
    """Boxes of a pixel in a large image: what their corners lost is lost, but nothing more."""
    pred, target = (boxes / 8 + 4096 for boxes in random_boxes(200))
    errors = evaluate(backend, pred, target, kind).errors
    truth = evaluate(TORCH, pred.double(), target.double(), kind).errors
    assert (errors - truth).abs().max() <= 16 * torch.finfo(torch.float32).eps


def torchvision_errors(pred: Tensor, target: Tensor, kind: str, tau: float) -> Tensor:
    torchvision_ops = pytest.importorskip("torchvision.ops")
    if kind == "iou":
        return (1 - torchvision_ops.box_iou(pred, target).diagonal()) / (1 - tau)
    losses = {
        "giou": torchvision_ops.generalized_box_iou_loss,
        "diou": torchvision_ops.distance_box_iou_loss,
        "ciou": torchvision_ops.complete_box_iou_loss,
    }
    return losses[kind](pred, target, eps=0.0) / 2 / (1 - tau)


@every_backend
@every_kind
def test_same_as_torchvision(backend, kind):
    pred, target = generic_boxes(200)

    def theirs(dtype) -> Result:
        boxes = [x.to(dtype).requires_grad_() for x in (pred, target)]
        errors = torchvision_errors(*boxes, kind, 0.3)
        return Result(errors.detach(), *torch.autograd.grad(errors.sum(), boxes))

    got = evaluate(backend, pred, target, kind, 0.3)
    eps = torch.finfo(torch.float32).eps
    for mine, single, truth in zip(got, theirs(torch.float32), theirs(torch.float64), strict=True):
        assert deviation(mine, truth) <= 2 * deviation(single, truth) + eps


# --- rounding, gradients -----------------------------------------------------------------------


@kernels_only
@every_kind
def test_kernel_is_as_good_as_torch(backend, kind, monkeypatch):
    monkeypatch.undo()  # programs as large as they are
    pred, target = random_boxes(300)
    result = evaluate(backend, pred, target, kind)
    check_budget(result, pred, target, kind)
    # One pair; one less than, exactly, and one more than a program takes: the same, bit for bit.
    for pairs in (1, 63, 64, 65):
        for part, whole in zip(
            evaluate(backend, pred[:pairs], target[:pairs], kind), result, strict=True
        ):
            assert torch.equal(part, whole[:pairs])


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend, kind, dtype):
    pred, target = (boxes.to(dtype) for boxes in random_boxes(150))
    result = evaluate(backend, pred, target, kind)
    assert result.errors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.by_pred.dtype == result.by_target.dtype == dtype
    check_budget(result, pred, target, kind)


@every_backend
@pytest.mark.parametrize("dtypes", list(product(DTYPES, repeat=2)), ids=str)
def test_mixed_dtypes(backend, dtypes):
    pred, target = (b.to(d) for b, d in zip(random_boxes(50), dtypes, strict=True))
    result = evaluate(backend, pred, target, "ciou")
    assert result.errors.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert (result.by_pred.dtype, result.by_target.dtype) == dtypes
    check_budget(result, pred, target, "ciou")


# Not CIoU: its weight alpha is defined to have no gradient, so differences are the wrong test.
@every_backend
@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_gradcheck(backend, kind):
    pred, target = (b.double().to(backend.device) for b in generic_boxes(4, seed=3))

    def errors(pred, target):
        return localisation_errors(pred, target, kind, 0.2, impl=backend.impl)

    boxes = pred.requires_grad_(), target.requires_grad_()
    assert torch.autograd.gradcheck(errors, boxes, fast_mode=backend.impl == "triton")


@every_backend
def test_gradient_of_ciou_with_its_weight_held(backend):
    pred, target = (b.double() for b in generic_boxes(4, seed=3))

    def turn(pred):
        angles = [torch.atan((b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1])) for b in (target, pred)]
        return 4 / math.pi**2 * (angles[0] - angles[1]) ** 2

    shape = turn(pred)
    weight = shape / (1 - box_overlap(pred, target, "iou") + shape)

    def errors(pred):
        return (1 - box_overlap(pred, target, "diou") + weight * turn(pred)) / 2 / (1 - 0.5)

    leaf = pred.clone().requires_grad_()
    assert torch.autograd.gradcheck(errors, leaf)
    (expected,) = torch.autograd.grad(errors(leaf).sum(), leaf)
    torch.testing.assert_close(evaluate(backend, pred, target, "ciou").by_pred, expected)


# --- properties --------------------------------------------------------------------------------


@every_backend
@every_kind
def test_symmetric(backend, kind):
    for boxes in (random_boxes(200), grid_boxes()):
        there, back = evaluate(backend, *boxes, kind), evaluate(backend, *boxes[::-1], kind)
        assert torch.equal(there.errors, back.errors)
        torch.testing.assert_close(there.by_pred, back.by_target)
        torch.testing.assert_close(there.by_target, back.by_pred)


@every_backend
@every_kind
def test_scale_and_order_do_not_matter(backend, kind):
    pred, target = random_boxes(200)
    plain = evaluate(backend, pred, target, kind)
    scaled = evaluate(backend, pred * 64, target * 64, kind)
    assert torch.equal(scaled.errors, plain.errors)
    assert torch.equal(scaled.by_pred * 64, plain.by_pred)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled = evaluate(backend, pred[order], target[order], kind)
    for part, whole in zip(shuffled, plain, strict=True):
        if backend.impl == "triton":
            assert torch.equal(part, whole[order])
        else:  # on the CPU, torch takes another arctan for the last few of a vector
            torch.testing.assert_close(part, whole[order])


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tau_scales(backend, kind, dtype):
    pred, target = (b.to(dtype) for b in random_boxes(50))
    plain = evaluate(backend, pred, target, kind, tau=0.0)
    for tau in (0.1, 0.7, 0.99):
        for part, scaled in zip(plain, evaluate(backend, pred, target, kind, tau), strict=True):
            expected = part / (1 - tau)
            assert deviation(scaled, expected) <= 4 * torch.finfo(dtype).eps


@every_backend
@every_kind
def test_linear_in_the_upstream_gradient(backend, kind):
    pred, target = (b.double() for b in random_boxes(50))
    upstream = torch.linspace(-2, 3, 50, dtype=torch.float64)
    plain = evaluate(backend, pred, target, kind)
    scaled = evaluate(backend, pred, target, kind, upstream=upstream)
    for part in ("by_pred", "by_target"):
        expected = getattr(plain, part) * upstream[:, None]
        assert deviation(getattr(scaled, part), expected) <= 16 * torch.finfo(torch.float64).eps


# --- degenerate boxes --------------------------------------------------------------------------


def check_sane(result: Result, kind: str, tau: float) -> None:
    for part in result:
        assert part.isfinite().all()
    eps = 8 * torch.finfo(result.errors.dtype).eps
    assert result.errors.min() >= -eps
    assert result.errors.max() * (1 - tau) <= (1.25 if kind == "ciou" else 1) + eps


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_tie_and_every_degenerate_box(backend, kind, dtype):
    pred, target = (boxes.to(dtype) for boxes in grid_boxes())
    result = evaluate(backend, pred, target, kind, tau=0.25)
    check_sane(result, kind, tau=0.25)
    check_budget(result, pred, target, kind, tau=0.25)


# A box that goes where it loses a side, or all: (at the end, what is added on the way there).
ON_THE_WAY = {
    "height": ((200, 599, 300, 599), (0, 0, 0, 1)),
    "height, from inside-out": ((200, 599, 300, 599), (0, 0, 0, -1)),
    "width": ((250, 570, 250, 630), (-1, 0, 0, 0)),
    "width, from inside-out": ((250, 570, 250, 630), (1, 0, -1, 0)),
    "height, outside": ((0, 0, 50, 0), (0, -1, 0, 1)),
    "to inside-out in both": ((300, 600, 200, 600), (0, 0, 0, 1)),
    "to a point, flat": ((250, 600, 250, 600), (0, 0, 0, 1)),
}


@every_backend
@every_kind
@pytest.mark.parametrize("way", ON_THE_WAY)
@pytest.mark.parametrize("role", ["pred", "target"])
def test_errors_follow_a_box_that_loses_a_side(backend, kind, way, role):
    end, step = (torch.tensor([x], dtype=torch.float64) for x in ON_THE_WAY[way])
    steps = 2.0 ** -torch.arange(0, 40, 2, dtype=torch.float64)
    boxes = torch.cat([end + steps[:, None] * step, end])
    other = torch.tensor([[180.0, 560, 320, 640]]).double().expand_as(boxes)
    pair = (boxes, other) if role == "pred" else (other, boxes)
    result = evaluate(backend, *pair, kind)
    distance = (result.errors - result.errors[-1]).abs()
    # No error changes by more than 1 for each pixel; that of a thin box by its gradient.
    assert (distance[:-1] <= steps).all()
    for gradient in (result.by_pred, result.by_target):
        assert gradient.isfinite().all()
        if "point" not in way:  # the angle of which turns ever faster
            assert gradient.abs().max() <= 1


def test_a_box_that_loses_its_height():
    pred, target = torch.tensor([[200.0, 599, 300, 599]]), torch.tensor([[180.0, 560, 320, 640]])
    errors = localisation_errors(pred, target, "ciou", tau=0.0)
    assert errors.item() == pytest.approx(0.505, abs=5e-4)


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_do_not_matter(backend, kind, dtype):
    """The bits are the same in units of a pixel, of 1e-20 of it, and of 1e37."""
    pred, target = (boxes.to(dtype) for boxes in random_boxes(60))
    degenerate = torch.tensor([[1, 1, 1, 4], [1, 1, 4, 1], [2, 2, 2, 2], [4, 4, 1, 1.0]]).to(dtype)
    pred, target = torch.cat([pred, degenerate]), torch.cat([target, degenerate.flip(0)])
    plain = evaluate(backend, pred, target, kind)
    check_sane(plain, kind, tau=0.5)
    for power in (-66, -40, 60, 123, *((-900, 1000) if dtype == torch.float64 else ())):
        scaled = evaluate(backend, pred * 2.0**power, target * 2.0**power, kind)
        if power == -900:  # too small, but finite
            check_sane(scaled, kind, tau=0.5)
            continue
        assert torch.equal(scaled.errors, plain.errors)
        # Multiplied in two steps, each within range; what is below it is rounded to it.
        half = 2.0 ** (power // 2), 2.0 ** (power - power // 2)
        tiny = torch.finfo(dtype).smallest_normal * 2.0**power if power > 0 else 0
        for part in ("by_pred", "by_target"):
            back = getattr(scaled, part) * half[0] * half[1]
            torch.testing.assert_close(back, getattr(plain, part), rtol=0, atol=tiny)


HOSTILE = (
    0.0,
    -0.0,
    1.0,
    2.0,
    -3.0,
    1e-45,
    1e-38,
    1e-20,
    -1e-15,
    1e4,
    1e20,
    -1e30,
    3.4e38,
    torch.inf,
)


def hostile_boxes(pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw boxes of coordinates from subnormal to infinite, mixed."""
    generator = torch.Generator().manual_seed(seed)
    coordinates = torch.tensor([*HOSTILE, -torch.inf])
    drawn = coordinates[torch.randint(len(coordinates), (pairs, 8), generator=generator)]
    return drawn[:, :4], drawn[:, 4:]


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_hostile_boxes_give_sane_results(backend, kind, dtype):
    pred, target = (boxes.to(dtype) for boxes in hostile_boxes(900))
    result = evaluate(backend, pred, target, kind)
    # What is stored in 16 bits may be larger than the largest of them.
    stored = result.errors.dtype == dtype
    check_sane(result if stored else Result(result.errors, *result[:1] * 2), kind, tau=0.5)
    for gradient in (result.by_pred, result.by_target):
        assert not gradient.isnan().any()


@every_backend
@every_kind
def test_an_infinity_counts_as_the_largest_number(backend, kind):
    target = torch.tensor([[1.0, 1, 3, 3]]).expand(3, 4)
    pred = torch.tensor([[0, 0, torch.inf, 4], [-torch.inf] * 2 + [torch.inf] * 2, [torch.inf] * 4])
    largest = torch.finfo(torch.float32).max
    for part, expected in zip(
        evaluate(backend, pred, target, kind),
        evaluate(backend, pred.clamp(-largest, largest), target, kind),
        strict=True,
    ):
        torch.testing.assert_close(part, expected)


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_comes_out_where_none_goes_in(backend, kind, dtype):
    """It is exactly 0, whatever a row holds, in either box; what is real stays as it is."""
    real = random_boxes(40)
    spoilt = [boxes.clone() for boxes in real]
    hostile = hostile_boxes(40, seed=1)
    for boxes, rows in zip(spoilt, hostile, strict=True):
        boxes[::2] = rows[::2]
    spoilt[0][::8, 1] = torch.nan
    spoilt[1][2::8, 3] = torch.nan
    spoilt[0][4::8] = spoilt[1][4::8] = torch.nan
    upstream = torch.linspace(-2, 3, 40)
    upstream[::2] = 0
    result = evaluate(backend, *(x.to(dtype) for x in spoilt), kind, upstream=upstream)
    expected = evaluate(backend, *(x.to(dtype) for x in real), kind, upstream=upstream)
    for part, clean in zip(result[1:], expected[1:], strict=True):
        assert (part[::2] == 0).all()
        assert torch.equal(part[1::2], clean[1::2])
    assert result.errors[0].isnan()


@every_backend
@every_kind
def test_nan_from_above_stays_visible(backend, kind):
    pred, target = random_boxes(4)
    pred[1] = torch.nan
    upstream = torch.tensor([torch.nan, torch.nan, 0, 1])
    result = evaluate(backend, pred, target, kind, upstream=upstream)
    for gradient in result[1:]:
        assert gradient[:2].isnan().all()
        assert (gradient[2] == 0).all()
        assert gradient[3].isfinite().all()


@every_backend
@every_kind
def test_padding_in_a_static_buffer(backend, kind):
    """In the whole loss neither the gradient of the buffer nor of a head before it meets NaN."""
    real, target = (boxes.to(backend.device) for boxes in random_boxes(3))
    gradients = []
    for rubbish in (0.0, torch.nan, torch.inf, -torch.inf):
        buffer = torch.full((9, 4), rubbish, device=backend.device)
        buffer[[8, 0, 4]] = real
        buffer.requires_grad_()
        rows = torch.tensor([8, 0, 4, 1, 2], device=backend.device)
        targets = torch.full((5, 4), rubbish, device=backend.device)
        targets[:3] = target
        logits = torch.linspace(-1, 1, 20, device=backend.device).reshape(10, 2).requires_grad_()
        classes = torch.tensor([0, 1, -1, -1, 1, -1, -1, -1, -1, -1], device=backend.device)
        positives = torch.tensor([0, 1, 4, -1, -1], device=backend.device)
        criterion = alrp_triton.ALRPLoss(box_loss=kind, impl=backend.impl)
        out = criterion(logits, classes, buffer[rows], targets, positives=positives)
        out.loss.backward()
        gradients.append([out.loss.detach(), logits.grad, buffer.grad])
    for others in gradients[1:]:
        assert all(map(torch.equal, others, gradients[0]))
    assert gradients[0][2].abs().sum() > 0


@every_backend
@every_kind
def test_tiny_boxes(backend, kind):
    # Around the smallest area that counts, the smallest normal and the smallest subnormal number.
    sides = [MIN_AREA**0.5 * s for s in (0.5, 1.0, 2.0)] + [1e-20, 1e-30, 2.0**-126, 1e-45, 1.0]
    corners = [(0, 0, w, h) for w in sides for h in sides] + [(0, 0, 1e4, 1e-34), (-1e-30, 0, 1, 1)]
    boxes = torch.tensor(corners)
    pred, target = boxes.repeat_interleave(len(boxes), 0), boxes.repeat(len(boxes), 1)
    check_sane(evaluate(backend, pred, target, kind), kind, tau=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative_of_padding(kind):
    """It is 0 too, and finite for the others; torch's is found by differences."""
    pred, target = (boxes.double() for boxes in generic_boxes(4, seed=3))
    pred[1] = torch.nan
    pred.requires_grad_()
    errors = localisation_errors(pred, target, kind)
    (first,) = torch.autograd.grad(errors[[0, 2, 3]].sum(), pred, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), pred)
    assert (second[1] == 0).all()
    assert second[0].isfinite().all()
    assert second[0].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_torch(kind):
    """Forward mode, and rows mapped one by one, agree with backward mode."""
    pred, target = (boxes.double() for boxes in generic_boxes(4, seed=3))

    def errors(pred):
        return localisation_errors(pred, target, kind)

    backward = torch.func.jacrev(errors)(pred)
    torch.testing.assert_close(torch.func.jacfwd(errors)(pred), backward)

    def one(pred, target):
        return localisation_errors(pred[None], target[None], kind)[0]

    rows = torch.func.vmap(torch.func.grad(one))(pred, target)
    torch.testing.assert_close(rows, backward.diagonal(dim1=0, dim2=1).T)
    pred[2] = torch.nan
    _, tangent = torch.func.jvp(errors, (pred,), (torch.ones_like(pred),))
    assert tangent.isnan().tolist() == [False, False, True, False]


_coordinate = st.floats(-1e4, 1e4, width=32)
_pairs = st.lists(st.tuples(*[_coordinate] * 8), min_size=1, max_size=20)


@every_backend
@every_kind
@settings(max_examples=15, deadline=None)
@given(pairs=_pairs)
def test_any_boxes_give_sane_results(backend, kind, pairs):
    boxes = torch.tensor(pairs)
    check_sane(evaluate(backend, boxes[:, :4], boxes[:, 4:], kind), kind, tau=0.5)


@every_backend
@every_kind
def test_nan_stays_in_its_pair_and_visible(backend, kind):
    pred, target = random_boxes(8)
    clean = evaluate(backend, pred, target, kind)
    for place in range(4):
        broken = pred.clone()
        broken[place, place] = torch.nan
        result = evaluate(backend, broken, target, kind)
        assert result.errors[place].isnan()
        assert result.by_pred[place].isnan().all()
        assert result.by_target[place].isnan().all()
        others = torch.arange(8) != place
        for part, untouched in zip(result, clean, strict=True):
            assert torch.equal(part[others], untouched[others])


# --- memory and the graph ----------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(
    "view",
    [
        lambda boxes: boxes.t().contiguous().t(),
        lambda boxes: torch.cat([boxes * 0 - 1, boxes, boxes * 0 - 1], 1)[:, 4:8],
        lambda boxes: boxes.repeat_interleave(3, 0)[::3],
        lambda boxes: torch.cat([boxes[:1] * 0 - 1, boxes])[1:],
        lambda boxes: boxes[:1].expand(len(boxes), 4),
    ],
    ids=["columns", "slice", "steps", "offset", "expanded"],
)
def test_strides(backend, view):
    pred, target = random_boxes(140)
    views = view(pred), view(target)
    before = [x.clone() for x in views]
    result = evaluate(backend, *views, "ciou")
    for part, plain in zip(result, evaluate(backend, *before, "ciou"), strict=True):
        assert torch.equal(part, plain)
    for given_boxes, kept in zip(views, before, strict=True):
        assert torch.equal(given_boxes, kept)


@every_backend
@every_kind
def test_no_pair_is_attached(backend, kind):
    pred = torch.zeros(0, 4, device=backend.device, requires_grad=True)
    target = torch.zeros(0, 4, device=backend.device, requires_grad=True)
    errors = localisation_errors(pred, target, kind, impl=backend.impl)
    assert errors.shape == (0,)
    errors.sum().backward()
    assert pred.grad.shape == target.grad.shape == (0, 4)


@every_backend
def test_upstream_gradients_of_any_stride(backend):
    pred, target = random_boxes(140)
    plain = evaluate(backend, pred, target)
    same = evaluate(backend, pred, target, upstream=torch.ones(1).expand(140))
    wide = torch.full((140, 3), torch.nan)
    wide[:, 1] = 1
    sliced = evaluate(backend, pred, target, upstream=wide[:, 1])
    for part in ("by_pred", "by_target"):
        assert torch.equal(getattr(same, part), getattr(plain, part))
        assert torch.equal(getattr(sliced, part), getattr(plain, part))


@every_backend
def test_backward_twice_and_only_where_asked(backend):
    pred, target = (boxes.to(backend.device) for boxes in random_boxes(140))
    pred.requires_grad_()
    errors = localisation_errors(pred, target, "ciou", impl=backend.impl)
    errors.sum().backward(retain_graph=True)
    first, pred.grad = pred.grad, None
    errors.sum().backward()
    assert torch.equal(pred.grad, first)
    assert target.grad is None
    with torch.no_grad():
        again = localisation_errors(pred, target, "ciou", impl=backend.impl)
    assert not again.requires_grad
    assert torch.equal(again, errors)


@kernels_only
def test_no_second_derivative(backend):
    pred, target = (boxes.to(backend.device) for boxes in random_boxes(3))
    pred.requires_grad_()
    errors = localisation_errors(pred, target, impl=backend.impl)
    (by_pred,) = torch.autograd.grad(errors.sum(), pred, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (errors.sum() + by_pred.square().sum()).backward()


# --- the choice of the backend, errors ---------------------------------------------------------


def test_auto_is_torch_on_the_cpu():
    pred, target = random_boxes(3)
    errors = localisation_errors(pred.requires_grad_(), target, "iou")
    assert "TritonErrors" not in type(errors.grad_fn).__name__
    (by_pred,) = torch.autograd.grad(errors.sum(), pred, create_graph=True)
    by_pred.sum().backward()  # torch has a second derivative


def test_triton_on_the_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"impl='triton'.*CUDA.*got cpu"):
        localisation_errors(*random_boxes(3), impl="triton")
    criterion = alrp_triton.ALRPLoss(impl="triton")
    targets = torch.tensor([0, 1, 0, -1])
    with pytest.raises(RuntimeError, match="impl='triton'"):
        criterion(torch.zeros(4, 2), targets, *random_boxes(3))


def test_program_wide_setting(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pred, target = random_boxes(3)
    alrp_triton.set_backend(impl="triton")
    try:
        with pytest.raises(RuntimeError, match="impl='triton'"):
            localisation_errors(pred, target)
        localisation_errors(pred, target, impl="torch")  # what is named at the call wins
    finally:
        alrp_triton.set_backend()


def test_torch_path_without_triton():
    script = """
import sys
sys.modules["triton"] = None  # any import of it raises
import torch, alrp_triton
boxes = torch.rand(3, 4, requires_grad=True)
alrp_triton.localisation_errors(boxes, boxes.detach() + 0.1, "ciou").sum().backward()
try:
    alrp_triton.localisation_errors(boxes, boxes, impl="triton")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "triton is not installed" in done.stdout


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"kind": "siou"}, ValueError, "kind: expected one of .*, got 'siou'"),
        ({"tau": 1.0}, ValueError, "tau: expected .*, got 1.0"),
        ({"tau": -0.1}, ValueError, "tau: expected"),
        ({"tau": math.nan}, ValueError, "tau: expected"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of .*, got 'cuda'"),
        ({"pred_boxes": [0, 0, 1, 1]}, TypeError, "pred_boxes: .*got list"),
        ({"pred_boxes": torch.zeros(3, 4).int()}, TypeError, "pred_boxes: .*got .*int32"),
        ({"pred_boxes": torch.zeros(3, 5)}, ValueError, r"pred_boxes: .*got \(3, 5\)"),
        ({"target_boxes": torch.zeros(4)}, ValueError, r"target_boxes: .*got \(4,\)"),
        ({"target_boxes": torch.zeros(2, 4)}, ValueError, r"target_boxes: .*\(3, 4\).*\(2, 4\)"),
        ({"target_boxes": torch.zeros(3, 4, device="meta")}, ValueError, "target_boxes: .*meta"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change, error, match):
    arguments = {"pred_boxes": torch.zeros(3, 4), "target_boxes": torch.zeros(3, 4)} | change
    with pytest.raises(error, match=match):
        localisation_errors(**arguments)


NO_BOXES = [
    *(None, 1.0, "boxes", [[0.0, 0.0, 1.0, 1.0]], np.zeros((3, 4)), object()),
    *(torch.zeros(3, 4, dtype=dtype) for dtype in (torch.int64, torch.uint8, torch.bool)),
    *(torch.zeros(3, 4, dtype=dtype) for dtype in (torch.complex64, torch.float8_e4m3fn)),
    *(torch.zeros(shape) for shape in ((0,), (4,), (3, 5), (3, 3), (3, 4, 1), (1, 3, 4), ())),
    torch.zeros(3, 4).to_sparse(),
    torch.nested.nested_tensor([torch.zeros(4)] * 3),
]
WRONG = [
    *(("pred_boxes", boxes) for boxes in NO_BOXES),
    *(("target_boxes", boxes) for boxes in NO_BOXES),
    *(("target_boxes", boxes) for boxes in (torch.zeros(2, 4), torch.zeros(3, 4, device="meta"))),
    *(("tau", tau) for tau in (None, "0.5", True, [0.5], 0.5j, torch.tensor(0.5), object())),
    *(("tau", tau) for tau in (math.nan, math.inf, 1, 1.0, -0.1, -1, 10**400, np.float32(1))),
    *(("kind", kind) for kind in (None, 1, ["iou"], {"iou": 1}, torch.zeros(2), b"iou")),
    *(("kind", kind) for kind in ("", "IoU", "siou", "iou ")),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_every_wrong_argument_is_named(name, wrong):
    """An error says its name, what was expected, and what came; in `ALRPLoss` by its name there."""
    arguments = {"pred_boxes": torch.zeros(3, 4), "target_boxes": torch.zeros(3, 4)}
    arguments[name] = wrong
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*, got "):
        localisation_errors(**arguments)
    if name in ("tau", "kind"):
        settings = {"box_loss" if name == "kind" else name: wrong}
        with pytest.raises((TypeError, ValueError), match=r"^(tau|box_loss): expected .*, got "):
            alrp_triton.ALRPLoss(**settings)


def test_tau_of_any_real_type():
    boxes = random_boxes(5)
    expected = localisation_errors(*boxes, tau=0.5)
    for tau in (np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)):
        assert torch.equal(localisation_errors(*boxes, tau=tau), expected)
    assert torch.equal(localisation_errors(*boxes, tau=0), localisation_errors(*boxes, tau=0.0))


class BoxFormat(enum.Enum):
    """As `torchvision.tv_tensors.BoundingBoxFormat`."""

    XYXY = "XYXY"
    XYWH = "XYWH"
    CXCYWH = "CXCYWH"
    XYWHR = "XYWHR"


class Boxes(Tensor):
    """As `torchvision.tv_tensors.BoundingBoxes`: a tensor that carries its format."""

    format: BoxFormat | str


def boxes_of(format_: BoxFormat | str, boxes: list[list[float]], **kwargs) -> Boxes:
    made = torch.tensor(boxes, **kwargs).as_subclass(Boxes)
    made.format = format_
    return made


@every_backend
@pytest.mark.parametrize("named", [lambda x: x, lambda x: x.name], ids=["enum", "str"])
@pytest.mark.parametrize(
    ("format_", "boxes"),
    [
        (BoxFormat.XYXY, [[2.0, 3, 6, 11]]),
        (BoxFormat.XYWH, [[2.0, 3, 4, 8]]),
        (BoxFormat.CXCYWH, [[4.0, 7, 4, 8]]),
    ],
)
def test_boxes_that_carry_their_format(backend, named, format_, boxes):
    corners = torch.tensor([[2.0, 3, 6, 11]], device=backend.device)
    given_boxes = boxes_of(named(format_), boxes, device=backend.device)
    for pair in ((given_boxes, corners), (corners, given_boxes), (given_boxes, given_boxes)):
        errors = localisation_errors(*pair, impl=backend.impl)
        assert type(errors) is Tensor
        assert errors.item() == 0
    assert type(as_corners(given_boxes, "boxes")) is Tensor
    leaf = given_boxes.as_subclass(Tensor).clone().requires_grad_()
    moved = leaf.as_subclass(Boxes)
    moved.format = format_
    (localisation_errors(moved, corners + 1, impl=backend.impl)).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_boxes_of_a_format_without_corners_are_named():
    turned = boxes_of(BoxFormat.XYWHR, [[0.0, 0, 1, 1, 30]])
    with pytest.raises(
        ValueError, match=r"^target_boxes: expected format XYXY, XYWH, CXCYWH, got XYWHR"
    ):
        localisation_errors(torch.zeros(1, 4), turned)


@pytest.mark.parametrize("format_", ["XYXY", "XYWH", "CXCYWH"])
def test_bounding_boxes_of_torchvision(format_):
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    corners = torch.tensor([[2.0, 3, 6, 11], [0, 0, 5, 2]])
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(20, 20))
    boxes = transforms.convert_bounding_box_format(boxes, new_format=format_)
    assert torch.equal(as_corners(boxes, "boxes"), corners)
    assert (localisation_errors(corners, boxes) == 0).all()
    criterion = alrp_triton.ALRPLoss()
    out = criterion(torch.zeros(3, 1), torch.tensor([0, -1, 0]), corners, boxes)
    assert out.loc == 0


@kernels_only
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float64)], ids=str)
def test_operators_are_registered_right(backend, dtypes):
    pred, target = (
        boxes.to(backend.device, dtype)
        for boxes, dtype in zip(random_boxes(5), dtypes, strict=True)
    )
    pred = torch.cat([pred, pred], 1)[:, 2:6]
    ops = torch.ops.alrp_triton
    library.opcheck(ops.box_errors.default, (pred, target, "giou", 0.5))
    upstream = torch.ones(
        5, device=backend.device, dtype=ops.box_errors(pred, target, "iou", 0).dtype
    )
    library.opcheck(ops.box_gradient.default, (upstream, pred, target, "ciou", 0.5))


@every_backend
def test_compile(backend):
    compilations = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(evaluate_compiled, fullgraph=True, dynamic=True, backend=compilations)
    counts = []
    for pairs in (5, 140, 33):
        pred, target = (boxes.to(backend.device) for boxes in random_boxes(pairs, seed=pairs))
        leaf = pred.clone().requires_grad_()
        errors = compiled(leaf, target, backend.impl)
        errors.sum().backward()
        expected = evaluate(backend, pred, target, "ciou")
        torch.testing.assert_close(errors.detach().cpu(), expected.errors)
        torch.testing.assert_close(leaf.grad.cpu(), expected.by_pred)
        counts.append(compilations.frame_count)
    assert counts == counts[:1] * 3  # compiled with the first call, and never again


def evaluate_compiled(pred: Tensor, target: Tensor, impl: str) -> Tensor:
    return localisation_errors(pred, target, "ciou", impl=impl)


# --- machine code ------------------------------------------------------------------------------


# CIoU contains DIoU, and DIoU contains IoU.
COMPILED = [("giou", torch.float32), *(("ciou", dtype) for dtype in DTYPES)]


def print_compiled() -> None:
    """Compile the kernels for GPUs that are not there, in a process without the interpreter."""
    from alrp_triton.kernels import boxes
    from perf.machine_code.sass import compile_launch, record, variant

    def launches(pred, target, kind, tau=0.5):
        with record() as recorded:
            errors = boxes.errors(pred, target, kind, tau)
            boxes.gradient(errors, pred, target, kind, tau)
        return recorded

    compiled = []
    for target, (kind, dtype) in product(TARGETS, COMPILED):
        for launch in launches(*(b.to(dtype) for b in random_boxes(3)), kind):
            code = compile_launch(launch, target)
            name = f"{launch.kernel.__name__} {kind} {dtype}"
            compiled.append((target, name, code.registers, code.spills, code.shared))

    generator = torch.Generator().manual_seed(0)
    variants = set()
    for _ in range(50):
        pairs, width = torch.randint(1, 5000, (2,), generator=generator).tolist()
        wide = torch.zeros(pairs, width % 7 + 5)
        tau = width / 5000
        for pred, target in ((wide[:, 1:5], wide[:, :4]), (wide[:, :4], torch.zeros(4, pairs).t())):
            variants |= {variant(launch) for launch in launches(pred, target, "giou", tau)}
    first = launches(wide[:, 1:5], wide[:, :4], "giou")[0].arguments
    in_place = first["pred"].data_ptr() == wide[:, 1:5].data_ptr()
    print(json.dumps({"compiled": compiled, "variants": len(variants), "in_place": in_place}))


@pytest.fixture(scope="module")
def machine_code(compilation, compilation_log) -> dict:
    if compilation is None:
        pytest.skip("triton is not installed")
    assert compilation.wait() == 0, compilation_log.read_text()
    printed = compilation_log.read_text().splitlines()
    return json.loads(next(line for line in printed if line.startswith('{"compiled"')))


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills_or_exchange(machine_code, target):
    rows = [row[1:] for row in machine_code["compiled"] if row[0] == target]
    assert len(rows) == 2 * len(COMPILED)
    for name, registers, spills, shared in rows:
        assert spills == 0, (name, registers)
        assert shared == 0, name  # a thread has all of its pair


def test_one_variant_whatever_the_size(machine_code):
    assert machine_code["variants"] == 2  # a kernel each way, for 100 sizes, strides and taus


def test_views_are_read_in_place(machine_code):
    assert machine_code["in_place"]


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@every_kind
def test_many_pairs_without_waiting(kind):
    pred, target = (boxes.cuda() for boxes in random_boxes(50_000))
    pred.requires_grad_()
    localisation_errors(pred, target, kind).sum().backward()  # compiled
    pred.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for impl in ("auto", "torch"):
            errors = localisation_errors(pred, target, kind, impl=impl)
            assert ("TritonErrors" in type(errors.grad_fn).__name__) == (impl == "auto")
            errors.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gpu = Backend("triton", "cuda")
    pred = pred.detach().cpu()
    check_budget(evaluate(gpu, pred, target.cpu(), kind), pred, target.cpu(), kind)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    pred, target = (boxes.cuda() for boxes in random_boxes(1000))
    pred.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        errors = localisation_errors(pred, target, "ciou", impl="triton")
        return errors, *torch.autograd.grad(errors.sum(), pred)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    moved, _ = random_boxes(1000, seed=1)
    with torch.no_grad():
        pred.copy_(moved)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_the_second_device():
    pred, target = (boxes.to("cuda:1") for boxes in random_boxes(300))
    errors = localisation_errors(pred, target, impl="triton")
    assert errors.device == pred.device
    torch.testing.assert_close(errors, localisation_errors(pred, target, impl="torch"))
