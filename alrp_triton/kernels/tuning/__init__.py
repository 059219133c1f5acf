"""What the kernels are tuned by: block sizes, costs, and the files that hold them for a GPU."""
