"""The skewed error distribution in Triton, against `reference.skewed` in float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from batches import halved
from torch import Tensor

from alrp_triton import error_driven_loss
from alrp_triton.loss_terms import ap_errors
from alrp_triton.reference import layout, pairwise, skewed
from alrp_triton.testing.cases import Size, edge_cases
from alrp_triton.testing.kernel_tolerance import (
    IGNORE,
    Case,
    Rounding,
    pair_error,
    reach_of,
    rounding_of,
    torch_error,
)
from alrp_triton.testing.kernel_tolerance import group as in_groups
from alrp_triton.testing.launches import same
from tests.kernels.test_kernels_delta import DELTAS, DTYPES
from tests.kernels.test_kernels_delta import draw as draw_around

pytest.importorskip("triton")
kernels = importlib.import_module("alrp_triton.kernels.skewed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = edge_cases(Size(48, 3, 9), torch.device(DEVICE))
_EXACT = Rounding(step=0.0, count_terms=0, gradient_terms=0)


@pytest.fixture(autouse=True)
def small_tiles_and_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make tiles small, so that there are several; make whatever a kernel does not write NaN."""
    monkeypatch.setattr(kernels, "_LANES", 32)
    monkeypatch.setattr(kernels, "_PROGRAMS", 12)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


class Call(NamedTuple):
    """A case with powers."""

    case: Case
    powers: Tensor

    @property
    def mass_input(self) -> tuple:
        """The arguments of `mass`."""
        return self.case.batch, self.powers

    @property
    def gradient_input(self) -> tuple:
        """The arguments of `gradient`."""
        return (*self.case.gradient_input, self.powers)

    def truth(self, on_slope: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Return mass (P,) and the gradients in float64; H = 1 on every slope and 0 elsewhere."""
        case = self.case.to(torch.float64)
        valid = case.scores != -torch.inf
        batch = case.batch.select(valid)
        mass = torch.zeros_like(self.powers)
        weights, positive_grad, powers = (
            x[valid] for x in (case.weights, case.positive_grad, self.powers)
        )
        step = pairwise.step
        if on_slope:
            reach = reach_of(case)
            skewed.step = lambda x, delta: (x.abs() <= reach).to(x.dtype)
            weights, positive_grad = weights.abs(), 0 * positive_grad
        try:
            mass[valid] = skewed.mass(batch, powers)
            gradients = skewed.gradient(batch, weights, positive_grad, powers)
        finally:
            skewed.step = step
        return mass, gradients


def draw(name: str, grouped: bool = False) -> Call:
    """Draw a case with powers of 0, a half, 1, 2 and 4, and sums that a float32 holds."""
    call = _with_powers(CASES[name]())
    if not grouped:
        return call
    targets = call.case.targets
    groups = [torch.randint(-1, 2, x.shape, device=DEVICE) * 2**40 for x in targets]
    return call._replace(case=in_groups(call.case, groups))


def _with_powers(case: Case) -> Call:
    powers = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64, device=DEVICE)
    powers = powers.repeat(case.scores.numel())[: case.scores.numel()].contiguous()
    return Call(case, powers)


@pytest.mark.parametrize(
    ("name", "grouped"), halved([name for name in CASES if "inf" not in name], [False, True])
)
def test_mass_and_gradient_are_within_what_they_round(name: str, grouped: bool) -> None:
    check(draw(name, grouped))


@pytest.mark.parametrize(("delta", "dtype"), halved(DELTAS, DTYPES))
def test_every_delta_with_scores_of_every_magnitude(delta: float, dtype: torch.dtype) -> None:
    """The weights are D(i) / (Z mass(i)), or a float could not hold what they are multiplied by."""
    call = _with_powers(draw_around(delta, dtype))
    mass, _ = call.truth()
    weights = torch.where(mass > 0, call.case.weights / mass, 0.0)
    check(call._replace(case=call.case._replace(weights=weights)))


def check(call: Call) -> None:
    """Check with H rounded once or twice in the dtype of the scores; all else is float64."""
    case, (mass, gradients) = call.case, call.truth()
    error = pair_error(case, _EXACT, torch_error(case, case.negatives()))
    of_mass, of_gradients = call.truth(on_slope=True)
    got = kernels.mass(*call.mass_input)
    assert ((got - mass).abs() <= error * of_mass + 1e-13 * mass).all()
    levels = kernels.gradient(*call.gradient_input)
    for out, exact, slope, level in zip(levels, gradients, of_gradients, case.logits, strict=True):
        assert (out.dtype, out.shape) == (level.dtype, level.shape)
        spread = error * slope + 1e-13 * exact.abs()
        budget = spread + rounding_of(level, exact, spread)
        assert ((out.double() - exact).abs() <= budget).all()


def test_power_0_is_the_uniform_distribution() -> None:
    """mass is NFP and the gradient that of `pairwise`, in float64 where nothing is rounded."""
    call = draw("the same, float64")
    call = call._replace(powers=torch.zeros_like(call.powers))
    nfp = call.case.expected_count()[0]
    assert (kernels.mass(*call.mass_input) - nfp).abs().max() < 1e-12 * nfp.max()
    pairs = zip(kernels.gradient(*call.gradient_input), call.case.expected_gradient(), strict=True)
    for got, expected in pairs:
        assert ((got - expected).abs() <= 1e-12 * expected.abs()).all()


@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinite_logits_and_ties(delta: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([math.inf, 1.0, 1.0, -math.inf, 0.5, 1.0, math.inf], dtype=dtype)
    targets = torch.tensor([0, 1, 0, 1, -1, 0, 1])
    results = []
    for impl in ("triton", "torch"):
        leaf = logits.clone().to(DEVICE).requires_grad_()
        loss = error_driven_loss(
            leaf, targets.to(DEVICE), ap_errors, delta=delta, skew=2.0, impl=impl
        )
        loss.backward()
        assert leaf.grad.isfinite().all()
        results.append((loss.detach(), leaf.grad.double()))
    (loss, gradient), (expected, exact) = results
    assert abs(loss - expected) <= 1e-6
    assert (gradient - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("skew", [0.5, 3.0])
@pytest.mark.parametrize(
    "distribution", ["-inf and +inf", "levels, awkward strides, class indices"]
)
def test_loss_is_balanced(distribution: str, skew: float) -> None:
    """Theorem 2: what rounding leaves of the sum is that of float32 entries."""
    case = CASES[distribution]()
    leaves = [level.double().requires_grad_() for level in case.logits]
    loss = error_driven_loss(leaves, case.targets, ap_errors, skew=skew, impl="triton")
    loss.backward()
    total = sum(leaf.grad.sum() for leaf in leaves)
    assert sum(leaf.grad.abs().sum() for leaf in leaves) > 0.1
    assert abs(total) < 1e-12


@pytest.mark.parametrize("where", ["negative", "negative of another group", "positive"])
def test_nan_leaves_no_number_standing(where: str) -> None:
    call = draw("levels, awkward strides, class indices", grouped=True)
    case = call.case
    if where == "positive":
        case.scores[3] = math.nan
    else:
        level = case.logits[0]
        mask = torch.ones_like(level, dtype=torch.bool)
        layout.exclude_non_negatives(mask, case.targets[0], IGNORE)
        if where.endswith("group"):
            case.groups[0].fill_(7)  # which no positive of the level is left in
        at = tuple(mask.nonzero()[0])
        level[at] = math.nan
        assert kernels.gradient(*call.gradient_input)[0][at].isnan()
    mass = kernels.mass(*call.mass_input)
    expected, _ = call.truth()
    assert torch.equal(mass.isnan(), expected.isnan())
    assert mass.isnan().any()


def test_a_weight_that_is_not_finite_reaches_every_negative() -> None:
    call = draw("levels, awkward strides, class indices", grouped=True)
    call.case.weights[2] = math.nan
    _, expected = call.truth()
    for got, truth in zip(kernels.gradient(*call.gradient_input), expected, strict=True):
        assert torch.equal(got.isnan(), truth.isnan())


def test_the_same_bits_from_run_to_run() -> None:
    call = draw("levels, awkward strides, class indices", grouped=True)
    results = [
        [kernels.mass(*call.mass_input), *kernels.gradient(*call.gradient_input)] for _ in range(2)
    ]
    assert same(*results)
