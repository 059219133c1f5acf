"""The fit of what the algorithms cost: on times whose prices are known, and on a CPU."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from alrp_triton.kernels import breakpoints
from alrp_triton.kernels.tuning import files as tuned
from alrp_triton.kernels.tuning.costs import BreakpointCosts, Costs, PairwiseCosts
from perf.autotune import fit_costs as cost_model
from perf.autotune.fit_costs import CALLS, Call, Timed, fit, least_squares, quality

CPU = torch.device("cpu")
TRUE = Costs(PairwiseCosts(3e-5, 1e-12, 2e-13, 1e-12), BreakpointCosts(1e-4, 8e-12, 3e-9))
SIZES = [call for call in CALLS if call.dtype == "float32"]


def timed(costs, noise=0.0, seed=0):
    """Return every call timed with both algorithms, off by a log-normal noise."""
    random = np.random.default_rng(seed)

    def seconds(prices, call):
        return prices.seconds(call.positives, call.logits) * np.exp(noise * random.normal())

    return [
        Timed(x, {name: seconds(prices, x) for name, prices in costs._asdict().items()}, {})
        for x in SIZES
    ]


def crossover(costs, logits):
    """Return the fewest positives with which breakpoints are taken."""
    few, many = 0, 1 << 17
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if costs.choose(middle, logits) == "pairwise" else (few, middle)
    return many


def test_known_prices_are_found():
    found = fit(timed(TRUE))
    for prices, true in zip(found, TRUE, strict=True):
        assert prices == pytest.approx(true, rel=1e-6)
    judged = quality(found, timed(TRUE))
    assert judged.slower == 0
    assert judged.lost == judged.most_lost == 0
    assert judged.calls == len(SIZES)
    assert max(judged.worst_ratio.values()) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(10))
def test_crossovers_are_found_through_noise(seed):
    """A fit averages: what it predicts is off by less than three deviations of a single time.

    So where it takes both algorithms to be equal, they are, to twice as much; between the sizes
    that were timed, too.
    """
    noise = 0.03
    found = fit(timed(TRUE, noise, seed))
    assert all(price >= 0 for prices in found for price in prices)
    exact = quality(found, timed(TRUE))
    assert max(exact.worst_ratio.values()) < np.exp(3 * noise)
    assert exact.most_lost < np.exp(6 * noise) - 1
    for logits in (48_000, 200_000, 1_000_000, 4_000_000, 20_950_000):
        call = crossover(found, logits), logits
        ratio = TRUE.pairwise.seconds(*call) / TRUE.breakpoints.seconds(*call)
        assert abs(np.log(ratio)) < 6 * noise


def test_no_price_is_below_zero():
    """The unconstrained least squares would take less than nothing for a call."""
    terms = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    seconds = np.array([0.5, 1.5, 2.5])
    prices = least_squares(terms, seconds)
    assert prices[0] == 0
    shares = terms[:, 1] / seconds
    assert prices[1] == pytest.approx(shares.sum() / (shares**2).sum())


def test_nothing_nearby_is_better():
    """The prices are a minimum, within the bounds, of what is to be least."""
    random = np.random.default_rng(0)
    for _ in range(20):
        terms, seconds = random.uniform(0.1, 1, (8, 3)), random.uniform(0.1, 1, 8)
        prices = least_squares(terms, seconds)

        def error(prices, terms=terms, seconds=seconds):
            return np.linalg.norm(terms @ prices / seconds - 1)

        assert (prices >= 0).all()
        for _ in range(50):
            other = np.maximum(prices + 0.01 * random.normal(size=3), 0)
            assert error(other) >= error(prices) - 1e-12


def test_a_price_that_nothing_has_costs_nothing():
    costs = Costs(TRUE.pairwise._replace(own_pair=0.0), TRUE.breakpoints._replace(positive=0.0))
    found = fit(timed(costs))
    calls = (1000, 20_950_000), (10, 48_000)
    for call in calls:
        assert found.pairwise.seconds(*call) == pytest.approx(costs.pairwise.seconds(*call))
        assert found.breakpoints.seconds(*call) == pytest.approx(costs.breakpoints.seconds(*call))


def test_fewer_times_than_prices_are_no_fit():
    assert fit(timed(TRUE)[:3]) is None
    assert fit([x._replace(seconds={"pairwise": 1.0}) for x in timed(TRUE)]) is None
    assert fit([]) is None


def test_the_first_calls_tell_every_price():
    """Whatever is cut for time, what was measured is of use."""
    found = fit(timed(TRUE)[:5])
    for prices, true in zip(found, TRUE, strict=True):
        assert prices == pytest.approx(true, rel=1e-4)


def test_what_the_rule_loses_is_counted():
    call = SIZES[0]
    always = Costs(PairwiseCosts(1.0, 0, 0, 0), BreakpointCosts(2.0, 0, 0))
    times = [
        Timed(call, {"pairwise": 3.0, "breakpoints": 2.0}, {}),
        Timed(call, {"pairwise": 1.0, "breakpoints": 2.0}, {}),
        Timed(call, {"breakpoints": 2.0}, {"pairwise": "two runs differ"}),
    ]
    judged = quality(always, times)
    assert (judged.calls, judged.slower) == (2, 1)
    assert judged.lost == pytest.approx(0.25)
    assert judged.most_lost == pytest.approx(0.5)
    assert judged.worst_ratio == {"pairwise": 3.0, "breakpoints": 1.0}


# --- the times ----------------------------------------------------------------------------------


CALL = Call("float32", 5, 80, "spread")


def time_one(call, until=None):
    defaults = tuned.defaults_for(CPU, torch.float32)._asdict()
    until = time.monotonic() + 60 if until is None else until
    return cost_model.time_calls([call], lambda call: defaults, CPU, until, progress=False)


@pytest.mark.slow
def test_both_algorithms_are_held_to_the_truth_and_timed(monkeypatch):
    right = breakpoints.count

    def wrong(*arguments):
        nfp, *rest = right(*arguments)
        return nfp * 1.001, *rest

    (both,) = time_one(CALL)
    assert set(both.seconds) == {"pairwise", "breakpoints"}
    assert min(both.seconds.values()) > 0
    monkeypatch.setattr(breakpoints, "count", wrong)
    monkeypatch.setattr(cost_model, "_MOST_PAIRS", 300)
    (none,) = time_one(CALL)
    assert none.seconds == {}  # too many pairs, and refused
    assert "times its budget" in none.refused["breakpoints"]
    assert time_one(CALL, until=0.0) == []


@pytest.mark.slow
def test_every_call_shows_an_error():
    """Those that can be drawn here: a call without a negative near a positive would be no check."""
    for call in dict.fromkeys((*CALLS, *cost_model.REHEARSED_CALLS)):
        if call.logits <= 50_000:
            dtype = cost_model.DTYPE_OF[call.dtype]
            size = call.positives, call.logits, call.stage
            cost_model.Verifier(cost_model.draw_call(*size, dtype, CPU))
