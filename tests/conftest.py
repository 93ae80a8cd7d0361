"""Chooses the device: ``pytest --device cpu`` (the default) or ``pytest --device cuda``."""

import shutil

import c_library as c
import pytest
import torch


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
