"""What every loss is called with: checked, laid out as (B, C, M), and the positives found.

So is what a user's errors function returns. The checks are made here and nowhere else. An error
names the argument, what was expected and what came; what only a device knows is an asynchronous
assertion there (`ops.locate`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import backend, ops
from .error_driven import Ranking
from .loss_terms import Errors
from .reference.layout import LARGEST_DELTA, SMALLEST_DELTA, Batch, gather, is_positive
from .reference.skewed import MAX_POWER

LogitsOrLevels = Tensor | Sequence[Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REAL = (torch.bool, *_INTEGERS, *_DTYPES)  # that torch compares and promotes on every version
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # for which torch has hardly an operator


def prepare_ranking(
    logits: LogitsOrLevels,
    targets: LogitsOrLevels,
    delta: float,
    *,
    ignore_index: int,
    positives: Tensor | None,
    groups: LogitsOrLevels | None,
    impl: str,
    algorithm: str,
    per_positive: tuple[str, Tensor | None],
    skew: float = 0.0,
) -> Ranking:
    """Check what every loss takes, lay the levels out as (B, C, M), and find the positives."""
    delta = check_delta(delta)
    ignore_index = check_ignore_index(ignore_index)
    backend.check_backend(impl, algorithm)
    if positives is not None:
        check_dense("positives", positives, "an int64 tensor")
    levels = _levels("logits", logits)
    level_targets = _levels("targets", targets)
    if len(levels) != len(level_targets):
        raise ValueError(
            f"targets: expected one tensor for each of the {len(levels)} levels of logits, "
            f"got {len(level_targets)}"
        )
    laid_out = [
        _lay_out(level, target, levels[0], ignore_index)
        for level, target in zip(levels, level_targets, strict=True)
    ]
    level_groups = _lay_out_groups(groups, level_targets, levels, laid_out)
    levels = [level for level, _ in laid_out]
    level_targets = [target for _, target in laid_out]
    size, exact = _size(levels, level_targets, ignore_index, positives, per_positive)
    index, scores = ops.locate(
        [level.detach() for level in levels],
        level_targets,
        None if positives is None else positives.long(),
        size,
        exact,
        ignore_index,
        impl,
        per_positive[0],
    )
    positive_groups = gather(level_groups, levels, index) if level_groups else None
    batch = Batch(
        levels, level_targets, index, scores, delta, ignore_index, level_groups, positive_groups
    )
    padded = positives is not None or not exact
    return Ranking(batch, index >= 0, padded, impl, algorithm, skew)


def check_delta(delta: float, name: str = "delta") -> float:
    """Return the half-width as a float.

    Raise TypeError or ValueError if not every algorithm takes it.
    """
    delta = check_number(name, delta)
    if delta != 0 and not SMALLEST_DELTA <= delta <= LARGEST_DELTA:
        raise ValueError(
            f"{name}: expected 0 or a number from {SMALLEST_DELTA:.2g} to {LARGEST_DELTA:.2g}, "
            f"got {delta}"
        )
    return delta


def check_number(name: str, given: Any) -> float:
    """Return a real number as a float, infinite if it is too large for one; else raise TypeError.

    A tensor is none: to ask its value is to wait for its device.
    """
    if isinstance(given, float):
        return given
    if isinstance(given, bool) or not isinstance(given, (int, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {_kind(given)}")
    if isinstance(given, int) and not -_BEYOND_FLOAT < given < _BEYOND_FLOAT:
        return math.inf if given > 0 else -math.inf
    return float(given)


_BEYOND_FLOAT = 1 << 1023


def check_ignore_index(given: Any) -> int:
    """Return the class index that takes an anchor out.

    Raise TypeError or ValueError if targets hold no such.
    """
    if isinstance(given, bool) or not isinstance(given, (int, numbers.Integral)):
        raise TypeError(f"ignore_index: expected an integer, got {_kind(given)}")
    index = given if isinstance(given, int) else int(given)
    if not -(1 << 63) <= index < 1 << 63:
        raise ValueError("ignore_index: expected an integer of 64 bits, got a larger one")
    return index


def check_dense(name: str, given: Any, expected: str) -> None:
    """Raise TypeError unless it is a tensor that holds its own numbers, strided."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {_kind(given)}")
    if given.layout != torch.strided or given.is_nested:
        layout = "jagged" if given.is_nested else str(given.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected {expected}, strided, got one of layout {layout}")
    if given.is_quantized:
        raise TypeError(f"{name}: expected {expected}, got one of {given.dtype}")
    if not torch.compiler.is_compiling() and (
        is_traceable_wrapper_subclass(given) or isinstance(given, torch.masked.MaskedTensor)
    ):
        raise TypeError(
            f"{name}: expected {expected} that holds its own numbers, got {_kind(given)}"
        )


def _kind(given: Any) -> str:
    return type(given).__name__


def _levels(name: str, given: LogitsOrLevels) -> list[Tensor]:
    levels = given if isinstance(given, (list, tuple)) else [given]
    if isinstance(given, (list, tuple)) and not levels:
        raise ValueError(f"{name}: expected at least one level, got an empty {_kind(given)}")
    for level in levels:
        if level is not given and not isinstance(level, Tensor):
            raise TypeError(
                f"{name}: expected a tensor or a list of tensors, got a {_kind(given)} of "
                f"{_kind(level)}"
            )
        check_dense(name, level, "a tensor or a list of tensors")
    return list(levels)


def _lay_out(
    logits: Tensor, targets: Tensor, first: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return a level as (B, C, M), its targets as (B, M) or (B, C, M): views, if strides allow."""
    if logits.dtype not in _DTYPES:
        raise TypeError(
            "logits: expected float32, bfloat16, float16 or float64, "
            f"got {str(logits.dtype).removeprefix('torch.')}"
        )
    for name, given in (("logits", logits), ("targets", targets)):
        if given.device != first.device:
            raise ValueError(
                f"{name}: expected on {first.device} like the logits, got {given.device}"
            )
    if logits.dtype != first.dtype:
        raise TypeError(
            f"logits: expected one dtype on all levels, got {first.dtype}, {logits.dtype}"
        )

    per_logit = targets.shape == logits.shape
    anchors = (*logits.shape[:1], *logits.shape[2:])
    if not per_logit and (logits.dim() < 2 or tuple(targets.shape) != anchors):
        indices = f"{anchors} (class indices) or " if logits.dim() > 1 else ""
        raise ValueError(
            f"targets: expected shape {indices}{tuple(logits.shape)} "
            f"(1 / 0 / -1) for logits of shape {tuple(logits.shape)}, got {tuple(targets.shape)}"
        )
    targets = _comparable(targets.detach(), per_logit)
    shape = (*logits.shape, 1, 1)[: max(2, logits.dim())]
    batch, classes, places = shape[0], shape[1], math.prod(shape[2:])
    logits = logits.reshape(batch, classes, places)
    if per_logit:
        return logits, targets.reshape(batch, classes, places)
    range_ = torch.iinfo(targets.dtype)
    if not range_.min <= ignore_index <= range_.max or classes > range_.max:
        targets = targets.long()  # or what they are compared with would wrap around
    return logits, targets.reshape(batch, places)


def _comparable(targets: Tensor, per_logit: bool) -> Tensor:
    """Return the targets in a dtype with comparisons on every torch, or raise TypeError."""
    dtype = targets.dtype
    if dtype in _UNSIGNED:
        targets = targets.long()
        # What int64 does not hold has turned negative: it is background, and no `ignore_index`.
        return targets.masked_fill_(targets < 0, torch.iinfo(torch.int64).max)
    if dtype in (REAL if per_logit else _INTEGERS):
        return targets
    expected = "1 / 0 / -1, integer, bool or floating" if per_logit else "integer class indices"
    raise TypeError(f"targets: expected {expected}, got {dtype}")


def _lay_out_groups(
    groups: LogitsOrLevels | None,
    targets: Sequence[Tensor],
    logits: Sequence[Tensor],
    laid_out: Sequence[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """Return the groups in the shapes of the laid out targets: views, if the strides allow."""
    if groups is None:
        return []
    level_groups = _levels("groups", groups)
    if len(level_groups) != len(targets):
        raise ValueError(
            f"groups: expected one tensor for each of the {len(targets)} levels of logits, "
            f"got {len(level_groups)}"
        )
    return [
        _lay_out_group(group, target, level.device).reshape(shaped.shape)
        for group, target, level, (_, shaped) in zip(
            level_groups, targets, logits, laid_out, strict=True
        )
    ]


def _lay_out_group(groups: Tensor, targets: Tensor, device: torch.device) -> Tensor:
    if groups.dtype in _UNSIGNED:
        groups = groups.long()
    if groups.dtype not in (torch.bool, *_INTEGERS):
        raise TypeError(f"groups: expected integers, got {groups.dtype}")
    if groups.device != device:
        raise ValueError(f"groups: expected on {device} like the logits, got {groups.device}")
    try:
        return groups.expand(targets.shape)
    except RuntimeError:
        raise ValueError(
            f"groups: expected a shape that can be broadcast to {tuple(targets.shape)}, that of "
            f"targets, got {tuple(groups.shape)}"
        ) from None


def _size(
    levels: Sequence[Tensor],
    targets: Sequence[Tensor],
    ignore_index: int,
    positives: Tensor | None,
    per_positive: tuple[str, Tensor | None],
) -> tuple[int, bool]:
    """Return how many positives to make room for, and whether that is their exact number."""
    name, values = per_positive
    device = levels[0].device
    for given_name, given in (("positives", positives), (name, values)):
        if given is not None and given.device != device:
            raise ValueError(
                f"{given_name}: expected on {device} like the logits, got {given.device}"
            )
    if positives is not None:
        if positives.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"positives: expected int64, got {positives.dtype}")
        if positives.dim() != 1:
            raise ValueError(f"positives: expected shape (P,), got {tuple(positives.shape)}")
        if values is not None and values.shape != positives.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(positives.shape)} like positives, "
                f"got {tuple(values.shape)}"
            )
        return positives.numel(), True
    if values is not None:
        return values.numel(), True
    if torch.compiler.is_compiling():
        # Under compilation a size cannot depend on data: room for every anchor, mostly padding.
        return sum(target.numel() for target in targets), False
    pairs = zip(levels, targets, strict=True)
    return sum(int(is_positive(*pair, ignore_index).count_nonzero()) for pair in pairs), True


def check_per_positive(name: str, given: Tensor) -> None:
    """Raise TypeError or ValueError, by its name, unless it has a number for each positive."""
    check_dense(name, given, "a floating tensor")
    if given.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected a floating tensor of 16 to 64 bits, got {given.dtype}")
    if given.dim() != 1:
        raise ValueError(
            f"{name}: expected shape (P,), one entry for each positive, got shape "
            f"{tuple(given.shape)}"
        )


def check_errors(returned: Any, nfp: Tensor) -> Errors:
    """Return l and l* of an errors function as (P,) float64; a scalar is that of each positive."""
    if not isinstance(returned, (tuple, list)) or len(returned) != 3:
        number = f" of {len(returned)}" if isinstance(returned, (tuple, list)) else ""
        raise TypeError(
            f"errors_fn: expected it to return (l, l*, Z), got {type(returned).__name__}{number}"
        )
    error, target, normaliser = returned
    error = _check_returned("l", error, nfp, per_positive=True)
    target = _check_returned("l*", target, nfp, per_positive=True)
    normaliser = _check_returned("Z", normaliser, nfp, per_positive=False)
    if not isinstance(normaliser, Tensor) and normaliser == 0 and nfp.numel():
        raise ValueError("errors_fn: expected Z other than 0, got 0")
    zeros = torch.zeros_like(nfp)
    return Errors(zeros + error, zeros + target, normaliser)


def _check_returned(name: str, given: Any, nfp: Tensor, per_positive: bool) -> Tensor | float:
    if isinstance(given, numbers.Real):
        number = check_number("errors_fn", given + 0)  # of a bool, 0 or 1
        if not -math.inf < number < math.inf:
            raise ValueError(f"errors_fn: expected {name} finite, got {number}")
        return number
    check_dense("errors_fn", given, f"{name} as a tensor or a number")
    if given.dtype not in REAL:
        raise TypeError(f"errors_fn: expected {name} real, of 8 bits or more, got {given.dtype}")
    if given.device != nfp.device and (given.dim() or given.device.type != "cpu"):
        raise ValueError(f"errors_fn: expected {name} on {nfp.device}, got {given.device}")
    expected = f"{tuple(nfp.shape)}, one entry for each positive, or ()" if per_positive else "()"
    if given.dim() and not (per_positive and given.shape == nfp.shape):
        raise ValueError(
            f"errors_fn: expected {name} of shape {expected}, got {tuple(given.shape)}"
        )
    return given


def check_skew(skew: float, algorithm: str) -> float:
    """Return the power of the margin; TypeError or ValueError if nothing can be skewed by it."""
    skew = check_number("skew", skew)
    if not 0 <= skew <= MAX_POWER:
        raise ValueError(f"skew: expected a number from 0 to {MAX_POWER:g}, got {skew}")
    if skew and backend.of_program("algorithm", algorithm) == "breakpoints":
        raise ValueError(
            "algorithm='breakpoints': a skewed distribution evaluates every pair, expected "
            "'pairwise' or 'auto'"
        )
    return skew
