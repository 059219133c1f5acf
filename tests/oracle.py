"""An oracle of the losses: the paper's equations over all pairs, in numpy's long double.

It shares no code with the package and knows no layout: it takes flat scores, where the positives
and the negatives stand among them, and a number for each positive. Beside every number that it
returns stands how far a right implementation may be from it, derived from the roundings that the
implementation makes (`Rounding`) and from nothing else.

Notation as in the paper: s scores, x_ij = s_j - s_i, H the step of half-width delta,

    NFP(i)   = sum_{j in N} H(x_ij)                  rank+(i) = 1 + sum_{k in P, k != i} H(x_ik)
    S(i)     = sum_{k in P, k != i} values(k) H(x_ik)   rank(i) = rank+(i) + NFP(i)
    D(i)     = l(i) - l*(i)                          L        = (1/Z) sum_i l(i)
    dL/ds_i  = -D(i) / Z                             dL/ds_j  = (1/Z) sum_i D(i) p(j|i)

with p(j|i) = H(x_ij) / NFP(i), both only where NFP(i) > 0; skewed, p(j|i) is proportional to
H(x_ij) (x_ij + delta)^skew.

A long double has 64 bits of mantissa on x86. Where it is a double (Windows, macOS on ARM) or
emulated, `OWN` is larger and so are the budgets, and float64 is held to less there.

How budgets are carried on. A sum over pairs may be off by `pair` for each pair on the slope, and by
`sums` relative to the sum of its magnitudes. l and D are fractions that are linear in each of NFP,
rank+ and S, so their extremes over a box of these lie at its corners. W = D / (Z NFP) may be off by
[dD + |D| d / NFP] / (NFP - d). Where d is not small beside NFP (NFP <= 4 d: all negatives above the
positive are at the very foot of its slope), the share of a single negative is undetermined, and
whether there is an update at all; then what the positive lays on its negatives is not compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
REAL = np.longdouble
OWN = float(np.finfo(REAL).eps)
LARGEST = REAL(2) ** 125  # infinite scores, and finite ones beyond, are ranked as this
PAIRS = 1 << 16  # evaluated at once: what a cache holds
SMALLEST = REAL(2) ** -1074  # double
TIED = REAL(2) ** -900  # powers of margins that sum to less are those of ties
DOUBLE = 2.0**-53


class Rounding(NamedTuple):
    """What an implementation rounds; all relative to 1 but for `tiny`."""

    pair: float  # absolute error of one H on its slope
    sums: float  # relative error of a sum over the examples above a positive
    gradient_pair: float  # the same two in the gradient
    gradient_sums: float
    among: float  # absolute error of one H among the positives, where they are sorted
    reach: float  # how far beyond delta, relative to it, H may still be rounded; < 0: not at delta
    value: float  # unit roundoff of the dtype of the values
    last: float  # unit roundoff of the dtype of the gradient by the logits
    tiny: float  # half of the smallest number of that dtype
    by_value: float  # the same two of the gradient by `values`
    tiny_by_value: float


class Flat(NamedTuple):
    """One call, laid out flat."""

    scores: Array  # (n,)
    positives: Array  # (P,) where they stand, in the order of `values`
    negatives: Array  # (M,)
    groups: Array | None  # (n,) integers
    values: Array  # (P,)
    delta: float
    skew: float = 0.0


class Counted(NamedTuple):
    """What an errors function sees; called `Counts` in the package."""

    nfp: Array
    rank_positive: Array
    values: Array
    value_sum: Array
    num_positives: Any

    @property
    def rank(self) -> Array:
        """rank(i)."""
        return self.rank_positive + self.nfp


class Near(NamedTuple):
    """A number, and how far one may be from it."""

    exact: Array
    off: Array


class Expected(NamedTuple):
    """What a loss gives."""

    values: list[Near]
    by_logits: Near  # (n,)
    by_values: Near | None  # (P,), of the localisation errors


ErrorsFn = Callable[[Counted], tuple[Any, Any, Any]]


def ap(c: Counted) -> tuple[Any, Any, Any]:
    """Evaluate AP Loss."""
    return c.nfp / c.rank, 0, c.num_positives


def alrp(c: Counted) -> tuple[Any, Any, Any]:
    """Evaluate aLRP Loss; values are the localisation errors."""
    return (c.nfp + c.values + c.value_sum) / c.rank, c.values / c.rank, c.num_positives


def ndcg(c: Counted) -> tuple[Any, Any, Any]:
    """Evaluate NDCG Loss with binary relevance."""
    gmax = (1 / np.log2(1 + np.arange(1, int(c.num_positives) + 1, dtype=REAL))).sum()
    mean = gmax / c.num_positives
    return mean - 1 / np.log2(1 + c.rank), mean - 1 / np.log2(1 + c.rank_positive), gmax


# --- the losses ---------------------------------------------------------------------------------


def error_driven(flat: Flat, errors_fn: ErrorsFn, by: Rounding, upstream: float = 1.0) -> Expected:
    """Evaluate AP, NDCG or anybody's own."""
    counted = _count(flat, by)
    error, _, normaliser = _errors(counted, errors_fn)
    by_logits = _spread(flat, counted, errors_fn, by, upstream)
    return Expected([_mean(error, normaliser, by)], _written(by_logits, by), None)


def average_lrp(flat: Flat, by: Rounding, upstream: tuple[float, float] = (1.0, 1.0)) -> Expected:
    """Evaluate (cls, loc); the logits' gradient rides on cls, that of the errors on loc."""
    counted = _count(flat, by)
    number = len(flat.positives)
    by_logits = _spread(flat, counted, alrp, by, upstream[0])
    cls = _mean(_at_corners(counted, lambda c: c.nfp / c.rank), number, by)
    error = _at_corners(counted, lambda c: (c.values + c.value_sum) / c.rank)
    # dloc/dEloc(k) = (1/|P|) [1 / rank(k) + sum_{i != k} H(x_ik) / rank(i)]
    inverse = _at_corners(counted, lambda c: 1 / c.rank)
    share = np.zeros(number, REAL)
    off = np.zeros(number, REAL)
    for i, h, slope in _pairs(flat, flat.positives, by):
        h, slope = _without_self(h, i), _without_self(slope, i)
        share += (h * inverse.exact[i, None]).sum(0)
        off += (h * inverse.off[i, None] + slope * by.pair * inverse.exact[i, None]).sum(0)
    exact = inverse.exact + share
    off = inverse.off + off + (by.sums + 16 * DOUBLE) * exact
    scale = abs(upstream[1]) / max(1, number)
    by_values = Near(upstream[1] * exact / max(1, number), off * scale)
    rounding = 2 * by.by_value * np.abs(by_values.exact) + by.tiny_by_value
    by_values = by_values._replace(off=by_values.off + rounding)
    loc = _mean(error, number, by)
    # loc may be written in a wider dtype than cls, or be summed in another order: by shares.
    loc = loc._replace(off=loc.off + (np.abs(flat.values) * off).sum() / max(1, number))
    return Expected([cls, loc], _written(by_logits, by), by_values)


def rank_and_sort(flat: Flat, by: Rounding, upstream: tuple[float, float] = (1.0, 1.0)) -> Expected:
    """Evaluate (ranking, sorting); `values` are the qualities q."""
    quality = flat.values
    flat = flat._replace(values=1 - quality)
    counted = _count(flat, by)
    number = len(flat.positives)
    total = _spread(flat, counted, ap, by, upstream[0])

    # The mean of 1 - q over i and the positives above, less that over those with q_k >= q_i.
    sums = np.zeros((6, number), REAL)  # worse, better, better_values; and what they are off by
    for i, h, slope in _pairs(flat, flat.positives, by):
        h, slope = _without_self(h, i), by.among * _without_self(slope, i)
        worse = quality < quality[i, None]
        for row, x in ((0, h), (3, slope)):
            sums[row, i] = (x * worse).sum(1)
            sums[row + 1, i] = (x * ~worse).sum(1)
            sums[row + 2, i] = (x * ~worse * np.abs(flat.values)).sum(1)
    sums[3:] += number * 2 * DOUBLE * sums[:3]
    worse, better, better_values, d_worse, d_better, d_values = sums
    values = flat.values
    current = _at_corners(counted, lambda c: (c.values + c.value_sum) / c.rank_positive)
    target = (values + better_values) / (1 + better)
    d_target = (d_values + target * d_better) / (1 + better - d_better)
    driven = current.exact - target
    off = current.off + d_target + 16 * DOUBLE * (current.exact + target)

    sorted_by = _weights(Near(driven, off), Near(worse, d_worse), number)
    passed, d_passed = np.zeros((2, number), REAL)
    for i, h, slope in _pairs(flat, flat.positives, by):
        h, slope = _without_self(h, i), _without_self(slope, i)
        lower = quality < quality[i, None]
        passed += (h * lower * sorted_by.weight.exact[i, None]).sum(0)
        d_passed += _laid(h * lower, slope * lower, sorted_by, i, by.among)
    own = passed + sorted_by.own.exact
    d_own = d_passed + sorted_by.own.off + number * 2 * DOUBLE * np.abs(passed)
    total.exact[flat.positives] += upstream[1] * own
    total.off[flat.positives] += abs(upstream[1]) * d_own if upstream[1] else 0
    both = [_mean(_errors(counted, ap)[0], number, by), _mean(current, number, by)]
    return Expected(both, _written(total, by), None)


# --- what they are made of ----------------------------------------------------------------------


class _Counts(NamedTuple):
    """NFP, rank+ and S, and how far each may be off."""

    number: Counted
    off: tuple[Array, Array, Array]
    mass: Near  # what shares are divided by: NFP, or skewed


def _pairs(flat: Flat, others: Array, by: Rounding) -> Iterator[tuple[slice, Array, Array]]:
    """Yield some positives at a time: H(x) with the others, and whether that is on the slope."""
    scores = np.clip(flat.scores.astype(REAL), -LARGEST, LARGEST)
    size = max(1, PAIRS // max(1, len(others)))
    for start in range(0, len(flat.positives), size):
        i = slice(start, min(start + size, len(flat.positives)))
        x = scores[others] - scores[flat.positives[i], None]
        if flat.delta == 0:
            h, slope = (x >= 0).astype(REAL), np.zeros(x.shape, bool)
        else:
            delta = REAL(flat.delta)
            h = np.clip(x / (2 * delta) + REAL(0.5), 0, 1)
            slope = np.abs(x) < delta if by.reach < 0 else np.abs(x) <= delta * (1 + by.reach)
        if flat.groups is not None:
            same = flat.groups[others] == flat.groups[flat.positives[i], None]
            h, slope = h * same, slope & same
        yield i, h, slope


def _margins(flat: Flat, i: slice) -> Array:
    """Return (x + delta)^skew of negatives, where they have a margin."""
    scores = np.clip(flat.scores.astype(REAL), -LARGEST, LARGEST)
    x = scores[flat.negatives] - scores[flat.positives[i], None]
    return np.clip(x + REAL(flat.delta), 0, None) ** REAL(flat.skew)


def _without_self(x: Array, i: slice) -> Array:
    """Return the pairs of positives i with all, k != i."""
    x = x.copy()
    x[np.arange(x.shape[0]), np.arange(i.start, i.stop)] = 0
    return x


def _count(flat: Flat, by: Rounding) -> _Counts:
    number, values = len(flat.positives), flat.values.astype(REAL)
    nfp, rank, total, mass = np.zeros((4, number), REAL)
    d_nfp, d_rank, d_total, d_mass = np.zeros((4, number), REAL)
    for i, h, slope in _pairs(flat, flat.negatives, by):
        nfp[i], d_nfp[i] = h.sum(1), by.pair * slope.sum(1)
        if flat.skew:
            margin = _margins(flat, i)
            mass[i] = (h * margin).sum(1)
            # A margin is off by half a unit of a double, a power by that of its logarithm.
            d_mass[i] = ((by.pair + 4 * DOUBLE) * slope * margin).sum(1)
            d_mass[i] += (1024 * DOUBLE + by.sums) * mass[i]
    for i, h, slope in _pairs(flat, flat.positives, by):
        h, slope = _without_self(h, i), _without_self(slope, i)
        rank[i], d_rank[i] = h.sum(1), by.pair * slope.sum(1)
        total[i] = (h * values).sum(1)
        d_total[i] = by.pair * (slope * np.abs(values)).sum(1)
        d_total[i] += by.sums * ((h * np.abs(values)).sum(1) + np.abs(values[i]))
    d_nfp += by.sums * nfp
    d_rank += by.sums * (1 + rank)
    if not flat.skew:
        mass, d_mass = nfp, d_nfp
    # Where no negative has a margin to speak of (ties under the hard step), all get the same.
    even = mass < TIED
    mass, d_mass = np.where(even, nfp, mass), np.where(even, d_nfp, d_mass)
    counted = Counted(nfp, 1 + rank, values, total, REAL(number))
    return _Counts(counted, (d_nfp, d_rank, d_total), Near(mass, d_mass))


def _at_corners(counted: _Counts, fn: Callable[[Counted], Any]) -> Near:
    """Evaluate a function of the counts, monotone in each.

    With it goes how far it changes within their budgets.
    """
    exact = np.broadcast_to(np.asarray(fn(counted.number), REAL), counted.number.nfp.shape)
    off = np.zeros(exact.shape, REAL)
    for signs in itertools.product((-1, 1), repeat=3):
        nfp, rank, total = (sign * d for sign, d in zip(signs, counted.off, strict=True))
        c = counted.number
        corner = c._replace(
            nfp=np.clip(c.nfp + nfp, 0, None),
            rank_positive=np.clip(c.rank_positive + rank, 1, None),
            value_sum=c.value_sum + total,
        )
        off = np.maximum(off, np.abs(fn(corner) - exact))
    # What an errors function is made of is rounded a few times in float64.
    return Near(exact, off + 16 * DOUBLE * np.abs(exact))


def _errors(counted: _Counts, errors_fn: ErrorsFn) -> tuple[Near, Near, Any]:
    """Return l, D and Z."""
    error = _at_corners(counted, lambda c: errors_fn(c)[0])
    target = _at_corners(counted, lambda c: errors_fn(c)[1])
    driven = _at_corners(counted, lambda c: errors_fn(c)[0] - errors_fn(c)[1])
    # They may cancel: what they are made of is rounded, not their difference.
    made_of = 1 + np.abs(error.exact) + np.abs(target.exact) + np.abs(counted.number.values)
    rounding = 16 * DOUBLE * made_of
    error = error._replace(off=error.off + rounding)
    return error, driven._replace(off=driven.off + rounding), errors_fn(counted.number)[2]


def _mean(error: Near, normaliser: Any, by: Rounding) -> Near:
    """Return L = (1/Z) sum_i l(i); 0 without positives."""
    if not error.exact.size:
        return Near(REAL(0), REAL(0))
    exact = error.exact.sum() / normaliser
    magnitude = np.abs(error.exact).sum() / abs(normaliser)
    off = error.off.sum() / abs(normaliser) + (error.exact.size + 4) * DOUBLE * magnitude
    return Near(exact, off + by.value * (np.abs(exact) + off))


class _Weights(NamedTuple):
    own: Near  # (P,) what a positive gets
    weight: Near  # (P,) what it lays on H = 1
    lost: Array  # (P,) where a share is undetermined


def _weights(driven: Near, above: Near, normaliser: Any) -> _Weights:
    """Return D / Z and D / (Z above), where anything stands above."""
    some = above.exact > 0
    clear = above.exact > 4 * above.off
    lost = ~clear & ((above.exact > 0) | (above.off > 0))
    d = np.where(some, driven.exact, 0) / normaliser
    d_off = np.where(clear, driven.off, 0) / abs(normaliser)
    d_off = np.where(lost, (np.abs(driven.exact) + driven.off) / abs(normaliser), d_off)
    with np.errstate(all="ignore"):
        weight = np.where(clear, d / above.exact, 0)
        off = (d_off + np.abs(d) * above.off / above.exact) / (above.exact - above.off)
    off = np.where(clear, off + 8 * DOUBLE * np.abs(weight), 0)
    return _Weights(Near(-d, d_off), Near(weight, off), lost)


def _laid(h: Array, slope: Array, laid: _Weights, i: slice, pair: float) -> Array:
    """Bound how far the sum of what positives i lay on others may be off."""
    weight, off = laid.weight.exact[i, None], laid.weight.off[i, None]
    total = (h * off + pair * slope * (np.abs(weight) + off)).sum(0)
    reached = ((h > 0) | (slope > 0)) & laid.lost[i, None]
    return np.where(reached.any(0), np.inf, total)


def _spread(
    flat: Flat, counted: _Counts, errors_fn: ErrorsFn, by: Rounding, upstream: float
) -> Near:
    """Return the gradient by the logits, not yet rounded to their dtype."""
    exact, off = np.zeros((2, len(flat.scores)), REAL)
    if not len(flat.positives) or not upstream:
        return Near(exact, off)
    _, driven, normaliser = _errors(counted, errors_fn)
    laid = _weights(driven, counted.mass, normaliser)
    total, d_total, magnitude = np.zeros((3, len(flat.negatives)), REAL)
    for i, h, slope in _pairs(flat, flat.negatives, by):
        margin = 1
        if flat.skew:
            raised = _margins(flat, i)
            even = ~((h * raised).sum(1, keepdims=True) >= TIED)
            margin = np.where(even, 1, raised)
        share = h * margin * laid.weight.exact[i, None]
        total += share.sum(0)
        magnitude += np.abs(share).sum(0)
        pair = by.gradient_pair + (4 * DOUBLE if flat.skew else 0)
        d_total += _laid(h * margin, slope * margin, laid, i, pair)
        if flat.skew:  # a power that is no double is lost
            d_total += (h * SMALLEST * np.abs(laid.weight.exact[i, None])).sum(0)
    relative = by.gradient_sums + (1024 * DOUBLE if flat.skew else 0)
    exact[flat.negatives] = upstream * total
    off[flat.negatives] = abs(upstream) * (d_total + relative * magnitude)
    exact[flat.positives] = upstream * laid.own.exact
    off[flat.positives] = abs(upstream) * (laid.own.off + 8 * DOUBLE * np.abs(laid.own.exact))
    return Near(exact, off)


def _written(given: Near, by: Rounding) -> Near:
    """Round to the dtype of the gradient; where nothing is written, nothing is rounded."""
    off = given.off + by.last * (np.abs(given.exact) + given.off)
    return Near(given.exact, off + by.tiny * ((given.exact != 0) | (given.off > 0)))
