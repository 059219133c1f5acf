"""`python -m alrp_triton`: it says what runs here, agrees with itself, and can fail."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
import torch

import alrp_triton

check = importlib.import_module("alrp_triton.__main__")
CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_command_tells_versions_and_choices():
    done = subprocess.run(
        [sys.executable, "-m", "alrp_triton"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        f"alrp_triton {alrp_triton.__version__}",
        f"torch {torch.__version__}",
        "auto: ",
    ):
        assert expected in done.stdout
    assert len(re.findall("agrees with the specification", done.stdout)) >= 2 * len(check.LOSSES)
    assert done.stdout.rstrip().endswith("all right")


def test_a_wrong_loss_is_found(monkeypatch, capsys):
    def off(logits, targets, numbers, **options):
        value = check._ap(logits, targets, numbers, **options)
        return value * (1 + 1e-3 * (logits.dtype == torch.float32))

    monkeypatch.setattr(check, "LOSSES", {"AP": off})
    assert check.main([]) == 1
    assert "WRONG: value off by 1.0e-03" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["nan", "raises"])
def test_nan_and_errors_are_found(broken):
    def call(logits, targets, numbers, **options):
        value = check._ap(logits, targets, numbers, **options)
        if logits.dtype == torch.float64:
            return value
        if broken == "raises":
            raise ValueError("no such thing")
        return value * torch.nan

    assert re.match(
        "WRONG|FAILS: ValueError: no such thing", check.check(call, CPU, "torch", "auto")
    )


def test_a_setting_of_the_program_is_told():
    try:
        alrp_triton.set_backend(impl="torch")
        assert "as set_backend says" in " ".join(check.choices(CPU))
    finally:
        alrp_triton.set_backend()
    assert "the kernels want a CUDA or ROCm device" in " ".join(check.choices(CPU))


def test_arguments_are_refused():
    with pytest.raises(SystemExit) as error:
        check.main(["--quick"])
    assert error.value.code == 2
