"""Compiles kernels ahead of time for a GPU that is not there, and reads the machine code.

`record` collects the launches that a launcher makes, without running them; `compile_launch`
compiles one as Triton's JIT would on the named target; `variant` is the key under which the JIT
would look for a compiled kernel. TRITON_INTERPRET must not be set when the kernels are imported.

    with record() as launches:
        pairwise.count(batch, values)      # tensors on the CPU
    code = compile_launch(launches[0], "sm_90")
    code.registers, code.spills, code.loops[-1].instructions
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*?);?(?:\s+(.*?))?;")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")


class Launch(NamedTuple):
    """One call `kernel[grid](*arguments)`."""

    kernel: JITFunction
    arguments: dict[str, Any]  # by name, the compiler's options (num_warps, ...) among them
    grid: Any = (1,)


class Instruction(NamedTuple):
    """One line of SASS."""

    address: int
    predicate: str  # such as @P0, or nothing
    opcode: str  # with modifiers, such as FFMA.SAT
    operands: str

    @property
    def counts(self) -> bool:
        """Whether it is more than a filling."""
        return self.opcode != "NOP"

    @property
    def leaves(self) -> bool:
        """Whether what follows it in memory never follows it in time."""
        if self.opcode.startswith("BRA"):  # a condition stands before it, or before its target
            return not self.predicate and self.operands.startswith("`")
        return not self.predicate and self.opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMP")

    def target(self, labels: dict[str, int]) -> int | None:
        """Return where it branches to."""
        label = re.search(r"\.L_x_\d+", self.operands)
        return labels.get(label.group()) if self.opcode.startswith("BRA") and label else None


class Loop(NamedTuple):
    """A backward branch and what it repeats, loops inside included."""

    first: int  # address of the first instruction
    last: int  # address of the branch
    opcodes: Counter[str]  # with modifiers, such as FFMA.SAT

    @property
    def instructions(self) -> int:
        return self.opcodes.total()


@dataclass
class Code:
    """A compiled kernel."""

    registers: int  # vector registers a thread
    spills: int  # NVIDIA: instructions that touch local memory; AMD: vector registers spilled
    shared: int  # bytes a block
    layouts: str  # Triton's GPU dialect, which says what thread holds what
    disassemble: Callable[[], str]  # takes as long as to compile, so only for what asks

    @cached_property
    def assembly(self) -> str:
        """SASS, or amdgcn."""
        return self.disassemble()

    @cached_property
    def loops(self) -> list[Loop]:
        """In the order of their first instruction; NVIDIA only."""
        return _loops(*_parse(self.assembly))


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches of every kernel inside the block; nothing runs."""
    launches: list[Launch] = []
    run = JITFunction.run

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, grid))

    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = run


def gpu_target(name: str) -> GPUTarget:
    """Return `sm_90` or `gfx942` as Triton's target."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def variant(launch: Launch, target: str = "sm_90") -> str:
    """Return what the JIT compiles anew for: types, constants, and what it specialises on."""
    return str(_specialise(launch, make_backend(gpu_target(target)))[1:])


def compile_launch(launch: Launch, target: str = "sm_90") -> Code:
    """Compile a launch for `target`, such as sm_80, sm_90, sm_100, gfx942."""
    gpu = gpu_target(target)
    options, signature, constants, attributes = _specialise(launch, make_backend(gpu))
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=options.__dict__)
    if gpu.backend == "hip":
        return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared, compiled.asm["ttgir"])
    return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ttgir"])


def scattered(code: Code) -> list[str]:
    """List the accesses to memory that are not coalesced.

    The threads of a warp do not follow each other along a line there. Such accesses take more
    transactions, and where they add, more threads meet at one address.
    """
    layouts = re.findall(
        r"^(#\w+) = #ttg\.blocked<\{.*?threadsPerWarp = \[(.*?)\]", code.layouts, re.M
    )
    across = {name for name, threads in layouts if any(x != "1" for x in threads.split(", ")[:-1])}
    accesses = re.findall(r"^.*\btt\.(?:load|store|atomic_rmw)\b.*$", code.layouts, re.M)
    return [line for line in accesses if across & set(re.findall(r"#\w+", line))]


def _specialise(launch: Launch, backend: BaseBackend) -> tuple[Any, dict, dict, dict]:
    """Return (options, signature, constants, attributes), by the JIT's own code."""
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(**launch.arguments)
    return kernel._pack_args(backend, launch.arguments, bound, specialisation, options)


def _read_cubin(cubin: bytes, shared: int, layouts: str) -> Code:
    usage = _run("cuobjdump", "-res-usage", cubin)
    code = Code(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spills=0,
        shared=shared,
        layouts=layouts,
        disassemble=partial(_run, "nvdisasm", "-c", cubin),
    )
    if not re.search(r"STACK:0 .*LOCAL:0 ", usage):
        instructions, _ = _parse(code.assembly)
        code.spills = sum(x.opcode.startswith(("LDL", "STL")) for x in instructions)
    return code


def _read_amdgcn(assembly: str, shared: int, layouts: str) -> Code:
    def count(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", assembly).group(1))

    # A scalar register that is kept in a lane of a vector register costs no memory: no spill.
    registers, spills = count("vgpr_count"), count("vgpr_spill_count")
    return Code(registers, spills, shared, layouts, disassemble=lambda: assembly)


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / tool, option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions, and the address behind each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label.group(1))
        elif found := _INSTRUCTION.match(line):
            address = int(found.group(1), 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            _, predicate, opcode, operands = found.groups()
            instructions.append(Instruction(address, predicate or "", opcode, operands or ""))
    return instructions, labels


def _loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    last_of: dict[int, int] = {}
    for instruction in instructions:
        first = instruction.target(labels)
        if first is not None and first < instruction.address:
            last_of[first] = instruction.address
    return [
        Loop(
            first,
            last,
            Counter(x.opcode for x in instructions if first <= x.address <= last and x.counts),
        )
        for first, last in sorted(last_of.items())
    ]


def longest_path(
    code: Code,
    turns: int,
    whole: bool = False,
    without: Callable[[Instruction], object] = lambda instruction: False,
) -> int:
    """Return the most instructions that a turn of a kernel's largest loop can take; NVIDIA only.

    Of two branches only one is counted, and a loop inside counts `turns` times. What runs only
    where the threads of a warp have come apart (BRA.DIV) is left out.

    Args:
        code: as compiled.
        turns: of every loop inside.
        whole: from the kernel's entry to its exit instead.
        without: a path through an instruction for which this is true does not count.
    """
    instructions, labels = _parse(code.assembly)
    flow = _Flow(instructions, labels)
    closed = {x.address for x in instructions if without(x)}
    entry = instructions[0].address
    loops = flow.loops(entry)
    if whole:
        return flow.longest(entry, set(flow.counts), loops, turns, closed)
    head = max(loops, key=lambda first: len(loops[first]))
    inside = {
        first: body for first, body in loops.items() if first != head and first in loops[head]
    }
    return flow.longest(head, loops[head], inside, turns, closed)


class _Flow:
    """Which instruction may follow which."""

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        self.counts = {x.address: x.counts for x in instructions}
        self.next: dict[int, list[int]] = {}
        behind = [x.address for x in instructions[1:]] + [None]
        for instruction, following in zip(instructions, behind, strict=True):
            target = instruction.target(labels)
            after = [target] if target is not None and ".DIV" not in instruction.opcode else []
            if following is not None and not instruction.leaves:
                after.append(following)
            self.next[instruction.address] = after

    def loops(self, entry: int) -> dict[int, set[int]]:
        """Return {head: the addresses that a loop repeats, loops inside included}."""
        before: dict[int, list[int]] = {}
        bodies: dict[int, set[int]] = {}
        for address, following in self._back_edges(entry, before):
            body = bodies.setdefault(following, {following})
            waiting = [address]
            while waiting:
                address = waiting.pop()
                if address not in body:
                    body.add(address)
                    waiting += before[address]
        return bodies

    def _back_edges(self, entry: int, before: dict[int, list[int]]) -> list[tuple[int, int]]:
        """Return edges to what is still being walked through; fill in what stands before what."""
        found: list[tuple[int, int]] = []
        state = {entry: iter(self.next[entry])}
        path, done = [entry], set()
        while path:
            following = next(state[path[-1]], None)
            if following is None:
                done.add(path.pop())
                continue
            before.setdefault(following, []).append(path[-1])
            if following not in state:
                state[following] = iter(self.next[following])
                path.append(following)
            elif following not in done:
                found.append((path[-1], following))
        return found

    def longest(
        self,
        start: int,
        region: set[int],
        loops: dict[int, set[int]],
        turns: int,
        closed: set[int],
    ) -> int:
        """Count the instructions of the longest path from `start` to where it leaves the region."""
        back = set(self._back_edges(start, {}))
        best: dict[int, float] = {}
        waiting = [start]
        while waiting:
            address = waiting[-1]
            after = [x for x in self.next[address] if x in region and (address, x) not in back]
            missing = [following for following in after if following not in best]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            weight = self.counts[address] * turns ** sum(address in x for x in loops.values())
            rest = max((best[following] for following in after), default=0)
            best[address] = -math.inf if address in closed else weight + rest
        if best[start] == -math.inf:
            raise ValueError("without: every path was left out")
        return int(best[start])
