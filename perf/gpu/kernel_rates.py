"""How fast the kernels do what they are made of: count between breakpoints, evaluate pairs, sort.

Together with `memory_rates` this is what decides between designs, and is therefore asked first.
Each result is held to the truth before it is timed; what is timed is replayed as a graph, since the
host launches no faster than a GPU runs what is small.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from alrp_triton.kernels import breakpoints, pairwise
from alrp_triton.kernels.breakpoints.histogram import count_negatives
from alrp_triton.kernels.breakpoints.sort import sort_breakpoints
from alrp_triton.testing.kernel_tolerance import Case

from ..autotune.candidates import SIDES
from ..autotune.verify import Verifier
from ..machine_code.occupancy import Compiled, Task, examine, target_of
from ..timing import interleave

Step = Callable[[], object]
Capture = Callable[[Step], Step]  # gives what replays a step

_SCHEDULERS = 4  # of a multiprocessor, each of which issues an instruction a clock to one warp


def measure_intervals(case: Case, capture: Capture, rounds: int) -> dict[str, Any]:
    """Measure logits a second counted between breakpoints, and what share is above the first."""
    device = case.scores.device
    tiles = breakpoints.choose_tiles(case.batch)
    if refused := Verifier(case).refuses("count", tiles):
        return {"ok": False, "error": refused}
    laid_out = sort_breakpoints(case.scores, case.delta)

    def count() -> tuple[torch.Tensor, ...]:
        return count_negatives(case.batch, laid_out, tiles, None)

    relevant = float(count()[0].sum())
    seconds = _median(capture(count), device, rounds)
    logits = sum(level.numel() for level in case.logits)
    return {
        "ok": True,
        "seconds": seconds,
        "logits_per_second": logits / seconds,
        "relevant": relevant / logits,
    }


def measure_pairs(case: Case, capture: Capture, rounds: int) -> dict[str, Any]:
    """Measure pairs a second by count and gradient.

    With them goes the share of all instructions that a GPU could issue.
    """
    device = case.scores.device
    tiles = pairwise.choose_tiles(case.batch)
    verifier = Verifier(case)
    pairs = case.scores.numel() * sum(level.numel() for level in case.logits)
    row: dict[str, Any] = {"ok": True}
    for side in SIDES:
        if refused := verifier.refuses(side, tiles):
            return {"ok": False, "error": f"{side} {refused}"}
        call = capture(lambda side=side: verifier.call(side, tiles))
        rate = pairs / _median(call, device, rounds)
        task = Task(side, str(case.logits[0].dtype).split(".")[1], tiles, target_of(device))
        row |= {f"{side}_pairs_per_second": rate, f"{side}_issued": _issued(task, rate, device)}
    return row


def measure_sort(case: Case, capture: Capture, rounds: int) -> dict[str, Any]:
    """Measure the seconds until the breakpoints of all positives are sorted and can be searched."""
    scores = case.scores.double()
    right = torch.cat([scores - case.delta, scores + case.delta]).sort().values
    ok = torch.equal(sort_breakpoints(case.scores, case.delta).high, right)
    sort = capture(lambda: sort_breakpoints(case.scores, case.delta))
    return {"ok": ok, "seconds": _median(sort, case.scores.device, rounds)}


def _median(call: Step, device: torch.device, rounds: int) -> float:
    return statistics.median(interleave({"": call}, device, rounds)[""])


def _issued(task: Task, pairs_per_second: float, device: torch.device) -> float | None:
    """Return the share of what the schedulers could issue at the highest clock; NVIDIA only."""
    if not task.target.startswith("sm_") or (clock := _highest_clock()) is None:
        return None
    code = examine(task)
    if not isinstance(code, Compiled) or code.instructions is None:
        return None
    properties = torch.cuda.get_device_properties(device)
    most = properties.multi_processor_count * _SCHEDULERS * clock * properties.warp_size
    return pairs_per_second * code.instructions / most


def _highest_clock() -> float | None:
    """Return the highest clock of the multiprocessors, in hertz."""
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return 1e6 * float(done.stdout.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
