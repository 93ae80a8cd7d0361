"""Makes this process's torch one for ROCm, whose GPU is the CPU: of ``other_device.py``.

To be imported before the library, which then loads that of ``hip_stand_in.py``. Gradients come from
operators alone, as autograd would ask for the GPU's streams.
"""

import ctypes
import os
import subprocess
import tempfile
import types
from pathlib import Path

import torch

GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
"""


def register_guard():
    """Of CUDA devices, which torch's indexing wants and a torch for CPUs has none of."""
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/guard.so"
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-shared", "-fPIC"]
        command += [f"-I{home}/include", "-x", "c++", "-", "-o", library]
        command += [f"-L{home}/lib", "-lc10"]
        subprocess.run(command, input=GUARD, text=True, check=True)
        ctypes.CDLL(library)


register_guard()
torch.version.cuda, torch.version.hip = None, "6.2"
address = torch.Tensor.data_ptr
torch.Tensor.data_ptr = lambda tensor: address(getattr(tensor, "data_on_cpu", tensor))
properties = types.SimpleNamespace(name="a GPU", gcnArchName="gfx1030:xnack-", major=7, minor=0)
torch.cuda.get_device_properties = lambda device: properties
torch.cuda.get_device_capability = lambda device: (properties.major, properties.minor)
torch.cuda._lazy_init = lambda: None
torch._C._cuda_getCurrentRawStream = lambda index: 0

os.environ["OTHER_DEVICE"] = "cuda"
import other_device  # noqa: E402 (it imports the library)

other_device.KERNEL = torch._C.DispatchKey.CUDA
