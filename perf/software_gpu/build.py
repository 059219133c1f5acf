"""Compile C and C++ sources into a shared library on first use, outside of the repository."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

FOLDER = "ALRP_TRITON_SOFTWARE_GPU"  # environment variable: where everything built is kept


class Unavailable(RuntimeError):
    """The software GPU cannot be had here; the message says why."""


def cache() -> Path:
    """Return the folder of what was built and compiled."""
    default = Path.home() / ".cache" / "alrp_triton" / "software_gpu"
    return Path(os.environ.get(FOLDER, default)).absolute()


@lru_cache
def compiler() -> tuple[str, str]:
    """Return the C++ compiler and the first line of its version."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise Unavailable("the software GPU is written for Linux on x86-64")
    path = shutil.which("g++")
    if path is None:
        raise Unavailable("no C++ compiler: the software GPU is built by g++")
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    return path, told.stdout.splitlines()[0]


def digest(*files: Path) -> str:
    """Return a short name of what stands in the files."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def shared_object(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    generate: Callable[[], str] | None = None,
) -> Path:
    """Return the path of a shared library, compiled now if it was not before.

    Its folder is named after everything that it is made of, and appears whole or not at all, so
    that processes may ask for it at the same time.

    Args:
        name: of the file, which is also its soname.
        sources: C and C++ files.
        flags: of the compiler, beyond those of any shared library; they come after the sources.
        generate: makes one more C++ source from what `flags` tell of.
    """
    path, version = compiler()
    parts = [name, version, *flags, *(source.read_text() for source in sources)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = cache() / f"{name}-{key}"
    if not folder.exists():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            files = [str(source) for source in sources]
            if generate is not None:
                generated = Path(scratch, "generated.cpp")
                generated.write_text(generate())
                files.append(str(generated))
            made = Path(scratch, "made")
            made.mkdir()
            command = [path, "-O2", "-std=c++17", "-fPIC", "-shared", f"-Wl,-soname,{name}"]
            done = subprocess.run(
                [*command, *files, *flags, "-o", str(made / name)], capture_output=True, text=True
            )
            if done.returncode:
                raise Unavailable(f"g++ could not compile {name}:\n{done.stderr[-4000:]}")
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():  # nor has another process built it meanwhile
                    raise
    return folder / name
