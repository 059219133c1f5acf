"""The tuner on a CPU: what it must never choose, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from alrp_triton.kernels import breakpoints, pairwise
from alrp_triton.kernels.tuning import files as tuned
from alrp_triton.kernels.tuning.block_sizes import BreakpointTiles, Class, Tiles, dtype_class
from alrp_triton.kernels.tuning.costs import BreakpointCosts, Costs, PairwiseCosts, default_costs
from perf import progress, timing
from perf.autotune import (
    __main__ as autotune,
)
from perf.autotune import (
    dry_run,
    search,
)
from perf.autotune import (
    fit_costs as cost_model,
)
from perf.autotune import (
    tune as tuner,
)
from perf.autotune.candidates import (
    ALGORITHMS,
    GOALS,
    GRIDS,
    REHEARSED_GOALS,
    SIDES,
    Goal,
    candidates,
)
from perf.autotune.fit_costs import Call, Timed
from perf.autotune.verify import Verifier, draw
from perf.machine_code import occupancy as machine_code
from perf.machine_code.occupancy import LIMITS, Compiled, Task, resident_warps

CPU = torch.device("cpu")
LONG = 3600.0  # seconds: on a machine however busy, no test runs out of them
GOAL = Goal("pairwise", Class("float32", (1, 64), (1, 1 << 20)), 5, 60, "spread")
LOOK_UP = GOAL._replace(algorithm="breakpoints", kind=Class("16-bit", (1, None), (1, None)))
GRID = {
    "count": ({"count_block": (64, 128), "count_rows": (2, 4)},),
    "gradient": ({"gradient_rows": (4, 8)},),
}
LOOK_UP_GRID = {
    "count": ({"count_rows": (8, 16)}, {"patterns": (1 << 13, 1 << 14)}),
    "gradient": ({"gradient_rows": (16, 32)},),
}
GRIDS_HERE = {"pairwise": GRID, "breakpoints": LOOK_UP_GRID}
DEFAULTS = tuned.defaults_for(CPU, torch.float32)


# --- the rule -----------------------------------------------------------------------------------


def noisy(seconds: float, spread: float, seed: int) -> list[float]:
    noise = torch.randn(search.DUEL, generator=torch.Generator().manual_seed(seed))
    return (seconds * (spread * noise).exp()).tolist()


def test_a_slower_candidate_never_wins():
    for seed in range(100):
        assert not search.better(noisy(1.05, 0.02, seed), noisy(1.0, 0.02, seed + 1000))


def test_an_equal_candidate_wins_no_more_often_than_by_chance():
    for spread in (0.0, 1e-4, 0.02, 0.3):
        won = [
            search.better(noisy(1.0, spread, seed), noisy(1.0, spread, seed + 1000))
            for seed in range(200)
        ]
        assert sum(won) <= 6  # 2 expected, and more than 6 once in 200


def test_a_faster_candidate_wins():
    for seed in range(100):
        assert search.better(noisy(0.9, 0.02, seed), noisy(1.0, 0.02, seed + 1000))
    drifting = [1 + n / 5 for n in range(search.DUEL)]  # as a GPU that warms up
    assert search.better([0.95 * t for t in drifting], drifting)


def test_so_many_rounds_have_to_be_won():
    def won(wins: int, rounds: int) -> bool:
        return search.better([0.9] * wins + [1.1] * (rounds - wins), [1.0] * rounds)

    assert won(19, 25)
    assert not won(18, 25)
    assert won(7, 7)
    assert not won(6, 6)
    assert not search.better([0.995] * 25, [1.0] * 25)  # too little to be worth it
    assert not search.better([], [])


# --- the search ---------------------------------------------------------------------------------


class Clock:
    """In place of `timing.interleave`: seconds made of a candidate's sizes; notes who ran."""

    def __init__(self, seconds) -> None:
        self.seconds, self.timed = seconds, set()

    def interleave(self, calls, device, rounds, until):
        """Return the times given to each candidate, and take no time."""
        found = {name: call.args[1] for name, call in calls.items()}  # partials of (side, tiles)
        self.timed |= set(found.values())
        return {
            name: [self.seconds(tiles) * (1 + 1e-3 * n) for n in range(rounds)]
            for name, tiles in found.items()
        }


def run(monkeypatch, seconds, goal=GOAL, **settings):
    clock = Clock(seconds)
    monkeypatch.setattr(timing, "interleave", clock.interleave)
    given = {"progress": False, "grids": GRIDS_HERE, "calls": (), **settings}
    result = tuner.tune(CPU, LONG, [goal], **given)
    (entry,) = result[goal.algorithm]
    kind = Tiles if goal.algorithm == "pairwise" else BreakpointTiles
    return kind(**entry["tiles"]), entry["measured"], result, clock


def test_the_fastest_sizes_are_chosen_for_each_kernel(monkeypatch):
    tiles, measured, _, _ = run(
        monkeypatch, lambda x: 1e-3 * x.count_rows * x.count_block * x.gradient_rows
    )
    assert tiles == Tiles(count_block=64, count_rows=2, gradient_rows=4)
    assert measured["count"]["gain"] == pytest.approx(0.75)
    assert measured["gradient"]["gain"] == pytest.approx(0.5)


KEPT = {"16-bit": tuner._as_objects(default_costs(torch.bfloat16))}


def test_a_slower_candidate_does_not_replace_a_tuned_one(monkeypatch, tmp_path):
    in_use = Tiles(count_block=64, count_rows=2, gradient_rows=4)
    old = {
        "class": tuner._kind(GOAL), "tiles": in_use._asdict(),
        "measured": {"count": {"seconds": 1.0, "gain": 0.5}},
    }  # fmt: skip
    name = tuned.file_name(timing.machine(CPU)["device"])
    (tmp_path / name).write_text(json.dumps({"pairwise": [old], "costs": KEPT}))
    tiles, measured, result, clock = run(
        monkeypatch, lambda x: 1.0 if x == in_use else 1.2, folder=str(tmp_path)
    )
    assert len(clock.timed) > 4
    assert tiles == in_use
    assert measured["count"]["gain"] == measured["gradient"]["gain"] == 0
    assert result["costs"] == KEPT


def test_a_candidate_that_is_not_better_beyond_the_noise_changes_nothing(monkeypatch):
    assert run(monkeypatch, lambda x: 1.0 if x == Tiles() else 0.995)[0] == Tiles()


def plant(monkeypatch, side: str, is_wrong, error: float, kernels=pairwise) -> None:
    right = getattr(kernels, side)

    def planted(*arguments):
        out = list(right(*arguments))
        if is_wrong(arguments[-1]):
            out[0] = out[0] * (1 + error)
        return out

    monkeypatch.setattr(kernels, side, planted)


@pytest.mark.parametrize("side", SIDES)
def test_a_candidate_with_a_planted_error_is_refused_however_fast(monkeypatch, side):
    size = f"{side}_rows"
    wrong = GRID[side][0][size][0]
    plant(monkeypatch, side, lambda x: getattr(x, size) == wrong, 1e-4)
    tiles, _, result, clock = run(monkeypatch, lambda x: 1e-3 * getattr(x, size))
    assert getattr(tiles, size) != wrong
    (taken_down,) = (x for x in result["search"] if x["side"] == side)
    refused = [x for x in taken_down["tried"][0] if x["refused"]]
    assert {x["tiles"][size] for x in refused} == {wrong}
    assert all("times its budget" in x["refused"] and x["seconds"] is None for x in refused)
    assert all(getattr(x, size) != wrong for x in clock.timed)  # checked before any time
    assert "refused" in tuner.to_text(result)


def test_a_candidate_that_does_not_run_or_repeat_is_refused(monkeypatch):
    right, runs = pairwise.count, []

    def planted(*arguments):
        if arguments[-1].count_block == 64 and arguments[-1].count_rows == 2:
            raise RuntimeError("out of resources")
        runs.append(arguments[-1])
        nfp, *rest = right(*arguments)
        if arguments[-1].count_block == 64:
            nfp[0] += 1e-14 * len(runs)
        return nfp, *rest

    monkeypatch.setattr(pairwise, "count", planted)
    tiles, _, result, _ = run(monkeypatch, lambda x: float(x.count_block))
    assert tiles.count_block == 128
    reasons = {x["refused"] for x in result["search"][0]["tried"][0] if x["refused"]}
    assert reasons == {"does not run: RuntimeError: out of resources", "two runs differ"}


def test_sizes_in_use_that_are_wrong_are_replaced_by_slower_ones(monkeypatch):
    plant(monkeypatch, "gradient", lambda x: x == Tiles(), 1e-3)
    tiles, measured, _, _ = run(monkeypatch, lambda x: 1.0 / x.gradient_rows)
    assert tiles == Tiles(gradient_rows=4)
    assert "times its budget" in measured["gradient"]["refused before"]


def test_a_candidate_that_spills_is_not_run(monkeypatch):
    def examine(tasks):
        return [Compiled(255, int(x.tiles.count_rows == 2), 0, 2.0, 8) for x in tasks]

    monkeypatch.setattr(tuner, "_nothing_compiled", examine)
    tiles, _, _, clock = run(monkeypatch, lambda x: float(x.count_rows))
    assert tiles.count_rows == 4
    assert all(x.count_rows == 4 for x in clock.timed)

    # But the sizes in use are: only a time or a wrong result takes them out.
    monkeypatch.setattr(tuner, "_nothing_compiled", lambda tasks: [_spilling(x) for x in tasks])
    assert run(monkeypatch, lambda x: 1.0)[0] == Tiles()


def _spilling(task: Task) -> Compiled:
    return Compiled(255, int(task.tiles == Tiles()), 0, 2.0, 8)


def test_without_time_everything_stays_and_is_said():
    result = tuner.tune(CPU, 0, [GOAL], progress=False, calls=[Call("float32", 5, 60)])
    assert result["pairwise"] == []
    assert "no time left for: pairwise, float32, P = 5, N = 60; costs, float32" in tuner.to_text(
        result
    )


def test_out_of_time_in_the_middle_keeps_the_sizes(monkeypatch):
    verify = Verifier(draw(GOAL, CPU))
    until = time.monotonic() + LONG
    of_count = search.Search(GOAL, "count", CPU, verify, lambda tasks: [None] * len(tasks), until)
    monkeypatch.setattr(verify, "refuses", lambda side, tiles: setattr(of_count, "until", 0.0))
    assert of_count.run(Tiles(), GRID["count"]) == (Tiles(), {})
    ((first, *others),) = of_count.tried
    assert first.checked
    assert len(others) == 3
    assert not any(x.checked for x in others)


# --- breakpoints and costs ----------------------------------------------------------------------


def test_the_sizes_of_the_breakpoint_kernels_are_tuned(monkeypatch):
    tiles, measured, result, _ = run(
        monkeypatch, lambda x: 1e-9 * x.count_rows * x.patterns / x.gradient_rows, LOOK_UP
    )
    assert tiles == DEFAULTS.breakpoints._replace(count_rows=8, patterns=1 << 13, gradient_rows=32)
    assert measured["count"]["gain"] == pytest.approx(0.75)
    assert "breakpoints, 16-bit, P from 1, N from 1, count" in tuner.gains(result)
    assert result["pairwise"] == []
    assert tuned.parse(json.loads(json.dumps({"breakpoints": result["breakpoints"]})), DEFAULTS)


@pytest.mark.parametrize("side", SIDES)
def test_a_look_up_with_a_planted_error_is_refused(monkeypatch, side):
    size = f"{side}_rows"
    wrong = LOOK_UP_GRID[side][0][size][0]
    plant(monkeypatch, side, lambda x: getattr(x, size) == wrong, 2e-2, breakpoints)
    tiles, _, _, clock = run(monkeypatch, lambda x: 1e-3 * getattr(x, size), LOOK_UP)
    assert getattr(tiles, size) != wrong
    assert all(getattr(x, size) != wrong for x in clock.timed)


TRUE = Costs(PairwiseCosts(3e-5, 1e-12, 2e-13, 1e-12), BreakpointCosts(1e-4, 8e-12, 3e-9))


def times_of(costs, factor=1.0):
    """Return what the calls cost by these prices, in place of `cost_model.time_calls`."""

    def time_calls(calls, tiles_of, device, until, progress):
        return [
            Timed(call, {name: factor * prices.seconds(call.positives, call.logits)
                         for name, prices in costs._asdict().items()}, {})
            for call in calls
        ]  # fmt: skip

    return time_calls


def test_costs_are_fitted_and_the_package_reads_them(monkeypatch, tmp_path):
    monkeypatch.setattr(cost_model, "time_calls", times_of(TRUE))
    result = tuner.tune(CPU, LONG, [], progress=False, calls=cost_model.CALLS)
    for path in tuner.write(result, tmp_path):
        assert path.exists()
    found = tuned.read_file(tmp_path / tuned.file_name(timing.machine(CPU)["device"]), DEFAULTS)
    assert set(found.costs) == {"float32", "16-bit"}
    for costs in found.costs.values():
        for prices, true in zip(costs, TRUE, strict=True):
            assert prices == pytest.approx(true, rel=1e-6)
    assert "the slower algorithm for 0 of 16 calls" in tuner.to_text(result)


def test_costs_that_would_lose_more_replace_nothing(monkeypatch, tmp_path):
    """Times that no prices explain, and prices in use that happen to be right each time."""

    def time_calls(calls, *rest):
        found = []
        for call in calls:
            chosen = TRUE.choose(call.positives, call.logits)
            found.append(Timed(call, {x: 1e-3 if x == chosen else 2e-3 for x in ALGORITHMS}, {}))
        return found

    monkeypatch.setattr(cost_model, "time_calls", time_calls)
    name = tuned.file_name(timing.machine(CPU)["device"])
    in_use = {"float32": tuner._as_objects(TRUE)}
    (tmp_path / name).write_text(json.dumps({"costs": in_use}))
    calls = [call for call in cost_model.CALLS if call.dtype == "float32"]
    result = tuner.tune(CPU, LONG, [], progress=False, calls=calls, folder=str(tmp_path))
    assert result["costs"] == in_use
    (fit,) = result["fits"]
    assert fit["before"]["lost"] == 0 < fit["measured"]["lost"]
    assert "the costs stay" in tuner.to_text(result)


def test_too_few_times_change_no_costs(monkeypatch):
    monkeypatch.setattr(cost_model, "time_calls", times_of(TRUE))
    calls = [call for call in cost_model.CALLS if call.dtype == "float32"][:3]
    result = tuner.tune(CPU, LONG, [], progress=False, calls=calls)
    assert result["costs"] == {}
    assert result["left_out"] == ["costs, float32"]


# --- parity -------------------------------------------------------------------------------------


def goal(dtype: torch.dtype, positives: int, logits: int, stage: str) -> Goal:
    return GOAL._replace(
        kind=GOAL.kind._replace(dtype=dtype_class(dtype)),
        positives=positives, logits=logits, stage=stage,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", ["init", "mid", "spread"])
def test_right_kernels_pass_and_small_errors_do_not(dtype, stage, monkeypatch):
    verify = Verifier(draw(goal(dtype, 40, 400, stage), CPU))
    for side, error in (("count", 3e-5), ("gradient", 2e-2 if dtype != torch.float32 else 3e-5)):
        assert verify.refuses(side, Tiles()) is None
        with monkeypatch.context() as patch:
            plant(patch, side, lambda x: True, error)
            assert "times its budget" in verify.refuses(side, Tiles())
            plant(patch, side, lambda x: True, float("nan"))
            assert verify.refuses(side, Tiles()) is not None


def test_a_call_that_shows_no_error_is_no_check():
    with pytest.raises(ValueError, match="an error would not show"):
        Verifier(draw(goal(torch.float32, 2, 40, "late"), CPU))


# --- candidates and machine code ----------------------------------------------------------------


def test_classes_and_candidates():
    for algorithm, number in (("pairwise", 12), ("breakpoints", 4)):
        goals = [goal for goal in GOALS if goal.algorithm == algorithm]
        kinds = [goal.kind for goal in goals]
        assert len(set(kinds)) == len(kinds) == number
        for goal in goals:
            holding = [x for x in kinds if x.holds(goal.dtype, goal.positives, goal.logits)]
            assert holding == [goal.kind]
    for algorithm, default in zip(("pairwise", "breakpoints"), DEFAULTS, strict=True):
        for grid in (grid for side in SIDES for grid in GRIDS[algorithm][side]):
            found = candidates(default, grid)
            assert found[0] == default
            assert len(set(found)) == len(found) <= 50
            assert all(set(sizes) <= {getattr(x, n) for x in found} for n, sizes in grid.items())


def test_only_16_bit_logits_have_patterns():
    single = LOOK_UP._replace(kind=LOOK_UP.kind._replace(dtype="float32"))
    for goal, number in ((LOOK_UP, 2), (single, 1)):
        assert len(goal.grids("count", GRIDS_HERE)) == number


def test_same_machine_code_is_compiled_once():
    task = Task("count", "float32", Tiles(), "sm_90")
    other = task._replace(tiles=Tiles(count_programs=1, gradient_rows=4))
    assert task.code() == other.code() != task._replace(tiles=Tiles(few=8)).code()
    task = Task("count", "float32", BreakpointTiles(), "sm_90")
    other = task._replace(tiles=BreakpointTiles(programs=1, block=1, patterns=1, gradient_rows=4))
    assert task.code() == other.code() != task._replace(tiles=BreakpointTiles(count_rows=8)).code()


def test_occupancy():
    sm_90 = LIMITS["sm_90"]
    assert resident_warps(32, 0, 1, sm_90) == 32  # as many programs as there may be
    assert resident_warps(32, 0, 2, sm_90) == 64
    assert resident_warps(255, 0, 1, sm_90) == 8
    assert resident_warps(168, 0, 4, sm_90) == 12
    assert resident_warps(32, 113 << 10, 4, sm_90) == 8  # shared memory for two
    assert resident_warps(128, 0, 1, LIMITS["gfx942"]) == 16


def test_dry_run_command(tmp_path):
    """It runs in a process of its own, since nothing compiles under TRITON_INTERPRET."""
    code = (
        "from pathlib import Path; from perf.autotune import dry_run\n"
        "grids = {'count': ({'count_rows': (4,)},), 'gradient': ({'gradient_rows': (4, 8)},)}\n"
        "grids = {'pairwise': grids, 'breakpoints': grids}\n"
        "if __name__ == '__main__': dry_run.run('sm_90', Path('.'), grids)\n"
    )
    (tmp_path / "run.py").write_text(code)
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "run.py"], cwd=tmp_path, capture_output=True, text=True,
        env=environment | {"PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rankings = json.loads((tmp_path / "dry-run-sm_90.json").read_text())
    found = {(x["algorithm"], x["kernel"], x["dtype"]): x["candidates"] for x in rankings}
    assert len(found) == len(rankings) == 8
    best, second = found["pairwise", "gradient", "float32"]
    assert best["tiles"]["gradient_rows"] == 8
    assert 2 < best["instructions"] < second["instructions"] < 3
    assert best["warps"] < second["warps"]
    few, many = (
        {x["tiles"]["count_rows"]: x for x in found["breakpoints", "count", "float32"]}[rows]
        for rows in (4, 16)
    )
    assert 40 < many["instructions"] < few["instructions"]
    assert many["registers"] > few["registers"]
    assert all(x["refused"] is None for x in found["breakpoints", "gradient", "bfloat16"])
    assert done.stdout.count("(default)") == 8


def test_dry_run_refuses_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        dry_run.run("sm_90", tmp_path)


def test_what_does_not_compile_is_said(monkeypatch):
    monkeypatch.setattr(machine_code, "_launch", lambda task: 1 / 0)
    reason = machine_code.examine(Task("count", "float32", Tiles(), "sm_90"))
    assert reason.startswith("does not compile: ZeroDivisionError")


# --- the command --------------------------------------------------------------------------------


def test_command_writes_a_file_that_the_package_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("ALRP_TRITON_TILES", str(tmp_path))
    monkeypatch.setattr(tuner, "REHEARSED_GRIDS", GRIDS_HERE)
    monkeypatch.setattr(timing, "interleave", Clock(lambda tiles: 1e-3).interleave)
    monkeypatch.setattr(cost_model, "time_calls", times_of(TRUE))
    assert autotune.main(["--minutes", "60"]) == 0
    path = tmp_path / tuned.file_name(timing.machine(CPU)["device"])
    found = tuned.read_file(path, DEFAULTS)
    for algorithm, entries in (("pairwise", found.pairwise), ("breakpoints", found.breakpoints)):
        ((kind, tiles),) = entries
        assert kind in [goal.kind for goal in REHEARSED_GOALS if goal.algorithm == algorithm]
        tiles.check()
    assert found.costs["float32"].choose(9, 120) == TRUE.choose(9, 120)
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert "% less than before" in printed
    assert "float32: new costs" in printed
    assert path.with_suffix(".search.png").stat().st_size > 10_000


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress.bar(range(3), "classes", 3)) == [0, 1, 2]
    assert capsys.readouterr().out.splitlines()[-1] == "classes: 3 of 3"
