"""The package as its users have it: installed from a checkout, with and without `-e`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_checkout_works_where_it_stands():
    """Without any installation, in its own folder: what `pip install .` leaves it to be."""
    code = "import alrp_triton.reference.pairwise as m; print(m.__file__)"
    isolated = {"PYTHONNOUSERSITE": "1", "PATH": os.environ["PATH"]}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=isolated, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(ROOT / "alrp_triton" / "reference" / "pairwise.py")
