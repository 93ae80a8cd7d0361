"""Loads the compiled libraries and registers their operators with torch.

The libraries link no part of torch. Each has one entry point, which looks torch's stable C ABI up
in the process and registers the operators of ``_ops.py`` through it. With a torch that lacks that
ABI, as all before 2.9, the same operators are registered from Python, see ``_ctypes_ops.py``;
``CAUSAL_CONV1D_REGISTRATION=ctypes`` does so with any torch, which is for testing.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import _ctypes_ops, _elf, _operators, _options, _self_test, _torch_ops
from ._ctypes_ops import Status
from ._installation import REINSTALL
from ._ops import NAMESPACE, ops
from .selective_scan import operators as scan_operators

STABLE_ABI, CTYPES = "torch's stable C ABI", "Python"


@dataclass(frozen=True)
class Backend:
    """One compiled library: where it is, and why it is not in use if it is not."""

    name: str
    path: Path
    library: Any  # a ctypes.CDLL, or None if there is a problem
    problem: str | None
    registration: str | None = None  # STABLE_ABI or CTYPES: by what its operators are registered

    def text(self, function: str) -> str:
        """What a C function without arguments that returns a string says."""
        call = getattr(self.library, function)
        call.restype = ctypes.c_char_p
        return call().decode()


@dataclass
class Loaded:
    """What is loaded and registered, once per process, as torch never drops an operator."""

    cpu: Backend
    cuda: Backend  # of torch's device type cuda, which AMD's GPUs have too: then its name is hip
    self_test: _self_test.SelfTest | None = None  # of the CUDA kernels
    schemas: dict[str, str] = field(default_factory=dict)
    # torch drops what a Library object registered with the object.
    registrations: list = field(default_factory=list)

    def define(self, schemas) -> None:
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        for schema in schemas:
            library.define(schema)
        self.registrations.append(library)

    def register(self, functions: dict, dispatch_key: str) -> None:
        """Registers functions as the kernels of a dispatch key, by an operator's name."""
        library = torch.library.Library(NAMESPACE, "IMPL", dispatch_key)
        for name, function in functions.items():
            library.impl(name, function)
        self.registrations.append(library)


def _may_use_stable_abi() -> bool:
    wanted = os.environ.get("CAUSAL_CONV1D_REGISTRATION") or "auto"
    if wanted not in ("auto", "ctypes"):
        raise ImportError(f"CAUSAL_CONV1D_REGISTRATION={wanted}: give auto or ctypes")
    return wanted == "auto" and torch.__version__ >= "2.9"


def _path(name: str) -> Path:
    return Path(__file__).with_name(f"libcausal_conv1d_{name}.so")


def _load(name: str) -> Backend:
    path = _path(name)
    problem = _elf.damage(path)
    if problem is not None:
        return Backend(name, path, None, f"{problem}: reinstall it ({REINSTALL})")
    try:
        library = ctypes.CDLL(str(path))
        register = getattr(library, f"causal_conv1d_register_{'cpu' if name == 'cpu' else 'cuda'}")
    except OSError as error:
        return Backend(name, path, None, str(error))
    except AttributeError:
        return Backend(name, path, None, f"{path} is of another version: {REINSTALL}")
    registration = CTYPES
    if _may_use_stable_abi():
        register.argtypes, register.restype = [ctypes.c_char_p], Status
        if register(NAMESPACE.encode()).code == 0:  # else torch hides a function of the ABI
            registration = STABLE_ABI
    return Backend(name, path, library, None, registration)


def _load_cpu() -> Backend:
    if not _path("cpu").parent.is_dir():
        raise ImportError(
            f"causal_conv1d: it cannot run from the archive {_path('cpu').parents[1]}, as its "
            f"libraries must be files: install it"
        )
    if not _path("cpu").exists():
        raise ImportError(
            f"causal_conv1d: there is no {_path('cpu')}: if that is the source folder, run Python "
            f"from elsewhere or 'pip install --no-deps -e .' there, else reinstall ({REINSTALL})"
        )
    backend = _load("cpu")
    if backend.problem is not None:
        raise ImportError(f"causal_conv1d: {backend.problem}")
    return backend


def _share_hip_runtime() -> None:
    """Has the library find the HIP runtime that torch has loaded, be it under another name.

    Streams and memory of one runtime are nothing to another.
    """
    with open("/proc/self/maps") as maps:
        runtimes = {
            line.split(maxsplit=5)[-1].strip() for line in maps if "/libamdhip64.so" in line
        }
    for path in sorted(runtimes):
        ctypes.CDLL(path, os.RTLD_NOLOAD | os.RTLD_GLOBAL)


def _load_hip() -> Backend:
    path = _path("hip")
    if path.exists():
        _share_hip_runtime()
        return _load("hip")
    return Backend(
        "hip",
        path,
        None,
        f"causal_conv1d was built without hipcc, so there is no {path}: with the hipcc of ROCm "
        f"{torch.version.hip} on PATH (often in /opt/rocm/bin) "
        f"run 'CAUSAL_CONV1D_HIP=1 pip install --no-deps --force-reinstall .' in its sources",
    )


def _load_cuda() -> Backend:
    path = _path("cuda")
    if torch.version.hip is not None:
        return _load_hip()
    if torch.version.cuda is None:
        damage = _elf.damage(path) if path.exists() else None
        also = f", and {damage}: reinstall it ({REINSTALL})" if damage else ""
        return Backend("cuda", path, None, f"torch is built without CUDA{also}")
    if not path.exists():  # which needs no warning
        return Backend(
            "cuda",
            path,
            None,
            f"causal_conv1d was built without nvcc, so there is no {path}: with the nvcc of CUDA "
            f"{torch.version.cuda.partition('.')[0]} on PATH (often in /usr/local/cuda/bin) "
            f"run 'CAUSAL_CONV1D_CUDA=1 pip install --no-deps --force-reinstall .' in its sources",
        )
    return _load("cuda")


def _with_plain(operators: dict) -> dict:
    """The operators and their overloads named plain, see ``_dispatch.py``."""
    return operators | {f"{name}.plain": function for name, function in operators.items()}


def _replacements(loaded: Loaded, operators: dict) -> dict:
    """The operators that the C++ ones pass calls on to, see ``csrc/torch/register.h``."""
    set_error = loaded.cuda.library.causal_conv1d_cuda_set_error

    def telling_errors(name, operator):
        count = len(getattr(ops, name).default._schema.returns)

        def call(*args):
            try:
                return operator(*args)
            except Exception as error:
                set_error(str(error).encode())
                nothing = [torch.empty(0) for _ in range(count)]
                return nothing[0] if count == 1 else tuple(nothing) or None

        return call

    return {f"python_{name}": telling_errors(name, run) for name, run in operators.items()}


def _operators_over(operations: dict, cpu: ctypes.CDLL) -> dict:
    """All operators by name, over all operations by name."""
    check = _ctypes_ops.varlen_sizes_check(cpu)
    found = _operators.over(operations, check) | _options.over(operations)
    return found | scan_operators.over(operations) | {"pool": operations["pool"]}


def _register_cuda(loaded: Loaded, plain: dict) -> None:
    """The kernels, where there are; of operations without one those in plain torch."""
    cpu, cuda = loaded.cpu.library, loaded.cuda
    if _self_test.is_wanted():
        loaded.self_test = _self_test.SelfTest(cuda.library, cpu)
    if cuda.registration == CTYPES:
        operations = _ctypes_ops.cuda_operations(cuda.library)
        if loaded.self_test is not None:
            operations = {n: loaded.self_test.checked(n, run) for n, run in operations.items()}
        loaded.register(_with_plain(_operators_over(plain | operations, cpu)), "CUDA")
    elif loaded.self_test is not None:
        loaded.define(f"python_{schema}" for schema in loaded.schemas.values())
        operators = _operators_over(loaded.self_test.fallback, cpu)
        loaded.register(_replacements(loaded, operators), "CUDA")


def _register_any_device(loaded: Loaded) -> dict:
    """What serves tensors of every device that has no kernels in this process."""
    warn = _torch_ops.warner(loaded.cuda.name.upper(), loaded.cuda.problem)
    operations = _torch_ops.operations(loaded.cpu.library, warn)
    operators = _operators_over(operations, loaded.cpu.library)
    loaded.register(_with_plain(operators), _torch_ops.ANY_DEVICE)
    return operations


def _load_all() -> Loaded:
    loaded = Loaded(_load_cpu(), _load_cuda())
    library = loaded.cpu.library
    loaded.schemas = _ctypes_ops.schemas(library)
    if loaded.cpu.registration == CTYPES:
        loaded.define(loaded.schemas.values())
        loaded.define(schema.replace("(", ".plain(", 1) for schema in loaded.schemas.values())
        operations = _ctypes_ops.cpu_operations(library)
        loaded.register(_with_plain(_operators_over(operations, library)), "CPU")
    plain = _register_any_device(loaded)
    if loaded.cuda.problem is None:
        _register_cuda(loaded, plain)

    from . import (
        _autograd,
        _dtensor,
        _fake,
        _flops,
        _options_autograd,
        _pool,
        _split,
        _update_dilated,
        _vmap,
    )
    from .selective_scan import autograd, fake, vmap

    parts = (_fake, _autograd, _options_autograd, _pool, _vmap, _split, _update_dilated)
    for part in (*parts, fake, autograd, vmap):
        part.register(loaded)
    _flops.register()
    _dtensor.register()
    return loaded


# The operators live as long as the process. An import after the package was removed from
# sys.modules finds what the first import loaded.
_namespace = vars(ops)
loaded = _namespace.get("loaded") or _namespace.setdefault("loaded", _load_all())
cpu, cuda, self_test = loaded.cpu, loaded.cuda, loaded.self_test
