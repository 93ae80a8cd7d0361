"""The library for AMD GPUs where there are none: its sources run on the CPU, see hip_stand_in.py.

scripts/dev/build_hip.sh compiles it for AMD's GPUs, and checks what comes of it.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hip_stand_in
import pytest
import torch

from causal_conv1d import _ctypes_ops, _library, _self_test

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def library():
    return hip_stand_in.build()


def run(*command, folder=TESTS, **variables):
    """Python in that folder, which is the first on its path."""
    paths = [str(folder), str(TESTS), *filter(None, sys.path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True
    )


# Those that take little time and are not of the CPU alone; hip_stand_in.py tells how to run others.
FILES = ("test_aiter.py", "test_varlen_states.py", "test_pool.py")


def test_values(library):
    options = ("-q", "-p", "hip_stand_in", "-p", "no:xdist", "-p", "no:cacheprovider")
    chosen = ("-k", "not random and not command")
    found = run("-m", "pytest", *options, *chosen, *(TESTS / file for file in FILES))
    assert found.returncode == 0, found.stdout[-3000:]
    assert " passed" in found.stdout


RANDOM = """
import sys
import hip_stand_in
hip_stand_in.install()
sys.path.append("../scripts/dev")
import fuzz
sys.exit(fuzz.main(["--cases", "60"]))
"""


def test_random_options(library):
    """Forward and backward of every layout, type and option against float64."""
    found = run("-c", RANDOM)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert found.stdout.startswith("60 cases") and " 0 wrong" in found.stdout


SELF_TEST = """
import ctypes, sys, torch
from causal_conv1d import _library, _self_test
self_test = _self_test.SelfTest(ctypes.CDLL(sys.argv[1]), _library.cpu.library)
memory = torch.empty(self_test.size, dtype=torch.uint8)
verdicts = {self_test.run(number, 0, None, memory.data_ptr()) for number in range(32)}
print(verdicts, self_test.problem(torch.device("cuda", 0)))
"""


def test_self_test(library):
    """Of every kernel, by value; and of kernels that write nothing."""
    found = run("-c", SELF_TEST, library)
    assert found.stdout == f"{{{_self_test.RIGHT}}} None\n", found.stderr
    found = run("-c", SELF_TEST, library, HIP_ON_CPU_FAULT="1")
    assert found.stdout.startswith(f"{{{_self_test.WRONG}}} "), found.stderr


LOADING = """
import ctypes, sys, torch
torch.version.cuda, torch.version.hip = None, "6.2"
runtimes = [ctypes.CDLL(path, ctypes.RTLD_LOCAL) for path in sys.argv[1:]]
assert not hasattr(ctypes.CDLL(None), "hipStandIn")
torch._C._cuda_getCurrentRawStream = lambda index: 0
from causal_conv1d import _library, _self_test, causal_conv1d_fn, __main__ as doctor
doctor.report_installation()
backend = _library.cuda
print(backend.name, backend.path.name, backend.registration, backend.problem)
print("self-test:", _library.self_test is not None)
print("runtime:", hasattr(ctypes.CDLL(None), "hipStandIn"))
for name in ("forward", "conv_backward_out", "pool", "scan_forward"):
    key = f"causal_conv1d::{name}"
    print(name, torch._C._dispatch_has_kernel_for_dispatch_key(key, "CUDA"))
assert causal_conv1d_fn(torch.ones(1, 2, 3), torch.ones(2, 2)).shape == (1, 2, 3)
"""


@pytest.fixture
def site(tmp_path):
    """A copy of the package without a library for a GPU."""
    ignored = shutil.ignore_patterns("__pycache__", "libcausal_conv1d_[ch][ui]*.so")
    shutil.copytree(_library.cpu.path.parent, tmp_path / "causal_conv1d", ignore=ignored)
    return tmp_path


@pytest.fixture
def runtime(tmp_path):
    """A HIP runtime as torch loads its own: under a name without a number, for itself alone."""
    path = tmp_path / "libamdhip64.so"
    source = 'extern "C" int hipStandIn() { return 7; }'
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-x", "c++", "-", "-o", path]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def test_a_rocm_torch_loads_it(site, library, runtime):
    shutil.copy(library, site / "causal_conv1d")
    found = run("-c", LOADING, runtime, folder=site, CAUSAL_CONV1D_REGISTRATION="ctypes")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert "HIP kernels: loaded, with code for stand-in" in lines
    assert any(line.endswith(", its HIP: 6.2") for line in lines)
    assert "hip libcausal_conv1d_hip.so Python None" in lines
    assert "self-test: True" in lines and "runtime: True" in lines
    # The scan's are torch's operations.
    for name in ("forward", "conv_backward_out", "pool", "scan_forward"):
        assert f"{name} True" in lines


def test_a_rocm_torch_without_it(site):
    found = run("-c", LOADING, folder=site)
    assert "HIP kernels: not loaded: causal_conv1d was built without hipcc, so there is no " in (
        found.stdout
    )
    assert "'CAUSAL_CONV1D_HIP=1 pip install --no-deps --force-reinstall .'" in found.stdout
    assert "forward False" in found.stdout  # so that the kernels for any device serve


def test_what_it_has(library, monkeypatch):
    """All but the scan, of which the operations are torch's."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", None, raising=False)
    found = _ctypes_ops.cuda_operations(ctypes.CDLL(str(library)))
    assert set(found) == set(hip_stand_in.OPERATIONS)
