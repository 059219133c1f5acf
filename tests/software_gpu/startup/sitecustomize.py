"""Imported by every Python that is started below `tests.software_gpu.device`."""

import os

if os.environ.get("SOFTWARE_GPU_DEVICE"):
    from tests.software_gpu import device

    GRAPHS, KERNELS = device.install()
