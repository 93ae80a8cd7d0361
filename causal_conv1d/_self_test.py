"""What a GPU's self-test leaves to Python: torch's operations where it finds a kernel wrong.

At the first call of an operator on a GPU, with an element type and a layout, the library compares a
small call of that kernel by value with the CPU's, see ``csrc/cuda/self_test.cu``. A kernel that is
missing ("no kernel image"), was compiled wrongly or is not meant for the GPU then gives one warning
for the GPU, and plain torch operations take its place. ``CAUSAL_CONV1D_SELF_TEST=0`` switches the
test off.
"""

from __future__ import annotations

import ctypes
import os
import warnings

import torch

from . import _torch_ops
from ._ctypes_ops import DTYPES
from ._operators import CALLERS

UNTESTED, RIGHT, WRONG = range(3)  # causal_conv1d_verdict
OLDEST = 7, 5  # compute capability that the kernels can be compiled for
# Operations that run another one's kernels, whose test counts for them.
_TESTED_AS = {"conv_forward": "forward", "conv_backward": "backward", "pool": "update"}
TESTED = [operation for operation in CALLERS if operation not in _TESTED_AS]


def is_wanted() -> bool:
    """Whether the self-test is on; CAUSAL_CONV1D_SELF_TEST=0 switches it off."""
    return os.environ.get("CAUSAL_CONV1D_SELF_TEST", "1").lower() not in ("0", "false", "no", "off")


def kernel_number(cpu: ctypes.CDLL, operation: str, x: torch.Tensor) -> int | None:
    """The kernel that a call with x needs, as ``csrc/torch/register.h`` counts, or None."""
    index = TESTED.index(_TESTED_AS.get(operation, operation))
    dtype = DTYPES.get(x.dtype)
    if dtype is None or not x.dtype.is_floating_point:
        return None
    is_last = False
    if index < 2 and x.dim() == 3:
        axes = (*x.shape[1:], *x.stride()[1:])
        is_last = cpu.causal_conv1d_is_channel_last(*map(ctypes.c_int64, axes))
    return 8 * index + 4 * is_last + dtype


class SelfTest:
    """The self-test of a library's CUDA kernels.

    Args:
        cuda: the library.
        cpu: the library of the CPU kernels, which are compared with.

    fallback has the operations in plain torch by name, see ``_torch_ops.py``; they warn at the
    first call on a device.
    """

    def __init__(self, cuda: ctypes.CDLL, cpu: ctypes.CDLL):
        self.cpu, self.fallback = cpu, _torch_ops.operations(cpu, self.warn)
        self.verdict = cuda.causal_conv1d_cuda_verdict
        self.verdict.argtypes = [ctypes.c_int, ctypes.c_int]
        self.run = cuda.causal_conv1d_cuda_self_test
        self.run.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        cuda.causal_conv1d_cuda_self_test_size.restype = ctypes.c_int64
        self.size = cuda.causal_conv1d_cuda_self_test_size()
        self.text = cuda.causal_conv1d_cuda_problem
        self.text.argtypes, self.text.restype = [ctypes.c_int], ctypes.c_char_p
        self.architectures = cuda.causal_conv1d_cuda_architectures
        self.architectures.restype = ctypes.c_char_p
        functions = [getattr(cpu, f"causal_conv1d_cpu_{name}") for name in TESTED]
        addresses = [ctypes.cast(function, ctypes.c_void_p) for function in functions]
        cuda.causal_conv1d_cuda_set_expected((ctypes.c_void_p * len(addresses))(*addresses))
        self.warned = _torch_ops.Once()

    def problem(self, device: torch.device) -> str | None:
        """What is wrong with a device's kernels, of those tested."""
        return self.text(device.index).decode(errors="replace") or None

    def checked(self, operation: str, kernel):
        """The kernel or, where it is wrong, its replacement."""
        replacement = self.fallback[operation]
        leader = int(operation == "state_update")  # x is its second argument

        def run(*args):
            if self.find_verdict(operation, args[leader]) == WRONG:
                replacement(*args)
            else:
                kernel(*args)

        return run

    def find_verdict(self, operation: str, x: torch.Tensor) -> int:
        number, index = kernel_number(self.cpu, operation, x), x.device.index
        if number is None or x.device.type != "cuda":
            return UNTESTED  # whatever runs will refuse x
        verdict = self.verdict(number, index)
        if verdict == UNTESTED:
            try:
                memory = torch.empty(self.size, dtype=torch.uint8, device=x.device)
            except RuntimeError:  # out of memory, or another thread captures: a later call tests
                return UNTESTED
            stream = torch._C._cuda_getCurrentRawStream(index)
            verdict = self.run(number, index, stream, memory.data_ptr())
        return verdict

    def advice(self, device: torch.device) -> str:
        if is_too_old(device):
            return "The CUDA kernels need compute capability {}.{} or newer.".format(*OLDEST)
        codes = self.architectures().decode()
        said = f"The library has code for {codes}"
        if torch.version.hip is None:
            return f"{said}; a build on this machine adds this GPU."
        gpu = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        if gpu in codes.split():
            return f"{said}."
        return f"{said}; a build with PYTORCH_ROCM_ARCH={gpu} adds this GPU."

    def warn(self, device: torch.device) -> None:
        if not self.warned.is_first(device):
            return
        kind = "CUDA" if torch.version.hip is None else "HIP"
        warnings.warn(
            f"causal_conv1d: the {kind} kernels fail their self-test on {_describe(device)}, so "
            f"plain torch operations, which are slower, take their place there: "
            f"{self.problem(device)}. {self.advice(device)} CAUSAL_CONV1D_SELF_TEST=0 switches the "
            f"test off.",
            RuntimeWarning,
            stacklevel=2,
        )


def is_too_old(device: torch.device | int) -> bool:
    """Whether no build of this library can have CUDA kernels for that GPU."""
    # AMD's GPUs have numbers of another kind there.
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST


def describe(p) -> str:
    """A GPU by its properties: the name and which machine code it runs."""
    if torch.version.hip is not None:
        return f"{p.name}, {p.gcnArchName}"
    return f"{p.name}, compute capability {p.major}.{p.minor}"


def _describe(device: torch.device) -> str:
    return f"{device} ({describe(torch.cuda.get_device_properties(device))})"
