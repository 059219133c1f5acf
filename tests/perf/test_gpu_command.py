"""perf.gpu: rehearsed whole, and what it does when a task is wrong, crashes, hangs or is late."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time

import pytest
import torch

pytest.importorskip("triton")
gpu = importlib.import_module("perf.gpu.runner")
main = importlib.import_module("perf.gpu.__main__").main
steps = importlib.import_module("perf.gpu.steps")
measurements = importlib.import_module("perf.gpu.measurements")
parity_checks = importlib.import_module("alrp_triton.testing.cases")
gpu_context = importlib.import_module("perf.gpu.context")
Step, Task, RehearsalOnCPU = steps.Step, steps.Task, gpu_context.RehearsalOnCPU


# Steps that a worker process finds here by name.


def right(context):
    yield Task("first", lambda: {"ok": True, "device_type": context.device.type})
    yield Task("second", lambda: {"figure": 1.5})


def planted(context):
    """Yield a count that is off by a little, held to the truth like any other."""
    kernels = next(iter(context.algorithms.values()))
    draw = parity_checks.draw_case

    class Off:
        choose_tiles, gradient = (staticmethod(x) for x in (kernels.choose_tiles, kernels.gradient))

        @staticmethod
        def count(*arguments):
            nfp, rank_positive, value_sum = kernels.count(*arguments)
            return nfp * (1 + 1e-4), rank_positive, value_sum

    case = draw(context.sizes.full, "spread", torch.float32, context.device)
    yield Task("as it is", lambda: parity_checks.verify(case, kernels))
    yield Task("off by a little", lambda: parity_checks.verify(case, Off))


def crashing(context):
    yield Task("before", lambda: {"ok": True})
    yield Task("raises", lambda: {"ok": 1 / 0})
    yield Task("dies", lambda: os.kill(os.getpid(), signal.SIGKILL))
    yield Task("after", lambda: {"ok": True})


def losing_the_device(context):
    def lose():
        def gone():
            raise RuntimeError("an illegal memory access was encountered")

        context.check_health = gone
        return {"ok": True}

    yield Task("lost", lose)
    yield Task("after", lambda: {"ok": True, "process": os.getpid()})


def unlisted(context):
    raise KeyError("no such list")
    yield


def hanging(context):
    yield Task("hangs", lambda: time.sleep(600) or {})
    yield Task("after", lambda: {"ok": True})


def slow(context):
    for number in range(100):
        yield Task(f"nap {number}", lambda: time.sleep(0.2) or {"slept": 0.2})


def run(tmp_path, *given, minutes=3.0):
    report = gpu.run(given, RehearsalOnCPU, tmp_path, minutes)
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == json.loads(
        json.dumps(report["steps"])
    )
    return report, {step["name"]: step for step in report["steps"]}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_a_planted_failure_is_named(tmp_path):
    report, by_name = run(tmp_path, Step("parity", planted, 100, True), Step("next", right, 10))
    assert by_name["parity"]["status"] == "failed"
    assert [row["ok"] for row in by_name["parity"]["rows"]] == [True, False]
    assert by_name["next"]["status"] == "ok"
    (failure,) = gpu.failures(report)
    assert failure.startswith("parity: off by a little: error over budget {'NFP'")
    assert failure in gpu.table(report)


def test_what_the_design_hangs_on_is_measured_first_and_checked(tmp_path, monkeypatch):
    order = [step.name for step in steps.STEPS]
    assert order[:2] == ["machine", "rates"]
    kernel_rates = importlib.import_module("perf.gpu.kernel_rates")
    context = RehearsalOnCPU(tmp_path)
    case = parity_checks.draw_case(context.sizes.full, "spread", torch.float32, context.device)
    found = kernel_rates.measure_intervals(case, context.capture, 1)
    assert found["ok"]
    negatives = case.negatives()
    assert found["relevant"] * case.logits[0].numel() == pytest.approx(
        (negatives >= case.scores.min() - case.delta).sum().item()
    )
    assert kernel_rates.measure_sort(case, context.capture, 1)["ok"]
    for name, module in (("intervals", kernel_rates.breakpoints), ("pairs", kernel_rates.pairwise)):
        right = module.count
        monkeypatch.setattr(module, "count", lambda *x, right=right: [y * 1.001 for y in right(*x)])
        wrong = getattr(kernel_rates, f"measure_{name}")(case, context.capture, 1)
        assert not wrong["ok"]
        assert "seconds" not in wrong
        assert "times its budget" in wrong["error"]


@pytest.mark.parametrize("part", ["values", "by_logits", "by_loc_errors"])
def test_a_loss_that_is_off_by_a_little_shows(part, monkeypatch):
    honest = parity_checks.evaluate

    def off(loss, case, impl, *rest):
        result = honest(loss, case, impl, *rest)
        if impl == "torch":
            return result
        given = getattr(result, part)
        more = [x * (1 + 1e-4) for x in given] if isinstance(given, list) else given * (1 + 1e-4)
        return result._replace(**{part: more})

    size = parity_checks.Size(20, 3, 5)
    case = parity_checks.draw_case(size, "spread", torch.float32, torch.device("cpu"))
    kernels = parity_checks.algorithms(torch.device("cpu"))[0]["pairwise"]
    assert parity_checks.verify_losses(case, "pairwise", kernels)["ok"]
    monkeypatch.setattr(parity_checks, "evaluate", off)
    assert not parity_checks.verify_losses(case, "pairwise", kernels)["ok"]


def test_nan_is_never_within_budget():
    got, truth = torch.tensor([1.0, torch.nan]), torch.ones(2, dtype=torch.float64)
    ratio = parity_checks.worst(got, truth, torch.ones(2))
    assert not parity_checks.verdict({"NFP": ratio})["ok"]
    assert not parity_checks.verdict({"all": parity_checks.worst_of([got], [truth], [truth])})["ok"]


def test_a_crash_stops_nothing_else(tmp_path):
    given = Step("crash", crashing, 60), Step("lost", losing_the_device, 60)
    report, by_name = run(tmp_path, *given, Step("list", unlisted, 60), Step("next", right, 60))
    before, raises, dies, after = by_name["crash"]["rows"]
    assert before["ok"]
    assert after["ok"]
    assert "ZeroDivisionError" in raises["error"]
    assert "exit status -9" in dies["error"]
    lost, recovered = by_name["lost"]["rows"]
    assert "illegal memory access" in lost["device"]
    assert not lost["ok"]
    assert recovered["ok"]
    assert "no such list" in by_name["list"]["rows"][0]["error"]
    assert by_name["next"]["status"] == "ok"
    assert by_name["next"]["rows"][1]["figure"] == 1.5
    assert [name.split(":")[0] for name in gpu.failures(report)] == ["crash"] * 2 + ["lost", "list"]


def test_a_hanging_task_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_LATE", 0.0)
    given = Step("hang", hanging, 15), Step("next", right, 1000)
    report, by_name = run(tmp_path, *given, minutes=2)
    assert "was stopped" in by_name["hang"]["rows"][0]["error"]
    assert by_name["next"]["status"] == "ok"
    assert len(gpu.failures(report)) == 1


def test_the_budget_is_kept_and_what_is_cut_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_MARGIN", 0.0)
    given = Step("slow", slow, 60), Step("late", right, 60), Step("parity", right, 60, True)
    report, by_name = run(tmp_path, *given, minutes=0.25)
    assert [step["status"] for step in report["steps"]] == ["incomplete", "skipped", "skipped"]
    assert by_name["slow"]["rows"][-1]["left_out"] == "stopped, time is up"
    assert gpu.failures(report) == ["parity: skipped, but required"]

    # A share of the time, after which what is left of a step is left out, and the next one runs.
    given = Step("slow", slow, 12), Step("next", right, 1000)
    report, by_name = run(tmp_path, *given, minutes=1.0)
    assert by_name["slow"]["status"] == "incomplete"
    assert by_name["slow"]["rows"][-1]["left_out"] == "time is up"
    assert by_name["next"]["status"] == "ok"
    assert gpu.failures(report) == []

    report, _ = run(tmp_path, *given, minutes=0.0)
    assert [step["status"] for step in report["steps"]] == ["skipped"] * 2


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "--rehearse" in capsys.readouterr().err


def test_rehearsal(tmp_path, capsys):
    status = main(["--rehearse", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0, printed
    assert report["rehearsal"] is True
    assert "REHEARSAL" in (tmp_path / "report.md").read_text()
    assert [step["name"] for step in report["steps"]] == [step.name for step in steps.STEPS]
    assert all(step["status"] == "ok" and step["rows"] for step in report["steps"]), printed
    assert len(printed) < 12_000
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) <= 8  # as many as are easily carried off a machine, and in one folder
    assert {path.parent for path in written} == {tmp_path}
    for step in report["steps"]:
        if step["required"]:
            assert all(row["ok"] is True for row in step["rows"])


def test_first_answers(tmp_path, capsys):
    """Everything that --first asks before the rest; required is none of it, so that it is short."""
    names = [step.name for step in steps.FIRST]
    assert sum(step.seconds for step in steps.FIRST) <= 240 - gpu._MARGIN
    assert not any(step.required for step in steps.FIRST)
    status = main(["--rehearse", "--first", "--out", str(tmp_path), "--only", *names])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0, printed
    rows = {step["name"]: step["rows"] for step in report["steps"]}
    assert list(rows) == names
    assert [len(rows[name]) for name in names] == [2, 3, 8, 3, 4, 2, 2]
    for launched in (rows["launches"][0], rows["launches"][2]):
        assert launched["host_microseconds"] > 0
    for row in rows["beside focal"]:
        assert row["times_focal"].keys() == {"host", "eager", "graph"}


def test_the_first_answers_come_before_the_rest_and_nothing_twice():
    order = [step.name for step in steps.chosen(first=True, only=None)]
    assert order[: len(steps.FIRST)] == [step.name for step in steps.FIRST]
    assert order[len(steps.FIRST) :] == [step.name for step in steps.STEPS[1:]]
    assert steps.chosen(first=False, only=None) == steps.STEPS


@pytest.mark.parametrize("wrong", ["alrp_triton", "focal, fused"])
def test_a_first_time_is_taken_even_of_what_is_wrong(wrong, tmp_path, monkeypatch):
    """And its row is marked."""
    variants = importlib.import_module("perf.bench.variants")
    first = importlib.import_module("perf.gpu.first")
    honest = variants.VARIANTS["breakpoints, torch"]
    off = honest._replace(
        bind=lambda inputs: lambda logits: 1.01 * honest.bind(inputs)(logits),
    )
    table = {"alrp_triton": honest, "focal, fused": honest, wrong: off}
    monkeypatch.setattr(variants, "VARIANTS", table)
    task = next(first.beside_focal(RehearsalOnCPU(tmp_path)))
    row = task.run()
    assert not row["ok"]
    for name in table:
        assert row[name]["right"] == (name != wrong)
        assert row[name]["eager_microseconds"] > 0
    step = {"name": "beside focal", "required": False, "status": "failed", "seconds": 1.0}
    report = {"rehearsal": False, "steps": [step | {"rows": [{"task": task.name, **row}]}]}
    (failure,) = gpu.failures(report)
    assert failure.startswith(f"beside focal: {task.name}")
    assert "eager_microseconds" in gpu.table(report)


def test_a_capture_that_fails_leaves_the_other_times(tmp_path, monkeypatch):
    first = importlib.import_module("perf.gpu.first")
    context = RehearsalOnCPU(tmp_path)

    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(context, "capture", refuse)
    task = list(first.launches(context))[2]
    row = task.run()
    assert row["eager_microseconds"] > 0
    assert "not permitted" in row["no_graph"]
    assert "graph_microseconds" not in row


def row(variant, distribution, **changed):
    cell = {"dtype": "float32", "N": 60, "P": 5, "delta": 1.0, "distribution": distribution}
    measured = {"parity": True, "seconds": 0.5, "extra_bytes": None}
    return {**cell, "variant": variant, **measured, **changed}


def test_the_benchmark_takes_the_sizes_and_costs_just_found(tmp_path, monkeypatch):
    bench = importlib.import_module("perf.bench.__main__")
    tuner = importlib.import_module("perf.autotune.tune")
    tuned = importlib.import_module("alrp_triton.kernels.tuning.files")
    monkeypatch.setenv(tuned.FOLDER, "elsewhere")
    context = RehearsalOnCPU(tmp_path)
    context.until = time.monotonic() + 60
    found = []

    measured = {"worst_ratio": {}, "calls": 3, "slower": 1, "lost": 0.01, "most_lost": 0.03}
    fitted = {"dtype": "float32", "taken": True, "measured": measured, "before": measured}

    def tune(device, seconds, progress):
        found.append(os.environ[tuned.FOLDER])
        assert 0 < seconds <= 60
        return {
            "pairwise": [],
            "breakpoints": [],
            "left_out": [],
            "search": [],
            "fits": [fitted],
            "machine": measurements.timing.machine(device),
        }

    def run(cells, variants, device, rounds, until, progress):
        found.append(os.environ[tuned.FOLDER])
        ours = [row(bench.OURS, "init"), row(bench.OURS, "mid"), row("other", "mid", parity=False)]
        return {"rows": ours, "dropped": []}

    monkeypatch.setattr(tuner, "tune", tune)
    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "write", lambda report, folder, name: [folder / f"{name}.json"])
    (tuning,), (benchmark,) = measurements.tuning(context), measurements.benchmark(context)
    told = tuning.run()
    assert told["gains"] == {}
    assert told["costs"]["float32"] == measured | {"taken": True, "lost_before": 0.01}
    timed = benchmark.run()
    assert timed["ok"]
    assert timed["milliseconds"] == {bench.OURS: 500.0}
    assert found == ["elsewhere", str(tmp_path)]
    assert os.environ[tuned.FOLDER] == "elsewhere"


def test_a_benchmark_that_is_wrong_fails(tmp_path, monkeypatch):
    bench = importlib.import_module("perf.bench.__main__")
    context = RehearsalOnCPU(tmp_path)
    rows = [row(bench.OURS, "init", parity=False, seconds=None)]
    monkeypatch.setattr(bench, "run", lambda *_, **__: {"rows": rows, "dropped": []})
    monkeypatch.setattr(bench, "write", lambda *_: [])
    (benchmark,) = measurements.benchmark(context)
    assert not benchmark.run()["ok"]
