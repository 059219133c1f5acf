"""The registered operators, and the choice of the algorithm and backend that runs them.

Three operators carry every loss: `locate` the positives, `count` what each sees above itself, and
the `gradient` by every logit. They are opaque to torch.compile, and their outputs have the sizes of
their inputs, so nothing is ever asked of the device to know a shape. `sorting_count` and
`sorting_gradient` do the same among the positives alone, `skewed_mass` and `skewed_gradient` with a
skewed error distribution; `box_errors` and `box_gradient` are the Triton path of
`localisation_errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, library

from .backend import choose_impl, load_kernels, select
from .reference import layout, rank_sort, skewed

_library = library.Library("alrp_triton", "DEF")
_library.define(
    "locate(Tensor[] logits, Tensor[] targets, Tensor? positives, SymInt size, bool exact, "
    "SymInt ignore_index, str impl, "
    "str name='loc_errors') -> (Tensor, Tensor)"
)
_library.define(
    "count(Tensor[] logits, Tensor[] targets, Tensor scores, Tensor values, float delta, "
    "SymInt ignore_index, str impl, str algorithm, Tensor[] groups, Tensor? own_groups) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "gradient(Tensor[] logits, Tensor[] targets, Tensor index, Tensor scores, Tensor weights, "
    "Tensor own, float delta, SymInt ignore_index, str impl, str algorithm, Tensor[] groups, "
    "Tensor? own_groups) -> Tensor[]"
)
_library.define(
    "sorting_count(Tensor scores, Tensor quality, Tensor values, float delta, str impl, "
    "Tensor? own_groups) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "sorting_gradient(Tensor scores, Tensor quality, Tensor weights, float delta, str impl, "
    "Tensor? own_groups) -> Tensor"
)
_library.define(
    "skewed_mass(Tensor[] logits, Tensor[] targets, Tensor scores, Tensor powers, float delta, "
    "SymInt ignore_index, str impl, Tensor[] groups, Tensor? own_groups) -> Tensor"
)
_library.define(
    "skewed_gradient(Tensor[] logits, Tensor[] targets, Tensor index, Tensor scores, "
    "Tensor weights, Tensor own, Tensor powers, float delta, SymInt ignore_index, str impl, "
    "Tensor[] groups, Tensor? own_groups) -> Tensor[]"
)
_library.define("box_errors(Tensor pred, Tensor target, str kind, float tau) -> Tensor")
_library.define(
    "box_gradient(Tensor upstream, Tensor pred, Tensor target, str kind, float tau) -> Tensor"
)
_implement = "CompositeExplicitAutograd"


@library.impl(_library, "locate", _implement)
def _locate(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    positives: Tensor | None,
    size: int,
    exact: bool,
    ignore_index: int,
    impl: str,
    name: str = "loc_errors",
) -> tuple[Tensor, Tensor]:
    module = layout
    if choose_impl(impl, logits[0].device) == "triton":
        module = load_kernels("positives", logits[0].device)
    index, scores = module.locate(logits, targets, positives, size, exact, ignore_index, name)
    if positives is not None and index.device.type == "cpu":
        _check_complete(logits, targets, index, ignore_index)
    return index, scores


def _check_complete(
    logits: Sequence[Tensor], targets: Sequence[Tensor], index: Tensor, ignore_index: int
) -> None:
    """ValueError unless the positives that were given are all that there are, each once, or none.

    On a CPU alone. On a device it would take a pass over the targets, which is what `positives`
    saves, and about as many operators as a sort.
    """
    given = index[index >= 0]
    if given.unique().numel() < given.numel():
        raise ValueError("positives: expected every position once, got one several times")
    number = layout.count_positives(logits, targets, ignore_index)
    if given.numel() not in (0, number):
        raise ValueError(
            f"positives: expected all {number} positives of targets, got {given.numel()}"
        )


@library.impl(_library, "count", _implement)
def _count(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    scores: Tensor,
    values: Tensor,
    delta: float,
    ignore_index: int,
    impl: str,
    algorithm: str,
    groups: Sequence[Tensor],
    own_groups: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    count = select(impl, algorithm, logits, scores).count
    if choose_impl(impl, scores.device) == "triton":
        return count(
            logits, targets, scores, values, delta, ignore_index,
            groups=groups, own_groups=own_groups,
        )  # fmt: skip
    valid = scores != -torch.inf
    padded = not valid.all()
    if padded:
        scores, values = scores[valid], values[valid]
        own_groups = _of_valid(own_groups, valid)
    counted = count(
        logits, targets, scores, values, delta, ignore_index,
        groups=groups, own_groups=own_groups,
    )  # fmt: skip
    if not padded:
        return counted
    nfp, rank_positive, value_sum = (
        torch.full_like(valid, fill, dtype=torch.float64).masked_scatter_(valid, x)
        for fill, x in zip((0, 1, 0), counted, strict=True)
    )
    return nfp, rank_positive, value_sum


@library.impl(_library, "gradient", _implement)
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
    groups: Sequence[Tensor],
    own_groups: Tensor | None,
) -> list[Tensor]:
    gradient = select(impl, algorithm, logits, scores).gradient
    if choose_impl(impl, scores.device) == "torch":
        valid = index >= 0
        if not valid.all():
            index, scores, weights, own = (x[valid] for x in (index, scores, weights, own))
            own_groups = _of_valid(own_groups, valid)
    return gradient(
        logits, targets, index, scores, weights, own, delta, ignore_index,
        groups=groups, own_groups=own_groups,
    )  # fmt: skip


@library.impl(_library, "sorting_count", _implement)
def _sorting_count(
    scores: Tensor,
    quality: Tensor,
    values: Tensor,
    delta: float,
    impl: str,
    own_groups: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if choose_impl(impl, scores.device) == "triton":
        kernels = load_kernels("rank_sort", scores.device)
        return kernels.count(scores, quality, values, delta, own_groups)
    valid = scores != -torch.inf
    worse, better, better_values = (torch.zeros_like(values) for _ in range(3))
    worse[valid], better[valid], better_values[valid] = rank_sort.count(
        scores[valid], quality[valid], values[valid], delta, _of_valid(own_groups, valid)
    )
    return worse, better, better_values


@library.impl(_library, "sorting_gradient", _implement)
def _sorting_gradient(
    scores: Tensor,
    quality: Tensor,
    weights: Tensor,
    delta: float,
    impl: str,
    own_groups: Tensor | None,
) -> Tensor:
    if choose_impl(impl, scores.device) == "triton":
        kernels = load_kernels("rank_sort", scores.device)
        return kernels.gradient(scores, quality, weights, delta, own_groups)
    valid = scores != -torch.inf
    passed = torch.zeros_like(weights)
    passed[valid] = rank_sort.gradient(
        scores[valid], quality[valid], weights[valid], delta, _of_valid(own_groups, valid)
    )
    return passed


@library.impl(_library, "skewed_mass", _implement)
def _skewed_mass(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    scores: Tensor,
    powers: Tensor,
    delta: float,
    ignore_index: int,
    impl: str,
    groups: Sequence[Tensor],
    own_groups: Tensor | None,
) -> Tensor:
    if choose_impl(impl, scores.device) == "triton":
        kernels = load_kernels("skewed", scores.device)
        return kernels.mass(
            logits, targets, scores, powers, delta, ignore_index, groups, own_groups
        )
    valid = scores != -torch.inf
    mass = torch.zeros_like(powers)
    mass[valid] = skewed.mass(
        logits, targets, scores[valid], powers[valid], delta, ignore_index,
        groups, _of_valid(own_groups, valid),
    )  # fmt: skip
    return mass


@library.impl(_library, "skewed_gradient", _implement)
def _skewed_gradient(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    index: Tensor,
    scores: Tensor,
    weights: Tensor,
    own: Tensor,
    powers: Tensor,
    delta: float,
    ignore_index: int,
    impl: str,
    groups: Sequence[Tensor],
    own_groups: Tensor | None,
) -> list[Tensor]:
    module = skewed
    if choose_impl(impl, scores.device) == "triton":
        module = load_kernels("skewed", scores.device)
    else:
        valid = index >= 0
        index, scores, weights, own, powers = (
            x[valid] for x in (index, scores, weights, own, powers)
        )
        own_groups = _of_valid(own_groups, valid)
    return module.gradient(
        logits, targets, index, scores, weights, own, powers, delta, ignore_index,
        groups, own_groups,
    )  # fmt: skip


def _of_valid(x: Tensor | None, valid: Tensor) -> Tensor | None:
    """Without padding, which the reference knows nothing of; kernels skip it on the device."""
    return None if x is None else x[valid]


@library.impl(_library, "box_errors", _implement)
def _box_errors(pred: Tensor, target: Tensor, kind: str, tau: float) -> Tensor:
    return load_kernels("boxes", pred.device).errors(pred, target, kind, tau)


@library.impl(_library, "box_gradient", _implement)
def _box_gradient(upstream: Tensor, pred: Tensor, target: Tensor, kind: str, tau: float) -> Tensor:
    return load_kernels("boxes", pred.device).gradient(upstream, pred, target, kind, tau)


@library.register_fake("alrp_triton::locate", lib=_library)
def _(logits, targets, positives, size, exact, ignore_index, impl, name="loc_errors"):
    index = targets[0].new_empty((size,), dtype=torch.int64)
    return index, logits[0].new_empty((size,), dtype=layout.compute_dtype(logits[0].dtype))


@library.register_fake("alrp_triton::count", lib=_library)
def _(logits, targets, scores, values, delta, ignore_index, impl, algorithm, groups, own_groups):
    return tuple(torch.empty_like(scores, dtype=torch.float64) for _ in range(3))


@library.register_fake("alrp_triton::gradient", lib=_library)
def _(
    logits, targets, index, scores, weights, own, delta, ignore_index, impl, algorithm, groups,
    own_groups,
):  # fmt: skip
    return [torch.empty_like(level) for level in logits]


@library.register_fake("alrp_triton::sorting_count", lib=_library)
def _(scores, quality, values, delta, impl, own_groups):
    return tuple(torch.empty_like(scores, dtype=torch.float64) for _ in range(3))


@library.register_fake("alrp_triton::sorting_gradient", lib=_library)
def _(scores, quality, weights, delta, impl, own_groups):
    return torch.empty_like(weights)


@library.register_fake("alrp_triton::skewed_mass", lib=_library)
def _(logits, targets, scores, powers, delta, ignore_index, impl, groups, own_groups):
    return torch.empty_like(powers)


@library.register_fake("alrp_triton::skewed_gradient", lib=_library)
def _(
    logits, targets, index, scores, weights, own, powers, delta, ignore_index, impl, groups,
    own_groups,
):  # fmt: skip
    return [torch.empty_like(level) for level in logits]


@library.register_fake("alrp_triton::box_errors", lib=_library)
def _(pred, target, kind, tau):
    wide = torch.promote_types(pred.dtype, target.dtype)
    return pred.new_empty(pred.shape[:1], dtype=torch.promote_types(wide, torch.float32))


@library.register_fake("alrp_triton::box_gradient", lib=_library)
def _(upstream, pred, target, kind, tau):
    return pred.new_empty(pred.shape)


def _unbatched(*_: Any) -> NoReturn:
    raise RuntimeError(
        "a ranking loss ranks one batch and cannot be mapped over several by torch.vmap: call it "
        "once for each"
    )


def _one_by_one(name: str) -> Callable[..., tuple[list[Tensor], list[int]]]:
    """The rule for torch.vmap of an operator that returns a list: calls it once for each entry."""
    operator = getattr(torch.ops.alrp_triton, name)

    def pick(x: Any, dim: Any, place: int) -> Any:
        if isinstance(x, (list, tuple)):
            return [pick(*pair, place) for pair in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, place)

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int]]:
        results = [operator(*pick(args, in_dims, place)) for place in range(info.batch_size)]
        stacked = [torch.stack(levels) for levels in zip(*results, strict=True)]
        return stacked, [0] * len(stacked)

    return rule


def _one_upstream(*_: Any) -> NoReturn:
    raise RuntimeError(
        "a ranking loss has one upstream gradient at a time: expected is_grads_batched=False or "
        "vectorize=False (torch.func.jacrev takes several)"
    )


# Gradients are asked for several at a time by jacobians. "Batched" is the vmap of torch.autograd.
for _name in ("gradient", "skewed_gradient"):
    library.register_vmap(f"alrp_triton::{_name}", _one_by_one(_name), lib=_library)
    library.impl(_library, _name, "Batched")(_one_upstream)
for _name in ("locate", "count", "sorting_count", "sorting_gradient", "skewed_mass"):
    library.register_vmap(f"alrp_triton::{_name}", _unbatched, lib=_library)

locate = torch.ops.alrp_triton.locate
count = torch.ops.alrp_triton.count
gradient = torch.ops.alrp_triton.gradient
sorting_count = torch.ops.alrp_triton.sorting_count
sorting_gradient = torch.ops.alrp_triton.sorting_gradient
skewed_mass = torch.ops.alrp_triton.skewed_mass
skewed_gradient = torch.ops.alrp_triton.skewed_gradient
box_errors = torch.ops.alrp_triton.box_errors
box_gradient = torch.ops.alrp_triton.box_gradient
