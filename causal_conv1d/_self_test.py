"""A GPU's kernels are compared by value with torch at the first call on that GPU.

A kernel that is missing ("no kernel image"), was compiled wrongly or is not meant for the GPU then
gives one warning, and plain torch operations take its place on that GPU. Calls after the first pay
nothing for it: the C++ operators look at one flag. ``CAUSAL_CONV1D_SELF_TEST=0`` switches it off.
"""

from __future__ import annotations

import os
import threading
import warnings

import torch

from causal_conv1d import _torch_ops

BATCH, DIM, SEQLEN, WIDTH = 2, 24, 37, 4
# Errors relative to the largest value expected: far above what rounding gives, far below what a
# wrong kernel does.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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


def _inputs() -> dict[str, torch.Tensor]:
    states = (BATCH, DIM, WIDTH - 1)
    return {
        "x": _values(BATCH, DIM, SEQLEN),
        "weight": _values(DIM, WIDTH),
        "bias": _values(DIM),
        "initial_states": _values(*states),
        "dout": _values(BATCH, DIM, SEQLEN).flip(2),
        "dfinal_states": _values(*states).flip(2),
    }


def _run(kernels, i, channel_last: bool) -> list[torch.Tensor]:
    """What every operator makes of the inputs."""

    def empty(like):
        return torch.full_like(like, torch.nan)

    if channel_last:
        i = {k: v.mT.contiguous().mT if v.dim() == 3 else v for k, v in i.items()}
    x, weight, bias, states = i["x"], i["weight"], i["bias"], i["initial_states"]
    out, final_states = empty(x), empty(states)
    kernels["forward"](x, weight, bias, None, states, out, final_states, True)
    gradients = [empty(t) for t in (x, weight, bias, states)]
    kernels["backward"](
        x, weight, bias, i["dout"], None, states, i["dfinal_states"], *gradients, True
    )
    state, token = states.clone(), empty(x[:, :, 0])
    kernels["update"](x[:, :, 0].contiguous(), state, weight, bias, token, True, None, None)
    tokens, bounds = x[0].T.contiguous(), torch.tensor([0, 2, SEQLEN], dtype=torch.int32)
    last = empty(states)
    kernels["varlen_states"](tokens, bounds.to(x.device), last)
    return [out, final_states, *gradients, token, state, last]


NAMES = ("out", "final_states", "dx", "dweight", "dbias", "dinitial_states", "update's out")
NAMES += ("conv_state", "varlen_states")


def _expected(i) -> list[torch.Tensor]:
    return _run(_torch_ops.OPERATORS, {k: v.double() for k, v in i.items()}, False)


def find_problem(kernels: dict, device: torch.device) -> str | None:
    """What is wrong with the kernels on a device, in one sentence, or None.

    Args:
        kernels: the operators by name, as :mod:`causal_conv1d._ctypes_ops` gives them.
        device: where to run them; synchronised with once, at the end.
    """
    inputs = _inputs()
    on_device = {name: value.to(device) for name, value in inputs.items()}
    found = []
    for dtype in TOLERANCE:
        typed = {name: value.to(dtype) for name, value in on_device.items()}
        for channel_last in (False, True):
            try:
                results = _run(kernels, typed, channel_last)
            except RuntimeError as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                return str(error)
            found += [result.float().flatten() for result in results]
    found = torch.cat(found).cpu().double()
    expected = _expected(inputs)
    for dtype, tolerance in TOLERANCE.items():
        for layout in ("channel-first", "channel-last"):
            for name, want in zip(NAMES, expected, strict=True):
                got, found = found[: want.numel()], found[want.numel() :]
                error = ((got - want.flatten()).abs().max() / want.abs().max()).item()
                if not error <= tolerance:
                    return (
                        f"{name} in {str(dtype).removeprefix('torch.')}, {layout}, is wrong by "
                        f"{error:.2g} of its largest value"
                    )
    return None


class CheckedKernels:
    """A library's CUDA kernels, with torch's operations in their place where they fail.

    Args:
        kernels: the operators by name.
        fallback: the same in plain torch.
        trust: called with a device whose kernels have been found right.
    """

    def __init__(self, kernels: dict, fallback: dict, trust):
        self.kernels, self.fallback, self.trust = kernels, fallback, trust
        self.problems: dict[torch.device, str | None] = {}  # of the devices tested
        self.lock = threading.Lock()

    def operator(self, name: str):
        """The operator that tests its device at the first call there."""
        kernel, fallback, problems = self.kernels[name], self.fallback[name], self.problems

        def run(*args):
            device = args[0].device
            if device not in problems:
                self.check(device)
            if problems.get(device) is None:
                kernel(*args)
            else:
                fallback(*args)

        return run

    def check(self, device: torch.device) -> None:
        """Tests a device, unless a CUDA graph is being captured there; then a later call does."""
        if device.type != "cuda":
            return  # x alone is on the CPU, which the kernel refuses
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return
            sync_mode = torch.cuda.get_sync_debug_mode()
            if sync_mode != 0:  # setting it gives a warning of torch's own
                torch.cuda.set_sync_debug_mode("default")
            try:
                self.test(device)
            except torch.cuda.OutOfMemoryError:
                return  # says nothing about the kernels; the next call tries again
            finally:
                if sync_mode != 0:
                    torch.cuda.set_sync_debug_mode(sync_mode)

    def test(self, device: torch.device) -> None:
        """Tests a device that has not been tested; warns if its kernels fail."""
        with self.lock:
            if device in self.problems:
                return
            with torch.inference_mode():
                problem = find_problem(self.kernels, device)
            self.problems[device] = problem
        if problem is None:
            self.trust(device)
        else:
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
