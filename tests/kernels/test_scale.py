"""Sizes and offsets beyond 32 bits: strided on any machine, in full on a GPU with the memory."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from alrp_triton.reference.breakpoints import sort as reference
from alrp_triton.reference.layout import Batch
from alrp_triton.testing.cases import Size, draw_case, verify
from alrp_triton.testing.kernel_tolerance import IGNORE

pytest.importorskip("triton")
locate = importlib.import_module("alrp_triton.kernels.positives").locate

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
    batch = Batch([logits], [targets], index, scores, 0.0, IGNORE)
    nfp, rank_positive, _ = kernels.count(batch, weights)
    assert nfp.tolist() == [9, 9]
    assert rank_positive.tolist() == [2, 2]
    (gradient,) = kernels.gradient(batch, weights, -weights)
    assert gradient[[0, -1]].flatten().tolist() == [-0.5, -0.25]
    assert (gradient[-10:-1] == 0.75).all()
    assert int(gradient.count_nonzero()) == 11


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_thousand_positives(dtype: torch.dtype) -> None:
    """The tables have 100,000 breakpoints; the truth is the reference's, not every pair."""
    case = draw_case(Size(50_000, 40, 50_000), "mid", dtype, DEVICE)
    kernels = importlib.import_module("alrp_triton.kernels.breakpoints.ranks")
    assert verify(case, kernels)["ok"]


def test_breakpoints_of_fifty_thousand_positives() -> None:
    """Those of the reference, bit by bit."""
    sort = importlib.import_module("alrp_triton.kernels.breakpoints.sort")
    scores = (1.5 * torch.randn(50_000) - 1).to(DEVICE)
    got, expected = sort.sort_breakpoints(scores, 1.0), reference.sort_breakpoints(scores, 1.0)
    assert torch.equal(got.keys[:100_000], expected.key)
    assert torch.equal(
        got.ranks[:2, got.order.argsort()] + 1, torch.stack([expected.lower, expected.upper]).int()
    )


# 86 million logits are a global batch of 16 images of 1344 x 800 px (ATSS).
_LARGE_CALL = """
from pathlib import Path
import torch
from alrp_triton import alrp_loss

def peak():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return 1024 * int(line.split()[1])

torch.manual_seed(0)
logits = torch.empty(1_075_000, 80)
for part in logits.split(50_000):
    part.normal_(-7, 1.5)
targets = torch.full((1_075_000,), -1, dtype=torch.int32)
anchors = torch.arange(0, 1_075_000, 1075)
targets[anchors] = 7
logits[anchors, 7] += 6
alrp_loss(logits[:20_000].clone().requires_grad_(), targets[:20_000], torch.rand(19))[0].backward()
logits.requires_grad_()
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
before = peak()
cls, loc = alrp_loss(logits, targets, torch.rand(1000))
forward = peak() - before
cls.backward()
print(forward, peak() - before - 4 * logits.numel(), logits.grad.abs().sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_86_million_logits_on_a_cpu() -> None:
    """Peak memory beyond logits and gradient is at most 2 % of the logits and 32 MB."""
    command = [sys.executable, "-c", _LARGE_CALL]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    forward, both, total = (float(x) for x in done.stdout.split())
    allowed = 0.02 * 4 * 86_000_000 + (32 << 20)
    assert forward <= allowed
    assert both <= allowed
    assert 0.1 < total < 2  # of positives and negatives, which are half of it each


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
        batch = Batch([level], [targets], index, scores, 1.0, IGNORE)
        counted.append(skewed.mass(batch, powers))
        gradients += skewed.gradient(batch, vector, -vector, powers)
    assert counted[0].min() > 0
    assert torch.equal(*counted)
    assert torch.equal(*gradients)
