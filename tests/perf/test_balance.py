"""The balance over a training: what is summed, Theorem 2 in every iteration, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from torchvision.ops import box_iou

from perf.balance import __main__ as balance
from perf.train import loop
from perf.train.detector import small_retinanet
from perf.train.digits import DigitCanvases

CPU = torch.device("cpu")
STEPS = 8
U = 2.0**-24  # half the distance from 1 to the next float32


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread, as the command does; several would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Return the folder of a tiny run, and the exit status."""
    folder = tmp_path_factory.mktemp("balance")
    status = balance.main(["--quick", "--steps", str(STEPS), "--out", str(folder)])
    return folder, status


@pytest.fixture(scope="module")
def runs(command):
    """Return what results.json holds of each loss, by title."""
    document = json.loads((command[0] / "results.json").read_text())
    return {run["title"]: run for run in document["runs"]}


def test_alrp_is_balanced_in_every_iteration(runs):
    """Before they are rounded to float32 both sums are one number, to the float64 additions.

    An entry rounds by a share of at most u, so a sum of entries of one sign does, and the ratio
    lies between (1 - u) / (1 + u) and (1 + u) / (1 - u).
    """
    negatives, positives = np.array(runs["aLRP"]["negatives"]), np.array(runs["aLRP"]["positives"])
    logits = loop.BATCH * (16**2 + 8**2 + 4**2) * 6 * 10  # canvases, places, anchors, classes
    bound = 2 * U / (1 - U) + 4 * logits * 2.0**-53
    assert len(negatives) == STEPS
    assert (positives > 0).all()
    assert np.abs(negatives / positives - 1).max() <= bound


@pytest.fixture(scope="module")
def first_iteration():
    """Return the first iteration's logits, a float64 leaf (B, A, C), and per image 1 / 0 / -1."""
    torch.manual_seed(0)
    model = small_retinanet().train()
    images, targets = DigitCanvases("train", 0).batch(loop.BATCH)
    batch, _ = model.transform(images)
    features = list(model.backbone(batch.tensors).values())
    logits = model.head(features)["cls_logits"].detach().double().requires_grad_()
    marks = torch.zeros(logits.shape, dtype=torch.float64)
    for mark, target, anchors in zip(
        marks, targets, model.anchor_generator(batch, features), strict=True
    ):
        iou, nearest = box_iou(target["boxes"], anchors).max(dim=0)
        best = box_iou(target["boxes"], anchors).max(dim=1, keepdim=True).values
        low_quality = (box_iou(target["boxes"], anchors) == best).any(dim=0)
        mark[(iou >= 0.4) & (iou < 0.5) & ~low_quality] = -1
        positive = (iou >= 0.5) | low_quality
        mark[positive, target["labels"][nearest[positive]]] = 1
    return logits, marks


def cross_entropy(probability, mark):
    return -torch.where(mark == 1, probability, 1 - probability).log()


def focal(probability, mark):
    right = torch.where(mark == 1, probability, 1 - probability)
    return torch.where(mark == 1, 0.25, 0.75) * (1 - right) ** 2 * -right.log()


@pytest.mark.parametrize(
    ("title", "formula"), [("cross entropy", cross_entropy), ("focal loss", focal)]
)
def test_the_sums_are_those_of_the_gradient(title, formula, runs, first_iteration):
    """One iteration over again in float64, from the formula and with the matching by hand."""
    logits, marks = first_iteration
    per_logit = torch.where(marks == -1, 0.0, formula(logits.sigmoid(), marks))
    positives = (marks == 1).sum(dim=(1, 2))
    loss = (per_logit.sum(dim=(1, 2)) / positives).mean()
    (gradient,) = torch.autograd.grad(loss, logits)
    # Each entry is rounded a dozen times, by u or less. Besides, focal loss has p from 1 - (1 - p),
    # to u / p of it, and squares it: errors of either sign, which in a sum of n grow as sqrt(n), up
    # to a factor of 8 (as in perf/bench/parity.py).
    cancelled = 2 * U / logits.sigmoid().min().item()
    run = runs[title]
    for name, mark in (("negatives", 0), ("positives", 1)):
        entries = gradient[marks == mark].abs()
        tolerance = 16 * U + 8 * cancelled / len(entries) ** 0.5
        assert run[name][0] == pytest.approx(entries.sum().item(), rel=tolerance), name
    assert run["classification"][0] == pytest.approx(loss.item(), rel=16 * U + cancelled)


def test_the_others_are_not_balanced(runs):
    """At the start the negatives of cross entropy outweigh the positives, in focal loss it is the
    other way round."""
    first = {title: run["negatives"][0] / run["positives"][0] for title, run in runs.items()}
    assert first["cross entropy"] > 10
    assert first["focal loss"] < 0.1


def test_ratios_change_from_iteration_to_iteration(runs):
    """What is recorded is each iteration's own."""
    for title in ("cross entropy", "focal loss"):
        assert len(set(runs[title]["negatives"])) == len(set(runs[title]["positives"])) == STEPS


def test_the_command_writes_table_and_picture(command, runs):
    folder, status = command
    assert status == 0
    assert list(runs) == list(balance.LOSSES.values())
    lines = (folder / "results.md").read_text().splitlines()
    head, row = ([cell.strip() for cell in line.split("|")] for line in (lines[0], lines[4]))
    assert head[1:5] == ["loss", "least", "median", "greatest"]
    assert row[1:7] == ["aLRP", *["1.000"] * 5]
    assert (folder / "balance.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_least_and_greatest():
    sums = np.array([[8.0, 1.0], [1.0, 4.0], [3.0, 2.0], [1.0, 1.0]])
    each = np.arange(1.0, 5.0)
    history = loop.History(each, each, None, sums, each, each)
    row = balance.table({"A": history}).splitlines()[2]
    cells = ["A", "0.250", "1.250", "8.000", "1.000", "1.500", "1 to 4", "4"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == cells


@pytest.mark.parametrize("reached", [0, 2])
def test_ctrl_c_reports_what_has_been_reached(reached, tmp_path, monkeypatch, capsys):
    def interrupt(step, steps):
        if step == reached:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(loop, "schedule", interrupt)
    assert balance.main(["--steps", "5", "--out", str(tmp_path)]) == 130
    assert (tmp_path / "balance.png").exists() == (reached > 0)
    assert ("cross entropy" in capsys.readouterr().out) == (reached > 0)


def test_arguments():
    options = balance.parse_arguments([])
    assert (str(options.out), options.steps) == ("runs/balance", 600)
    assert balance.parse_arguments(["--quick"]).steps < options.steps
