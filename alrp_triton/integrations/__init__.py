"""Seams into detection libraries; each module needs its library, `alrp_triton` itself none."""
