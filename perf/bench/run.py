"""Times the package beside what people use instead: `python -m perf.bench`.

Every row is forward + backward of one call, interleaved with the other variants in rounds, after
its value and gradient were held to the truth in float64; without parity there is no time. Runs on
a CPU in about three minutes, and on a GPU where there is one. perf/README.md says how to read it.
The exit status is 1 if this package did not compute what it should in some cell, or missed a goal;
the last lines say which.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alrp_triton.testing.workloads import Cell, Inputs, draw

from ..timing import Times, copy_bandwidth, interleave, keep_freed_memory, machine, peak_memory
from .parity import Parity, Truth, compare
from .variants import OURS, Variant

# A slow variant gets as many rounds as fit into these seconds, and no fewer than this.
_SECONDS, _FEWEST = 2.0, 3
# By the type of device, where the command line does not say: runs of each, and minutes.
_ROUNDS, _MINUTES = {"cpu": 7, "cuda": 20}, {"cpu": 3.5, "cuda": 9.0}

_TOY = "rehearse"  # cells too small for a goal to mean anything

Drop = Callable[[str, str, Iterable[Cell]], None]
Calls = dict[str, Callable[[], object]]  # by the variant's name


def run(
    cells: Sequence[Cell],
    variants: Mapping[str, Variant],
    device: torch.device,
    rounds: int,
    until: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Fill the table of cells and variants.

    Args:
        cells: the workloads, the most important first.
        variants: what is timed, by name. If `OURS` cannot run, that is an error; every other one
            is left out with the reason.
        device: where everything runs.
        rounds: runs of each variant in a cell; fewer for one that takes long.
        until: `time.monotonic()` from which on no further cell begins.
        progress: whether to say on stderr what was measured.

    Returns:
        "machine"; "bandwidth" of a copy in bytes a second; "rows", one for each cell and variant
        that ran; "dropped", what did not, with the reason ("why") and the cells.
    """
    about = machine(device)
    if device.type == "cpu":
        about["freed memory"] = "kept" if keep_freed_memory() else "as the system does"
    bandwidth = copy_bandwidth(device)
    shared = {key: about[key] for key in ("device", "torch", "triton", "torchvision")}
    table: list[dict[str, Any]] = []
    left_out: dict[tuple[str, str], list[str]] = {}

    def drop(variant: str, why: str, where: Iterable[Cell]) -> None:
        left_out.setdefault((variant, why), []).extend(map(str, where))

    for number, cell in enumerate(cells):
        if until is not None and time.monotonic() >= until:
            drop("every variant", "no time was left", cells[number:])
            break
        rows = _fill(cell, variants, device, rounds, until, drop)
        for row in rows:
            floor = row["bytes"] / bandwidth
            share = None if row["seconds"] is None else floor / row["seconds"]
            table.append({**row, "floor": floor, "share": share, **shared})
        if progress:
            _say(f"{number + 1}/{len(cells)}  {cell}", rows)
    dropped = [
        {"variant": variant, "why": why, "cells": where}
        for (variant, why), where in left_out.items()
    ]
    return {"machine": about, "bandwidth": bandwidth, "rows": table, "dropped": dropped}


def forward_backward(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Run what is timed: return the value, and the gradient by the logits."""
    leaf = logits.detach().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value, leaf.grad


def _fill(
    cell: Cell,
    variants: Mapping[str, Variant],
    device: torch.device,
    rounds: int,
    until: float | None,
    drop: Drop,
) -> list[dict[str, Any]]:
    """Return the rows of one cell, one for each variant that ran."""
    inputs = draw(cell, device)
    calls, parities = _hold_to_truth(cell, variants, inputs, device, drop)
    right = {name: call for name, call in calls.items() if parities[name].holds}
    extra, expected = _take_memory(right, inputs.logits.nbytes, device)
    seconds = _take_times(right, expected, device, rounds, until)
    ours = seconds.get(OURS, [])
    rows = []
    for name, parity in parities.items():
        row = {
            "variant": name,
            "distribution": cell.distribution,
            "dtype": cell.dtype,
            "N": inputs.logits.numel(),
            "P": cell.positives,
            "delta": cell.delta,
            # Forward reads the logits, backward reads them again and writes the gradient.
            "bytes": 3 * inputs.logits.nbytes,
            "parity": parity.holds,
            "error": _finite(parity.error),
            "tolerance": parity.tolerance,
            "value_error": _finite(parity.value_error),
            "value_tolerance": parity.value_tolerance,
        }
        row |= _timed(seconds.get(name, []), ours)
        row["extra_bytes"] = extra.get(name)
        rows.append(row)
    return rows


def _timed(seconds: list[float], ours: list[float]) -> dict[str, Any]:
    """Return the columns that are empty if the variant is wrong."""
    times = Times.of(seconds) if seconds else None
    return {
        "rounds": len(seconds),
        "seconds": times and times.median,
        "least": times and times.least,
        "most": times and times.most,
        "ratio": _ratio(seconds, ours),
    }


def _hold_to_truth(
    cell: Cell,
    variants: Mapping[str, Variant],
    inputs: Inputs,
    device: torch.device,
    drop: Drop,
) -> tuple[Calls, dict[str, Parity]]:
    """Run each variant once; return what can run, as calls, and how right it is."""
    truths: dict[Callable[[Inputs], Truth], Truth] = {}
    calls: Calls = {}
    parities = {}
    for name, variant in variants.items():
        why = variant.limit(cell, device.type)
        if why is None:
            try:
                call = partial(forward_backward, variant.bind(inputs), inputs.logits)
                value, gradient = call()
            except Exception as error:  # other people's code and compilers raise anything
                if name == OURS:
                    raise
                why = _first_line(error)
        if why is not None:
            drop(name, why, [cell])
            continue
        if variant.truth not in truths:
            truths[variant.truth] = variant.truth(inputs)
        calls[name] = call
        parities[name] = compare(value, gradient, truths[variant.truth])
    return calls, parities


def _take_memory(
    calls: Calls, gradient: int, device: torch.device
) -> tuple[dict[str, int | None], dict[str, float]]:
    """Run each call once, as a warm-up too.

    Returns:
        Bytes of each call beyond those of its gradient, and its seconds.
    """
    extra: dict[str, int | None] = {}
    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        peak = peak_memory(call, device)
        seconds[name] = time.perf_counter() - start
        # Less than the gradient: the process still had pages for it (not under glibc).
        extra[name] = None if peak is None else max(0, peak - gradient)
    return extra, seconds


def _take_times(
    calls: Calls,
    expected: Mapping[str, float],
    device: torch.device,
    rounds: int,
    until: float | None,
) -> dict[str, list[float]]:
    """Time each call; the n-th runs of all calls that have one stand side by side.

    A call that is expected to take long takes part in the first rounds only; `OURS` in all of them.
    """
    wanted = {
        name: min(rounds, max(_FEWEST, int(_SECONDS / max(expected[name], 1e-9)))) for name in calls
    }
    if OURS in wanted:
        wanted[OURS] = max(wanted.values())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    done = 0
    for last in sorted(set(wanted.values())):
        taking_part = {name: call for name, call in calls.items() if wanted[name] >= last}
        taken = interleave(taking_part, device, last - done, warmup=0, until=until)
        for name in taking_part:
            seconds[name] += taken[name]
        done = last
        if until is not None and time.monotonic() >= until:
            break
    return seconds


def _ratio(seconds: list[float], ours: list[float]) -> float | None:
    """Return the median, over the rounds that both ran in, of their time over ours."""
    if not seconds or not ours:
        return None
    return statistics.median(s / o for s, o in zip(seconds, ours, strict=False))


def _finite(number: float) -> float | None:
    """Return a number that JSON can hold: None for NaN and infinity."""
    return number if math.isfinite(number) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _say(title: str, rows: list[dict[str, Any]]) -> None:
    times = (
        f"{row['variant']} {row['seconds'] * 1e3:.3g} ms"
        if row["parity"]
        else f"{row['variant']} wrong"
        for row in rows
    )
    print(f"{title}\n    {'; '.join(times)}", file=sys.stderr, flush=True)
