"""The kernels as compiled, on the emulator: a small part of what `docs/software-gpu.md` runs.

Kernels are compiled where Triton was imported without TRITON_INTERPRET, so each test here runs
tests in a process of its own: some of tests/kernels, and `in_emulation.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.software_gpu import emulator

pytestmark = pytest.mark.slow

if reason := emulator.missing():
    pytest.skip(reason, allow_module_level=True)

HERE = Path(__file__)

# One or two of each file: parity, edge cases, determinism, layouts.
SOME = {
    "test_breakpoints.py": "nobody_below",
    "test_kernels.py": "only_padding or groups_over_levels",
    "test_kernels_pairwise.py": "warps_do_not_change",
    "test_locate.py": "test_repeats or test_no_classes",
    "test_skewed.py": "power_0",
    "test_sorting.py": "groups_are_sorted_apart or strided_vectors",
}


def run(target: str, files: list[str], chosen: str, *options: str) -> int:
    """Run tests on the emulator, all of which have to pass; how many."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.software_gpu.emulator_plugin", "--emulate", target, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, *files, "-k", chosen],
        cwd=HERE.parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert "skipped" not in done.stdout.splitlines()[-1]
    return int(passed[1])


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("sm_90", ["--order", "1"]),
        ("sm_80", ["--order", "7", "--interleaved", "4"]),
    ],
)
def test_some_of_the_kernel_tests(target: str, options: list[str]) -> None:
    """In descending order on one target, in a random one and interleaved on the other."""
    files = [f"tests/kernels/{name}" for name in SOME]
    chosen = " or ".join(f"({words})" for words in SOME.values())
    assert run(target, files, chosen, *options) >= 2 * len(SOME)


def test_operations_of_triton_and_orders_and_mutants() -> None:
    assert run("sm_90", [str(HERE.with_name("in_emulation.py"))], "test") == 15
