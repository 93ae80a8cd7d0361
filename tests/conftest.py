"""Chooses the device: ``pytest --device cpu`` (the default) or ``pytest --device cuda``."""

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
