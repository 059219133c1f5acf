"""Every loss on every road, held to the oracle over generated cases (`generated`, `strategies`).

How many is up to the profile (`conftest`): "fast" takes about a minute and the same cases each
time, "ci" minutes, "long" an hour or more. For hours of ever new cases there is
`python -m tests.generated` (docs/generated-tests.md).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from conftest import HAS_GPU, PROFILE
from generated import DEVICE, KINDS_OF_CASES, ROADS, check, hold
from strategies import Description, Level, build

from alrp_triton import backend

# Examples of a test: a case takes a second or more in the interpreter, 0.05 s in torch.
SCALE = {"fast": 1, "ci": 4, "long": 100}[PROFILE]
IN_TORCH = {"small": 80, "lowered": 90, "nan": 40, "sizes": 40}
IN_INTERPRETER = {"small": 4, "lowered": 3, "nan": 2}
ON_A_GPU = {**IN_TORCH, "small sizes": 20}


def runs() -> list[tuple[tuple[str, str], str, int]]:
    """Return (road, kind of cases, how many) of each test."""
    kernels = ON_A_GPU if HAS_GPU else IN_INTERPRETER
    return [
        (road, kind, number * SCALE)
        for road in ROADS
        for kind, number in (IN_TORCH if road[0] == "torch" else kernels).items()
    ]


@pytest.mark.generated
@pytest.mark.parametrize(
    ("road", "kind", "number"),
    runs(),
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else str(x),
)
def test_every_loss_is_what_the_oracle_says(road: tuple[str, str], kind: str, number: int) -> None:
    if road[0] == "triton" and not (HAS_GPU or backend._INTERPRETS):
        pytest.skip("needs Triton")
    hold(road, KINDS_OF_CASES[kind], number)


# --- what has failed once ------------------------------------------------------------------------

_FIVE = Description(
    loss="ap", dtype=torch.float32, delta=1.0, skew=0.0, levels=(Level((5,), True, "plain"),),
    seed=1, positives="one", positive_kind="normal", negative_kind="normal", palette=(0.0,),
    infinite="lonely", ignored=0.0, groups=2, per_image=False, padding=None,
    values_dtype=torch.float32, upstream=(1.0, 1.0),
)  # fmt: skip
ONCE_FAILED = {
    "inf in a group without positives": _FIVE,
    "inf in group 0, which has padding alone": replace(_FIVE, loss="alrp", padding=2),
    "inf, and all positives are padding": replace(
        _FIVE, seed=0, positives="none", groups=0, padding=2
    ),
    "cells end at the only positive": replace(
        _FIVE, loss="alrp", delta=0.0, levels=(Level((16384, 1), False, "plain"),),
        positive_kind="bits", negative_kind="bits", infinite="", groups=1,
    ),
    "one positive, NaN": replace(
        _FIVE, levels=(Level((1,), True, "plain"),), infinite="", groups=0, nan="positive"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ONCE_FAILED)
@pytest.mark.parametrize("road", ROADS, ids=" ".join)
def test_what_failed_once_holds(road: tuple[str, str], name: str) -> None:
    if road[0] == "triton" and not (HAS_GPU or backend._INTERPRETS):
        pytest.skip("needs Triton")
    described = ONCE_FAILED[name]
    if road[0] == "triton" and not HAS_GPU and described.levels[0].shape[0] > 1 << 10:
        pytest.skip("takes minutes in the interpreter")
    check(described, *road)


# --- the oracle and the strategy themselves ------------------------------------------------------


def test_the_oracle_gives_the_figures_of_the_paper() -> None:
    """Fig. 1: aLRP of three rankings of one and the same boxes, and AP of all of them."""
    exact = oracle.Rounding(*[0.0] * len(oracle.Rounding._fields))
    for iou, expected in (
        ((0.95, 0.80, 0.65, 0.50), 0.53),
        ((0.80, 0.65, 0.50, 0.95), 0.6925),
        ((0.50, 0.65, 0.80, 0.95), 0.8925),
    ):
        flat = oracle.Flat(
            scores=np.arange(10, 0, -1) / 10,
            positives=np.array([0, 2, 5, 9]),
            negatives=np.array([1, 3, 4, 6, 7, 8]),
            groups=None,
            values=(1 - np.array(iou, np.longdouble)) / 0.5,
            delta=0.0,
        )
        cls, loc = (float(value.exact) for value in oracle.average_lrp(flat, exact).values)
        assert abs(cls + loc - expected) < 5e-5  # as printed there
        assert abs(cls - 0.358) < 5e-4
        by_logits = oracle.error_driven(flat, oracle.ap, exact).by_logits.exact
        assert abs(by_logits.sum()) < 1e-15  # Theorem 2


def test_what_a_description_says_is_built() -> None:
    """Levels of all layouts, positives in the order of the targets, padding, groups."""
    described = Description(
        loss="alrp", dtype=torch.float16, delta=1.0, skew=0.0,
        levels=(Level((4, 3, 2, 2), False, "channels_last"), Level((5,), True, "sliced"),
                Level((0, 2), False, "plain"), Level((6, 2), False, "transposed")),
        seed=3, positives="many", positive_kind="palette", negative_kind="bits", palette=(1e30,),
        infinite="", ignored=0.1, groups=2, per_image=True, padding=3,
        values_dtype=torch.float32, upstream=(1.0, 1.0),
    )  # fmt: skip
    case = build(described, DEVICE)
    assert [level.shape for level in case.logits] == [level.shape for level in described.levels]
    assert case.logits[0].is_contiguous(memory_format=torch.channels_last)
    assert case.logits[1].stride() == (2,)
    assert case.logits[3].stride() == (1, 6)
    number = case.flat.positives.size
    assert case.values.numel() == case.positives.numel() == number + 3
    assert (case.flat.scores[case.flat.positives] == np.inf).all()  # 1e30 as float16
    marks = [
        target.eq(1) if level.per_logit else target.ge(0) & target.lt(level.shape[1])
        for level, target in zip(described.levels, case.targets, strict=True)
    ]
    stand = torch.cat([mark.reshape(-1) for mark in marks]).nonzero()[:, 0].tolist()
    assert sorted(case.positives.cpu().numpy()[case.valid]) == stand
    assert len(set(case.flat.positives)) == number
