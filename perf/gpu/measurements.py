"""The steps of perf.gpu that measure: the machine, rates, memory, times, sizes, the benchmark.

Each makes named tasks, which return a part of the report.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from alrp_triton import ops
from alrp_triton.testing import cases
from alrp_triton.testing.cases import Size
from alrp_triton.testing.kernel_tolerance import IGNORE, Case
from alrp_triton.testing.workloads import DISTRIBUTIONS

from .. import timing
from ..bench.targets import MOST_MEMORY
from .context import DTYPES, ENDING, Call, Context, Task

BENCHMARK = "bench"  # the name of its files


def about(context: Context) -> Iterator[Task]:
    """Report the machine, and which algorithms have kernels."""

    def machine() -> dict[str, Any]:
        found, missing = cases.algorithms(context.device)
        result = {**timing.machine(context.device), "algorithms": list(found), "missing": missing}
        try:
            result["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv")
        except (OSError, subprocess.CalledProcessError) as error:
            result["driver"] = f"not told: {error}"
        return result

    yield Task("versions", machine)
    yield Task("bandwidth", lambda: {"bytes_per_second": context.bandwidth})


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip().splitlines()[-1]


def memory(context: Context) -> Iterator[Task]:
    """Measure what forward and backward take beyond the logits and their gradient."""
    for algorithm in context.algorithms:
        for dtype in ("float32", "bfloat16"):
            yield Task(f"{algorithm} {dtype}", partial(_peak, context, algorithm, dtype))


def _peak(context: Context, algorithm: str, dtype: str) -> dict[str, Any]:
    draw = partial(cases.draw_case, context.sizes.full, "mid", DTYPES[dtype])
    call = Call(draw(context.device), algorithm)
    call.step()
    for leaf in (*call.logits, call.loc_errors):
        leaf.grad = None
    peak = timing.peak_memory(call.step, context.device)
    if peak is None:
        return {"peak": None, "why": "the system does not tell"}
    logits = sum(leaf.numel() * leaf.element_size() for leaf in call.logits)
    beyond = max(0, peak - logits)  # the gradient is as large as the logits
    share, constant = MOST_MEMORY
    goal = int(share * logits + constant)
    return {"beyond": beyond, "logits": logits, "goal": goal, "reached": beyond <= goal}


def timings(context: Context) -> Iterator[Task]:
    """Time forward and backward, eager and as a graph, stage by stage, and kernel by kernel."""
    for algorithm, kernels in context.algorithms.items():
        for dtype in ("float32", "bfloat16"):
            for distribution in DISTRIBUTIONS:
                drawn = partial(
                    cases.draw_case,
                    context.sizes.full,
                    distribution,
                    DTYPES[dtype],
                    context.device,
                )
                name = f"{algorithm} {distribution} {dtype}"
                yield Task(name, partial(_time, context, drawn, algorithm, kernels))
        drawn = partial(cases.draw_case, context.sizes.full, "mid", torch.float32, context.device)
        yield Task(
            f"{algorithm} mid float32, kernels", partial(profile_kernels, context, drawn, algorithm)
        )


def _time(
    context: Context, draw: Callable[[], Case], algorithm: str, kernels: ModuleType
) -> dict[str, Any]:
    case = draw()
    call, captured = Call(case, algorithm), Call(case, algorithm)
    found = case.logits, case.targets, None, case.scores.numel()
    calls = {
        "forward + backward": call.step,
        "forward": lambda: call.forward(),
        "graph replay": context.capture(captured.step),
        "locate": lambda: ops.locate(*found, True, IGNORE, "auto", "loc_errors"),
        "count": lambda: kernels.count(*case.count_input),
        "gradient": lambda: kernels.gradient(*case.gradient_input),
    }
    seconds = timing.interleave(
        calls, context.device, context.sizes.rounds, warmup=1, until=context.until
    )
    logits = sum(level.numel() * level.element_size() for level in case.logits)
    floor = 3 * logits / context.bandwidth  # one read forward; one read and one write backward
    times = {name: timing.Times.of(taken) for name, taken in seconds.items()}
    return {
        "rounds": len(seconds["graph replay"]),
        "floor_seconds": floor,
        "share_of_floor": floor / times["graph replay"].median,
        "seconds": {name: taken._asdict() for name, taken in times.items()},
    }


def profile_kernels(context: Context, draw: Callable[[], Case], algorithm: str) -> dict[str, Any]:
    """Return launches and microseconds by kernel, of one call."""
    call = Call(draw(), algorithm)
    call.step()
    with profile(activities=list({ProfilerActivity.CPU, context.activity})) as record:
        call.step()
        context.check_health()
    on_device = "self_cpu_time_total" if context.activity == ProfilerActivity.CPU else (
        "self_device_time_total"
    )  # fmt: skip
    events = [x for x in record.key_averages() if x.device_type == context.kernels_on]
    events.sort(key=lambda x: -getattr(x, on_device))
    return {
        "launches": sum(x.count for x in events),
        "microseconds": {x.key[:80]: getattr(x, on_device) for x in events[:20]},
    }


def rates(context: Context) -> Iterator[Task]:
    """Measure what the choice among algorithms and primitives hangs on; check each result.

    These are adds in memory, and the count that is made of them; look-ups; the instructions that
    pairwise issues; how long breakpoints take to begin.
    """
    memory_rates, kernel_rates = (  # need triton
        importlib.import_module(f"perf.gpu.{name}") for name in ("memory_rates", "kernel_rates")
    )
    device, rounds, (programs, repeats) = context.device, context.sizes.rounds, context.sizes.rate

    def of_kernels(measure: Callable[..., dict[str, Any]], size: Size, stage: str) -> dict:
        case = cases.draw_case(size, stage, torch.float32, device)
        return measure(case, context.capture, rounds)

    for slots, at_random in memory_rates.ADDS:
        name = f"adds to {slots} slots {'at random' if at_random else 'in turn'}"
        measure = memory_rates.measure_adds
        yield Task(name, partial(measure, device, slots, at_random, programs, repeats, rounds))
    full, many = context.sizes.full, context.sizes.many
    for stage in ("init", "mid", "spread"):
        intervals = partial(of_kernels, kernel_rates.measure_intervals, full, stage)
        yield Task(f"logits counted between breakpoints, {stage}", intervals)
    for gather in memory_rates.LOOK_UPS:
        name = f"look-ups by {'tl.gather' if gather else 'tl.load'}"
        measure = memory_rates.measure_look_ups
        yield Task(name, partial(measure, device, gather, max(1, programs // 4), repeats, rounds))
    yield Task("pairs, spread", partial(of_kernels, kernel_rates.measure_pairs, full, "spread"))
    for size in (full, many):
        sort = partial(of_kernels, kernel_rates.measure_sort, size, "mid")
        yield Task(f"breakpoints of {size.positives:,} positives sorted", sort)


def benchmark(context: Context) -> Iterator[Task]:
    """Run the package beside its baselines."""
    yield Task("table", partial(_benchmark, context))


def _benchmark(context: Context) -> dict[str, Any]:
    bench = importlib.import_module("perf.bench.__main__")
    cells, rounds, until = bench.CELLS[context.cells], context.sizes.rounds, context.until - ENDING
    with _tuned(context):
        report = bench.run(cells, bench.VARIANTS, context.device, rounds, until, progress=False)
    rows = report["rows"]
    report["goals"] = bench.verify(rows, bench.STANDARDS[context.cells])
    files = bench.write(report, context.out, BENCHMARK)
    wrong = [row for row in rows if row["variant"] == bench.OURS and not row["parity"]]
    result = {"ok": not wrong, "rows": len(rows), "files": _names(files)}
    # As in the middle of a training, where most of it is spent.
    middle = next((row for row in rows if row["distribution"] == "mid"), None)
    if middle is not None:
        shared = ("distribution", "dtype", "N", "P", "delta")
        same_cell = [row for row in rows if all(row[key] == middle[key] for key in shared)]
        result |= {key: middle[key] for key in ("N", "P")}
        result["milliseconds"] = {
            row["variant"]: 1e3 * row["seconds"] for row in same_cell if row["parity"]
        }
    result["goals"] = {
        goal["what"]: {name: goal[name] for name in ("found", "bound", "reached")}
        for goal in report["goals"]
    }
    return result | {"not_run": [f"{x['variant']}: {x['why']}" for x in report["dropped"]]}


@contextmanager
def _tuned(context: Context) -> Iterator[None]:
    """Have the package take the sizes and costs in the folder, if there are any, in the block."""
    tuned = importlib.import_module("alrp_triton.kernels.tuning.files")
    before = os.environ.get(tuned.FOLDER)
    if tuned.find_file(timing.machine(context.device)["device"], str(context.out)):
        os.environ[tuned.FOLDER] = str(context.out)
    try:
        yield
    finally:
        os.environ.pop(tuned.FOLDER, None)
        if before is not None:
            os.environ[tuned.FOLDER] = before


def tuning(context: Context) -> Iterator[Task]:
    """Find block sizes for this GPU, and what the algorithms cost by them."""
    yield Task("sizes and costs", partial(_tune, context))


def _tune(context: Context) -> dict[str, Any]:
    tuner = importlib.import_module("perf.autotune.tune")
    seconds = context.until - ENDING - time.monotonic()
    with _tuned(context):  # those of an earlier run are what has to be beaten
        result = tuner.tune(context.device, seconds, progress=False)
    files = _names(tuner.write(result, context.out))
    costs = {
        fit["dtype"]: {
            "taken": fit["taken"],
            **fit["measured"],
            "lost_before": fit["before"]["lost"],
        }
        for fit in result["fits"]
    }
    gains = tuner.gains(result)
    return {"files": files, "gains": gains, "costs": costs, "not_reached": result["left_out"]}


def _names(files: Any) -> list[str]:
    files = files if isinstance(files, (list, tuple)) else [files]
    return [Path(file).name for file in files]
