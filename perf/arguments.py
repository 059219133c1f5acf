"""What the commands are called with: what makes no sense ends in one line, before any work begins.

Each option that takes a value has one of the types below, or choices. What only a file or the disk
can tell is asked last, when everything else holds (`Parser.read`, `Parser.prepare`).
"""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

T = TypeVar("T")

_MOST_TIMES = 1_000_000
_MOST_MINUTES = 7 * 24 * 60
_MOST_SHOWN = 80  # characters of a value in an error


class Parser(argparse.ArgumentParser):
    """That of a command, whose errors are one line on stderr, with exit status 2."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m perf.{command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def read(self, option: str, reader: Callable[..., T], *given: Any) -> T:
        """Return what `reader` makes of what was given.

        Whatever it raises ends the command as an error of the option.
        """
        try:
            return reader(*given)
        except Exception as error:
            self.error(f"argument {option}: {_first_line(error)}")

    def prepare(self, folder: Path, names: Iterable[str], option: str = "--out") -> None:
        """Make a folder and try every file that will be written in it; leave the files alone.

        Where that fails, no folder is left behind either.
        """
        new = [str(place) for place in (folder, *folder.parents) if not os.path.exists(place)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                _try_to_write(folder / name)
        except OSError as error:
            for place in new:
                with suppress(OSError):
                    os.rmdir(place)
            why = f"{error.filename}: {error.strerror}"
            self.error(f"argument {option}: expected a folder that can be written to: {why}")


class Each(argparse.Action):
    """Stores a list in which nothing stands twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        given = list(values or ())
        if len(set(given)) < len(given):
            shown = " ".join(map(str, given))
            raise argparse.ArgumentError(self, f"expected each of them once, got {_short(shown)}")
        setattr(namespace, self.dest, given)


# --- types --------------------------------------------------------------------------------------


def times(text: str) -> int:
    """Read how often something is done."""
    return _number(text, int, 1, _MOST_TIMES, f"a whole number from 1 to {_MOST_TIMES:,}")


def seed(text: str) -> int:
    """Read a seed that torch and NumPy both take."""
    return _number(text, int, 0, 2**32 - 1, "a whole number from 0 to 2^32 - 1")


def minutes(text: str) -> float:
    """Read a number of minutes: more than none, and at most a week."""
    least = sys.float_info.min
    return _number(text, float, least, _MOST_MINUTES, f"a number above 0, up to {_MOST_MINUTES:,}")


def name(text: str) -> str:
    """Read the name of a file, without its suffix and without a folder."""
    if text in ("", ".", "..") or text.isspace() or not text.isprintable() or set(text) & {*"/\\"}:
        _refuse("the name of a file, without a folder", text)
    return text


def folder(text: str) -> Path:
    """Read the path of a folder, which need not be there yet."""
    path = _path(text, "a folder")
    if os.path.lexists(path) and not path.is_dir():
        _refuse("a folder", text)
    return path


def existing_folder(text: str) -> Path:
    """Read the path of a folder that is there."""
    path = _path(text, "a folder")
    if not os.path.isdir(path):
        _refuse("a folder that exists", text)
    return path


def existing_file(text: str) -> Path:
    """Read the path of a file that is there and can be read."""
    path = _path(text, "a file")
    if not os.path.isfile(path):
        _refuse("a file that exists", text)
    if not os.access(path, os.R_OK):
        _refuse("a file that can be read", text)
    return path


def device(text: str) -> torch.device:
    """Read a device: the CPU, or a GPU that is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", "cuda", *(f"cuda:{index}" for index in range(gpus))]
    if found is None or str(found) not in known:
        _refuse("cpu, cuda, cuda:1, ...", text)
    if found.type == "cuda" and not gpus:
        raise argparse.ArgumentTypeError(f"expected cpu, since torch sees no GPU, got {text}")
    return found


def _number(text: str, kind: Callable[[str], T], least: T, most: T, expected: str) -> T:
    try:
        value = kind(text)
    except ValueError:
        _refuse(expected, text)
    if not least <= value <= most:  # type: ignore[operator]  # NaN is neither
        _refuse(expected, text)
    return value


def _path(text: str, expected: str) -> Path:
    """Read a path that can be shown; refuse it empty or blank, as an unset variable leaves it."""
    if not text.strip() or any(unicodedata.category(x) in ("Cc", "Cs") for x in text):
        _refuse(expected, text)
    return Path(text)


def _refuse(expected: str, text: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"expected {expected}, got {_short(repr(text))}")


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


# --- what is written and imported ---------------------------------------------------------------


def _try_to_write(path: Path) -> None:
    if not os.path.lexists(path):
        with path.open("xb"):
            pass
        path.unlink()
    elif not path.is_file():
        raise FileExistsError(0, "not a file", str(path))
    else:
        with path.open("ab"):
            pass


@contextmanager
def importing(extra: str) -> Iterator[None]:
    """Exit with a hint, in a line, where an import of the block fails."""
    try:
        yield
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        of_triton = (getattr(error, "name", None) or "").split(".")[0] == "triton"
        what = "triton" if of_triton else f'-e ".[{extra}]"'
        sys.exit(f"{_first_line(error)}; this command needs: pip install {what}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    return f"{kind}: {lines[0]}" if lines else kind
