"""How a time is measured: alike on a CPU and a GPU, always beside what it is compared with."""

from __future__ import annotations

import ctypes
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

_FLUSHED = 256 << 20  # bytes written between two calls on a GPU: more than any cache there is
_COPIED = {"cuda": 1 << 30, "cpu": 256 << 20}  # bytes of the copy that gives the bandwidth

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MOST_MAPPED = -1, -4


class Times(NamedTuple):
    """Seconds of repeated runs."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warmup: int = 1,
    until: float | None = None,
) -> dict[str, list[float]]:
    """Time each call, round by round; every call runs once a round, in an order drawn anew.

    What ran before leaves caches and free memory behind: in a fixed order, the same code took up to
    twice as long in one place as in another.

    On a GPU a run is measured between two events, after something larger than the caches was
    written, and the host waits once a round. On a CPU a run is measured by the clock.

    Args:
        calls: what is compared, by name.
        device: where it runs.
        rounds: counted runs of each.
        warmup: rounds that are not counted, first.
        until: `time.monotonic()` from which on no further round begins, but for the first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    measure = _gpu_round if device.type == "cuda" else _cpu_round
    names, draw = list(calls), random.Random(0)
    for _ in range(warmup):
        measure(calls, device)
    for done in range(rounds):
        if done and until is not None and time.monotonic() >= until:
            break
        draw.shuffle(names)
        for name, taken in measure({name: calls[name] for name in names}, device).items():
            seconds[name].append(taken)
    return seconds


def _cpu_round(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
    return seconds


def _gpu_round(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    events = {}
    flushed = torch.empty(_FLUSHED, dtype=torch.int8, device=device)
    for name, call in calls.items():
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events[name] = (start, end)
    torch.cuda.synchronize(device)
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def keep_freed_memory() -> bool:
    """Have the process keep freed memory for its next call, from now on; return whether it will.

    So a GPU's caching allocator does. glibc gives large blocks back to the system instead, or not:
    whether a call has to fetch its gradient anew, page by page, then depends on what the call
    before it freed. The same call of 5 ms took 9. Nothing changes under other allocators.
    """
    mallopt = _allocator("mallopt")
    return mallopt is not None and bool(mallopt(_MOST_MAPPED, 0) and mallopt(_TRIM_THRESHOLD, -1))


def _allocator(function: str) -> Callable[..., int] | None:
    """Return a function of glibc's allocator, if it is in use."""
    try:
        return getattr(ctypes.CDLL(None), function)
    except (AttributeError, OSError, TypeError):
        return None


def copy_bandwidth(device: torch.device, size: int | None = None, rounds: int = 10) -> float:
    """Return the bytes a second that a copy of `size` bytes reads and writes.

    That is the floor of every row.
    """
    size = size or _COPIED[device.type]
    source, copy = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_(0, 256)
    seconds = interleave({"copy": lambda: copy.copy_(source)}, device, rounds)["copy"]
    return 2 * size / statistics.median(seconds)


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes that a call takes beyond what is held before it.

    On a GPU it is what torch's allocator hands out; on a CPU it is the resident memory of the
    process, which the kernel tells on Linux. It is None where nobody tells. Under glibc the process
    holds no freed pages before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if trim := _allocator("malloc_trim"):
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident_peak()
    except OSError:
        return None
    call()
    return _resident_peak() - before


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _processor() -> str:
    """Name the CPU; on Linux the platform module knows only its architecture."""
    try:
        models = Path("/proc/cpuinfo").read_text().split("model name")[1:]
    except OSError:
        models = []
    named = models[0].splitlines()[0].lstrip("\t :") if models else platform.processor()
    return named or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what a time was measured on: a time means nothing beyond it."""
    result = {
        "device": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    for package in ("torch", "triton", "torchvision"):
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["device"] = properties.name
        result["capability"] = f"{properties.major}.{properties.minor}"
        result["multiprocessors"] = properties.multi_processor_count
        result["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
    return result
