"""Runs tests with kernels as compiled, on the emulator.

    python -m pytest -n 0 -p tests.software_gpu.emulator_plugin --emulate sm_90 tests/kernels

A test fails if the emulator finds a race, an access out of bounds and the like, whatever comes out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.software_gpu import emulator

# Tests of the interpreter, and what takes minutes here and is the same at other sizes.
LEFT_OUT = {"test_irrelevant_tiles_are_skipped": "counts calls inside the interpreter"}
# A NaN has no rank: its breakpoints may be written where others are, in a race that decides
# nothing, since every result becomes NaN. What these tests compare still has to be right.
COLLIDE = ("test_nan_score", "test_what_is_not_finite_reaches_every_group")


def pytest_load_initial_conftests() -> None:
    """Before Triton is imported, which is when it chooses the interpreter."""
    os.environ["TRITON_INTERPRET"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emulator")
    group.addoption("--emulate", default="sm_90", metavar="TARGET", help="sm_80, sm_90")
    group.addoption(
        "--order",
        default=emulator.ASCENDING,
        type=int,
        help="of programs: 0 ascending, 1 descending, else the seed of a random one",
    )
    group.addoption("--interleaved", default=1, type=int, help="programs that take turns")


@pytest.fixture(scope="session", autouse=True)
def emulation(request: pytest.FixtureRequest) -> Iterator[emulator.Emulation]:
    """Run the kernels of all tests."""
    if reason := emulator.missing():
        pytest.skip(reason)
    from alrp_triton.kernels.tuning import files
    from alrp_triton.kernels.tuning.block_sizes import default_breakpoint_tiles, default_tiles

    option = request.config.getoption
    major = int(option("--emulate").removeprefix("sm_")) // 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(  # those of a GPU: the interpreter's are larger
            files,
            "defaults_for",
            lambda device, dtype: files.Defaults(
                default_tiles(32, major), default_breakpoint_tiles(32, dtype)
            ),
        )
        options = {"order": option("--order"), "concurrent": option("--interleaved")}
        with emulator.emulated(option("--emulate"), **options) as running:
            yield running


@pytest.fixture(autouse=True)
def _expect_collisions(request: pytest.FixtureRequest, emulation: emulator.Emulation) -> None:
    emulation.keep_notes = getattr(request.node, "originalname", "") in COLLIDE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in LEFT_OUT.items():
            if name in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
