"""One training run: a small RetinaNet, one of the losses, one seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from tqdm import tqdm

from alrp_triton import ALRPLoss, ALRPOutput
from perf.train.detector import RECIPES, small_retinanet
from perf.train.digits import DigitCanvases
from perf.train.recorder import LossProbe, Stopwatch

BATCH = 16


@dataclass
class History:
    """What was recorded per iteration.

    Attributes:
        loss: the loss that was minimised.
        classification: the part of it that the logits are trained with.
        alrp: (iterations, 3) with cls, loc and the self-balancing weight; None for other losses.
        magnitudes: (iterations, 2), sum |dL/ds| over the negatives and over the positives.
        milliseconds: forward, loss, backward and optimiser.
        loss_milliseconds: the part of the loss in it, forward and backward.
    """

    loss: np.ndarray
    classification: np.ndarray
    alrp: np.ndarray | None
    magnitudes: np.ndarray
    milliseconds: np.ndarray
    loss_milliseconds: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """Gradient magnitudes of negatives over those of positives."""
        negatives, positives = self.magnitudes.T
        return negatives / positives


@dataclass
class Run:
    """A trained detector and how it got there; `interrupted` by Ctrl-C, or complete."""

    loss: str
    seed: int
    model: RetinaNet
    history: History
    interrupted: bool


class _Recorder:
    """Collects per-iteration values on the device; nothing is read before the end."""

    def __init__(self, model: RetinaNet, criterion: nn.Module | None, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.probe = LossProbe(model, stopwatch)
        self.losses: list[Tensor] = []
        self.alrp: list[Tensor] = []
        self.marks: list[tuple] = []  # start of the iteration, of its backward, and its end
        if isinstance(criterion, ALRPLoss):
            criterion.register_forward_hook(self._keep_parts)

    def _keep_parts(self, _criterion: ALRPLoss, _inputs: tuple, out: ALRPOutput) -> None:
        self.alrp.append(torch.stack([out.cls, out.loc, out.weight]).detach())

    def history(self) -> History:
        milliseconds = self.stopwatch.milliseconds
        complete = len(self.marks)  # Ctrl-C may have left a part of another iteration
        loss_milliseconds = [
            milliseconds(*forward) + milliseconds(backward_start, backward_end)
            for forward, backward_end, (_, backward_start, _) in zip(
                self.probe.forward_marks, self.probe.backward_ends, self.marks, strict=False
            )
        ]
        return History(
            loss=_array(self.losses[:complete]),
            classification=_array(self.probe.classification[:complete]),
            alrp=_array(self.alrp[:complete]) if self.alrp else None,
            magnitudes=_array(self.probe.magnitudes[:complete]),
            milliseconds=np.array([milliseconds(start, end) for start, _, end in self.marks]),
            loss_milliseconds=np.array(loss_milliseconds),
        )


class _Update:
    """One iteration: forward, loss, backward, optimiser. Under AMP on CUDA.

    float16, not bfloat16: a ranking loss needs the order of the scores, and float16 has three more
    bits for it. Its narrow range is what the scaler is for: the gradient by a single negative is
    about 1 / N.
    """

    def __init__(
        self,
        model: RetinaNet,
        optimizer: torch.optim.Optimizer,
        recorder: _Recorder,
        device: torch.device,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.recorder = recorder
        self.device = device
        self.amp = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp)

    def __call__(
        self, images: list[Tensor], targets: list[dict[str, Tensor]], rate: float
    ) -> Tensor:
        """Take a step, and return the loss, detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mark = self.recorder.stopwatch.mark
        start = mark()
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.amp):
            total = sum(self.model(images, targets).values())
        backward_start = mark()
        self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        end = mark()
        self.recorder.probe.after_iteration()
        self.recorder.losses.append(total.detach())
        self.recorder.marks.append((start, backward_start, end))
        return total.detach()


def train(loss: str, seed: int, steps: int, optimizer_name: str, device: torch.device) -> Run:
    """Train until `steps` or Ctrl-C, with a progress bar.

    For the same seed every loss gets the same initial weights and the same canvases.
    """
    recipe = RECIPES[loss]
    torch.manual_seed(seed)
    model = small_retinanet().to(device).train()
    criterion = recipe.install(model)
    if criterion is not None:
        criterion.to(device)
    recorder = _Recorder(model, criterion, Stopwatch(device))
    peak = recipe.learning_rates[optimizer_name]
    update = _Update(model, _optimizer(optimizer_name, model, peak), recorder, device)
    canvases = DigitCanvases("train", seed)
    interrupted = False

    with tqdm(total=steps, desc=f"{recipe.title}, seed {seed}", unit="it", mininterval=0.5) as bar:
        try:
            for step in range(steps):
                rate = peak * schedule(step, steps)
                total = update(*_to_device(*canvases.batch(BATCH), device), rate)
                bar.update()
                if step % 10 == 0:  # reading the loss waits for the GPU
                    bar.set_postfix(loss=f"{total.item():.3f}", lr=f"{rate:.4f}", refresh=False)
        except KeyboardInterrupt:
            interrupted = True
    return Run(loss, seed, model, recorder.history(), interrupted)


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak rate: a linear warm-up, then half a cosine down to 0."""
    warmup = max(steps // 20, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _optimizer(name: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(model.parameters(), rate)


def _to_device(
    images: list[Tensor], targets: list[dict[str, Tensor]], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return (
        [image.to(device) for image in images],
        [{key: value.to(device) for key, value in target.items()} for target in targets],
    )


def _array(values: list[Tensor]) -> np.ndarray:
    return torch.stack(values).double().cpu().numpy() if values else np.zeros(0)
