"""More logits than 32 bits can count, on a GPU with the memory; the same code at a toy size."""

from __future__ import annotations

import importlib

import pytest
import torch

from perf.budgets import IGNORE

pytest.importorskip("triton")
locate = importlib.import_module("alrp_triton.kernels.locate").locate

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
MEMORY = 20 << 30  # logits, gradient and targets take 11 GB, comparing them some more


@pytest.mark.parametrize("algorithm", ["pairwise", "breakpoints"])
@pytest.mark.parametrize("number", [1017, pytest.param(2**31 + 17, marks=pytest.mark.gpu)])
def test_counts_and_gradients_are_known(number: int, algorithm: str) -> None:
    """The first and the last logit are positives; nine negatives of the end stand above them."""
    if number > 1 << 31 and torch.cuda.mem_get_info()[0] < MEMORY:
        pytest.skip("needs 20 GiB of free memory")
    kernels = importlib.import_module(f"alrp_triton.kernels.{algorithm}")
    logits = torch.full((number, 1, 1), -4.0, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.full((number, 1), -1, dtype=torch.int8, device=DEVICE)
    logits[[0, -1]] = 1.0
    targets[[0, -1]] = 0
    logits[-10:-1] = 2.0
    index, scores = locate([logits], [targets], None, 2, True, IGNORE)
    assert index.tolist() == [0, number - 1]
    assert scores.tolist() == [1.0, 1.0]
    weights = torch.tensor([0.5, 0.25], dtype=torch.float64, device=DEVICE)
    levels = [logits], [targets]
    nfp, rank_positive, _ = kernels.count(*levels, scores, weights, 0.0, IGNORE)
    assert nfp.tolist() == [9, 9]
    assert rank_positive.tolist() == [2, 2]
    (gradient,) = kernels.gradient(*levels, index, scores, weights, -weights, 0.0, IGNORE)
    assert gradient[[0, -1]].flatten().tolist() == [-0.5, -0.25]
    assert (gradient[-10:-1] == 0.75).all()
    assert int(gradient.count_nonzero()) == 11
