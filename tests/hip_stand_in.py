"""The library for AMD GPUs on the CPU: see gpu_stand_in.py.

As a plugin of pytest it takes the place of the convolution's CPU kernels in the tests:

    PYTHONPATH=tests pytest -p hip_stand_in tests/test_forward.py
"""

import ctypes

import gpu_stand_in
from gpu_stand_in import CONVOLUTION, OPERATIONS  # noqa: F401

LIBRARY = gpu_stand_in.StandIn(
    "hip",
    (*CONVOLUTION, "self_test"),
    (
        *("scan_check", "self_test", "torch/register_cuda"),
        *("torch/stable_abi", "torch/strides", "torch/ops"),
    ),
    (
        "-DCAUSAL_CONV1D_HIP",
        "-DCAUSAL_CONV1D_GENERAL",
        '-DCAUSAL_CONV1D_ARCHITECTURES="stand-in"',
    ),
)
build = LIBRARY.build


def install():
    gpu_stand_in.install(ctypes.CDLL(str(build())))


def pytest_configure(config):
    config.pluginmanager.register(gpu_stand_in.Plugin(LIBRARY))
