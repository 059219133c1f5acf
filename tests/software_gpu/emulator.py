"""Runs on the CPU what Triton compiles for an NVIDIA GPU: its PTX.

    with emulated("sm_90") as emulation:  # in a process without TRITON_INTERPRET
        pairwise.count(...)  # tensors on the CPU; kernels are compiled, their PTX is executed

`docs/software-gpu.md` says what is modelled and what is not. The part in C++ is built at the first
use (`perf.software_gpu.build`).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrp_triton import backend
from perf.software_gpu import build
from tests.software_gpu import emulator_ptx
from tests.software_gpu.emulator_ptx import Code, Statement, Unsupported

__all__ = ["Emulation", "EmulationError", "Kernel", "Report", "Unsupported", "emulated", "launch"]
_HERE = Path(__file__).parent
_HEADERS = [_HERE / x for x in ("emulator_memory.h", "emulator_numbers.h")]
_FLAGS = ["-march=native", "-frounding-math", "-ffp-contract=off"]
_OPTIONS = struct.Struct("<3I5iQ")  # `Options` of the C++ file
_LONGEST_REPORT = 1 << 16
_ENDLESS = 2 * 10**9  # instructions of warps

ASCENDING, DESCENDING = 0, 1  # orders of programs; a larger number is the seed of a random one
Ranges = list[
    tuple[int, int]
]  # addresses that a launch may touch, each from the first to behind the last


class EmulationError(RuntimeError):
    """What a GPU would fail at, or what is left to chance on it."""


# --- building -----------------------------------------------------------------------------------


def missing(triton: bool = True) -> str:
    """Why nothing can be emulated here, or an empty text; without Triton, PTX still can."""
    try:
        build.compiler()
    except build.Unavailable as reason:
        return str(reason)
    if triton and not backend._CHOOSES_TRITON:
        return "the emulator wants Triton 3.6 or later"
    return ""


def _processor() -> bytes:
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return next((line for line in lines if line.startswith(b"flags")), b"")


@cache
def _library() -> ctypes.CDLL:
    # What is included, and what -march=native depends on, are parts of the library's name too.
    parts = hashlib.sha256(_processor() + build.digest(*_HEADERS).encode()).hexdigest()[:16]
    flags = [*_FLAGS, f"-DPARTS={parts}"]
    library = ctypes.CDLL(str(build.shared_object("emulator.so", [_HERE / "emulator.cpp"], flags)))
    library.emulator_handlers.restype = ctypes.c_char_p
    library.emulator_create.restype = ctypes.c_void_p
    library.emulator_destroy.argtypes = [ctypes.c_void_p]
    size = library.emulator_instruction_size()
    assert size == emulator_ptx.INSTRUCTION.size
    return library


def handlers() -> list[str]:
    """Return the names of what the C++ file can do, numbered by their order."""
    return _library().emulator_handlers().decode().split()


# --- kernels ------------------------------------------------------------------------------------


class Count(NamedTuple):
    """How often an instruction was executed in a launch."""

    statement: Statement
    warps: int
    lanes: int  # that its predicate held for
    sectors: int  # of 32 bytes of global memory, if they are counted
    wavefronts: int  # of shared memory, if they are counted

    @property
    def opcode(self) -> str:
        """With modifiers: ld.global.v4.b32."""
        words = self.statement.text.split()
        return words[1 if words[0].startswith("@") else 0].rstrip(";")


class Report(NamedTuple):
    """What a launch did."""

    kernel: str
    grid: tuple[int, ...]
    counts: list[Count]
    notes: list[str]  # what is left to chance: races, memory that nobody wrote

    @property
    def instructions(self) -> int:
        """Of warps, all together."""
        return sum(count.warps for count in self.counts)

    def by_opcode(self) -> Counter[str]:
        """Count what warps executed by the first word of the opcode: fma, ld, bar."""
        total: Counter[str] = Counter()
        for count in self.counts:
            total[count.opcode.partition(".")[0]] += count.warps
        return +total

    @property
    def sectors(self) -> int:
        """Of global memory, read, written or added to."""
        return sum(count.sectors for count in self.counts)

    @property
    def atomics(self) -> int:
        """Of single lanes, in any memory."""
        atomics = [count for count in self.counts if count.opcode.startswith(("atom.", "red."))]
        return sum(count.lanes for count in atomics)


class Kernel:
    """PTX of one kernel, ready to be launched."""

    def __init__(self, ptx: str, dynamic_shared: int = 0, code: Code | None = None) -> None:
        library = _library()
        self.ptx = ptx
        self.dynamic_shared = dynamic_shared
        self.code = code = code or emulator_ptx.read(ptx, handlers())
        constants = struct.pack(f"<{len(code.constants)}Q", *code.constants)
        special = struct.pack(f"<{len(code.special)}i", *code.special)
        self._handle = ctypes.c_void_p(
            library.emulator_create(
                b"".join(code.instructions),
                len(code.instructions),
                constants,
                len(code.constants),
                code.registers,
                code.threads,
                code.shared,
                code.local,
                special,
                len(code.special),
            )
        )

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            _library().emulator_destroy(handle)

    def launch(
        self,
        grid: Sequence[int],
        arguments: Sequence[int | float | bytes | Tensor],
        memory: Ranges | None = None,
        *,
        order: int = ASCENDING,
        concurrent: int = 1,
        checks: int = 1,
        counts: bool = False,
        most_instructions: int = _ENDLESS,
    ) -> Report:
        """Run all programs of a grid.

        Args:
            grid: Programs along one to three axes.
            arguments: One for each parameter of the PTX; `bytes` are taken as they are.
            memory: What may be read and written, see `memory_of`. Without it every address may,
                and races in global memory are not looked for.
            order: In which programs run; ASCENDING, DESCENDING, or the seed of a random order.
            concurrent: How many programs take turns.
            checks: Look for races and for shared memory that nobody wrote. 2 takes what writes
                the value that is there for a race too.
            counts: Count sectors and wavefronts too.
            most_instructions: Of warps, before the launch counts as endless.

        Raises:
            EmulationError: at an access out of bounds, a barrier in divergent code and the like.
        """
        axes = (*grid, 1, 1)[:3]
        if min(axes) < 1:
            return Report(self.code.name, tuple(grid), [], [])
        options = _OPTIONS.pack(
            *axes,
            *(self.dynamic_shared, checks, counts, order, concurrent),
            most_instructions,
        )
        ranges = sorted(memory or [])
        tallies = (ctypes.c_uint64 * (4 * len(self.code.instructions)))()
        text = ctypes.create_string_buffer(_LONGEST_REPORT)
        stopped = _library().emulator_launch(
            self._handle,
            options,
            self._pack(arguments),
            struct.pack(f"<{len(ranges)}Q", *(start for start, _ in ranges)),
            struct.pack(f"<{len(ranges)}Q", *(end for _, end in ranges)),
            len(ranges),
            tallies,
            text,
            len(text),
        )
        said = [self._explain(line) for line in text.value.decode().splitlines()]
        if stopped:
            raise EmulationError("; ".join(said))
        found = [
            Count(statement, *tallies[4 * k : 4 * k + 4])
            for k, statement in enumerate(self.code.statements)
        ]
        return Report(self.code.name, tuple(grid), found, said)

    def _pack(self, arguments: Sequence[int | float | bytes | Tensor]) -> bytes:
        packed = b""
        for parameter, argument in zip(self.code.parameters, arguments, strict=True):
            packed = packed.ljust(parameter.offset, b"\0") + _bytes_of(argument, parameter.type)
        return packed.ljust(8, b"\0")

    def _explain(self, line: str) -> str:
        """With the statement in place of its number."""
        _, number, what, where = line.split("\t")
        if int(number) < 0:
            return f"{self.code.name}: {what}"
        statement = self.code.statements[int(number)]
        source = f", {statement.source}" if statement.source else ""
        place = f"PTX line {statement.line}: {statement.text} {where}"
        return f"{self.code.name}{source}: {what} ({place})"


def _bytes_of(argument: int | float | bytes | Tensor, type: str) -> bytes:
    size = emulator_ptx.size_of(type)
    if isinstance(argument, bytes):
        assert len(argument) == size
        return argument
    if isinstance(argument, Tensor):
        argument = argument.data_ptr()
    if type in ("f32", "f64"):
        return struct.pack("<f" if type == "f32" else "<d", argument)
    return (int(argument) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def memory_of(tensors: Iterable[Tensor]) -> Ranges:
    """From the first element to behind the last of each tensor, those that overlap put together."""
    merged: Ranges = []
    for start, end in sorted(_extent(tensor) for tensor in tensors if tensor.numel()):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _extent(tensor: Tensor) -> tuple[int, int]:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def launch(
    compiled: Any,
    grid: Sequence[int],
    arguments: Sequence[int | float | bytes | Tensor],
    memory: Ranges | None = None,
    **options: Any,
) -> Report:
    """`Kernel.launch` of what `triton.compile` returned.

    Pointers to scratch memory, which Triton adds behind the arguments of a kernel, may lack.
    """
    kernel = _kernel_of(compiled)
    lacking = len(kernel.code.parameters) - len(arguments)
    return kernel.launch(grid, [*arguments, *[0] * lacking], memory, **options)


def _kernel_of(compiled: Any) -> Kernel:
    if not hasattr(compiled, "_emulated"):
        compiled._emulated = Kernel(compiled.asm["ptx"], compiled.metadata.shared)
    return compiled._emulated


# --- instead of Triton's launcher ---------------------------------------------------------------


class Emulation:
    """Stands in for Triton's launcher where tensors are on the CPU.

    The options of `Kernel.launch` are attributes, and may be changed from launch to launch.
    """

    def __init__(self, target: str, options: dict[str, Any]) -> None:
        self.target = target
        self.options = options
        self.keep_notes = False  # in `launches`, instead of raising
        self.launches: list[Report] = []
        self.compiled: dict[tuple[Any, str], Kernel] = {}

    def kernel(self, jit: Any, arguments: dict[str, Any]) -> tuple[Kernel, dict[str, str]]:
        """Return the kernel compiled for these arguments, and the types of its parameters."""
        import triton

        from perf.machine_code import sass

        gpu = sass.gpu_target(self.target)
        compiler = triton.compiler.make_backend(gpu)
        options, signature, constants, attributes = sass._specialise(
            sass.Launch(jit, arguments), compiler
        )
        key = jit, str((signature, constants, attributes, options))
        if key not in self.compiled:
            source = triton.compiler.ASTSource(jit, signature, constants, attributes)
            with _no_machine_code():
                made = triton.compile(source, target=gpu, options=options.__dict__)
            self.compiled[key] = Kernel(made.asm["ptx"], made.metadata.shared)
        return self.compiled[key], signature

    def run(
        self, jit: Any, *positional: Any, grid: Any, warmup: bool = False, **named: Any
    ) -> None:
        """`JITFunction.run` on tensors on the CPU."""
        arguments = dict(zip(jit.arg_names, positional, strict=False)) | named
        kernel, signature = self.kernel(jit, arguments)
        if warmup:
            return
        arguments = {x.name: x.default for x in jit.params} | arguments
        flat = [
            value for name, type in signature.items() for value in _flatten(arguments[name], type)
        ]
        lacking = len(kernel.code.parameters) - len(flat)
        flat += [0] * lacking  # pointers to scratch memory
        report = self.launch(kernel, grid(arguments) if callable(grid) else grid, flat)
        self.launches.append(report)
        if report.notes and not self.keep_notes:
            raise EmulationError("; ".join(report.notes))

    def launch(self, kernel: Kernel, grid: Sequence[int], arguments: list[Any]) -> Report:
        """One launch, which may touch the storages of the tensors among its arguments."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        return kernel.launch(grid, arguments, memory_of(tensors), **self.options)


@contextmanager
def _no_machine_code() -> Iterator[None]:
    """Let Triton stop at the PTX, which saves a third of the time.

    What it makes is kept in a folder of its own: elsewhere somebody would take it for complete.
    """
    from triton.backends.nvidia.compiler import CUDABackend

    variable, folder = "TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR")
    kept = CUDABackend.make_cubin
    CUDABackend.make_cubin = lambda *args, **options: b""
    os.environ[variable] = str(build.cache() / "ptx")
    try:
        yield
    finally:
        CUDABackend.make_cubin = kept
        os.environ.pop(variable)
        if folder is not None:
            os.environ[variable] = folder


def _flatten(value: Any, type: Any) -> Iterator[Any]:
    """Return what is passed at run time of an argument, which may be a tuple."""
    if isinstance(type, (tuple, list)):
        for part, of_part in zip(value, type, strict=True):
            yield from _flatten(part, of_part)
    elif type != "constexpr":
        yield value


@contextmanager
def emulated(target: str = "sm_90", **options: Any) -> Iterator[Emulation]:
    """Emulate every kernel that is launched on CPU tensors; `options` are those of a launch."""
    from triton.runtime.jit import JITFunction

    from alrp_triton import ops

    emulation = Emulation(target, options)

    def load_kernels(name: str, device: torch.device) -> Any:
        return importlib.import_module(f"alrp_triton.kernels.{name}")

    kept = JITFunction.run, backend.load_kernels, ops.load_kernels
    JITFunction.run = lambda jit, *a, **k: emulation.run(jit, *a, **k)
    backend.load_kernels = ops.load_kernels = load_kernels
    try:
        yield emulation
    finally:
        JITFunction.run, backend.load_kernels, ops.load_kernels = kept
