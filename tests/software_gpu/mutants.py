"""Does the emulator notice what is wrong? Faults are planted in the PTX of the package's kernels.

    python -m tests.software_gpu.mutants [--target sm_90] [--quick]

Each mutant differs from its kernel by one fault; the launches of some calls are repeated with it.
It is noticed by a check, or because the results differ, or it survives: then the report says why.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.software_gpu import emulator
from tests.software_gpu.emulator import Count, Emulation, EmulationError, Kernel, Report
from tests.software_gpu.emulator_ptx import INSTRUCTION

# Orders and interleavings that each mutant is tried in, until it is noticed.
SCHEDULES = ({}, {"order": emulator.DESCENDING}, {"order": 7, "concurrent": 4})
MOST_INSTRUCTIONS = 10**7  # of warps, in a launch of a mutant


class Recording(NamedTuple):
    """A launch that can be repeated."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: list[Any]
    storages: list[Tensor]  # bytes of its arguments, each once
    before: list[Tensor]
    after: list[Tensor]
    report: Report

    def count(self, number: int) -> Count:
        """Of a statement of the kernel."""
        return self.report.counts[number]

    @property
    def memory(self) -> emulator.Ranges:
        """What it may touch."""
        return emulator.memory_of(x for x in self.arguments if isinstance(x, Tensor))

    def repeat(self, kernel: Kernel, memory: emulator.Ranges | None = None, **options: Any) -> str:
        """Return what shows a fault, or nothing: a check, or other results."""
        for storage, content in zip(self.storages, self.before, strict=True):
            storage.copy_(content)
        options = {"most_instructions": MOST_INSTRUCTIONS} | options
        memory = self.memory if memory is None else memory
        try:
            notes = kernel.launch(self.grid, self.arguments, memory, **options).notes
        except EmulationError as error:
            return f"check: {error}"
        if notes:
            return f"check: {notes[0]}"
        pairs = zip(self.storages, self.after, strict=True)
        return "" if all(torch.equal(*pair) for pair in pairs) else "other results"


class Mutant(NamedTuple):
    """A kernel with a fault, or one that may touch less memory."""

    kind: str
    kernel: Kernel  # that it is made of
    number: int  # of the statement, or of the argument
    changed: Kernel | None = None
    tensor: Tensor | None = None  # whose last element may not be touched


class Verdict(NamedTuple):
    """What came of a mutant."""

    mutant: Mutant
    noticed: str  # by what; empty if it survives
    why: str = ""  # it survives

    @property
    def place(self) -> str:
        """Where its fault stands."""
        kernel, number = self.mutant.kernel.code, self.mutant.number
        if self.mutant.tensor is not None:
            return f"argument {number} of {kernel.name}"
        return f"{kernel.statements[number].source} in {kernel.name}"


# --- recording ----------------------------------------------------------------------------------


def record(emulation: Emulation, calls: Iterable[Callable[[], None]]) -> list[Recording]:
    """Return the launches of calls, those that execute nothing new left out."""
    recordings: list[Recording] = []
    executed: set[tuple[int, int]] = set()
    launch = emulation.launch

    def recorded(kernel: Kernel, grid: Sequence[int], arguments: list[Any]) -> Report:
        storages = _storages(arguments)
        before = [x.clone() for x in storages]
        report = launch(kernel, grid, arguments)
        now = {(id(kernel), k) for k, count in enumerate(report.counts) if count.lanes}
        if not now <= executed:
            executed.update(now)
            after = [x.clone() for x in storages]
            recordings.append(
                Recording(kernel, tuple(grid), list(arguments), storages, before, after, report)
            )
        return report

    emulation.launch = recorded  # type: ignore[method-assign]
    for call in calls:
        call()
    emulation.launch = launch  # type: ignore[method-assign]
    return recordings


def _storages(arguments: list[Any]) -> list[Tensor]:
    found = {}
    for tensor in arguments:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage)
    return list(found.values())


def calls(quick: bool) -> Iterator[Callable[[], None]]:
    """Losses that launch every kernel of the package, or few of them."""
    import alrp_triton as package
    from alrp_triton.loss_terms import ap_errors

    def loss(name: str, dtype: torch.dtype, grouped: bool, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(300, 3, 1), (40, 3, 1)]
        logits = [torch.randn(x, generator=generator).to(dtype).requires_grad_() for x in shapes]
        targets = [torch.randint(-1, 12, (x[0], 1), generator=generator) for x in shapes]
        targets = [torch.where(x > 2, -1, x) for x in targets]
        number = sum(int((x >= 0).sum()) for x in targets)
        more: dict[str, Any] = {"impl": "triton"} | options
        if grouped:
            more["groups"] = [x.abs() % 2 for x in targets]
        extra = [torch.rand(number, generator=generator)]
        extra = extra if name in ("alrp_loss", "rank_sort_loss") else []
        parts = getattr(package, name)(logits, targets, *extra, **more)
        (sum(parts) if isinstance(parts, tuple) else parts).backward()

    def boxes(kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        corners = torch.rand(2, 300, 4, generator=generator)
        corners[..., 2:] += corners[..., :2]
        given = corners.requires_grad_()
        package.localisation_errors(given[0], given[1], kind, impl="triton").sum().backward()

    yield lambda: loss("alrp_loss", torch.float32, False, algorithm="breakpoints")
    if quick:
        return
    yield lambda: loss("alrp_loss", torch.float32, False, algorithm="pairwise")
    yield lambda: loss("alrp_loss", torch.bfloat16, False, algorithm="breakpoints", delta=0.0)
    yield lambda: loss("alrp_loss", torch.float32, True, algorithm="breakpoints")
    yield lambda: loss("alrp_loss", torch.float32, True, algorithm="pairwise")
    yield lambda: loss("rank_sort_loss", torch.float32, False, algorithm="pairwise")
    skewed = {"errors_fn": ap_errors, "skew": 2.0}
    yield lambda: loss("error_driven_loss", torch.float32, True, **skewed)
    yield lambda: boxes("giou")
    yield lambda: boxes("ciou")


# --- mutants ------------------------------------------------------------------------------------


class Change(NamedTuple):
    """How to plant a fault in a statement that it finds."""

    kind: str
    found: re.Pattern[str]
    plant: Callable[[Kernel, int, re.Match[str]], Kernel]


def mutants_of(kernel: Kernel, executed: set[int]) -> Iterator[Mutant]:
    """Every fault that the PTX of a kernel gives occasion to, in statements that are executed."""
    for number in sorted(executed):
        for change in CHANGES:
            if found := change.found.search(kernel.code.statements[number].text):
                yield Mutant(change.kind, kernel, number, change.plant(kernel, number, found))


def _with(kernel: Kernel, number: int, **fields: int) -> Kernel:
    """Other fields of one instruction."""
    instructions = list(kernel.code.instructions)
    values = list(INSTRUCTION.unpack(instructions[number]))
    for name, value in fields.items():
        values[{"handler": 0, "guard": 1, "immediate": -1}[name]] = value
    instructions[number] = INSTRUCTION.pack(*values)
    return Kernel(
        kernel.ptx, kernel.dynamic_shared, kernel.code._replace(instructions=instructions)
    )


def _left_out(kernel: Kernel, number: int, found: re.Match[str]) -> Kernel:
    return _with(kernel, number, handler=emulator.handlers().index("nop"))


def _misaligned(kernel: Kernel, number: int, found: re.Match[str]) -> Kernel:
    offset = INSTRUCTION.unpack(kernel.code.instructions[number])[-1]
    return _with(kernel, number, immediate=offset + int(found["width"]) // 8)


def _without_mask(kernel: Kernel, number: int, found: re.Match[str]) -> Kernel:
    return _with(kernel, number, guard=-1)


def _not_atomic(kernel: Kernel, number: int, found: re.Match[str]) -> Kernel:
    lines = kernel.ptx.splitlines()
    mask, do, kind, width, old, at, value = found.groups(default="")
    lines[kernel.code.statements[number].line - 1] = (
        f"{{ .reg .b{width} %mutant; {mask}ld.global.b{width} {old}, {at}; "
        f"{do}.{kind}{width} %mutant, {old}, {value}; {mask}st.global.b{width} {at}, %mutant; }}"
    )
    return Kernel("\n".join(lines), kernel.dynamic_shared)


_VECTOR = re.compile(r"\b(?:ld|st)\.(?:global|shared)\S*\.v[24]\.b(?P<width>\d+)")
_ATOMIC = re.compile(
    r"^(@!?%p\d+\s+)?atom\.global\S*\.(add|max|min)\.([usf])(\d+)\s+"
    r"(%\w+),\s*(\[[^]]*\]),\s*(%?\w+);"
)
BARRIER, STORE = "a barrier left out", "a store to shared memory left out"
MASK = "a mask left out"
ATOMIC = "an atomic as a load and a store"
MISALIGNED = "a vector access misaligned by an element"
CHANGES = [
    Change(BARRIER, re.compile(r"^bar\.(?:warp\.)?sync\b"), _left_out),
    Change(STORE, re.compile(r"\bst\.shared"), _left_out),
    Change(MISALIGNED, _VECTOR, _misaligned),
    Change(MASK, re.compile(r"^@!?%p\d+\s+(?:ld|st|atom)\.global"), _without_mask),
    Change(ATOMIC, _ATOMIC, _not_atomic),
]
SHORT = "a buffer one element short"
KINDS = [*(change.kind for change in CHANGES), SHORT]


# --- trying -------------------------------------------------------------------------------------


def judge(mutant: Mutant, recordings: list[Recording]) -> Verdict:
    """Repeat the launches of its kernel with a mutant."""
    if mutant.tensor is not None:
        return _judge_short(mutant, recordings)
    kernel = mutant.changed
    assert kernel is not None
    for recording in recordings:
        for schedule in SCHEDULES:
            if noticed := recording.repeat(kernel, **schedule):
                return Verdict(mutant, noticed)
    return Verdict(mutant, "", _why(mutant, kernel, recordings))


def _judge_short(mutant: Mutant, recordings: list[Recording]) -> Verdict:
    assert mutant.tensor is not None
    ((_, end),) = emulator.memory_of([mutant.tensor])
    for recording in recordings:
        shorter = [
            (first, last - mutant.tensor.element_size() if last == end else last)
            for first, last in recording.memory
        ]
        if noticed := recording.repeat(mutant.kernel, shorter):
            return Verdict(mutant, noticed)
    return Verdict(mutant, "", "nobody touches its last element")


def _why(mutant: Mutant, kernel: Kernel, recordings: list[Recording]) -> str:
    counts = [recording.count(mutant.number) for recording in recordings]
    if mutant.kind == MASK:
        if all(count.lanes == 32 * count.warps for count in counts):
            return "it holds for all lanes in these launches"
        return "what the other lanes touch is in bounds, and changes no result"
    if mutant.kind == ATOMIC:
        if all(count.lanes < 2 for count in counts):
            return "one lane of one program executes it"
        return "no two lanes touch the same address"
    if any(recording.repeat(kernel, checks=2) for recording in recordings):
        return "what is written without it stands there already"
    if kernel.code.threads == 32 and mutant.kind == BARRIER:
        return "one warp, whose lanes touch no byte of each other between its neighbours"
    if mutant.kind == BARRIER:
        return "no two warps touch the same byte between its neighbours"
    return "nobody reads what it writes"


def run(emulation: Emulation, quick: bool) -> list[Verdict]:
    """All mutants of the kernels that some calls launch."""
    verdicts = []
    recordings = record(emulation, calls(quick))
    by_kernel: dict[int, list[Recording]] = {}
    for recording in recordings:
        by_kernel.setdefault(id(recording.kernel), []).append(recording)
    for launches in by_kernel.values():
        kernel = launches[0].kernel
        reports = [recording.report.counts for recording in launches]
        executed = {k for counts in reports for k, count in enumerate(counts) if count.lanes}
        verdicts += [judge(mutant, launches) for mutant in mutants_of(kernel, executed)]
        for number, argument in enumerate(launches[0].arguments):
            if isinstance(argument, Tensor) and argument.numel():
                verdicts.append(judge(Mutant(SHORT, kernel, number, tensor=argument), launches))
    return verdicts


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--quick", action="store_true", help="few kernels, in a minute")
    arguments = parser.parse_args()
    if reason := emulator.missing():
        sys.exit(reason)
    torch.set_num_threads(1)
    with emulator.emulated(arguments.target) as emulation:
        verdicts = run(emulation, arguments.quick)
    print(summary(verdicts))


def summary(verdicts: list[Verdict]) -> str:
    """Numbers by kind; and by reason, which survive."""
    lines = []
    for kind in KINDS:
        found = [verdict for verdict in verdicts if verdict.mutant.kind == kind]
        checked = sum(verdict.noticed.startswith("check") for verdict in found)
        alive = sum(not verdict.noticed for verdict in found)
        lines.append(
            f"{kind}: {len(found)} mutants, {checked} noticed by a check, "
            f"{len(found) - checked - alive} by the result alone, {alive} survive"
        )
        survivors = Counter((x.why, x.place) for x in found if not x.noticed)
        for why in sorted({why for why, _ in survivors}):
            places = [
                f"{place} ({number})" if number > 1 else place
                for (of, place), number in survivors.items()
                if of == why
            ]
            lines.append(f"  {why}: {', '.join(places)}")
    return "\n".join(lines)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("kernels are compiled here: unset TRITON_INTERPRET")
    main()
