"""The losses as modules, and the self-balancing weight of the localisation term."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .boxes import check_kind, localisation_errors
from .functional import alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from .inputs import LogitsOrLevels


class ALRPOutput(NamedTuple):
    """What `ALRPLoss` returns: scalars."""

    loss: Tensor  # cls + weight * loc, to call backward on
    cls: Tensor  # Eq. 11, classification part
    loc: Tensor  # Eq. 11, localisation part, unweighted
    weight: Tensor  # of loc, without gradient


class RankSortOutput(NamedTuple):
    """What `RankSortLoss` returns: scalars."""

    loss: Tensor  # ranking + sorting, to call backward on
    ranking: Tensor  # positives among negatives
    sorting: Tensor  # positives among themselves


class SelfBalance(nn.Module):
    """Self-balancing (Sec. 4.2): the weight of loc is mean(aLRP) / mean(loc) of the previous epoch.

    The statistics are buffers: they stay on the device of the losses (nothing waits for it) and are
    saved in `state_dict`. An iteration whose loss is not finite is left out of them.
    Outside of the module that DistributedDataParallel wraps, each rank balances on what it sees;
    inside, all take rank 0's, whose buffers are broadcast.

    Args:
        initial: weight in the first epoch (50 in the paper, which finds it to hardly matter).
        period: number of iterations after which an epoch ends by itself; None if the caller says so
            with `step()`.

    Raises:
        TypeError, ValueError: if initial is no positive number, or period no integer from 1 on.

    Example:
        >>> balance = SelfBalance(initial=50.0)
        >>> balance.update(torch.tensor(0.9), torch.tensor(0.1))
        >>> balance.step()                           # the epoch ends
        >>> round(balance.weight.item(), 4)
        10.0
    """

    weight: Tensor
    sums: Tensor
    iterations: Tensor

    def __init__(self, initial: float = 50.0, period: int | None = None) -> None:
        super().__init__()
        if isinstance(initial, bool) or not isinstance(initial, (int, float)):
            raise TypeError(f"initial: expected a number, got {type(initial).__name__}")
        if isinstance(period, bool) or not isinstance(period, (int, type(None))):
            raise TypeError(f"period: expected None or an integer, got {type(period).__name__}")
        if not initial > 0:
            raise ValueError(f"initial: expected a positive number, got {initial}")
        if period is not None and period < 1:
            raise ValueError(f"period: expected None or at least 1, got {period}")
        self.period = period
        self.register_buffer("weight", torch.tensor(float(initial), dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))  # of aLRP, of loc
        self.register_buffer("iterations", torch.zeros((), dtype=torch.int64))
        # Known to the host, for the warning: the length of the positives, not what they hold.
        self._calls = 0
        self._seen_positive = False
        self._warned = False

    @torch.no_grad()
    def update(self, cls: Tensor, loc: Tensor, num_positives: int = 1) -> None:
        """Adds one iteration: its cls and loc (scalars), and how many positives it had."""
        if self.sums.device != cls.device and not torch.compiler.is_compiling():
            self.to(cls.device)  # a copy to another device would wait for it in every iteration
        sums = torch.stack([cls + loc, loc]).to(self.sums)
        self.sums += torch.where(sums.isfinite().all(), sums, 0.0)
        self.iterations += 1
        if self.period is not None:
            self._end_epoch(self.iterations >= self.period)
        if not torch.compiler.is_compiling():
            self._calls += 1
            self._seen_positive = self._seen_positive or num_positives > 0
            if self._calls == self.period:
                self._warn_without_positives()

    @torch.no_grad()
    def step(self) -> None:
        """Ends an epoch: the weight becomes the ratio of what was summed since the last one.

        It stays as it was if nothing was localised, and warns once if no positive was ever seen.
        """
        self._warn_without_positives()
        self._end_epoch(self.iterations > 0)

    def _end_epoch(self, ends: Tensor) -> None:
        total, loc = self.sums
        usable = ends & (loc > 0)
        self.weight.copy_(torch.where(usable, total / torch.where(usable, loc, 1.0), self.weight))
        self.sums.masked_fill_(ends, 0)
        self.iterations.masked_fill_(ends, 0)

    def _warn_without_positives(self) -> None:
        if self._seen_positive or self._warned:
            return
        self._warned = True
        warnings.warn(
            "SelfBalance: no positive was seen so far, the weight of the localisation loss stays "
            "at its initial value; check the assignment of targets",
            stacklevel=3,
        )

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"period={self.period}"


class ALRPLoss(nn.Module):
    """aLRP Loss for classification and box regression, with self-balancing.

    Args:
        delta: half-width of the step function, in logits; 1 in the paper, its only hyperparameter.
        box_loss: "iou", "giou", "diou" or "ciou", see `localisation_errors`.
        tau: the IoU from which a detection counts as true.
        balance: the weight of loc; None for a constant 1. `SelfBalance()` wants its `step()` at the
            end of each epoch, `SelfBalance(period=...)` does it by itself.
        ignore_index, impl, algorithm: as in `alrp_loss`.

    Raises:
        ValueError: if there is no such box_loss, or tau is not in [0, 1). What else is wrong,
            `alrp_loss` and `localisation_errors` raise at the call.

    Example:
        >>> criterion = ALRPLoss(balance=SelfBalance(period=1000))
        >>> logits = torch.randn(100, 3, requires_grad=True)         # 100 anchors, 3 classes
        >>> targets = torch.full((100,), -1)                         # background, but for two
        >>> targets[4], targets[7] = 0, 2
        >>> target_boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 9.0, 9.0]])
        >>> pred_boxes = (target_boxes + 0.5).requires_grad_()
        >>> out = criterion(logits, targets, pred_boxes, target_boxes)
        >>> out.loss.backward()
    """

    def __init__(
        self,
        delta: float = 1.0,
        box_loss: str = "giou",
        tau: float = 0.5,
        balance: SelfBalance | None = None,
        *,
        ignore_index: int = -100,
        impl: str = "auto",
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        check_kind(box_loss, tau, "box_loss")
        self.delta = delta
        self.box_loss = box_loss
        self.tau = tau
        self.balance = balance
        self.ignore_index = ignore_index
        self.impl = impl
        self.algorithm = algorithm

    def forward(
        self,
        logits: LogitsOrLevels,
        targets: LogitsOrLevels,
        pred_boxes: Tensor,
        target_boxes: Tensor,
        positives: Tensor | None = None,
        groups: LogitsOrLevels | None = None,
    ) -> ALRPOutput:
        """Loss of one batch.

        Args:
            logits, targets, positives, groups: as in `alrp_loss`.
            pred_boxes: (P, 4) predicted boxes (x1, y1, x2, y2) of the positives, in the order in
                which they stand in `targets`.
            target_boxes: (P, 4) their ground truth.

        Returns:
            `ALRPOutput`: loss = cls + weight * loc, and its parts.
        """
        loc_errors = localisation_errors(
            pred_boxes, target_boxes, self.box_loss, self.tau, impl=self.impl
        )
        cls, loc = alrp_loss(
            logits,
            targets,
            loc_errors,
            self.delta,
            ignore_index=self.ignore_index,
            positives=positives,
            groups=groups,
            impl=self.impl,
            algorithm=self.algorithm,
        )
        if self.balance is None:
            weight = torch.ones_like(loc, requires_grad=False)
        else:
            # A copy: the buffer may change before backward reads it.
            weight = self.balance.weight.to(loc.dtype, copy=True)
            if self.training:
                self.balance.update(cls.detach(), loc.detach(), loc_errors.numel())
        return ALRPOutput(cls + weight * loc, cls, loc, weight)

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"delta={self.delta}, box_loss={self.box_loss!r}, tau={self.tau}"


class _RankingLoss(nn.Module):
    """The settings that the losses without boxes share."""

    def __init__(
        self,
        delta: float = 1.0,
        *,
        ignore_index: int = -100,
        impl: str = "auto",
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        self.delta = delta
        self.ignore_index = ignore_index
        self.impl = impl
        self.algorithm = algorithm

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"delta={self.delta}"


class _ScalarLoss(_RankingLoss):
    """A loss that is one scalar, of logits and targets alone."""

    function: Callable[..., Tensor]  # with the arguments of `ap_loss`

    def forward(
        self,
        logits: LogitsOrLevels,
        targets: LogitsOrLevels,
        positives: Tensor | None = None,
        groups: LogitsOrLevels | None = None,
    ) -> Tensor:
        """The loss of one batch, a scalar; arguments as in `ap_loss`."""
        return self.function(
            logits,
            targets,
            self.delta,
            ignore_index=self.ignore_index,
            positives=positives,
            groups=groups,
            impl=self.impl,
            algorithm=self.algorithm,
        )


class APLoss(_ScalarLoss):
    """AP Loss: one minus the mean precision at the positives. Arguments as in `ap_loss`.

    Example:
        >>> logits = torch.randn(100, 3, requires_grad=True)
        >>> targets = torch.full((100,), -1)
        >>> targets[4] = 0
        >>> APLoss(delta=1.0)(logits, targets).backward()
    """

    function = staticmethod(ap_loss)


class NDCGLoss(_ScalarLoss):
    """NDCG Loss: one minus the normalised discounted gain. Arguments as in `ndcg_loss`.

    Example:
        >>> logits = torch.randn(100, 3, requires_grad=True)
        >>> targets = torch.full((100,), -1)
        >>> targets[4] = 0
        >>> NDCGLoss(delta=1.0)(logits, targets).backward()
    """

    function = staticmethod(ndcg_loss)


class RankSortLoss(_RankingLoss):
    """Rank & Sort Loss: positives above negatives, and sorted by quality. Arguments as in
    `rank_sort_loss`.

    Example:
        >>> logits = torch.randn(100, 3, requires_grad=True)
        >>> targets = torch.full((100,), -1)
        >>> targets[4], targets[7] = 0, 2
        >>> out = RankSortLoss()(logits, targets, quality=torch.tensor([0.6, 0.9]))
        >>> out.loss.backward()
    """

    def __init__(
        self,
        delta: float = 0.5,
        *,
        ignore_index: int = -100,
        impl: str = "auto",
        algorithm: str = "auto",
    ) -> None:
        super().__init__(delta, ignore_index=ignore_index, impl=impl, algorithm=algorithm)

    def forward(
        self,
        logits: LogitsOrLevels,
        targets: LogitsOrLevels,
        quality: Tensor,
        positives: Tensor | None = None,
        groups: LogitsOrLevels | None = None,
    ) -> RankSortOutput:
        """The loss of one batch and its parts; arguments as in `rank_sort_loss`."""
        ranking, sorting = rank_sort_loss(
            logits,
            targets,
            quality,
            self.delta,
            ignore_index=self.ignore_index,
            positives=positives,
            groups=groups,
            impl=self.impl,
            algorithm=self.algorithm,
        )
        return RankSortOutput(ranking + sorting, ranking, sorting)
