"""Loads the compiled libraries and registers their operators with torch.

The libraries link no part of torch. Each has one entry point, which looks torch's stable C ABI up
in the process and registers ``torch.ops.causal_conv1d.*`` through it.
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

# Operators of torch.ops.causal_conv1d, and how errors call them.
OPERATORS = {
    "forward": "causal_conv1d_fn",
    "backward": "causal_conv1d_bwd",
    "update": "causal_conv1d_update",
    "varlen_states": "causal_conv1d_varlen_states",
}


class Status(ctypes.Structure):
    """``causal_conv1d_status`` of ``csrc/causal_conv1d.h``."""

    _fields_ = [("code", ctypes.c_int32), ("message", ctypes.c_char * 252)]


@dataclass(frozen=True)
class Backend:
    """One compiled library: where it is, and why it is not in use if it is not."""

    name: str
    path: Path
    library: ctypes.CDLL | None
    problem: str | None

    def text(self, function: str) -> str:
        """What a C function without arguments that returns a string says."""
        call = getattr(self.library, function)
        call.restype = ctypes.c_char_p
        return call().decode()


def _load(name: str) -> Backend:
    path = Path(__file__).with_name(f"libcausal_conv1d_{name}.so")
    if not path.exists():
        return Backend(name, path, None, f"there is no {path}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Backend(name, path, None, str(error))
    register = getattr(library, f"causal_conv1d_register_{name}")
    register.restype = Status
    status = register()
    if status.code != 0:
        return Backend(name, path, None, status.message.decode(errors="replace"))
    return Backend(name, path, library, None)


def _load_cuda() -> Backend:
    if torch.version.cuda is None:
        path = Path(__file__).with_name("libcausal_conv1d_cuda.so")
        return Backend("cuda", path, None, "torch is built without CUDA")
    backend = _load("cuda")
    if backend.problem is not None:
        _refuse_cuda(backend.problem)
        if backend.path.exists():  # a build without nvcc has none, which needs no warning
            warnings.warn(
                f"causal_conv1d: the CUDA kernels could not be loaded and only CPU tensors work: "
                f"{backend.problem}",
                RuntimeWarning,
                stacklevel=2,
            )
    return backend


def _refuse_cuda(problem: str) -> None:
    """Makes calls with CUDA tensors fail with the reason, not the dispatcher's list of keys."""

    def refuse(*args):
        raise RuntimeError(f"causal_conv1d: no CUDA kernels in this process: {problem}")

    global _refusals  # torch drops the registrations with this object
    _refusals = torch.library.Library("causal_conv1d", "IMPL", "CUDA")
    for operator in OPERATORS:
        _refusals.impl(operator, refuse)


cpu = _load("cpu")
if cpu.problem is not None:
    raise ImportError(
        f"causal_conv1d: {cpu.problem}. If this is the source folder, run Python from elsewhere or "
        f"'pip install --no-build-isolation -e .' here; else reinstall causal-conv1d."
        if not cpu.path.exists()
        else f"causal_conv1d: {cpu.path}: {cpu.problem}"
    )
cuda = _load_cuda()


def _fake(operator: str):
    """The operator on meta and fake tensors: it writes into its arguments and returns nothing."""
    schema = getattr(torch.ops.causal_conv1d, operator).default._schema
    names = [argument.name for argument in schema.arguments]

    def fake(*args, **kwargs):
        tensors = {**dict(zip(names, args, strict=False)), **kwargs}
        device = tensors["x"].device
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.device != device:
                raise RuntimeError(
                    f"{OPERATORS[operator]}: {name} must be on x's device {device}, "
                    f"got {tensor.device}"
                )

    return fake


for _operator in OPERATORS:
    torch.library.register_fake(f"causal_conv1d::{_operator}", _fake(_operator))
