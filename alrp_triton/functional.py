"""The losses as functions: the input is checked and laid out (`inputs`), then takes the one road.

Every loss takes the same `logits`, `targets` and keywords (`_SHARED`, which each docstring holds).
They return scalars, float32 (float64 for float64 logits; loc also for float64 `loc_errors`),
attached to the graph even where there is nothing to rank. The gradient by the logits is the
error-driven update of the paper, balanced between positives and negatives, and not the derivative
of the returned number: no second derivative and no forward mode by the logits. `torch.func.grad`,
`vjp` and `jacrev` give it like `backward`, `vmap` raises, and loc is differentiated by `loc_errors`
in either mode.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .error_driven import (
    Ranking,
    attach,
    attach_sorting,
    blank_padding,
    mean_error,
    rank_positives,
    sort_positives,
    sum_from_below,
)
from .inputs import (
    LogitsOrLevels,
    check_errors,
    check_per_positive,
    check_skew,
    prepare_ranking,
)
from .loss_terms import Counts, Errors, alrp_errors, ap_errors, ndcg_errors, sorting_errors

# What every loss takes, for its docstring.
_SHARED = """\
    logits: (N, C), or (N, C, d1, ...) as in `torch.nn.functional.cross_entropy`, or a list of such,
        one for each feature level; float32, bfloat16, float16 or float64, any strides. Levels are
        ranked as one list and never concatenated. A level is copied only if d1, ... cannot be
        viewed as one dimension: never as a head gives it, contiguous as
        `maps.view(B * A, C, H, W)`, in channels_last as `maps.permute(0, 2, 3, 1).view(-1, C)`.
    targets: the logits' shape without C, integer: in [0, C) the anchor is a positive of that class,
        `ignore_index` takes the whole anchor out, any other value is background. Or the logits'
        shape (then any shape will do, (N,) too), bool, integer or floating: 1 positive, 0 negative,
        anything else (-1) ignored.
    delta: half-width of the step function H, in logits: 0 for the hard step, or from 2^-60 to
        2^60. A number and no tensor, whose value would have to be waited for; torch.compile
        compiles for each anew.
    ignore_index: the class index that takes an anchor out (-100).
    positives: (P,) int64 positions of the positives in the flattened targets of all levels, all of
        them and each once, if known; saves the search. It may be padded with -1, so that P is
        static under torch.compile; all of it padding ranks nothing. On a CPU one that is missing or
        given twice raises. A GPU is not asked for it: that takes the pass over the targets which
        `positives` saves.
    groups: integers, broadcastable to the shape of `targets`, or a list of such for the levels; a
        positive is then ranked among the examples of its own group alone, as the image of each
        anchor: `torch.arange(B)[:, None, None]`. The losses stay means over all positives.
    impl: the backend, see `set_backend`; "auto" chooses.
    algorithm: likewise.
"""


Loss = TypeVar("Loss", bound=Callable)


def _takes_the_shared(function: Loss) -> Loss:
    """Write `_SHARED` into the docstring of a loss, so that `help` says it all."""
    if function.__doc__:  # python -OO has none
        shared = textwrap.indent(_SHARED, "    ")
        function.__doc__ = function.__doc__.replace("        {shared}\n", shared)
    return function


@_takes_the_shared
def alrp_loss(
    logits: LogitsOrLevels,
    targets: LogitsOrLevels,
    loc_errors: Tensor,
    delta: float = 1.0,
    *,
    ignore_index: int = -100,
    positives: Tensor | None = None,
    groups: LogitsOrLevels | None = None,
    impl: str = "auto",
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the aLRP Loss, Eq. 10 and 11: ranking for classification and localisation.

        aLRP = (1/|P|) sum_i (NFP(i) + Eloc(i) + S(i)) / rank(i) = cls + loc
        cls  = (1/|P|) sum_i  NFP(i) / rank(i)
        loc  = (1/|P|) sum_i (Eloc(i) + S(i)) / rank(i),   S(i) = sum_{k != i} Eloc(k) H(x_ik)

    Args:
        {shared}
        loc_errors: (P,) floating, Eloc of each positive (see `localisation_errors`), in the order
            in which the positives stand in `targets` (row-major, levels in turn), or in the order
            of `positives` and padded alike. Its length tells P, so nothing waits for the device.

    Returns:
        (cls, loc). The gradient of the whole aLRP by the logits rides on `cls`; `loc` carries the
        gradient by `loc_errors`. Train on `cls + weight * loc`, with `SelfBalance` for the weight.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> logits = torch.tensor([[1.0, 0.8], [0.6, 0.2]], requires_grad=True)
        >>> targets = torch.tensor([0, -1])          # one positive: anchor 0, class 0
        >>> loc_errors = torch.tensor([0.1], requires_grad=True)
        >>> cls, loc = alrp_loss(logits, targets, loc_errors, delta=0.0)
        >>> cls.item(), round(loc.item(), 6)         # ranked first: no false positive above it
        (0.0, 0.1)
        >>> (cls + loc).backward()
    """
    check_per_positive("loc_errors", loc_errors)
    ranking = prepare_ranking(
        logits,
        targets,
        delta,
        ignore_index=ignore_index,
        positives=positives,
        groups=groups,
        impl=impl,
        algorithm=algorithm,
        per_positive=("loc_errors", loc_errors),
    )
    counts = rank_positives(ranking, loc_errors)
    cls = mean_error(ap_errors(counts), ranking)
    return (
        attach(cls, counts, alrp_errors(counts), ranking),
        _localisation(loc_errors, counts, ranking),
    )


@_takes_the_shared
def ap_loss(
    logits: LogitsOrLevels,
    targets: LogitsOrLevels,
    delta: float = 1.0,
    *,
    ignore_index: int = -100,
    positives: Tensor | None = None,
    groups: LogitsOrLevels | None = None,
    impl: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """Return the AP Loss, Eq. 2 and 4: one minus the mean precision at the positives.

        AP = (1/|P|) sum_i NFP(i) / rank(i)

    Args:
        {shared}

    Without `positives`, the host has to ask the device how many there are.

    Returns:
        The loss, a scalar in [0, 1].

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> logits = torch.tensor([[0.2, 0.8], [0.6, 0.1]], requires_grad=True)
        >>> loss = ap_loss(logits, torch.tensor([0, -1]), delta=0.0)
        >>> round(loss.item(), 6)                    # two negatives above the one positive
        0.666667
        >>> loss.backward()
        >>> logits.grad.sum().abs().item() < 1e-6    # balanced, Theorem 2
        True
    """
    return error_driven_loss(
        logits,
        targets,
        ap_errors,
        delta=delta,
        ignore_index=ignore_index,
        positives=positives,
        groups=groups,
        impl=impl,
        algorithm=algorithm,
    )


@_takes_the_shared
def ndcg_loss(
    logits: LogitsOrLevels,
    targets: LogitsOrLevels,
    delta: float = 1.0,
    *,
    ignore_index: int = -100,
    positives: Tensor | None = None,
    groups: LogitsOrLevels | None = None,
    impl: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """Return the NDCG Loss, binary relevance: one minus normalised discounted cumulative gain.

        NDCG = 1 - (1/Gmax) sum_i 1/log2(1 + rank(i)),   Gmax = sum_{r=1}^{|P|} 1/log2(1 + r)

    A false positive costs more the higher it stands, as in AP Loss, but more evenly over the list.

    Args:
        {shared}

    Without `positives`, the host has to ask the device how many there are.

    Returns:
        The loss, a scalar; in [0, 1) without groups. With `groups`, Gmax stays that of one list of
        |P|, so that several well-ranked groups bring the loss below 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> logits = torch.tensor([[0.2, 0.8], [0.6, 0.1]], requires_grad=True)
        >>> loss = ndcg_loss(logits, torch.tensor([0, -1]), delta=0.0)
        >>> round(loss.item(), 6)                    # third: 1 - 1/log2(4)
        0.5
        >>> loss.backward()
    """
    return error_driven_loss(
        logits,
        targets,
        ndcg_errors,
        delta=delta,
        ignore_index=ignore_index,
        positives=positives,
        groups=groups,
        impl=impl,
        algorithm=algorithm,
    )


@_takes_the_shared
def rank_sort_loss(
    logits: LogitsOrLevels,
    targets: LogitsOrLevels,
    quality: Tensor,
    delta: float = 0.5,
    *,
    ignore_index: int = -100,
    positives: Tensor | None = None,
    groups: LogitsOrLevels | None = None,
    impl: str = "auto",
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the Rank & Sort Loss: positives above negatives, and by their quality q in order.

        ranking = (1/|P|) sum_i NFP(i) / rank(i)                             (AP Loss)
        sorting = (1/|P|) sum_i [mean over k of 1 - q_k]                     (its l(i))
        l*(i)   =               mean over k with q_k >= q_i of 1 - q_k

    The means are over i itself and the positives k above it, each weighted by H(x_ik). The sorting
    error l - l* of i is spread over the positives of lower quality above it. The default delta is
    that of the publication.

    Args:
        {shared}
        quality: (P,) floating, q of each positive, the IoU of its box in [0, 1]; in the order in
            which the positives stand in `targets`, or in the order of `positives` and padded alike.
            A positive with quality 0 stays a positive. It gets no gradient.

    Returns:
        (ranking, sorting), scalars, each with its own gradient by the logits. Train on their sum.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> logits = torch.tensor([[0.9], [0.5], [0.1]], requires_grad=True)
        >>> targets = torch.tensor([0, 0, -1])       # two positives, above the negative
        >>> quality = torch.tensor([0.5, 1.0])       # but the worse one stands first
        >>> ranking, sorting = rank_sort_loss(logits, targets, quality, delta=0.0)
        >>> ranking.item(), sorting.item()           # (0.5 + (0.5 + 0) / 2) / 2
        (0.0, 0.375)
        >>> (ranking + sorting).backward()
        >>> logits.grad[:, 0].tolist()               # the first shall sink, the second rise
        [0.125, -0.125, 0.0]
    """
    check_per_positive("quality", quality)
    ranking = prepare_ranking(
        logits,
        targets,
        delta,
        ignore_index=ignore_index,
        positives=positives,
        groups=groups,
        impl=impl,
        algorithm=algorithm,
        per_positive=("quality", quality),
    )
    quality = blank_padding(quality.detach().to(torch.float64, copy=True), ranking)
    counts = rank_positives(ranking, 1 - quality)
    sorting = sort_positives(ranking, quality, counts)
    errors = ap_errors(counts), sorting_errors(counts, sorting)
    values = mean_error(errors[0], ranking), mean_error(errors[1], ranking)
    return attach_sorting(values, counts, sorting, quality, errors, ranking)


@_takes_the_shared
def error_driven_loss(
    logits: LogitsOrLevels,
    targets: LogitsOrLevels,
    errors_fn: Callable[[Counts], Errors | tuple[Tensor, Tensor | float, Tensor | float]],
    values: Tensor | None = None,
    delta: float = 1.0,
    *,
    skew: float = 0.0,
    ignore_index: int = -100,
    positives: Tensor | None = None,
    groups: LogitsOrLevels | None = None,
    impl: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """Return any ranking loss L = (1/Z) sum_i l(i), optimised by Algorithm 1 of the paper.

        dL/ds_i = -(l(i) - l*(i)) / Z                                   for i in P with NFP(i) > 0
        dL/ds_j = (1/Z) sum_i (l(i) - l*(i)) H(x_ij) / NFP(i)           for j in N

    Args:
        {shared}
        errors_fn: takes `Counts` and returns (l, l*, Z): the error of each positive, and the error
            that a perfect ranking would leave, each (P,), or a scalar for all of them; the
            normaliser, a scalar other than 0. Scalars may be finite numbers or tensors, of any real
            dtype. It runs without gradients. Entries of padding are masked out afterwards.
        values: (P,) floating, a number for each positive (an IoU, say), in the order of the
            positives; it reaches `errors_fn` as `counts.values`, with S(i) of it as
            `counts.value_sum`. It gets no gradient.
        skew: in [0, 4], the power of the margin x_ij + delta in p(j|i), which promotes harder
            negatives (Sec. 3): p(j|i) is proportional to H(x_ij) (x_ij + delta)^skew. Where these
            sum to less than 2^-900, negatives tie, and share alike. 0 is the uniform distribution
            above, and the fast one: any other evaluates every pair, so that algorithm="breakpoints"
            raises.

    Returns:
        The loss, a scalar; 0 if there is no positive.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> def reciprocal_rank(counts):             # 1 - 1 / rank: only the first places matter
        ...     return 1 - 1 / counts.rank, 1 - 1 / counts.rank_positive, counts.num_positives
        >>> logits = torch.tensor([[0.2, 0.8], [0.6, 0.1]], requires_grad=True)
        >>> loss = error_driven_loss(logits, torch.tensor([0, -1]), reciprocal_rank, delta=0.0)
        >>> round(loss.item(), 6)                    # third
        0.666667
        >>> loss.backward()
        >>> 3 * logits.grad                          # the two above it share the error
        tensor([[-2.,  1.],
                [ 1.,  0.]])
    """
    if not callable(errors_fn):
        raise TypeError(f"errors_fn: expected a function of Counts, got {type(errors_fn).__name__}")
    if values is not None:
        check_per_positive("values", values)
    ranking = prepare_ranking(
        logits,
        targets,
        delta,
        ignore_index=ignore_index,
        positives=positives,
        groups=groups,
        impl=impl,
        algorithm=algorithm,
        per_positive=("values", values),
        skew=check_skew(skew, algorithm),
    )
    counts = rank_positives(ranking, values)
    with torch.no_grad():
        # A copy of what the update is made of: errors_fn may write into what it is given. Not by
        # dataclasses.replace, which torch 2.6 does not compile.
        given = Counts(
            counts.nfp.clone(),
            counts.rank_positive,
            counts.values,
            counts.value_sum,
            counts.num_positives,
        )
        returned = errors_fn(given)
        errors = check_errors(returned, counts.nfp)
    return attach(mean_error(errors, ranking), counts, errors, ranking)


def _localisation(loc_errors: Tensor, counts: Counts, ranking: Ranking) -> Tensor:
    """Return loc of Eq. 11. Being linear in Eloc, it is the sum of Eloc(k) dloc/dEloc(k), where

    dloc/dEloc(k) = (1/|P|) [1 / rank(k) + sum_{i != k} H(x_ik) / rank(i)].
    """
    per_rank = counts.rank.reciprocal()
    passed_down = sum_from_below(ranking, per_rank)
    share = blank_padding((per_rank + passed_down) / counts.num_positives, ranking)
    if ranking.padded:
        loc_errors = torch.where(ranking.valid, loc_errors, 0.0)
    loc = (loc_errors.double() * share).sum()
    return loc.to(torch.promote_types(ranking.scores.dtype, loc_errors.dtype))
