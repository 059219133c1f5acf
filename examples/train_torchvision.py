"""Train torchvision's RetinaNet with the aLRP Loss: `python examples/train_torchvision.py`.

The images are drawn here, rectangles on noise, so that nothing is fetched. For data of your own
replace `RectangleImages`: torchvision asks for images in [0, 1] and, for each, `boxes` (T, 4) xyxy
in pixels and `labels` (T,) in [0, num_classes). A few steps show that everything works together;
they do not make a detector.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn

from alrp_triton import ALRPLoss, SelfBalance
from alrp_triton.integrations.torchvision import use_alrp

SIZE = 128
COLOURS = torch.tensor([[1.0, 0.2, 0.2], [0.2, 1.0, 0.2], [0.2, 0.2, 1.0]])  # one a class
Target = dict[str, Tensor]


class RectangleImages(Dataset[tuple[Tensor, Target]]):
    """Images with one to three coloured rectangles each, the same for the same index."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, SIZE, SIZE, generator=generator) * 0.3
        number = int(torch.randint(1, 4, (), generator=generator))
        labels = torch.randint(len(COLOURS), (number,), generator=generator)
        corners = torch.randint(0, SIZE - 64, (number, 2), generator=generator)
        sizes = torch.randint(24, 64, (number, 2), generator=generator)
        boxes = torch.cat([corners, corners + sizes], 1)
        for (left, top, right, bottom), label in zip(boxes.tolist(), labels, strict=True):
            image[:, top:bottom, left:right] = COLOURS[label][:, None, None]
        return image, {"boxes": boxes.float(), "labels": labels}


def collate(batch: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Return lists, as torchvision's detectors take them: images may differ in size."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def build(device: torch.device) -> tuple[RetinaNet, ALRPLoss]:
    """Return a RetinaNet that trains with the aLRP Loss, and that loss."""
    model = retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,  # "DEFAULT" fetches a trained one, with which a training starts
        num_classes=len(COLOURS),
        min_size=SIZE,
        max_size=SIZE,
        score_thresh=0.0,  # the loss orders the scores, and leaves their level free
    )
    # The weight of the box term starts at 50, and is set anew every `period` steps.
    criterion = ALRPLoss(box_loss="giou", balance=SelfBalance(initial=50.0, period=50))
    return use_alrp(model.to(device), criterion.to(device)), criterion


def train(steps: int, device: torch.device) -> None:
    """Train so many steps and print the losses of each."""
    torch.manual_seed(0)
    model, criterion = build(device)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    loader = DataLoader(RectangleImages(2 * steps), batch_size=2, collate_fn=collate)
    for step, (images, targets) in enumerate(loader):
        losses = model(
            [image.to(device) for image in images],
            [{name: x.to(device) for name, x in target.items()} for target in targets],
        )
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        parts = "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
        print(f"step {step}  {parts}")
    # The criterion is no part of the model, and has a state: the self-balancing weight.
    state = {"model": model.state_dict(), "criterion": criterion.state_dict()}
    print(f"to save: {len(state['model'])} tensors of the model, {sorted(state['criterion'])}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    train(options.steps, options.device)


if __name__ == "__main__":
    main()
