"""What a loss does while a detector trains: the gradients it sends back, and what it costs."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet

from alrp_triton.integrations.torchvision import anchor_targets


class Stopwatch:
    """Time stamps on the host or, without synchronising, on the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if not self.on_gpu:
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


class LossProbe:
    """Stands between a RetinaNet and the loss of its head, whichever that is.

    Per iteration it records when the forward of the loss starts and ends, when its backward ends
    (the gradients by both outputs of the head are there: autograd runs the nodes created last
    first, so the network's own backward comes after), the classification loss, and the gradient
    magnitudes of negatives and positives.
    """

    def __init__(self, model: RetinaNet, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.loss = model.head.compute_loss
        model.head.compute_loss = self
        self.forward_marks: list[tuple] = []
        self.backward_ends: list = []
        self.classification: list[Tensor] = []
        self.magnitudes: list[Tensor] = []
        self._matching: tuple | None = None
        self._gradient: Tensor | None = None
        self._backward_end = None

    def __call__(self, targets, head_outputs, anchors, matched_idxs) -> dict[str, Tensor]:
        start = self.stopwatch.mark()
        losses = self.loss(targets, head_outputs, anchors, matched_idxs)
        self.forward_marks.append((start, self.stopwatch.mark()))
        self.classification.append(losses["classification"].detach())
        self._matching = targets, matched_idxs
        head_outputs["cls_logits"].register_hook(partial(self._on_gradient, of_logits=True))
        head_outputs["bbox_regression"].register_hook(partial(self._on_gradient, of_logits=False))
        return losses

    def _on_gradient(self, gradient: Tensor, of_logits: bool) -> None:
        self._backward_end = self.stopwatch.mark()
        if of_logits:
            self._gradient = gradient.detach()

    def after_iteration(self) -> None:
        """Take the magnitudes; apart from the hooks, or it would count as time of the loss."""
        self.backward_ends.append(self._backward_end)
        classes = anchor_targets(*self._matching, self._gradient.shape[-1])
        self.magnitudes.append(gradient_magnitudes(self._gradient.flatten(0, 1), classes))
        self._gradient = None  # as large as the logits


def gradient_magnitudes(gradient: Tensor, classes: Tensor) -> Tensor:
    """Return sum |dL/ds| over the negatives and over the positives, (2,) float64.

    Args:
        gradient: (A, C), by the logits; zero where ignored.
        classes: (A,) int64, a positive's class in [0, C), negative for every other anchor.
    """
    magnitudes = gradient.abs()
    rows = torch.where(classes >= 0)[0]
    positives = magnitudes[rows, classes[rows]].sum(dtype=torch.float64)
    return torch.stack([magnitudes.sum(dtype=torch.float64) - positives, positives])
