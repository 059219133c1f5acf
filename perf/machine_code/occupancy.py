"""Candidates of the tuner compiled ahead of time: what the machine code says without a clock.

A candidate that spills registers is out. Of the others, the fewest instructions a pair (a logit,
with breakpoints) are best, as long as enough warps fit on a multiprocessor. The tuner compiles
here on every core at once, which also fills Triton's cache; `python -m perf.autotune --dry-run`
ranks by this alone, for a GPU that need not be there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    TimeoutError,  # its own until Python 3.11
    as_completed,
)
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from alrp_triton.kernels.tuning.block_sizes import BreakpointTiles, Tiles
from perf.progress import bar

KERNELS = {"count": "_count_kernel", "gradient": "_gradient_kernel"}  # of both algorithms
SHAPE = (4, 80, 1)  # of a level as a (N, C) head hands it over; its sizes are in no machine code


class Limits(NamedTuple):
    """What a multiprocessor holds at once; each has four schedulers of 512 registers a lane."""

    warps: int
    programs: int
    shared: int  # bytes
    reserved: int  # of them, bytes that every program takes


# From the tables of compute capabilities (CUDA C++ programming guide) and of CDNA 3.
LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10, 1 << 10),
    "sm_90": Limits(64, 32, 228 << 10, 1 << 10),
    "sm_100": Limits(64, 32, 228 << 10, 1 << 10),
    "gfx942": Limits(32, 32, 64 << 10, 0),
}

# How often a search halves what a cell of the table holds, at P = 1000 in the middle of training.
HALVINGS = 3

# Warps of a multiprocessor, two a scheduler, below which nothing else runs while one waits.
_ENOUGH = 8


class Compiled(NamedTuple):
    """What is known of a candidate's machine code."""

    registers: int  # a thread
    spills: int
    shared: int  # bytes a program
    instructions: float | None  # a pair, or a logit; None on AMD, whose code is not read
    warps: int | None  # that a multiprocessor holds at once; None of a GPU that is not in LIMITS

    def cost(self) -> float:
        """Return what candidates are ranked by, where there is no time."""
        share = 1.0 if self.warps is None else min(1.0, max(self.warps, 0.5) / _ENOUGH)
        return (self.instructions or 1.0) / share


class Task(NamedTuple):
    """A kernel with the sizes of a candidate, for a target."""

    side: str  # count or gradient
    dtype: str
    tiles: Tiles | BreakpointTiles
    target: str

    @property
    def algorithm(self) -> str:
        return "breakpoints" if isinstance(self.tiles, BreakpointTiles) else "pairwise"

    def code(self) -> Task:
        """Return the same for all tasks that are the same machine code."""
        other = "gradient_" if self.side == "count" else "count_"
        of_no_code = ("count_programs", "programs", "block", "patterns")  # of the kernel examined
        fields = self.tiles._fields
        sizes = {x: 1 for x in fields if x.startswith(other) or x in of_no_code}
        if self.side == "gradient" and "few" in fields:
            sizes["few"] = 1
        return self._replace(tiles=self.tiles._replace(**sizes))


def target_of(device: torch.device) -> str:
    """Return the compiler's name of a GPU; of the CPU, what it interprets."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def resident_warps(registers: int, shared: int, warps: int, limits: Limits) -> int:
    """Return how many warps a multiprocessor holds at once of a program that has `warps`."""
    by_registers = 4 * (512 // max(8, -(-registers // 8) * 8))
    programs = min(by_registers, limits.warps) // warps
    if shared + limits.reserved:
        programs = min(programs, limits.shared // (shared + limits.reserved))
    return min(programs, limits.programs) * warps


def examine(task: Task) -> Compiled | str:
    """Compile a task, or return a text on why that failed. Not under TRITON_INTERPRET."""
    from perf.machine_code import sass

    try:
        launch = _launch(task)
        code = sass.compile_launch(launch, task.target)
    except Exception as error:  # whatever the compiler throws concerns this candidate only
        return f"does not compile: {type(error).__name__}: {str(error)[:200]}"
    given = launch.arguments
    read = a_logit if task.algorithm == "breakpoints" else a_pair
    instructions = read(code, task.side, given) if task.target.startswith("sm_") else None
    limits = LIMITS.get(task.target)
    warps = limits and resident_warps(code.registers, code.shared, given["num_warps"], limits)
    return Compiled(code.registers, code.spills, code.shared, instructions, warps)


def a_pair(code: Any, side: str, given: dict[str, Any]) -> float | None:
    """Count the instructions a pair of a pairwise kernel, in its innermost loop.

    The kernel was launched with the arguments `given`.
    """
    pairs = given["BLOCK" if side == "count" else "FOLD"] * given["ROWS"]  # of a thread
    # Every H ends in a clamp; a loop around others has more instructions for each.
    clamps = [(loop, _clamps(loop)) for loop in code.loops]
    ratios = [loop.instructions / number for loop, number in clamps if number >= pairs]
    return min(ratios, default=None)


def _clamps(loop) -> int:
    return sum(number for opcode, number in loop.opcodes.items() if opcode.endswith(".SAT"))


def a_logit(code: Any, side: str, given: dict[str, Any]) -> float:
    """Count the instructions a logit of a breakpoint kernel, on the longest way of a full tile."""
    from perf.machine_code import sass

    whole = side == "gradient"  # it has no loop around its tile
    try:
        longest = sass.longest_path(code, HALVINGS, whole, _at_the_end)
    except ValueError:  # Triton 3.6 predicates single reads, so that it cannot be told from others
        longest = sass.longest_path(code, HALVINGS, whole)
    return longest / given["ROWS"]


def _at_the_end(instruction: Any) -> bool:
    """Return whether it reads or writes the tile at the end of a level, which is not full.

    That goes one by one, while a full tile may be read 16 bytes at a time under a predicate.
    """
    one = instruction.opcode.startswith(("LDG", "STG")) and ".128" not in instruction.opcode
    return bool(instruction.predicate) and one


def _launch(task: Task):
    from alrp_triton.kernels import breakpoints, pairwise
    from alrp_triton.reference.layout import Batch
    from perf.machine_code import sass

    level = torch.empty(SHAPE, dtype=getattr(torch, task.dtype), device="meta")
    target = torch.empty(SHAPE[::2], dtype=torch.int64, device="meta")
    index = torch.zeros(1000, dtype=torch.int64)
    scores, vector = torch.zeros(1000), torch.zeros(1000, dtype=torch.float64)
    kernels = {"pairwise": pairwise, "breakpoints": breakpoints}[task.algorithm]
    with sass.record() as launches:
        batch = Batch([level], [target], index, scores, 1.0, -100)
        if task.side == "count":
            kernels.count(batch, vector, task.tiles)
        else:
            kernels.gradient(batch, vector, vector, task.tiles)
    return next(x for x in launches if x.kernel.fn.__name__ == KERNELS[task.side])


class Compiler:
    """Examines tasks in processes of their own, each machine code once."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        self._futures: dict[Task, Future] = {}

    def examine(
        self, tasks: Sequence[Task], until: float | None = None, shown: str | None = None
    ) -> list[Compiled | str | None]:
        """Examine tasks in order; None for what is not done at `until` (time.monotonic()).

        A name in `shown` goes before a progress bar.
        """
        codes = [task.code() for task in tasks]
        try:
            for code in codes:
                if code not in self._futures or self._futures[code].cancelled():
                    self._futures[code] = self._pool.submit(examine, code)
        except BrokenExecutor:  # a process was killed: whoever launches compiles for himself
            return [None] * len(codes)
        waiting = {self._futures[code] for code in codes}
        left = None if until is None else max(0.0, until - time.monotonic())
        with suppress(TimeoutError):
            for _ in bar(as_completed(waiting, left), shown or "", len(waiting), bool(shown)):
                pass
        for future in waiting:
            future.cancel()
        return [_result(self._futures[code]) for code in codes]


def _result(future: Future) -> Compiled | str | None:
    done = future.done() and not future.cancelled() and future.exception() is None
    return future.result() if done else None


@contextmanager
def compiler() -> Iterator[Compiler]:
    """Yield a `Compiler` on every core; drop what it has not begun when the block ends."""
    number = min(12, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(number, mp_context=get_context("spawn"))
    try:
        yield Compiler(pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
