"""What the tests and perf.gpu ask of launches: equal results, another grid, compiled variants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Bit by bit; but a NaN is never the same."""
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


class OnGrid:
    """A kernel that is launched on another number of programs than the launcher asks for."""

    def __init__(self, kernel: Any, programs: int) -> None:
        self.kernel, self.programs = kernel, programs

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.kernel[(self.programs,)]


def compiled_variants(kernels: ModuleType) -> int:
    """How many kernels of a module Triton's JIT holds compiled; 0 in the interpreter."""
    return sum(
        len(cache[0])
        for kernel in vars(kernels).values()
        if hasattr(kernel, "device_caches")
        for cache in kernel.device_caches.values()
    )
