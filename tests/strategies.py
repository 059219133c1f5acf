"""One strategy for what a loss may be called with; every backend is given the same.

Hypothesis draws a `Description`: a handful of words and numbers that say what the call is like,
which it can shrink and print. `build` makes the tensors of it, from a seed where there are many.
A description that has failed can be pasted into `build` as it was printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from oracle import Flat
from torch import Tensor

from alrp_triton.reference.layout import LARGEST_DELTA, SMALLEST_DELTA

IGNORE = -100
LOSSES = ("alrp", "ap", "ndcg", "rank_sort", "own")
SKEWED = ("ap", "ndcg", "own")  # p(j|i) may be
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {torch.float32: np.int32, torch.float64: np.int64}

# What the scores of the positives, or of the negatives, are like.
KINDS = (
    "palette",  # few values, drawn one by one, again and again
    "bits",  # any bit pattern, over all exponents
    "ties",  # three values of any mantissa
    "normal",  # all mantissas
    "prior",  # a head at its initialisation: its bias, and almost nothing else
    "equal",  # one value of any mantissa
    "steps",  # exactly delta apart, as far as the dtype allows, and the neighbours of those
    "outlier",  # normal, but for one
    "high",  # 5,000 and more
    "subnormal",
    "huge",  # up to 2^125 and beyond
    "above",  # well above what is normal, as late in a training
    "below",
)
LAYOUTS = ("plain", "transposed", "channels_last", "sliced", "offset", "expanded")
SPECIAL = (
    0.0, -0.0, math.inf, -math.inf, 2.0**125, -(2.0**125), 2.0**125 * (1 - 2.0**-24), 2.0**126,
    -(2.0**127), 1e-45, -1e-45, 2.0**-126, 1.5, -4.6, 5000.0, 65504.0, -65504.0, 1.0, -1.0, 3e38,
)  # fmt: skip

# Sizes at which the code takes another way: numbers of logits, then of positives. `lowered` has
# those that no small case reaches.
SIZES = {
    "block_maxima.RUN, rank_sort._LANES": 1 << 6,
    "count_block, kernels' sort._SORTED, skewed._LANES": 1 << 7,
    "kernels' sort._CELLS, rank_sort._SURVEYED": 1 << 8,
    "scan._STRETCH, a tile": 1 << 9,
    "positives._BLOCK": 1 << 10,
    "sort.SEARCH_BELOW": 1 << 14,
    "sort.CELLS": 1 << 16,
    "layout.CHUNK, sort.CELLS * SCORES_PER_CELL": 1 << 18,
    "relevant.SURVEY": 1 << 21,
}


@dataclass(frozen=True)
class Level:
    """One feature level."""

    shape: tuple[int, ...]  # of the logits
    per_logit: bool  # targets 1 / 0 / -1 for each, or else class indices
    layout: str


@dataclass(frozen=True)
class Description:
    """What a call is like."""

    loss: str
    dtype: torch.dtype
    delta: float
    skew: float
    levels: tuple[Level, ...]
    seed: int
    positives: str  # "none", "one", "two", "few", "many" or "all"
    positive_kind: str
    negative_kind: str
    palette: tuple[float, ...]
    infinite: str  # where an infinite score is put: "", "positive", "negative", "lonely"
    ignored: float  # share of the anchors
    groups: int  # how many at most; 0: none are given
    per_image: bool  # groups are those of images, and broadcast
    padding: int | None  # None: `positives` is not given
    values_dtype: torch.dtype
    upstream: tuple[float, float]
    nan: str = ""  # "positive", "negative" or "ignored"


@dataclass
class Case:
    """The arguments of a call, and the same laid out flat."""

    described: Description
    logits: list[Tensor]
    targets: list[Tensor]
    groups: list[Tensor] | None
    positives: Tensor | None
    values: Tensor  # padded as `positives` is
    valid: np.ndarray  # where it is not padding
    flat: Flat
    ignored: np.ndarray  # (n,) bool


# --- descriptions -------------------------------------------------------------------------------


def any_float(bits: int = 32) -> st.SearchStrategy[float]:
    """Draw every bit pattern as likely as any other; NaN is none of them."""
    unsigned, real = (np.uint32, np.float32) if bits == 32 else (np.uint64, np.float64)

    def read(pattern: int) -> float:
        return float(np.array(pattern, unsigned).view(real))

    return st.integers(0, 2**bits - 1).map(read).filter(lambda x: not math.isnan(x))


def deltas() -> st.SearchStrategy[float]:
    """Draw mostly what people use, both ends of what is allowed, and any number between."""
    return st.one_of(
        st.just(0.0),
        st.sampled_from([1.0, 0.5, 0.1, 1e-3]),
        st.sampled_from([SMALLEST_DELTA, 2.0**-30, 3e-6, 7.3, 4096.0, LARGEST_DELTA]),
        st.floats(SMALLEST_DELTA, LARGEST_DELTA),
    )


@st.composite
def palettes(draw, delta: float) -> tuple[float, ...]:
    """Draw up to six scores, some of them so many deltas from another."""
    drawn = draw(
        st.lists(
            st.one_of(st.floats(-8, 8), st.sampled_from(SPECIAL), any_float(), any_float(64)),
            min_size=1,
            max_size=4,
        )
    )
    steps = draw(st.lists(st.integers(-3, 3), max_size=2))
    return (*drawn, *(drawn[0] + step * delta for step in steps))


@st.composite
def levels_of(draw, most: int) -> Level:
    """Draw a level of at most so many logits, or about."""
    dims = draw(st.integers(1, 4))
    layout = draw(st.sampled_from(LAYOUTS))
    shape = [draw(st.integers(1, most))]
    if dims > 1:
        shape.append(draw(st.integers(1, 4)))
    for _ in range(dims - 2):
        shape.append(draw(st.integers(1, 4)))
    shape[0] = max(1, shape[0] // math.prod(shape[1:]))
    if draw(st.sampled_from([False] * 9 + [True])):  # one without any logit
        shape[-1 if dims > 2 else 0] = 0
    return Level(tuple(shape), dims == 1 or draw(st.booleans()), layout)


@st.composite
def levels_of_size(draw, size: int) -> list[Level]:
    """Draw one level of so many logits, or a few less; sometimes two."""
    cut = draw(st.sampled_from([0, 0, 0, 1, size // 3]))
    layouts = st.sampled_from(LAYOUTS[:-1])
    classes = draw(st.integers(1, 3))
    level = Level(((size - cut) // classes, classes), draw(st.booleans()), draw(layouts))
    return [Level((cut,), True, draw(layouts)), level] if cut else [level]


@st.composite
def descriptions(
    draw,
    most: int = 40,
    sizes: Sequence[int] = (),
    losses: Sequence[str] = LOSSES,
    nan: bool = False,
) -> Description:
    """Draw what a call may be like.

    Args:
        most: logits of a level, if no `sizes` are given.
        sizes: of which the number of logits is one, or next to it; with few positives, mostly
            under the hard step, and no skew.
        losses: of which it is one.
        nan: whether there is a NaN among the logits; else there is none.
    """
    loss, delta = draw(st.sampled_from(losses)), draw(deltas())
    if sizes:
        size = draw(st.sampled_from(sizes))
        size += draw(st.sampled_from([-1, 0, 1, size // 5]))
        levels = draw(levels_of_size(size))
    else:
        levels = draw(st.lists(levels_of(most), min_size=1, max_size=3))
    # What is empty or has no positive is soon seen through, so most cases are neither.
    numbers = ("one", "few", "many", "two", "few", "many", "all", "few", "many", "none")
    kinds = st.sampled_from(KINDS)
    skews = (0.0, 0.0, 0.5, 1.0, 2.0, 4.0)
    if sizes:  # in which most scores are within reach of the positives, who are few
        numbers, skews = ("one", "one", "two", "few"), (0.0,)
        delta = draw(st.sampled_from([0.0, delta]))
        kinds = st.one_of(kinds, st.sampled_from(("normal", "prior", "equal", "high", "steps")))
    positive_kind = draw(kinds)
    padded = draw(st.booleans())
    return Description(
        loss=loss,
        dtype=draw(st.sampled_from(DTYPES)),
        delta=delta,
        skew=draw(st.sampled_from(skews)) if loss in SKEWED else 0.0,
        levels=tuple(levels),
        seed=draw(st.integers(0, 2**32 - 1)),
        positives=draw(st.sampled_from(numbers)),
        positive_kind=positive_kind,
        negative_kind=draw(st.one_of(st.just(positive_kind), kinds)),
        palette=draw(palettes(delta)),
        infinite=draw(st.sampled_from(["", "", "positive", "negative", "lonely"])),
        ignored=draw(st.sampled_from([0.0, 0.1, 0.5])),
        groups=draw(st.sampled_from([0, 0, 1, 2, 5, 1000])),
        per_image=draw(st.booleans()),
        padding=draw(st.integers(0, 5)) if padded else None,
        values_dtype=draw(st.sampled_from(DTYPES)),
        upstream=draw(
            st.tuples(*[st.sampled_from([1.0, 1.0, -0.5, 0.0, 3.0, 2.0**16, 2.0**-20])] * 2)
        ),
        nan=draw(st.sampled_from(["positive", "negative", "ignored"])) if nan else "",
    )  # fmt: skip


# --- tensors ------------------------------------------------------------------------------------


def build(described: Description, device: str = "cpu") -> Case:
    """Make the tensors of a description."""
    rng = np.random.default_rng(described.seed)
    shapes = [level.shape for level in described.levels]
    marks = _marks(described, rng)
    targets = [
        _targets(level, mark, rng) for level, mark in zip(described.levels, marks, strict=True)
    ]
    groups = _groups(described, targets, rng)
    flat_groups = _flat_groups(described, targets, groups)
    scores = _scores(described, np.concatenate([m.ravel() for m in marks]), flat_groups, rng)
    ends = np.cumsum([0] + [math.prod(shape) for shape in shapes])
    logits = [
        _lay_out(scores[start:end].reshape(shape), level.layout).to(device)
        for level, shape, start, end in zip(
            described.levels, shapes, ends[:-1], ends[1:], strict=True
        )
    ]
    # Laying out may have made one of several values: what counts is what stands there now.
    read = [level.double().cpu().numpy().reshape(-1) for level in logits]
    return _finish(described, logits, targets, marks, groups, flat_groups, np.concatenate(read),
                   rng, device)  # fmt: skip


def _marks(described: Description, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw 1 / 0 / -1 of each logit. Under class indices an anchor has one positive at most."""
    places = []  # (level, index of the anchor or logit)
    marks = []
    for number, level in enumerate(described.levels):
        marks.append(np.zeros(level.shape, np.int64))
        shape = level.shape if level.per_logit else (level.shape[0], *level.shape[2:])
        ignored = rng.random(shape) < described.ignored
        if level.per_logit:
            marks[-1][ignored] = -1
        else:
            np.moveaxis(marks[-1], 1, -1)[ignored] = -1
        if math.prod(level.shape):
            places += [(number, at) for at in map(tuple, np.argwhere(~ignored))] if (
                ignored.size < 1 << 12
            ) else [
                (number, np.unravel_index(at, shape))
                for at in rng.choice(np.flatnonzero(~ignored), 200, replace=False)
            ]  # fmt: skip
    count = {
        "none": 0, "one": 1, "two": 2, "few": int(rng.integers(3, 25)),
        "many": len(places) // 2, "all": len(places),
    }[described.positives]  # fmt: skip
    for chosen in rng.permutation(len(places))[:count]:
        number, at = places[chosen]
        level = described.levels[number]
        if not level.per_logit:
            at = (at[0], int(rng.integers(level.shape[1])), *at[1:])
        marks[number][at] = 1
    return marks


def _targets(level: Level, marks: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Return the targets as the loss is given them."""
    if level.per_logit:
        dtype = [torch.int64, torch.int8, torch.float32][int(rng.integers(3))]
        return torch.from_numpy(marks.copy()).to(dtype)
    classes = level.shape[1]
    background = rng.choice([-1, classes, 100], marks[:, 0].shape)
    targets = np.where((marks == 1).any(1), (marks == 1).argmax(1), background)
    targets = np.where((marks == -1).all(1), IGNORE, targets)
    dtype = [torch.int64, torch.int32, torch.int8][int(rng.integers(3))]
    return torch.from_numpy(targets).to(dtype)


def _groups(
    described: Description, targets: Sequence[Tensor], rng: np.random.Generator
) -> list[Tensor] | None:
    """Draw integers that broadcast to the targets."""
    if not described.groups:
        return None
    names = rng.integers(-described.groups, described.groups, described.groups)
    if rng.random() < 0.3:
        names = names * (1 << 40)
    groups = []
    for target in targets:
        shape = tuple(target.shape)
        if described.per_image and shape:
            shape = (shape[0], *[1] * (len(shape) - 1))
        groups.append(torch.from_numpy(rng.choice(names, shape)))
    return groups


def _flat_groups(
    described: Description, targets: Sequence[Tensor], groups: list[Tensor] | None
) -> np.ndarray | None:
    """Return the group of each logit."""
    if groups is None:
        return None
    parts = []
    for level, target, group in zip(described.levels, targets, groups, strict=True):
        of_target = np.broadcast_to(group.numpy(), tuple(target.shape))
        if not level.per_logit:
            of_target = np.broadcast_to(np.expand_dims(of_target, 1), level.shape)
        parts.append(of_target.ravel())
    return np.concatenate(parts)


def _scores(
    described: Description,
    marks: np.ndarray,
    groups: np.ndarray | None,
    rng: np.random.Generator,
) -> Tensor:
    """Draw (n,) in the dtype of the logits. Scores that are ignored are anything, NaN too."""
    dtype, n = described.dtype, marks.size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    positive = _of_kind(described.positive_kind, n, wide, described, rng)
    negative = _of_kind(described.negative_kind, n, wide, described, rng)
    scores = np.where(marks == 1, positive, negative)
    junk = rng.choice([np.nan, np.inf, 0.0, 1e4], n)
    scores = np.where(marks == -1, junk, scores)

    sign = rng.choice([1.0, 1.0, -1.0])
    if described.infinite in ("positive", "negative"):
        at = np.flatnonzero(marks == (1 if described.infinite == "positive" else 0))
        scores[rng.permutation(at)[: int(rng.integers(1, 3))]] = sign * np.inf
    if described.infinite == "lonely":  # where no positive of the same group stands
        at = marks == 0
        if groups is not None:
            at &= ~np.isin(groups, groups[marks == 1])
        scores[rng.permutation(np.flatnonzero(at))[:1]] = np.inf
    if described.nan:
        mark = {"positive": 1, "negative": 0, "ignored": -1}[described.nan]
        scores[rng.permutation(np.flatnonzero(marks == mark))[:1]] = np.nan
    return torch.from_numpy(scores).to(dtype)


def _of_kind(
    kind: str, n: int, dtype: torch.dtype, described: Description, rng: np.random.Generator
) -> np.ndarray:
    """Draw n scores of a kind, in float32 or float64."""
    real = np.float64 if dtype == torch.float64 else np.float32
    info = np.finfo(real)
    normal = rng.standard_normal(n).astype(real)
    # The same for positives and negatives, so that they tie where both are of a kind.
    shared = np.random.default_rng((described.seed, 1))
    base = real(2 * shared.standard_normal())
    with np.errstate(all="ignore"):
        if kind == "palette":
            return rng.choice(np.array(described.palette, np.float64), n).astype(real)
        if kind == "bits":
            bits = rng.integers(0, 1 << info.bits, n, np.uint64, endpoint=False)
            scores = bits.astype(f"u{info.bits // 8}").view(real)
            return np.where(np.isnan(scores), base, scores)
        if kind == "prior":
            prior = shared.choice([0.005, 0.01, 0.02])
            bias = real(math.log(prior / (1 - prior)))
            return bias + real(shared.choice([0, 1e-7, 1e-2])) * normal
        if kind == "equal":
            return np.full(n, base)
        if kind == "ties":
            return rng.choice((base + shared.standard_normal(3)).astype(real), n)
        if kind == "steps":
            scores = (base + rng.integers(-3, 4, n) * described.delta).astype(real)
            beside = np.nextafter(scores, real(shared.choice([-1, 1]) * np.inf))
            return np.where(rng.random(n) < 0.3, beside, scores)
        if kind == "outlier":
            normal[rng.integers(0, n, 1) if n else slice(0)] = rng.choice([1e6, -1e6, 1e30, np.inf])
            return normal
        if kind == "high":
            return (real(shared.choice([5e3, -5e3, 2e4, 1e6])) + normal).astype(real)
        if kind == "subnormal":
            return rng.integers(-9, 10, n).astype(real) * info.smallest_subnormal
        if kind == "huge":
            exponent = rng.uniform(118, 127.99, n)
            return (rng.choice([-1, 1], n) * np.exp2(exponent)).astype(real)
        shift = {"above": 9, "below": -9}.get(kind, 0)
        return (real(1.5) * normal + real(shift)).astype(real)


def _lay_out(scores: Tensor, layout: str) -> Tensor:
    """Lay out the same shape, and mostly the same values, otherwise in memory."""
    if layout == "transposed" and scores.dim() > 1:
        return scores.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and scores.dim() == 4:
        return scores.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = scores.new_full((*scores.shape[:-1], 2 * scores.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = scores
        return wide[..., 1::2]
    if layout == "offset":
        memory = scores.new_full((scores.numel() + 3,), torch.nan)
        memory[3:] = scores.reshape(-1)
        return memory[3:].view(scores.shape)
    if layout == "expanded" and scores.numel():
        return scores[:1].nan_to_num(0.5, math.inf, -math.inf).expand(scores.shape)
    return scores.clone()


def _finish(
    described: Description,
    logits: list[Tensor],
    targets: list[Tensor],
    marks: list[np.ndarray],
    groups: list[Tensor] | None,
    flat_groups: np.ndarray | None,
    scores: np.ndarray,
    rng: np.random.Generator,
    device: str,
) -> Case:
    flat_marks = np.concatenate([mark.ravel() for mark in marks])
    # The positives in the order in which they stand in the targets, and where that is.
    places, stand, first_logit, first_target = [], [], 0, 0
    for level, mark, target in zip(described.levels, marks, targets, strict=True):
        at = np.arange(mark.size).reshape(mark.shape)
        if not level.per_logit:
            mark, at = np.moveaxis(mark, 1, -1), np.moveaxis(at, 1, -1)
        places.append(at[mark == 1] + first_logit)
        anchors = mark == 1 if level.per_logit else (mark == 1).any(-1)
        stand.append(np.flatnonzero(anchors) + first_target)
        first_logit, first_target = first_logit + mark.size, first_target + target.numel()
    order, stand = np.concatenate(places), np.concatenate(stand)

    values = rng.random(order.size)
    if rng.random() < 0.5:
        values = np.round(4 * values) / 4  # ties, 0 and 1
    values = torch.from_numpy(values).to(described.values_dtype)
    positives, valid = None, np.ones(order.size, bool)
    if described.padding is not None:
        turned = rng.permutation(order.size)  # in any order
        order, stand, values = order[turned], stand[turned], values[turned]
        size = order.size + described.padding
        place = np.sort(rng.permutation(size)[: order.size])
        valid = np.isin(np.arange(size), place)
        positives = torch.full((size,), -1)
        positives[place] = torch.from_numpy(stand)
        junk = torch.from_numpy(rng.choice([np.nan, np.inf, -np.inf, 0.0, 7.0], size))
        padded = junk.to(values.dtype)
        padded[place] = values
        values = padded
    flat = Flat(
        scores=scores,
        positives=order,
        negatives=np.flatnonzero(flat_marks == 0),
        groups=flat_groups,
        values=values.double().numpy()[valid].astype(np.longdouble),
        delta=described.delta,
        skew=described.skew,
    )
    return Case(
        described,
        logits,
        [target.to(device) for target in targets],
        None if groups is None else [group.to(device) for group in groups],
        None if positives is None else positives.to(device),
        values.to(device),
        valid,
        flat,
        flat_marks == -1,
    )
