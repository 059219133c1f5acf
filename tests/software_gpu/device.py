"""torch.device("cuda") in software: torch's operators by their CPU kernels, Triton's by their PTX.

    python -m tests.software_gpu.device -m pytest -n 0 -m gpu tests/kernels/test_locate.py
    python -m tests.software_gpu.device -m perf.gpu --rehearse --out DIR

The memory of the device is the host's (`perf.software_gpu.runtime`), so a CPU kernel of torch works
on a tensor of the device where it lies. What Triton compiled is executed by `emulator`. A graph is
recorded while it is captured, and done again when it is replayed; what is captured is also done
once, which no GPU does. Every Python that is started below has the device, spawned ones too.

No time of a GPU comes out of this.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from perf.software_gpu import build, runtime
from tests.software_gpu import emulator, emulator_ptx

ROOT = Path(__file__).parents[2]
INSTALL = "SOFTWARE_GPU_DEVICE"  # environment variable: whether a Python gets the device
_LAUNCH_FAILED = 719  # of CUresult

# Operators that only allocate or describe: they are done as on any CUDA device.
_AS_IS = {
    "empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "record_stream",
    "is_pinned", "_pin_memory", "set_", "resize_",
}  # fmt: skip
# Those that make the host wait for the device, besides copies to the CPU.
_WAIT = {
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim",
}  # fmt: skip


class Launch(ctypes.Structure):
    """`Launch` of device.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_ulonglong),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("capture", ctypes.c_ulonglong),
    )


def _fail(name: str, error: Exception) -> int:
    """Say why; an exception cannot leave a callback, so the launch fails as it would on a GPU."""
    print(f"software GPU: {name}: {error}", file=sys.stderr, flush=True)
    return _LAUNCH_FAILED


# --- graphs and kernels ---------------------------------------------------------------------------


class Graphs:
    """What was done during each capture, to be done again."""

    def __init__(self) -> None:
        self.steps: dict[int, list[Callable[[], object]]] = {}
        library = runtime.driver()
        self._capture_of = library.software_gpu_capture_of
        self._capture_of.restype = ctypes.c_ulonglong
        self._hook = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_ulonglong)(self._replay)
        library.software_gpu_on_replay(self._hook)

    def record(self, step: Callable[[], object]) -> None:
        """Keep a step if the current stream is being captured."""
        stream = torch.cuda.current_stream().cuda_stream
        if capture := self._capture_of(ctypes.c_void_p(stream)):
            self.keep(capture, step)

    def keep(self, capture: int, step: Callable[[], object]) -> None:
        """Keep a step of a capture."""
        self.steps.setdefault(capture, []).append(step)

    def _replay(self, capture: int) -> int:
        try:
            with _disable_current_modes():
                for step in self.steps.get(capture, ()):
                    step()
        except Exception as error:
            return _fail("graph", error)
        return 0


class Kernels:
    """Launches of Triton's kernels, each emulated."""

    def __init__(self, graphs: Graphs) -> None:
        from triton.compiler.compiler import CompiledKernel

        self.graphs = graphs
        self.launches = 0
        self._compiled: dict[int, Any] = {}
        self._kernels: dict[int, emulator.Kernel] = {}
        load = CompiledKernel._init_handles

        def load_and_remember(kernel: Any) -> Any:
            result = load(kernel)
            if kernel.function is not None:
                self._compiled[kernel.function] = kernel
            return result

        CompiledKernel._init_handles = load_and_remember
        self._hook = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch))(self._launch)
        runtime.driver().software_gpu_on_launch(self._hook)

    def _launch(self, pointer: Any) -> int:
        launch = pointer.contents
        self.launches += 1
        try:
            kernel = self._kernel(launch.function)
            values = [
                ctypes.string_at(launch.parameters[i], emulator_ptx.size_of(parameter.type))
                for i, parameter in enumerate(kernel.code.parameters)
            ]
            run = partial(self._run, kernel, tuple(launch.grid), values)
            run()
            if launch.capture:
                self.graphs.keep(launch.capture, run)
        except Exception as error:
            return _fail(launch.name.decode(), error)
        return 0

    def _kernel(self, function: int) -> emulator.Kernel:
        if function not in self._kernels:
            compiled = self._compiled[function]
            self._kernels[function] = emulator.Kernel(compiled.asm["ptx"], compiled.metadata.shared)
        return self._kernels[function]

    def _run(self, kernel: emulator.Kernel, grid: tuple[int, ...], values: list[bytes]) -> None:
        report = kernel.launch(grid, values, checks=False)
        if report.notes:
            raise emulator.EmulationError("; ".join(report.notes))


# --- torch's operators ----------------------------------------------------------------------------


def on_cpu(tensor: Tensor) -> Tensor:
    """Return the same memory as a tensor on the CPU."""
    size = tensor.untyped_storage().nbytes()
    if size == 0 or tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(tensor.untyped_storage().data_ptr())
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    alias = torch.empty(0, dtype=tensor.dtype)
    return alias.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _is_on_device(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def _is_tracing(flat: list[Any]) -> bool:
    """Fake tensors, proxies, functionalisation: nothing is computed, or it comes by once more."""
    keys = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(key) for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)):
        return True
    plain = (Tensor, torch.nn.Parameter)
    return any(isinstance(x, Tensor) and type(x) not in plain for x in flat)


class Operators(TorchDispatchMode):
    """Does what is asked of tensors of the device by the CPU's kernels, on the same memory."""

    def __init__(self, graphs: Graphs) -> None:
        super().__init__()
        self.graphs = graphs

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile compiles below it; else everything would quietly stay eager."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        if _is_tracing(flat):
            return func(*args, **kwargs)
        if func.namespace == "alrp_triton":  # opaque but for this
            from alrp_triton import ops

            with self:
                return ops.functions[func._opname](*args, **kwargs)
        asked = {x.type for x in flat if isinstance(x, torch.device)}
        if "cuda" not in asked and not any(map(_is_on_device, flat)):
            return func(*args, **kwargs)
        composite = "CompositeImplicitAutograd"
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func._opname
        known = func.namespace in ("aten", "prims", "torchvision")
        if func.is_view or name in _AS_IS or not known:
            result = func(*args, **kwargs)
            if name in _AS_IS and _is_on_device(result):
                _fill_unwritten(result)
            return result
        if ("cpu" in asked or name in _WAIT) and torch.cuda.get_sync_debug_mode() == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation: {name}")
        stays = ("cpu" in asked and "cuda" not in asked) or name == "_local_scalar_dense"
        return self._by_cpu(func, flat, spec, stays)

    def _by_cpu(self, func: Any, flat: list[Any], spec: Any, stays: bool) -> Any:
        """Run the CPU's kernel; its new tensors go to the device unless the result stays there."""
        originals: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of what stands in for them

        def move(x: Any) -> Any:
            if not _is_on_device(x):
                return torch.device("cpu") if isinstance(x, torch.device) else x
            alias = on_cpu(x)
            originals[id(alias)] = alias, x
            return alias

        args, kwargs = tree_unflatten([move(x) for x in flat], spec)
        result = func(*args, **kwargs)
        for alias, original in originals.values():
            if alias.size() != original.size():  # an out= that was resized
                original.resize_(alias.size())
                on_cpu(original).copy_(alias)
        fresh: list[Tensor | None] = []  # memory of the device that each new tensor went to

        def bring_back(x: Tensor) -> Tensor:
            if id(x) in originals or stays or x.device.type != "cpu":
                fresh.append(None)
                return originals[id(x)][1] if id(x) in originals else x
            made = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")
            fresh.append(on_cpu(made))
            fresh[-1].copy_(x)
            return made

        brought = tree_map_only(Tensor, bring_back, result)

        # It holds no tensor, and so no autograd graph: the memory of a capture stays in its pool.
        def again() -> None:
            new = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
            for memory, x in zip(fresh, new, strict=True):
                if memory is not None:
                    memory.copy_(x)

        self.graphs.record(again)
        return brought


def _fill_unwritten(out: Tensor) -> None:
    """Fill memory as deterministic algorithms ask: what nobody wrote shows."""
    if torch.are_deterministic_algorithms_enabled() and out.numel():
        alias = on_cpu(out)
        if alias.is_floating_point():
            alias.fill_(float("nan"))
        else:
            alias.fill_(True if alias.dtype == torch.bool else torch.iinfo(alias.dtype).max)


# --- a Python that has the device -----------------------------------------------------------------

_disable_current_modes = _python_dispatch._disable_current_modes


def install() -> tuple[Graphs, Kernels]:
    """Put the device into this process, which was started with its runtime."""
    torch.set_num_threads(1)
    graphs = Graphs()
    kernels, operators = Kernels(graphs), Operators(graphs)

    # Inductor computes constants with every mode off: without ours they would be garbage.
    @contextmanager
    def disable_others() -> Iterator[Any]:
        with _disable_current_modes() as old:
            if any(isinstance(mode, Operators) for mode in old):
                with operators:
                    yield old
            else:
                yield old

    _python_dispatch._disable_current_modes = disable_others
    operators.__enter__()
    return graphs, kernels


def environment() -> dict[str, str]:
    """Return the environment variables under which every Python gets the device.

    Raises:
        build.Unavailable: there is none here; the message says why.
    """
    if reason := emulator.missing():
        raise build.Unavailable(reason)
    folders = [str(ROOT), str(Path(__file__).with_name("startup")), os.environ.get("PYTHONPATH")]
    return {
        **runtime.environment(),
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        INSTALL: "1",
        "SOFTWARE_GPU_MEMORY_GB": "16",
        "TORCHINDUCTOR_CACHE_DIR": str(build.cache() / "inductor-emulated"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # Kernels of Inductor come by the road of Triton's, where their PTX is known.
        "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",
        "TORCHINDUCTOR_USE_STATIC_TRITON_LAUNCHER": "0",
    }


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {**os.environ, **environment()})
