"""Sizes and offsets beyond 32 bits: strided on any machine, in full on a GPU with the memory."""

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


def test_skewed_offsets_beyond_32_bits() -> None:
    """Rows 2^30 elements apart give the bits of rows side by side; what lies between is untouched.

    The other kernels: `test_kernels`, `test_locate`.
    """
    skewed = importlib.import_module("alrp_triton.kernels.skewed")
    near = torch.randn(3, 3, 5).to(DEVICE, torch.bfloat16)
    storage = torch.empty((1 << 31) + 64, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((3, 3, 5), ((1 << 30) + 8, 5, 1))
    far.copy_(near)
    targets = torch.tensor([[0, -1, 2, -1, IGNORE]] * 3, device=DEVICE)
    index, scores = locate([near], [targets], None, 6, True, IGNORE)
    vector = torch.arange(1, 7, dtype=torch.float64, device=DEVICE)
    powers = torch.full_like(vector, 1.5)
    counted, gradients = [], []
    for level in (near, far):
        levels = [level], [targets]
        counted.append(skewed.mass(*levels, scores, powers, 1.0, IGNORE))
        given = index, scores, vector, -vector, powers
        gradients += skewed.gradient(*levels, *given, 1.0, IGNORE)
    assert counted[0].min() > 0
    assert torch.equal(*counted)
    assert torch.equal(*gradients)
