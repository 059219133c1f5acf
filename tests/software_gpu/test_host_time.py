"""The host's time beside a fused focal loss: measured, told, and left out with a reason."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from perf.bench import host_time
from perf.bench.report import to_markdown
from perf.software_gpu import build

REPORT = {"machine": {}, "bandwidth": 1.0, "rows": [], "dropped": []}


def section(host):
    (text,) = [x for x in to_markdown({**REPORT, "host": host}).split("## ") if "Host" in x]
    return text


def test_calls_are_timed_beside_a_fused_focal_loss():
    try:
        host_time.runtime.environment()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    host = host_time.measure()
    assert "why" not in host, host
    rows = {row["variant"]: row for row in host["rows"]}
    assert rows.keys() == {"breakpoints, triton", "pairwise, triton", "focal, fused"}
    assert rows[host_time.BESIDE]["times_focal"] == 1
    for row in rows.values():
        assert 0 < row["least_microseconds"] <= row["microseconds"]
        assert row["operations"] > 0
        assert row["synchronisations"] == 0
    text = section(host)
    assert "No time of a GPU" in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + len(rows)


def test_a_machine_without_the_device_is_told_why(monkeypatch):
    def refuse(*_, **__):
        raise build.Unavailable("no C++ compiler here")

    monkeypatch.setattr(host_time.runtime, "run", refuse)
    host = host_time.measure()
    assert host == {"why": "no C++ compiler here"}
    assert "Not measured: no C++ compiler here" in section(host)
