"""What the self-balancing weight survives: casts, devices, copies, checkpoints, compilers."""

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
from torch import nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from alrp_triton import ALRPLoss, SelfBalance, self_balance
from alrp_triton.losses import _Weighted


def feed(balance: SelfBalance, iterations: int = 200, seed: int = 0):
    """Update with losses near those of a detector; return the weight that comes of it, exactly."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(iterations, 2, generator=generator) * torch.tensor([0.9, 0.02])
    for cls, loc in losses:
        balance.update(cls, loc)
    cls, loc = (sum(map(Fraction, column)) for column in losses.T.tolist())
    return float((cls + loc) / loc)


def weight_after_an_epoch(balance: SelfBalance, iterations: int = 200):
    expected = feed(balance, iterations)
    balance.step()
    return balance.weight.item(), pytest.approx(expected, rel=1e-13)


def batch(num_positives: int = 12, seed: int = 0):
    logits, targets = detector_batch("mid", 200, 4, num_positives, seed)
    target_boxes = torch.rand(num_positives, 4, generator=torch.Generator().manual_seed(seed))
    target_boxes = target_boxes.cumsum(1)
    return logits, targets, target_boxes + 0.05, target_boxes


class Detector(nn.Module):
    """A model that holds its criterion, of batches with boxes that it predicts itself."""

    def __init__(self, balance: SelfBalance):
        super().__init__()
        self.scale = nn.Linear(4, 4)
        self.criterion = ALRPLoss(balance=balance)

    def forward(self, logits, targets, pred_boxes, target_boxes):
        """Apply the criterion to scaled logits."""
        return self.criterion(self.scale(logits), targets, pred_boxes, target_boxes)


def fsdp_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Do what FSDP does with `MixedPrecision(buffer_dtype=...)`, by its own function."""
    runtime = pytest.importorskip("torch.distributed.fsdp._runtime_utils")
    buffers = list(model.buffers())
    runtime._cast_buffers_to_dtype_and_device(buffers, [dtype] * len(buffers), torch.device("cpu"))


CASTS = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "float": nn.Module.float,
    "double": nn.Module.double,
    "to": lambda model: model.to(torch.float16),
    "type": lambda model: model.type(torch.bfloat16),
    "device and dtype": lambda model: model.to("cpu", torch.bfloat16),
    "FSDP, bfloat16": lambda model: fsdp_buffers(model, torch.bfloat16),
    "FSDP, float16": lambda model: fsdp_buffers(model, torch.float16),
    "complex": lambda model: model.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_no_cast_reaches_the_statistics(cast):
    """It may come before the first iteration, in an epoch, and with a weight that is in use."""
    balance = SelfBalance(initial=46.3)
    model = Detector(balance)
    cast(model)
    assert balance.weight.item() == 46.3
    expected = feed(balance)
    sums, iterations = balance.sums.clone(), balance.iterations.clone()
    cast(model)
    assert torch.equal(balance.sums, sums)
    assert torch.equal(balance.iterations, iterations)
    balance.step()
    weight = balance.weight.clone()
    assert weight.item() == pytest.approx(expected, rel=1e-13)
    cast(model)
    assert torch.equal(balance.weight, weight)
    assert weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_does_not_reach_the_statistics(dtype):
    """As Lightning's "bf16-true" sets it, around the making of the model and around a step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        balance = SelfBalance(initial=46.3, period=200)
        assert balance.weight.item() == 46.3
        expected = feed(balance)
    finally:
        torch.set_default_dtype(before)
    assert balance.weight.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_losses_of_any_dtype_are_added_in_float64(dtype):
    balance = SelfBalance()
    cls, loc = torch.tensor(0.9, dtype=dtype), torch.tensor(0.1, dtype=dtype)
    for _ in range(400):
        balance.update(cls, loc)
    balance.step()
    assert balance.weight.item() == pytest.approx(1 + cls.item() / loc.item(), rel=1e-12)


def test_a_million_iterations():
    balance = SelfBalance()
    losses = torch.tensor([0.9, 0.0203])
    balance.sums = torch.stack([losses.double().sum(), losses[1].double()]) * 999_000
    balance.iterations.fill_(999_000)
    for _ in range(1000):
        balance.update(*losses)
    balance.step()
    assert balance.weight.item() == pytest.approx(1 + losses[0].item() / losses[1].item(), 1e-12)


@pytest.mark.parametrize("cls", [0.0, 1e-30, 1.0, 65504.0, 1e30, 3e38])
@pytest.mark.parametrize("loc", [1e-30, 1e-3, 1.0, 65504.0, 1e30])
def test_the_range_is_that_of_float64(cls, loc):
    balance = SelfBalance()
    cls, loc = torch.tensor(cls), torch.tensor(loc)
    for _ in range(10):
        balance.update(cls, loc)
    balance.step()
    assert balance.weight.item() == pytest.approx(1 + cls.item() / loc.item(), rel=1e-13)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_an_iteration_that_is_not_finite_adds_nothing(broken, which):
    balance = SelfBalance()
    balance.update(torch.tensor(0.9), torch.tensor(0.1))
    losses = [torch.tensor(0.5), torch.tensor(0.5)]
    losses[which] = torch.tensor(broken)
    balance.update(*losses)
    assert balance.iterations == 2
    balance.step()
    assert balance.weight.item() == pytest.approx(10, rel=1e-6)


def test_sums_that_overflow_keep_the_weight():
    balance = SelfBalance(initial=3.0)
    huge = torch.tensor(1e308, dtype=torch.float64)
    for _ in range(3):
        balance.update(huge / 2, huge / 2)
    balance.step()
    assert balance.weight == 3


def test_made_on_meta_it_begins_anew_when_it_gets_memory():
    with torch.device("meta"):
        model = Detector(SelfBalance(initial=46.3))
    balance = model.criterion.balance
    assert {buffer.device.type for buffer in balance.buffers()} == {"meta"}
    assert balance.weight.dtype == torch.float64
    model.to_empty(device="cpu")
    assert (balance.weight, balance.iterations) == (46.3, 0)
    assert torch.equal(balance.sums, torch.zeros(2, dtype=torch.float64))
    got, expected = weight_after_an_epoch(balance)
    assert got == expected


@pytest.mark.parametrize("assign", [False, True])
def test_made_on_meta_it_is_loaded(assign):
    balance = SelfBalance()
    feed(balance, 10)
    balance.step()
    feed(balance, 10, seed=1)
    loaded = SelfBalance(initial=3.0).to("meta")
    if not assign:
        loaded.to_empty(device="cpu")
    loaded.load_state_dict(copy.deepcopy(balance.state_dict()), assign=assign)
    for module in (balance, loaded):
        feed(module, 10, seed=2)
        assert module.iterations == 20
    assert torch.equal(loaded.weight, balance.weight)
    assert torch.equal(loaded.sums, balance.sums)
    assert loaded._sums.dtype == torch.int64


def test_memory_that_was_taken_away_is_reset_by_hand():
    balance = SelfBalance(initial=46.3)
    feed(balance, 10)
    balance.to_empty(device="cpu")
    balance.reset_parameters()
    assert (balance.weight, balance.iterations) == (46.3, 0)
    assert (balance.sums == 0).all()


def test_losses_find_a_balance_that_was_left_on_meta():
    criterion = ALRPLoss(balance=SelfBalance(initial=46.3).to("meta"))
    out = criterion(*batch())
    assert out.weight.item() == pytest.approx(46.3, rel=1e-7)
    assert criterion.balance.iterations == 1


def test_the_weight_is_on_the_device_of_the_losses():
    """It moves before it is used: a scalar of another device would carry the loss over there."""
    criterion = ALRPLoss(balance=SelfBalance(period=2))
    inputs = [x.to("meta") for x in batch()]
    weight = criterion.balance.weight_of(torch.ones((), device="meta"))
    assert weight.device.type == "meta"
    assert {buffer.device.type for buffer in criterion.buffers()} == {"meta"}
    criterion = ALRPLoss(balance=SelfBalance(period=2)).eval()
    out = criterion(*inputs, positives=torch.zeros(12, dtype=torch.int64, device="meta"))
    assert {x.device.type for x in out} == {"meta"}


def test_what_moves_in_inference_mode_is_updated_later():
    criterion = ALRPLoss(balance=SelfBalance().to("meta"))
    with torch.inference_mode():
        criterion(*batch())
    assert criterion.balance.iterations == 0
    criterion(*batch())
    assert criterion.balance.iterations == 1


KEYS = ["weight", "sums", "iterations"]


def test_the_state_dict_holds_numbers():
    balance = SelfBalance(initial=46.3)
    feed(balance, 3)
    state = balance.state_dict()
    assert list(state) == KEYS
    assert state["weight"].item() == 46.3
    assert torch.equal(state["sums"], balance.sums)
    assert {x.dtype for x in state.values()} == {torch.float64, torch.int64}
    state["weight"].fill_(5.0)  # a reference, as in any module
    assert balance.weight == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_states_of_the_first_release_are_loaded(dtype, assign):
    """Its buffers were float64, or what a cast had made of them."""
    state = {
        "criterion.balance.weight": torch.tensor(46.0, dtype=dtype),
        "criterion.balance.sums": torch.tensor([8.0, 0.5], dtype=dtype),
        "criterion.balance.iterations": torch.tensor(7),
    }
    model = Detector(SelfBalance())
    incomplete = model.load_state_dict(state, strict=False, assign=assign)
    assert incomplete.missing_keys == ["scale.weight", "scale.bias"]
    assert not incomplete.unexpected_keys
    balance = model.criterion.balance
    assert (balance.weight, balance.iterations) == (46, 7)
    assert balance.weight.dtype == torch.float64
    balance.update(torch.tensor(0.0), torch.tensor(0.0), 1)
    balance.step()
    assert balance.weight == 16


def test_a_wrong_state_names_its_keys():
    balance = SelfBalance()
    with pytest.raises(RuntimeError, match=r'Missing key.* "weight"'):
        balance.load_state_dict({"sums": torch.zeros(2), "iterations": torch.tensor(0)})
    state = {**balance.state_dict(), "sums": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="size mismatch for sums"):
        balance.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        balance.load_state_dict({**balance.state_dict(), "other": torch.zeros(3)})
    assert balance.weight == 50
    assert balance._weight.dtype == torch.int64


def by_state(balance):
    restored = SelfBalance()
    restored.load_state_dict(balance.state_dict())
    return restored


def by_file(balance):
    file = io.BytesIO()
    torch.save(balance.state_dict(), file)
    file.seek(0)
    restored = SelfBalance()
    restored.load_state_dict(torch.load(file, weights_only=True))
    return restored


def by_whole_file(balance):
    file = io.BytesIO()
    torch.save(balance, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "state_dict": by_state,
    "file": by_file,
    "whole file": by_whole_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda balance: pickle.loads(pickle.dumps(balance)),
    "AveragedModel": lambda balance: swa_utils.AveragedModel(balance).module,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_go_on_alike_and_apart(make):
    balance = SelfBalance(initial=46.3)
    feed(balance, 10)
    other = make(balance)
    assert other.weight.item() == 46.3
    feed(balance, 10, seed=1)
    assert other.iterations == 10
    feed(other, 10, seed=1)
    for module in (balance, other):
        module.step()
    assert torch.equal(balance.weight, other.weight)


def averages():
    """Average models over two epochs of one, with buffers or without."""
    model = Detector(SelfBalance(initial=50.0))
    by_copy = swa_utils.AveragedModel(model)
    ema = swa_utils.get_ema_multi_avg_fn(0.9)
    by_bits = swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
    for weight in (50.0, 50.0, 40.0, 10.0):
        model.criterion.balance.weight = torch.tensor(weight)
        by_copy.update_parameters(model)
        by_bits.update_parameters(model)
    return [x.module.criterion.balance.weight.item() for x in (by_copy, by_bits)]


def test_averaging_models_have_a_weight_between():
    copied, averaged = averages()
    assert copied == 10
    assert 10 < averaged < 50.5


def test_the_state_dict_averages_as_numbers():
    """timm and others average what it refers to."""
    balance, average = SelfBalance(), SelfBalance()
    balance.weight = torch.tensor(10.0)
    for mean, value in zip(
        average.state_dict().values(), balance.state_dict().values(), strict=True
    ):
        mean.copy_(0.75 * mean + 0.25 * value)
    assert average.weight == 40


def test_functional_call_reads_and_writes_what_it_is_given():
    criterion = ALRPLoss(balance=SelfBalance())
    for names in (dict(criterion.named_buffers()), criterion.state_dict()):
        given = {name: value.clone() for name, value in names.items()}
        if "balance.weight" in given:
            given["balance.weight"].fill_(7.0)
        out = torch.func.functional_call(criterion, given, batch())
        assert out.weight == (7 if "balance.weight" in given else 50)
        assert given["balance.iterations"] == 1
        assert (criterion.balance.weight, criterion.balance.iterations) == (50, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_validation_in_training_mode_does_not_count(mode):
    """torchvision's models return their losses in training mode alone."""
    criterion = ALRPLoss(balance=SelfBalance(period=2))
    for seed in range(3):
        with mode():
            out = criterion(*batch(seed=seed))
        assert out.weight == 50
    assert criterion.balance.iterations == 0
    assert (criterion.balance.sums == 0).all()
    criterion(*batch())
    assert criterion.balance.iterations == 1


def test_an_update_by_hand_always_counts():
    balance = SelfBalance().eval()
    with torch.no_grad():
        balance.update(torch.tensor(0.9), torch.tensor(0.1))
    leaf = torch.tensor(0.9, requires_grad=True)
    balance.update(2 * leaf, leaf)
    assert balance.iterations == 2
    assert not balance.sums.requires_grad


def gradients(region, wrap, calls: int = 1, **settings):
    """Return loss and gradients of some calls before one backward, and the criterion's balance."""
    criterion = ALRPLoss(balance=SelfBalance(**settings))
    losses, leaves = [], []
    for seed in range(calls):
        logits, targets, pred_boxes, target_boxes = batch(seed=seed)
        leaves += [logits.requires_grad_(), pred_boxes.requires_grad_()]
        losses.append(wrap(region(criterion), logits, targets, pred_boxes, target_boxes))
    sum(losses).backward()
    return torch.stack(losses).detach(), [leaf.grad for leaf in leaves], criterion.balance


REGIONS = {
    "loss": lambda criterion: lambda *inputs: criterion(*inputs).loss,
    "with more behind": lambda criterion: (
        lambda logits, *inputs: (criterion(2 * logits, *inputs).loss.exp() - 1).sin()
    ),
    "between gains": lambda criterion: (
        lambda *inputs: (lambda out: out.cls.exp() + out.weight * out.loc**2)(criterion(*inputs))
    ),
    "with a region inside": lambda criterion: (
        lambda logits, *inputs: checkpoint(
            lambda *inputs: criterion(*inputs).loss, logits.tanh(), *inputs, use_reentrant=False
        ).exp()
    ),
    "with a reentrant region inside": lambda criterion: (
        lambda logits, *inputs: checkpoint(
            lambda *inputs: criterion(*inputs).loss, logits.tanh(), *inputs, use_reentrant=True
        ).exp()
    ),
}


@pytest.mark.parametrize("period", [None, 1, 2, 3])
@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_counts_once_and_keeps_the_weight(reentrant, region, period):
    """With a period of 1 the weight changes between forward and what backward computes again."""

    def wrap(function, *inputs):
        return checkpoint(function, *inputs, use_reentrant=reentrant)

    def plain(function, *inputs):
        return function(*inputs)

    expected = gradients(region, plain, period=period)
    got = gradients(region, wrap, period=period)
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(got[2].weight, expected[2].weight)
    assert torch.equal(got[2].sums, expected[2].sums)
    assert got[2].iterations == expected[2].iterations


@pytest.mark.parametrize("early_stop", [True, False])
def test_several_checkpoints_before_one_backward(early_stop):
    """The second call has another weight than the first, and each goes back with its own."""

    def wrap(function, *inputs):
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            return checkpoint(function, *inputs, use_reentrant=False)

    expected = gradients(REGIONS["loss"], lambda f, *x: f(*x), calls=3, period=1)
    got = gradients(REGIONS["loss"], wrap, calls=3, period=1)
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(got[2].weight, expected[2].weight)


def test_a_second_backward_does_not_count():
    criterion = ALRPLoss(balance=SelfBalance())
    logits, *inputs = batch()
    logits.requires_grad_()
    loss = checkpoint(lambda x: criterion(x, *inputs).loss, logits, use_reentrant=False)
    loss.backward(retain_graph=True)
    loss.backward()
    assert criterion.balance.iterations == 1


def test_the_weighting_is_differentiable_twice():
    loc = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(7.0, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: _Weighted.apply(x, weight) ** 2, loc)
    assert torch.autograd.gradcheck(lambda x: _Weighted.apply(x, weight), loc)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("period", [None, 2])
def test_export(period, strict):
    """What is exported returns the same, and counts in its own buffers."""
    inputs = batch()
    criterion = ALRPLoss(balance=SelfBalance(period=period))
    exported = torch.export.export(copy.deepcopy(criterion), inputs, strict=strict).module()
    for _ in range(3):
        for got, expected in zip(exported(*inputs), criterion(*inputs), strict=True):
            assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiled_it_is_the_same_and_compiles_once(backend):
    torch._dynamo.reset()
    compiled = []

    def counting(graph, example_inputs):
        compiled.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    plain = ALRPLoss(balance=SelfBalance(period=3))
    criterion = copy.deepcopy(plain)
    function = torch.compile(criterion, fullgraph=True, backend=counting)
    for seed in range(20):
        losses = []
        for module in (plain, function):
            logits, *inputs = batch(seed=seed)
            out = module(logits.requires_grad_(), *inputs)
            out.loss.backward()
            losses.append((*out, logits.grad))
        for got, expected in zip(*losses, strict=True):
            assert relative_error(got.detach(), expected.detach()) < 1e-6
    assert len(compiled) == 1
    assert criterion.balance.iterations == plain.balance.iterations == 2
    assert relative_error(criterion.balance.weight, plain.balance.weight) < 1e-12


def test_compiled_validation_does_not_count():
    torch._dynamo.reset()
    criterion = ALRPLoss(balance=SelfBalance())
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(*batch())
    assert criterion.balance.iterations == 0
    compiled(*batch())
    assert criterion.balance.iterations == 1


@pytest.fixture
def without_float64(monkeypatch):
    """Let the CPU stand in for a device that knows float32 alone, as Apple's MPS."""
    monkeypatch.setattr(self_balance, "lacks_float64", lambda device: device.type == "cpu")


def test_pairs_of_float32_add_as_float64_does(without_float64):
    balance = SelfBalance(initial=46.3)
    assert balance.weight.dtype == torch.float32
    losses = torch.rand(3000, 2, generator=torch.Generator().manual_seed(0))
    for cls, loc in losses:
        balance.update(cls, loc)
    rounded = torch.stack([losses.sum(1), losses[:, 1]], 1).tolist()  # what is added, in float32
    sums = [float(sum(map(Fraction, column))) for column in zip(*rounded, strict=True)]
    got = self_balance._pairs(balance._sums).double().sum(-1)
    assert got.tolist() == pytest.approx(sums, rel=1e-13)
    expected = sums[0] / sums[1]
    balance.step()
    assert balance.weight.item() == pytest.approx(expected, rel=2.0**-23)
    got, expected = weight_after_an_epoch(balance)
    assert got == pytest.approx(expected.expected, rel=2.0**-23)


def test_pairs_of_float32_are_saved_and_loaded_as_float64(monkeypatch):
    """A state goes from one kind of device to the other, and back."""
    balance = SelfBalance(initial=46.3)
    feed(balance, 100)
    state = copy.deepcopy(balance.state_dict())
    monkeypatch.setattr(self_balance, "lacks_float64", lambda device: device.type == "cpu")
    other = SelfBalance()
    other.load_state_dict(state)
    saved = other.state_dict()
    for name in KEYS:
        assert saved[name].dtype == state[name].dtype
        assert relative_error(saved[name].double(), state[name].double()) < 2.0**-47


def test_no_number_of_a_device_without_float64_is_float64(without_float64):
    """What MPS would refuse is never made: only integers and float32 in an iteration."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                assert x.dtype in (torch.float32, torch.int64, torch.bool), function
            return result

    balance = SelfBalance(period=2)
    cls, loc = torch.tensor(0.9), torch.tensor(0.1)
    with Watch():
        for _ in range(5):
            balance.update(cls, loc, 1)
            balance.weight_of(loc)
        balance.reset_parameters()


def test_it_moves_between_the_two_kinds_of_devices(monkeypatch):
    """There is one device here: its kind is asked before and after, and once for each step."""
    balance = SelfBalance(initial=46.3)
    expected = feed(balance, 100)
    sums = balance.sums.clone()
    number = [False, False, True]  # read as float64 (in two steps), written as a pair
    answers = iter([False, True, *number, *number])
    monkeypatch.setattr(self_balance, "lacks_float64", lambda device: next(answers))
    balance.to("cpu")
    assert not list(answers)
    assert relative_error(self_balance._pairs(balance._sums).double().sum(-1), sums) < 2.0**-47
    monkeypatch.setattr(self_balance, "lacks_float64", lambda device: device.type == "cpu")
    assert balance.weight.item() == pytest.approx(46.3, rel=2.0**-23)
    balance.step()
    assert balance.weight.item() == pytest.approx(expected, rel=2.0**-23)


NOT_NUMBERS = [None, "50", "", [1.0], (), {}, object(), 1j, True, False, np.True_, torch.ones(())]
SETTINGS = {
    "initial": (
        [*NOT_NUMBERS, np.ones(2)],
        [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, np.float32("nan"), -(10**400), 10**400],
        [1, 0.5, 1e-30, 1e30, np.float32(0.5), np.float16(2), np.int64(3), Fraction(1, 3)],
    ),
    "period": (
        [x for x in NOT_NUMBERS if x is not None] + [1.0, 2.5, math.nan, math.inf, np.float64(3)],
        [0, -1, -(2**70), 2**63, 2**70, np.int64(0)],
        [None, 1, 2, 2**63 - 1, np.int64(3), np.uint8(3)],
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_checked(name):
    wrong_types, wrong_values, right = SETTINGS[name]
    for error, values in ((TypeError, wrong_types), (ValueError, wrong_values)):
        for value in values:
            with pytest.raises(error, match=f"^{name}: expected .*, got "):
                SelfBalance(**{name: value})
    for value in right:
        balance = SelfBalance(**{name: value})
        assert type(getattr(balance, name)) in (float, int, type(None))
        balance.update(torch.tensor(0.9), torch.tensor(0.1))


def test_wrong_updates_are_named():
    balance, one = SelfBalance(period=5), torch.ones(())
    for name in ("cls", "loc"):
        for error, value in [
            (TypeError, 0.9),
            (TypeError, None),
            (TypeError, np.float32(1)),
            (TypeError, torch.tensor(1)),
            (TypeError, torch.tensor(True)),
            (TypeError, torch.tensor(1j)),
            (ValueError, torch.ones(1)),
            (ValueError, torch.ones(2, 3)),
            (ValueError, torch.ones(0)),
        ]:
            with pytest.raises(error, match=f"^{name}: expected .*, got "):
                balance.update(**{"cls": one, "loc": one, name: value})
    with pytest.raises(ValueError, match=r"^loc: expected on cpu like cls, got meta"):
        balance.update(one, one.to("meta"))
    for value in (None, "3", 1.5, True, torch.tensor(3)):
        with pytest.raises(TypeError, match=r"^num_positives: expected an integer, got "):
            balance.update(one, one, value)
    assert (balance.iterations, balance._calls) == (0, 0)
    assert (balance.sums == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balance.update(one, one, np.int64(0))
