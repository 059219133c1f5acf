"""The Triton kernels, for CUDA and ROCm tensors; under TRITON_INTERPRET=1 for CPU tensors.

pairwise, breakpoints, sorting and skewed have the functions and arguments of `reference`, locate
those of `reference.layout`, boxes those of `alrp_triton.boxes`, to which every result is held. The
rest is what these are made of. Nothing here imports anything of `reference`.
"""
