"""The scripts of examples/ run as commands, in seconds, and print what they promise."""

from __future__ import annotations

import ast
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: many that wait for each other would dominate on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a script as a command and gives its names and its output."""

    def run(name: str, *arguments: str) -> tuple[dict, str]:
        path = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        return runpy.run_path(path, run_name="__main__"), capsys.readouterr().out

    return run


@pytest.mark.slow
def test_torchvision(run):
    pytest.importorskip("torchvision")
    names, printed = run("train_torchvision.py", "--steps", "2")
    steps = re.findall(r"^step \d  classification (\S+)  bbox_regression (\S+)$", printed, re.M)
    assert len(steps) == 2
    assert all(0 < float(part) < math.inf for step in steps for part in step)
    assert "'balance.weight'" in printed
    for image, target in names["RectangleImages"](5):
        x, y = target["boxes"][-1].view(2, 2).mean(0).long()  # the last is drawn over the others
        assert torch.equal(image[:, y, x], names["COLOURS"][target["labels"][-1]])
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"] <= names["SIZE"]).all()


def test_a_loss_of_ones_own(run):
    names, printed = run("custom_loss.py")
    assert "every pair give the same loss and gradient" in printed
    balance = r"raised by (\S+) in sum, negatives lowered by (\S+)\n"
    ((raised, lowered),) = re.findall(balance, printed)
    assert raised == lowered
    losses = [float(loss) for loss in re.findall(r"loss (\d\S+)$", printed, re.M)]
    assert losses[-1] < 0.5 * losses[0]
    _, targets = names["draw"]()
    classes = targets[targets >= 0]
    weights = names["weights_of"](targets)
    sums = torch.zeros(names["CLASSES"]).index_add_(0, classes, weights)
    torch.testing.assert_close(sums, torch.ones(names["CLASSES"]))


def test_imbalanced_classification(run):
    names, printed = run("imbalanced_classification.py", "--steps", "20", "--seeds", "1")
    found = dict(re.findall(r"^  (cross entropy|AP Loss) +AUPRC (\S+)  best", printed, re.M))
    assert found.keys() == {"cross entropy", "AP Loss"}
    # A random order has the share of the positives.
    assert all(3 * names["SHARE"] < float(x) <= 1 for x in found.values())
    scores = torch.tensor([0.3, -1.0, 2.0, 1.0])[:, None]
    labels = torch.tensor([1, 0, 1, 0])  # the first and the third place
    precision = names["average_precision"](nn.Flatten(0), (scores, labels))
    assert precision == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_each_script_says_how_it_is_run_and_is_found(path):
    name = f"examples/{path.name}"
    assert f"`python {name}`" in ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    assert f"`python {name}`" in (ROOT / "docs" / "index.md").read_text()
    assert f'"{path.name}"' in Path(__file__).read_text(), "no test runs it"
