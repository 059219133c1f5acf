"""What tests, the tuner and the GPU command share; nothing of the package imports it.

Tolerances that are derived from what is rounded (`kernel_tolerance`, `loss_tolerance`,
`rank_sort_tolerance`, `box_tolerance`), hard `cases`, `workloads` of a training, `launches`
counted, and Triton's `interpreter` sped up.
"""
