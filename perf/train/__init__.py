"""A detector of handwritten digits, trained: `python -m perf.train`."""
