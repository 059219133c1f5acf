"""The kernels of the skewed distribution compile ahead of time, without spills.

See `figures`: `python -m tests.machine_code.test_skewed_compile sm_90`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alrp_triton.reference.layout import Batch
from tests.machine_code.figures import TARGETS, print_figures

pytest.importorskip("triton")

# (logits, targets, targets per logit, delta, groups)
CASES = {
    "float32": ("float32", "int64", False, 1.0, None),
    "bfloat16 in groups": ("bfloat16", "int32", False, 1.0, "int64"),
    "float64 in groups": ("float64", "int8", True, 1.0, "int32"),
    "hard": ("float16", "float32", True, 0.0, None),
}


def _launches(case: str, positives: int = 1000, places: int = 100) -> list:
    from alrp_triton.kernels import skewed
    from perf.machine_code import sass

    logits_dtype, targets_dtype, per_logit, delta, groups_dtype = CASES[case]
    shape = (4, 20, places)
    beside = shape if per_logit else (4, places)
    logits = torch.empty(shape, dtype=getattr(torch, logits_dtype), device="meta")
    targets = torch.empty(beside, dtype=getattr(torch, targets_dtype), device="meta")
    scores = torch.zeros(positives, dtype=torch.promote_types(logits.dtype, torch.float32))
    vector, index = scores.double(), torch.zeros(positives, dtype=torch.int64)
    batch = Batch([logits], [targets], index, scores, delta, -100)
    if groups_dtype:
        image = torch.empty(beside, dtype=getattr(torch, groups_dtype), device="meta")
        batch = batch._replace(groups=[image], positive_groups=index)
    with sass.record() as launches:
        skewed.mass(batch, vector)
        skewed.gradient(batch, vector, vector, vector)
    return launches


def _figures(target: str) -> dict[str, Any]:
    from perf.machine_code import sass

    torch.manual_seed(0)
    spills = {}
    for case in CASES:
        for launch in _launches(case):
            code = sass.compile_launch(launch, target)
            spills[f"{launch.kernel.fn.__name__} {case}"] = code.spills
    seen = {
        (launch.kernel.fn.__name__, sass.variant(launch, target))
        for positives, places in torch.randint(1, 5000, (20, 2)).tolist()
        for launch in _launches("float32", positives, places)
    }
    return {"spills": spills, "variants": len(seen)}


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills_and_once(target: str, compiled: dict) -> None:
    figures = compiled[target]
    assert len(figures["spills"]) == 3 * len(CASES)  # with the kernel that writes own
    assert not any(figures["spills"].values())
    assert figures["variants"] == 3  # over 20 random sizes


if __name__ == "__main__":
    print_figures(_figures)
