"""A GPU in software: a CUDA runtime whose memory is the host's, and an emulator of PTX."""
