"""The registered operators, and the choice of the algorithm and backend that runs them.

Three operators carry every loss: `locate` the positives, `count` what each sees above itself, and
the `gradient` by every logit. They are opaque to torch.compile, and their outputs have the sizes of
their inputs, so nothing is ever asked of the device to know a shape. Two more, `box_errors` and
`box_gradient`, are the Triton path of `localisation_errors`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .kernels.costs import costs_of
from .reference import breakpoints, layout, pairwise

IMPLS = ("auto", "triton", "torch")
ALGORITHMS = ("auto", "pairwise", "breakpoints")

_program = {"impl": "auto", "algorithm": "auto"}


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


_HAS_TRITON = _installed("triton")  # found, not imported: the torch path does without it


def set_backend(impl: str = "auto", algorithm: str = "auto") -> None:
    """Sets what "auto" means, once for a program.

    Args:
        impl: "torch" (any device), "triton" (CUDA or ROCm tensors), or "auto" to choose by the
            tensor's device.
        algorithm: "pairwise" (every positive with every negative), "breakpoints" (sorted
            breakpoints), or "auto" to choose by the number of positives and logits.

    Raises:
        ValueError: if a name is none of these.

    An `impl` or `algorithm` other than "auto" that is given to a loss wins over this setting. What
    is asked for by name and cannot run raises at the call; only "auto" chooses.

    >>> set_backend(impl="torch")
    >>> set_backend()  # back to choosing
    """
    check_backend(impl, algorithm)
    _program.update(impl=impl, algorithm=algorithm)


def check_backend(impl: str, algorithm: str) -> None:
    """Raises ValueError if a name is unknown."""
    for name, given, known in (("impl", impl, IMPLS), ("algorithm", algorithm, ALGORITHMS)):
        if given not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {given!r}")


def choose_impl(impl: str, device: torch.device) -> str:
    """The backend, "triton" or "torch", for tensors on `device`.

    Only "auto" looks at the device. What is asked for by name stays so: `load_kernels` raises if it
    cannot run.
    """
    impl = _of_program("impl", impl)
    if impl == "auto":
        return "triton" if _HAS_TRITON and device.type == "cuda" else "torch"
    return impl


def load_kernels(name: str, device: torch.device) -> ModuleType:
    """The module `name` of `alrp_triton.kernels`; triton is imported here and nowhere else.

    Raises:
        RuntimeError: if its kernels cannot run on tensors of `device`.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if not _HAS_TRITON:
        raise RuntimeError("impl='triton': triton is not installed; use 'torch' or 'auto'")
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        raise RuntimeError(
            f"impl='triton': expected tensors on a CUDA or ROCm device, got {device}; use 'torch' "
            "or 'auto' (CPU tensors run in Triton's interpreter, under TRITON_INTERPRET=1)"
        )
    return importlib.import_module(f".kernels.{name}", __package__)


def select(impl: str, algorithm: str, logits: Sequence[Tensor], scores: Tensor) -> ModuleType:
    """The module whose `count` and `gradient` run; the choice is made here and nowhere else.

    In torch, "auto" is breakpoints, whose cost hardly grows with the positives. The kernels have
    both: pairwise is cheaper where there are few positives or few logits (`kernels.costs`).

    Raises:
        RuntimeError: if what is asked for by name cannot run on the device of the scores.
    """
    algorithm = _of_program("algorithm", algorithm)
    if choose_impl(impl, scores.device) == "torch":
        return pairwise if algorithm == "pairwise" else breakpoints
    if algorithm == "auto":
        dtype = logits[0].dtype if logits else scores.dtype
        number = sum(level.numel() for level in logits)
        algorithm = costs_of(dtype).choose(scores.numel(), number)
    return load_kernels(algorithm, scores.device)


def _of_program(name: str, given: str) -> str:
    return _program[name] if given == "auto" else given


_library = torch.library.Library("alrp_triton", "DEF")
_library.define(
    "locate(Tensor[] logits, Tensor[] targets, Tensor? positives, SymInt size, bool exact, "
    "int ignore_index) -> (Tensor, Tensor)"
)
_library.define(
    "count(Tensor[] logits, Tensor[] targets, Tensor scores, Tensor values, float delta, "
    "int ignore_index, str impl, str algorithm) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "gradient(Tensor[] logits, Tensor[] targets, Tensor index, Tensor scores, Tensor weights, "
    "Tensor own, float delta, int ignore_index, str impl, str algorithm) -> Tensor[]"
)
_library.define("box_errors(Tensor pred, Tensor target, str kind, float tau) -> Tensor")
_library.define(
    "box_gradient(Tensor upstream, Tensor pred, Tensor target, str kind, float tau) -> Tensor"
)
_implement = "CompositeExplicitAutograd"


@torch.library.impl(_library, "locate", _implement)
def _locate(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    positives: Tensor | None,
    size: int,
    exact: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    return layout.locate(logits, targets, positives, size, exact, ignore_index)


@torch.library.impl(_library, "count", _implement)
def _count(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    scores: Tensor,
    values: Tensor,
    delta: float,
    ignore_index: int,
    impl: str,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = select(impl, algorithm, logits, scores)
    if not _is_reference(module):
        return module.count(logits, targets, scores, values, delta, ignore_index)
    valid = scores != -torch.inf
    nfp, rank_positive, value_sum = (
        torch.full_like(scores, fill, dtype=torch.float64) for fill in (0, 1, 0)
    )
    nfp[valid], rank_positive[valid], value_sum[valid] = module.count(
        logits, targets, scores[valid], values[valid], delta, ignore_index
    )
    return nfp, rank_positive, value_sum


@torch.library.impl(_library, "gradient", _implement)
def _gradient(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    index: Tensor,
    scores: Tensor,
    weights: Tensor,
    own: Tensor,
    delta: float,
    ignore_index: int,
    impl: str,
    algorithm: str,
) -> list[Tensor]:
    module = select(impl, algorithm, logits, scores)
    if _is_reference(module):
        valid = index >= 0
        index, scores, weights, own = (x[valid] for x in (index, scores, weights, own))
    return module.gradient(logits, targets, index, scores, weights, own, delta, ignore_index)


def _is_reference(module: ModuleType) -> bool:
    """Whether padding has to be taken out first; kernels skip it, so the host need not know it."""
    return module in (pairwise, breakpoints)


@torch.library.impl(_library, "box_errors", _implement)
def _box_errors(pred: Tensor, target: Tensor, kind: str, tau: float) -> Tensor:
    return load_kernels("boxes", pred.device).errors(pred, target, kind, tau)


@torch.library.impl(_library, "box_gradient", _implement)
def _box_gradient(upstream: Tensor, pred: Tensor, target: Tensor, kind: str, tau: float) -> Tensor:
    return load_kernels("boxes", pred.device).gradient(upstream, pred, target, kind, tau)


@torch.library.register_fake("alrp_triton::locate", lib=_library)
def _(logits, targets, positives, size, exact, ignore_index):
    index = targets[0].new_empty((size,), dtype=torch.int64)
    return index, logits[0].new_empty((size,), dtype=layout.compute_dtype(logits[0].dtype))


@torch.library.register_fake("alrp_triton::count", lib=_library)
def _(logits, targets, scores, values, delta, ignore_index, impl, algorithm):
    return tuple(torch.empty_like(scores, dtype=torch.float64) for _ in range(3))


@torch.library.register_fake("alrp_triton::gradient", lib=_library)
def _(logits, targets, index, scores, weights, own, delta, ignore_index, impl, algorithm):
    return [torch.empty_like(level) for level in logits]


@torch.library.register_fake("alrp_triton::box_errors", lib=_library)
def _(pred, target, kind, tau):
    wide = torch.promote_types(pred.dtype, target.dtype)
    return pred.new_empty(pred.shape[:1], dtype=torch.promote_types(wide, torch.float32))


@torch.library.register_fake("alrp_triton::box_gradient", lib=_library)
def _(upstream, pred, target, kind, tau):
    return pred.new_empty(pred.shape)


locate = torch.ops.alrp_triton.locate
count = torch.ops.alrp_triton.count
gradient = torch.ops.alrp_triton.gradient
box_errors = torch.ops.alrp_triton.box_errors
box_gradient = torch.ops.alrp_triton.box_gradient
