"""The libraries for GPUs on the CPU: their sources over tests/gpu_on_cpu, a stand-in for a GPU.

hip_stand_in.py and cuda_stand_in.py have it for AMD's and NVIDIA's.
"""

import collections
import concurrent.futures
import ctypes
import fcntl
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import gpu_source

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
CONVOLUTION = ("forward", "packed", "backward", "pool", "update", "varlen_states")
COMMON = ("check", "pool_check", "overlap", "cuda/backward_plan", "gpu_on_cpu/fibers")
# Each takes its structs, the device and the stream, some a workspace.
OPERATIONS = "forward backward conv_forward conv_backward update pool varlen_states".split()
WITH_WORKSPACE = ("backward", "conv_forward", "conv_backward")
COMPILE = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror "
    "-Wno-attributes -Wno-unknown-pragmas -Wno-maybe-uninitialized -U_FORTIFY_SOURCE"
).split()
installed = False  # in this process
LINK = ("-shared", "-pthread", "-ldl", "-Wl,-z,defs", "-Wl,--version-script=cmake/exports.map")


def run(*command):
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}"


def write_if_new(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@dataclass(frozen=True)
class StandIn:
    """One of the libraries.

    Args:
        name: "cuda" or "hip".
        kernels: The names of its .cu files.
        others: Those of its .cpp files that not both have.
        options: For the compiler, besides COMPILE.
        variant: Of its folder's name, if it is built in several ways.
    """

    name: str
    kernels: tuple
    others: tuple
    options: tuple
    variant: str = ""

    @property
    def folder(self) -> Path:
        return ROOT / "build" / "gpu_on_cpu" / (self.name + self.variant)

    def sources(self):
        yield from (f"cuda/{name}.cu" for name in self.kernels)
        yield from (f"{name}.cpp" for name in (*COMMON, *self.others))

    def translate_all(self):
        """csrc and the stand-in into the folder; files that stay the same keep their time."""
        for root in (ROOT / "csrc", TESTS / "gpu_on_cpu"):
            for path in root.rglob("*.*"):
                text = path.read_text()
                if path.suffix in (".cu", ".cuh") and root.name == "csrc":
                    text = gpu_source.translate(text)
                write_if_new(self.folder / root.name / path.relative_to(root), text)

    def compile_one(self, source: str) -> Path:
        """The object file of a source, compiled anew if something it includes has changed."""
        base = self.folder if source.startswith("gpu_on_cpu") else self.folder / "csrc"
        target = self.folder / f"{source.replace('/', '-')}.o"
        needed = target.with_suffix(".d")
        options = [*COMPILE, *self.options, "-MMD", "-MF", str(needed), f"-I{self.folder}/csrc"]
        options.append(f"-I{self.folder}/gpu_on_cpu/{self.name if self.name == 'cuda' else ''}")
        command = [os.environ.get("CXX", "g++"), *options, "-x", "c++", "-c", str(base / source)]
        stamp = target.with_suffix(".command")
        if target.exists() and stamp.exists() and stamp.read_text() == str(command):
            files = [Path(file) for file in needed.read_text().replace("\\\n", " ").split()[1:]]
            made = target.stat().st_mtime
            if all(file.exists() and file.stat().st_mtime < made for file in files):
                return target
        run(*command, "-o", str(target))
        stamp.write_text(str(command))
        return target

    def build(self) -> Path:
        """The library; for one process at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        library = self.folder / f"libcausal_conv1d_{self.name}.so"
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.translate_all()
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(self.compile_one, self.sources()))
            newest = max(file.stat().st_mtime for file in objects)
            if not library.exists() or library.stat().st_mtime < newest:
                new = library.with_suffix(".new")
                run(os.environ.get("CXX", "g++"), *map(str, objects), *LINK, "-o", str(new))
                shutil.move(new, library)
        return library


def operations(library: ctypes.CDLL) -> dict:
    """A library's operations on CPU tensors, by name."""
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


def install(library: ctypes.CDLL):
    """Puts a library's operations in the place of the CPU's, which are registered already."""
    import torch

    from causal_conv1d import _ctypes_ops, _library

    global installed
    installed = True
    cpu = _library.cpu.library
    found = _ctypes_ops.cpu_operations(cpu) | operations(library)
    _ctypes_ops.cpu_operations = lambda library: found
    registration = torch.library.Library(_library.NAMESPACE, "IMPL", "CPU")
    for name, operator in _library._with_plain(_library._operators_over(found, cpu)).items():
        registration.impl(name, operator, allow_override=True)
    _library.loaded.registrations.append(registration)


def launched(library: ctypes.CDLL) -> dict:
    """How often each kernel ran, by its name and the types it was made for."""
    library.causal_conv1d_launched.restype = ctypes.c_char_p
    lines = library.causal_conv1d_launched().decode().splitlines()
    return {name: int(count) for count, name in (line.split(" ", 1) for line in lines)}


class Plugin:
    """Has pytest's tests run a stand-in; tells which kernels ran, with -v in which variants."""

    def __init__(self, stand_in: StandIn):
        self.library = ctypes.CDLL(str(stand_in.build()))
        install(self.library)

    def pytest_terminal_summary(self, terminalreporter, config):
        counts = launched(self.library)
        names = collections.Counter(name.split("(")[0].split("::")[-1] for name in counts)
        found = ", ".join(f"{name} {count}" for name, count in names.items())
        terminalreporter.write_line(f"variants of kernels that ran: {found}")
        if config.option.verbose > 0:
            for name, count in counts.items():
                terminalreporter.write_line(f"{count} {name}")
