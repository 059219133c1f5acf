"""Sorting the positives: the specification against plain loops, the kernels against it.

The kernels run in the interpreter, or on a GPU if there is one; budgets are derived, see
`alrp_triton.testing.rank_sort_tolerance`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

from alrp_triton import ops, rank_sort_loss
from alrp_triton.reference import pairwise
from alrp_triton.reference import rank_sort as sorting
from alrp_triton.reference.layout import LARGEST, Batch
from alrp_triton.testing import kernel_tolerance as budgets
from alrp_triton.testing.kernel_tolerance import IGNORE, Case
from alrp_triton.testing.launches import same
from alrp_triton.testing.loss_tolerance import LossResult
from alrp_triton.testing.rank_sort_tolerance import (
    rank_sort_budget,
    sorting_count_budget,
    sorting_gradient_budget,
)

pytest.importorskip("triton")
kernels = importlib.import_module("alrp_triton.kernels.rank_sort")
tiles_module = importlib.import_module("alrp_triton.kernels.tuning.block_sizes")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DELTAS = (0.0, 1e-3, 0.5, 1.0)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Make torch.empty give NaN: whatever a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def plain_step(x: float, delta: float) -> float:
    if delta == 0:
        return float(x >= 0)
    return min(1.0, max(0.0, x / (2 * delta) + 0.5))


Positive = st.tuples(
    st.integers(-6, 6), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(-1, 1), st.integers(0, 2)
)


@settings(max_examples=300, deadline=None)
@given(st.lists(Positive, max_size=12), st.sampled_from(DELTAS), st.booleans(), st.data())
def test_the_specification_says_what_plain_loops_say(positives, delta, grouped, data):
    """Scores on a grid of delta / 2 meet ties and x = +-delta; Python floats are the truth."""
    unit = delta / 2 if delta else 1.0
    s, q, v, g = ([p[field] for p in positives] for field in range(4))
    s = [unit * x for x in s]
    groups = torch.tensor(g, dtype=torch.int64) if grouped else None
    scores, quality, values = (torch.tensor(x, dtype=torch.float64) for x in (s, q, v))
    batch = positives_alone(scores, delta, groups)
    got = sorting.count(batch, quality, values)
    passed = sorting.gradient(batch, quality, values)

    def h(k: int, i: int) -> float:
        return plain_step(s[k] - s[i], delta) if not grouped or g[k] == g[i] else 0.0

    for i in range(len(s)):
        others = [k for k in range(len(s)) if k != i]
        lower = [k for k in others if q[k] < q[i]]
        rest = [k for k in others if q[k] >= q[i]]
        higher = [k for k in others if q[k] > q[i]]
        assert abs(float(got[0][i]) - math.fsum(h(k, i) for k in lower)) < 1e-12
        assert abs(float(got[1][i]) - math.fsum(h(k, i) for k in rest)) < 1e-12
        assert abs(float(got[2][i]) - math.fsum(h(k, i) * v[k] for k in rest)) < 1e-12
        assert abs(float(passed[i]) - math.fsum(v[k] * h(i, k) for k in higher)) < 1e-12


def positives_alone(scores: Tensor, delta: float, groups: Tensor | None) -> Batch:
    """Return a batch of which nothing but the positives is looked at."""
    index = torch.arange(scores.numel(), device=scores.device)
    return Batch([], [], index, scores, delta, IGNORE, [], groups)


class Call(NamedTuple):
    """What count and gradient take."""

    scores: Tensor  # (P,), -inf for padding
    quality: Tensor  # (P,) float64; so are the next two
    values: Tensor
    weights: Tensor
    groups: Tensor | None  # (P,)
    delta: float

    def count(self, module: ModuleType = kernels) -> Tensor:
        """Count by the kernels: (3, P)."""
        return torch.stack(module.count(self.batch(), self.quality, self.values))

    def gradient(self, module: ModuleType = kernels) -> Tensor:
        """Take the gradient by the kernels: (P,)."""
        return module.gradient(self.batch(), self.quality, self.weights)

    def batch(self) -> Batch:
        """Return the batch of the positives."""
        return positives_alone(self.scores, self.delta, self.groups)

    def of(self, places: Tensor) -> Call:
        """Return the call on some of the positives."""
        return self._replace(**{name: x[places] for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the call by their names."""
        return {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}

    def case(self) -> Case:
        """Return the case as the budgets have it."""
        index = torch.arange(self.scores.numel(), device=self.scores.device)
        return Case(
            [], [], index, self.scores, self.values, self.weights, -self.weights, self.delta
        )


def draw(
    positives: int,
    delta: float,
    dtype: torch.dtype = torch.float32,
    ties: bool = False,
    padding: int = 0,
    grouped: bool = False,
) -> Call:
    """Draw scores within a few delta of each other; padding anywhere, with NaN as its quality."""
    unit = delta or 1.0
    scores = torch.randn(positives, dtype=torch.float64) * 2 * unit
    quality, values, weights = torch.rand(3, positives, dtype=torch.float64)
    if ties:
        scores = (scores / unit * 2).round() / 2 * unit
        quality = (quality * 4).round() / 4
    groups = torch.randint(-1, 2, (positives,)) * 2**40 if grouped else None
    call = Call(scores.to(dtype), quality, values, weights, groups, delta)
    full = positives + padding
    place = torch.randperm(full)[:positives].sort().values
    fillings = {"scores": -torch.inf, "groups": 0}
    padded = {
        name: x.new_full((full,), fillings.get(name, torch.nan)).index_copy_(0, place, x)
        for name, x in call.tensors().items()
    }
    return call._replace(**{name: x.to(DEVICE) for name, x in padded.items()})


def check(call: Call) -> None:
    """Check against the float64 reference; padding gets 0, and no input is written to."""
    before = {name: x.clone() for name, x in call.tensors().items()}
    counts, passed = call.count(), call.gradient()
    assert all(
        torch.equal(x.nan_to_num(7), before[n].nan_to_num(7)) for n, x in call.tensors().items()
    )
    valid = call.scores != -torch.inf
    alone = call.of(valid)
    wide = alone._replace(scores=alone.scores.double())
    exact, exact_passed = wide.count(sorting), wide.gradient(sorting)
    case = alone.case()
    error = (counts[:, valid] - exact).abs()
    assert (error <= sorting_count_budget(case, exact)).all()
    error = (passed[valid] - exact_passed).abs()
    assert (error <= sorting_gradient_budget(case, exact_passed)).all()
    assert (counts[:, ~valid] == 0).all()
    assert (passed[~valid] == 0).all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_are_the_specification(dtype: torch.dtype, delta: float, ties: bool) -> None:
    """Sizes are below a program's, a tile of others to the last, one more, and a ragged one."""
    for positives in (1, 3, kernels._LANES, kernels._LANES + 1, 150):
        check(draw(positives, delta, dtype, ties))


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("padding", [1, 130])
def test_padding_and_groups(padding: int, grouped: bool, delta: float) -> None:
    """Nothing of padding counts, neither its NaN quality nor its group; wherever it stands."""
    for positives in (0, 1, 90):
        check(draw(positives, delta, ties=True, padding=padding, grouped=grouped))


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_groups_are_sorted_apart(delta: float) -> None:
    call = draw(100, delta, grouped=True)
    assert call.groups is not None
    counts, passed = call.count(), call.gradient()
    for group in call.groups.unique():
        here = call.groups == group
        alone = call.of(here)._replace(groups=None)
        torch.testing.assert_close(counts[:, here], alone.count(), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(passed[here], alone.gradient(), rtol=1e-14, atol=1e-14)


def test_nobody_to_sort() -> None:
    call = draw(0, 0.5)
    assert call.count().shape == (3, 0)
    assert call.gradient().shape == (0,)


@pytest.mark.parametrize("delta", DELTAS)
def test_scores_as_far_apart_as_they_can_be(delta: float) -> None:
    call = draw(70, delta)
    call.scores[::3], call.scores[1::9] = LARGEST, -LARGEST
    check(call)


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("which", ["scores", "quality"])
def test_a_nan_leaves_no_count_standing(which: str, grouped: bool, delta: float) -> None:
    call = draw(70, delta, padding=5, grouped=grouped)
    valid = call.scores != -torch.inf
    getattr(call, which)[valid.nonzero()[3]] = torch.nan
    counts = call.count()
    assert counts[:, valid].isnan().all()
    assert (counts[:, ~valid] == 0).all()
    expected = call.of(valid).gradient(sorting)
    passed = call.gradient()[valid]
    assert torch.equal(passed.isnan(), expected.isnan())
    torch.testing.assert_close(passed, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_nan_weight_shows() -> None:
    call = draw(70, 0.5)
    call.weights[5] = torch.nan
    assert call.gradient().isnan().all()


def test_strided_vectors() -> None:
    call = draw(140, 0.5, grouped=True)
    every_second = call.of(torch.arange(0, 140, 2, device=DEVICE))
    strided = call._replace(**{name: x[::2] for name, x in call.tensors().items()})
    assert same(
        [strided.count(), strided.gradient()], [every_second.count(), every_second.gradient()]
    )


@pytest.mark.parametrize("number", [2, 16])
def test_the_same_bits_again_and_in_other_programs(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = draw(70, 0.5, padding=20)
    first = call.count(), call.gradient()
    assert same(first, (call.count(), call.gradient()))
    monkeypatch.setattr(kernels, "_NUMBER", number)
    assert same(first, (call.count(), call.gradient()))


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operator makes."""

    entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run the operator and note the largest storage among its results."""
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [
            x.untyped_storage().nbytes() // x.element_size() for x in made if torch.is_tensor(x)
        ]
        self.entries = max([self.entries, *sizes])
        return result


@pytest.mark.parametrize("module", [sorting, kernels], ids=["torch", "triton"])
def test_nothing_of_every_pair_exists(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch holds a chunk of the pairs, Triton a few numbers for each positive."""
    positives, chunk = 300, 3000
    monkeypatch.setattr(pairwise, "PAIRS", chunk)
    call = draw(positives, 0.5, grouped=True)
    with Largest() as largest:
        call.count(module)
        call.gradient(module)
    assert positives <= largest.entries <= max(chunk, 8 * positives) < positives**2 / 10


def test_operators() -> None:
    call = draw(20, 0.5, padding=3)
    quality, values, weights = (x.nan_to_num(0) for x in (call.quality, call.values, call.weights))
    for groups in (None, torch.zeros(23, dtype=torch.int64, device=DEVICE)):
        batch = call._replace(groups=groups).batch()
        library.opcheck(ops.sorting_count.default, (*batch, quality, values, "triton"))
        library.opcheck(ops.sorting_gradient.default, (*batch, quality, weights, "triton"))


def evaluate(case: Case, quality: Tensor, dtype: torch.dtype, **settings: Any) -> LossResult:
    """Return both values of Rank & Sort, and the gradient of their sum."""
    leaves = [level.to(dtype).detach().requires_grad_() for level in case.logits]
    values = rank_sort_loss(leaves, case.targets, quality, case.delta, **settings)
    sum(values).backward()
    gradients = [budgets.gradient_of(leaf) for leaf in leaves]
    return LossResult(torch.stack(values).detach().double(), gradients, quality.new_empty(0))


@pytest.mark.parametrize("algorithm", ["pairwise", "breakpoints"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("delta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rank_sort_loss(dtype: torch.dtype, delta: float, impl: str, algorithm: str) -> None:
    """On two levels it is held to every pair in float64."""
    logits = [(2 * torch.randn(n, 4, 1)).to(DEVICE, dtype) for n in (30, 12)]
    targets = [torch.randint(-1, 5, (len(level), 1), device=DEVICE) for level in logits]
    targets[0][12:] = -1
    case = budgets.find(logits, targets, delta)
    quality = torch.rand(case.scores.numel(), dtype=torch.float64, device=DEVICE)
    case = case._replace(values=1 - quality)
    truth = evaluate(case, quality, torch.float64, impl="torch", algorithm="pairwise")
    got = evaluate(case, quality, dtype, impl=impl, algorithm=algorithm)
    tiles = tiles_module.default_tiles()
    if algorithm == "breakpoints":
        tiles = tiles_module.default_breakpoint_tiles(32, dtype)
    budget = rank_sort_budget(case, quality, tiles, truth)
    assert ((got.values - truth.values).abs() <= budget.values).all()
    for gradient, exact, most in zip(got.by_logits, truth.by_logits, budget.by_logits, strict=True):
        assert exact.abs().sum() > 0
        assert ((gradient.double() - exact).abs() <= most).all()


@pytest.mark.gpu
def test_sorting_never_waits() -> None:
    call = draw(500, 0.5)
    call.count(), call.gradient()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.count(), call.gradient()
    finally:
        torch.cuda.set_sync_debug_mode("default")
