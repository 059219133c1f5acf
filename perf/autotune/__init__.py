"""Sizes of the kernels found on a GPU, or ranked by machine code: `python -m perf.autotune`."""
