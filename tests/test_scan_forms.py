"""The CUDA forward chooses its kernel by channels for each multiprocessor: every one of them."""

import pytest
import torch
from helpers import FLOATS, assert_close, dtype_id
from scan_helpers import make_scan, run_forward
from tolerances import SCAN

# Channels for each multiprocessor, one number a kernel: see csrc/cuda/scan_forward.cu.
CHANNELS = (2, 11, 15, 24, 64, 96)


def assert_like_the_cpu(inputs, cuda):
    expected = run_forward(inputs, True)
    found = run_forward(
        {key: value if value is None else value.to(cuda) for key, value in inputs.items()}, True
    )
    for name, first, second in zip(("out", "ungated", "last"), found, expected, strict=True):
        assert_close(first.cpu(), second.double(), 4 * SCAN[first.dtype], name=name)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("channels", CHANNELS)
def test_by_channels(cuda, channels, dtype):
    """The last chunk is not whole, and there are two tiles of states."""
    dim = channels * torch.cuda.get_device_properties(cuda).multi_processor_count
    assert_like_the_cpu(make_scan(1, dim, 520, 17, 2, dtype), cuda)


@pytest.mark.parametrize("channels", (5, 12, 40))
def test_of_mixed_types(cuda, channels):
    dim = channels * torch.cuda.get_device_properties(cuda).multi_processor_count
    half, wide = torch.bfloat16, torch.float32
    for dtypes in ({"delta": wide}, {"B": torch.float16, "C": torch.float16}):
        assert_like_the_cpu(make_scan(1, dim, 1032, 16, 1, half, dtypes=dtypes), cuda)


def test_packed_by_channels(cuda):
    """Sequences that begin anywhere, long enough for every kernel."""
    for channels in CHANNELS:
        dim = channels * torch.cuda.get_device_properties(cuda).multi_processor_count // 2
        inputs = make_scan(1, dim, 1200, 16, 1, torch.bfloat16, bounds=[3, 604, 1200])
        assert_like_the_cpu(inputs, cuda)
