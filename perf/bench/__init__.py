"""The loss beside its baselines: `python -m perf.bench`."""
