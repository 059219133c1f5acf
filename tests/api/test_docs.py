"""What the documents say is true: their examples run, their commands are the ones that CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from alrp_triton.integrations import authors

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_examples_in_the_readme_run():
    """All Python blocks in turn, as a reader would paste them."""
    pytest.importorskip("torchvision")
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].grad.abs().sum() > 0
    assert namespace["pred_boxes"].grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_lines_for_heads_of_the_authors_run():
    """Those of the table, and the Python blocks in turn, on a class as theirs are."""

    class BucketedRankSort(torch.autograd.Function):
        """Stands for a registered class, of which a head has an instance."""

    page = (ROOT / "alrp_triton" / "integrations" / "README.md").read_text()
    lines = re.findall(r"\| `(from .* import .*)` \|", page)
    assert {name for line in lines for name in line.split("import ")[1].split(", ")} == set(
        authors.__all__
    )
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace: dict = {"BucketedRankSort": BucketedRankSort}
    for block in [*lines, *blocks]:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["flat_preds"].grad.abs().sum() > 0
    assert namespace["loss_bbox"].grad.abs().sum() > 0
    logits, targets = torch.randn(9), torch.tensor([0.7, 0, 0, 0.4, 0, 0, 0, -1, 0])
    got = BucketedRankSort().apply(logits, targets, 0.5)
    assert got == authors.RankSort.apply(logits, targets, 0.5)


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^    (pip install -e .*)$", README, flags=re.MULTILINE)
    assert [command.split("&& ")[1] for command in commands] == [
        "python -m perf.train",
        "python -m pytest",
    ]
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "perf/README.md",
        "alrp_triton/integrations/README.md",
    ],
)
def test_files_that_documents_name_exist(document):
    text = (ROOT / document).read_text()
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    named = re.findall(r"`((?:alrp_triton|reference|tests|perf)/[\w./]+)`", text)
    modules = [
        f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (perf\.\w+)", text)
    ]
    for path in [*named, *modules]:
        assert (ROOT / path).exists(), path
    for path in linked:
        assert (ROOT / document).parent.joinpath(path).exists(), path
