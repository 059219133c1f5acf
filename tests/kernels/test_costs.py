"""Which algorithm "auto" takes on a GPU."""

from __future__ import annotations

import pytest
import torch

from alrp_triton import backend
from alrp_triton.kernels.tuning.costs import BreakpointCosts, Costs, PairwiseCosts, default_costs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_pairs_are_evaluated_and_many_are_looked_up(dtype):
    costs = default_costs(dtype)
    assert costs.choose(10, 50_000) == "pairwise"
    assert costs.choose(1, 20_951_040) == "pairwise"
    assert costs.choose(1000, 20_951_040) == "breakpoints"
    assert costs.choose(50_000, 1_000_000) == "breakpoints"


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_positives_never_turn_the_choice_back(dtype):
    costs = default_costs(dtype)
    for logits in (0, 48_000, 1_000_000, 20_951_040, 1 << 31):
        chosen = [costs.choose(1 << power, logits) for power in range(17)]
        assert chosen == sorted(chosen, reverse=True)  # pairwise first, then breakpoints


def test_the_cheaper_one_is_taken():
    costs = Costs(PairwiseCosts(1.0, 0.5, 1.0, 4.0), BreakpointCosts(3.0, 1.0, 1.0))
    assert costs.pairwise.seconds(2, 10) == 1 + 5 + 20 + 16
    assert costs.breakpoints.seconds(2, 10) == 3 + 10 + 2
    assert costs.choose(1, 0) == "breakpoints"  # 3 + 1, against 1 + 4 of the positive with itself
    assert costs.choose(2, 10) == "breakpoints"
    dearer = costs._replace(breakpoints=BreakpointCosts(5.0, 1.0, 1.0))
    assert dearer.choose(1, 0) == "pairwise"


def test_padding_counts_as_positives():
    """How many of them are padding is known to the device alone."""
    pytest.importorskip("triton")
    levels = [torch.empty(1, device="meta").expand(4, 80, 65_000)]
    for capacity, name in ((4, "pairwise"), (2000, "breakpoints")):
        scores = torch.full((capacity,), -torch.inf)
        kernels = backend.select("triton", "auto", levels, scores)
        assert kernels.__name__.endswith(name)
