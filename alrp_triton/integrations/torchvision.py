"""Ranking losses for torchvision's RetinaNet: one call, then `model(images, targets)` uses them.

torchvision's anchors, matcher and box coder stay in charge. Only the attribute `compute_loss` of
the model's head is replaced, on the instance and by a plain object (not an `nn.Module`), so that
the model's `state_dict` keeps its keys, and copying, pickling and autocast keep working.
`torch.jit.script` compiles the class's own method and so would train the original loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alrp_triton import ALRPLoss, APLoss

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
            outside [0, num_classes).

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
    head = _head_of(model)
    _check_type(criterion, ALRPLoss)
    _check_ignored(criterion.ignore_index)
    head.compute_loss = _ALRPHeadLoss(head, criterion)
    return model


def use_ap(model: RetinaNet, criterion: APLoss) -> RetinaNet:
    """Make `model` classify with the AP Loss and keep its own loss for the boxes.

    Args:
        model: a torchvision RetinaNet; its classification head is changed in place. Labels are in
            [0, num_classes), as RetinaNet has them.
        criterion: the loss. It does not become a submodule of the model.

    Returns:
        `model`. In training mode `model(images, targets)` returns
        `{"classification": AP Loss, "bbox_regression": torchvision's box loss}`, two scalars.

    Raises:
        TypeError: `model` is not a torchvision RetinaNet, or `criterion` not an APLoss.
        ValueError: `criterion` has an ignore_index of its own; from the training call, for a label
            outside [0, num_classes).

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
    head = _head_of(model)
    _check_type(criterion, APLoss)
    _check_ignored(criterion.ignore_index)
    head.classification_head.compute_loss = _APClassificationLoss(criterion)
    return model


def anchor_targets(
    targets: Sequence[dict[str, Tensor]], matched_idxs: Sequence[Tensor], num_classes: int
) -> Tensor:
    """The class index of every anchor of the batch, from torchvision's matching.

    Args:
        targets: one dict per image, with `labels`: (T,) int64 in [0, num_classes).
        matched_idxs: one (A,) int64 tensor per image: the position of the anchor's ground truth,
            -1 for background, -2 for an anchor between the matching thresholds.
        num_classes: C.

    Returns:
        (B * A,) int64, image by image: the class index, -1 for background, -100 for ignored.

    Raises:
        ValueError: a label lies outside [0, num_classes).

    Example:
        >>> import torch
        >>> targets = [{"labels": torch.tensor([7, 3])}]
        >>> anchor_targets(targets, [torch.tensor([1, -1, 0, -2])], num_classes=10)
        tensor([   3,   -1,    7, -100])
    """
    per_image = []
    for target, matches in zip(targets, matched_idxs, strict=True):
        labels = target["labels"]
        _check_labels(labels, num_classes)
        # The matcher's -1 and -2 address the table from its end, so that one lookup does all.
        table = F.pad(F.pad(labels, (0, 1), value=IGNORED), (0, 1), value=BACKGROUND)
        per_image.append(table[matches])
    return torch.cat(per_image)


class _ALRPHeadLoss:
    """Stands in for `RetinaNetHead.compute_loss`."""

    def __init__(self, head: RetinaNetHead, criterion: ALRPLoss) -> None:
        self.head = head
        self.criterion = criterion

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
        """Decoded and ground-truth boxes of the P positives, both (P, 4) xyxy in pixels."""
        pos_deltas, pos_anchors, pos_boxes = [], [], []
        for i, matches in enumerate(matched_idxs):
            positives = torch.where(matches >= 0)[0]
            pos_deltas.append(deltas[i, positives])
            pos_anchors.append(anchors[i][positives])
            pos_boxes.append(targets[i]["boxes"][matches[positives]])
        # A box in float16 is good to half a pixel at best, so under autocast decode in float32.
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        pred_boxes = self.head.regression_head.box_coder.decode_single(
            torch.cat(pos_deltas).to(dtype), torch.cat(pos_anchors).to(dtype)
        )
        return pred_boxes, torch.cat(pos_boxes).to(dtype)


class _APClassificationLoss:
    """Stands in for `RetinaNetClassificationHead.compute_loss`."""

    def __init__(self, criterion: APLoss) -> None:
        self.criterion = criterion

    def __call__(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        matched_idxs: list[Tensor],
    ) -> Tensor:
        logits = head_outputs["cls_logits"].flatten(0, 1)
        return self.criterion(logits, anchor_targets(targets, matched_idxs, logits.shape[1]))


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


def _check_labels(labels: Tensor, num_classes: int) -> None:
    # A label outside would silently count as background. torchvision's forward has already
    # synchronised with the host for each image (its check for degenerate boxes).
    if ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(
            f"targets: expected labels in [0, {num_classes}), got {sorted(set(labels.tolist()))}"
        )
