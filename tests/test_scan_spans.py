"""The CUDA backward in several spans of time: see csrc/cuda/scan_backward_plan.h."""

import pytest
import torch
from helpers import assert_close
from scan_helpers import (
    INPUTS,
    gradients_of_outputs,
    make_scan,
    run_backward,
    tolerance_of,
)

# dtype, and the sizes of a problem of two spans or more, which take 128 MiB each: many groups of
# one channel have large sums.
CASES = {
    "fp32": (torch.float32, dict(batch=1, dim=16, groups=8, seqlen=20_000)),
    "fp64": (torch.float64, dict(batch=1, dim=16, groups=8, seqlen=10_007)),
    "rows": (torch.float64, dict(batch=4, dim=16, groups=8, seqlen=2500)),
    "constant": (torch.float64, dict(batch=1, dim=128, groups=1, seqlen=9000, constant="BC")),
    "packed": (
        torch.float64,
        dict(
            batch=1,
            dim=16,
            groups=8,
            seqlen=10_000,
            bounds=[0, 3, 3, 4077, 4077, 4100, 9990, 9990, 9990],
        ),
    ),
    "many sequences": (
        torch.float64,
        dict(batch=1, dim=16, groups=8, seqlen=8000, bounds=[*range(0, 8000, 25), 8000]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_spans(cuda, name):
    dtype, sizes = CASES[name]
    inputs = make_scan(dstate=256, dtype=dtype, **sizes)
    dout, dlast = gradients_of_outputs(inputs)
    expected, expected_out = run_backward(inputs, True, dout, dlast)

    def on_gpu(value):
        return value.to(cuda) if isinstance(value, torch.Tensor) else value

    given = {key: on_gpu(value) for key, value in inputs.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found, out = run_backward(given, True, on_gpu(dout), on_gpu(dlast))
    results = [*found.values(), out]
    used = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results)
    assert used < 170 << 20
    assert_close(out.cpu(), expected_out.double(), 10 * tolerance_of("u", out), name="out")
    for key in INPUTS:
        limit = 10 * tolerance_of(key, found[key])
        assert_close(found[key].cpu(), expected[key].double(), limit, name=f"d{key}")
    again, _ = run_backward(given, True, on_gpu(dout), on_gpu(dlast))
    assert all(torch.equal(found[key], again[key]) for key in INPUTS)
