"""The registered operators, and nothing else.

Three of them carry every loss: `locate` the positives, `count` what each sees above itself, and the
`gradient` by every logit. They are opaque to torch.compile, and their outputs have the sizes of
their inputs, so nothing is ever asked of the device to know a shape. `sorting_count` and
`sorting_gradient` do the same among the positives alone, `skewed_mass` and `skewed_gradient` with a
skewed error distribution; `box_errors` and `box_gradient` are the Triton path of
`localisation_errors`.

All but `locate` and those of boxes take the fields of a `Batch` one by one, which are put together
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any, List, NoReturn  # noqa: UP035  # the schema of torch 2.6 knows no list[Tensor]

import torch
from torch import Tensor, library

from .backend import choose_impl, load_kernels, select
from .reference import layout, rank_sort, skewed
from .reference.layout import Batch

_library = library.Library("alrp_triton", "DEF")

functions: dict[str, Callable[..., Any]] = {}  # behind the operators, for who looks into these


def _refuse_to_map(*_: Any) -> NoReturn:
    raise RuntimeError(
        "a ranking loss ranks one batch and cannot be mapped over several by torch.vmap: call it "
        "once for each"
    )


def _operator(fake: Callable[..., Any], mapped: Callable[..., Any] | None = _refuse_to_map) -> Any:
    """Register a function as the operator of its name, with the schema that its annotations say.

    An operator of torch takes no NamedTuple: a function of a `Batch` is the operator of its fields.

    Args:
        fake: returns what the operator does, of the right shapes and dtypes alone.
        mapped: the rule for torch.vmap; None for an operator that torch never maps.

    Not by torch's own `custom_op`, which costs more a call.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        if "batch" in signature(function).parameters:
            function = _of_fields(function)
        functions[name] = function
        _library.define(name + library.infer_schema(function, mutates_args=()))
        library.impl(_library, name, "CompositeExplicitAutograd")(function)
        library.register_fake(f"alrp_triton::{name}", fake, lib=_library)
        if mapped is not None:
            library.register_vmap(f"alrp_triton::{name}", mapped, lib=_library)
        return getattr(torch.ops.alrp_triton, name)

    return register


def _of_fields(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes the fields of a `Batch` one by one, and says so."""
    fields = signature(Batch).parameters.values()
    taken = [Parameter(x.name, x.kind, annotation=_written(x.annotation)) for x in fields]

    def of_fields(*given: Any) -> Any:
        return function(Batch(*given[: len(taken)]), *given[len(taken) :])

    told = signature(function)
    others = [x for x in told.parameters.values() if x.name != "batch"]
    of_fields.__signature__ = told.replace(parameters=[*taken, *others])  # type: ignore[attr-defined]
    return of_fields


def _written(annotation: Any) -> Any:
    """Return an annotation of a NamedTuple as it was written."""
    return getattr(annotation, "__forward_arg__", annotation)


def _fake_locate(
    logits: Sequence[Tensor], targets: Sequence[Tensor], _: Tensor | None, size: int, *__: Any
) -> tuple[Tensor, Tensor]:
    index = targets[0].new_empty((size,), dtype=torch.int64)
    return index, logits[0].new_empty((size,), dtype=layout.compute_dtype(logits[0].dtype))


@_operator(_fake_locate)
def locate(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    positives: Tensor | None,
    size: int,
    exact: bool,
    ignore_index: int,
    impl: str,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Find the positives and gather their scores: see `reference.layout.locate`."""
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
    """Raise ValueError unless the positives given are all that there are, each once, or none.

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


def _like_positives(_: Any, __: Any, ___: Tensor, scores: Tensor, *____: Any) -> Tensor:
    return torch.empty_like(scores, dtype=torch.float64)


def _thrice_like_positives(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like_positives(*given), _like_positives(*given), _like_positives(*given)


def _like_logits(logits: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(level) for level in logits]


@_operator(_thrice_like_positives)
def count(batch: Batch, values: Tensor, impl: str, algorithm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return NFP(i), rank+(i) and S(i): see `reference.pairwise.count`."""
    function = select(impl, algorithm, batch.logits, batch.scores).count
    if choose_impl(impl, batch.scores.device) == "triton":
        return function(batch, values)
    return _without_padding(function, batch, (values,), (0.0, 1.0, 0.0))


@_operator(_thrice_like_positives)
def sorting_count(
    batch: Batch, quality: Tensor, values: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Count the positives above each, by their quality: see `reference.rank_sort.count`."""
    if choose_impl(impl, batch.scores.device) == "triton":
        return load_kernels("rank_sort", batch.scores.device).count(batch, quality, values)
    return _without_padding(rank_sort.count, batch, (quality, values), (0.0, 0.0, 0.0))


@_operator(_like_positives)
def sorting_gradient(batch: Batch, quality: Tensor, weights: Tensor, impl: str) -> Tensor:
    """Return what positives lay on worse ones: see `reference.rank_sort.gradient`."""
    if choose_impl(impl, batch.scores.device) == "triton":
        return load_kernels("rank_sort", batch.scores.device).gradient(batch, quality, weights)
    (passed,) = _without_padding(
        lambda *given: (rank_sort.gradient(*given),), batch, (quality, weights), (0.0,)
    )
    return passed


@_operator(_like_positives)
def skewed_mass(batch: Batch, powers: Tensor, impl: str) -> Tensor:
    """Return what the shares of the negatives sum to: see `reference.skewed.mass`."""
    if choose_impl(impl, batch.scores.device) == "triton":
        return load_kernels("skewed", batch.scores.device).mass(batch, powers)
    (mass,) = _without_padding(lambda *given: (skewed.mass(*given),), batch, (powers,), (0.0,))
    return mass


def _without_padding(
    function: Callable[..., tuple[Tensor, ...]],
    batch: Batch,
    vectors: tuple[Tensor, ...],
    fills: tuple[float, ...],
) -> Any:
    """Call a function of the reference, which knows of no padding, and fill in what padding gets.

    The kernels skip padding on the device, where nobody may be asked whether there is any.
    """
    valid = batch.scores != -torch.inf
    if valid.all():
        return function(batch, *vectors)
    results = function(batch.select(valid), *(x[valid] for x in vectors))
    return tuple(
        torch.full_like(valid, fill, dtype=torch.float64).masked_scatter_(valid, x)
        for fill, x in zip(fills, results, strict=True)
    )


def _one_by_one(name: str) -> Callable[..., tuple[list[Tensor], list[int]]]:
    """Return a rule for torch.vmap that calls an operator, which returns a list, for each entry."""

    def pick(x: Any, dim: Any, place: int) -> Any:
        if isinstance(x, (list, tuple)):
            return [pick(*pair, place) for pair in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, place)

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int]]:
        operator = getattr(torch.ops.alrp_triton, name)
        results = [operator(*pick(args, in_dims, place)) for place in range(info.batch_size)]
        stacked = [torch.stack(levels) for levels in zip(*results, strict=True)]
        return stacked, [0] * len(stacked)

    return rule


def _refuse_several(*_: Any) -> NoReturn:
    raise RuntimeError(
        "a ranking loss has one upstream gradient at a time: expected is_grads_batched=False or "
        "vectorize=False (torch.func.jacrev takes several)"
    )


@_operator(_like_logits, _one_by_one("gradient"))
def gradient(
    batch: Batch, weights: Tensor, positive_grad: Tensor, impl: str, algorithm: str
) -> List[Tensor]:  # noqa: UP006
    """Return the gradient by every logit: see `reference.pairwise.gradient`."""
    function = select(impl, algorithm, batch.logits, batch.scores).gradient
    if choose_impl(impl, batch.scores.device) == "triton":
        return function(batch, weights, positive_grad)
    return _of_valid(function, batch, (weights, positive_grad))


@_operator(_like_logits, _one_by_one("skewed_gradient"))
def skewed_gradient(
    batch: Batch, weights: Tensor, positive_grad: Tensor, powers: Tensor, impl: str
) -> List[Tensor]:  # noqa: UP006
    """Return the gradient by every logit, skewed: see `reference.skewed.gradient`."""
    if choose_impl(impl, batch.scores.device) == "triton":
        kernels = load_kernels("skewed", batch.scores.device)
        return kernels.gradient(batch, weights, positive_grad, powers)
    return _of_valid(skewed.gradient, batch, (weights, positive_grad, powers))


# Gradients are asked for several at a time by jacobians. "Batched" is the vmap of torch.autograd.
for _name in ("gradient", "skewed_gradient"):
    library.impl(_library, _name, "Batched")(_refuse_several)


def _of_valid(
    function: Callable[..., list[Tensor]], batch: Batch, vectors: tuple[Tensor, ...]
) -> list[Tensor]:
    """Call a gradient of the reference, which knows of no padding."""
    valid = batch.index >= 0
    if valid.all():
        return function(batch, *vectors)
    return function(batch.select(valid), *(x[valid] for x in vectors))


def _fake_box_errors(pred: Tensor, target: Tensor, *_: Any) -> Tensor:
    wide = torch.promote_types(pred.dtype, target.dtype)
    return pred.new_empty(pred.shape[:1], dtype=torch.promote_types(wide, torch.float32))


@_operator(_fake_box_errors, mapped=None)
def box_errors(pred: Tensor, target: Tensor, kind: str, tau: float) -> Tensor:
    """Return the localisation error of each pair of boxes."""
    return load_kernels("boxes", pred.device).errors(pred, target, kind, tau)


@_operator(lambda upstream, pred, *_: pred.new_empty(pred.shape), mapped=None)
def box_gradient(upstream: Tensor, pred: Tensor, target: Tensor, kind: str, tau: float) -> Tensor:
    """Return the gradient of `box_errors` by the predicted boxes."""
    return load_kernels("boxes", pred.device).gradient(upstream, pred, target, kind, tau)
