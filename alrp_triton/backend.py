"""Which backend and which algorithm run; where Triton is imported.

The file is not called backends.py: torch.compile leaves alone whatever has "triton/backends" in its
path, for Triton's own sake.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .kernels.tuning.files import costs_for
from .reference import breakpoints, pairwise

IMPLS = ("auto", "triton", "torch")
ALGORITHMS = ("auto", "pairwise", "breakpoints")
_program = {"impl": "auto", "algorithm": "auto"}


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


_HAS_TRITON = _installed("triton")  # found, not imported: the torch path does without it
_OLDEST_TRITON = 3, 6  # that the kernels are written for
_OLDEST_INTERPRETER = 3, 8  # older ones take NaN for the larger number, which no GPU does


def _is_too_old(package: str, oldest: tuple[int, int]) -> bool:
    """Return whether the installed package is older; False if nobody knows its version."""
    try:
        major, minor = importlib.metadata.version(package).split(".")[:2]
        return (int(major), int(minor)) < oldest
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


# The one that torch 2.6 brings is 3.2.
_CHOOSES_TRITON = _HAS_TRITON and not _is_too_old("triton", _OLDEST_TRITON)


_INTERPRETS = _HAS_TRITON and not _is_too_old("triton", _OLDEST_INTERPRETER)


def set_backend(impl: str = "auto", algorithm: str = "auto") -> None:
    """Set what "auto" means, once for a program.

    Args:
        impl: "torch" (any device), "triton" (CUDA or ROCm tensors), or "auto" to choose by the
            tensor's device (with a Triton older than 3.6 always "torch").
        algorithm: "pairwise" (every positive with every negative), "breakpoints" (sorted
            breakpoints), or "auto" to choose by the number of positives and logits.

    Raises:
        TypeError, ValueError: if a name is none of these.

    Both are set: one that is left out goes back to "auto". An `impl` or `algorithm` other than
    "auto" that is given to a loss wins over this setting. What is asked for by name and cannot run
    raises at the call; only "auto" chooses.

    Example:
        >>> set_backend(impl="torch")
        >>> set_backend()  # back to choosing
    """
    check_backend(impl, algorithm)
    _program.update(impl=impl, algorithm=algorithm)


def check_backend(impl: str, algorithm: str) -> None:
    """Raise TypeError if one is no name, ValueError if a name is unknown."""
    for name, given, known in (("impl", impl, IMPLS), ("algorithm", algorithm, ALGORITHMS)):
        if not isinstance(given, str):
            raise TypeError(
                f"{name}: expected one of {', '.join(known)}, got {type(given).__name__}"
            )
        if given not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {given!r}")


def choose_impl(impl: str, device: torch.device) -> str:
    """Return the backend, "triton" or "torch", for tensors on `device`.

    Only "auto" looks at the device. What is asked for by name stays so: `load_kernels` raises if it
    cannot run.
    """
    impl = of_program("impl", impl)
    if impl == "auto":
        return "triton" if _CHOOSES_TRITON and device.type == "cuda" else "torch"
    return impl


def explain(device: torch.device) -> str:
    """Say what "auto" runs on tensors of a device, and why, in a line."""
    impl = choose_impl("auto", device)
    if _program["impl"] != "auto":
        return f"auto: {impl}, as set_backend says"
    if impl == "triton":
        return "auto: triton; pairwise or breakpoints, whichever costs less for P and N"
    if device.type != "cuda":
        return "auto: torch, breakpoints; the kernels want a CUDA or ROCm device"
    if not _HAS_TRITON:
        return "auto: torch, breakpoints; triton is not installed"
    oldest = ".".join(map(str, _OLDEST_TRITON))
    return f"auto: torch, breakpoints; the kernels want Triton {oldest} or later"


def load_kernels(name: str, device: torch.device) -> ModuleType:
    """Return the module `name` of `alrp_triton.kernels`; nowhere else is triton imported.

    Raises:
        RuntimeError: if its kernels cannot run on tensors of `device`.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if not _HAS_TRITON:
        raise RuntimeError("impl='triton': triton is not installed; use 'torch' or 'auto'")
    if interpreted and not _INTERPRETS:
        raise RuntimeError(
            "impl='triton': expected Triton 3.8 or later under TRITON_INTERPRET=1, got "
            f"{importlib.metadata.version('triton')}; use 'torch' or 'auto'"
        )
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        raise RuntimeError(
            f"impl='triton': expected tensors on a CUDA or ROCm device, got {device}; use 'torch' "
            "or 'auto' (CPU tensors run in Triton's interpreter, under TRITON_INTERPRET=1)"
        )
    return importlib.import_module(f".kernels.{name}", __package__)


def select(impl: str, algorithm: str, logits: Sequence[Tensor], scores: Tensor) -> ModuleType:
    """Return the module whose `count` and `gradient` run; the choice is made nowhere else.

    In torch, "auto" is breakpoints, whose cost hardly grows with the positives. The kernels have
    both: pairwise is cheaper where there are few positives or few logits (`kernels.costs`).

    Raises:
        RuntimeError: if what is asked for by name cannot run on the device of the scores.
    """
    algorithm = of_program("algorithm", algorithm)
    if choose_impl(impl, scores.device) == "torch":
        return pairwise if algorithm == "pairwise" else breakpoints
    if algorithm == "auto":
        dtype = logits[0].dtype if logits else scores.dtype
        number = sum(level.numel() for level in logits)
        algorithm = costs_for(scores.device, dtype).choose(scores.numel(), number)
    return load_kernels(algorithm, scores.device)


def of_program(name: str, given: str) -> str:
    """Return what was asked for, in the call or else for the whole program."""
    return _program[name] if given == "auto" else given
