"""The specification against a plain loop, and breakpoints against the specification."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from batches import (
    DISTRIBUTIONS,
    IGNORE,
    batch_of,
    detector_batch,
    relative_error,
    to_batch,
    widen,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from alrp_triton.reference import layout, pairwise
from alrp_triton.reference.breakpoints import ranks as breakpoints
from alrp_triton.reference.breakpoints import relevant, sort
from alrp_triton.reference.breakpoints.block_maxima import RUN, find
from alrp_triton.reference.breakpoints.workspace import Workspace
from alrp_triton.testing.cases import poisoned
from perf.timing import peak_memory
from tests.profiles import FULL

DELTAS = (0.0, 1e-3, 0.25, 1.0, 3.0)


def plain_step(x: float, delta: float) -> float:
    if delta == 0:
        return float(x >= 0)
    return min(1.0, max(0.0, x / (2 * delta) + 0.5))


@pytest.mark.parametrize("delta", DELTAS)
def test_pairwise_says_what_the_equations_say(delta):
    """Numbers on a grid of delta / 2 meet ties and x = +-delta; Python floats are the truth."""
    unit = delta / 2 if delta else 1.0
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-4, 5, (12, 3, 2), generator=generator).double() * unit
    targets = torch.tensor([0, -1, 2, IGNORE, 1, 3, -1, -1, 0, 2, IGNORE, -1] * 2).reshape(12, 2)
    size = 10
    batch = batch_of([logits], [targets], delta)
    values = torch.rand(size, dtype=torch.float64, generator=generator)
    weights = torch.rand(size, dtype=torch.float64, generator=generator)
    got = pairwise.count(batch, values)
    (gradient,) = pairwise.gradient(batch, weights, -values)

    positives, negatives, expected = [], [], torch.zeros_like(logits)
    for b in range(12):
        for m in range(2):
            target = int(targets[b, m])
            for c in range(3):
                if target == c:
                    positives.append((b, c, m))
                elif target != IGNORE:
                    negatives.append((b, c, m))
    positives.sort(key=lambda p: (p[0], p[2]))  # the order of the targets
    s = [float(logits[p]) for p in positives]
    assert s == batch.scores.tolist()
    for i, p in enumerate(positives):
        others = [k for k in range(size) if k != i]
        nfp = math.fsum(plain_step(float(logits[j]) - s[i], delta) for j in negatives)
        rank_positive = 1 + math.fsum(plain_step(s[k] - s[i], delta) for k in others)
        total = math.fsum(float(values[k]) * plain_step(s[k] - s[i], delta) for k in others)
        assert abs(float(got[0][i]) - nfp) < 1e-12
        assert abs(float(got[1][i]) - rank_positive) < 1e-12
        assert abs(float(got[2][i]) - total) < 1e-12
        expected[p] = -values[i]
    for j in negatives:
        terms = (
            float(w) * plain_step(float(logits[j]) - x, delta)
            for w, x in zip(weights, s, strict=True)
        )
        expected[j] = math.fsum(terms)
    assert (gradient - expected).abs().max() < 1e-12


@st.composite
def levels(draw):
    """Draw one or two levels with logits of one regime, targets of one kind, and a delta."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    regime = draw(
        st.sampled_from(
            ["normal", "ties", "equal", "low outlier", "high outlier", "wide", "infinite"]
        )
    )
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    scale = draw(st.sampled_from([0.01, 1.0, 4.0]))
    classes = draw(st.integers(1, 4))
    per_logit = draw(st.booleans())
    density = draw(st.sampled_from([0.05, 0.3, 0.9]))
    logits, targets = [], []
    for _ in range(draw(st.integers(1, 2))):
        batch, places = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 17]))
        x = torch.randn(batch, classes, places, dtype=torch.float64, generator=generator) * scale
        chance = torch.rand(x.shape, generator=generator)
        if regime == "ties":
            x = (x * 2).round() / 2
        elif regime == "equal":
            x.fill_(-4.595)
        elif regime == "low outlier":
            x.view(-1)[0] = -40
        elif regime == "high outlier":
            x.view(-1)[-1] = 1e4
        elif regime == "wide":
            x *= 1e4
        elif regime == "infinite":
            x[chance < 0.2], x[chance > 0.8] = math.inf, -math.inf
        if per_logit:
            draw_target = torch.rand(x.shape, generator=generator)
            target = torch.where(draw_target < density, 1, torch.where(draw_target > 0.95, -1, 0))
        else:
            draw_target = torch.rand((batch, places), generator=generator)
            target = torch.randint(classes, (batch, places), generator=generator)
            target[draw_target > density] = -1
            target[draw_target > 0.97] = IGNORE
        logits.append(x.to(dtype))
        targets.append(target)
    kind = draw(st.sampled_from(["none", "none", "image", "any"]))
    groups = []
    if kind == "image":
        groups = [
            torch.arange(len(x)).reshape(-1, *[1] * (x.dim() - 1)).expand_as(x) for x in targets
        ]
    elif kind == "any":
        groups = [torch.randint(-2, 3, x.shape, generator=generator) * 2**40 for x in targets]
    return logits, targets, groups, draw(st.sampled_from(DELTAS)), generator


@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("number", [2, 200, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_minus_infinity_ties_with_itself(dtype, number, delta):
    """It is ranked as a number: the lowest positive and the negatives there have their place."""
    logits = torch.full((1, 1, number), -math.inf, dtype=dtype)
    targets = torch.full((1, number), -1)
    targets[0, -1] = 0
    batch = batch_of([logits], [targets], delta)
    values = torch.ones(1, dtype=torch.float64)
    nfp, _, _ = breakpoints.count(batch, values)
    each = 1.0 if delta == 0 else 0.5
    assert nfp.item() == each * (number - 1)
    (gradient,) = breakpoints.gradient(batch, values, -values)
    assert (gradient[..., :-1] == each).all()


@pytest.mark.parametrize("distribution", ["init", "late"])
def test_logits_may_require_a_gradient(distribution):
    """Neither function is differentiated, by whoever calls it."""
    logits, targets = detector_batch(distribution, 1000, 80, 20)
    batch = to_batch(logits, targets)
    batch.logits[0].requires_grad_()
    values = torch.rand(20, dtype=torch.float64)
    counted = breakpoints.count(batch, values)
    gradients = breakpoints.gradient(batch, values, -values)
    assert not any(x.requires_grad for x in (*counted, *gradients))


@settings(max_examples=2000 if FULL else 500, deadline=None)
@given(levels())
def test_breakpoints_equal_pairwise(case):
    """They agree entry by entry to 1e-9 relative in any regime; the truth is float64 pairwise."""
    logits, targets, groups, delta, generator = case
    batch = batch_of(logits, targets, delta, groups)
    wide, size = widen(batch), batch.scores.numel()
    values = torch.rand(size, dtype=torch.float64, generator=generator)
    weights = torch.rand(size, dtype=torch.float64, generator=generator)

    expected = pairwise.count(wide, values)
    got = breakpoints.count(batch, values)
    assert relative_error(got[0], expected[0]) < 1e-9
    assert relative_error(got[1], expected[1]) < 1e-9
    # S is a difference of what all and what oneself contributes; both sides round H near 0 alike.
    assert (got[2] - expected[2]).abs().max() < 1e-9 if size else True

    expected = pairwise.gradient(wide, weights, -weights)
    got = breakpoints.gradient(wide, weights, -weights)
    rounded = breakpoints.gradient(batch, weights, -weights)
    for a, b, c in zip(got, rounded, expected, strict=True):
        assert relative_error(a, c) < 1e-9
        # The same in the logits' dtype, where one rounding of the result is allowed and no more.
        unit = torch.finfo(b.dtype)
        budget = c.abs() * unit.eps * 0.5000001 + unit.tiny * unit.eps + 1e-9 * c.abs()
        assert ((b.double() - c).abs() <= budget).all()


@pytest.mark.parametrize("cells", [6, 7, 64])
@pytest.mark.parametrize("delta", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_table_finds_the_intervals_that_a_search_finds(
    distribution, dtype, delta, cells, monkeypatch
):
    """With scores at breakpoints, one float off them, outside all, infinite and NaN."""
    monkeypatch.setattr(sort, "CELLS", cells)
    monkeypatch.setattr(sort, "CELLS_PER_BREAKPOINT", 0)
    monkeypatch.setattr(sort, "SEARCH_BELOW", 0)
    logits, targets = detector_batch(distribution, 300, 4, 20)
    scores = to_batch(logits.to(dtype), targets).scores
    for moved in (scores, scores * 0 - 4.595, scores * 1e4, scores * 1e-42, scores * 0):
        found = sort.sort_breakpoints(moved, delta)
        key = found.key
        far = torch.tensor([-layout.LARGEST, -1e4, 1e4, layout.LARGEST, math.nan], dtype=dtype)
        near = [key, key.nextafter(key + 1), key.nextafter(key - 1)]
        given = layout.finite(torch.cat([*near, logits.flatten().to(dtype), far]))
        expected = torch.bucketize(given, key, right=True)
        got = found.look_up(given, None, Workspace())
        assert ((got >= 0) & (got <= key.numel())).all()
        assert torch.equal(got[:-1].long(), expected[:-1])

        values = torch.rand(found.high.numel(), dtype=dtype)
        ordered = given[:-1]
        for known in (False, True):
            told = sort.Steps(found, values)(ordered, None, Workspace(), known)
            assert torch.equal(told, values[expected[:-1]])


@pytest.mark.parametrize("number", [0, 1, RUN - 1, RUN, 5 * RUN, 5 * RUN + 3])
def test_what_is_wanted_is_found_in_every_run(number):
    x = torch.arange(number) * 7 % 331
    for least in (0, 9, 300, 329, 330, 331):
        assert torch.equal(find(x, lambda x, least=least: x >= least), (x >= least).nonzero()[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [0.1, 1e-3, 1.0, 1e9])
@pytest.mark.parametrize("few", [0, sort.SEARCH_BELOW])
def test_breakpoints_stand_in_the_order_of_their_exact_values(few, delta, dtype, monkeypatch):
    """Fractions are exact; many of them differ by less than a float, or not at all."""
    monkeypatch.setattr(sort, "SEARCH_BELOW", few)
    step = Fraction(delta) * 2
    steps = [Fraction(k, 3) for k in range(-9, 10)] + [Fraction(0)] * 2
    scores = torch.tensor([float(step * k) for k in steps], dtype=dtype)
    scores = torch.cat([scores, -scores, scores.nextafter(scores + 1), scores.new_tensor([-0.0])])
    got = sort.sort_breakpoints(scores, delta)
    values = [(Fraction(s) + sign * Fraction(delta)) for sign in (-1, 1) for s in scores.tolist()]
    order = sorted(range(len(values)), key=values.__getitem__)  # stable
    places = torch.empty(len(order), dtype=torch.int64)
    places[order] = torch.arange(1, len(order) + 1)
    assert torch.equal(torch.cat([got.lower, got.upper]), places)
    for place, k in enumerate(order):
        high, low = got.high[place + 1].item(), got.low[place + 1].item()
        assert Fraction(high) + Fraction(low) == values[k]
        key = got.key[place]
        below = key.nextafter(key.new_tensor(-math.inf))
        assert Fraction(key.item()) >= values[k] > Fraction(below.item())


@pytest.mark.parametrize("delta", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_breakpoints_equal_pairwise_over_many_blocks(distribution, delta, monkeypatch):
    """The loop over blocks of a level: 12 000 logits in blocks of 1000, by rows and by places."""
    logits, targets = detector_batch(distribution, 600, 20, 40)
    batch = to_batch(logits.double(), targets, delta)
    row = batch.logits[0].reshape(1, 600, 20).transpose(1, 2)  # one row of 600 places
    values = torch.rand(40, dtype=torch.float64)
    expected = pairwise.count(batch, values)
    (gradient,) = pairwise.gradient(batch, values, -values)
    monkeypatch.setattr(layout, "CHUNK", 1000)
    monkeypatch.setattr(sort, "SEARCH_BELOW", 0)  # so that blocks are looked up in the table
    for module in (pairwise, breakpoints):
        for cut in (batch, batch_of([row], [targets.reshape(1, 600)], delta)):
            got = module.count(cut, values)
            assert all(relative_error(a, b) < 1e-11 for a, b in zip(got, expected, strict=True))
            (got,) = module.gradient(cut, values, -values)
            got = got.transpose(1, 2).reshape(600, 20, 1) if got.shape[0] == 1 else got
            assert relative_error(got, gradient) < 1e-11


@pytest.mark.parametrize("many", [-1.0, 1.0])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("per_logit", [False, True])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_parts_are_the_same_picked_or_whole(distribution, per_logit, grouped, many, monkeypatch):
    """It does not matter how a level is cut, with ignored NaN, 16-bit logits, any last axis."""
    logits, targets = detector_batch(distribution, 600, 20, 40)
    logits = logits.bfloat16().reshape(6, 100, 20).transpose(1, 2)  # (6, 20, 100), not contiguous
    targets = targets.reshape(6, 100)
    logits.masked_fill_((targets == IGNORE)[:, None], math.nan)
    if per_logit:
        marks = torch.where(targets == IGNORE, -1, 0)[:, None].repeat(1, 20, 1)
        rows, places = layout.is_positive(logits, targets, IGNORE).nonzero(as_tuple=True)
        marks[rows, targets[rows, places], places] = 1
        targets = marks
    values = torch.rand(40, dtype=torch.float64)
    groups = []
    if grouped:
        images = torch.arange(6).reshape(6, *[1] * (targets.dim() - 1)).expand_as(targets)
        groups = [torch.where(torch.rand(targets.shape) < 0.1, -images, images)]
    batch = batch_of([logits], [targets], 0.5, groups)
    wide = widen(batch)
    expected = pairwise.count(wide, values)
    (gradient,) = pairwise.gradient(wide, values, -values)
    monkeypatch.setattr(relevant, "MAX_SPARSE_LOGITS", many)
    monkeypatch.setattr(relevant, "SURVEY", 2000)
    monkeypatch.setattr(layout, "CHUNK", 500)
    for compared in (wide, batch):
        got = breakpoints.count(compared, values)
        assert all(relative_error(a, b) < 1e-11 for a, b in zip(got, expected, strict=True))
    assert relative_error(breakpoints.gradient(wide, values, -values)[0], gradient) < 1e-11


@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("many", [-1.0, 1.0])
def test_every_entry_of_the_gradient_is_written(many, delta, monkeypatch):
    """Its memory is not cleared first, and many, few or none of a block may be relevant."""
    logits, targets = detector_batch("mid", 600, 20, 40)
    logits[200:400] = logits[200:400].where(targets[200:400, None] >= 0, -1e4)
    batch = to_batch(logits, targets, delta)
    batch = batch._replace(
        logits=[*batch.logits, torch.full((3, 20, 30), -1e4), torch.empty(0, 20, 30)],
        targets=[*batch.targets, *(torch.full((n, 30), -1) for n in (3, 0))],
    )
    vectors = torch.rand(40), -torch.rand(40)
    expected = pairwise.gradient(batch, *vectors)
    monkeypatch.setattr(relevant, "MAX_SPARSE_LOGITS", many)
    monkeypatch.setattr(relevant, "SURVEY", 2000)
    monkeypatch.setattr(layout, "CHUNK", 500)
    with poisoned():
        got = breakpoints.gradient(batch, *vectors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_many_positives_among_a_million_logits():
    """P = 50 000: most cells hold a breakpoint. Every 5000th positive against pairwise."""
    logits, targets = detector_batch("spread", 100_000, 10, 50_000)
    batch = to_batch(logits, targets)
    wide, scores = widen(batch), batch.scores
    values = torch.rand(scores.numel(), dtype=torch.float64)
    got = breakpoints.count(batch, values)
    sample = torch.arange(0, scores.numel(), 5000)
    expected = pairwise.count(wide.select(sample), values[sample])
    assert relative_error(got[0][sample], expected[0]) < 1e-12
    h = pairwise.step(scores.double() - scores[sample].double()[:, None], 1.0)
    h[torch.arange(sample.numel()), sample] = 0
    assert relative_error(got[1][sample], 1 + h.sum(1)) < 1e-12
    assert relative_error(got[2][sample], h @ values) < 1e-12

    weights = values / got[0]
    (gradient,) = breakpoints.gradient(wide, weights, -values)
    total = gradient.sum() + values.sum()  # of the negatives: each positive passes its value on
    assert abs(total / values.sum() - 1) < 1e-12
    mask = torch.ones_like(batch.logits[0], dtype=torch.bool)
    negative = layout.exclude_non_negatives(mask, batch.targets[0], IGNORE).nonzero()
    for place in negative[::100_003]:
        h = pairwise.step(wide.logits[0][tuple(place)] - scores.double(), 1.0)
        assert relative_error(gradient[tuple(place)], (h * weights).sum()) < 1e-12


@pytest.mark.parametrize("distribution", ["mid", "late"])
def test_memory_beyond_the_gradient_is_that_of_a_part(distribution):
    """Of 8 million logits, 32 MB, count and gradient take at most 24 MB more than the gradient."""
    cpu = torch.device("cpu")
    logits, targets = detector_batch(distribution, 100_000, 80, 1000)
    batch = to_batch(logits, targets)
    values = torch.rand(1000, dtype=torch.float64)
    breakpoints.count(batch, values)  # what torch itself loads at its first call
    peak = peak_memory(lambda: breakpoints.count(batch, values), cpu)
    if peak is None:
        pytest.skip("the system does not tell the peak")
    assert peak < 24 << 20
    peak = peak_memory(lambda: breakpoints.gradient(batch, values, values), cpu)
    assert peak < batch.logits[0].nbytes + (24 << 20)


def test_no_negative_counts_as_exactly_nothing():
    """NFP = 0 must be exact: a residue of rounding would be divided by."""
    scores = torch.tensor([3.0, 3.3, 9.0], dtype=torch.float64)
    levels = [torch.cat([scores, torch.full((50,), 0.1, dtype=torch.float64)]).reshape(-1, 1, 1)]
    targets = [torch.tensor([1] * 3 + [0] * 50).reshape(-1, 1, 1)]
    nfp, rank_positive, value_sum = breakpoints.count(batch_of(levels, targets), torch.rand(3))
    assert (nfp == 0).all()
    assert rank_positive[2] == 1
    assert value_sum[2] == 0


def test_values_may_be_of_either_sign():
    logits, targets = detector_batch("spread", 200, 3, 30)
    batch = to_batch(logits.double(), targets)
    values = torch.randn(30, dtype=torch.float64)
    counted = breakpoints.count(batch, values), pairwise.count(batch, values)
    for got, expected in zip(*counted, strict=True):
        assert (got - expected).abs().max() < 1e-11
    arguments = batch, values, values
    difference = breakpoints.gradient(*arguments)[0] - pairwise.gradient(*arguments)[0]
    assert difference.abs().max() < 1e-11


def test_same_names_and_arguments():
    import inspect

    for name in ("count", "gradient"):
        signatures = [inspect.signature(getattr(m, name)) for m in (pairwise, breakpoints)]
        assert signatures[0] == signatures[1]
