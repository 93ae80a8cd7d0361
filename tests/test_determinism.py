"""Results are the same, bit by bit, on every call and with any number of threads."""

import pytest
import torch
from helpers import FLOATS, GRADIENTS, dtype_id, make_case, run_backward, run_forward

REPEATS = 20


def results(case):
    out, final = run_forward(case)
    grads = run_backward(case)
    return [out, final, *(grads[name] for name in GRADIENTS)]


def assert_same(found, expected):
    names = ("out", "final_states", *GRADIENTS)
    for name, a, b in zip(names, found, expected, strict=True):
        assert torch.equal(a, b), name


def big_case(layout, dtype, seq_idx, device):
    return make_case(
        (3, 130, 1500), 4, dtype, states=True, seq_idx=seq_idx, layout=layout, device=device
    )


@pytest.mark.parametrize("seq_idx", (None, "long"))
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_repeats_are_equal(layout, dtype, seq_idx, device):
    case = big_case(layout, dtype, seq_idx, device)
    expected = results(case)
    assert all(tensor.any() for tensor in expected)
    for _ in range(REPEATS):
        assert_same(results(case), expected)


@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_the_number_of_threads_does_not_matter(layout, device):
    if device != "cpu":
        pytest.skip("about threads of the CPU")
    case = big_case(layout, torch.float32, "long", device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(case)
        for count in (2, 3, 5, 16):
            torch.set_num_threads(count)
            assert_same(results(case), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_strides_and_alignment_do_not_change_dweight_and_dbias(layout, device):
    """The order of their sums depends on shapes alone, within either layout."""
    case = big_case(layout, torch.float32, None, device)
    expected = run_backward(case)
    sliced = big_case(layout + "_slice", torch.float32, None, device)
    found = run_backward(sliced)
    for name in GRADIENTS:
        assert torch.equal(found[name], expected[name]), name


def test_alignment_does_not_change_the_sums_of_much_work(device):
    case = make_case((1, 5120, 1), 4, torch.bfloat16, device=device)
    sliced = [
        torch.randn(8, 1003, 5121, dtype=torch.bfloat16, device=device)[:, :, 1:] for _ in range(2)
    ]
    case.x, case.dout = (t.transpose(1, 2) for t in sliced)
    found = run_backward(case, "channel_last")
    case.x, case.dout = (t.contiguous().transpose(1, 2) for t in sliced)
    expected = run_backward(case, "channel_last")
    for name in ("dx", "dweight", "dbias"):
        assert torch.equal(found[name], expected[name]), name


def test_empty_memory_does_not_matter(device):
    """The same result whatever the allocator's memory held before: no uninitialised read."""
    case = make_case((2, 70, 300), 4, states=True, device=device)
    expected = results(case)
    for value in (float("nan"), 1e30):
        junk = [torch.full((2, 70, 300 + i), value, device=device) for i in range(8)]
        del junk
        assert_same(results(case), expected)
