"""All that only a GPU can tell, in one command of nine minutes: `python -m perf.gpu`.

The steps of `gpu_steps.STEPS` run in a worker process, one after the other, each task guarded by
itself. A worker that dies, hangs, or whose device an illegal access has left unusable is replaced,
and the next one goes on with the next task; where all goes well, CUDA starts only once. Every
result is written to report.json as soon as it is there, so that whatever ends the command leaves
what was done. The exit status is 0 if nothing failed and every required step ran to its end.

`--rehearse` walks the same steps at toy sizes, and without a GPU with kernels in Triton's
interpreter. Its report says so, and nothing in it may be quoted.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from ..bench.report import SUFFIXES
from .context import Context, Rehearsal, Task
from .measurements import BENCHMARK
from .steps import Step

_RESULTS = Path(__file__).parents[1] / "results" / "gpu"
_FILES = (
    "report.json", "report.md", *(f"{BENCHMARK}.{suffix}" for suffix in SUFFIXES),
)  # fmt: skip
_MARGIN = 6.0  # seconds of the budget that are kept for ending
_LATE = 20.0  # seconds by which a task may pass its step's share before it counts as hung
_STARTING, _BETWEEN = "(start of the process)", "(between two tasks)"
# Steps whose figures stand in the table.
_MEASURE = (
    "machine", "launches", "first rates", "beside focal", "profiles",
    "memory", "timings", "rates", "benchmark", "tuning",
)  # fmt: skip
_SHOWN = 100  # characters of an error in the table

Report = dict[str, Any]


# --- the worker ---------------------------------------------------------------------------------


class Order(NamedTuple):
    """What the worker is asked for."""

    tasks: Callable[[Context], Any]
    first: int  # the task to go on with
    until: float  # time.monotonic() from which on no further task begins


def work(connection: Connection, make: type[Context], out: Path) -> None:
    """Carry out orders until told None: say what begins, and what came of it."""
    context = make(out)
    while (order := connection.recv()) is not None:
        context.until = order.until
        try:
            for number, task in enumerate(order.tasks(context)):
                if number < order.first:
                    continue
                if time.monotonic() >= order.until:
                    connection.send(("left out", task.name))
                    continue
                connection.send(("begin", task.name))
                row = attempt(task, context)
                connection.send(("end", row))
                if "device" in row:  # lost: another process has to go on
                    return
        except Exception:
            # The tasks could not even be listed.
            connection.send(("begin", "the list of tasks"))
            connection.send(("end", {"ok": False, "error": traceback.format_exc()}))
        connection.send(("done", ""))


def attempt(task: Task, context: Context) -> dict[str, Any]:
    """Return the result of a task, or its traceback; and whether the device has survived it."""
    start = time.monotonic()
    try:
        row = task.run()
        context.check_health()  # an error of the device shows late
    except BaseException as error:
        row = {"ok": False, "error": traceback.format_exc()}
        if not isinstance(error, Exception):
            row["device"] = "the process was interrupted"
    try:
        context.check_health()
    except Exception as error:
        row |= {"ok": False, "device": str(error)}
    return {**row, "took": round(time.monotonic() - start, 3)}


class Worker:
    """A process that carries out orders, replaced when it is lost."""

    def __init__(self, make: type[Context], out: Path) -> None:
        self._arguments = make, out
        self._process: Any = None
        self._connection: Any = None

    def carry_out(
        self, order: Order, end: float, limit: float, keep: Callable[[dict[str, Any]], None]
    ) -> bool:
        """Run the tasks of an order from its first one on.

        Args:
            order: the tasks.
            end: time.monotonic() at which everything ends.
            limit: seconds after which a task is taken for hung.
            keep: is given the result of each task, or that it was left out, at once.

        Returns:
            Whether the list is finished; if not, the worker was lost in the last of them.
        """
        self._start()
        running, due = _STARTING, time.monotonic() + limit
        try:
            self._connection.send(order)
            while True:
                if not self._connection.poll(max(0.0, min(end, due) - time.monotonic())):
                    raise TimeoutError("it did not end in time and was stopped")
                kind, content = self._connection.recv()
                if kind == "done":
                    return True
                if kind == "left out":
                    keep({"task": content, "left_out": "time is up"})
                elif kind == "begin":
                    running, due = content, time.monotonic() + limit
                else:
                    keep({"task": running, **content})
                    running = _BETWEEN
                    if "device" in content:
                        self.stop()
                        return False
        except (EOFError, OSError) as error:
            self.stop()
            if time.monotonic() >= end:
                keep({"task": running, "left_out": "stopped, time is up"})
                return False
            why = str(error)
            if not isinstance(error, TimeoutError):
                why = f"its process died, exit status {self._process.exitcode}"
            keep({"task": running, "ok": False, "error": why})
            return False

    def dismiss(self) -> None:
        """Let the process end by itself, if it waits for an order."""
        if self._process is not None and self._process.is_alive():
            with contextlib.suppress(OSError):
                self._connection.send(None)
            self._process.join(_MARGIN / 2)
        self.stop()

    def stop(self) -> None:
        """End the process, however it is."""
        if self._process is not None and self._process.is_alive():
            self._process.kill()
        if self._process is not None:
            self._process.join()
            self._connection.close()

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        spawn = multiprocessing.get_context("spawn")
        self._connection, other = spawn.Pipe()
        self._process = spawn.Process(target=work, args=(other, *self._arguments), daemon=False)
        self._process.start()
        other.close()


# --- the command --------------------------------------------------------------------------------


def run(steps: Sequence[Step], make: type[Context], out: Path, minutes: float) -> Report:
    """Run the steps within the time, write the report after each task, and return it."""
    start = time.monotonic()
    end = start + 60 * minutes - _MARGIN
    report: Report = {
        "rehearsal": issubclass(make, Rehearsal),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "minutes": minutes,
        "steps": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    worker = Worker(make, out)
    try:
        for number, step in enumerate(steps):
            entry = {"name": step.name, "required": step.required, "status": "running"}
            entry |= {"seconds": 0.0, "rows": []}
            report["steps"].append(entry)
            needed = sum(other.seconds for other in steps[number:])
            _run_step(step, entry, worker, end, needed, save=lambda: _write(report, out))
            _write(report, out)
            print(f"{time.monotonic() - start:6.1f} s  {line(entry)}", flush=True)
    finally:
        worker.dismiss()
    return report


def _run_step(
    step: Step,
    entry: dict[str, Any],
    worker: Worker,
    end: float,
    needed: float,
    save: Callable[[], None],
) -> None:
    begun = time.monotonic()
    if begun >= end:
        entry["status"] = "skipped"
        return
    # Whoever runs first may use what is left over, in proportion to the shares.
    share = step.seconds * max(1.0, (end - begun) / needed)
    until = end if step.required else min(end, begun + share)

    def keep(row: dict[str, Any]) -> None:
        entry["rows"].append(row)
        entry["seconds"] = round(time.monotonic() - begun, 1)
        save()

    finished = False
    while not finished and time.monotonic() < end:
        order = Order(step.tasks, len(entry["rows"]), until)
        finished = worker.carry_out(order, end, share + _LATE, keep)
        if not finished and entry["rows"][-1]["task"] in (_STARTING, _BETWEEN):
            break  # another process would fare no better
    failed = any(not row.get("ok", True) for row in entry["rows"])
    cut = not finished or any("left_out" in row for row in entry["rows"])
    entry["status"] = "failed" if failed else "incomplete" if cut else "ok"


def failures(report: Report) -> list[str]:
    """Name what makes the exit status non-zero."""
    found = []
    for step in report["steps"]:
        for row in step["rows"]:
            if not row.get("ok", True):
                found.append(f"{step['name']}: {row['task']}: {_why(row)}")
        if step["required"] and step["status"] not in ("ok", "failed"):
            found.append(f"{step['name']}: {step['status']}, but required")
    return found


def _why(row: dict[str, Any]) -> str:
    if "device" in row:
        return f"the device was lost: {row['device']}"
    if "error" in row:
        lines = row["error"].strip().splitlines()
        return lines[-1][:_SHOWN] if lines else "an error without a message"
    over = {k: x for k, x in row.get("error_over_budget", {}).items() if not x <= 1}
    return f"error over budget {over}" if over else _figures(row)


def line(entry: dict[str, Any]) -> str:
    """Format one step in a line."""
    rows = entry["rows"]
    bad = [row["task"] for row in rows if not row.get("ok", True)]
    left = sum("left_out" in row for row in rows)
    ratios = [x for row in rows for x in row.get("error_over_budget", {}).values()]
    parts = [f"{len(rows) - left} tasks in {entry['seconds']:.0f} s"]
    if ratios:
        parts.append(f"worst error over budget {max(ratios):.3f}")
    if left:
        parts.append(f"{left} left out")
    parts += [f"{row['task']}: {row['dropped']}" for row in rows if "dropped" in row]
    parts += [f"{len(bad)} failed: {'; '.join(bad)[:_SHOWN]}"] if bad else []
    return f"{entry['name']:16} {entry['status']:10} {', '.join(map(str, parts))}"


def table(report: Report) -> str:
    """Tell what came of every step, the figures of those that measure, and what failed."""
    lines = (
        ["REHEARSAL at toy sizes: no figure here is one of a GPU"] if report["rehearsal"] else []
    )
    lines += [line(entry) for entry in report["steps"]]
    for entry in report["steps"]:
        if entry["name"] in _MEASURE:
            lines += ["", f"{entry['name']}:"]
            for row in entry["rows"]:
                lines.append(f"  {row['task']}: {(_figures if row.get('ok', True) else _why)(row)}")
    failed = failures(report)
    lines += ["", f"FAILED ({len(failed)}):" if failed else "nothing failed"]
    return "\n".join(lines + [f"  {failure}" for failure in failed[:30]])


def _figures(row: dict[str, Any]) -> str:
    """Format the numbers of a result, in short."""
    hidden = ("task", "took", "ok", "error", "missing")
    return ", ".join(f"{k} {_short(x)}" for k, x in row.items() if k not in hidden)


def _short(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:.4g}"
    if isinstance(x, dict):
        if "median" in x:
            return _short(x["median"])
        inner = [f"{k} {_short(v)}" for k, v in x.items()]
        return "(" + "; ".join(inner[:8]) + ")"
    return str(x)[:_SHOWN]


def _write(report: Report, out: Path) -> None:
    """Write a file whole or not at all, since the command may be killed at any time."""
    for name, text in (
        ("report.json", json.dumps(report, indent=1, default=str) + "\n"),
        ("report.md", f"```\n{table(report)}\n```\n"),
    ):
        part = out / f"{name}.part"
        part.write_text(text)
        part.replace(out / name)
