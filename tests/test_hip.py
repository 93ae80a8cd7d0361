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
import test_errors
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
    found = run("-c", SELF_TEST, library, GPU_ON_CPU_FAULT="1")
    assert found.stdout.startswith(f"{{{_self_test.WRONG}}} "), found.stderr


@pytest.mark.parametrize("name", test_errors.WITH_WORKSPACE)
def test_workspace_is_checked(name, library):
    test_errors.assert_workspace_is_checked(ctypes.CDLL(str(library)), name, "cpu")


LOADING = """
import ctypes, sys, torch
torch.version.cuda, torch.version.hip = None, "6.2"
runtimes = [ctypes.CDLL(path, ctypes.RTLD_LOCAL) for path in sys.argv[1:]]
assert not hasattr(ctypes.CDLL(None), "hipStandIn")
torch._C._cuda_getCurrentRawStream = lambda index: 0
torch.cuda.device_count = lambda: 0  # one for CUDA would ask AMD's library
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


ON_A_GPU = """
import sys, warnings
import rocm_on_cpu
import torch
from helpers import randn
from other_device import Device, OtherTensor, values
from scan_helpers import arguments, make_scan
from test_scan_update import make_update
from causal_conv1d import _library, aiter, causal_conv1d_fn, causal_conv1d_update
from causal_conv1d import causal_conv1d_varlen_states, selective_scan_fn, selective_state_update
from causal_conv1d._ops import ops

warned = []
warnings.simplefilter("always")
warnings.showwarning = lambda text, *_: warned.append(str(text))

def results(make):
    x, weight, bias = make(randn(2, 6, 9)), make(randn(6, 4, seed=1)), make(randn(6, seed=2))
    out, state = torch.empty_like(x), make(randn(2, 6, 3))
    aiter.causal_conv1d_fwd(out, x, weight, bias, True)
    yield out
    yield causal_conv1d_fn(x, weight, bias, activation="silu", dilation=2)
    yield from ops.backward(x, weight, bias, out, None, None, None, True, True, False, True)[:3]
    yield causal_conv1d_update(out[:, :, 0], state, weight, bias, "silu")
    yield state
    yield causal_conv1d_varlen_states(x[0].t(), make(torch.tensor([0, 4, 9])), 3)
    given = arguments({name: make(value) for name, value in make_scan(seqlen=70).items()}, True)
    yield from ops.scan_forward(*given, True)
    yield selective_state_update(**{name: make(v) for name, v in make_update().items()})

def on_gpu(tensor):
    return OtherTensor(tensor.clone()) if isinstance(tensor, torch.Tensor) else tensor

with Device():
    for found, expected in zip(results(on_gpu), results(lambda tensor: tensor), strict=True):
        assert found.device == torch.device("cuda", 0)
        torch.testing.assert_close(values(found), expected, rtol=1e-4, atol=1e-4)
print(_library.self_test.problem(torch.device("cuda", 0)))
print(*warned, sep="\\n")
"""
SCAN_WARNING = (
    "causal_conv1d: selective scans of cuda tensors are computed by plain torch operations, which "
    "are slower than kernels, as the HIP library has no kernels of them"
)


@pytest.fixture
def on_a_gpu(site, library):
    """Runs the calls above in a torch for ROCm; what the self-test found, and all warnings."""
    shutil.copy(library, site / "causal_conv1d")

    def run_them(**variables):
        variables["CAUSAL_CONV1D_REGISTRATION"] = "ctypes"
        found = run("-c", ON_A_GPU, folder=site, **variables)
        assert found.returncode == 0, found.stderr
        return found.stdout.splitlines()

    return run_them


def test_every_operation_on_a_gpu(on_a_gpu):
    assert on_a_gpu() == ["None", SCAN_WARNING]


def test_torch_takes_the_place_of_wrong_kernels_with_one_warning(on_a_gpu):
    problem, wrong, scan = on_a_gpu(GPU_ON_CPU_FAULT="1")
    start = "causal_conv1d: the HIP kernels fail their self-test on cuda:0 (a GPU, gfx1030:xnack-)"
    advice = "; a build with PYTORCH_ROCM_ARCH=gfx1030 adds this GPU. CAUSAL_CONV1D_SELF_TEST=0"
    assert wrong.startswith(start) and problem in wrong and advice in wrong
    assert scan == SCAN_WARNING


def test_a_rocm_torch_without_it(site):
    found = run("-c", LOADING, folder=site)
    assert found.returncode == 0, found.stderr
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
