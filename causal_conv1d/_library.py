"""Loads the compiled libraries and registers their operators with torch.

The libraries link no part of torch. Each has one entry point, which looks torch's stable C ABI up
in the process and registers ``torch.ops.causal_conv1d.*`` through it. With a torch that lacks that
ABI, as all before 2.9, the same operators are registered from Python, see ``_ctypes_ops.py``;
``CAUSAL_CONV1D_REGISTRATION=ctypes`` does so with any torch, which is for testing.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from causal_conv1d import _ctypes_ops, _self_test, _torch_ops
from causal_conv1d._ctypes_ops import OPERATORS, Status

STABLE_ABI, CTYPES = "torch's stable C ABI", "Python"


@dataclass(frozen=True)
class Backend:
    """One compiled library: where it is, and why it is not in use if it is not."""

    name: str
    path: Path
    library: ctypes.CDLL | None
    problem: str | None
    registration: str | None = None  # STABLE_ABI or CTYPES: by what its operators are registered

    def text(self, function: str) -> str:
        """What a C function without arguments that returns a string says."""
        call = getattr(self.library, function)
        call.restype = ctypes.c_char_p
        return call().decode()


_registrations = []  # torch drops what a Library object registered with the object


def _define(schemas) -> None:
    library = torch.library.Library("causal_conv1d", "FRAGMENT")
    for schema in schemas:
        library.define(schema)
    _registrations.append(library)


def _register(functions: dict, dispatch_key: str) -> None:
    library = torch.library.Library("causal_conv1d", "IMPL", dispatch_key)
    for name, function in functions.items():
        library.impl(name, function)
    _registrations.append(library)


def _may_use_stable_abi() -> bool:
    wanted = os.environ.get("CAUSAL_CONV1D_REGISTRATION", "auto")
    if wanted not in ("auto", "ctypes"):
        raise ImportError(f"CAUSAL_CONV1D_REGISTRATION={wanted}: give auto or ctypes")
    return wanted == "auto" and torch.__version__ >= (2, 9)


def _load(name: str) -> Backend:
    path = Path(__file__).with_name(f"libcausal_conv1d_{name}.so")
    if not path.exists():
        return Backend(name, path, None, f"there is no {path}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Backend(name, path, None, str(error))
    registration = CTYPES
    if _may_use_stable_abi():
        register = getattr(library, f"causal_conv1d_register_{name}")
        register.restype = Status
        if register().code == 0:  # else torch hides a function of the ABI
            registration = STABLE_ABI
    return Backend(name, path, library, None, registration)


def _load_cpu() -> Backend:
    backend = _load("cpu")
    if backend.problem is not None:
        raise ImportError(
            f"causal_conv1d: {backend.problem}. If this is the source folder, run Python from "
            f"elsewhere or 'pip install --no-build-isolation -e .' here; else reinstall "
            f"causal-conv1d."
            if not backend.path.exists()
            else f"causal_conv1d: {backend.path}: {backend.problem}"
        )
    return backend


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

    _register(dict.fromkeys(OPERATORS, refuse), "CUDA")


def _register_ctypes_cuda(kernels: dict) -> None:
    if self_test is not None:
        kernels = {name: self_test.checked(name, kernel) for name, kernel in kernels.items()}
    _register(kernels, "CUDA")


def _register_replacements(library: ctypes.CDLL) -> None:
    """The operators that the C++ ones pass calls on to, see ``csrc/torch/register.h``."""
    set_error = library.causal_conv1d_cuda_set_error

    def telling_errors(operator):
        def call(*args):
            try:
                operator(*args)
            except Exception as error:
                set_error(str(error).encode())

        return call

    _define(f"python_{schema}" for schema in _schemas.values())
    _register(
        {f"python_{name}": telling_errors(self_test.replacement(name)) for name in OPERATORS},
        "CUDA",
    )


cpu = _load_cpu()
_schemas = _ctypes_ops.schemas(cpu.library)
_packers = {name: _ctypes_ops.Packer(name, schema) for name, schema in _schemas.items()}
if cpu.registration == CTYPES:
    _define(_schemas.values())
    _register(_ctypes_ops.cpu_kernels(cpu.library, _packers), "CPU")

cuda = _load_cuda()
self_test = None  # of the CUDA kernels
if cuda.problem is None:
    if _self_test.is_wanted():
        _fallback = _torch_ops.kernels(_ctypes_ops.checks(cpu.library, _packers))
        self_test = _self_test.SelfTest(cuda.library, cpu.library, _fallback)
    if cuda.registration == CTYPES:
        _register_ctypes_cuda(_ctypes_ops.cuda_kernels(cuda.library, _packers))
    elif self_test is not None:
        _register_replacements(cuda.library)


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
