"""The losses on the Triton kernels, from the public functions down: interpreted, or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from batches import IGNORE, detector_batch, relative_error, to_batch
from conftest import HAS_GPU
from torch import library

from alrp_triton import (
    ALRPLoss,
    SelfBalance,
    alrp_loss,
    ap_loss,
    backend,
    error_driven_loss,
    ops,
    rank_sort_loss,
    set_backend,
)
from alrp_triton.testing.launches import capture

pytest.importorskip("triton")
DEVICE = "cuda" if HAS_GPU else "cpu"

# float32 kernels against float64: the rounding of H and of sums of a few hundred terms.
BUDGET = 64 * torch.finfo(torch.float32).eps


def batch(dtype=torch.float32, num_positives=9):
    logits, targets = detector_batch("spread", 60, 4, num_positives)
    loc_errors = torch.rand(num_positives, generator=torch.Generator().manual_seed(0))
    return logits.to(DEVICE, dtype), targets.to(DEVICE), loc_errors.to(DEVICE)


def run(logits, targets, loc_errors, **settings):
    levels = logits if isinstance(logits, list) else [logits]
    leaves = [level.detach().clone().requires_grad_() for level in levels]
    loc_leaf = loc_errors.detach().clone().requires_grad_()
    given = leaves if isinstance(logits, list) else leaves[0]
    cls, loc = alrp_loss(given, targets, loc_leaf, **settings)
    (cls + 3 * loc).backward()
    return cls, loc, torch.cat([leaf.grad.flatten() for leaf in leaves]), loc_leaf.grad


@pytest.mark.parametrize("algorithm", ["pairwise", "breakpoints"])
@pytest.mark.parametrize("delta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loss_and_gradients_are_the_reference(dtype, delta, algorithm):
    logits, targets, loc_errors = batch(dtype)
    got = run(logits, targets, loc_errors, delta=delta, impl="triton", algorithm=algorithm)
    expected = run(logits.double(), targets, loc_errors, delta=delta, algorithm="pairwise")
    assert got[2].dtype == dtype
    for i in (0, 1, 3):
        assert relative_error(got[i], expected[i]) < BUDGET
    # The interpreter cuts off where the compiler rounds to bfloat16: a whole unit, not half.
    unit = torch.finfo(dtype).eps
    error = (got[2].double() - expected[2]).abs()
    assert (error <= unit * expected[2].abs() + BUDGET * expected[2].abs().max()).all()


@pytest.mark.parametrize(
    ("version", "chosen"),
    [
        ("3.2.0", "torch"),
        ("3.6.0", "triton"),
        ("3.10.1+git", "triton"),
        ("4.0.0", "triton"),
        ("?", "triton"),
    ],
)
def test_auto_leaves_an_old_triton_alone(version, chosen, monkeypatch):
    """It has never been compiled with; who asks for it by name may try."""
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    monkeypatch.setattr(backend, "_CHOOSES_TRITON", not backend._is_too_old("triton", (3, 6)))
    gpu = torch.device("cuda")
    assert backend.choose_impl("auto", gpu) == chosen
    assert backend.choose_impl("triton", gpu) == "triton"


def test_a_triton_of_unknown_version_is_new_enough():
    """Builds of it go by other names."""
    assert not backend._is_too_old("no-such-package", (3, 6))


def test_an_interpreter_that_mistakes_nan_is_refused(monkeypatch):
    """It would look for NaN among the edges, and crash."""
    monkeypatch.setattr("importlib.metadata.version", lambda package: "3.7.1")
    assert backend._is_too_old("triton", backend._OLDEST_INTERPRETER)
    monkeypatch.setattr(backend, "_INTERPRETS", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"expected Triton 3\.8 or later.*got 3\.7\.1"):
        backend.load_kernels("positives", torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend.load_kernels("positives", torch.device("cuda"))  # where it is compiled


def test_levels_and_padded_positives():
    logits, targets, loc_errors = batch()
    expected = run(logits, targets, loc_errors, impl="triton")
    positives = torch.full((16,), -1, device=DEVICE)
    padded = torch.full((16,), float("nan"), device=DEVICE)
    slots = torch.tensor([0, 2, 3, 4, 7, 8, 11, 14, 15], device=DEVICE)
    positives[slots] = (targets >= 0).nonzero()[:, 0]
    padded[slots] = loc_errors
    levels, level_targets = list(logits.split([40, 20])), list(targets.split([40, 20]))
    got = run(levels, level_targets, padded, positives=positives, impl="triton")
    assert relative_error(got[0], expected[0]) < BUDGET
    assert relative_error(got[1], expected[1]) < BUDGET
    assert (got[2] - expected[2]).abs().max() < BUDGET * expected[2].abs().max()
    assert relative_error(got[3][slots], expected[3]) < BUDGET


def own_errors(counts):
    return (counts.nfp + counts.value_sum) / counts.rank, 0.0, counts.num_positives


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, t, v, **k: alrp_loss(x, t, v, **k),
        lambda x, t, v, **k: rank_sort_loss(x, t, v, **k),
        lambda x, t, v, **k: (error_driven_loss(x, t, own_errors, v, **k),),
        lambda x, t, v, **k: (error_driven_loss(x, t, own_errors, v, skew=2.0, **k),),
    ],
    ids=["alrp", "rank_sort", "own", "skewed"],
)
def test_what_stands_in_padded_rows_is_never_seen(loss, garbage):
    logits, targets, values = batch()
    found, slots = (targets >= 0).nonzero()[:, 0], torch.tensor([0, 2, 3, 4, 7, 8, 9, 11, 12])
    slots = slots.to(DEVICE)
    positives = torch.full((14,), -1, device=DEVICE).index_put((slots,), found)
    padded = torch.full((14,), garbage, device=DEVICE).index_put((slots,), values)
    groups = torch.arange(60, device=DEVICE) % 2
    results = []
    for given, places in ((values, None), (padded, positives)):
        leaves = logits.clone().requires_grad_(), given.clone().requires_grad_()
        parts = loss(leaves[0], targets, leaves[1], positives=places, groups=groups, impl="triton")
        sum(parts).backward()
        results.append((*parts, leaves[0].grad))
    for right, got in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=BUDGET, atol=BUDGET)
    if leaves[1].grad is not None:
        assert (leaves[1].grad[positives < 0] == 0).all()


@pytest.mark.skipif(HAS_GPU, reason="a device is not asked for it")
def test_given_positives_are_all_and_each_once():
    logits, targets, _ = batch()
    found = (targets >= 0).nonzero()[:, 0]
    for wrong, message in ((found[:4], "all 9 positives"), (found[[0] * 9], "position once")):
        with pytest.raises(ValueError, match=f"^positives: expected .*{message}"):
            ap_loss(logits, targets, positives=wrong, impl="triton")


@pytest.mark.parametrize("algorithm", ["pairwise", "breakpoints"])
@pytest.mark.parametrize("groups", [None, torch.arange(6) // 2])
def test_nothing_to_rank_is_zero_and_attached(groups, algorithm):
    settings = {"groups": groups if groups is None else groups.to(DEVICE)}
    settings |= {"impl": "triton", "algorithm": algorithm}
    for num_positives, targets in ((0, torch.full((6,), -1)), (6, torch.zeros(6).long())):
        logits = torch.zeros(6, 1, device=DEVICE, requires_grad=True)
        loc_errors = torch.rand(num_positives, device=DEVICE, requires_grad=True)
        cls, loc = alrp_loss(logits, targets.to(DEVICE), loc_errors, **settings)
        assert cls.item() == 0
        (cls + loc).backward()
        assert (logits.grad == 0).all()
    assert ap_loss(logits, targets.to(DEVICE), **settings).item() == 0


def test_upstream_gradient_twice_and_stride_0():
    logits, targets, loc_errors = batch()
    logits.requires_grad_()
    cls, _ = alrp_loss(logits, targets, loc_errors, impl="triton")
    (once,) = torch.autograd.grad(cls, logits, retain_graph=True)
    (again,) = torch.autograd.grad(cls, logits, retain_graph=True)
    assert torch.equal(once, again)
    upstream = torch.tensor(2.0, device=DEVICE).expand(4, 5)
    (expanded,) = torch.autograd.grad(cls.expand(4, 5), logits, upstream)
    assert relative_error(expanded, 40 * once) < BUDGET


def test_loss_scale_in_float16():
    logits, targets, loc_errors = batch(torch.float16)
    logits.requires_grad_()
    cls, _ = alrp_loss(logits, targets, loc_errors, impl="triton")
    (scaled,) = torch.autograd.grad(cls / 1024 * 65536.0, logits)
    exact = run(logits.double(), targets, loc_errors, algorithm="pairwise")[2] * 64
    assert relative_error(scaled[scaled != 0], exact.view_as(scaled)[scaled != 0]) < 2e-3


def test_module_runs_boxes_and_ranking_on_triton():
    logits, targets, _ = batch()
    target_boxes = torch.rand(9, 4, device=DEVICE).cumsum(1)
    results = []
    for impl in ("torch", "triton"):
        leaves = logits.clone().requires_grad_(), (target_boxes + 0.1).requires_grad_()
        criterion = ALRPLoss(balance=SelfBalance(), impl=impl).to(DEVICE)
        criterion(leaves[0], targets, leaves[1], target_boxes).loss.backward()
        results.append([leaf.grad for leaf in leaves])
    for torch_gradient, triton_gradient in zip(*results, strict=True):
        error = (torch_gradient - triton_gradient).abs().max()
        assert error < BUDGET * torch_gradient.abs().max()


def test_operators_and_compilation():
    logits, targets, loc_errors = batch()
    given = to_batch(logits, targets)
    values = loc_errors.double()
    settings = IGNORE, "triton", "loc_errors"
    for size, exact in ((9, True), (12, False)):
        library.opcheck(
            ops.locate.default, (given.logits, given.targets, None, size, exact, *settings)
        )
    library.opcheck(ops.count.default, (*given, values, "triton", "auto"))
    library.opcheck(ops.gradient.default, (*given, values, values, "triton", "auto"))

    def loss(logits, targets, loc_errors):
        cls, loc = alrp_loss(logits, targets, loc_errors, impl="triton")
        return cls + 3 * loc

    leaf = logits.clone().requires_grad_()
    torch.compile(loss, fullgraph=True)(leaf, targets, loc_errors).backward()
    expected = run(logits, targets, loc_errors, impl="triton")[2]
    assert torch.equal(leaf.grad.flatten(), expected)


def test_what_is_asked_for_by_name_runs_or_raises():
    logits, targets, loc_errors = batch()
    expected = ap_loss(logits, targets, impl="triton")
    try:
        set_backend(impl="triton")
        assert torch.equal(ap_loss(logits, targets), expected)
        assert backend.select("torch", "auto", [logits], loc_errors) is backend.breakpoints
        kernels = backend.select("auto", "breakpoints", [logits], loc_errors)
        assert kernels.__name__ == "alrp_triton.kernels.breakpoints"
    finally:
        set_backend()
    code = (
        "import torch, alrp_triton as a; x = torch.zeros(3, 1)\n"
        "try: a.ap_loss(x, torch.tensor([0, -1, -1]), impl='triton')\n"
        "except RuntimeError as error: print('TRITON_INTERPRET=1' in str(error))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "True"


@pytest.mark.gpu
def test_auto_chooses_triton_and_never_waits():
    """On a GPU, forward and backward as a whole run without one synchronisation."""
    logits, targets, loc_errors = batch()
    kernels = backend.select("auto", "auto", [logits], loc_errors)
    assert kernels.__name__.startswith("alrp_triton.kernels.")
    run(logits, targets, loc_errors)  # compiles
    leaf, loc_leaf = logits.clone().requires_grad_(), loc_errors.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cls, loc = alrp_loss(leaf, targets, loc_leaf)
        (cls + loc).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert leaf.grad.abs().sum() > 0


@pytest.mark.gpu
def test_cuda_graph_of_forward_and_backward():
    logits, targets, loc_errors = batch()
    positives = (targets >= 0).nonzero()[:, 0]
    leaf = logits.clone().requires_grad_()

    def step():
        leaf.grad = None
        cls, loc = alrp_loss(leaf, targets, loc_errors, positives=positives)
        (cls + loc).backward()

    replay = capture(step)
    with torch.no_grad():
        leaf.copy_(logits.flip(0))
    replay()
    captured = leaf.grad.clone()
    step()
    assert torch.equal(captured, leaf.grad)


@pytest.mark.gpu
def test_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    logits, targets, loc_errors = (x.to("cuda:1") for x in batch())
    got = run(logits, targets, loc_errors)
    expected = run(*(x.cpu() for x in (logits.double(), targets, loc_errors)))
    assert relative_error(got[0].cpu(), expected[0]) < BUDGET
