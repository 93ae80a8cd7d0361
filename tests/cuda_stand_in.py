"""The library for NVIDIA GPUs on the CPU: see gpu_stand_in.py.

As a plugin of pytest it takes the place of the convolution's CPU kernels in the tests:

    PYTHONPATH=tests pytest -p cuda_stand_in tests/test_forward.py

With CUDA_STAND_IN_ARCHITECTURE=750 they are those for compute capability 7.5, without cp.async.
"""

import ctypes
import os

import gpu_stand_in

ARCHITECTURE = os.environ.get("CUDA_STAND_IN_ARCHITECTURE", "870")
LIBRARY = gpu_stand_in.StandIn(
    "cuda",
    (
        *gpu_stand_in.CONVOLUTION,
        *("forward_wide", "update_decode", "backward_channel_first", "backward_channel_last"),
    ),
    (),
    (f"-D__CUDA_ARCH__={ARCHITECTURE}", '-DCAUSAL_CONV1D_ARCHITECTURES="stand-in"'),
    ARCHITECTURE,
)
build = LIBRARY.build


def install():
    gpu_stand_in.install(ctypes.CDLL(str(build())))


def pytest_configure(config):
    config.pluginmanager.register(gpu_stand_in.Plugin(LIBRARY))
