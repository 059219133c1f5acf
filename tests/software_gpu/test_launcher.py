"""Launches past Triton's JIT, on a CUDA runtime whose kernels do nothing: the same, but cheaper."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from perf.software_gpu import build, runtime

ROOT = Path(__file__).parents[2]
PREPARE = """
import json, torch, triton
from unittest import mock
from triton import knobs
from triton.runtime.jit import JITFunction
from perf.software_gpu import runtime
from alrp_triton import alrp_loss
from alrp_triton.kernels import launcher, language, positives
from alrp_triton.kernels.positives import _positive_grads_kernel as kernel

through_the_jit = []
RUN = JITFunction.run

def noted(self, *arguments, **named):
    through_the_jit.append(self.fn.__name__)
    return RUN(self, *arguments, **named)

def watched():
    # As if this were the JIT, which the launcher goes past as long as nobody stands in for it.
    noted.__module__ = RUN.__module__
    JITFunction.run = noted

def call(dtype=torch.float32, anchors=60):
    torch.manual_seed(0)
    logits = torch.randn(anchors, 4).cuda().to(dtype).requires_grad_()
    targets = (torch.arange(anchors) % 5 - 1).cuda()
    loc_errors = torch.rand(anchors // 5 * 4).cuda()
    cls, loc = alrp_loss(logits, targets, loc_errors, algorithm="breakpoints")
    (cls + loc).backward()
"""


def told(script: str) -> Any:
    """Run a script on the device, and return what its last line says, as JSON."""
    try:
        done = runtime.run("-c", PREPARE + textwrap.dedent(script), cwd=ROOT)
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_jit_sees_each_variant_once():
    """A second call of any size launches the same kernels, and none of them through the JIT."""
    first, second, again, other_dtype = told("""
        watched()
        counted = []
        for dtype, anchors in ((torch.float32, 60), (torch.float32, 60), (torch.float32, 35),
                               (torch.bfloat16, 60)):
            before = len(through_the_jit)
            with runtime.operations() as found:
                call(dtype, anchors)
            ours = sum(name.endswith("_kernel") and name.startswith("_") for name in found.kernels)
            counted.append([ours, len(through_the_jit) - before])
        print(json.dumps(counted))
    """)
    assert first[0] == second[0] == again[0] > 10
    assert first[1] > 10  # each kernel once, some of them twice in a call
    assert second[1] == again[1] == 0
    assert 0 < other_dtype[1] <= other_dtype[0]


def test_arguments_arrive_as_through_the_jit():
    """Compared are all values that the compiled kernel's own launcher is given, in their order."""
    direct, through = told("""
        call()
        given = []

        def noting(run):
            def noted(*arguments):
                given[-1].append([x.data_ptr() if torch.is_tensor(x) else x for x in arguments[9:]])
                return run(*arguments)
            return noted

        for found in kernel._compiled.items():
            key, (run, function, metadata) = found
            kernel._compiled[key] = noting(run), function, metadata
        for cache in kernel.device_caches.values():
            for compiled in cache[0].values():
                compiled._run = noting(compiled.run)
        index = torch.arange(5).cuda()
        grads = torch.rand(5, dtype=torch.float64).cuda()
        out = torch.zeros(6, 4, 1).cuda()
        for hooked in (False, True):
            given.append([])
            with mock.patch.object(launcher, "_are_hooked", lambda: hooked):
                positives.write_positive_grads([out], index, grads)
        print(json.dumps(given))
    """)
    assert len(direct) == 1
    assert direct == through


def test_who_hooks_launches_sees_every_one():
    """A profiler does; what comes after it is launched past the JIT again."""
    before, during, after = told("""
        call()
        seen = []
        counted = []

        def count():
            seen.clear()
            call()
            counted.append(len(seen))

        hook = lambda metadata: seen.append(metadata.get()["name"])
        count()
        knobs.runtime.launch_enter_hook.add(hook)
        count()
        knobs.runtime.launch_enter_hook.remove(hook)
        count()
        print(json.dumps(counted))
    """)
    assert before == after == 0
    assert during > 10


def test_integers_beyond_32_bits_are_another_variant():
    """An integer without an annotation is as wide as it needs; the first wide one is compiled."""
    counted = told("""
        from alrp_triton.kernels import pairwise
        from alrp_triton.reference.layout import Batch

        watched()
        counted = []
        values = torch.ones(1, dtype=torch.float64).cuda()
        for stride in (4, 4, 1 << 33, 1 << 33, 4):  # of an axis of one row: nothing lies there
            logits = torch.zeros(4, device="cuda").as_strided((1, 4, 1), (stride, 1, 1))
            targets = torch.zeros(1, 1, device="cuda").long()
            index, scores = torch.zeros(1, device="cuda").long(), torch.zeros(1, device="cuda")
            before = len(through_the_jit)
            pairwise.count(Batch([logits], [targets], index, scores, 1.0, -100), values)
            counted.append(len(through_the_jit) - before)
        print(json.dumps(counted))
    """)
    assert counted[0] >= 3
    assert counted[1:] == [0, 1, 0, 0]


def test_a_triton_that_names_its_parts_otherwise_is_launched_through_the_jit():
    first, second, third = told("""
        watched()
        counted = []
        with mock.patch.object(launcher, "_parts_of", lambda compiled: ()):
            for _ in range(3):
                before = len(through_the_jit)
                call()
                counted.append(len(through_the_jit) - before)
        print(json.dumps(counted))
    """)
    assert first == second == third > 10


def test_without_the_parts_nothing_is_kept():
    parts = told("""
        print(json.dumps([launcher._parts_of(object()), launcher._kind(1 << 31, False)]))
    """)
    assert parts == [[], 1]
