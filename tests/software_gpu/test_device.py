"""torch.device("cuda") in software: the CPU's results, as compiled, also from a graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

pytest.importorskip("triton")

from perf.software_gpu import build
from tests.software_gpu import device

PREPARE = """
import json, torch
from torch import tensor
def told(**found):
    print(json.dumps(found))
"""


def start(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the device."""
    try:
        environment = device.environment()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    command = [sys.executable, "-c", PREPARE + textwrap.dedent(script)]
    everything = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=device.ROOT, env=everything, capture_output=True, text=True, check=False
    )


def told(script: str) -> dict[str, Any]:
    """Run a script with the device, and return what it told."""
    done = start(script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_operators_of_torch_compute():
    found = told("""
        x = torch.arange(12.).cuda().view(3, 4)
        y = x.t()[1:].contiguous()
        x[1] *= 10
        out = torch.empty(0, device="cuda")
        torch.add(x, 1, out=out)
        order = torch.tensor([3., 1., 2.], device="cuda").sort()
        told(
            x=x.tolist(), y=y.tolist(), out=out.tolist(), device=str(out.device),
            order=order.indices.tolist(), where=(x > 40).nonzero().tolist(), sum=x.sum().item(),
        )
    """)
    assert found["x"] == [[0, 1, 2, 3], [40, 50, 60, 70], [8, 9, 10, 11]]
    assert found["y"] == [[1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert found["out"] == [[1, 2, 3, 4], [41, 51, 61, 71], [9, 10, 11, 12]]
    assert found["device"] == "cuda:0"
    assert found["order"] == [1, 2, 0]
    assert found["where"] == [[1, 1], [1, 2], [1, 3]]
    assert found["sum"] == 264


def test_the_loss_and_its_gradients_are_those_of_the_cpu():
    found = told("""
        from alrp_triton import alrp_loss
        from alrp_triton.testing.workloads import Cell, draw
        def of(device, impl, algorithm):
            inputs = draw(Cell(8000, 20, "mid"), torch.device(device))
            logits = inputs.logits.requires_grad_()
            errors = inputs.loc_errors.requires_grad_()
            settings = {"impl": impl, "algorithm": algorithm}
            cls, loc = alrp_loss(logits, inputs.targets, errors, **settings)
            (cls + loc).backward()
            return [x.cpu() for x in (cls.detach(), loc.detach(), logits.grad, errors.grad)]
        truth = of("cpu", "torch", "pairwise")
        worst = {}
        for algorithm in ("pairwise", "breakpoints"):
            got = of("cuda", "triton", algorithm)
            worst[algorithm] = [
                float((x - y).abs().max() / y.abs().max()) for x, y in zip(got, truth)
            ]
        told(worst=worst)
    """)
    for algorithm in ("pairwise", "breakpoints"):
        assert max(found["worst"][algorithm]) < 2e-6  # float32 beside float32


def test_a_graph_does_again_what_was_captured():
    """Kernels of Triton and operators of torch, with what the inputs hold by then."""
    found = told("""
        from perf.gpu import memory_rates
        x, total = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
        counters = torch.zeros(32, dtype=torch.int64, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total += x.exp()
            memory_rates.add(counters, 1, 1, False)
        captured = total.clone(), counters.clone()
        x.fill_(1.0)
        graph.replay()
        graph.replay()
        told(total=(total - captured[0]).tolist(), counters=(counters - captured[1]).tolist())
    """)
    assert found["total"] == pytest.approx([2 * 2.718281828] * 4)
    assert found["counters"] == [2 * 16] * 32


def test_torch_compile_computes():
    found = told("""
        @torch.compile
        def f(x):
            return (x.sigmoid() * torch.arange(5., device=x.device)).sum(1)
        x = torch.linspace(-1, 1, 15).view(3, 5)
        told(error=float((f(x.cuda()).cpu() - (x.sigmoid() * torch.arange(5.)).sum(1)).abs().max()))
    """)
    assert found["error"] < 1e-6


def test_a_launch_that_cannot_be_emulated_fails():
    done = start("""
        from perf.gpu import memory_rates
        from tests.software_gpu import emulator
        def refuse(*_, **__):
            raise emulator.EmulationError("global write out of bounds")
        emulator.Kernel.launch = refuse
        memory_rates.add(torch.zeros(32, dtype=torch.int64, device="cuda"), 1, 1, False)
    """)
    assert done.returncode != 0
    assert "_add_kernel: global write out of bounds" in done.stderr


def test_a_replay_that_cannot_be_done_fails():
    done = start("""
        x, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x += 1
        import sitecustomize
        def refuse():
            raise ValueError("planted")
        sitecustomize.GRAPHS.steps[1].append(refuse)
        graph.replay()
    """)
    assert done.returncode != 0
    assert "software GPU: graph: planted" in done.stderr


def test_what_waits_is_refused_where_torch_forbids_it():
    found = told("""
        x, said = torch.zeros(4, device="cuda"), {}
        calls = {
            "copy": x.cpu, "item": x[0].item, "nonzero": x.nonzero, "tolist": x.tolist,
            "equal": lambda: torch.equal(x, x), "none": lambda: x.add_(1),
        }
        torch.cuda.set_sync_debug_mode("error")
        for name, call in calls.items():
            try:
                call()
                said[name] = ""
            except RuntimeError as error:
                said[name] = str(error)
        told(**said)
    """)
    assert found.pop("none") == ""
    assert all("called a synchronizing CUDA operation" in text for text in found.values()), found
