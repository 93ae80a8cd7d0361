"""The operations where there are no kernels: in torch's own, on any device of torch.

So XPU, MPS, HPU and others compute, a GPU whose library is missing or does not load, and one on
which the self-test finds a kernel wrong. Derivatives are those of ``_autograd.py`` there as well.
"""

from __future__ import annotations

import ctypes
import warnings

import torch

from . import _ctypes_ops, _options_plain, _plain, _pool_plain
from .selective_scan import fallback

# torch's name for what serves every device without a kernel of its own.
ANY_DEVICE = "CompositeExplicitAutograd"


def operations(cpu: ctypes.CDLL, warn) -> dict:
    """All operations by name, which check their arguments as the kernels do.

    Args:
        cpu: the library with the checks.
        warn: a function of the device, called before an operation computes there.
    """
    checks = _ctypes_ops.checks(cpu)

    def warning(check):
        def run(args):
            check(args)
            warn(args[0].device)

        return run

    checks = {name: warning(check) for name, check in checks.items()}
    found: dict = {}
    for module in (_plain, _options_plain, _pool_plain, fallback):
        found |= module.operations(checks)
    return {name: _ctypes_ops.telling_torch(name, run) for name, run in found.items()}


class Once:
    """Tells each key's first call from all others, in every thread."""

    def __init__(self) -> None:
        self._tokens: dict = {}

    def is_first(self, key) -> bool:
        token = object()
        return self._tokens.setdefault(key, token) is token  # one step, which no thread divides


def warner(kind: str, problem: str | None):
    """A function that warns once for each type of device that torch's operations compute there.

    Args:
        kind: of the kernels for torch's device type cuda, CUDA or HIP.
        problem: why there are none; None if there are, of HIP all but the scan's.
    """
    once = Once()

    def warn(device: torch.device) -> None:
        if not once.is_first(device.type):
            return
        what, why = f"{device.type} tensors", "there are kernels for CPU and CUDA tensors alone"
        if device.type == "cuda":
            why = f"there are no {kind} kernels in this process: {problem}"
        if device.type == "cuda" and problem is None:
            what = f"selective scans of {what}"
            why = f"the {kind} library has no kernels of them"
        warnings.warn(
            f"causal_conv1d: {what} are computed by plain torch operations, which "
            f"are slower than kernels, as {why}",
            RuntimeWarning,
            stacklevel=2,
        )

    return warn
