"""The library for AMD GPUs on the CPU: its sources over tests/hip_on_cpu, a stand-in for HIP.

As a plugin of pytest it takes the place of the convolution's CPU kernels in the tests:

    PYTHONPATH=tests pytest -p hip_stand_in tests/test_forward.py
"""

import concurrent.futures
import ctypes
import fcntl
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "hip_on_cpu"
SOURCES = (
    *(f"csrc/cuda/{name}.cu" for name in ("forward", "packed", "backward", "self_test")),
    *(f"csrc/cuda/{name}.cu" for name in ("pool", "update", "varlen_states")),
    *(f"csrc/{name}.cpp" for name in ("check", "pool_check", "scan_check", "overlap", "self_test")),
    *(f"csrc/torch/{name}.cpp" for name in ("register_cuda", "stable_abi", "strides", "ops")),
    "csrc/cuda/backward_plan.cpp",
    "tests/hip_on_cpu/fibers.cpp",
)
OPTIONS = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror "
    "-Wno-attributes -Wno-unknown-pragmas -Icsrc -Itests/hip_on_cpu "
    "-DCAUSAL_CONV1D_HIP -DCAUSAL_CONV1D_GENERAL -DCAUSAL_CONV1D_ARCHITECTURES=stand_in"
).replace("=stand_in", '="stand-in"')
# What the library has; each takes its structs, the device and the stream, some a workspace.
OPERATIONS = "forward backward conv_forward conv_backward update pool varlen_states".split()
WITH_WORKSPACE = ("backward", "conv_forward", "conv_backward")


def run(*command):
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}"


def newest_input() -> float:
    """When any source was changed last, this file included."""
    files = [Path(__file__), *(ROOT / "csrc").rglob("*"), *(ROOT / "tests/hip_on_cpu").rglob("*")]
    return max(file.stat().st_mtime for file in files)


def build() -> Path:
    """The library, compiled anew if a source has changed; for one process at a time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    library = FOLDER / "libcausal_conv1d_hip.so"
    compiler = os.environ.get("CXX", "g++")
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists() and library.stat().st_mtime > newest_input():
            return library

        def compile_one(source):
            target = FOLDER / f"{source.replace('/', '-')}.o"
            run(compiler, *OPTIONS.split(), "-x", "c++", "-c", source, "-o", str(target))
            return str(target)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        exports = "-Wl,--version-script=cmake/exports.map"
        link = ("-shared", "-pthread", "-ldl", "-Wl,-z,defs", exports)
        run(compiler, *objects, *link, "-o", str(library))
    return library


def operations(library: ctypes.CDLL) -> dict:
    """Its operations on CPU tensors, by name."""
    import torch

    from causal_conv1d import _ctypes_ops

    def make(operation):
        pack, structs = _ctypes_ops._packer(operation)
        name = f"causal_conv1d_cuda_{_ctypes_ops._FUNCTIONS.get(operation, operation)}"
        tail = [ctypes.c_int, ctypes.c_void_p]
        size_of = None
        if operation in WITH_WORKSPACE:
            tail += [ctypes.c_void_p, ctypes.c_int64]
            size_of = getattr(library, f"{name}_workspace_size")
            size_of.argtypes, size_of.restype = [ctypes.c_char_p] * structs, ctypes.c_int64
        call = _ctypes_ops._function(library, name, structs, *tail)

        def run(*args):
            params, workspace = pack(args), []
            if size_of is not None:
                memory = torch.full((max(size_of(*params), 0),), 255, dtype=torch.uint8)  # NaNs
                workspace = [memory.data_ptr(), memory.numel()]
            _ctypes_ops.raise_if_failed(call(*params, 0, None, *workspace))

        return _ctypes_ops.telling_torch(operation, run)

    return {operation: make(operation) for operation in OPERATIONS}


def install():
    """Puts them in the place of the CPU's, which are registered already."""
    import torch

    from causal_conv1d import _ctypes_ops, _library

    cpu = _library.cpu.library
    found = _ctypes_ops.cpu_operations(cpu) | operations(ctypes.CDLL(str(build())))
    _ctypes_ops.cpu_operations = lambda library: found
    registration = torch.library.Library(_library.NAMESPACE, "IMPL", "CPU")
    for name, operator in _library._with_plain(_library._operators_over(found, cpu)).items():
        registration.impl(name, operator, allow_override=True)
    _library.loaded.registrations.append(registration)


def pytest_configure(config):
    install()
