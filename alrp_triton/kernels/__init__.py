"""The Triton kernels, for CUDA and ROCm tensors; under TRITON_INTERPRET=1 for CPU tensors.

pairwise, breakpoints, rank_sort and skewed have the functions and arguments of `reference`,
positives those of `reference.layout`, boxes those of `alrp_triton.boxes`, to which every result is
held. `strided` reads a level in place, `segments` makes groups ones of sorted scores, `language` is
what Triton lacks, `tuning` says what block sizes there are. Of the reference only `layout.Batch` is
imported, which both sides take.
"""
