"""Ranking losses in plain torch: the specification, and what runs wherever Triton does not.

`pairwise` evaluates the paper's equations pair by pair and is the truth that everything else is
held to. `breakpoints` gives the same numbers in O((N + P) log P). `layout` says which logits are
positives and which are negatives. Nothing here imports anything of the package.
"""
