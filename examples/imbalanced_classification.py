"""Rank few positives above many negatives: `python examples/imbalanced_classification.py`.

Outside of detection, too, the AP Loss optimises what many a binary classifier is measured by: the
average precision, also called the area under the precision-recall curve (AUPRC). Two networks that
start alike are trained on the same data, one with binary cross entropy and one with the AP Loss,
each for as long as a validation set says. The task is made up: what is printed says nothing about
yours.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from alrp_triton import ap_loss

FEATURES, SHARE = 10, 0.01
Data = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def draw(examples: int, seed: int) -> Data:
    """Draw features (N, FEATURES) and labels (N,); one in a hundred is 1, and lies to one side."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(examples, generator=generator) < SHARE).long()
    features = torch.randn(examples, FEATURES, generator=generator)
    features[:, :3] += 1.5 * labels[:, None]
    return features, labels


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean binary cross entropy."""
    return binary_cross_entropy_with_logits(logits, labels.float())


def average_precision_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the AP Loss, 1 - AP by a softened step, of logits (N,) and labels (N,) 1 or 0."""
    return ap_loss(logits[:, None], labels[:, None])  # one class, and a target for each logit


@torch.no_grad()
def average_precision(model: nn.Module, data: Data) -> float:
    """Return the mean, over the positives, of the precision from each of them upwards."""
    features, labels = data
    hits = labels[model(features).argsort(descending=True)]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return precision[hits == 1].mean().item()


def train(loss: Loss, data: Data, validation: Data, steps: int, seed: int) -> tuple[nn.Module, int]:
    """Train on all examples at once: a ranking loss wants many positives in a batch.

    Returns:
        The network when it was best on the validation set, and after how many steps that was.
    """
    torch.manual_seed(seed)
    last = nn.Linear(32, 1)
    nn.init.constant_(last.bias, math.log(SHARE / (1 - SHARE)))  # helps cross entropy begin
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), last, nn.Flatten(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    highest, best, best_step = -1.0, model, 0
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
        if step % 10 == 0 and (measured := average_precision(model, validation)) > highest:
            highest, best, best_step = measured, copy.deepcopy(model), step
    return best, best_step


def main() -> None:
    """Train with both losses; print the AUPRC on examples neither trained nor validated on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for seed in range(options.seeds):
        data, validation, test = (draw(n, 3 * seed + i) for i, n in enumerate((4000, 4000, 20_000)))
        print(f"seed {seed}: {int(data[1].sum())} positives among {len(data[1])} examples")
        for name, loss in (("cross entropy", cross_entropy), ("AP Loss", average_precision_loss)):
            model, step = train(loss, data, validation, options.steps, seed)
            found = average_precision(model, test)
            print(f"  {name:14} AUPRC {found:.3f}  best after {step} steps")


if __name__ == "__main__":
    main()
