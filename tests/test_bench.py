"""The timing harness, and what the CPU path has to cost at most."""

from __future__ import annotations

import json

import pytest
import torch

from alrp_triton import alrp_loss
from perf import bench, workloads
from perf.variants import VARIANTS, Variant, class_indices


def off_by_a_little(logits, targets, loc_errors):
    return 1.001 * alrp_loss(logits, targets, loc_errors)[0]


def test_a_wrong_variant_gets_no_time():
    variants = {name: VARIANTS[name] for name in ("alrp_triton", "published loop")}
    variants["planted"] = Variant(off_by_a_little, class_indices, ranks=True)
    rows = bench.compare(variants, "mid", 20_000, 20, rounds=2, classes=10)
    by_name = {row["variant"]: row for row in rows}
    assert by_name["planted"]["seconds"] is None
    assert by_name["planted"]["error"] == pytest.approx(1e-3, rel=1e-2)
    assert all(by_name[name]["seconds"] > 0 for name in ("alrp_triton", "published loop"))
    assert "not the reference's gradient" in bench.to_markdown(rows)


@pytest.mark.parametrize("distribution", workloads.DISTRIBUTIONS)
def test_the_published_loop_is_the_loss(distribution):
    variants = {"published loop": VARIANTS["published loop"]}
    (row,) = bench.compare(variants, distribution, 400_000, 30, rounds=1, classes=10)
    assert 0 < row["error"] < 1e-5


def test_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(bench, "retinanet_call", lambda coco: bench_call)
    bench_call = {
        "boxes": "drawn", "N": 8, "P": 1, "ignored": 0, "forward_s": 0.1,
        "forward_backward_s": 0.2, "forward_extra_share": None,
    }  # fmt: skip
    out = tmp_path / "bench.json"
    bench.main(["--logits", "8000", "--positives", "5", "--rounds", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert len(result["rows"]) == len(workloads.DISTRIBUTIONS) * len(VARIANTS)
    assert "| published loop |" in capsys.readouterr().out


def test_retinanet_sized_call():
    """10.5 million logits on boxes at 512 px: at most 3 s and 1.5 times the logits' memory."""
    calls = [bench.retinanet_call(None) for _ in range(3)]
    assert calls[0]["N"] == 10_475_520
    assert 100 < calls[0]["P"] < 2000
    assert calls[0]["ignored"] > 0
    assert min(call["forward_backward_s"] for call in calls) < 3
    extra = [call["forward_extra_share"] for call in calls]
    assert None in extra or max(extra) < 1.5


@pytest.mark.parametrize("distribution", ["init", "mid", "spread"])
def test_at_least_five_times_faster_than_the_published_loop(distribution):
    """P = 500, N = 2 million, forward + backward, the best of three each, side by side."""
    variants = {name: VARIANTS[name] for name in ("alrp_triton", "published loop")}
    ours, loop = bench.compare(variants, distribution, 2_000_000, 500, rounds=3)
    assert loop["least"] > 5 * ours["least"]


def test_anchors_are_assigned_by_iou():
    boxes = torch.tensor([[64.0, 64.0, 96.0, 96.0], [1.0, 1.0, 5.0, 5.0]])
    targets = workloads.retinanet_targets([(boxes, torch.tensor([7, 3]))])
    assert targets.numel() == 32_736  # 5456 places, 6 anchors each
    assert (targets == 7).sum() >= 1
    assert (targets == 3).sum() == 1  # too small for IoU 0.5: its best anchor all the same
    assert (targets == -100).any()
    assert set(targets.unique().tolist()) == {-100, -1, 3, 7}
