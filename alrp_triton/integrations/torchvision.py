"""Ranking losses for torchvision's RetinaNet: one call, then `model(images, targets)` uses them.

torchvision's anchors, matcher and box coder stay in charge. Only the attributes `compute_loss` of
the model and of its head are replaced, on the instance and by plain objects (not `nn.Module`), so
that the model's `state_dict` keeps its keys, and copying, pickling and autocast keep working.

- A second `use_alrp` or `use_ap` replaces the first. `del model.head.compute_loss` brings
  torchvision's losses back.
- A new classification or regression head (fine-tuning) is used from the next call on, with as many
  classes as it has. A new `model.head` raises at the training call: call `use_alrp` or `use_ap`
  again.
- `torch.jit.script` would compile torchvision's own loss, so it raises for a model in training
  mode; in eval mode it has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alrp_triton import ALRPLoss, APLoss
from alrp_triton.boxes import as_corners

try:
    from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
except ImportError as error:
    raise ImportError(
        "alrp_triton.integrations.torchvision needs torchvision: pip install torchvision"
    ) from error
except RuntimeError as error:  # "operator torchvision::nms does not exist"
    raise ImportError(
        "torchvision is installed but was built for another torch: "
        "install both again from the same package index"
    ) from error

__all__ = ["anchor_targets", "use_alrp", "use_ap"]

BACKGROUND = -1
IGNORED = -100


def use_alrp(model: RetinaNet, criterion: ALRPLoss) -> RetinaNet:
    """Make `model` train with the aLRP Loss for both its branches.

    Boxes are decoded for the positive anchors only. Anchors between torchvision's two matching
    thresholds are ignored. The positives of the whole batch are ranked together.

    Args:
        model: a torchvision RetinaNet; its head is changed in place. Labels are in
            [0, num_classes), as RetinaNet has them.
        criterion: the loss. It does not become a submodule: move it to the model's device and
            save its state (the self-balancing weight) yourself.

    Returns:
        `model`. In training mode `model(images, targets)` returns
        `{"classification": cls, "bbox_regression": weight * loc}`, two scalars whose sum is the
        loss. Images without boxes are welcome.

    Raises:
        TypeError: `model` is not a torchvision RetinaNet, or `criterion` not an ALRPLoss.
        ValueError: `criterion` has an ignore_index of its own; from the training call, for a label
            outside [0, num_classes), or what `anchor_targets` raises for another matcher.

    Example:
        >>> import torch
        >>> from torchvision.models.detection import retinanet_resnet50_fpn
        >>> from alrp_triton import ALRPLoss, SelfBalance
        >>> model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3,
        ...                                min_size=64, max_size=64)
        >>> model = use_alrp(model, ALRPLoss(balance=SelfBalance(initial=50.0, period=50)))
        >>> target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([2])}
        >>> losses = model([torch.rand(3, 64, 64)], [target])
        >>> sum(losses.values()).backward()
        >>> sorted(losses)
        ['bbox_regression', 'classification']
    """
    return _use(model, criterion, ALRPLoss, _ALRPHeadLoss)


def use_ap(model: RetinaNet, criterion: APLoss) -> RetinaNet:
    """Make `model` classify with the AP Loss and keep its own loss for the boxes.

    Args:
        model: a torchvision RetinaNet; its head is changed in place. Labels are in
            [0, num_classes), as RetinaNet has them.
        criterion: the loss. It does not become a submodule of the model.

    Returns:
        `model`. In training mode `model(images, targets)` returns
        `{"classification": AP Loss, "bbox_regression": torchvision's box loss}`, two scalars.

    Raises:
        TypeError: `model` is not a torchvision RetinaNet, or `criterion` not an APLoss.
        ValueError: `criterion` has an ignore_index of its own; from the training call, for a label
            outside [0, num_classes), or what `anchor_targets` raises for another matcher.

    Example:
        >>> import torch
        >>> from torchvision.models.detection import retinanet_resnet50_fpn
        >>> from alrp_triton import APLoss
        >>> model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3,
        ...                                min_size=64, max_size=64)
        >>> model = use_ap(model, APLoss(delta=1.0))
        >>> target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        >>> losses = model([torch.rand(3, 64, 64)], [target])
        >>> losses["classification"].item()
        0.0
    """
    return _use(model, criterion, APLoss, _APHeadLoss)


def anchor_targets(
    targets: Sequence[dict[str, Tensor]], matched_idxs: Sequence[Tensor], num_classes: int
) -> Tensor:
    """Return the class index of every anchor of the batch, from torchvision's matching.

    Args:
        targets: one dict per image, with `labels`: (T,) integers in [0, num_classes).
        matched_idxs: one (A,) integer tensor per image: the position of the anchor's ground truth,
            in [0, T), -1 for background, -2 for an anchor between the matching thresholds.
        num_classes: C.

    Returns:
        (B * A,) int64, image by image: the class index, -1 for background, -100 for ignored.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; so for a label
            or a position that there is not, for which the host waits once for each image.

    Example:
        >>> import torch
        >>> targets = [{"labels": torch.tensor([7, 3])}]
        >>> anchor_targets(targets, [torch.tensor([1, -1, 0, -2])], num_classes=10)
        tensor([   3,   -1,    7, -100])
    """
    if len(targets) != len(matched_idxs):
        raise ValueError(
            f"matched_idxs: expected one tensor for each of the {len(targets)} images of targets, "
            f"got {len(matched_idxs)}"
        )
    per_image = []
    for target, matches in zip(targets, matched_idxs, strict=True):
        labels = _integers("targets", "labels", target["labels"])
        matches = _integers("matched_idxs", "positions", matches)
        _check_range(labels, matches, num_classes)
        # The matcher's -1 and -2 address the table from its end, so that one lookup does all.
        table = F.pad(F.pad(labels, (0, 1), value=IGNORED), (0, 1), value=BACKGROUND)
        per_image.append(table[matches])
    return torch.cat(per_image) if per_image else torch.zeros(0, dtype=torch.int64)


def _use(
    model: RetinaNet,
    criterion: ALRPLoss | APLoss,
    expected: type[nn.Module],
    head_loss: type[_HeadLoss],
) -> RetinaNet:
    head = _head_of(model)
    _check_type(criterion, expected)
    _check_ignored(criterion.ignore_index)
    head.compute_loss = head_loss(head, criterion)
    model.compute_loss = _ModelLoss(model, head)
    head.__prepare_scriptable__ = _RefuseScripting(head)
    return model


class _ModelLoss:
    """Stands in for `RetinaNet.compute_loss`, and does the same, unless the head was replaced.

    A new head brings torchvision's loss along, which would then be trained in silence.
    """

    def __init__(self, model: RetinaNet, head: RetinaNetHead) -> None:
        self.model = model
        self.head = head

    def __call__(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
    ) -> dict[str, Tensor]:
        head = self.model.head
        # Not the same, but with the loss: wrapped, as torch.compile does.
        if head is not self.head and not isinstance(head.compute_loss, _HeadLoss):
            raise RuntimeError(
                "model.head: expected the head that the ranking loss was given to, got another "
                "one, with torchvision's loss; call use_alrp or use_ap again"
            )
        return type(self.model).compute_loss(self.model, targets, head_outputs, anchors)


class _RefuseScripting:
    """What torch.jit.script asks first, of the head: it would compile torchvision's own loss."""

    def __init__(self, head: RetinaNetHead) -> None:
        self.head = head

    def __call__(self) -> RetinaNetHead:
        if self.head.training and "compute_loss" in vars(self.head):
            raise RuntimeError(
                "torch.jit.script compiles torchvision's own loss and not the ranking loss: script "
                "the model in eval mode, or use torch.compile"
            )
        return self.head


class _HeadLoss:
    """Stands in for `RetinaNetHead.compute_loss`. What hangs on the head is looked up at the call,
    so that a new one, of other classes, is used from then on.
    """

    def __init__(self, head: RetinaNetHead, criterion: ALRPLoss | APLoss) -> None:
        self.head = head
        self.criterion = criterion


class _ALRPHeadLoss(_HeadLoss):
    """aLRP for both branches."""

    def __call__(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        logits = head_outputs["cls_logits"].flatten(0, 1)
        classes = anchor_targets(targets, matched_idxs, logits.shape[1])
        pred_boxes, target_boxes = self._positive_boxes(
            targets, head_outputs["bbox_regression"], anchors, matched_idxs
        )
        out = self.criterion(logits, classes, pred_boxes, target_boxes)
        return {"classification": out.cls, "bbox_regression": out.weight * out.loc}

    def _positive_boxes(
        self,
        targets: list[dict[str, Tensor]],
        deltas: Tensor,
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return decoded and ground-truth boxes of the P positives, both (P, 4) xyxy in pixels."""
        pos_deltas, pos_anchors, pos_boxes = [], [], []
        for i, matches in enumerate(matched_idxs):
            positives = torch.where(matches >= 0)[0]
            pos_deltas.append(deltas[i, positives])
            pos_anchors.append(anchors[i][positives])
            pos_boxes.append(_boxes_of(targets[i])[matches[positives]])
        # A box in float16 is good to half a pixel at best, so under autocast decode in float32.
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        pred_boxes = self.head.regression_head.box_coder.decode_single(
            torch.cat(pos_deltas).to(dtype), torch.cat(pos_anchors).to(dtype)
        )
        return pred_boxes, torch.cat(pos_boxes).to(dtype)


class _APHeadLoss(_HeadLoss):
    """AP for the classes, and for the boxes what the regression head has."""

    def __call__(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        logits = head_outputs["cls_logits"].flatten(0, 1)
        classes = anchor_targets(targets, matched_idxs, logits.shape[1])
        return {
            "classification": self.criterion(logits, classes),
            "bbox_regression": self.head.regression_head.compute_loss(
                targets, head_outputs, anchors, matched_idxs
            ),
        }


def _boxes_of(target: dict[str, Tensor]) -> Tensor:
    """Return (T, 4) corners of an image's ground truth; an image without any may have (0,)."""
    boxes = as_corners(target["boxes"], "targets")
    boxes = boxes.reshape(-1, 4) if boxes.numel() == 0 else boxes
    if len(boxes) != len(target["labels"]):
        raise ValueError(
            f"targets: expected as many boxes as labels, got {len(boxes)} boxes and "
            f"{len(target['labels'])} labels"
        )
    return boxes


def _head_of(model: nn.Module) -> RetinaNetHead:
    head = getattr(model, "head", None)
    if not isinstance(model, RetinaNet) or not isinstance(head, RetinaNetHead):
        raise TypeError(
            "model: expected a torchvision RetinaNet with a RetinaNetHead, "
            f"got {type(model).__name__} with head {type(head).__name__}"
        )
    return head


def _check_type(criterion: nn.Module, expected: type[nn.Module]) -> None:
    if not isinstance(criterion, expected):
        raise TypeError(f"criterion: expected {expected.__name__}, got {type(criterion).__name__}")


def _check_ignored(ignore_index: int) -> None:
    if ignore_index != IGNORED:
        raise ValueError(
            f"criterion: expected ignore_index={IGNORED}, which marks anchors between the matching "
            f"thresholds here, got {ignore_index}"
        )


def _integers(name: str, what: str, given: Tensor) -> Tensor:
    """Return one integer for each object, int64; where there is no object any dtype is taken."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected {what} as a tensor, got {type(given).__name__}")
    if given.dim() != 1:
        raise ValueError(f"{name}: expected {what} of one dimension, got {tuple(given.shape)}")
    if given.numel() and (
        given.is_floating_point() or given.is_complex() or given.dtype == torch.bool
    ):
        raise TypeError(f"{name}: expected integer {what}, got {given.dtype}")
    return given.long()


def _check_range(labels: Tensor, matches: Tensor, num_classes: int) -> None:
    # A label outside would silently count as background, a position outside as another object.
    # torchvision's forward has already synchronised with the host for each image (its check for
    # degenerate boxes).
    wrong_labels = (labels < 0) | (labels >= num_classes)
    wrong_matches = (matches < -2) | (matches >= len(labels))
    if not (wrong_labels.any() | wrong_matches.any()):
        return
    if wrong_labels.any():
        raise ValueError(
            f"targets: expected labels in [0, {num_classes}), got {sorted(set(labels.tolist()))}"
        )
    raise ValueError(
        f"matched_idxs: expected -2, -1 or the position of one of the image's {len(labels)} boxes, "
        f"got {matches[wrong_matches][0].item()}"
    )
