"""Every positive with every other one, for Rank & Sort: `reference/rank_sort.py` in Triton.

Notation: positives i, k with scores s and qualities q; x_ik = s_k - s_i; H the step of half-width
delta. A program takes `NUMBER` positives and walks over all others, `LANES` at a time, so that a
pair lives in registers only. H is evaluated in the scores' dtype and summed in float64, always in
the same order: results repeat bit by bit. Nothing waits for the device: where the padding begins,
and whether there is a NaN, is found out there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.layout import Batch
from .language import bits_of, jit, real

_NUMBER = 4  # positives of a program
_LANES = 64  # others that they meet at once: a thread has 8 pairs on NVIDIA, 4 on AMD
_SURVEYED = 256  # positives of a program that looks for padding and NaN


@triton.jit
def _step(upper, lower, scale, HARD: tl.constexpr):
    """Return H(upper - lower), broadcast together, in float64. NaN stays."""
    x = upper - lower
    if HARD:
        h = tl.where(upper >= lower, 1.0, 0.0).to(x.dtype)
    else:
        h = tl.minimum(tl.maximum(tl.fma(x, scale, 0.5), 0.0), 1.0)
    return tl.where(x == x, h, x).to(tl.float64)


@triton.jit
def _read(scores, quality, groups, places, end, padding: tl.constexpr):
    """Read score (`padding` if there is none), quality and group of positives, and which exist."""
    inside = places < end
    s = tl.load(scores + places, mask=inside, other=float("-inf"))
    valid = s != float("-inf")
    q = tl.load(quality + places, mask=inside, other=0.0)
    group = tl.zeros(places.shape, tl.int64)
    if groups is not None:
        group = tl.load(groups + places, mask=inside, other=0)
    return tl.where(valid, s, float(padding)), q, group, valid


@jit
def _survey_kernel(
    scores,  # (P,) finite, or NaN; -inf for padding
    quality,  # (P,) float64
    found,  # (2,) int32, 0: becomes 1 + the last place that is not padding, and whether NaN occurs
    positives,
    LANES: tl.constexpr,
):
    """Find what a program has to know of all positives before it meets them."""
    i = tl.cast(tl.program_id(0), tl.int64) * LANES + tl.arange(0, LANES)
    s, q, _, valid = _read(scores, quality, None, i, positives, "-inf")
    nan = valid & ((s != s) | (q != q))
    tl.atomic_max(found, tl.max(tl.where(valid, i + 1, 0), 0).to(tl.int32), sem="relaxed")
    tl.atomic_max(found + 1, tl.max(nan.to(tl.int32), 0), sem="relaxed")


@jit
def _count_kernel(
    scores,  # (P,), as in `_survey_kernel`
    quality,  # (P,) float64
    values,  # (P,) float64
    groups,  # (P,) int64, or None
    found,  # (2,)
    worse,  # (P,) float64, out; so are the next two
    better,
    better_values,
    positives,
    scale_bits: tl.int64,
    HARD: tl.constexpr,
    NUMBER: tl.constexpr,
    LANES: tl.constexpr,
):
    """Count what `NUMBER` positives i see above themselves, of lower quality and not."""
    i = tl.cast(tl.program_id(0), tl.int64) * NUMBER + tl.arange(0, NUMBER)
    s_i, q_i, group_i, valid = _read(scores, quality, groups, i, positives, "inf")
    scale = real(scale_bits, s_i.dtype)

    # 1. The others k, in the order of memory.
    sum_worse = tl.zeros((NUMBER, LANES), tl.float64)
    sum_better = tl.zeros((NUMBER, LANES), tl.float64)
    sum_values = tl.zeros((NUMBER, LANES), tl.float64)
    end = tl.load(found) * tl.max(valid.to(tl.int32), 0)
    for first in range(0, end, LANES):
        k = tl.cast(first, tl.int64) + tl.arange(0, LANES)
        s_k, q_k, group_k, there = _read(scores, quality, groups, k, end, "-inf")
        value = tl.load(values + k, mask=there, other=0.0)
        h = _step(s_k[None, :], s_i[:, None], scale, HARD)
        h = tl.where(k[None, :] == i[:, None], 0.0, h)
        if groups is not None:
            h = tl.where(group_k[None, :] == group_i[:, None], h, 0.0)
        lower = q_k[None, :] < q_i[:, None]
        sum_worse += tl.where(lower, h, 0.0)
        h = tl.where(lower, 0.0, h)
        sum_better += h
        sum_values += h * value[None, :]

    # 2. A NaN leaves no number standing; padding has none.
    nan = tl.where(tl.load(found + 1) > 0, float("nan"), 0.0)
    mask = i < positives
    tl.store(worse + i, tl.where(valid, tl.sum(sum_worse, 1) + nan, 0.0), mask=mask)
    tl.store(better + i, tl.where(valid, tl.sum(sum_better, 1) + nan, 0.0), mask=mask)
    tl.store(better_values + i, tl.where(valid, tl.sum(sum_values, 1) + nan, 0.0), mask=mask)


@jit
def _gradient_kernel(
    scores,  # (P,), as in `_survey_kernel`
    quality,  # (P,) float64
    weights,  # (P,) float64
    groups,  # (P,) int64, or None
    found,  # (2,)
    out,  # (P,) float64
    positives,
    scale_bits: tl.int64,
    HARD: tl.constexpr,
    NUMBER: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write sum_{i: q_k < q_i} weights(i) H(x_ik) of `NUMBER` positives k."""
    k = tl.cast(tl.program_id(0), tl.int64) * NUMBER + tl.arange(0, NUMBER)
    s_k, q_k, group_k, valid = _read(scores, quality, groups, k, positives, "-inf")
    scale = real(scale_bits, s_k.dtype)
    total = tl.zeros((NUMBER, LANES), tl.float64)
    end = tl.load(found) * tl.max(valid.to(tl.int32), 0)
    for first in range(0, end, LANES):
        i = tl.cast(first, tl.int64) + tl.arange(0, LANES)
        s_i, q_i, group_i, there = _read(scores, quality, groups, i, end, "inf")
        weight = tl.load(weights + i, mask=there, other=0.0)
        h = _step(s_k[:, None], s_i[None, :], scale, HARD)
        if groups is not None:
            h = tl.where((group_i[None, :] == group_k[:, None]) | (h != h), h, 0.0)
        total += tl.where(q_k[:, None] < q_i[None, :], h, 0.0) * weight[None, :]
    tl.store(out + k, tl.where(valid, tl.sum(total, 1), 0.0), mask=k < positives)


def count(batch: Batch, quality: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what stands above each positive, as `reference.rank_sort.count`; with padding, if any.

    Args:
        batch: its scores are -inf for padding, anywhere.
        quality, values: as there.

    Returns:
        Three (P,) float64 tensors; 0 for padding. A NaN score or quality makes all others NaN.
    """
    scores = batch.scores
    worse, better, better_values = (torch.empty_like(scores, dtype=torch.float64) for _ in range(3))
    if scores.numel():
        with torch.cuda.device_of(scores):
            _count_kernel[(triton.cdiv(scores.numel(), _NUMBER),)](
                values=values.contiguous(),
                worse=worse,
                better=better,
                better_values=better_values,
                **_prepare(batch, quality),
            )
    return worse, better, better_values


def gradient(batch: Batch, quality: Tensor, weights: Tensor) -> Tensor:
    """Return what each positive is laid on, as `reference.rank_sort.gradient`; padded or not.

    Args:
        batch: as in `count`.
        quality, weights: as there.

    Returns:
        (P,) float64; 0 for padding.
    """
    scores = batch.scores
    out = torch.empty_like(scores, dtype=torch.float64)
    if scores.numel():
        with torch.cuda.device_of(scores):
            _gradient_kernel[(triton.cdiv(scores.numel(), _NUMBER),)](
                weights=weights.contiguous(), out=out, **_prepare(batch, quality)
            )
    return out


def _prepare(batch: Batch, quality: Tensor) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    scores, delta, groups = batch.scores, batch.delta, batch.positive_groups
    positives = {
        "scores": scores.contiguous(),
        "quality": quality.contiguous(),
        "found": torch.zeros(2, dtype=torch.int32, device=scores.device),
        "positives": scores.numel(),
    }
    _survey_kernel[(triton.cdiv(scores.numel(), _SURVEYED),)](
        LANES=_SURVEYED, num_warps=1, **positives
    )
    # A scale that overflowed would make 0 x inf of a tie.
    scale = min(0.5 / delta, torch.finfo(scores.dtype).max) if delta else 1.0
    return {
        **positives,
        "groups": None if groups is None else groups.contiguous(),
        "scale_bits": bits_of(scale),
        "HARD": delta == 0,
        "NUMBER": _NUMBER,
        "LANES": _LANES,
        "num_warps": 1,
    }
