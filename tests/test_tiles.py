"""How the package finds the sizes of its kernels: by class, in a user's file or a shipped one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from alrp_triton.kernels import tiles as tiles_of
from alrp_triton.kernels.tiles import Class, Tiles

GPU = torch.device("cuda", 0)
SOME = {"dtype": "float32", "positives": [65, 1024], "logits": [1 << 20, None]}


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """As if there were a GPU of this name, and a user's directory."""
    properties = SimpleNamespace(name="Some GPU (80GB)", warp_size=32, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("ALRP_TRITON_TILES", str(tmp_path))
    tiles_of.forget()
    yield tmp_path / "Some-GPU-80GB.json"
    tiles_of.forget()


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    tiles_of.forget()


def test_without_a_file_there_are_defaults(on_a_gpu):
    assert tiles_of.tiles_for(GPU, torch.float32, 500, 1 << 24) == Tiles()
    assert tiles_of.tiles_for(torch.device("cpu"), torch.float32, 500, 1 << 24) == Tiles()


def test_a_class_chooses_the_sizes(on_a_gpu):
    write(on_a_gpu, {"pairwise": [{"class": SOME, "tiles": {"count_rows": 8}}], "model": {}})
    tuned = Tiles(count_rows=8)
    for positives, logits, dtype, expected in (
        (65, 1 << 20, torch.float32, tuned),
        (1024, 1 << 31, torch.float32, tuned),
        (64, 1 << 20, torch.float32, Tiles()),
        (1025, 1 << 20, torch.float32, Tiles()),
        (65, (1 << 20) - 1, torch.float32, Tiles()),
        (65, 1 << 20, torch.bfloat16, Tiles()),
        (65, 1 << 20, torch.float64, Tiles()),
    ):
        assert tiles_of.tiles_for(GPU, dtype, positives, logits) == expected
    any_size = Class("16-bit", (0, None), (0, None))
    assert all(any_size.holds(dtype, 7, 7) for dtype in (torch.float16, torch.bfloat16))


def test_a_users_file_wins_over_the_shipped_one(on_a_gpu, tmp_path, monkeypatch):
    shipped = tmp_path / "package" / "tiles"
    shipped.mkdir(parents=True)
    monkeypatch.setattr(tiles_of, "__file__", str(shipped.with_name("tiles.py")))
    write(shipped / on_a_gpu.name, {"pairwise": [{"class": SOME, "tiles": {"count_rows": 2}}]})
    assert tiles_of.tiles_for(GPU, torch.float32, 500, 1 << 24).count_rows == 2
    write(on_a_gpu, {"pairwise": [{"class": SOME, "tiles": {"count_rows": 8}}]})
    assert tiles_of.tiles_for(GPU, torch.float32, 500, 1 << 24).count_rows == 8


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ([], "unknown|has no attribute|not a"),
        ({"pairwize": []}, "unknown pairwize"),
        ({"pairwise": [{"class": SOME, "tiles": {"rows": 8}}]}, "unknown rows"),
        ({"pairwise": [{"class": SOME | {"delta": 1}, "tiles": {}}]}, "unknown delta"),
        ({"pairwise": [{"class": SOME | {"dtype": "float"}, "tiles": {}}]}, "dtype: expected"),
        ({"pairwise": [{"class": SOME}]}, "KeyError"),
        ({"pairwise": [{"class": SOME | {"positives": 7}, "tiles": {}}]}, "TypeError"),
        ({"pairwise": [{"class": SOME, "tiles": {"count_rows": 3}}]}, "count_rows: expected"),
        ({"pairwise": [{"class": SOME, "tiles": {"count_rows": "4"}}]}, "count_rows: expected"),
        ({"pairwise": [{"class": SOME, "tiles": {"few": 256}}]}, "few: expected"),
    ],
)
def test_a_file_that_is_not_understood_is_an_error_that_names_it(on_a_gpu, content, reason):
    write(on_a_gpu, content)
    with pytest.raises(ValueError, match=reason) as error:
        tiles_of.tiles_for(GPU, torch.float32, 500, 1 << 24)
    assert str(on_a_gpu) in str(error.value)
