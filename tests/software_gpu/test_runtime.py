"""The CUDA runtime whose kernels do nothing: what it counts, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from perf.software_gpu import build, runtime

ROOT = Path(__file__).parents[2]
PREPARE = """
import ctypes, json, torch
from perf.software_gpu import runtime
"""


def start(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script on the device, from the root of the checkout."""
    try:
        return runtime.run("-c", PREPARE + textwrap.dedent(script), cwd=ROOT)
    except build.Unavailable as reason:
        pytest.skip(str(reason))


def told(script: str) -> Any:
    """Run a script on the device, and return what its last line says, as JSON."""
    done = start(script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_operation_is_counted():
    """Of each kind another number, known beforehand."""
    numbers, copies, waits, x, z = told("""
        host = torch.arange(10.).pin_memory()
        x, y = torch.empty(2, 10, device="cuda")
        z = torch.empty(10, device="cuda", dtype=torch.uint8)
        with runtime.operations() as found:
            x.copy_(host, non_blocking=True)
            y.copy_(x)
            for out in (x, y, x, y):
                torch.mul(x, y, out=out)
            x.clone(), y.mul(2)
            size, memset = ctypes.c_size_t(9), ctypes.CDLL(None).cudaMemsetAsync
            memset(ctypes.c_void_p(z.data_ptr()), 7, size, None)
            torch.cuda.synchronize()
            y[0].item()
        numbers = found.numbers()
        print(json.dumps([numbers, found.copies, found.synchronisations, x.tolist(), z.tolist()]))
    """)
    assert numbers == {
        "operations": 10, "kernels": 5, "copies": 4, "memsets": 1, "synchronisations": 2,
        "allocations": 2,
    }  # fmt: skip
    assert copies == ["host to device", *["device to device"] * 2, "device to host"]
    assert waits == ["cudaDeviceSynchronize", "cudaStreamSynchronize"]
    assert x == list(range(10))
    assert z[:9] == [7] * 9


def test_kernels_of_triton_go_through_its_jit_and_are_named():
    names = told("""
        from perf.gpu import memory_rates
        counters = torch.zeros(32, dtype=torch.int64, device="cuda")
        with runtime.operations() as found:
            for _ in range(3):
                memory_rates.add(counters, 4, 2, True)
        print(json.dumps([found.kernels, counters.sum().item()]))
    """)
    assert names == [["_add_kernel"] * 3, 0]


def test_nothing_is_counted_outside():
    numbers = told("""
        x = torch.zeros(10, device="cuda")
        with runtime.operations() as found:
            pass
        x += 1
        with runtime.operations() as later:
            pass
        print(json.dumps([found.numbers(), later.numbers()]))
    """)
    assert all(number == 0 for found in numbers for number in found.values())


def test_a_wait_is_refused_where_torch_forbids_it():
    done = start("""
        x = torch.zeros(10, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        x[0].item()
    """)
    assert "called a synchronizing CUDA operation" in done.stderr


def test_a_graph_is_captured_and_replayed_as_one():
    captured, replayed = told("""
        x = torch.zeros(10, device="cuda")
        graph = torch.cuda.CUDAGraph()
        # torch 2.11 fills the seeds of random numbers where a capture begins.
        with torch.cuda.graph(graph), runtime.operations() as captured:
            x.add_(1)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                assert torch.cuda.is_current_stream_capturing()
                x.mul_(2)
            torch.cuda.current_stream().wait_stream(side)
        with runtime.operations() as replayed:
            graph.replay()
        print(json.dumps([len(captured.kernels), [replayed.kernels, replayed.graphs]]))
    """)
    assert captured == 2
    assert replayed == [[], [""]]


def test_a_wait_during_a_capture_fails():
    done = start("""
        x, graph = torch.zeros(10, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x[0].item()
    """)
    assert done.returncode != 0
    assert "when stream is capturing" in done.stderr


@pytest.mark.parametrize(
    ("library", "call"),
    [
        ("libcuda.so.1", "cuMemHostRegister_v2(None, 0, 0)"),
        ("libcuda.so.1", "cuTensorMapEncodeTiled()"),
        ("libcuda.so.1", "software_gpu_attribute(9999)"),
        (None, "cudaMallocManaged(None, 0, 0)"),
        (None, "cudaGraphAddNode()"),
    ],
)
def test_what_nobody_wrote_ends_the_process_with_its_name(library, call):
    done = start(f"ctypes.CDLL({library!r}).{call}; print('went on')")
    assert done.returncode == -6
    assert "went on" not in done.stdout
    name = "device attribute 9999" if "attribute" in call else call.split("(")[0]
    assert f"{name} is not written" in done.stderr


def test_memory_ends_where_the_device_says():
    done = start("torch.empty(81 << 30, dtype=torch.uint8, device='cuda')")
    assert "CUDA out of memory" in done.stderr


def test_a_machine_without_a_compiler_is_told_why(monkeypatch):
    build.compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.Unavailable, match="no C\\+\\+ compiler"):
        build.compiler()
    build.compiler.cache_clear()


def test_a_torch_without_cuda_is_told_why(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(build.Unavailable, match="not built for CUDA"):
        runtime._cuda_of_torch()


def test_what_does_not_compile_is_told_why(monkeypatch, tmp_path):
    _compiles()
    monkeypatch.setenv(build.FOLDER, str(tmp_path))
    source = tmp_path / "wrong.cpp"
    source.write_text("int f( {")
    with pytest.raises(build.Unavailable, match=r"could not compile libwrong\.so"):
        build.shared_object("libwrong.so", [source])
    assert not any(tmp_path.glob("libwrong.so-*"))


def test_processes_build_at_the_same_time(tmp_path):
    _compiles()
    source = tmp_path / "four.cpp"
    source.write_text('extern "C" int four() { return 4; }')
    script = f"""
        import ctypes, pathlib
        from perf.software_gpu import build
        path = build.shared_object("libfour.so", [pathlib.Path({str(source)!r})])
        print(path, ctypes.CDLL(str(path)).four())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {"PATH": "/usr/bin:/bin", build.FOLDER: str(tmp_path / "cache")}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        for _ in range(4)
    ]
    printed = {process.communicate()[0] for process in processes}
    (line,) = printed
    assert line.split()[1] == "4"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(line).parts[-2]]


def _compiles() -> None:
    try:
        build.compiler()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
