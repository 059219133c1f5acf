"""A small RetinaNet of torchvision's own classes, and the five losses it is trained with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from alrp_triton import ALRPLoss, APLoss, SelfBalance
from alrp_triton.integrations.torchvision import IGNORED, anchor_targets, use_alrp, use_ap
from perf.train.digits import CANVAS, NUM_CLASSES

_norm = partial(nn.GroupNorm, 8)  # works at any batch size and alike in training and testing


class SmallBackbone(nn.Module):
    """Feature pyramid at strides 8, 16 and 32 from a plain convolutional network."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        block = partial(Conv2dNormActivation, norm_layer=_norm)
        # Straight to stride 4: feature maps at stride 2 would cost as much as all the others.
        self.stem = block(1, 24, kernel_size=8, stride=4)
        self.stages = nn.ModuleList(
            nn.Sequential(block(width_in, width, stride=2), block(width, width))
            for width_in, width in [(24, 32), (32, 48), (48, 64)]
        )
        self.fpn = FeaturePyramidNetwork([32, 48, 64], self.out_channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        x = self.stem(images)
        features = OrderedDict()
        for level, stage in enumerate(self.stages):
            features[str(level)] = x = stage(x)
        return self.fpn(features)


def small_retinanet() -> RetinaNet:
    """Build a RetinaNet for (1, 128, 128) images, with labels in [0, 10)."""
    backbone = SmallBackbone()
    anchors = AnchorGenerator(
        sizes=tuple((size, round(size * 2**0.5)) for size in (16, 32, 64)),
        aspect_ratios=((0.5, 1.0, 2.0),) * 3,
    )
    head = RetinaNetHead(
        backbone.out_channels, anchors.num_anchors_per_location()[0], NUM_CLASSES, norm_layer=_norm
    )
    for tower in (head.classification_head, head.regression_head):
        tower.conv = tower.conv[:2]  # two of the four convolutions suffice for digits
    model = RetinaNet(
        backbone,
        num_classes=NUM_CLASSES,
        min_size=CANVAS,
        max_size=CANVAS,
        image_mean=[0.5],
        image_std=[0.25],
        anchor_generator=anchors,
        head=head,
        # A ranking loss orders the scores and leaves their level free, so no threshold:
        # AP takes the best 100 a canvas, whatever their scores.
        score_thresh=0.0,
        topk_candidates=300,
        detections_per_img=100,
    )
    # Faster R-CNN's weights: with RetinaNet's (1, 1, 1, 1) the boxes learn more slowly.
    model.box_coder = head.regression_head.box_coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    return model


@dataclass(frozen=True)
class Recipe:
    """A loss and how it is trained.

    Attributes:
        title: for tables and pictures.
        learning_rates: the peak learning rate per optimiser: the best of a few for this loss, found
            by AP on a detector much like this one.
        install: makes a RetinaNet train with the loss; returns the criterion that ranks, if any.
    """

    title: str
    learning_rates: dict[str, float]
    install: Callable[[RetinaNet], nn.Module | None]


def _install_alrp(model: RetinaNet) -> nn.Module:
    balance = SelfBalance(initial=50.0, period=50)
    criterion = ALRPLoss(delta=1.0, box_loss="giou", tau=0.5, balance=balance)
    use_alrp(model, criterion)
    return criterion


def _install_ap(model: RetinaNet) -> nn.Module:
    criterion = APLoss(delta=1.0)
    use_ap(model, criterion)
    _set_box_loss(model, "smooth_l1")
    return criterion


def _install_cross_entropy(model: RetinaNet) -> None:
    model.head.classification_head.compute_loss = cross_entropy
    _set_box_loss(model, "giou")


def cross_entropy(
    targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], matched_idxs: list[Tensor]
) -> Tensor:
    """Return the sigmoid cross entropy, normalised as torchvision normalises focal loss.

    Stands in for `RetinaNetClassificationHead.compute_loss`. Per image the sum over all logits that
    are not ignored, over the number of positive anchors; the mean of that over the images. Nothing
    holds the negatives down but the head's first bias, which gives each a probability of 0.01.
    """
    losses = []
    for target, logits, matches in zip(
        targets, head_outputs["cls_logits"], matched_idxs, strict=True
    ):
        classes = anchor_targets([target], [matches], logits.shape[1])
        valid = classes != IGNORED
        marks = classes[valid, None] == torch.arange(logits.shape[1], device=logits.device)
        total = F.binary_cross_entropy_with_logits(logits[valid], marks.to(logits), reduction="sum")
        losses.append(total / (classes >= 0).sum().clamp(min=1))
    return torch.stack(losses).mean()


def _set_box_loss(model: RetinaNet, name: str) -> None:
    # The switch that torchvision's own retinanet_resnet50_fpn_v2 uses; the classification stays.
    model.head.regression_head._loss_type = name


RECIPES = {
    "alrp": Recipe("aLRP (GIoU)", {"sgd": 0.04, "adamw": 0.003}, _install_alrp),
    "ap": Recipe("AP + Smooth L1", {"sgd": 0.03, "adamw": 0.003}, _install_ap),
    "focal-l1": Recipe(
        "Focal + L1", {"sgd": 0.03, "adamw": 0.003}, partial(_set_box_loss, name="l1")
    ),
    "focal-giou": Recipe(
        "Focal + GIoU", {"sgd": 0.06, "adamw": 0.003}, partial(_set_box_loss, name="giou")
    ),
    "ce-giou": Recipe("CE + GIoU", {"sgd": 0.03, "adamw": 0.01}, _install_cross_entropy),
}
