"""Write a ranking loss of your own: `python examples/custom_loss.py`.

This one is the AP Loss with a weight for each positive, such as for rare classes. Its function is
all that is new; the rest makes the checks that a new loss deserves, and trains a linear model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alrp_triton import error_driven_loss

CLASSES, FEATURES = 5, 16


def weighted_ap(counts) -> tuple[Tensor, float, Tensor]:
    """Return l(i), l*(i) and Z of L = sum_i w(i) NFP(i) / rank(i) / sum_i w(i).

    A perfect ranking leaves no error, so that l* = 0.
    """
    return counts.values * counts.nfp / counts.rank, 0.0, counts.values.sum()


def draw(anchors: int = 2000) -> tuple[Tensor, Tensor]:
    """Draw features (anchors, FEATURES) and classes: -1 is background, the last ones are rare."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.95, 0.02, 0.015, 0.01, 0.003, 0.002])
    targets = torch.multinomial(shares, anchors, replacement=True, generator=generator) - 1
    centres = torch.randn(1 + CLASSES, FEATURES, generator=generator)
    noise = torch.randn(anchors, FEATURES, generator=generator)
    return centres[1 + targets] + 1.5 * noise, targets


def weights_of(targets: Tensor) -> Tensor:
    """Return a weight for each positive, in the order of `targets`: each class weighs the same."""
    classes = targets[targets >= 0]
    return 1.0 / classes.bincount(minlength=CLASSES)[classes]


def check(logits: Tensor, targets: Tensor, weights: Tensor) -> None:
    """Hold the loss to Theorem 2 of the paper, and its fast path to every pair."""
    logits = logits.detach().double().requires_grad_()
    found = {}
    for algorithm in ("breakpoints", "pairwise"):
        loss = error_driven_loss(logits, targets, weighted_ap, weights, algorithm=algorithm)
        found[algorithm] = (loss.detach(), *torch.autograd.grad(loss, logits))
    _, gradient = found["breakpoints"]
    raised, lowered = -gradient.clamp(max=0).sum(), gradient.clamp(min=0).sum()
    print(f"positives are raised by {raised:.6f} in sum, negatives lowered by {lowered:.6f}")
    torch.testing.assert_close(raised, lowered)
    torch.testing.assert_close(found["breakpoints"], found["pairwise"])
    print("the fast path and the evaluation of every pair give the same loss and gradient")


def main() -> None:
    """Check the loss, then train with it."""
    torch.manual_seed(0)
    features, targets = draw()
    weights = weights_of(targets)
    model = torch.nn.Linear(FEATURES, CLASSES)
    check(model(features), targets, weights)

    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(101):
        loss = error_driven_loss(model(features), targets, weighted_ap, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:3}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
