"""Run a Python on a CUDA device that is not there: memory is the host's, and kernels do nothing.

torch built for CUDA and Triton run on it as they are: dispatcher, caching allocator, autograd's
thread of the device, streams, captures, Inductor, Triton's JIT and its launcher. So what a call
asks of the device can be counted, and what it costs on the host can be timed, but for the driver's
own share. What kernels should have computed is zeros, or whatever was in memory before.

    python -m perf.software_gpu.runtime SCRIPT.py ARGUMENTS    # or: -m MODULE ARGUMENTS

In the process that was started so, `operations()` gives what was asked of the device.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from . import build

_HERE = Path(__file__).parent
_DRIVER = "libcuda.so.1"
_HEADERS = {"driver": "cuda.h", "runtime": "cuda_runtime_api.h"}
# The numbers of `Kind` in device.h.
_KINDS = ("kernels", "copies", "memsets", "synchronisations", "graphs", "events")


# --- how a process is started on it ---------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return the environment variables under which a Python finds the device.

    Raises:
        build.Unavailable: there is none here; the message says why.
    """
    driver, runtime = _libraries()
    kept = build.cache()
    return {
        "LD_PRELOAD": f"{driver}:{runtime}",
        "LD_LIBRARY_PATH": os.pathsep.join(
            [str(driver.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        ),
        "TRITON_LIBCUDA_PATH": str(driver.parent),
        "CUDA_MODULE_LOADING": "LAZY",
        "CUDA_VISIBLE_DEVICES": "0",
        "TRITON_INTERPRET": "0",
        # Inductor computes constants while it compiles: here they are garbage, so nobody else's.
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "TRITON_CACHE_DIR": str(kept / "triton"),
    }


def is_running() -> bool:
    """Whether this process has the device."""
    return _DRIVER in os.environ.get("LD_PRELOAD", "")


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python with the device in a folder; its output is captured."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
    )


@lru_cache
def _libraries() -> tuple[Path, Path]:
    """Return the paths of the driver and of the runtime, compiled if they have to be."""
    version = _cuda_of_torch()
    folders = [f"-I{folder}" for folder in _header_folders()]
    flags = [*folders, "-ldl"]
    driver, runtime, shared = (_HERE / name for name in ("driver.cpp", "runtime.cpp", "device.h"))
    flags.append(f"-DSHARED_HEADER={build.digest(shared)}")  # what is compiled depends on it
    return (
        build.shared_object(_DRIVER, [driver], flags, lambda: _unwritten("driver", folders)),
        build.shared_object(
            f"libcudart.so.{version.split('.')[0]}",
            [runtime],
            [*flags, "-Wl,--default-symver"],  # torch asks for symbols of the version of the soname
            lambda: _unwritten("runtime", folders),
        ),
    )


def _cuda_of_torch() -> str:
    """Return the version of CUDA that torch was built for."""
    try:
        from torch.version import cuda
    except ImportError:
        raise build.Unavailable("torch is not installed") from None
    if cuda is None:
        raise build.Unavailable("this torch is not built for CUDA")
    return cuda


def _header_folders() -> list[Path]:
    """Return the folders of CUDA's headers in the wheels that come with torch and Triton."""
    of_triton = [folder / "backends" / "nvidia" / "include" for folder in _places("triton")]
    of_nvidia = [found for folder in _places("nvidia") for found in folder.glob("*/include")]
    folders = [*sorted(of_nvidia), *of_triton]
    first = {
        header: next((folder for folder in folders if (folder / header).exists()), None)
        for header in _HEADERS.values()
    }
    if missing := [header for header, folder in first.items() if folder is None]:
        raise build.Unavailable(f"no wheel here has CUDA's {' and '.join(missing)}")
    return list(dict.fromkeys([*filter(None, first.values()), *of_triton]))


def _places(package: str) -> list[Path]:
    """Return the folders of a package, none if it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # what was taken out of sys.modules
        return []
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]


def _unwritten(part: str, folders: list[str]) -> str:
    """Return a source in which every function of a header ends the process with its name.

    They are weak: what is written in the C++ file beside it takes their place.
    """
    header = _HEADERS[part]
    command = ["g++", "-E", "-P", "-x", "c", *folders, "-include", header, os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise build.Unavailable(f"g++ could not read CUDA's {header}:\n{done.stderr[-2000:]}")
    prefix = "cu" if part == "driver" else "cuda"
    names = sorted(set(re.findall(rf"\b({prefix}[A-Z]\w*) *\(", done.stdout)))
    lines = ['extern "C" __attribute__((noreturn)) void software_gpu_unwritten(const char *);']
    lines += [
        f'extern "C" __attribute__((weak)) void {name}() {{ software_gpu_unwritten("{name}"); }}'
        for name in names
    ]
    return "\n".join(lines) + "\n"


# --- what a process that has it can ask for -------------------------------------------------------


@dataclass
class Operations:
    """What was asked of the device, in order: the names of each kind."""

    kernels: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)  # "host to device" and the like
    memsets: list[str] = field(default_factory=list)
    synchronisations: list[str] = field(default_factory=list)  # the host waits; which function
    graphs: list[str] = field(default_factory=list)  # launches of whole graphs
    events: list[str] = field(default_factory=list)
    allocations: int = 0  # of torch's caching allocator

    def numbers(self) -> dict[str, int]:
        """Return how many there are of each kind; "operations" are those that a stream does."""
        on_stream = (self.kernels, self.copies, self.memsets, self.graphs)
        return {
            "operations": sum(map(len, on_stream)),
            "kernels": len(self.kernels),
            "copies": len(self.copies),
            "memsets": len(self.memsets),
            "synchronisations": len(self.synchronisations),
            "allocations": self.allocations,
        }

    def by_name(self) -> Counter[str]:
        """Return how often each kernel was launched."""
        return Counter(self.kernels)


@lru_cache
def driver() -> ctypes.CDLL:
    """Return the device's library, in a process that has it."""
    if not is_running():
        raise build.Unavailable("this process was not started on the software GPU")
    library = ctypes.CDLL(_DRIVER)
    library.software_gpu_entry.restype = ctypes.c_char_p
    library.software_gpu_entry.argtypes = [ctypes.c_long, ctypes.POINTER(ctypes.c_int)]
    library.software_gpu_logged.restype = ctypes.c_long
    return library


@contextmanager
def operations() -> Iterator[Operations]:
    """Log what is asked of the device; complete when the context is left."""
    import torch

    library, found = driver(), Operations()
    before = _allocations(torch.cuda.memory_stats())
    library.software_gpu_log(1)
    try:
        yield found
    finally:
        library.software_gpu_log(0)
    kind = ctypes.c_int()
    for number in range(library.software_gpu_logged()):
        name = library.software_gpu_entry(number, ctypes.byref(kind)).decode()
        getattr(found, _KINDS[kind.value]).append(name)
    found.allocations = _allocations(torch.cuda.memory_stats()) - before


def _allocations(statistics: dict[str, int]) -> int:
    return statistics.get("allocation.all.allocated", 0)


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {**os.environ, **environment()})
