"""Generated cases held to the oracle: what `test_generated` runs, and for hours by hand.

    python -m tests.generated --minutes 120 --seed 7 --out generated.json

A case is drawn by `strategies`, run on one of the four roads (algorithm and backend), and its
values and gradients are compared entry by entry with what `oracle` gives, to within what the road
rounds. What each of them rounds is written down in `rounding_of` and derived there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from alrp_triton import backend

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does
import hypothesis
import numpy as np
import oracle
import pytest
import torch
from conftest import HAS_GPU  # first: it decides whether kernels are interpreted
from hypothesis import given, seed, settings
from hypothesis.errors import HypothesisException
from oracle import DOUBLE, Expected, Rounding
from strategies import SIZES, Case, Description, build, descriptions
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, error_driven_loss, ndcg_loss, rank_sort_loss
from alrp_triton.loss_terms import ndcg_errors

DEVICE = "cuda" if HAS_GPU else "cpu"
ROADS = (
    ("torch", "pairwise"),
    ("torch", "breakpoints"),
    ("triton", "pairwise"),
    ("triton", "breakpoints"),
)

# Sizes in the code, by module, that are lowered so that small cases lie on both sides of them.
LOWERED: dict[str, dict[str, tuple[Any, ...]]] = {
    "alrp_triton.reference.breakpoints.sort": {
        "SEARCH_BELOW": (1, 24),
        "CELLS": (16, 64),
        "FEWEST_CELLS": (8, 64),
        "SCORES_PER_CELL": (1, 4),
    },
    "alrp_triton.reference.breakpoints.ranks": {"MOST_IN_LANES": (0, 8), "LANES": (2, 4)},
    "alrp_triton.reference.layout": {"CHUNK": (1, 7, 64)},
    "alrp_triton.reference.breakpoints.relevant": {
        "SURVEY": (1, 16, 100),
        "MAX_SPARSE_RUNS": (0.0, 0.25, 1.0),
        "MAX_SPARSE_LOGITS": (0.0, 0.05, 1.0),
    },
    "alrp_triton.reference.breakpoints.segments": {"TABLE": (0, 16)},
    "alrp_triton.reference.pairwise": {"PAIRS": (1, 10)},
    "alrp_triton.kernels.breakpoints.sort": {
        "_SORTED": (4,),
        "_CELLS": (16,),
        "_MOST_CELLS": (16,),
    },
    "alrp_triton.kernels.positives": {"_BLOCK": (4,), "_STRETCHES": (1, 2)},
    "alrp_triton.kernels.breakpoints.dense": {"_PIECE": (1, 9)},
    "alrp_triton.kernels.breakpoints.scan": {"_STRETCH": (4,), "_BEFORE": (2,)},
    "alrp_triton.kernels.skewed": {"_LANES": (8,), "_PROGRAMS": (1, 4)},
    "alrp_triton.kernels.rank_sort": {"_LANES": (8,), "_SURVEYED": (4,)},
}


@contextmanager
def lowered(number: int, backend: str) -> Iterator[None]:
    """Lower the sizes of a backend, chosen by a number."""
    rng = np.random.default_rng(number)
    with pytest.MonkeyPatch.context() as patch:
        for module, names in LOWERED.items():
            if ("kernels" in module) == (backend == "triton"):
                for name, choices in names.items():
                    patch.setattr(f"{module}.{name}", choices[int(rng.integers(len(choices)))])
        yield


def rounding_of(case: Case, impl: str, algorithm: str) -> Rounding:
    """Bound what a road rounds.

    u is half a unit of the dtype in which scores are compared, w that of a double, P and N are the
    numbers of positives and negatives, h an H on its slope.

    pairwise, torch     x = s_j - s_i rounds by u, x / (2 delta) by u and by another for 2 delta in
                        the dtype, the sum with 1/2 by u / 2; |x / (2 delta)| <= 1/2: 2u, and second
                        order: 3u. Sums are of doubles.
    pairwise, triton    as well; or, where |s_i| / (2 delta) <= 4 in a block, 1/2 - s_i / (2 delta)
                        is rounded to the dtype: 4u more, and scale by u: 6u. Sums run in the dtype
                        over 64 terms at most (32 tiles or positives, 4 rows, 5 for 32 lanes), then
                        in doubles.
    breakpoints, torch  an edge is exact, a place in an interval is rounded to w of 2 delta, and
                        so is each of up to 2P intervals of a window. What is summed from above
                        is what lies above i: no more than P windows of no more than NFP(i) each,
                        over 2P intervals, and N places: P (2P + N) w relative.
    breakpoints, triton the same; and a place is rounded to the dtype (u for the difference, u for
                        the scale, u for their product) and then to 2^-24 or, of float64, to 2^-60
                        of 2 delta. The gradient is a value and a slope, both rounded to the dtype,
                        and a product and sum: 6u.

    With skew every pair is evaluated, and what is counted may be counted either way.

    H at x = +-delta is exact along breakpoints, and in torch where delta is a number of the dtype.
    """
    wide = torch.float64 if case.described.dtype == torch.float64 else torch.float32
    u = torch.finfo(wide).eps / 2
    exact_delta = float(torch.tensor(case.described.delta, dtype=wide)) == case.described.delta
    p, n = case.flat.positives.size, case.flat.negatives.size
    reach = 32 * u
    doubles = (p + 1) * (4 * p + n + 16) * DOUBLE
    if algorithm == "breakpoints" and not case.described.skew:
        pair, sums, reach = (2 * p + 8) * DOUBLE, doubles, -1.0
        gradient_pair, gradient_sums = pair, doubles
        if impl == "triton":
            pair += 4 * u + (2.0**-60 if wide == torch.float64 else 2.0**-25)
            gradient_sums += 6 * u
    elif impl == "torch":
        pair = gradient_pair = 3 * u
        sums, gradient_sums = (n + p + 8) * DOUBLE, (p + 8) * DOUBLE
        reach = -1.0 if exact_delta else reach
    else:
        pair = gradient_pair = 6 * u
        sums = gradient_sums = 64 * u + (n + p + 8) * DOUBLE
    if case.described.skew:
        pair, sums = pair + (2 * p + 8) * DOUBLE, sums + doubles
    info, of_values = (torch.finfo(x) for x in (case.described.dtype, case.described.values_dtype))
    # By way of float32; and the interpreter cuts off where a GPU rounds to bfloat16.
    cut = 2 if impl == "triton" and case.described.dtype == torch.bfloat16 else 1
    # The sorting, and what it multiplies, take H as pairwise does.
    among = 3 * u if impl == "torch" else 6 * u
    if case.described.loss == "rank_sort" and not (impl == "torch" and exact_delta):
        reach = max(reach, 32 * u)
    return Rounding(
        pair=pair + 4 * oracle.OWN,
        sums=sums,
        gradient_pair=gradient_pair + 4 * oracle.OWN,
        gradient_sums=gradient_sums,
        among=among + 4 * oracle.OWN,
        reach=reach,
        value=u,
        last=cut * info.eps / 2 + u,
        tiny=cut * info.smallest_normal * info.eps / 2 * 1.01,
        by_value=of_values.eps / 2,
        tiny_by_value=of_values.smallest_normal * of_values.eps / 2 * 1.01,
    )


# --- a call, and what it should give ------------------------------------------------------------


def own_errors(counts: Any) -> tuple[Any, Any, Any]:
    """Return l, D and Z of a loss nobody has thought of, in torch or numpy.

    They are linear over the same, so that D is too.
    """
    low = counts.rank + 3
    error = (2 * counts.nfp + counts.values) / low
    return error, counts.value_sum / low, 2 * counts.num_positives + 1


class Result(NamedTuple):
    """What a loss gave."""

    values: list[Tensor]
    by_logits: list[Tensor]
    by_values: Tensor | None


def call(case: Case, impl: str, algorithm: str) -> Result:
    """Call the loss that is described, forward and backward."""
    leaves = [level.detach().requires_grad_() for level in case.logits]
    given: Any = leaves if len(leaves) > 1 else leaves[0]
    targets: Any = case.targets if len(leaves) > 1 else case.targets[0]
    groups: Any = case.groups
    if groups is not None and len(leaves) == 1:
        groups = groups[0]
    described = case.described
    keywords = {"positives": case.positives, "groups": groups, "impl": impl}
    # A skewed distribution evaluates every pair, whatever counts: "breakpoints" is refused.
    skewed = described.skew and algorithm == "breakpoints"
    keywords["algorithm"] = "auto" if skewed else algorithm
    values = case.values.detach().clone()
    if described.loss == "alrp":
        values.requires_grad_()
        got = alrp_loss(given, targets, values, described.delta, **keywords)
    elif described.loss == "rank_sort":
        got = rank_sort_loss(given, targets, values, described.delta, **keywords)
    elif described.skew or described.loss == "own":
        errors_fn = {"ap": _ap_errors, "ndcg": ndcg_errors, "own": own_errors}[described.loss]
        keywords["skew"] = described.skew
        got = (error_driven_loss(given, targets, errors_fn, values, described.delta, **keywords),)
    else:
        loss = {"ap": ap_loss, "ndcg": ndcg_loss}[described.loss]
        got = (loss(given, targets, described.delta, **keywords),)
    inputs = [*leaves, *([values] if values.requires_grad else [])]
    # An upstream gradient of stride 0, as `sum().backward()` passes on.
    upstream = [
        value.new_tensor([factor]).expand(2)[0]
        for value, factor in zip(got, described.upstream, strict=False)
    ]
    gradients = torch.autograd.grad(list(got), inputs, upstream)
    by_values = gradients[len(leaves)] if values.requires_grad else None
    return Result(list(got), list(gradients[: len(leaves)]), by_values)


def _ap_errors(counts: Any) -> tuple[Any, Any, Any]:
    return counts.nfp / counts.rank, 0.0, counts.num_positives


def expect(case: Case, rounding: Rounding) -> Expected:
    """Return what the oracle makes of a call."""
    described = case.described
    with np.errstate(all="ignore"):
        if described.loss == "alrp":
            return oracle.average_lrp(case.flat, rounding, described.upstream)
        if described.loss == "rank_sort":
            return oracle.rank_and_sort(case.flat, rounding, described.upstream)
        errors_fn = {"ap": oracle.ap, "ndcg": oracle.ndcg, "own": own_errors}[described.loss]
        return oracle.error_driven(case.flat, errors_fn, rounding, described.upstream[0])


def check(described: Description, impl: str, algorithm: str) -> None:
    """Hold a call to the oracle."""
    case = build(described, DEVICE)
    before = [level.clone() for level in case.logits]
    result = call(case, impl, algorithm)
    for level, copy in zip(case.logits, before, strict=True):
        torch.testing.assert_close(level, copy, rtol=0, atol=0, equal_nan=True)  # never written to
    for level, by_level in zip(case.logits, result.by_logits, strict=True):
        assert by_level.shape == level.shape
        assert by_level.dtype == level.dtype
    by_logits = np.concatenate([_flat(x) for x in result.by_logits])
    assert (by_logits[case.ignored] == 0).all(), "an ignored logit has a gradient"
    if not case.flat.positives.size:
        assert all(value.item() == 0 for value in result.values)
        assert (by_logits == 0).all()
        return
    if np.isnan(np.delete(case.flat.scores, np.flatnonzero(case.ignored))).any():
        values = [value.item() for value in result.values]
        assert np.isnan(values).all(), f"one of the logits is NaN, and the loss is {values}"
        own = by_logits[case.flat.positives]
        assert np.isnan(own).all(), f"one of the logits is NaN, and the positives get {own}"
        return
    expected = expect(case, rounding_of(case, impl, algorithm))
    for number, (value, near) in enumerate(zip(result.values, expected.values, strict=True)):
        _compare(f"value {number}", np.array([value.item()]), near)
    _compare("gradient by the logits", by_logits, expected.by_logits)
    if expected.by_values is not None:
        by_values = _flat(result.by_values)
        assert (by_values[~case.valid] == 0).all(), "padding has a gradient"
        _compare("gradient by loc_errors", by_values[case.valid], expected.by_values)


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy().reshape(-1)


def _compare(name: str, got: np.ndarray, near: oracle.Near) -> None:
    exact, off = np.broadcast_arrays(np.atleast_1d(near.exact), np.atleast_1d(near.off))
    # What is beyond the largest number of its dtype is written as infinite; a share that is
    # undetermined is at least a number.
    overflowed = np.isinf(got) & (np.abs(exact) + off > 65504)
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(got - exact) <= off) & ~overflowed
    wrong |= np.isinf(off) & ~np.isfinite(got)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise AssertionError(
            f"{name}, {int(wrong.sum())} of {wrong.size} entries, the first at {at}: "
            f"expected {float(exact[at])!r} within {float(off[at]):.3g}, got {float(got[at])!r}"
        )


# --- many calls ---------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of cases."""

    drawn: dict[str, Any]  # arguments of `descriptions`
    in_torch: int  # how many in a round by hand
    in_triton: int
    lowers: bool = False  # whether sizes in the code are lowered


_SIZES = list(SIZES.values())
KINDS_OF_CASES = {
    "small": Kind({}, 300, 20),
    "lowered": Kind({"most": 60}, 400, 16, lowers=True),
    "nan": Kind({"nan": True}, 60, 6),
    "sizes": Kind({"sizes": [*3 * _SIZES[5:6], _SIZES[6]]}, 200, 0),
    "small sizes": Kind({"sizes": _SIZES[:5]}, 20, 4),
    "large sizes": Kind({"sizes": _SIZES[-2:-1]}, 5, 0),
    "largest sizes": Kind({"sizes": _SIZES[-1:]}, 1, 0),
}


def hold(
    road: tuple[str, str],
    kind: Kind,
    number: int,
    wanted: Callable[[Description], bool] = lambda _: True,
    number_of_seed: int | None = None,
) -> None:
    """Hold so many drawn calls of a kind to the oracle, on a road.

    Args:
        road: backend and algorithm.
        kind: what is drawn.
        number: how many calls.
        wanted: is asked before each call, and may decline it.
        number_of_seed: where the drawing begins, if not where the profile says.
    """

    @settings(max_examples=number)
    @given(descriptions(**kind.drawn))
    def held(described: Description) -> None:
        if not wanted(described):
            return
        with lowered(described.seed, road[0]) if kind.lowers else nullcontext():
            check(described, *road)

    if number_of_seed is not None:
        held = seed(number_of_seed)(held)
    held()


# --- by hand ------------------------------------------------------------------------------------


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.generated", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the record goes, as JSON")
    parser.add_argument("--impl", choices=("torch", "triton"), help="only this backend")
    options = parser.parse_args()
    if not 0 < options.minutes < 1e6:
        parser.error("--minutes: expected a positive number")
    if options.out is not None:
        try:
            options.out.touch()
        except OSError as error:
            parser.error(f"--out: expected a file that can be written, got {error}")
    record = run(options.minutes, options.seed, options.impl)
    text = json.dumps(record, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    sys.exit(1 if record["failures"] else 0)


def run(minutes: float, first_seed: int, impl: str | None = None) -> dict[str, Any]:
    """Run round after round over all roads and kinds of cases, until the time is up."""
    start = time.monotonic()
    end, number = start + 60 * minutes, first_seed
    cases: dict[str, int] = {}
    failures: list[dict[str, Any]] = []
    while time.monotonic() < end:
        for road, (name, kind) in itertools.product(ROADS, KINDS_OF_CASES.items()):
            runs = impl in (None, road[0]) and (
                road[0] == "torch" or HAS_GPU or backend._INTERPRETS
            )
            examples = kind.in_torch if road[0] == "torch" or HAS_GPU else kind.in_triton
            if runs and examples and time.monotonic() < end:
                _round(road, name, number, examples, end, cases, failures)
        number += 1
    return {
        "command": " ".join(["python -m tests.generated", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton") if backend._HAS_TRITON else None,
            "numpy": np.__version__,
            "hypothesis": hypothesis.__version__,
        },
        "device": torch.cuda.get_device_name() if HAS_GPU else f"CPU, {platform.machine()}",
        "bits of a long double": 1 - round(float(np.log2(oracle.OWN))),
        "seeds": [first_seed, number - 1],
        "cases": cases,
        "total": sum(cases.values()),
        "failures": failures,
    }


def _round(
    road: tuple[str, str],
    kind: str,
    number: int,
    examples: int,
    end: float,
    cases: dict[str, int],
    failures: list[dict[str, Any]],
) -> None:
    """Draw calls of one kind on one road, from a seed; shrink, record and print a failure."""
    name = " ".join([*road, kind])
    last: list[Description] = []

    def wanted(described: Description) -> bool:
        if time.monotonic() > end:
            return False
        last[:] = [described]
        cases[name] = cases.get(name, 0) + 1
        return True

    try:
        hold(road, KINDS_OF_CASES[kind], examples, wanted, number_of_seed=number)
    except HypothesisException:  # nothing that the package has done
        raise
    except Exception as error:
        message = "".join(traceback.format_exception_only(error)).strip()[:1000]
        described = repr(last[0]) if last else ""
        failures.append({"cases": name, "seed": number, "description": described, "error": message})
        print(json.dumps(failures[-1], indent=2), file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
