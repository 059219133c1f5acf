"""The kernels against the specification: in the interpreter, or on a GPU if there is one.

Every test holds for both algorithms; every tolerance is derived, see
`alrp_triton.testing.kernel_tolerance`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from batches import halved
from torch import Tensor

from alrp_triton.reference import layout
from alrp_triton.reference.layout import Batch
from alrp_triton.testing import kernel_tolerance as budgets
from alrp_triton.testing.kernel_tolerance import (
    IGNORE,
    count_budget,
    epsilon,
    gradient_budget,
    rounding_of_tiles,
)
from alrp_triton.testing.launches import OnGrid, compiled_variants, same

pytest.importorskip("triton")
pairwise = importlib.import_module("alrp_triton.kernels.pairwise")
breakpoints = importlib.import_module("alrp_triton.kernels.breakpoints.ranks")
intervals = importlib.import_module("alrp_triton.kernels.breakpoints.histogram")
scan = importlib.import_module("alrp_triton.kernels.breakpoints.scan")
tiles_module = importlib.import_module("alrp_triton.kernels.tuning.block_sizes")
Tiles, BreakpointTiles = tiles_module.Tiles, tiles_module.BreakpointTiles

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


class Algorithm(NamedTuple):
    """What is tested."""

    kernels: ModuleType
    # A tile of 8 logits, and 8 positives at a time: a few dozen numbers make several of everything.
    small: Tiles | BreakpointTiles
    counting: ModuleType  # where the kernel is that counts


ALGORITHMS = {
    "pairwise": Algorithm(
        pairwise,
        Tiles(
            lanes=4, few=2, count_block=8, count_rows=2, count_fold=2, count_programs=6,
            gradient_block=8, gradient_rows=2, gradient_fold=2,
        ),
        pairwise,
    ),
    "breakpoints": Algorithm(
        breakpoints,
        BreakpointTiles(4, count_rows=2, gradient_rows=2, programs=3, block=8, patterns=1 << 14),
        intervals,
    ),
}  # fmt: skip
this = ALGORITHMS["pairwise"]


@pytest.fixture(params=ALGORITHMS, autouse=True)
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Algorithm:
    """Run each test with each algorithm; `this` is the one at hand."""
    monkeypatch.setitem(globals(), "this", ALGORITHMS[request.param])
    if not HAS_GPU:  # few points make several stretches
        monkeypatch.setattr(scan, "_STRETCH", 8)
        monkeypatch.setattr(scan, "_BEFORE", 4)
    return this


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Make torch.empty give NaN: whatever a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


class Case(budgets.Case):
    """With the results of the kernels."""

    def count(self, *tiles: Any) -> tuple[Tensor, ...]:
        """Count by the kernels; with small tiles unless told otherwise, None for the device's."""
        return this.kernels.count(*self.count_input, *(tiles or (this.small,)))

    def gradient(self, *tiles: Any) -> list[Tensor]:
        """Take the gradient by the kernels; the tiles are chosen likewise."""
        return this.kernels.gradient(*self.gradient_input, *(tiles or (this.small,)))


def make(
    logits: Tensor | list[Tensor],
    targets: Tensor | list[Tensor],
    delta: float,
    padding: int = 0,
    groups: Tensor | list[Tensor] | None = None,
) -> Case:
    """Make a case on the device, with drawn numbers for each positive."""
    levels, level_targets, level_groups = (
        [
            budgets.to_device(x, torch.device(DEVICE))
            for x in ([part] if isinstance(part, Tensor) else part or [])
        ]
        for part in (logits, targets, groups)
    )
    case = budgets.find(levels, level_targets, delta, padding)
    return Case(*(budgets.group(case, level_groups) if level_groups else case))


def class_indices(
    batch: int, classes: int, places: int, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Draw a third background (two spellings), a tenth ignored, the rest positive for a class."""
    targets = torch.randint(-1, classes + 1, (batch, places))
    targets[torch.rand(batch, places) < 0.3] = -1
    targets[torch.rand(batch, places) < 0.1] = IGNORE
    return targets.to(dtype)


def per_logit(batch: int, classes: int, places: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Draw a quarter positive; a quarter ignored where the dtype can say so."""
    targets = torch.randint(0, 4, (batch, classes, places))
    if dtype in (torch.bool, torch.uint8):
        return (targets == 1).to(dtype)
    return torch.where(targets == 3, -1, (targets == 1).long()).to(dtype)


def check(case: Case, tiles: Tiles | BreakpointTiles | None = None) -> None:
    """Check that count and gradient are within budget of float64, and no input is written to."""
    tiles = tiles or this.small
    before = [tensor.clone() for tensor in case.tensors]
    counts, gradients = torch.stack(case.count(tiles)), case.gradient(tiles)
    assert all(torch.equal(*pair) for pair in zip(case.tensors, before, strict=True))
    assert all(tensor._version == 0 or not tensor.requires_grad for tensor in case.tensors)

    exact = case.expected_count(torch.float64)
    budget = count_budget(case, tiles, exact)
    assert (counts - exact).abs().le(budget).all(), ((counts - exact).abs() - budget).max()
    truth = case.expected_gradient(torch.float64)
    allowances = gradient_budget(case, tiles, truth)
    for out, level, expected, allowed in zip(
        gradients, case.logits, truth, allowances, strict=True
    ):
        assert out.dtype == level.dtype
        assert out.shape == level.shape
        error = (out.double() - expected).abs()
        assert error.le(allowed).all(), (error - allowed).max()


# --- parity -------------------------------------------------------------------------------------

# 75 logits, about 20 positives: several tiles, blocks and folds, none of them full.
BATCH, CLASSES, PLACES = 5, 3, 5
FORMS = [class_indices, per_logit]


@pytest.mark.parametrize(
    ("dtype", "form", "delta"),
    halved(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64],
        FORMS,
        [0.0, 1e-3, 0.25, 1.0],
    ),
)
def test_every_dtype_and_step(dtype: torch.dtype, form: Callable, delta: float) -> None:
    logits = 2 * torch.randn(BATCH, CLASSES, PLACES)
    check(make(logits.to(dtype), form(BATCH, CLASSES, PLACES), delta))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(class_indices, dtype) for dtype in (torch.int32, torch.int16, torch.int8)]
    + [
        (per_logit, dtype)
        for dtype in (
            *(torch.int32, torch.int8, torch.uint8, torch.bool),
            *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
        )
    ],
)
def test_every_dtype_of_targets(form: Callable, dtype: torch.dtype) -> None:
    targets = form(BATCH, CLASSES, PLACES, dtype)
    check(make(torch.randn(BATCH, CLASSES, PLACES), targets, 1.0))


def _cut(shape: tuple[int, ...], *cut: slice) -> Tensor:
    return torch.randn(shape)[cut]


# What heads and their callers hand over: each is another order of memory or axis of length 1.
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "anchors (N, C)": lambda: torch.randn(29, 3)[:, :, None],
    "one class (N, 1)": lambda: torch.randn(83, 1)[:, :, None],
    "many classes (N, 91)": lambda: torch.randn(2, 91)[:, :, None],
    "head (B A, C, H W)": lambda: torch.randn(2, 2 * 3, 7).view(4, 3, 7),
    "one long row (1, 1, M)": lambda: torch.randn(1, 1, 87),
    "one image (1, C, M)": lambda: torch.randn(1, 4, 20),
    "channels last": lambda: torch.randn(2, 13, 3).transpose(1, 2),
    "batch fastest": lambda: torch.randn(3, 29).t()[:, :, None],
    "every other place of some classes": lambda: _cut(
        (3, 6, 19), slice(1, 3), slice(1, 5), slice(1, None, 2)
    ),
    "expanded": lambda: torch.randn(1, 3, 9).expand(4, 3, 9),
}


@pytest.mark.parametrize(("name", "form"), halved(LAYOUTS, FORMS))
def test_every_layout(name: str, form: Callable) -> None:
    logits = LAYOUTS[name]()
    check(make(logits, form(*logits.shape), 1.0))


def test_targets_with_strides_of_their_own() -> None:
    logits = torch.randn(4, 3, 6)
    check(make(logits, class_indices(6, 3, 4).t(), 1.0))
    check(make(logits, per_logit(3, 4, 12)[:, :, ::2].transpose(0, 1), 1.0))


def test_levels_of_different_shapes() -> None:
    # Pyramid levels down to one place, and one that is empty.
    shapes = [(2, 3, 13), (2, 3, 4), (2, 3, 0), (2, 3, 1)]
    for form in FORMS:
        logits = [torch.randn(shape) for shape in shapes]
        check(make(logits, [form(*shape) for shape in shapes], 1.0, padding=3))


# A block has 8 positives, or `few` = 2: none, one, exactly few, one more, a full block, one more.
@pytest.mark.parametrize("positives", [0, 1, 2, 3, 8, 9, 20])
@pytest.mark.parametrize("padding", [0, 13])
def test_every_number_of_positives(positives: int, padding: int) -> None:
    targets = torch.full((40, 1), -1)
    targets[torch.randperm(40)[:positives]] = 1
    check(make(torch.randn(40, 2)[:, :, None], targets, 0.5, padding=padding))


def test_default_tiles() -> None:
    # 130 positives: a full block of the default size and one of a few; 260 logits: three tiles.
    targets = torch.randint(0, 2, (130, 1))
    logits = 2 * torch.randn(130, 2, 1)
    case = make(logits, targets, 1.0)
    check(case, this.kernels.choose_tiles(case.batch))


def test_ways_to_evaluate_a_block() -> None:
    # Block by block: small scores, large ones that take the exact way, both, and a few at the end.
    scores = torch.cat([torch.randn(8), 100 + torch.randn(8), torch.randn(8), 30 + torch.randn(2)])
    scores[20] = 50.0
    logits = torch.stack([scores, scores + torch.randn(26) / 2], dim=1)[:, :, None]
    for delta in (0.0, 0.25, 1.0):
        check(make(logits, torch.zeros(26, 1, dtype=torch.int64), delta))


def test_short_way_up_to_its_range() -> None:
    # |s| scale up to FAST_RANGE, where 1/2 - s scale is rounded most.
    scores = torch.linspace(-8, 8, 24) * (1 - 2**-20)
    logits = torch.stack([scores, scores + 1.3 * torch.rand(24) - 0.6], dim=1)[:, :, None]
    check(make(logits, torch.zeros(24, 1, dtype=torch.int64), 1.0))


def test_small_delta_is_as_good_as_torch() -> None:
    # s scale is in the thousands: s_j scale + (1/2 - s_i scale) would be wrong in the fourth digit.
    scores = 5 + torch.rand(20) * 1e-3
    logits = torch.stack([scores, scores + (torch.rand(20) - 0.5) * 2e-3], dim=1)[:, :, None]
    case = make(logits, torch.zeros(20, 1, dtype=torch.int64), 1e-3)
    exact = case.expected_count(torch.float64)[0]
    torch_error = (case.expected_count()[0] - exact).abs().max()
    rounding = rounding_of_tiles(case, this.small)
    in_sum = rounding.count_terms * epsilon(case) / 2 * exact.max()
    allowed = 2 * torch_error + in_sum + rounding.step * case.scores.numel()
    assert (case.count()[0] - exact).abs().max() <= allowed


def test_no_levels() -> None:
    """The positives are counted alone, as the gradient by the localisation errors asks for."""
    case = make(torch.randn(20, 2, 1), torch.zeros(20, 1, dtype=torch.int64), 1.0, padding=4)
    check(case._replace(logits=[], targets=[]))


@pytest.mark.gpu
def test_counts_beyond_float32() -> None:
    """By way of a stride of 0, more than 2^24 negatives stand above a positive."""
    number = (1 << 24) + 3
    logits = torch.ones(1, 1, 1, device=DEVICE).expand(1, 1, number)
    targets = torch.zeros(1, 1, 1, dtype=torch.int8, device=DEVICE).expand(1, 1, number)
    scores = torch.zeros(1, device=DEVICE)
    batch = Batch([logits], [targets], scores.long(), scores, 0.0, IGNORE)
    nfp, _, _ = this.kernels.count(batch, scores.double())
    assert nfp.item() == number


# --- groups -------------------------------------------------------------------------------------


def _groups_of(name: str, targets: Tensor) -> Tensor:
    """Group each anchor, or logit: by what users rank within, and by what nobody foresaw."""
    if name == "image":  # a view, as functional.py lays it out
        return (
            torch.arange(targets.shape[0]).view(-1, *[1] * (targets.dim() - 1)).expand_as(targets)
        )
    if name == "class":
        return (-torch.arange(targets.shape[1]))[None, :, None].expand_as(targets)
    if name == "place":
        return torch.arange(targets.shape[-1]).expand_as(targets) // 2
    if name == "one":
        return torch.full((1,) * targets.dim(), 7).expand_as(targets)
    return torch.randint(-2, 3, targets.shape) * 2**40


GROUPINGS = ["image", "class", "place", "one", "drawn"]


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_groups_of_every_kind(grouping: str) -> None:
    for form in FORMS:
        if (grouping, form) != ("class", class_indices):
            targets = form(BATCH, CLASSES, PLACES)
            groups = _groups_of(grouping, targets)
            check(make(2 * torch.randn(BATCH, CLASSES, PLACES), targets, 1.0, 3, groups))


@pytest.mark.parametrize("delta", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_groups_in_every_dtype(dtype: torch.dtype, delta: float) -> None:
    logits = (2 * torch.randn(BATCH, CLASSES, PLACES)).to(dtype)
    for form, grouping in zip(FORMS, ("image", "drawn"), strict=True):
        targets = form(BATCH, CLASSES, PLACES)
        check(make(logits, targets, delta, groups=_groups_of(grouping, targets)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_in_every_layout(name: str) -> None:
    logits = LAYOUTS[name]()
    for form, grouping in zip(FORMS, ("image", "drawn"), strict=True):
        targets = form(*logits.shape)
        check(make(logits, targets, 1.0, groups=_groups_of(grouping, targets)))


def test_groups_without_a_positive() -> None:
    """All is 0, with padding and without."""
    groups = torch.arange(4)[:, None]
    for padding in (0, 3):
        case = make(torch.randn(4, 3, 1), torch.full((4, 1), -1), 1.0, padding, groups)
        check(case)
        assert case.gradient()[0].count_nonzero() == 0


def test_groups_over_levels() -> None:
    """An image is one group on all levels of a pyramid, a group may be missing from one."""
    logits = [torch.randn(3, 3, places) for places in (13, 4, 0, 1)]
    targets = [class_indices(*level.shape) for level in logits]
    targets[1][1] = -1
    check(make(logits, targets, 1.0, 5, [_groups_of("image", x) for x in targets]))


def test_as_many_groups_as_positives() -> None:
    logits, targets = torch.randn(50, 2, 1), class_indices(50, 2, 1)
    groups = torch.randperm(50)[:, None] - 25
    for delta in (0.0, 1.0):
        check(make(logits, targets, delta, groups=groups))


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_one_group_is_no_groups(delta: float) -> None:
    """They are equal bit by bit in the arithmetic that both share."""
    logits, targets = 2 * torch.randn(30, 2, 1), class_indices(30, 2, 1)
    case = make(logits, targets, delta, 4)
    grouped = Case(*budgets.group(case, [_groups_of("one", targets)]))
    tiles = this.small._replace(gradient_rows=2)
    assert same(grouped.count(tiles), case.count(tiles))
    assert same(grouped.gradient(tiles), case.gradient(tiles))


def test_groups_repeat_whatever_the_tiles() -> None:
    targets = class_indices(12, 2, 3)
    for grouping in ("image", "drawn"):
        groups = _groups_of(grouping, targets)
        case = make(2 * torch.randn(12, 2, 3), targets, 1.0, groups=groups)
        counts, gradients = case.count(), case.gradient()
        assert same(case.count(), counts)
        changed = this.small._replace(lanes=8, gradient_rows=1)
        assert same(case.gradient(changed), gradients)
        if this.kernels is breakpoints:  # integers; the tiles of pairwise sum in another order
            assert same(case.count(changed._replace(count_rows=4)), counts)


def test_a_group_next_to_a_crowd_loses_nothing() -> None:
    """Three anchors beside hundreds of another group: as if they were alone, to the last bits."""
    logits, targets = torch.randn(403, 1, 1), torch.full((403, 1), -1)
    targets[[0, 400, 401]] = 0
    groups = (torch.arange(403) >= 400).long()[:, None]
    few = slice(400, None)
    alone = make(logits[few], targets[few], 1.0)
    for flip in (False, True):  # first line or last
        case = make(logits, targets, 1.0, groups=1 - groups if flip else groups)
        large = this.small._replace(lanes=32, count_rows=16, gradient_rows=16)
        # Tiles of pairwise begin elsewhere, and so sum in another order.
        tolerance = {"rtol": 1e-6 if this.kernels is pairwise else 1e-13, "atol": 0}
        for got, expected in zip(case.count(large)[:2], alone.count(large)[:2], strict=True):
            torch.testing.assert_close(got[1:], expected, **tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_reaches_every_group(form: Callable) -> None:
    """The specification says so: of a NaN among the negatives, a NaN score, a weight of NaN."""
    targets = form(30, 2, 1)
    case = make(torch.randn(30, 2, 1), targets, 1.0, groups=_groups_of("drawn", targets))
    negative = torch.ones_like(case.logits[0], dtype=torch.bool)
    layout.exclude_non_negatives(negative, case.targets[0], IGNORE)
    for spoil in (
        lambda: case.weights.__setitem__(3, torch.nan),
        lambda: case.logits[0].__setitem__(tuple(negative.nonzero()[5]), torch.nan),
        lambda: case.scores.__setitem__(2, torch.nan),
    ):
        spoil()
        counts, exact = torch.stack(case.count()), case.expected_count(torch.float64)
        assert torch.equal(counts.isnan(), exact.isnan())
        (gradient,), (expected,) = case.gradient(), case.expected_gradient(torch.float64)
        assert torch.equal(gradient.isnan(), expected.isnan())


# --- values at the edge -------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ties_at_the_ends_of_the_step(dtype: torch.dtype, delta: float) -> None:
    """x = -delta, 0 and delta exactly: H is 0, 1/2 and 1 (0, 1 and 1 for delta = 0), bit by bit."""
    scores = torch.arange(-3, 4, dtype=torch.float64)
    others = torch.cat([scores - delta, scores, scores + delta])
    logits = torch.cat([scores, others]).to(dtype)[:, None, None]
    targets = torch.tensor([0] * 7 + [-1] * 21)[:, None]
    case = make(logits, targets, delta)
    counts, exact = torch.stack(case.count()), case.expected_count(torch.float64)
    assert torch.equal(counts[:2], exact[:2])
    torch.testing.assert_close(counts[2], exact[2], rtol=1e-14, atol=0)  # order of a float64 sum


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # by numpy, to inf
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 1.0])
def test_infinite_logits(dtype: torch.dtype, delta: float) -> None:
    """-inf (a masked class) and +inf, positive or negative, rank like large finite scores."""
    logits = torch.randn(20, 2, 1).to(dtype)
    logits[[0, 3, 15], 0] = -torch.inf
    logits[[1, 4, 16], 0] = torch.inf
    logits[[2, 5], 1] = -torch.inf
    logits[[6, 17], 1] = torch.inf
    targets = torch.tensor([0] * 10 + [-1] * 10)[:, None]
    case = make(logits, targets, delta)
    check(case)
    assert all(x.isfinite().all() for x in (*case.count(), *case.gradient()))


# (group, target) of anchors of one class, in two tiles of 8 and a part of one. In group 0 there is
# padding alone, in group 3 nobody, and the second tile lies in it as a whole.
_PLACES = {
    "positive": (1, 0),
    "negative": (1, -1),
    "positive of another group": (2, 0),
    "negative of another group": (2, -1),
    "beside padding alone": (0, -1),
    "beside nobody": (3, -1),
    "ignored": (1, IGNORE),
    "last of a tile": (3, -1),
    **{f"tile of nobody, {place}": (3, -1) for place in range(8)},
    "behind the tiles": (0, -1),
    "ignored behind the tiles": (0, IGNORE),
    "last": (2, -1),
}
_UNSEEN = [name for name, (group, target) in _PLACES.items() if group in (0, 3) or target == IGNORE]


def _with(
    value: float, places: list[str], form: Callable, grouped: bool, delta: float, dtype: torch.dtype
) -> Case:
    """Make a call of `_PLACES`, with padding and with a value in some of them."""
    groups, targets = (x[:, None] for x in torch.tensor(list(_PLACES.values())).T)
    if form is per_logit:
        targets = torch.where(targets == IGNORE, -1, targets + 1)[:, :, None]
    logits = torch.randn(len(_PLACES), 1, 1).to(dtype)
    logits[[list(_PLACES).index(name) for name in places]] = value
    return make(logits, targets, delta, 2, groups.view(targets.shape) if grouped else None)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # by numpy, to inf
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("grouped", [False, True])
def test_an_infinite_logit_in_every_place(grouped: bool, dtype: torch.dtype) -> None:
    """It may stand where nobody looks: in a group without a positive, or with padding alone."""
    for form, delta in zip(FORMS, (0.0, 1.0), strict=True):
        check(_with(torch.inf, _UNSEEN, form, grouped, delta, dtype))
        check(_with(torch.inf, ["negative", "last", "beside nobody"], form, grouped, delta, dtype))
        check(_with(-torch.inf, ["positive", "last", "last of a tile"], form, grouped, 1.0, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("grouped", [False, True])
def test_padding_alone_looks_at_nothing(grouped: bool, dtype: torch.dtype) -> None:
    """The logits may be anything, in the group of the padding and in another."""
    logits = torch.randn(20, 1, 1).to(dtype)
    logits[[0, 7, 19]], logits[[1, 8]], logits[[2, 5]] = torch.inf, -torch.inf, torch.nan
    groups = torch.tensor([0, 1] * 10)[:, None] if grouped else None
    for targets, delta in ((torch.full((20, 1), -1), 0.0), (torch.zeros(20, 1, 1), 1.0)):
        shaped = groups if groups is None else groups.view(targets.shape)
        case = make(logits, targets, delta, 3, shaped)
        assert torch.stack(case.count()).T.tolist() == [[0.0, 1.0, 0.0]] * 3
        assert case.gradient()[0].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("delta", [0.0, 2.0**60])
def test_logits_beyond_the_largest_tie(dtype: torch.dtype, delta: float) -> None:
    """They are at -2^125 and 2^125, beside positives that stand there, or nearly do."""
    powers = 2 ** torch.tensor([123.0, 124.5, 124.99, 125.0, 125.5, 127.0])
    ends = torch.cat([-powers, powers, torch.tensor([-torch.inf, torch.inf])])
    logits = torch.cat([ends, ends])[:, None, None].to(dtype)
    for positives in (range(14), [1], [7, 8]):
        targets = torch.full((28, 1), -1)
        targets[list(positives)] = 0
        check(make(logits, targets, delta, 1))


@pytest.mark.parametrize("outlier", [-40.0, 1e4])
def test_one_outlier(outlier: float) -> None:
    logits = torch.randn(30, 2, 1)
    logits[4, 0] = outlier
    for delta in (1e-3, 1.0):
        check(make(logits, torch.zeros(30, 1, dtype=torch.int64), delta))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("far", [False, True])
def test_nan_logit(form: Callable, far: bool) -> None:
    """Among the negatives it makes every NFP NaN, wherever it stands; ignored, it is not there."""
    logits, targets = torch.randn(30, 2, 1), form(30, 2, 1)
    negative = torch.ones_like(logits, dtype=torch.bool)
    layout.exclude_non_negatives(negative, targets, IGNORE)
    if far:  # in a tile that is left out
        logits[negative] -= 100
    row, channel, _ = negative.nonzero()[7]
    case = make(logits, targets, 1.0)
    case.logits[0][row, channel] = torch.nan
    nfp, rank_positive, value_sum = case.count()
    assert nfp.isnan().all()
    assert rank_positive.isfinite().all()
    assert value_sum.isfinite().all()
    (gradient,), (expected,) = case.gradient(), case.expected_gradient(torch.float64)
    assert torch.equal(gradient.isnan(), expected.isnan())
    assert gradient.isnan().sum() == 1


@pytest.mark.parametrize("form", FORMS)
def test_nan_logit_that_is_ignored(form: Callable) -> None:
    logits, targets = torch.randn(30, 2, 1), form(30, 2, 1)
    taken_out = targets == (IGNORE if form is class_indices else -1)
    taken_out = taken_out[:, None] if form is class_indices else taken_out
    logits[taken_out.expand(30, 2, 1)] = torch.nan
    case = make(logits, targets, 1.0)
    assert all(x.isfinite().all() for x in (*case.count(), *case.gradient()))


def test_nan_score() -> None:
    case = make(torch.randn(30, 2, 1), torch.zeros(30, 1, dtype=torch.int64), 1.0, padding=3)
    place = (case.scores != -torch.inf).nonzero()[11]
    case.scores[place] = torch.nan
    valid = case.scores != -torch.inf
    counts = torch.stack(case.count())
    assert counts[:, valid].isnan().all()
    assert counts[:, ~valid].T.tolist() == [[0.0, 1.0, 0.0]] * 3
    (gradient,), (expected,) = case.gradient(), case.expected_gradient(torch.float64)
    assert torch.equal(gradient.isnan(), expected.isnan())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # inf - inf
@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_weight_that_is_not_finite(weight: float) -> None:
    """It reaches even a logit on which H is 0, as in the reference: 0 times it is NaN."""
    case = make(torch.randn(30, 2, 1), torch.zeros(30, 1, dtype=torch.int64), 0.1)
    case.weights[5] = weight
    (gradient,), (expected,) = case.gradient(), case.expected_gradient(torch.float64)
    if this.kernels is breakpoints:  # infinity is a difference of infinities there
        expected[expected == torch.inf] = torch.nan
    assert torch.equal(gradient.isnan(), expected.isnan())


def test_all_ignored() -> None:
    check(make(torch.randn(5, 2, 3), torch.full((5, 3), IGNORE), 1.0))
    check(make(torch.randn(5, 2, 3), torch.full((5, 2, 3), -1), 1.0, padding=2))


def test_no_negative() -> None:
    check(make(torch.randn(11, 2, 1), torch.ones(11, 2, 1), 1.0))


def test_no_logits() -> None:
    check(make(torch.randn(0, 2, 3), torch.zeros(0, 3, dtype=torch.int64), 1.0))
    check(make(torch.randn(4, 2, 0), torch.zeros(4, 2, 0), 1.0, padding=2))


def test_only_padding() -> None:
    case = make(torch.randn(11, 2, 1), torch.full((11, 1), -1), 1.0, padding=12)
    assert case.scores.numel() == 12
    check(case)


def test_a_positive_that_is_not_listed_gets_zero() -> None:
    case = make(torch.randn(9, 2, 1), torch.zeros(9, 1, dtype=torch.int64), 1.0)
    case = case._replace(**{name: getattr(case, name)[1:] for name in Case._fields[2:7]})
    assert case.gradient()[0][0, 0] == 0


def test_offsets_beyond_32_bits() -> None:
    """A row lies 2^31 elements behind the first; memory never touched is never allocated."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty((1 << 31) + 64, dtype=torch.bfloat16, device=DEVICE)
    torch.utils.deterministic.fill_uninitialized_memory = True
    logits = storage.as_strided((3, 3, 5), ((1 << 30) + 8, 5, 1))
    logits.copy_(torch.randn(3, 3, 5))
    for form in FORMS:
        targets = form(3, 3, 5).to(DEVICE)
        number = int(layout.is_positive(logits, targets, IGNORE).sum())
        index, scores = layout.locate([logits], [targets], None, number, True, IGNORE)
        weight = torch.rand(number, dtype=torch.float64, device=DEVICE)
        case = Case([logits], [targets], index, scores, weight, weight, -weight, 1.0)
        one_tile = {"count_programs": 1} if this.kernels is pairwise else {"count_rows": 16}
        check(case, this.small._replace(**one_tile, gradient_rows=16))


# --- order and work -----------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_bitwise_repeatable(delta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(torch.randn(50, 2, 1), class_indices(50, 2, 1), delta)
    counts, gradients = case.count(), case.gradient()
    assert same(case.count(), counts)
    assert same(case.gradient(), gradients)
    for programs in (1, 7):
        with monkeypatch.context() as patch:
            on_grid = OnGrid(this.counting._count_kernel, programs)
            patch.setattr(this.counting, "_count_kernel", on_grid)
            assert same(case.count(), counts)
    # A logit's sum does not depend on its tile.
    for changed in ({"gradient_rows": 1}, {"gradient_rows": 4, "lanes": 8}):
        assert same(case.gradient(this.small._replace(**changed)), gradients)


# --- on a GPU -----------------------------------------------------------------------------------


def _full_size(dtype: torch.dtype, form: Callable = class_indices, delta: float = 1.0) -> Case:
    """Draw a pyramid as of RetinaNet: a million logits and some hundred positives."""
    torch.manual_seed(0)
    logits, targets = [], []
    for places in (10_000, 2_500, 625, 169, 49):
        logits.append((torch.randn(2, 40, places) * 1.5 - 5).to(dtype))
        target = form(2, 40, places)
        keep = torch.rand(target.shape) < 0.02
        targets.append(
            torch.where((target == IGNORE) | keep, target, 40 if target.dim() == 2 else 0)
        )
    return make(logits, targets, delta)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_full_size(dtype: torch.dtype, form: Callable) -> None:
    case = _full_size(dtype, form)
    check(case, this.kernels.choose_tiles(case.batch))


@pytest.mark.gpu
def test_full_size_repeats() -> None:
    case = _full_size(torch.float32)
    assert same(case.count(None), case.count(None))
    assert same(case.gradient(None), case.gradient(None))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    case = _full_size(torch.float32)
    case.count(None), case.gradient(None)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.count(None), case.gradient(None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph() -> None:
    case = _full_size(torch.float32)
    expected = (*case.count(None), *case.gradient(None))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = (*case.count(None), *case.gradient(None))
    for out in captured:
        out.fill_(torch.nan)
    graph.replay()
    assert same(captured, expected)


@pytest.mark.gpu
def test_random_sizes_make_no_new_variant() -> None:
    torch.manual_seed(0)
    numbers = []
    for _ in range(50):
        batch, places = (int(n) for n in torch.randint(1, 70, (2,)))
        case = make(torch.randn(batch, 3, places), class_indices(batch, 3, places), 1 / batch)
        case.count(None), case.gradient(None)
        numbers.append(compiled_variants())
    assert len(set(numbers[5:])) == 1


@pytest.mark.gpu
def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    case = _full_size(torch.float32)
    moved = [
        [x.to("cuda:1") for x in part] if isinstance(part, list) else part.to("cuda:1")
        for part in case[:7]
    ]
    other = Case(*moved, case.delta)
    for mine, theirs in zip(
        (*case.count(None), *case.gradient(None)),
        (*other.count(None), *other.gradient(None)),
        strict=True,
    ):
        assert theirs.device.index == 1
        assert torch.equal(mine, theirs.to(mine.device))
