"""Tables in plain text, and the machine that a figure was measured on."""

from __future__ import annotations

import platform

import torch


def aligned(rows: list[list[str]]) -> str:
    """Make a Markdown table, its columns as wide as their cells; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def machine() -> dict:
    """Describe what ran it: versions, processor, threads, GPU."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def facts(settings: dict) -> str:
    """Format settings and machine in a line."""
    return ", ".join(f"{key} {value}" for key, value in {**settings, **machine()}.items())


def significant(ratio: float) -> str:
    """Format with three decimals, or two digits where that would be none or needless many."""
    return f"{ratio:.3f}" if 0.0995 <= ratio < 100 else f"{ratio:.2g}"
