"""How times and memory are taken."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from perf import timing

CPU = torch.device("cpu")


def test_every_call_runs_once_a_round_in_an_order_drawn_anew():
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "abcde"}
    seconds = timing.interleave(calls, CPU, rounds=20)
    rounds = [tuple(ran[start : start + 5]) for start in range(5, len(ran), 5)]  # after a warm-up
    assert {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys("abcde", 20)
    assert all(sorted(one) == list("abcde") for one in rounds)
    assert {one[0] for one in rounds} == set("abcde")
    before = {first for one in rounds for first, then in pairwise(one) if then == "a"}
    assert before == set("bcde")


def test_the_floor_is_a_copy(monkeypatch):
    """It reads and writes so many bytes in the median of the times."""
    copied = []

    def interleave(calls, device, rounds):
        copied.extend(call() for call in calls.values())
        return {name: [0.5, 8.0, 0.25][:rounds] for name in calls}

    monkeypatch.setattr(timing, "interleave", interleave)
    assert timing.copy_bandwidth(CPU, size=1 << 20, rounds=3) == 2 * (1 << 20) / 0.5
    assert copied[0].nbytes == 1 << 20


_CALLS = """
import resource
import torch
from perf.timing import keep_freed_memory

def fetched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
print(*(fetched() for _ in range(40)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.slow
def test_freed_memory_is_kept_for_later_calls():
    """The first fetches its pages, 16,384 of 4 KB or fewer of larger ones, and most others none."""
    command = [sys.executable, "-c", _CALLS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *others = map(int, done.stdout.split())
    assert statistics.median(others) < 10 < first


def test_peak_memory_counts_what_the_process_could_have_kept():
    def call():
        torch.ones(1 << 24)

    timing.keep_freed_memory()
    call()
    peak = timing.peak_memory(call, CPU)
    if peak is None:
        pytest.skip("the system does not tell the peak")
    assert 60 << 20 < peak < 80 << 20


def test_no_other_allocator_is_touched(monkeypatch):
    class Other:
        def __init__(self, name):
            pass

    monkeypatch.setattr(timing.ctypes, "CDLL", Other)
    assert not timing.keep_freed_memory()


def test_the_processor_has_a_name(monkeypatch):
    told = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t: x\nmodel name\t: another\n"
    monkeypatch.setattr(Path, "read_text", lambda path: told)
    assert timing._processor() == "Some CPU @ 3 GHz"

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(timing.platform, "processor", lambda: "")
    assert timing._processor() == timing.platform.machine()
