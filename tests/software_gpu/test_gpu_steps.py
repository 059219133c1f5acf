"""The steps of perf.gpu on a CUDA device whose kernels do nothing: wrong results, but no exception.

What only CUDA has is walked here and in no rehearsal: Triton's JIT and launcher, streams, events,
captures, the caching allocator, torch's checks of synchronisation.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from perf.software_gpu import build, runtime

ROOT = Path(__file__).parents[2]
STEPS = (
    "launches", "first rates", "beside focal", "profiles", "first captures",
    "synchronisations", "graph", "memory", "timings", "variants",
)  # fmt: skip
SCRIPT = f"""
import json, pathlib, warnings
import torch
from perf.bench import parity, variants
from perf.gpu import context, runner, steps

def nothing(inputs):  # torch's loops may not end on numbers that nobody computed
    return parity.Truth(0.0, 1, torch.zeros_like(inputs.logits, dtype=torch.float64), 1)

variants.VARIANTS = {{k: v._replace(truth=nothing) for k, v in variants.VARIANTS.items()}}

class Small(context.Context):
    sizes = context.TOY
    bandwidth = 1e9
found, small = {{}}, Small(pathlib.Path("."))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in (*steps.FIRST, *steps.STEPS):
        if step.name in {STEPS}:
            found[step.name] = [
                {{"task": x.name, **runner.attempt(x, small)}} for x in step.tasks(small)
            ]
print(json.dumps([found, [str(x.message) for x in caught]], default=str))
"""


@pytest.fixture(scope="module")
def walked():
    """Return what came of every step, and what torch warned of."""
    try:
        done = runtime.run("-c", SCRIPT, cwd=ROOT)
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", STEPS)
def test_no_step_raises(name, walked):
    rows = walked[0][name]
    assert rows
    assert {row["task"]: row["error"] for row in rows if "error" in row} == {}
    assert {row["task"]: row["device"] for row in rows if "device" in row} == {}


def test_everything_is_captured(walked):
    """Also on a torch that refuses while the graph of a warm-up is alive."""
    found, warned = walked
    rows = [*found["launches"], *found["timings"]]
    assert [row["no_graph"] for row in rows if "no_graph" in row] == []
    for row in found["beside focal"]:
        assert row["times_focal"].keys() == {"host", "eager", "graph"}
    assert [text for text in warned if "AccumulateGrad" in text] == []


def test_nobody_waits(walked):
    rows = walked[0]["synchronisations"]
    assert len(rows) == 9
    assert all(row["ok"] for row in rows)
