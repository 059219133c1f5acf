"""What kernels execute for each logit, counted as their PTX for sm_90 is executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from batches import IGNORE

pytest.importorskip("triton")

from tests.software_gpu import emulator

ROOT = Path(__file__).parents[2]
IGNORED = 0.02  # of the anchors, as in `perf.bench`

# In a process of its own, in which kernels are not interpreted.
SCRIPT = f"""
import json, torch
from tests.software_gpu import emulator
from alrp_triton.kernels.breakpoints import ranks
from alrp_triton.kernels.tuning.block_sizes import default_breakpoint_tiles
from alrp_triton.testing.kernel_tolerance import find
from alrp_triton.testing.workloads import draw_logits, draw_targets

torch.manual_seed(0)
targets = draw_targets(1500, 80, 40)
assert (targets == {IGNORE}).float().mean() == {IGNORED}
logits = draw_logits(targets, 80, "mid")
case = find([logits[:, :, None]], [targets[:, None]], 1.0)
tiles = default_breakpoint_tiles(32, torch.float32)
with emulator.emulated("sm_90") as emulation:
    ranks.count(*case.count_input, tiles)
    ranks.gradient(*case.gradient_input, tiles)
figures = {{x.kernel: 32 * x.instructions / logits.numel() for x in emulation.launches}}
print(json.dumps(figures))
"""


@pytest.fixture(scope="module")
def executed() -> dict[str, float]:
    """Return {kernel: instructions a logit}, in the middle of a training."""
    if reason := emulator.missing():
        pytest.skip(reason)
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_count_takes_ignored_anchors_out_for_little(executed: dict[str, float]) -> None:
    """It counted them apart for 146 when a lane went through an anchor's classes by itself."""
    assert 40 < executed["_count_kernel"] <= 65


def test_what_follows_the_gradient_is_next_to_nothing(executed: dict[str, float]) -> None:
    """It clears ignored anchors, and writes the entries of the positives."""
    assert executed["_clear_kernel"] + executed["_positive_grads_kernel"] <= 1.5
    assert executed["_gradient_kernel"] <= 48
