"""Compiles kernels ahead of time for a GPU that is not there, and reads the machine code.

`record` collects the launches that a launcher makes, without running them; `compile_launch`
compiles one as Triton's JIT would on the named target; `variant` is the key under which the JIT
would look for a compiled kernel. TRITON_INTERPRET must not be set when the kernels are imported.

    with record() as launches:
        pairwise.count(logits, targets, scores, values, 1.0, -100)      # tensors on the CPU
    code = compile_launch(launches[0], "sm_90")
    code.registers, code.spills, code.loops[-1].instructions
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*?);?(?:\s+(.*?))?;"
)
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")


class Launch(NamedTuple):
    """One call `kernel[grid](*arguments)`."""

    kernel: JITFunction
    arguments: dict[str, Any]  # by name, the compiler's options (num_warps, ...) among them
    grid: Any = (1,)


class Loop(NamedTuple):
    """A backward branch and what it repeats, loops inside included."""

    first: int  # address of the first instruction
    last: int  # address of the branch
    opcodes: Counter[str]  # with modifiers, such as FFMA.SAT

    @property
    def instructions(self) -> int:
        return self.opcodes.total()


class Code(NamedTuple):
    """A compiled kernel."""

    assembly: str  # SASS, or amdgcn
    registers: int  # vector registers a thread
    spills: int  # NVIDIA: instructions that touch local memory; AMD: vector registers spilled
    shared: int  # bytes a block
    loops: list[Loop]  # in the order of their first instruction; NVIDIA only


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collects the launches of every kernel inside the block; nothing runs."""
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
    """`sm_90` or `gfx942` as Triton's target."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def variant(launch: Launch, target: str = "sm_90") -> str:
    """What the JIT compiles anew for: types, constants, and what it specialises on."""
    return str(_specialise(launch, make_backend(gpu_target(target)))[1:])


def compile_launch(launch: Launch, target: str = "sm_90") -> Code:
    """Compiles a launch for `target`, such as sm_80, sm_90, sm_100, gfx942."""
    gpu = gpu_target(target)
    options, signature, constants, attributes = _specialise(launch, make_backend(gpu))
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=options.__dict__)
    if gpu.backend == "hip":
        return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)


def _specialise(launch: Launch, backend: BaseBackend) -> tuple[Any, dict, dict, dict]:
    """(options, signature, constants, attributes), by the JIT's own code."""
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(**launch.arguments)
    return kernel._pack_args(backend, launch.arguments, bound, specialisation, options)


def _read_cubin(cubin: bytes, shared: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    instructions, labels = _parse(sass)
    return Code(
        assembly=sass,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spills=sum(opcode.startswith(("LDL", "STL")) for _, opcode, _ in instructions),
        shared=shared,
        loops=_loops(instructions, labels),
    )


def _read_amdgcn(assembly: str, shared: int) -> Code:
    def count(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", assembly).group(1))

    # A scalar register that is kept in a lane of a vector register costs no memory: no spill.
    return Code(assembly, count("vgpr_count"), count("vgpr_spill_count"), shared, loops=[])


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _parse(sass: str) -> tuple[list[tuple[int, str, str]], dict[str, int]]:
    """[(address, opcode, operands)], and the address behind each label."""
    instructions: list[tuple[int, str, str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label.group(1))
        elif found := _INSTRUCTION.match(line):
            address = int(found.group(1), 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            instructions.append((address, found.group(2), found.group(3) or ""))
    return instructions, labels


def _loops(instructions: list[tuple[int, str, str]], labels: dict[str, int]) -> list[Loop]:
    last_of: dict[int, int] = {}
    for address, opcode, operands in instructions:
        if opcode.startswith("BRA") and (label := re.search(r"\.L_x_\d+", operands)):
            first = labels.get(label.group(), address)
            if first < address:
                last_of[first] = address
    return [
        Loop(
            first,
            last,
            Counter(o for address, o, _ in instructions if first <= address <= last and o != "NOP"),
        )
        for first, last in sorted(last_of.items())
    ]
