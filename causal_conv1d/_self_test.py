"""A GPU's kernels are compared by value with the CPU's at the first call of each on that GPU.

A kernel that is missing ("no kernel image"), was compiled wrongly or is not meant for the GPU then
gives one warning, and plain torch operations take its place on that GPU. Each operator is tested
with each dtype and layout of x when it is first called so, at width 4 and with aligned rows, as
most calls have: the kernel that is loaded for the test is then the one that the call needs. One
copy takes a few numbers there and one brings them back; no kernel of torch is started. Calls after
it pay nothing: the C++ operators look at one bit. ``CAUSAL_CONV1D_SELF_TEST=0`` switches it off.
"""

from __future__ import annotations

import math
import os
import threading
import warnings

import torch

LAYOUTS = ("channel-first", "channel-last")
# Errors relative to the largest value expected: far above what rounding gives, far below what a
# wrong kernel does. In the order of the C interface's dtypes.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
    torch.float64: 1e-9,
}

_X, _WEIGHT, _BIAS = (2, 16, 24), (16, 4), (16,)
_STATES, _CONV_STATE, _TOKEN = (2, 16, 3), (2, 16, 4), (2, 16)
_BOUNDS = [0, 2, 24]
# The operators' arguments: shapes of tensors of the dtype tested, a list of int32, others.
_CALLS = {
    "forward": (_X, _WEIGHT, _BIAS, None, _STATES, _X, None, True),
    "backward": (_X, _WEIGHT, _BIAS, _X, None, _STATES, _STATES, _X, _WEIGHT, _BIAS, None, True),
    "update": (_TOKEN, _CONV_STATE, _WEIGHT, _BIAS, _TOKEN, True, None, None),
    "varlen_states": ((24, 16), _BOUNDS, _STATES),
}
# What they write, by the position of the argument.
WRITTEN = {
    "forward": {5: "out"},
    "backward": {7: "dx", 8: "dweight", 9: "dbias"},
    "update": {1: "conv_state", 4: "update's out"},
    "varlen_states": {2: "varlen_states"},
}
# All that is tested by itself, and its bit in csrc/torch/register.h. Layouts count where an
# operator has a kernel for each.
BITS = {
    (operator, dtype, layout): 1 << (8 * i + 4 * j + k)
    for i, operator in enumerate(WRITTEN)
    for j, layout in enumerate(LAYOUTS)
    for k, dtype in enumerate(TOLERANCE)
    if layout == LAYOUTS[0] or operator in ("forward", "backward")
}
_NUMBERS = [(i * 37 % 17 - 8) / 8 for i in range(17)]  # which bfloat16 holds exactly


def is_wanted() -> bool:
    """Whether the environment leaves the self-test on."""
    return os.environ.get("CAUSAL_CONV1D_SELF_TEST", "1").lower() not in ("0", "false", "no", "off")


def _key(operator: str, x: torch.Tensor) -> tuple[str, torch.dtype, str]:
    """What of BITS a call with x needs."""
    is_last = operator in ("forward", "backward") and x.dim() == 3 and x.stride(1) < x.stride(2)
    return operator, x.dtype, LAYOUTS[is_last]


def _strides(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    if layout == LAYOUTS[1] and len(shape) == 3:
        return shape[1] * shape[2], 1, shape[1]
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _room(shape: tuple[int, ...]) -> int:
    """Elements from one tensor's beginning to the next's: aligned to what the kernels load."""
    return -(-math.prod(shape) // 8) * 8


def _buffer(operator: str, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of all tensors of a call, one after the other; NaN in what is only written."""
    numbers = []
    for position, shape in enumerate(_CALLS[operator]):
        if isinstance(shape, tuple):
            size = _room(shape)
            is_output = position in WRITTEN[operator] and shape != _CONV_STATE
            some = [math.nan] if is_output else _NUMBERS[position:] + _NUMBERS[:position]
            numbers += (some * (size // len(some) + 1))[:size]
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def _arguments(operator: str, buffer: torch.Tensor, layout: str) -> list:
    """A call's arguments, whose tensors are parts of the buffer."""
    arguments, begin = [], 0
    for shape in _CALLS[operator]:
        if isinstance(shape, tuple):
            arguments.append(buffer.as_strided(shape, _strides(shape, layout), begin))
            begin += _room(shape)
        elif isinstance(shape, list):
            arguments.append(torch.tensor(shape, dtype=torch.int32, device="cpu").to(buffer.device))
        else:
            arguments.append(shape)
    return arguments


def find_problem(
    kernel, expected, operator: str, dtype: torch.dtype, layout: str, device: torch.device
) -> str | None:
    """What is wrong with an operator on a device, in one sentence, or None.

    Args:
        kernel: the operator as :mod:`causal_conv1d._ctypes_ops` gives it.
        expected: the same on the CPU.
        operator: its name.
        dtype: of all tensors but indices.
        layout: of x and all other tensors of three dimensions, one of LAYOUTS.
        device: where to run the kernel; synchronised with once, at the end.
    """
    buffer = _buffer(operator, dtype)
    on_device = buffer.to(device, copy=True)
    try:
        kernel(*_arguments(operator, on_device, layout))
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return str(error)
    wanted = _arguments(operator, buffer, layout)
    expected(*wanted)
    found = _arguments(operator, on_device.cpu(), layout)
    for position, name in WRITTEN[operator].items():
        want, got = wanted[position], found[position]
        error = ((got - want).abs().max() / want.abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            return (
                f"{name} in {str(dtype).removeprefix('torch.')}, {layout}, is wrong by "
                f"{error:.2g} of its largest value"
            )
    return None


class CheckedKernels:
    """A library's CUDA kernels, with torch's operations in their place where they fail.

    Args:
        kernels: the operators by name.
        expected: the same on the CPU, to compare with.
        fallback: the same in plain torch.
        trust: called with a device and the bits of the kernels that have been found right there.
    """

    def __init__(self, kernels: dict, expected: dict, fallback: dict, trust):
        self.kernels, self.expected, self.fallback = kernels, expected, fallback
        self.trust = trust
        # By device, of those of BITS that have been tested there.
        self.problems: dict[torch.device, dict[tuple[str, torch.dtype, str], str | None]] = {}
        self.lock = threading.Lock()

    def problem(self, device: torch.device) -> str | None:
        """What is wrong with a device's kernels, of those tested."""
        found = [p for p in self.problems.get(device, {}).values() if p is not None]
        return found[0] if found else None

    def operator(self, name: str):
        """The operator that tests itself at the first call on a device with a dtype and layout."""
        kernel, fallback = self.kernels[name], self.fallback[name]

        def run(*args):
            device, key = args[0].device, _key(name, args[0])
            problems = self.problems.get(device, {})
            if key not in problems and key in BITS:
                self.check(device, key)
                problems = self.problems.get(device, {})
            if problems.get(key) is None:
                kernel(*args)
            else:
                fallback(*args)

        return run

    def check(self, device: torch.device, key: tuple[str, torch.dtype, str]) -> None:
        """Tests, unless a CUDA graph is being captured; then a later call does."""
        if device.type != "cuda":
            return  # x alone is on the CPU, which the kernel refuses
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return
            sync_mode = torch.cuda.get_sync_debug_mode()
            if sync_mode != 0:  # setting it gives a warning of torch's own
                torch.cuda.set_sync_debug_mode("default")
            try:
                self.test(device, key)
            except torch.cuda.OutOfMemoryError:
                return  # says nothing about the kernels; the next call tries again
            finally:
                if sync_mode != 0:
                    torch.cuda.set_sync_debug_mode(sync_mode)

    def test(self, device: torch.device, key: tuple[str, torch.dtype, str]) -> None:
        """Tests what has not been tested; warns if it is the first on the device to fail."""
        with self.lock:
            problems = self.problems.setdefault(device, {})
            if key in problems:
                return
            kernel, expected = self.kernels[key[0]], self.expected[key[0]]
            with torch.inference_mode():
                problem = find_problem(kernel, expected, *key, device)
            is_first = self.problem(device) is None
            problems[key] = problem
            if problem is None:
                self.trust(
                    device, sum(BITS[right] for right in problems if problems[right] is None)
                )
        if problem is not None and is_first:
            warnings.warn(
                f"causal_conv1d: the CUDA kernels fail their self-test on {_describe(device)}, so "
                f"plain torch operations, which are slower, take their place there: {problem}. "
                f"'python -m causal_conv1d' tells which GPUs the library has code for; a build on "
                f"this machine adds this one. CAUSAL_CONV1D_SELF_TEST=0 switches the test off.",
                RuntimeWarning,
                stacklevel=2,
            )


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    p = torch.cuda.get_device_properties(device)
    return f"{device} ({p.name}, compute capability {p.major}.{p.minor})"
