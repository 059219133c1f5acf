"""What the tests of this folder read: kernels compiled ahead of time, in a process of their own.

What is compiled is what the launchers launch: they run on tensors without data while
`perf.machine_code.sass` takes down the launches. That needs kernels imported without
TRITON_INTERPRET, so another process, which each test file is when it is run:
`python -m tests.machine_code.test_kernels_compile sm_90`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.profiles import FULL

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
THOROUGH = ("sm_90", "gfx942")  # one of each backend: for the others some cases will do


def cases_for(target: str, cases: Collection[str], some: Sequence[str]) -> Collection[str]:
    """All cases, or those few that reach each kernel and take the most registers."""
    return cases if FULL or target in THOROUGH else some


def compile_apart(module: str) -> dict[str, Any]:
    """{target: what a module finds for it}, from a process where nothing is interpreted."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *TARGETS],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def print_figures(find: Callable[[str], dict[str, Any]]) -> None:
    """In that process: find them for the targets of the command line, two at a time."""
    targets = sys.argv[1:]
    with get_context("fork").Pool(2) as pool:
        print(json.dumps(dict(zip(targets, pool.map(find, targets, chunksize=1), strict=True))))
