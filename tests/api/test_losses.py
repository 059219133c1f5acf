"""The modules and the self-balancing weight."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from batches import detector_batch, relative_error
from torch import Tensor, nn

from alrp_triton import (
    ALRPLoss,
    APLoss,
    NDCGLoss,
    RankSortLoss,
    SelfBalance,
    alrp_loss,
    ap_loss,
    localisation_errors,
    rank_sort_loss,
)


def batch(num_positives: int = 12, seed: int = 0):
    logits, targets = detector_batch("mid", 200, 4, num_positives, seed)
    target_boxes = torch.rand(num_positives, 4, generator=torch.Generator().manual_seed(seed))
    target_boxes = target_boxes.cumsum(1)
    return logits, targets, target_boxes + 0.05, target_boxes


@pytest.mark.parametrize("box_loss", ["iou", "giou", "diou", "ciou"])
@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_module_is_the_functions(box_loss, tau):
    logits, targets, pred_boxes, target_boxes = batch()
    logits.requires_grad_()
    pred_boxes.requires_grad_()
    out = ALRPLoss(delta=0.5, box_loss=box_loss, tau=tau)(logits, targets, pred_boxes, target_boxes)
    out.loss.backward()
    gradients = logits.grad.clone(), pred_boxes.grad.clone()
    logits.grad = pred_boxes.grad = None
    errors = localisation_errors(pred_boxes, target_boxes, box_loss, tau)
    cls, loc = alrp_loss(logits, targets, errors, 0.5)
    (cls + loc).backward()
    assert (out.cls, out.loc, out.weight, out.loss) == (cls, loc, 1, cls + loc)
    assert torch.equal(logits.grad, gradients[0])
    assert torch.equal(pred_boxes.grad, gradients[1])


def test_a_loss_may_be_changed_in_place():
    """Detectors do so that weigh their losses by `loss *= weight`."""
    logits, targets, *_ = batch()
    gradients = []
    for in_place in (False, True):
        leaf = logits.clone().requires_grad_()
        ranking, sorting = rank_sort_loss(leaf, targets, torch.linspace(0, 1, 12))
        if in_place:
            ranking *= 3
            sorting *= 5
        else:
            ranking, sorting = 3 * ranking, 5 * sorting
        (ranking + sorting).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_ap_module_is_the_function():
    logits, targets, *_ = batch()
    assert torch.equal(APLoss(delta=0.5)(logits, targets), ap_loss(logits, targets, 0.5))
    positives = (targets >= 0).nonzero()[:, 0]
    assert torch.equal(APLoss()(logits, targets, positives), ap_loss(logits, targets))


def test_weight_multiplies_the_box_gradient_alone():
    logits, targets, pred_boxes, target_boxes = batch()
    gradients = []
    for initial in (1.0, 50.0):
        leaves = logits.clone().requires_grad_(), pred_boxes.clone().requires_grad_()
        out = ALRPLoss(balance=SelfBalance(initial))(leaves[0], targets, leaves[1], target_boxes)
        out.loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
        assert out.weight == initial
        assert relative_error(out.loss, out.cls + initial * out.loc) < 1e-6
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert relative_error(gradients[1][1], 50 * gradients[0][1]) < 1e-5


def test_balance_is_the_ratio_of_the_epoch():
    balance = SelfBalance()
    criterion = ALRPLoss(balance=balance)
    assert balance.weight == 50
    for epoch in range(3):
        outs = [criterion(*batch(seed=10 * epoch + i)) for i in range(4)]
        weights = {float(out.weight) for out in outs}
        assert weights == {float(balance.weight.float())}  # constant within an epoch
        total = sum(float(out.cls + out.loc) for out in outs)
        balance.step()
        expected = total / sum(float(out.loc) for out in outs)
        assert float(balance.weight) == pytest.approx(expected, rel=1e-6)


def test_period_ends_epochs_by_itself():
    by_period, by_hand = SelfBalance(period=3), SelfBalance()
    for i in range(10):
        cls, loc = torch.tensor(0.9 - i / 20), torch.tensor(0.1 + i / 50)
        by_period.update(cls, loc)
        by_hand.update(cls, loc)
        if i % 3 == 2:
            by_hand.step()
        assert by_period.weight == by_hand.weight
    assert by_period.weight != 50
    assert by_period.iterations == 1


def test_balance_is_saved_and_restored():
    criterion = ALRPLoss(balance=SelfBalance())
    criterion(*batch())
    state = copy.deepcopy(criterion.state_dict())
    assert set(state) == {"balance.weight", "balance.sums", "balance.iterations"}
    restored = ALRPLoss(balance=SelfBalance())
    restored.load_state_dict(state)
    for module in (criterion, restored):
        module(*batch(seed=1))
        module.balance.step()
    assert restored.balance.weight == criterion.balance.weight
    assert pickle.loads(pickle.dumps(criterion)).balance.weight == criterion.balance.weight
    assert copy.deepcopy(criterion).balance.weight == criterion.balance.weight


def test_evaluation_leaves_the_balance_alone():
    criterion = ALRPLoss(balance=SelfBalance()).eval()
    criterion(*batch())
    assert criterion.balance.iterations == 0
    assert (criterion.balance.sums == 0).all()


def test_epoch_without_positives_keeps_the_weight_and_warns_once():
    criterion = ALRPLoss(balance=SelfBalance(initial=20.0))
    for _ in range(2):
        out = criterion(*batch(num_positives=0))
        assert out.loss == 0
    with pytest.warns(UserWarning, match="no positive was seen"):
        criterion.balance.step()
    assert criterion.balance.weight == 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.balance.step()
        criterion(*batch())
        criterion.balance.step()
    assert criterion.balance.weight != 20


def test_period_without_positives_warns_too():
    criterion = ALRPLoss(balance=SelfBalance(period=2))
    criterion(*batch(num_positives=0))
    with pytest.warns(UserWarning, match="no positive was seen"):
        criterion(*batch(num_positives=0))


def test_loss_that_is_not_finite_does_not_spoil_the_balance():
    balance = SelfBalance()
    balance.update(torch.tensor(0.9), torch.tensor(0.1))
    balance.update(torch.tensor(float("nan")), torch.tensor(0.1))
    balance.step()
    assert float(balance.weight) == pytest.approx(10, rel=1e-6)


def test_perfect_localisation_keeps_the_weight():
    balance = SelfBalance(initial=7.0)
    balance.update(torch.tensor(0.5), torch.tensor(0.0))
    balance.step()
    assert balance.weight == 7


def test_wrong_settings_are_named():
    for make, message in (
        (lambda: SelfBalance(initial=0.0), "initial: expected a positive number"),
        (lambda: SelfBalance(period=0), "period: expected None or at least 1"),
        (lambda: ALRPLoss(box_loss="l1"), "^box_loss: expected .* got 'l1'"),
        (lambda: ALRPLoss(tau=1.0), "tau: expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for make, message in (
        (lambda: SelfBalance("50"), "^initial: expected a number, got str"),
        (lambda: SelfBalance(period=1.5), "^period: expected None or an integer, got float"),
    ):
        with pytest.raises(TypeError, match=message):
            make()


def test_the_balance_moves_to_the_device_of_the_losses():
    """Where nobody moved it, it would copy from device to device in every iteration."""
    balance, loss = SelfBalance(period=2), torch.ones((), device="meta")
    for _ in range(2):
        balance.update(loss, loss)
    assert {buffer.device.type for buffer in balance.buffers()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    """Logits and boxes of a 16-bit forward pass; the loss leaves autocast's dtypes alone."""
    logits, targets, pred_boxes, target_boxes = batch()
    leaf = logits.to(dtype).requires_grad_()
    boxes = pred_boxes.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = ALRPLoss(balance=SelfBalance())(leaf, targets, boxes, target_boxes)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert leaf.grad.dtype == boxes.grad.dtype == dtype
    plain = ALRPLoss()(leaf.detach(), targets, boxes.detach(), target_boxes)
    assert out.cls == plain.cls
    assert relative_error(out.loc, plain.loc) < 1e-6


def test_settings_show_in_repr():
    criterion = ALRPLoss(delta=0.5, box_loss="ciou", balance=SelfBalance(period=9))
    assert "delta=0.5, box_loss='ciou', tau=0.5" in repr(criterion)
    assert "period=9" in repr(criterion)
    assert repr(APLoss(delta=0.5)) == "APLoss(delta=0.5)"


NOT_NUMBERS = [None, "1", [1.0], (), {}, object(), 1j, True, np.True_, torch.ones(()), np.ones(2)]
NOT_STRINGS = [None, 3, 1.5, True, ["auto"], ("iou",), {}, object(), b"iou", math.nan]
EVERY_LOSS = [ALRPLoss, APLoss, NDCGLoss, RankSortLoss]
WRONG_SETTINGS = {
    "delta": (
        EVERY_LOSS,
        NOT_NUMBERS,
        [-1.0, -1, math.nan, math.inf, -math.inf, 1e-300, 1e300, 10**400, np.float32("nan")],
    ),
    "ignore_index": (EVERY_LOSS, [*NOT_NUMBERS, 1.0, np.float32(2)], [2**63, -(2**70), 10**400]),
    "impl": (EVERY_LOSS, NOT_STRINGS, ["", "cuda", "Torch"]),
    "algorithm": (EVERY_LOSS, NOT_STRINGS, ["", "pairs", "PAIRWISE"]),
    "box_loss": ([ALRPLoss], NOT_STRINGS, ["", "l1", "GIoU"]),
    "tau": ([ALRPLoss], NOT_NUMBERS, [1, 1.0, -0.1, math.nan, math.inf, 10**400]),
    "balance": ([ALRPLoss], [object(), 50.0, True, "auto", SelfBalance, nn.Identity(), {}], []),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_every_setting_is_checked_when_the_loss_is_made(name):
    """A wrong type or value is named, with what was expected and what came."""
    losses, wrong_types, wrong_values = WRONG_SETTINGS[name]
    for error, values in (((TypeError, ValueError), wrong_types), (ValueError, wrong_values)):
        for loss in losses:
            for value in values:
                with pytest.raises(error, match=f"^{name}: expected .*got "):
                    loss(**{name: value})


def test_numbers_of_numpy_are_numbers():
    """A configuration file, or arithmetic with arrays, hands them over."""
    settings = {"delta": np.float32(0.5), "ignore_index": np.int64(-1)}
    for loss in EVERY_LOSS:
        criterion = loss(**settings)
        assert (criterion.delta, criterion.ignore_index) == (0.5, -1)
        assert (type(criterion.delta), type(criterion.ignore_index)) == (float, int)
        assert criterion.extra_repr().startswith("delta=0.5")
        assert loss(delta=Fraction(1, 4)).delta == 0.25
    criterion = ALRPLoss(tau=np.float32(0.25), **settings)
    assert criterion(*batch()).loss == ALRPLoss(0.5, tau=0.25, ignore_index=-1)(*batch()).loss


class Scripted(nn.Module):
    """A model that holds its criterion and does not call it."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.criterion = criterion

    def forward(self, x: Tensor) -> Tensor:
        """Infer, without a loss."""
        return self.layer(x)


class ScriptedAP(Scripted):
    """One that calls it in training mode."""

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the loss in training mode, else the logits."""
        if self.training:
            return self.criterion(self.layer(x), targets)
        return self.layer(x)


class ScriptedALRP(Scripted):
    """The same, with boxes, and keywords."""

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the loss in training mode, else the logits."""
        if self.training:
            out = self.criterion([self.layer(x)], [targets], pred_boxes=x, target_boxes=x)
            return out.loss + out.cls
        return self.layer(x)


class ScriptedRankSort(Scripted):
    """The same, with qualities."""

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the loss in training mode, else the logits."""
        if self.training:
            return self.criterion(self.layer(x), targets, x[:, 0]).sorting
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "criterion",
    [
        ALRPLoss(),
        ALRPLoss(balance=SelfBalance()),
        ALRPLoss(balance=SelfBalance(period=3)),
        APLoss(),
        NDCGLoss(),
        RankSortLoss(),
        SelfBalance(period=3),
    ],
)
def test_a_model_that_holds_a_criterion_can_be_scripted(criterion):
    model, x = Scripted(criterion), torch.randn(2, 3)
    for script in (torch.jit.script(model), torch.jit.freeze(torch.jit.script(model.eval()))):
        file = io.BytesIO()
        torch.jit.save(script, file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (ScriptedAP(APLoss()), "APLoss"),
        (ScriptedAP(NDCGLoss()), "NDCGLoss"),
        (ScriptedALRP(ALRPLoss(balance=SelfBalance())), "ALRPLoss"),
        (ScriptedRankSort(RankSortLoss()), "RankSortLoss"),
    ],
)
def test_a_script_infers_and_says_that_it_cannot_rank(model, name):
    x, targets = torch.randn(2, 3), torch.tensor([0, -1])
    script = torch.jit.script(model)
    assert torch.equal(script.eval()(x, targets), model.eval()(x, targets))
    with pytest.raises(torch.jit.Error, match=f"{name}.*: TorchScript cannot compile"):
        script.train()(x, targets)
