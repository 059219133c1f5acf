"""The micro-benchmarks: right in the interpreter or on a GPU, and what they compile to."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
rates = importlib.import_module("perf.gpu.memory_rates")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("slots", "at_random"), rates.ADDS)
def test_adds_are_right(slots, at_random):
    result = rates.measure_adds(DEVICE, slots, at_random, programs=3, repeats=2, rounds=1)
    assert result["ok"]
    assert result["adds_per_second"] > 0


@pytest.mark.parametrize("gather", rates.LOOK_UPS)
def test_look_ups_are_right(gather):
    result = rates.measure_look_ups(DEVICE, gather, programs=2, repeats=2, rounds=1)
    assert result["ok"]
    assert result["look_ups_per_second"] > 0


def test_a_lost_add_shows(monkeypatch):
    def forgetful(counters, programs, repeats, at_random):
        counters += programs * repeats * rates.BLOCK // counters.numel()
        counters[0] -= 1

    monkeypatch.setattr(rates, "add", forgetful)
    assert not rates.measure_adds(DEVICE, 32, False, programs=3, repeats=2, rounds=1)["ok"]


def test_slots_at_random_are_struck_evenly():
    struck = (rates.scatter(torch.arange(1 << 16)) % 64).bincount(minlength=64)
    assert (struck - 1024).abs().max() < 6 * 1024**0.5


def test_compiles_to_reductions_in_global_memory():
    """It compiles without TRITON_INTERPRET, so in a process of its own, which this file then is."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.perf.test_memory_rates"],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    for at_random in (False, True):
        opcodes = figures[f"add {at_random}"]
        assert any(opcode.startswith("RED") and "64" in opcode for opcode in opcodes)
        # Nothing waits for a result or for other memory.
        assert not any(opcode.startswith(("ATOMG", "MEMBAR")) for opcode in opcodes)
    assert any(opcode.startswith("LDS") for opcode in figures["look up True"])
    assert any(opcode.startswith("LDG") for opcode in figures["look up False"])
    assert figures["spills"] == 0


def _compiled() -> dict:
    from perf.machine_code import sass

    figures: dict = {"spills": 0}
    counters, table = torch.zeros(64, dtype=torch.int64), torch.zeros(4096, dtype=torch.int32)
    for what in (False, True):
        with sass.record() as launches:
            rates.add(counters, 4, 4, what)
            rates.look_up(table, counters, 4, what)
        for name, launch in zip(("add", "look up"), launches, strict=True):
            code = sass.compile_launch(launch, "sm_90")
            opcodes = {instruction.opcode for instruction in sass._parse(code.assembly)[0]}
            figures[f"{name} {what}"] = sorted(opcodes)
            figures["spills"] += code.spills
    return figures


if __name__ == "__main__":
    print(json.dumps(_compiled()))
