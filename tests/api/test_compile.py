"""torch.compile, the registered operators, and importing where there is no triton."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from batches import IGNORE, batch_of, detector_batch, relative_error, to_batch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend

from alrp_triton import (
    ALRPLoss,
    SelfBalance,
    alrp_loss,
    ap_loss,
    error_driven_loss,
    ops,
    rank_sort_loss,
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def count_compilations():
    """Return a backend that counts how often it is asked to compile, and a list to read it from."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    return backend, compiled


@pytest.mark.parametrize("algorithm", ["pairwise", "breakpoints"])
@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_operators(delta, algorithm):
    logits, targets = detector_batch("spread", 60, 4, 9)
    batch = to_batch(logits, targets, delta)
    values = torch.rand(9, dtype=torch.float64)
    settings = IGNORE, "auto", "loc_errors"
    for size, exact in ((9, True), (60, False)):
        library.opcheck(
            ops.locate.default, (batch.logits, batch.targets, None, size, exact, *settings)
        )
    library.opcheck(ops.count.default, (*batch, values, "auto", algorithm))
    library.opcheck(ops.gradient.default, (*batch, values, values, "auto", algorithm))


@pytest.mark.parametrize("grouped", [False, True])
def test_operators_of_the_family(grouped):
    logits, targets = detector_batch("spread", 60, 4, 9)
    batch = to_batch(logits, targets)
    values = torch.rand(9, dtype=torch.float64)
    if grouped:
        batch = batch_of(batch.logits, batch.targets, 1.0, [torch.arange(60).reshape(60, 1) % 2])
    library.opcheck(ops.sorting_count.default, (*batch, values, values, "auto"))
    library.opcheck(ops.sorting_gradient.default, (*batch, values, values, "auto"))
    library.opcheck(ops.skewed_mass.default, (*batch, values, "auto"))
    library.opcheck(ops.skewed_gradient.default, (*batch, values, values, values, "auto"))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_rank_sort_in_groups_is_the_same(backend):
    logits, targets = detector_batch("mid", 200, 4, 12)
    quality, groups = torch.rand(12), torch.arange(200) % 3

    def loss(logits):
        return sum(rank_sort_loss(logits, targets, quality, groups=groups))

    results = []
    for function in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value, leaf.grad))
    assert relative_error(results[1][0], results[0][0]) < 1e-6
    assert torch.equal(results[1][1], results[0][1])


def test_fake_results_have_the_strides_of_real_ones():
    maps = torch.randn(2, 4, 30).transpose(1, 2).contiguous().transpose(1, 2)
    targets = torch.zeros(2, 30, dtype=torch.int64)
    weights = torch.ones(60, dtype=torch.float64)
    batch = batch_of([maps], [targets])
    library.opcheck(ops.gradient.default, (*batch, weights, weights, "auto", "auto"))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_alrp_is_the_same(backend):
    logits, targets = detector_batch("mid", 200, 4, 12)
    loc_errors = torch.rand(12)

    def run(function):
        leaves = logits.clone().requires_grad_(), loc_errors.clone().requires_grad_()
        cls, loc = function(leaves[0], targets, leaves[1])
        (cls + 2 * loc).backward()
        return cls.detach(), loc.detach(), leaves[0].grad, leaves[1].grad

    expected = run(alrp_loss)
    got = run(torch.compile(alrp_loss, fullgraph=True, backend=backend))
    assert torch.equal(got[2], expected[2])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_compiled_ap_without_positives_is_the_same():
    logits, targets = detector_batch("mid", 200, 4, 12)

    def run(function):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, targets)
        loss.backward()
        return loss.detach(), leaf.grad

    expected, got = run(ap_loss), run(torch.compile(ap_loss, fullgraph=True))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_compiled_error_driven_loss():
    logits, targets = detector_batch("mid", 200, 4, 12)
    logits.requires_grad_()

    def reciprocal_rank(counts):
        return 1 - 1 / counts.rank, 1 - 1 / counts.rank_positive, counts.num_positives

    def loss(logits, targets, values):
        return error_driven_loss(logits, targets, reciprocal_rank, values)

    compiled = torch.compile(loss, fullgraph=True)(logits, targets, torch.rand(12))
    compiled.backward()
    torch.testing.assert_close(compiled, loss(logits, targets, torch.rand(12)))


def test_compiled_module_with_levels_and_balance():
    criterion = ALRPLoss(balance=SelfBalance(period=2))
    logits, targets = detector_batch("mid", 200, 4, 12)
    levels, level_targets = list(logits.split([150, 50])), list(targets.split([150, 50]))
    target_boxes = torch.rand(12, 4).cumsum(1)
    pred_boxes = (target_boxes + 0.05).requires_grad_()
    compiled = torch.compile(criterion, fullgraph=True)
    weights = []
    for _ in range(4):
        out = compiled(levels, level_targets, pred_boxes, target_boxes)
        weights.append(float(out.weight.detach()))
        out.loss.backward()
    assert weights[0] == weights[1] == 50
    assert weights[2] == pytest.approx(float(((out.cls + out.loc) / out.loc).detach()), rel=1e-5)
    assert pred_boxes.grad.isfinite().all()


def test_padded_positives_never_recompile():
    backend, compiled = count_compilations()
    function = torch.compile(alrp_loss, fullgraph=True, backend=backend)
    for number in (0, 1, 5, 20):
        logits, targets = detector_batch("mid", 200, 4, number)
        positives = torch.full((20,), -1)
        positives[:number] = (targets >= 0).nonzero()[:, 0]
        function(logits, targets, torch.rand(20), positives=positives)
    assert len(compiled) == 1


def test_a_changing_number_of_positives_recompiles_no_more_than_once():
    """The first size is compiled, then any size (dynamic); 0 and 1 are special to the compiler."""
    backend, compiled = count_compilations()
    function = torch.compile(alrp_loss, fullgraph=True, backend=backend)
    for number in (7, 12, 3, 30, 19, 2):
        logits, targets = detector_batch("mid", 200, 4, number)
        function(logits, targets, torch.rand(number))
    assert len(compiled) <= 2


def test_a_changing_ignore_index_recompiles_no_more_than_once():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(ap_loss, fullgraph=True, backend=counter)
    logits, targets = detector_batch("mid", 200, 4, 12)
    logits.requires_grad_()
    for index in range(-40, -28):
        function(logits, targets, ignore_index=index).backward()
    assert counter.frame_count <= 2


def test_a_compiled_loss_has_no_forward_mode():
    """The compiler wraps the error in one of its own."""
    logits, targets = detector_batch("mid", 200, 4, 12)

    def tangent(logits):
        return torch.func.jvp(lambda x: ap_loss(x, targets), (logits,), (logits,))[1]

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(tangent, fullgraph=True, backend="aot_eager")(logits)


def test_compiled_loc_has_its_forward_mode():
    logits, targets = detector_batch("mid", 200, 4, 12)

    def tangent(loc_errors):
        loc = torch.func.jvp(
            lambda e: alrp_loss(logits, targets, e)[1], (loc_errors,), (loc_errors,)
        )
        return loc[1]

    given = torch.rand(12)
    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given), tangent(given))


@pytest.mark.parametrize("upstream", ["constant", "differentiable"])
def test_a_compiled_second_derivative_is_an_error(upstream):
    """The compiler raises it, which has no second derivative of anything."""
    logits, targets = detector_batch("mid", 60, 3, 12)
    logits.requires_grad_()
    loss = torch.compile(ap_loss, fullgraph=True, backend="aot_eager")(logits, targets)
    loss = loss if upstream == "constant" else loss.square()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), logits)


def run_fresh(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_runs_where_triton_is_blocked():
    out = run_fresh(
        """
        import sys
        sys.modules["triton"] = None  # importing it now raises ImportError
        import torch
        from alrp_triton import alrp_loss
        logits = torch.zeros(5, 2, requires_grad=True)
        cls, loc = alrp_loss(logits, torch.tensor([0, 1, -1, -1, -1]), torch.ones(2))
        (cls + loc).backward()
        print(cls.item() > 0, logits.grad.abs().sum().item() > 0)
        try:
            alrp_loss(logits, torch.tensor([0, 1, -1, -1, -1]), torch.ones(2), impl="triton")
        except (RuntimeError, ImportError) as error:
            print("triton" in str(error))
        """
    )
    assert out.split() == ["True"] * 3


def test_import_loads_neither_triton_nor_what_training_needs():
    out = run_fresh(
        """
        import sys
        import torch
        before = set(sys.modules)
        import alrp_triton
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(sorted(new & {"triton", "torchvision", "numpy", "matplotlib", "sklearn", "scipy"}))
        print("torch._dynamo" in set(sys.modules) - before)
        """
    )
    assert out.split() == ["[]", "False"]


def test_import_takes_little_more_than_torch():
    """No file but the package's own is read: what it imports, torch has imported already."""
    out = run_fresh(
        """
        import sys
        import torch
        before = set(sys.modules)
        import alrp_triton
        new = set(sys.modules) - before
        print(len([name for name in new if name.split(".")[0] == "alrp_triton"]))
        print(sorted(name for name in new if name.split(".")[0] != "alrp_triton"))
        """
    )
    own, others = out.splitlines()
    assert 0 < int(own) < 40
    assert others == "[]"
