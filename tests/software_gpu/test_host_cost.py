"""The gate on the host's cost: what each public call asks of the device, held to exact numbers.

A number that fell is a reason to write the table anew, one that rose has to be worth it:
`python -m tests.software_gpu.host_cost --write`.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from perf.software_gpu import build
from tests.software_gpu import host_cost

TABLES = json.loads(host_cost.TABLE.read_text())
TABLE = TABLES.get(host_cost.versions(), {})


@pytest.fixture(scope="module")
def found() -> dict[str, host_cost.Numbers]:
    """Return what is counted now, in one process for all calls."""
    try:
        return host_cost.measure()
    except build.Unavailable as reason:
        pytest.skip(str(reason))


def needs_table() -> None:
    """Other versions of torch launch other kernels."""
    if not TABLE:
        pytest.skip(f"the table has {'; '.join(TABLES)}, and not {host_cost.versions()}")


def test_every_call_has_its_numbers():
    needs_table()
    assert [name for name, _ in host_cost.cases()] == list(TABLE)


@pytest.mark.parametrize("name", [name for name, _ in host_cost.cases()])
def test_a_call_asks_for_no_more_and_no_less(name, found):
    needs_table()
    assert found[name] == TABLE[name]


def test_the_host_never_waits(found):
    """With any versions: no call whose positives are known synchronises, in either direction."""
    waits = {
        name: {stage: of["synchronisations"] for stage, of in stages.items()}
        for name, stages in found.items()
    }
    assert {name for name, stages in waits.items() if any(stages.values())} == set()
