"""What the documents say is true: their examples run, their commands are the ones that CI runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alrp_triton.integrations import authors

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "perf/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
]
PAGES = [page for page in DOCUMENTS if "```python" in (ROOT / page).read_text()]


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def run_blocks(page: str, **given: object) -> dict:
    """Run all Python blocks in turn, as a reader would paste them."""
    namespace = dict(given)
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), namespace)
    return namespace


def test_examples_in_the_readme_run():
    namespace = run_blocks("README.md")
    assert namespace["logits"].grad.abs().sum() > 0
    assert namespace["pred_boxes"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in ("README.md", "docs/authors-code.md")]
)
def test_examples_in_the_pages_run(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    assert run_blocks(page)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_lines_for_heads_of_the_authors_run():
    """The lines of the table run, then the Python blocks in turn, on a class as theirs are."""

    class BucketedRankSort(torch.autograd.Function):
        """Stands for a registered class, of which a head has an instance."""

    page = "docs/authors-code.md"
    lines = re.findall(r"\| `(from .* import .*)` \|", (ROOT / page).read_text())
    assert {name for line in lines for name in line.split("import ")[1].split(", ")} == set(
        authors.__all__
    )
    for line in lines:
        exec(compile(line, page, "exec"), {})
    assert len(blocks_of(page)) == 2
    namespace = run_blocks(page, BucketedRankSort=BucketedRankSort)
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


def test_the_readme_is_short_and_works_anywhere():
    """The package index shows it too, where nothing stands beside it."""
    words = [word for word in README.split() if re.search(r"\w", word)]
    assert len(words) <= 1000
    targets = re.findall(r"\]\(([^)]*)\)", README)
    assert all(target.startswith(("https://", "#")) for target in targets), targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_name_exist(document):
    text = (ROOT / document).read_text()
    linked = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
    named = re.findall(r"`((?:alrp_triton|reference|tests|perf|docs|examples)/[\w./]+)`", text)
    modules = [
        f"{name.replace('.', '/')}/__main__.py"
        for name in re.findall(r"python -m (perf\.\w+)", text)
    ]
    for path in [*named, *modules]:
        assert (ROOT / path).exists(), path
    for path in linked:
        assert (ROOT / document).parent.joinpath(path).exists(), path


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("mkdocs") and importlib.util.find_spec("mkdocstrings")),
    reason="mkdocs and mkdocstrings are not installed: pip install -e .[docs]",
)
def test_the_site_builds_without_a_warning(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-f", ".mkdocs.yml", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "alrp_triton.error_driven_loss" in (tmp_path / "api" / "index.html").read_text()
