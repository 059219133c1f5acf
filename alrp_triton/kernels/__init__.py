"""The Triton kernels, for CUDA and ROCm tensors; under TRITON_INTERPRET=1 for CPU tensors.

Same file names, function names and arguments as `reference`, to which every result is held. Nothing
here imports anything of it.
"""
