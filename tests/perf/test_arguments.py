"""Wrong arguments of the commands: one line on stderr, exit status 2, and nothing has begun."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perf import arguments

COMMANDS = ("train", "balance", "bench", "autotune", "gpu")
# With which a command has all that it needs to begin here.
ENOUGH = {"gpu": ["--rehearse"], "bench": ["--device", "cpu"]}
NEEDED = {
    "train": ("torchvision", "sklearn", "faster_coco_eval", "matplotlib", "tqdm"),
    "balance": ("torchvision", "sklearn", "matplotlib", "tqdm"),
    "autotune": ("triton", "numpy"),
    "gpu": ("triton",),
}

NUMBERS = (
    "", " ", "x", "nan", "inf", "Infinity", "-1", "-0.5", "1e400", "9" * 5000, "0x1", "1 2", "None",
)  # fmt: skip
PATHS = ("", " ", "a\nb", "a\0b", "a\udc80b")
# Wrong values of each type that an option may have.
WRONG = {
    arguments.times: (*NUMBERS, "0", "1.5", "1e3", "1000001"),
    arguments.seed: (*NUMBERS, "1.5", str(2**32)),
    arguments.minutes: (*NUMBERS, "0", "-0.0", "1e-400", "10081", "1e300"),
    arguments.name: (*PATHS, ".", "..", "../x", "a/b", "/x", "a\\b"),
    arguments.folder: (*PATHS, "file", "file/"),
    arguments.existing_folder: (*PATHS, "file", "missing", "folder/missing"),
    arguments.existing_file: (*PATHS, "folder", "missing", "folder/missing"),
    arguments.device: ("", "abacus", "cpu:1", "cuda:99", "cuda:-1", "cuda:x", "meta", "mps", "CPU"),
}
RIGHT = {
    arguments.times: "7",
    arguments.seed: str(2**32 - 1),
    arguments.minutes: "0.5",
    arguments.name: "a name.1",
    arguments.folder: "folder/new",
    arguments.device: "cpu",
}


class Begun(Exception):
    """A command has accepted its arguments."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Enter a directory with a file and a folder. No command gets beyond its checks."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALRP_TRITON_TILES", "folder")  # the default of a command's --out
    prepare = arguments.Parser.prepare

    def stop(self, folder, names, option="--out"):
        prepare(self, folder, names, option)
        raise Begun(folder, list(names))

    monkeypatch.setattr(arguments.Parser, "prepare", stop)
    return tmp_path


def load(command):
    for package in NEEDED.get(command, ()):
        pytest.importorskip(package)
    return importlib.import_module(f"perf.{command}.__main__")


def listing(place):
    return {
        path.relative_to(place): path.is_file() and path.read_bytes() for path in place.rglob("*")
    }


def refused(command, given, capsys, place):
    """Return the line that refuses the arguments; the folder is as it was before."""
    before = listing(place)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"perf.{command}.__main__").main(given)
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, ""), given
    (line,) = printed.err.splitlines()
    assert line.startswith(f"python -m perf.{command}: error: "), given
    assert listing(place) == before
    return line


def options_of(command):
    parser = importlib.import_module(f"perf.{command}.__main__").make_parser()
    return [action for action in parser._actions if action.dest != "help"]


def wrong_values(action):
    """Return values that an option refuses; fail where it accepts anything."""
    if action.choices is not None:
        first = next(iter(action.choices))
        return ["", "x", first.upper() + "x", f"{first} ", f"{first}\n"]
    return WRONG[action.type]


OPTIONS = [
    pytest.param(command, action, id=f"{command} {action.option_strings[0]}")
    for command in COMMANDS
    for action in options_of(command)
]


@pytest.mark.parametrize(("command", "action"), OPTIONS)
def test_no_wrong_value_is_accepted(command, action, capsys, place):
    (option,) = action.option_strings
    if action.nargs == 0:  # a switch
        assert option in refused(command, [f"{option}=1"], capsys, place)
        return
    for value in wrong_values(action):
        line = refused(command, [*ENOUGH.get(command, []), f"{option}={value}"], capsys, place)
        assert f"argument {option}: " in line
        assert len(line) < 400 or action.choices is not None
    assert f"argument {option}: expected" in refused(command, [option], capsys, place)
    if action.nargs == "+":
        right = next(iter(action.choices)) if action.choices else RIGHT[action.type]
        for value in (*wrong_values(action), right):  # the second, or twice the same
            assert f"argument {option}: " in refused(command, [option, right, value], capsys, place)


@pytest.mark.parametrize(("command", "action"), OPTIONS)
def test_right_values_are_accepted(command, action, monkeypatch):
    """This shows that what is refused above is refused for its value."""
    module = load(command)
    (option,) = action.option_strings
    if action.nargs == 0:
        given = [option]
    elif action.choices is not None:
        given = [option, [*action.choices][-1]]
    elif action.type in RIGHT:
        given = [option, RIGHT[action.type]]
    else:
        pytest.skip("what is read has tests of its own")
    if command == "gpu":
        given += [] if option == "--rehearse" else ["--rehearse"]
    if option in ("--target", "--dry-run"):
        given += [] if option == "--dry-run" else ["--dry-run"]
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if option == "--device" and "cuda" in given and not torch.cuda.is_available():
        given = [option, "cpu"]
    with pytest.raises(Begun):
        module.main(given)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("given", [["--nothing"], ["stray"], ["a\nb"]])
def test_what_is_no_option_is_refused(command, given, capsys, place):
    assert "unrecognized arguments" in refused(command, given, capsys, place)


def test_options_that_contradict_each_other(capsys, place, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for given, option in (
        (["--target", "sm_90"], "--target"),
        (["--dry-run", "--minutes", "1"], "--minutes"),
        (["--dry-run"], "--dry-run"),
    ):
        assert f"argument {option}: " in refused("autotune", given, capsys, place)
    monkeypatch.delenv("ALRP_TRITON_TILES")
    assert "argument --out: " in refused("autotune", [], capsys, place)
    monkeypatch.setenv("ALRP_TRITON_TILES", "")
    assert "argument --out: " in refused("autotune", [], capsys, place)
    monkeypatch.setenv("ALRP_TRITON_TILES", "file")
    assert "argument --out: expected a folder, got 'file'" in refused("autotune", [], capsys, place)


def test_a_missing_gpu_is_said(capsys, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for command in ("train", "bench"):
        line = refused(command, ["--device", "cuda"], capsys, place)
        assert line.endswith("argument --device: expected cpu, since torch sees no GPU, got cuda")
    assert "--rehearse" in refused("gpu", [], capsys, place)
    assert "--dry-run" in refused("autotune", [], capsys, place)


# What is written.


def begin(command, *given):
    """Return the folder and the files that a command prepares."""
    with pytest.raises(Begun) as stopped:
        load(command).main([*ENOUGH.get(command, []), *given])
    return stopped.value.args


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_to(command, capsys, place):
    load(command)
    missing = ["file/x", "folder/" + "x" * 300, "new/newer/" + "x" * 300]
    if sys.platform == "linux":
        missing.append("/proc/x")
    for out in missing:
        line = refused(command, [*ENOUGH.get(command, []), "--out", out], capsys, place)
        assert "argument --out: expected a folder that can be written to: " in line


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_the_right_to_write(command, capsys, place):
    load(command)
    Path("folder").chmod(0o500)
    line = refused(command, [*ENOUGH.get(command, []), "--out", "folder"], capsys, place)
    assert "Permission denied" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_where_a_file_is_written(command, capsys, place):
    """A link that leads nowhere is refused too; files that can be replaced are left as they are."""
    out, names = begin(command, "--out", "folder/out")
    assert len(names) >= 2
    assert list(out.iterdir()) == []
    for name in names:
        given = [*ENOUGH.get(command, []), "--out", str(out)]
        (out / name).mkdir()
        assert f"{name}: not a file" in refused(command, given, capsys, place)
        (out / name).rmdir()
        (out / name).symlink_to("nowhere")
        assert f"{name}: not a file" in refused(command, given, capsys, place)
        (out / name).unlink()
    if command in ("train", "balance", "bench"):  # the others read a file there
        for name in names:
            (out / name).write_text("of an earlier run")
        before = listing(place)
        begin(command, "--out", str(out))
        assert listing(place) == before


def test_a_name_that_is_too_long(capsys, place):
    line = refused("bench", ["--name", "x" * 300], capsys, place)
    assert "expected a folder that can be written to" in line


# What is read.


def coco(boxes, categories=1):
    number = max(categories, len(boxes))
    annotations = [
        {"image_id": 1, "category_id": i % categories, "bbox": boxes[i % len(boxes)]}
        for i in range(number if boxes else 0)
    ]
    return json.dumps(
        {"images": [{"id": 1, "width": 50, "height": 40}], "annotations": annotations}
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "7", "[" * 100_000, "\udc80", coco([]), coco([[1, 2, 0, 4]]),
        coco([[1, 2, 3]]), coco([["a", 2, 3, 4]]), coco([[1, 2, -3, 4]]), coco([[1, 2, 3, 4]], 81),
        coco([[1, 2, 3, float("nan")]]), coco([[1, 2, 3, 4]]).replace("50", "0"),
        coco([[1, 2, 3, 4]]).replace("bbox", "box"),
        coco([[1, 2, 3, 4]]).replace('"image_id": 1', '"image_id": 2'),
        coco([[1, 2, 3, 4]]).replace('"category_id": 0', '"category_id": 0, "iscrowd": 1'),
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_annotations_that_are_not_cocos(text, capsys, place):
    Path("boxes.json").write_text(text, errors="surrogateescape")
    assert "argument --coco: " in refused("bench", ["--coco", "boxes.json"], capsys, place)


def test_annotations_of_coco():
    Path("boxes.json").write_text(coco([[1, 2, 30, 20]]))
    begin("bench", "--coco", "boxes.json")
    ((boxes, classes),) = load("bench").coco_images(Path("boxes.json"))
    assert boxes[0].tolist() == pytest.approx([10.24, 25.6, 317.44, 281.6])  # of 512 pixels
    assert classes.tolist() == [0]


@pytest.mark.parametrize(
    "text", [None, "", "aLRPLoss = None", "def", "import nothing_of_the_kind", "1 / 0"]
)
def test_a_checkout_that_is_not_the_authors(text, capsys, place):
    losses = Path("checkout/mmdet/models/losses")
    losses.mkdir(parents=True)
    if text is not None:
        (losses / "alrp_loss.py").write_text(text)
    assert "argument --peers: " in refused("bench", ["--peers", "checkout"], capsys, place)


@pytest.mark.parametrize("command", ["autotune", "gpu"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"costs": 7}', "\udc80"])
def test_a_file_of_the_tuner_that_is_broken(command, text, capsys, place, monkeypatch):
    """It would be read at the start, to be beaten."""
    load(command)
    tuned = importlib.import_module("alrp_triton.kernels.tuning.files")
    timing = importlib.import_module("perf.timing")
    monkeypatch.setattr(arguments.Parser, "prepare", lambda *_: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = Path("folder") / tuned.file_name(timing.machine(torch.device("cpu"))["device"])
    path.write_text(text, errors="surrogateescape")
    line = refused(command, [*ENOUGH.get(command, []), "--out", "folder"], capsys, place)
    assert "argument --out: " in line
    assert path.name in line


# In processes of their own.


def test_the_command_line_itself(place):
    command = [sys.executable, "-m", "perf.bench", "--rounds", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "python -m perf.bench: error: argument --rounds: "
        "expected a whole number from 1 to 1,000,000, got '0'\n"
    )


_WITHOUT = """
import os, runpy, sys
import torch
command, *packages = sys.argv[1:]
for package in packages:
    sys.stderr.flush()
    if os.fork() == 0:
        sys.modules[package] = None
        sys.argv = ["", *os.environ["GIVEN"].split()]
        runpy.run_module(f"perf.{command}", run_name="__main__", alter_sys=True)
    print(package, os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="torch would be imported for each")
@pytest.mark.parametrize("command", NEEDED)
def test_a_missing_package_is_named_in_a_line(command, place):
    load(command)
    packages = {*NEEDED[command], "numpy"} - ({"numpy"} if command == "gpu" else set())
    given = " ".join([*ENOUGH.get(command, []), "--out", "folder/new"])
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "GIVEN": given}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _WITHOUT, command, *packages],
        capture_output=True, text=True, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{package} 1" for package in packages], done.stderr
    lines = done.stderr.splitlines()
    for package, line in zip(packages, lines, strict=True):
        extra = "perf" if command == "autotune" else "train"
        what = "triton" if package == "triton" else f'-e ".[{extra}]"'
        assert package in line
        assert line.endswith(f"; this command needs: pip install {what}")
    assert not Path("folder/new").exists()


def test_every_command_is_tested():
    folder = Path(arguments.__file__).parent
    found = [path.parent.name for path in folder.glob("*/__main__.py")]
    assert sorted(found) == sorted(COMMANDS)
    for command in COMMANDS:
        parser = importlib.import_module(f"perf.{command}.__main__").make_parser()
        assert isinstance(parser, argparse.ArgumentParser)
        assert parser.prog == f"python -m perf.{command}"
