"""The registered operators, and the choice of the algorithm and backend that runs them.

Three operators carry every loss: `locate` the positives, `count` what each sees above itself, and the
`gradient` by every logit. They are opaque to torch.compile, and their outputs have the sizes of their
inputs, so nothing is ever asked of the device to know a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .reference import breakpoints, layout, pairwise

IMPLS = ("auto", "triton", "torch")
ALGORITHMS = ("auto", "pairwise", "breakpoints")

_program = {"impl": "auto", "algorithm": "auto"}


def set_backend(impl: str = "auto", algorithm: str = "auto") -> None:
    """Sets what "auto" means, once for a program.

    Args:
        impl: "torch" (any device), "triton" (CUDA or ROCm tensors), or "auto" to choose by the
            tensor's device.
        algorithm: "pairwise" (every positive with every negative), "breakpoints" (sorted
            breakpoints), or "auto" to choose by the number of positives and logits.

    Raises:
        ValueError: if a name is none of these.

    An `impl` or `algorithm` other than "auto" that is given to a loss wins over this setting. What is
    asked for by name and cannot run raises at the call; only "auto" chooses.

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


def select(impl: str, algorithm: str) -> ModuleType:
    """The module whose `count` and `gradient` run; the choice is made here and nowhere else."""
    impl = _program["impl"] if impl == "auto" else impl
    algorithm = _program["algorithm"] if algorithm == "auto" else algorithm
    if impl == "triton":
        raise RuntimeError(
            "impl='triton': this version has no Triton kernels; use 'torch' or 'auto'"
        )
    return pairwise if algorithm == "pairwise" else breakpoints


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
    counts = torch.zeros((3, scores.numel()), dtype=torch.float64, device=scores.device)
    counts[1] = 1
    valid = scores != -torch.inf
    compact = select(impl, algorithm).count(
        logits, targets, scores[valid], values[valid], delta, ignore_index
    )
    counts[:, valid] = torch.stack(compact)
    return tuple(row.clone() for row in counts)


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
    valid = index >= 0
    positives = (x[valid] for x in (index, scores, weights, own))
    return select(impl, algorithm).gradient(logits, targets, *positives, delta, ignore_index)


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


locate = torch.ops.alrp_triton.locate
count = torch.ops.alrp_triton.count
gradient = torch.ops.alrp_triton.gradient
