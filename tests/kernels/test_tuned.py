"""How the package finds what was tuned: by class, in a user's file or a shipped one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from alrp_triton import backend
from alrp_triton.kernels.tuning import files as tuned
from alrp_triton.kernels.tuning.block_sizes import (
    BreakpointTiles,
    Class,
    Tiles,
    default_breakpoint_tiles,
)
from alrp_triton.kernels.tuning.costs import BreakpointCosts, Costs, PairwiseCosts, default_costs
from alrp_triton.reference.layout import Batch

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SOME = {"dtype": "float32", "positives": [65, 1024], "logits": [1 << 20, None]}
COSTS = Costs(PairwiseCosts(1e-5, 0.0, 1e-13, 0.0), BreakpointCosts(1e-4, 2e-12, 3e-9))
PRICES = {"pairwise": COSTS.pairwise._asdict(), "breakpoints": COSTS.breakpoints._asdict()}


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """Pretend that there is a GPU of this name, and a user's directory."""
    properties = SimpleNamespace(name="Some GPU (80GB)", warp_size=32, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("ALRP_TRITON_TILES", str(tmp_path))
    tuned.forget()
    yield tmp_path / "Some-GPU-80GB.json"
    tuned.forget()


def write(path, content):
    content = content if isinstance(content, str) else json.dumps(content)
    path.write_text(content, encoding="utf-8")
    tuned.forget()


def test_without_a_file_there_are_defaults(on_a_gpu):
    assert tuned.tiles_for(GPU, torch.float32, 500, 1 << 24) == Tiles()
    assert tuned.tiles_for(CPU, torch.float32, 500, 1 << 24) == Tiles()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        default = default_breakpoint_tiles(32, dtype)
        assert tuned.breakpoint_tiles_for(GPU, dtype, 500, 1 << 24) == default
        assert tuned.costs_for(GPU, dtype) == tuned.costs_for(CPU, dtype) == default_costs(dtype)


def test_a_class_chooses_the_sizes(on_a_gpu):
    rows = {"count_rows": 8}
    section = [{"class": SOME, "tiles": rows, "measured": {}}]
    write(on_a_gpu, {"pairwise": section, "breakpoints": section})
    for find, default in (
        (tuned.tiles_for, lambda dtype: Tiles()),
        (tuned.breakpoint_tiles_for, lambda dtype: default_breakpoint_tiles(32, dtype)),
    ):
        for positives, logits, dtype, changed in (
            (65, 1 << 20, torch.float32, rows),
            (1024, 1 << 31, torch.float32, rows),
            (64, 1 << 20, torch.float32, {}),
            (1025, 1 << 20, torch.float32, {}),
            (65, (1 << 20) - 1, torch.float32, {}),
            (65, 1 << 20, torch.bfloat16, {}),
            (65, 1 << 20, torch.float64, {}),
        ):
            assert find(GPU, dtype, positives, logits) == default(dtype)._replace(**changed)
    any_size = Class("16-bit", (0, None), (0, None))
    assert all(any_size.holds(dtype, 7, 7) for dtype in (torch.float16, torch.bfloat16))


def test_an_algorithm_is_run_by_the_sizes_of_its_class(on_a_gpu):
    pytest.importorskip("triton")
    from alrp_triton.kernels import breakpoints, pairwise

    section = [{"class": SOME, "tiles": {"gradient_rows": 2}}]
    write(on_a_gpu, {"pairwise": section, "breakpoints": section})
    scores = SimpleNamespace(device=GPU, dtype=torch.float32, numel=lambda: 500)
    for algorithm in (pairwise, breakpoints):
        for logits, expected in ((1 << 20, True), (1 << 19, False)):
            levels = [torch.empty(2, logits // 2, device="meta")]
            tiles = algorithm.choose_tiles(Batch(levels, levels, scores, scores, 1.0, -100))
            assert (tiles.gradient_rows == 2) == expected


def test_costs_of_the_file_choose_the_algorithm(on_a_gpu):
    """The estimates would take the other one."""
    write(on_a_gpu, {"costs": {"float32": PRICES | {"measured": {"points": 9}}}})
    assert tuned.costs_for(GPU, torch.float32) == COSTS
    assert tuned.costs_for(GPU, torch.bfloat16) == default_costs(torch.bfloat16)
    assert tuned.costs_for(GPU, torch.float64) == default_costs(torch.float64)
    call = 40, 50_000_000
    assert default_costs(torch.float32).choose(*call) == "pairwise"
    expensive = PRICES | {"pairwise": PRICES["pairwise"] | {"pair": 1e-10}}
    write(on_a_gpu, {"costs": {"float32": expensive}})
    assert tuned.costs_for(GPU, torch.float32).choose(*call) == "breakpoints"


def test_auto_asks_the_file(on_a_gpu, monkeypatch):
    chosen = []
    monkeypatch.setattr(backend, "load_kernels", lambda name, device: chosen.append(name))
    scores = SimpleNamespace(device=GPU, dtype=torch.float32, numel=lambda: 30)
    levels = [torch.empty(1000, 80, device="meta")]
    for pair in (1e-14, 1e-8):
        write(on_a_gpu, {"costs": {"float32": PRICES | {
            "pairwise": PRICES["pairwise"] | {"pair": pair}}}})  # fmt: skip
        backend.select("triton", "auto", levels, scores)
    assert chosen == ["pairwise", "breakpoints"]


def test_a_users_file_wins_over_the_shipped_one(on_a_gpu, tmp_path, monkeypatch):
    shipped = tmp_path / "package" / "tiles"
    shipped.mkdir(parents=True)
    monkeypatch.setattr(tuned, "__file__", str(shipped.parent / "tuning" / "files.py"))
    write(shipped / on_a_gpu.name, {"pairwise": [{"class": SOME, "tiles": {"count_rows": 2}}]})
    assert tuned.tiles_for(GPU, torch.float32, 500, 1 << 24).count_rows == 2
    write(on_a_gpu, {"pairwise": [{"class": SOME, "tiles": {"count_rows": 8}}]})
    assert tuned.tiles_for(GPU, torch.float32, 500, 1 << 24).count_rows == 8


def entry(section="pairwise", tiles=None, **changed):
    return {section: [{"class": SOME | changed, "tiles": tiles or {}}]}


def prices(algorithm, **changed):
    return {"costs": {"16-bit": PRICES | {algorithm: PRICES[algorithm] | changed}}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ([], r"expected an object, got \[\]"),
        ({"pairwize": []}, "unknown pairwize"),
        ({"pairwise": {}}, "pairwise: expected a list"),
        ({"pairwise": [7]}, r"pairwise\[0\]: expected an object, got 7"),
        (entry(tiles={"rows": 8}), r"pairwise\[0\]: unknown rows"),
        (entry(delta=1), "unknown delta"),
        (entry(dtype="float"), "dtype: expected one of float32, 16-bit, got 'float'"),
        ({"pairwise": [{"class": SOME}]}, r"pairwise\[0\]: missing tiles"),
        ({"pairwise": [{"class": {"dtype": "float32"}, "tiles": {}}]}, "missing positives, logits"),
        (entry(positives=7), r"positives: expected \[least, most\] or \[least, null\], got 7"),
        (entry(logits=[5, 4]), r"logits: expected .* got \[5, 4\]"),
        (entry(tiles={"count_rows": 3}), "count_rows: expected a power of two, got 3"),
        (entry(tiles={"count_rows": "4"}), "count_rows: expected"),
        (entry(tiles={"few": 256}), "few: expected"),
        (entry("breakpoints", {"few": 8}), r"breakpoints\[0\]: unknown few"),
        (entry("breakpoints", {"programs": 1000}), "programs: expected a power of two"),
        (entry("breakpoints", {"count_rows": 256}), "count_rows: 32 bits"),
        (entry("breakpoints", {"patterns": 1 << 17}), "patterns: expected at most 65536"),
        (entry("breakpoints", {"patterns": 1 << 16}), "patterns: no tensor may be so large"),
        (entry("breakpoints", {"lanes": 128}), "lanes: expected at most 64, got 128"),
        (entry("breakpoints", {"gradient_rows": 1 << 40}), "gradient_rows: expected at most 1024"),
        (entry("breakpoints", {"programs": 1 << 21}), "programs: expected at most 1048576"),
        (entry("breakpoints", {"block": True}), "block: expected a power of two, got True"),
        (entry(tiles={"count_block": 1 << 11}), "count_block: expected at most 1024, got 2048"),
        (entry(tiles={"count_block": 1024, "count_rows": 64}), "count_block, gradient_rows: no"),
        (entry(tiles={"gradient_rows": 1024, "gradient_warps": 32, "lanes": 64}), "no tensor"),
        (entry(tiles={"gradient_warps": 64}), "gradient_warps: expected at most 32"),
        (entry(tiles={"count_stages": 9}), "count_stages: expected at most 8"),
        (entry(tiles={"count_programs": 1 << 40}), "count_programs: expected at most 1048576"),
        (entry(tiles={"count_fold": 1 << 40}), "count_fold: expected at most 1048576"),
        (entry(tiles={"few": 2.0}), "few: expected a power of two, got 2.0"),
        (entry(positives=[-1, 5]), r"positives: expected .* got \[-1, 5\]"),
        (entry(logits=[1, True]), r"logits: expected .* got \[1, True\]"),
        (entry(dtype=["float32"]), r"dtype: expected one of .* got \['float32'\]"),
        ("[" * 100_000, "recursion"),
        ("[" * 200 + "]" * 200, "expected an object"),
        ('{"pairwise": ' + "[" * 900 + "]" * 900 + "}", "expected an object|recursion"),
        ("1" * 5000, "4300 digits|expected an object"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
        ({"costs": []}, "expected an object"),
        ({"costs": {"float64": PRICES}}, "unknown float64"),
        ({"costs": {"float32": {"pairwise": {}}}}, "costs of float32: missing breakpoints"),
        ({"costs": {"float32": PRICES | {"breakpoints": {"call": 1}}}}, "missing logit, positive"),
        (prices("pairwise", pair=-1), "costs of 16-bit: pairwise: pair: expected seconds, got -1"),
        (prices("breakpoints", logit=float("nan")), "breakpoints: logit: expected seconds"),
        (prices("breakpoints", logit="1e-12"), "breakpoints: logit: expected seconds"),
        (prices("breakpoints", logit=True), "breakpoints: logit: expected seconds, got True"),
        (prices("pairwise", call=float("inf")), "pairwise: call: expected seconds, got inf"),
        (prices("pairwise", call=10**400), "pairwise: call: expected seconds, got 1000"),
        (prices("breakpoints", pair=1), "unknown pair"),
    ],
)
def test_a_file_that_is_not_understood_is_an_error_that_names_it(on_a_gpu, content, reason):
    write(on_a_gpu, content)
    for read in (
        lambda: tuned.tiles_for(GPU, torch.float32, 500, 1 << 24),
        lambda: tuned.breakpoint_tiles_for(GPU, torch.float32, 500, 1 << 24),
        lambda: tuned.costs_for(GPU, torch.float32),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            read()
        assert str(on_a_gpu) in str(error.value)


def _not_utf_8(path):
    path.write_bytes(b'{"costs": "\xff"}')


def _endless(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to("nothing"), "No such file"),
        (_endless, "symbolic links"),
        (_not_utf_8, "decode"),
    ],
)
def test_a_file_that_cannot_be_read_is_the_same_error(on_a_gpu, make, reason):
    make(on_a_gpu)
    tuned.forget()
    with pytest.raises(ValueError, match=reason) as error:
        tuned.costs_for(GPU, torch.float32)
    assert str(error.value).startswith(f"{on_a_gpu}: not a file of tuned sizes and costs: ")


def test_a_file_without_permission_is_the_same_error(on_a_gpu, monkeypatch):
    """Whoever runs the tests may read everything."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    write(on_a_gpu, {})
    monkeypatch.setattr(type(on_a_gpu), "read_text", refuse)
    with pytest.raises(ValueError, match="Permission denied") as error:
        tuned.costs_for(GPU, torch.float32)
    assert str(on_a_gpu) in str(error.value)


@pytest.mark.parametrize("kind", ["missing", "file", "broken link"])
def test_a_users_directory_has_to_be_there(on_a_gpu, tmp_path, monkeypatch, kind):
    """A mistyped name would leave the defaults in silence."""
    folder = tmp_path / "here"
    if kind == "file":
        folder.touch()
    elif kind == "broken link":
        folder.symlink_to("nothing")
    monkeypatch.setenv("ALRP_TRITON_TILES", str(folder))
    for read in (tuned.tiles_for, tuned.breakpoint_tiles_for):
        with pytest.raises(ValueError, match=r"^ALRP_TRITON_TILES: expected a directory") as error:
            read(GPU, torch.float32, 500, 1 << 24)
        assert str(folder) in str(error.value)
    monkeypatch.setenv("ALRP_TRITON_TILES", "")
    assert tuned.tiles_for(GPU, torch.float32, 500, 1 << 24) == Tiles()


def test_the_defaults_are_sizes_that_kernels_can_take():
    for lanes in (32, 64):
        for dtype in (torch.float32, torch.float64):
            default_breakpoint_tiles(lanes, dtype).check()
    BreakpointTiles(count_rows=128, patterns=1 << 15).check()
