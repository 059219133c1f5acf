"""The losses as modules."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backend
from .boxes import check_kind, localisation_errors
from .functional import alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from .inputs import check_delta, check_ignore_index
from .self_balance import SelfBalance, recomputes

if TYPE_CHECKING:
    from .inputs import LogitsOrLevels
else:
    LogitsOrLevels = Any  # TorchScript reads the annotations, and knows no sequence of tensors


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


class _Weighted(torch.autograd.Function):
    """weight * loc, and back with the same weight.

    It is kept apart from the saved tensors, which a checkpoint computes again, and by then another
    call may have changed the weight.
    """

    @staticmethod
    def forward(loc: Tensor, weight: Tensor) -> Tensor:
        return weight * loc

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.weight * upstream, None


class _RankingLoss(nn.Module):
    """The settings that the losses share, checked when they are made.

    TorchScript passes over what stands below `not torch.jit.is_scripting()`: a model that holds a
    loss can be scripted for inference, and calling the loss in it raises.
    """

    def __init__(
        self,
        delta: float = 1.0,
        *,
        ignore_index: int = -100,
        impl: str = "auto",
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        backend.check_backend(impl, algorithm)
        self.delta = check_delta(delta)
        self.ignore_index = check_ignore_index(ignore_index)
        self.impl = impl
        self.algorithm = algorithm

    def extra_repr(self) -> str:
        """Return what repr() shows."""
        return f"delta={self.delta}"


class ALRPLoss(_RankingLoss):
    """aLRP Loss for classification and box regression, with self-balancing.

    Args:
        delta: half-width of the step function, in logits; 1 in the paper, its only hyperparameter.
        box_loss: "iou", "giou", "diou" or "ciou", see `localisation_errors`.
        tau: the IoU from which a detection counts as true.
        balance: the weight of loc; None for a constant 1. `SelfBalance()` wants its `step()` at the
            end of each epoch, `SelfBalance(period=...)` does it by itself.
        ignore_index: as in `alrp_loss`; so are the next two.
        impl: the backend.
        algorithm: what it computes by.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    In training mode each call counts as an iteration of the balance, unless gradients are disabled.
    A call below `torch.utils.checkpoint` counts once. With `use_reentrant=True` that is in
    backward, so of several such calls before one backward a later weight may be used there; with
    `use_reentrant=False` backward has the weight that forward returned. Compiled, a loss below an
    eager checkpoint counts twice, and on torch 2.6 below a compiled one too.

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
        super().__init__(delta, ignore_index=ignore_index, impl=impl, algorithm=algorithm)
        check_kind(box_loss, tau, "box_loss")
        if balance is not None and not isinstance(balance, SelfBalance):
            raise TypeError(
                f"balance: expected None or a SelfBalance, got {type(balance).__name__}"
            )
        self.box_loss = box_loss
        self.tau = float(tau)
        self.balance = balance
        self._weight: Tensor | None = None  # of the last call, which a checkpoint may repeat

    def forward(
        self,
        logits: LogitsOrLevels,
        targets: LogitsOrLevels,
        pred_boxes: Tensor,
        target_boxes: Tensor,
        positives: Tensor | None = None,
        groups: LogitsOrLevels | None = None,
    ) -> ALRPOutput:
        """Return the loss of one batch.

        Args:
            logits: as in `alrp_loss`; so are the next three.
            targets: class indices, or marks for each logit.
            positives: where they stand, if known.
            groups: of the examples, if they are ranked within them.
            pred_boxes: (P, 4) predicted boxes (x1, y1, x2, y2) of the positives, in the order in
                which they stand in `targets`.
            target_boxes: (P, 4) their ground truth.

        Returns:
            `ALRPOutput`: loss = cls + weight * loc, and its parts.
        """
        if not torch.jit.is_scripting():
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
            weight = self._balance(cls.detach(), loc.detach(), loc_errors.numel())
            return ALRPOutput(cls + _Weighted.apply(loc, weight), cls, loc, weight)
        raise RuntimeError("ALRPLoss: TorchScript cannot compile it, call it outside")

    def _balance(self, cls: Tensor, loc: Tensor, num_positives: int) -> Tensor:
        """Return the weight of loc in this iteration, and count the iteration."""
        if self.balance is None:
            return torch.ones_like(loc)
        if recomputes() and self._weight is not None:
            return self._weight
        weight = self.balance.weight_of(loc)
        if self.training and torch.is_grad_enabled():
            self.balance.update(cls, loc, num_positives)
        if not torch.compiler.is_compiling():
            self._weight = weight
        return weight

    def extra_repr(self) -> str:
        """Return what repr() shows."""
        return f"delta={self.delta}, box_loss={self.box_loss!r}, tau={self.tau}"


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
        """Return the loss of one batch, a scalar; arguments as in `ap_loss`."""
        if not torch.jit.is_scripting():
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
        raise RuntimeError("APLoss, NDCGLoss: TorchScript cannot compile them, call them outside")


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
        """Return the loss of one batch and its parts; arguments as in `rank_sort_loss`."""
        if not torch.jit.is_scripting():
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
        raise RuntimeError("RankSortLoss: TorchScript cannot compile it, call it outside")
