"""A GPU's kernels are compared by value with the CPU's at the first call of each on that GPU.

A kernel that is missing ("no kernel image"), was compiled wrongly or is not meant for the GPU then
gives one warning, and plain torch operations take its place on that GPU. Each operator is tested
with each dtype of x when it is first called so, on a few numbers that one copy takes there and one
copy back; no kernel of torch is started, so what the first call waits for is little more than the
loading of the kernels that it needs itself. Calls after it pay nothing: the C++ operators look at
one bit. ``CAUSAL_CONV1D_SELF_TEST=0`` switches it off.
"""

from __future__ import annotations

import os
import threading
import warnings

import torch

BATCH, DIM, SEQLEN, WIDTH = 2, 24, 40, 4
LAYOUTS = ("channel-first", "channel-last")
# What each operator writes, by the position of the argument.
WRITTEN = {
    "forward": {5: "out", 6: "final_states"},
    "backward": {7: "dx", 8: "dweight", 9: "dbias", 10: "dinitial_states"},
    "update": {1: "conv_state", 4: "update's out"},
    "varlen_states": {2: "varlen_states"},
}
# Errors relative to the largest value expected: far above what rounding gives, far below what a
# wrong kernel does. In the order of the C interface's dtypes.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
    torch.float64: 1e-9,
}
# Bits of what is trusted, as csrc/torch/register.h has them.
BITS = {
    (operator, dtype): 1 << (4 * i + j)
    for i, operator in enumerate(WRITTEN)
    for j, dtype in enumerate(TOLERANCE)
}


def is_wanted() -> bool:
    """Whether the environment leaves the self-test on."""
    return os.environ.get("CAUSAL_CONV1D_SELF_TEST", "1").lower() not in ("0", "false", "no", "off")


def _values(*shape: int) -> torch.Tensor:
    """Numbers from -1 to 1 that bfloat16 holds exactly; no random generator is touched."""
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(count, dtype=torch.float32, device="cpu")
    return ((index * 37 + 11 * len(shape)) % 17 - 8).div(8).reshape(shape)


def _arguments(operator: str, dtype: torch.dtype, layout: str) -> list:
    """Arguments of a call on the CPU; what it writes is NaN, or the state before the call."""

    def values(*shape, flipped=()):
        value = _values(*shape).to(dtype).flip(flipped)
        return value.mT.contiguous().mT if layout == LAYOUTS[1] and len(shape) == 3 else value

    def empty(like):
        return torch.full_like(like, torch.nan)

    x, weight, bias = values(BATCH, DIM, SEQLEN), values(DIM, WIDTH), values(DIM)
    states = values(BATCH, DIM, WIDTH - 1)
    if operator == "forward":
        return [x, weight, bias, None, states, empty(x), empty(states), True]
    if operator == "backward":
        dout = values(BATCH, DIM, SEQLEN, flipped=(2,))
        dfinal_states = values(BATCH, DIM, WIDTH - 1, flipped=(2,))
        gradients = [empty(t) for t in (x, weight, bias, states)]
        return [x, weight, bias, dout, None, states, dfinal_states, *gradients, True]
    if operator == "update":
        token = values(BATCH, DIM)
        return [token, values(BATCH, DIM, WIDTH), weight, bias, empty(token), True, None, None]
    bounds = torch.tensor([0, 2, SEQLEN], dtype=torch.int32, device="cpu")
    return [values(SEQLEN, DIM), bounds, empty(states)]


def _views(buffer: torch.Tensor, tensors: list[torch.Tensor]):
    """Tensors like these, one after the other in a buffer of bytes."""
    begin = 0
    for t in tensors:
        end = begin + t.numel() * t.element_size()
        yield buffer[begin:end].view(t.dtype).as_strided(t.shape, t.stride())
        begin = -(-end // 16) * 16


def find_problem(kernel, expected, operator: str, dtype: torch.dtype, device: torch.device):
    """What is wrong with an operator for x of a dtype on a device, in one sentence, or None.

    Args:
        kernel: the operator as :mod:`causal_conv1d._ctypes_ops` gives it.
        expected: the same on the CPU.
        operator: its name.
        dtype: of all tensors but indices.
        device: where to run the kernel; synchronised with once, at the end.
    """
    calls = [_arguments(operator, dtype, layout) for layout in LAYOUTS]
    tensors = [a for call in calls for a in call if isinstance(a, torch.Tensor)]
    size = sum(t.numel() * t.element_size() + 16 for t in tensors)
    buffer = torch.zeros(size, dtype=torch.uint8, device="cpu")
    for view, t in zip(_views(buffer, tensors), tensors, strict=True):
        view.copy_(t)
    buffer = buffer.to(device, copy=True)
    views = _views(buffer, tensors)
    try:
        for call in calls:
            kernel(*[next(views) if isinstance(a, torch.Tensor) else a for a in call])
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return str(error)
    views = _views(buffer.cpu(), tensors)
    for layout, call in zip(LAYOUTS, calls, strict=True):
        found = [next(views) if isinstance(a, torch.Tensor) else a for a in call]
        expected(*call)
        for position, name in WRITTEN[operator].items():
            want, got = call[position].double(), found[position].double()
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
        # By device, of the (operator, dtype) tested there.
        self.problems: dict[torch.device, dict[tuple[str, torch.dtype], str | None]] = {}
        self.lock = threading.Lock()

    def problem(self, device: torch.device) -> str | None:
        """What is wrong with a device's kernels, of those tested."""
        found = [p for p in self.problems.get(device, {}).values() if p is not None]
        return found[0] if found else None

    def operator(self, name: str):
        """The operator that tests itself at the first call on a device with a dtype."""
        kernel, fallback = self.kernels[name], self.fallback[name]

        def run(*args):
            device, dtype = args[0].device, args[0].dtype
            problems = self.problems.get(device, {})
            if (name, dtype) not in problems and dtype in TOLERANCE:
                self.check(device, name, dtype)
                problems = self.problems.get(device, {})
            if problems.get((name, dtype)) is None:
                kernel(*args)
            else:
                fallback(*args)

        return run

    def check(self, device: torch.device, operator: str, dtype: torch.dtype) -> None:
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
                self.test(device, operator, dtype)
            except torch.cuda.OutOfMemoryError:
                return  # says nothing about the kernels; the next call tries again
            finally:
                if sync_mode != 0:
                    torch.cuda.set_sync_debug_mode(sync_mode)

    def test(self, device: torch.device, operator: str, dtype: torch.dtype) -> None:
        """Tests what has not been tested; warns if it is the first on the device to fail."""
        with self.lock:
            problems = self.problems.setdefault(device, {})
            if (operator, dtype) in problems:
                return
            kernel, expected = self.kernels[operator], self.expected[operator]
            with torch.inference_mode():
                problem = find_problem(kernel, expected, operator, dtype, device)
            is_first = self.problem(device) is None
            problems[operator, dtype] = problem
            if problem is None:
                self.trust(device, sum(BITS[key] for key in problems if problems[key] is None))
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
