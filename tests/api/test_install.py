"""The package as its users have it: installed from a checkout, with and without `-e`; packed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("autotune", "balance", "bench", "gpu", "train")  # of perf
IGNORED = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
CALL = """
import torch
import alrp_triton
from alrp_triton.reference import pairwise
logits = torch.tensor([1.0, 0.5, 0.0], requires_grad=True)
alrp_triton.ap_loss(logits, torch.tensor([0.0, 1.0, 0.0]), delta=0.0).backward()
print(logits.grad.tolist())
print(alrp_triton.__file__)
print(pairwise.__file__)
"""


def _missing() -> str | None:
    """Tell why nothing can be built and installed here, if so: what it takes is not fetched."""
    try:
        found = {name: int(version(name).split(".")[0]) for name in ("pip", "setuptools")}
    except PackageNotFoundError as error:
        return f"{error.name} is not installed"
    for name, least in (("pip", 23), ("setuptools", 77)):
        if found[name] < least:
            return f"needs {name} {least} or later"
    return None


needs_setuptools = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """Return what a command prints, errors too; nothing leads it to another copy of the package."""
    environment = {k: x for k, x in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(x) for x in command], cwd=cwd, env=environment | {"PIP_NO_INPUT": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


def copy_checkout(folder: Path) -> Path:
    """Copy the checkout as it is fetched: its link a link, without what was built in it."""
    ignored = shutil.ignore_patterns(".git", *IGNORED)
    return Path(shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=ignored))


def install(folder: Path, *what: str | Path) -> Path:
    """Install into a new environment that sees this one's packages; return its Python."""
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(run(python, "-c", code, cwd=folder).strip())
    # Last, so behind what is installed here; and no .pth file of theirs counts, as `-e` writes one.
    others = [path for path in sys.path if path.endswith("-packages")]
    (packages / "z_other_packages.pth").write_text("\n".join(others) + "\n")
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, *what, cwd=folder)
    return python


def test_a_checkout_works_where_it_stands():
    """It works without any installation, in its own folder."""
    gradient, package, reference = run(sys.executable, "-c", CALL, cwd=ROOT).splitlines()
    assert gradient == "[0.5, -0.5, 0.0]"
    assert package == str(ROOT / "alrp_triton" / "__init__.py")
    assert reference == str(ROOT / "alrp_triton" / "reference" / "pairwise.py")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a checkout after `pip install .`, and the Python that it was installed for."""
    folder = tmp_path_factory.mktemp("installed")
    checkout = copy_checkout(folder)
    return checkout, install(folder, checkout)


@needs_setuptools
def test_an_installed_package_works_anywhere(installed, tmp_path):
    python = installed[1]
    gradient, package, reference = run(python, "-c", CALL, cwd=tmp_path).splitlines()
    assert gradient == "[0.5, -0.5, 0.0]"
    assert Path(package).is_relative_to(python.parents[1])
    assert Path(reference) == Path(package).parent / "reference" / "pairwise.py"
    code = "import importlib.util; print(*map(importlib.util.find_spec, ('reference', 'tests')))"
    assert run(python, "-c", code, cwd=tmp_path).split() == ["None", "None"]


@needs_setuptools
def test_an_installed_package_works_in_its_checkout(installed):
    """There the checkout's own folders come first."""
    checkout, python = installed
    _, package, reference = run(python, "-c", CALL, cwd=checkout).splitlines()
    assert package == str(checkout / "alrp_triton" / "__init__.py")
    assert reference == str(checkout / "alrp_triton" / "reference" / "pairwise.py")


@needs_setuptools
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_start_in_a_checkout(installed, name):
    checkout, python = installed
    assert run(python, "-m", f"perf.{name}", "--help", cwd=checkout).startswith("usage: ")


def test_every_command_is_started():
    found = [path.parent.name for path in (ROOT / "perf").glob("*/__main__.py")]
    assert sorted(found) == sorted(COMMANDS)


@needs_setuptools
def test_an_editable_installation_is_its_checkout(tmp_path):
    checkout = copy_checkout(tmp_path)
    python = install(tmp_path, "-e", checkout)
    empty = tmp_path / "empty"
    empty.mkdir()
    _, package, reference = run(python, "-c", CALL, cwd=empty).splitlines()
    assert package == str(checkout / "alrp_triton" / "__init__.py")
    assert reference == str(checkout / "alrp_triton" / "reference" / "pairwise.py")


# What is packed.


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Return the wheel and the unpacked source distribution of a checkout, and what was printed."""
    folder = tmp_path_factory.mktemp("packed")
    checkout = copy_checkout(folder)
    printed = [
        run(sys.executable, "-c", BUILD.format(kind), folder, cwd=checkout)
        for kind in ("sdist", "wheel")
    ]
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(archive) as file:
        assert all(
            member.isfile() or member.isdir() for member in file
        )  # no link: Windows has none
        file.extractall(folder)
    return wheel, folder / archive.name.removesuffix(".tar.gz"), "".join(printed)


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def files_of_the_checkout() -> list[str]:
    """List what is under version control; without git, what is not ignored."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        found = run("git", "ls-files", cwd=ROOT).splitlines()
        return [name for name in found if not (ROOT / name).is_symlink()]
    pattern = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in IGNORED))
    names = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    return [str(name) for name in names if not any(map(pattern.fullmatch, name.parts))]


@needs_setuptools
def test_the_wheel_holds_the_package_and_nothing_else(packed):
    found = content(packed[0])
    assert all(re.match(r"alrp_triton/|alrp_triton-[\d.]+\.dist-info/", name) for name in found)
    own = {
        name
        for name in files_of_the_checkout()
        if name.startswith("alrp_triton/") and not name.startswith("alrp_triton/reference/")
    }
    own |= {f"alrp_triton/{x}" for x in files_of_the_checkout() if x.startswith("reference/")}
    assert {name for name in found if name.startswith("alrp_triton/")} == own
    for name in ("reference/pairwise.py", "reference/breakpoints/sort.py", "py.typed"):
        assert f"alrp_triton/{name}" in found
    (metadata,) = (x.decode() for name, x in found.items() if name.endswith("/METADATA"))
    assert "License-Expression: Apache-2.0\n" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in found)


@needs_setuptools
def test_nothing_that_builds_it_is_about_to_end(packed):
    assert "deprecat" not in packed[2].lower()


@needs_setuptools
def test_the_source_distribution_is_the_checkout(packed):
    _, unpacked, _ = packed
    assert [name for name in files_of_the_checkout() if not (unpacked / name).is_file()] == []
    for path in (ROOT / "reference").glob("*.py"):  # a link there, a folder here
        copy = unpacked / "alrp_triton" / "reference" / path.name
        assert copy.read_bytes() == (unpacked / "reference" / path.name).read_bytes()


@needs_setuptools
def test_the_source_distribution_builds_the_same_wheel(packed, tmp_path):
    wheel, unpacked, _ = packed
    run(sys.executable, "-c", BUILD.format("wheel"), tmp_path, cwd=unpacked)
    (again,) = tmp_path.glob("*.whl")
    assert content(again) == content(wheel)


@needs_setuptools
def test_the_source_distribution_runs_its_tests(packed):
    """All of them are found, and those pass that read data and look for what documents name."""
    _, unpacked, _ = packed
    pytest_here = (sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider")
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    listed = run(*pytest_here, "--collect-only", "tests", cwd=unpacked)
    assert names - set(re.findall(r"test_\w+\.py", listed)) == set()
    named = "tests/api/test_docs.py::test_files_that_documents_name_exist"
    run(*pytest_here, "tests/api/test_paper.py", named, cwd=unpacked)
