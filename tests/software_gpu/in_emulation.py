"""What `test_kernels_emulated.py` runs in a process in which kernels are emulated.

By hand, `python -m pytest -n 0 -p tests.software_gpu.emulator_plugin` and the name of this file.
"""

from __future__ import annotations

from tests.software_gpu import mutants
from tests.software_gpu.emulator import Emulation


def test_the_same_bits_in_any_order(emulation: Emulation) -> None:
    """Of programs: every launch of some calls is repeated; nothing is left to chance either."""
    recordings = mutants.record(emulation, mutants.calls(quick=True))
    assert len(recordings) > 5
    for recording in recordings:
        for schedule in (*mutants.SCHEDULES, {"order": 11, "concurrent": 64}):
            assert recording.repeat(recording.kernel, **schedule) == ""


def test_mutants_are_noticed(emulation: Emulation) -> None:
    """Some of each kind; and of the barriers nearly all: few separate nothing."""
    verdicts = mutants.run(emulation, quick=True)
    print(mutants.summary(verdicts))
    by_kind = {
        kind: [verdict.noticed for verdict in verdicts if verdict.mutant.kind == kind]
        for kind in mutants.KINDS
    }
    assert all(any(noticed) for noticed in by_kind.values())
    assert all(noticed.startswith("check") for noticed in by_kind[mutants.MISALIGNED])
    barriers = [noticed.startswith("check") for noticed in by_kind[mutants.BARRIER]]
    assert sum(barriers) > 0.9 * len(barriers)
