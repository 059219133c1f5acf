"""What the kernels compile to."""
