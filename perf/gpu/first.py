"""The steps of `perf.gpu --first`: the answers that decide most, within four minutes of a GPU.

A time is taken even where a check fails, and its row says so: that a GPU computes something else is
one answer, and how long it takes is another.
"""

from __future__ import annotations

import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from alrp_triton.testing import cases
from alrp_triton.testing.workloads import DISTRIBUTIONS, Cell, draw

from .. import timing
from . import checks, measurements
from .context import DTYPES, Context, Task

_LAUNCHES = 200  # in a row; a GPU takes in about a thousand before the host has to wait
_SMALL = 32  # numbers that a small operator works on

Call = Callable[[], object]


def launches(context: Context) -> Iterator[Task]:
    """Measure what a launch costs: Triton's and torch's, on the host, in a stream, in a graph."""
    yield Task("empty kernel, JIT", partial(_launch_empty, context, direct=False))
    yield Task("empty kernel, compiled", partial(_launch_empty, context, direct=True))
    yield Task("small operators of torch", partial(_launch_torch, context))


def _launch_empty(context: Context, direct: bool) -> dict[str, Any]:
    empty_kernel = importlib.import_module("perf.gpu.launch_costs")  # needs triton
    numbers = torch.zeros(_SMALL, device=context.device)
    launch = empty_kernel.launcher(numbers, direct)
    if launch is None:
        return {"dropped": "the interpreter compiles nothing"}
    return _in_a_row(context, launch)


def _launch_torch(context: Context) -> dict[str, Any]:
    numbers = torch.zeros(_SMALL, device=context.device)
    return _in_a_row(context, lambda: numbers.add_(1.0))


def _in_a_row(context: Context, launch: Call) -> dict[str, Any]:
    """Microseconds of one among many."""

    def step() -> None:
        for _ in range(_LAUNCHES):
            launch()

    step()
    found = _three_ways(context, step)
    return {way: x if way == "no_graph" else x / _LAUNCHES for way, x in found.items()}


def _three_ways(context: Context, step: Call) -> dict[str, Any]:
    """Microseconds of the host until it has asked for everything, and of the device until it is
    done: as asked for call by call, and replayed from a graph."""
    found: dict[str, Any] = {"host_microseconds": 1e6 * _host_seconds(context, step)}
    calls = {"eager": step}
    try:
        calls["graph"] = context.capture(step)
    except RuntimeError as error:
        found["no_graph"] = str(error)[:200]
    taken = timing.interleave(calls, context.device, context.sizes.rounds)
    for way, seconds in taken.items():
        found[f"{way}_microseconds"] = 1e6 * statistics.median(seconds)
    return found


def _host_seconds(context: Context, step: Call) -> float:
    """Until `step` returns, where the device has nothing else to do."""
    taken = []
    for _ in range(context.sizes.rounds):
        context.check_health()
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def memory(context: Context) -> Iterator[Task]:
    """Atomic adds and look-ups a second, each beside what it should give."""
    names = ("adds", "look-ups")
    return (task for task in measurements.rates(context) if task.name.startswith(names))


def parity(context: Context) -> Iterator[Task]:
    """Check the operators and losses of the middle of a training, at full size."""
    number = context.sizes.full.anchors * context.sizes.full.classes
    wanted = [("breakpoints", "float32"), ("breakpoints", "bfloat16"), ("pairwise", "float32")]
    shown = f"{number:,} x {context.sizes.full.positives:,}"
    names = [f"{algorithm} mid {dtype}, {shown}" for algorithm, dtype in wanted]
    return (task for task in checks.parity(context) if task.name in names)


def beside_focal(context: Context) -> Iterator[Task]:
    """Forward and backward of aLRP beside a fused focal loss, on the same inputs."""
    for distribution in DISTRIBUTIONS:
        yield Task(distribution, partial(_beside_focal, context, distribution))


def _beside_focal(context: Context, distribution: str) -> dict[str, Any]:
    bench, parity = (importlib.import_module(f"perf.bench.{x}") for x in ("run", "parity"))
    variants = importlib.import_module("perf.bench.variants")
    size = context.sizes.full
    inputs = draw(Cell(size.anchors * size.classes, size.positives, distribution), context.device)
    named = {name: variants.VARIANTS[name] for name in (variants.OURS, "focal, fused")}
    steps = {
        name: partial(bench.forward_backward, variant.bind(inputs), inputs.logits)
        for name, variant in named.items()
    }
    results = {name: step() for name, step in steps.items()}  # compiles
    row: dict[str, Any] = {"ok": True}
    for name, variant in named.items():
        judged = parity.compare(*results.pop(name), variant.truth(inputs))
        times = _three_ways(context, steps[name])
        row["ok"] &= judged.holds
        row[name] = {"right": judged.holds, "error": judged.error, **times}
    ours, focal = row[variants.OURS], row["focal, fused"]
    ways = [key for key in ours if key.endswith("_microseconds") and key in focal]
    row["times_focal"] = {way.removesuffix("_microseconds"): ours[way] / focal[way] for way in ways}
    return row


def profiles(context: Context) -> Iterator[Task]:
    """Microseconds of each kernel of one call."""
    for distribution in ("mid", "spread"):
        drawn = partial(
            cases.draw_case, context.sizes.full, distribution, DTYPES["float32"], context.device
        )
        yield Task(distribution, partial(measurements.profile_kernels, context, drawn, "auto"))


def captures(context: Context) -> Iterator[Task]:
    """Check that the host does not wait, and that a graph replays the eager bits; one call each."""
    for what, tasks in (("unwaiting", checks.synchronisations), ("graph", checks.graph)):
        for task in itertools.islice(tasks(context), 1):
            yield task._replace(name=f"{what}: {task.name}")
