"""What the tests and perf.gpu ask of launches: equal results, another grid, graphs, variants."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return whether both are the same bit by bit; a NaN never is."""
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


class OnGrid:
    """A kernel that is launched on another number of programs than the launcher asks for."""

    def __init__(self, kernel: Any, programs: int) -> None:
        self.kernel, self.programs = kernel, programs

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(**arguments: Any) -> Any:
            others = 0
            if "tile_programs" in arguments:  # some take anchors, and are as many as these are
                others = grid[0] - arguments["tile_programs"]
                arguments["tile_programs"] = self.programs
            return self.kernel[(self.programs + others,)](**arguments)

        return launch


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Capture `step` in a CUDA graph and return what replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def compiled_variants() -> int:
    """Return how many kernels of the package Triton's JIT holds compiled; 0 in the interpreter."""
    kernels = {
        id(kernel): kernel
        for name, module in sys.modules.items()
        if name.startswith("alrp_triton.kernels.")
        for kernel in vars(module).values()
        if hasattr(kernel, "device_caches")
    }
    return sum(
        len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values()
    )


def counting(kernels: ModuleType) -> ModuleType:
    """Return the module of the kernel that an algorithm counts with."""
    name = kernels.__name__.removesuffix(".ranks")
    return importlib.import_module(f"{name}.histogram" if name.endswith("breakpoints") else name)
