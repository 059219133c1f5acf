"""All that only a GPU can tell, in one command: `python -m perf.gpu`."""
