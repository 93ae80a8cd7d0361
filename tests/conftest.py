"""Chooses the device: ``pytest --device cpu`` (the default) or ``pytest --device cuda``."""

import importlib
import os
import shutil
from pathlib import Path

import c_library as c
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def without_kernels(key):
    """Imports the library in such a way that tensors of a dispatch key have no kernels."""
    impl = torch.library.Library.impl

    def impl_of_others(self, *args, **kwargs):
        if self.ns != "causal_conv1d" or self.dispatch_key != key:
            impl(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAUSAL_CONV1D_REGISTRATION", "ctypes")  # from Python, so that it can be seen
        patch.setattr(torch.library.Library, "impl", impl_of_others)
        importlib.import_module("causal_conv1d")


if "WITHOUT_KERNELS" in os.environ:  # CPU or CUDA
    without_kernels(os.environ["WITHOUT_KERNELS"])


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors under test live"
    )


def pytest_configure(config):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"--device cuda, but torch {torch.__version__} finds no usable CUDA device"
        )


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def tells_values(device, pytestconfig):
    """Whether wrong values in a tensor of indices are an error: a GPU's kernels cannot tell."""
    stand_ins = map(pytestconfig.pluginmanager.hasplugin, ("cuda_stand_in", "hip_stand_in"))
    return device == "cpu" and not any(stand_ins)


@pytest.fixture
def cuda(device):
    """For what exists on a GPU only."""
    if device != "cuda":
        pytest.skip("about CUDA; run with --device cuda")
    return device


@pytest.fixture
def second_gpu(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return "cuda:1"


@pytest.fixture(autouse=True)
def denormal_numbers():
    """As when a process starts: what inductor compiles in torch 2.5 makes the CPU flush them."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def c_library(tmp_path_factory):
    """Where the C library is installed: in one home folder, then moved to another."""
    for program in ("cmake", "c++", "cc", "pkg-config", "readelf"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    home, other_home = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("other_home")
    with c.sources() as folder:
        c.configure(".", "build/c")
        c.shell(c.printed_lines("c.md", "Build and install"), folder, home)
    return (home / "causal_conv1d").rename(other_home / "causal_conv1d")


@pytest.fixture
def scripts_path(monkeypatch):
    """The scripts can be imported."""
    monkeypatch.syspath_prepend(ROOT / "scripts" / "dev")
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def apply_patches(scripts_path):
    import apply_patches

    return apply_patches


@pytest.fixture
def sources(tmp_path, apply_patches):
    """A mamba_ssm and a Mamba-YOLO of which only the lines exist that the patches mention."""
    for patch in sorted((ROOT / "patches").glob("*.patch")):
        for name, hunks in apply_patches.read_patch(patch).items():
            lines = []
            for start, changes in hunks:
                lines += [b"# line %d\n" % i for i in range(len(lines), start)]
                lines += [text + b"\n" for sign, text in changes if sign != b"+"]
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"".join(lines) + b"# the end\n")
    (tmp_path / "mamba_ssm/__init__.py").write_text('__version__ = "2.2.4"\n')
    (tmp_path / "ultralytics/__init__.py").touch()
    return tmp_path
