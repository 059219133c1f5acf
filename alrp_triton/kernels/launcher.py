"""Launching a kernel past Triton's JIT, which takes several times as long as the launch itself.

The JIT binds every argument by name, asks what each is specialised on, and looks the compiled
kernel up by all of that. Kernels of this package specialise on nothing (`language.jit`), so dtypes,
constants and the width of integers are all that tells one compiled kernel from another.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

try:
    from triton import knobs
except ImportError:  # before 3.4: nobody could tell who hooks launches
    knobs = None


class Kernel:
    """A kernel of Triton's, which is launched through the JIT once for each variant."""

    def __init__(self, function: JITFunction) -> None:
        self.function = function
        self._names = tuple(function.arg_names)
        # An integer with an annotation has one width; any other is 32 or 64 bits wide, as it needs.
        self._told_apart = tuple(
            (place, parameter.is_constexpr)
            for place, parameter in enumerate(function.params)
            if parameter.is_constexpr or not parameter.annotation_type
        )
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(num_warps: int = 4, **arguments: Any) -> None:
            if _is_replaced() or _are_hooked():
                self.function[grid](num_warps=num_warps, **arguments)
                return
            values = [arguments.get(name) for name in self._names]
            device = driver.active.get_current_device()
            key = (device, num_warps, *(_kind(values[i], fixed) for i, fixed in self._told_apart))
            if (found := self._compiled.get(key)) is None:
                self._compiled[key] = _parts_of(
                    self.function[grid](num_warps=num_warps, **arguments)
                )
                return
            if not found:
                self.function[grid](num_warps=num_warps, **arguments)
                return
            run, function, metadata = found
            columns = grid[1] if len(grid) > 1 else 1
            stream = driver.active.get_current_stream(device)
            run(grid[0], columns, 1, stream, function, metadata, None, None, None, *values)

        return launch


def _parts_of(compiled: Any) -> tuple[Any, ...]:
    """Return what launches a compiled kernel; nothing of a Triton that has other names for it."""
    try:
        return compiled.run, compiled.function, compiled.packed_metadata
    except AttributeError:
        return ()


def _kind(value: Any, fixed: bool) -> Any:
    """Return what a compiled kernel depends on of an argument."""
    if isinstance(value, Tensor):
        return value.dtype
    return value if fixed or value is None else value >> 31  # 0 or -1: it has 32 bits


def _is_replaced() -> bool:
    """Return whether something stands in for the JIT, as what records or emulates launches does."""
    return JITFunction.run.__module__ != JITFunction.__module__


def _are_hooked() -> bool:
    """Return whether somebody, a profiler say, wants to see every launch, or may want it."""
    if knobs is None:
        return True
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)
