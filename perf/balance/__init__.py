"""Fig. 4 of the paper, negatives against positives: `python -m perf.balance`."""
