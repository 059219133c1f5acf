"""The rooms of the house, and which way their imports point."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).parents[2]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, whole names; of `from a import b` also a.b."""
    name = list(path.relative_to(ROOT).with_suffix("").parts)
    if name[0] == "reference":
        name = ["alrp_triton", *name]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(name[: -node.level]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def own_imports(folder: str) -> dict[str, set[str]]:
    """Return {file: what it imports of this project}, for all files below a folder."""
    files = [
        path
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.is_relative_to(ROOT / "alrp_triton" / "reference")
    ]
    assert files
    return {
        str(path.relative_to(ROOT)): {
            name for name in imports_of(path) if name.split(".")[0] in ("alrp_triton", "perf")
        }
        for path in files
    }


def offenders(folder: str, *allowed: str) -> list[tuple[str, str]]:
    return [
        (file, name)
        for file, names in own_imports(folder).items()
        for name in names
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)
    ]


def test_the_reference_stands_alone():
    assert offenders("reference", "alrp_triton.reference") == []


def test_the_fast_path_takes_the_layout_of_the_specification_and_no_more():
    breakpoints, layout = "alrp_triton.reference.breakpoints", "alrp_triton.reference.layout"
    taken = offenders("reference/breakpoints", breakpoints, layout)
    assert {name for _, name in taken} <= {"alrp_triton.reference"}  # from .. import layout


def test_the_kernels_take_what_every_count_is_given_and_no_more():
    layout = "alrp_triton.reference.layout"
    assert offenders("alrp_triton/kernels", "alrp_triton.kernels", layout) == []
    used = {
        name
        for names in own_imports("alrp_triton/kernels").values()
        for name in names
        if name.startswith(layout)
    }
    assert used == {layout, f"{layout}.Batch"}  # `from` counts as both


def test_nothing_in_the_package_imports_what_tests_it():
    found = [
        (file, name)
        for file, names in own_imports("alrp_triton").items()
        for name in names
        if name.startswith(("alrp_triton.testing", "perf")) and "/testing/" not in file
    ]
    assert found == []


def test_perf_is_a_dozen_rooms_that_import_in_one_direction():
    rooms: dict[str, set[str]] = {}
    for file, names in own_imports("perf").items():
        room = Path(file).parts[1]
        here = rooms.setdefault(room.removesuffix(".py"), set())
        here |= {name.split(".")[1] for name in names if name.count(".") and name[:5] == "perf."}
        here.discard(room.removesuffix(".py"))
    folders = {room for room in rooms if (ROOT / "perf" / room).is_dir()}
    assert len(folders) <= 12
    list(TopologicalSorter(rooms).static_order())  # raises where they run in a circle


@pytest.mark.parametrize("name", ["alrp_triton", "reference", "tests", "perf", "docs", "examples"])
def test_the_top_level_has_the_rooms_that_it_tells_of(name):
    assert (ROOT / name).is_dir()
    assert f"`{name}/`" in (ROOT / "CONTRIBUTING.md").read_text() or name == "alrp_triton"


def test_what_is_called_slow_exists():
    assert [name for name in conftest.SLOW if not (ROOT / "tests" / name).exists()] == []
