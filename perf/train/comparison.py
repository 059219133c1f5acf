"""Train with each loss and seed, evaluate, report: what `python -m perf.train` does."""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass

import numpy as np
import torch

from perf.train import plots, report
from perf.train.detector import RECIPES
from perf.train.digits import DigitCanvases
from perf.train.evaluate import Boxes, detect, evaluate
from perf.train.loop import History, Run, train

_PICTURED = 6  # canvases


@dataclass
class Trained:
    """A run with its detections on the test canvases and the row that it gives the table."""

    history: History
    detections: Boxes
    result: report.Result


def run(options: argparse.Namespace) -> int:
    """Run it; return 0, or 130 if Ctrl-C ended it early, with a report of what there is."""
    started = time.perf_counter()
    if options.device.type == "cpu":
        # The operators are small: a second thread gains a fifth on idle cores, and waiting for it
        # makes an iteration several times slower on busy ones.
        torch.set_num_threads(1)
    images, truths = DigitCanvases("test", seed=0).batch(options.test_images)
    trained: list[Trained] = []
    interrupted = False
    try:
        for seed, loss in itertools.product(options.seeds, options.losses):
            done = train(loss, seed, options.steps, options.opt, options.device)
            interrupted = done.interrupted
            if len(done.history.loss) > 0:
                trained.append(_evaluated(done, detect(done.model, images, options.device), truths))
            if interrupted:
                break
    except KeyboardInterrupt:  # while evaluating
        interrupted = True

    if trained:
        _write_report(trained, images, truths, options)
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    print(f"{'Interrupted' if interrupted else 'Done'} after {minutes} min {seconds} s.", end=" ")
    print(f"Table and pictures are in {options.out}/." if trained else "Nothing was trained.")
    return 130 if interrupted else 0


def _evaluated(done: Run, detections: Boxes, truths: Boxes) -> Trained:
    history = done.history
    measures = evaluate(detections, truths)
    measures["ms/it"] = float(np.median(history.milliseconds))
    measures["loss share"] = float(history.loss_milliseconds.sum() / history.milliseconds.sum())
    result = report.Result(
        title=RECIPES[done.loss].title,
        seed=done.seed,
        steps=len(history.loss),
        interrupted=done.interrupted,
        measures=measures,
        ratio_range=(float(history.ratio.min()), float(history.ratio.max())),
    )
    return Trained(history, detections, result)


def _write_report(
    trained: list[Trained], images: list[torch.Tensor], truths: Boxes, options: argparse.Namespace
) -> None:
    results = [one.result for one in trained]
    print(f"\n{report.table(results)}\n\n{report.NOTES}")
    settings = {
        "steps": options.steps,
        "optimiser": options.opt,
        "seeds": " ".join(map(str, options.seeds)),
        "device": str(options.device),
        "test canvases": options.test_images,
    }
    report.save(results, settings, options.out)

    pictured: dict[str, Trained] = {}  # of each loss the first seed
    for one in trained:
        pictured.setdefault(one.result.title, one)
    alrp = next((one.history.alrp for one in trained if one.history.alrp is not None), None)
    plots.save_curves(
        alrp,
        {title: one.history.ratio for title, one in pictured.items()},
        options.out / "curves.png",
    )
    plots.save_detections(
        images[:_PICTURED],
        truths[:_PICTURED],
        {title: one.detections[:_PICTURED] for title, one in pictured.items()},
        {title: break_even_score(one.detections, truths) for title, one in pictured.items()},
        options.out / "detections.png",
    )


def break_even_score(detections: Boxes, truths: Boxes) -> float:
    """Return the score from which there are as many detections as objects, over all the canvases.

    The level of a ranking loss's scores means nothing, so a fixed threshold would be unfair.
    """
    scores = torch.cat([found["scores"] for found in detections])
    objects = sum(len(truth["labels"]) for truth in truths)
    return scores.topk(min(objects, len(scores))).values[-1].item()
