"""The breakpoints on scores of every mantissa and magnitude, on both sides of every threshold.

A threshold says from which size on the code goes another way: so that a generated case of a few
hundred logits takes each of the ways, it draws the thresholds too.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from batches import batch_of, widen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alrp_triton import ap_loss
from alrp_triton.reference import layout, pairwise
from alrp_triton.reference.breakpoints import ranks as breakpoints
from alrp_triton.reference.breakpoints import relevant, segments, sort
from alrp_triton.reference.breakpoints.workspace import Workspace

LARGEST = layout.LARGEST
DELTAS = (0.0, 2.0**-60, 1e-3, 1.0, 5e3, 2.0**60)
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def any_bits(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw every sign, exponent and mantissa alike: subnormals, the largest, both infinities."""
    bits = torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator)
    x = (bits >> 13).to(BITS[dtype]).view(dtype)
    return x.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def draw_scores(
    kind: str, size: int, dtype: torch.dtype, delta: float, generator: torch.Generator
) -> Tensor:
    """Draw scores (size,) of one kind."""
    normal = torch.randn(size, dtype=torch.float64, generator=generator)
    one = float(any_bits(1, dtype, generator))
    place = 10 ** float(torch.empty(1).uniform_(-3, 5, generator=generator))
    if kind == "any":
        return any_bits(size, dtype, generator)
    if kind == "equal":
        return torch.full((size,), one).to(dtype)
    if kind == "equal but for the first":
        x = torch.full((size,), place).to(dtype)
        x[0] = float(normal[0])
        return x
    if kind == "neighbours":  # a few units in the last place apart
        x = torch.full((size,), place).to(dtype)
        return (x.view(BITS[dtype]) + (2 * normal).round().to(BITS[dtype])).view(dtype)
    if kind == "far":
        return (normal + place).to(dtype)
    if kind == "steps":  # exactly delta apart
        return ((3 * normal).round() * (delta or 0.1)).to(dtype)
    if kind == "near overflow":
        return (LARGEST * (1 + normal / 100)).to(dtype)
    if kind == "subnormal":
        return (normal * 100 * torch.finfo(dtype).smallest_normal / 2**10).to(dtype)
    x = normal.to(dtype)
    if kind == "one far":
        x[int(size * torch.rand(1, generator=generator))] = one
    elif kind == "infinite":
        x[normal > 1], x[normal < -1] = math.inf, -math.inf
    return x


KINDS = (
    "any", "equal", "equal but for the first", "neighbours", "far", "steps", "near overflow",
    "subnormal", "normal", "one far", "infinite",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    positives=st.sampled_from([1, 2, 3, 50, 700]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    delta=st.sampled_from(DELTAS),
    looked_up=st.sampled_from([0, 1 << 14, 1 << 20]),
)
def test_every_score_has_a_cell_of_the_table(seed, kinds, positives, dtype, delta, looked_up):
    """And the interval that a search finds; so have NaN and what is put below all breakpoints."""
    generator = torch.Generator().manual_seed(seed)
    own, others = (draw_scores(kind, 700, dtype, delta, generator) for kind in kinds)
    found = sort.sort_breakpoints(layout.finite(own[:positives]), delta, looked_up=looked_up)
    key = found.key
    near = [key.nextafter(key.new_full((), end)) for end in (-math.inf, math.inf)]
    ordered = torch.cat([key, *near, layout.finite(torch.cat([own, others]))])
    ordered = torch.cat([ordered, ordered.new_tensor([sort.BELOW_ALL, math.inf, -math.inf])])
    with mock.patch.object(sort, "SEARCH_BELOW", 0):
        for nan in (0, 1):
            scores = torch.cat([ordered, ordered.new_full((nan,), math.nan)])
            cell = found._cell(scores, Workspace(), ordered=nan == 0)
            assert ((cell >= 0) & (cell < found.cells)).all()
            interval = found.look_up(scores, None, Workspace(), ordered=nan == 0)
            expected = torch.bucketize(ordered, key, right=True)
            assert torch.equal(interval[: ordered.numel()].long(), expected)
            assert ((interval >= 0) & (interval <= key.numel())).all()
            values = torch.rand(key.numel() + 1, dtype=dtype)
            told = sort.Steps(found, values)(scores, None, Workspace(), nan == 0)
            assert torch.equal(told[: ordered.numel()], values[expected])


@pytest.mark.parametrize("far", [[1e6], [math.inf], [-math.inf], [math.inf, -1e9], [1e30] * 25])
@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_far_positives_leave_the_cells_to_the_others(dtype, delta, far):
    """Of 10,000 scores few are searched for; with cells up to the far ones it would be most."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(250, dtype=dtype, generator=generator)
    others = 3 * torch.randn(10_000, dtype=dtype, generator=generator)
    for own in (scores, torch.cat([scores, layout.finite(scores.new_tensor(far))])):
        found = sort.sort_breakpoints(own, delta, looked_up=1 << 20)
        cell = found._cell(others, Workspace(), ordered=True)
        assert (found._cells[cell] >= sort.HAS_BREAKPOINT).sum() < 1000


@pytest.mark.parametrize(
    "groups",
    [
        [0],
        [-(2**63), 2**63 - 1],
        [-(2**63)],
        [2**63 - 1, 2**63 - 2],
        [3, -4, 1000],
        [0, segments.NUMBERS - 3],
        [0, segments.NUMBERS - 2],
        [0, segments.NUMBERS],
    ],
)
def test_groups_have_the_lines_of_their_positives(groups):
    """Told by a table or searched for; all without a positive share the line behind the last."""
    own = torch.tensor(groups * 2)
    scores = torch.randn(own.numel())
    got = sort.sort_breakpoints(scores, 1.0, own).segments
    limits = [-(2**63), -(2**63) + 1, 2**63 - 2, 2**63 - 1]
    near = [g + k for g in groups for k in (-1, 0, 1) if -(2**63) <= g + k < 2**63]
    asked = torch.tensor([*limits, -1, 0, 1, *near])
    line = {group: place for place, group in enumerate(sorted(groups))}
    expected = [line.get(group, len(groups)) for group in asked.tolist()]
    assert got.of(asked).tolist() == expected
    square = asked[:4].reshape(2, 2).t()  # not contiguous
    assert got.of(square).tolist() == torch.tensor(expected[:4]).reshape(2, 2).t().tolist()
    assert got.of(torch.tensor([3, -1], dtype=torch.int32)).tolist() == [
        line.get(group, len(groups)) for group in (3, -1)
    ]


@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("few", [0, sort.SEARCH_BELOW])
@pytest.mark.parametrize("module", [pairwise, breakpoints])
def test_logits_beyond_the_largest_tie(module, few, dtype, delta):
    """They are finite or not, in the counts and in the gradient, at negatives and positives."""
    logits = torch.tensor([0.99, 1, 1.01, 1.5, 2, 3, 1, math.inf, 1.2] * 2, dtype=torch.float64)
    logits = (logits * LARGEST).where(torch.arange(18) < 9, -logits * LARGEST).to(dtype)
    targets = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1]]).tile(2).reshape(-1, 1, 1)
    counted = []
    for x in (logits, logits.clamp(-LARGEST, LARGEST)):
        levels = [x.reshape(-1, 1, 1)]
        batch = batch_of(levels, [targets], delta)
        weights = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with mock.patch.object(sort, "SEARCH_BELOW", few):
            got = module.count(batch, weights)
            counted.append([*got, *module.gradient(batch, weights, -weights)])
    for a, b in zip(*counted, strict=True):
        assert torch.equal(a, b)
    each = 1.0 if delta == 0 else 0.5
    nfp, gradient = counted[0][0].tolist(), counted[0][3].flatten().tolist()
    assert nfp == [5 * each] * 3 + [7 + 5 * each] * 3
    assert len(set(gradient[1:6])) == 1 == len(set(gradient[10:15]))


@st.composite
def thresholds(draw):
    """Set every threshold of the code: as it is, or so low that it is crossed."""
    few = draw(st.sampled_from([0, 1, 30, 200, sort.SEARCH_BELOW]))
    return [
        mock.patch.multiple(
            sort,
            SEARCH_BELOW=few,
            CELLS=draw(st.sampled_from([6, 100, sort.CELLS])),
            CELLS_PER_BREAKPOINT=draw(st.sampled_from([0, sort.CELLS_PER_BREAKPOINT])),
            SCORES_PER_CELL=draw(st.sampled_from([1, sort.SCORES_PER_CELL])),
            FEWEST_CELLS=draw(st.sampled_from([6, sort.FEWEST_CELLS])),
            MOST_CELLS=draw(st.sampled_from([6, 100, sort.MOST_CELLS])),
            AT_AN_END=draw(st.sampled_from([2, sort.AT_AN_END])),
            FAR=draw(st.sampled_from([1, 3, sort.FAR])),
            REACH=draw(st.sampled_from([0.1, sort.REACH])),
        ),
        mock.patch.multiple(
            breakpoints,
            LANES=draw(st.sampled_from([1, 2, breakpoints.LANES])),
            MOST_IN_LANES=draw(st.sampled_from([2, 20, breakpoints.MOST_IN_LANES])),
        ),
        mock.patch.multiple(
            relevant,
            SURVEY=draw(st.sampled_from([30, 64, 150, relevant.SURVEY])),
            MAX_SPARSE_RUNS=draw(st.sampled_from([0.0, relevant.MAX_SPARSE_RUNS, 1.0])),
            MAX_SPARSE_LOGITS=draw(st.sampled_from([-1.0, relevant.MAX_SPARSE_LOGITS, 1.0])),
        ),
        mock.patch.object(layout, "CHUNK", draw(st.sampled_from([20, 63, 100, layout.CHUNK]))),
        mock.patch.multiple(
            segments,
            TABLE=draw(st.sampled_from([0, 50, segments.TABLE])),
            NUMBERS=draw(st.sampled_from([0, 5, segments.NUMBERS])),
        ),
        mock.patch.object(pairwise, "PAIRS", draw(st.sampled_from([5000, pairwise.PAIRS]))),
    ]


@st.composite
def cases(draw):
    """Draw one or two levels of scores of one kind each, the positives anywhere among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, delta = draw(st.sampled_from(list(BITS))), draw(st.sampled_from(DELTAS))
    logits, targets, groups = [], [], []
    for _ in range(draw(st.integers(1, 2))):
        shape = [draw(st.sampled_from(sizes)) for sizes in ([1, 2, 9], [1, 3], [1, 7, 32])]
        kind = draw(st.sampled_from(KINDS))
        x = draw_scores(kind, math.prod(shape), dtype, delta, generator)
        logits.append(x.reshape(shape))
        chance = torch.rand(shape, generator=generator)
        density = draw(st.sampled_from([0.02, 0.3, 1.0]))
        target = torch.where(chance < density, 1, torch.where(chance > 0.9, -1, 0))
        target.view(-1)[0] = 1
        targets.append(target)
        group = torch.randint(-2, 3, shape, generator=generator)
        groups.append(group * draw(st.sampled_from([1, 2**40, -(2**62)])))
    return logits, targets, groups if draw(st.booleans()) else [], delta, generator


@settings(max_examples=400, deadline=None)
@given(case=cases(), crossed=thresholds())
def test_breakpoints_equal_pairwise_on_both_sides_of_every_threshold(case, crossed):
    """NFP and rank+ of the hard step agree to the bit; the rest to pairwise's float64 rounding."""
    logits, targets, groups, delta, generator = case
    number = sum(level.numel() for level in logits)
    batch = batch_of(logits, targets, delta, groups)
    wide, size = widen(batch), batch.scores.numel()
    values, weights = torch.rand((2, size), dtype=torch.float64, generator=generator)
    expected = pairwise.count(wide, values)
    gradients = pairwise.gradient(wide, weights, -weights)
    for patch in crossed:
        patch.start()
    try:
        got = breakpoints.count(batch, values)
        own = breakpoints.gradient(wide, weights, -weights)
        rounded = breakpoints.gradient(batch, weights, -weights)
        again = pairwise.count(wide, values)
    finally:
        for patch in crossed:
            patch.stop()
    if delta == 0:
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    # Each of the pairs is rounded by 2^-53 or so, on both sides.
    budget = 1e-15 * number * max(1.0, float(weights.sum()))
    for a, b in [*zip(got, expected, strict=True), *zip(again, expected, strict=True)]:
        assert ((a - b).abs() <= 1e-13 * b.abs() + budget).all()
    for a, b, c in zip(own, rounded, gradients, strict=True):
        assert ((a - c).abs() <= 1e-13 * c.abs() + budget).all()
        unit = torch.finfo(b.dtype)
        rounding = c.abs() * unit.eps * 0.5000001 + unit.tiny * unit.eps
        assert ((b.double() - c).abs() <= rounding + 1e-13 * c.abs() + budget).all()


def _one_among_many(generator: torch.Generator, size: int) -> tuple[Tensor, int]:
    return torch.randn(size, generator=generator), 1


def _head_at_its_initialisation(generator: torch.Generator, size: int) -> tuple[Tensor, int]:
    prior = 0.005 if torch.rand(1, generator=generator) < 0.5 else 0.02
    bias = -math.log((1 - prior) / prior)
    return bias + 0.01 * torch.randn(size, generator=generator), 1


def _equal_positives(generator: torch.Generator, size: int) -> tuple[Tensor, int]:
    x = torch.randn(size, generator=generator)
    x[:50] = 10 * torch.randn(1, generator=generator)
    return x, 50


def _thousands(generator: torch.Generator, size: int) -> tuple[Tensor, int]:
    away = 5000 * (1 + 3 * torch.rand(1, generator=generator))
    return away + torch.randn(size, generator=generator), 20


def _equal_but_one(generator: torch.Generator, size: int) -> tuple[Tensor, int]:
    x = torch.full((size,), 3.0)
    x[0] = 3 - 2 * torch.rand(1, generator=generator)
    return x, 1


@pytest.mark.parametrize("delta", [0.0, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize(
    "size", [sort.SEARCH_BELOW - 1, sort.SEARCH_BELOW, sort.SEARCH_BELOW + 1, 20_000]
)
@pytest.mark.parametrize(
    "draw",
    [
        _one_among_many,
        _head_at_its_initialisation,
        _equal_positives,
        _thousands,
        _equal_but_one,
    ],
)
def test_the_loss_of_ordinary_logits(draw, size, delta):
    """Sizes are those at which the table begins, logits what a detector may well produce."""
    for seed in range(12):
        logits, positives = draw(torch.Generator().manual_seed(seed), size)
        targets = (torch.arange(size) < positives).int()
        losses, gradients = [], []
        for algorithm, x in (("breakpoints", logits), ("pairwise", logits.double())):
            x.requires_grad_()
            losses.append(ap_loss(x, targets, delta, algorithm=algorithm))
            gradients += torch.autograd.grad(losses[-1], x)
        torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-7, atol=0)
        torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize(
    "positives",
    [
        breakpoints.MOST_IN_LANES // 2 - 1,  # of a soft step: from where rows are given up
        breakpoints.MOST_IN_LANES,
        sort.SEARCH_BELOW // 2,  # scores and bounds are merged as integers
        sort.SEARCH_BELOW - 1,  # and positives sorted
        sort.SEARCH_BELOW,
        sort.CELLS // sort.CELLS_PER_BREAKPOINT + 1,  # cells grow with them
    ],
)
@pytest.mark.parametrize("kind", ["any", "normal", "equal", "steps"])
def test_many_positives(kind, positives, delta):
    """As many as cross a threshold at its own size; 40 of them, and 40 negatives, pair by pair."""
    generator = torch.Generator().manual_seed(positives)
    x = draw_scores(kind, positives + 20_000, torch.float32, delta, generator)
    targets = (torch.arange(x.numel()) < positives).long().reshape(-1, 1, 1)
    batch = batch_of([x.reshape(-1, 1, 1)], [targets], delta)
    values = torch.rand(positives, dtype=torch.float64, generator=generator)
    got = breakpoints.count(batch, values)
    wide, negatives = batch.scores.double(), layout.finite(x[positives:]).double()
    some = torch.randint(positives, (40,), generator=generator)
    h = pairwise.step(negatives - wide[some, None], delta)
    torch.testing.assert_close(got[0][some], h.sum(1), rtol=1e-9, atol=1e-9)
    h = pairwise.step(wide - wide[some, None], delta)
    h[torch.arange(40), some] = 0
    torch.testing.assert_close(got[1][some], 1 + h.sum(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[2][some], h @ values, rtol=1e-9, atol=1e-9)

    (gradient,) = breakpoints.gradient(batch, values, -values)
    gradient = gradient.view(-1)
    assert torch.equal(gradient[:positives], -values.float())
    some = torch.randint(20_000, (40,), generator=generator)
    expected = pairwise.step(negatives[some, None] - wide, delta) @ values
    torch.testing.assert_close(gradient[positives:][some].double(), expected, rtol=1e-7, atol=1e-10)
