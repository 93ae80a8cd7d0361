"""Every width up to 8 has kernels of its own, for rows of whole vectors and for others: all options
that choose among them, over several tiles, with the same results as the reference. Wider filters
go by pieces of eight taps."""

import pytest
import torch
from helpers import (
    ALL_FLOATS,
    assert_backward,
    assert_forward,
    dtype_id,
    lay_out,
    make_case,
    run_backward,
    run_forward,
)

WIDTHS = range(1, 9)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENGTHS = (1032, 777)  # whole vectors, or not


@pytest.mark.parametrize("seq_idx", (None, "packed", "long", "padded", "recurring"))
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_ids(layout, width, dtype, seqlen, seq_idx, device):
    case = make_case((2, 8, seqlen), width, dtype, seq_idx=seq_idx, layout=layout, device=device)
    assert_forward(case, allow_zero=width == 1)
    assert_backward(case, allow_zero=width == 1)


@pytest.mark.parametrize("activation", ("silu", None))
@pytest.mark.parametrize("seqlen", (5, 264, 257))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seq_idx", (None, "packed", "padded"))
def test_states(seq_idx, width, seqlen, activation, device):
    case = make_case(
        (3, 4, seqlen),
        width,
        torch.bfloat16,
        states=True,
        seq_idx=seq_idx,
        activation=activation,
        device=device,
    )
    assert_forward(case, allow_zero=width == 1)
    assert_backward(case, allow_zero=width == 1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_sequences_give_the_bits_of_each_alone(dtype, width, device):
    lengths = (64, 8, 256, 16, 520, 168)  # so that rows of each alone are whole vectors, too
    case = make_case((1, 8, sum(lengths)), width, dtype, device=device)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    case.seq_idx = ids[None].int().to(device)
    out, dx = run_forward(case)[0], run_backward(case)["dx"]
    begin = 0
    for length in lengths:
        alone = make_case((1, 8, length), width, dtype, device=device)
        end = begin + length
        alone.x, alone.dout = case.x[:, :, begin:end], case.dout[:, :, begin:end]
        alone.weight, alone.bias = case.weight, case.bias
        assert torch.equal(run_forward(alone)[0], out[:, :, begin:end])
        assert torch.equal(run_backward(alone)["dx"], dx[:, :, begin:end])
        begin = end


# The last has more than a block's shared memory for its dz in float64, channel-last.
WIDE = ((2, 37, 300, 9), (1, 3, 4200, 10), (3, 5, 11, 17), (2, 2, 264, 65), (1, 6, 90, 80))


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("states", (False, True))
@pytest.mark.parametrize("batch, dim, seqlen, width", WIDE)
def test_wide(batch, dim, seqlen, width, states, dtype, device):
    """Runs of eight steps, whole or not, in one or in several parts of a row."""
    case = make_case((batch, dim, seqlen), width, dtype, states=states, device=device)
    x, dout = case.x, case.dout
    expected_out, expected = run_forward(case)[0], run_backward(case)["dx"]
    for where in ("channel_first", "channel_first_slice", "channel_last", "strided"):
        case.x, case.dout = lay_out(x, where), lay_out(dout, where)
        assert torch.equal(assert_forward(case, allow_zero=True)[0], expected_out), where
        assert torch.equal(assert_backward(case, where, allow_zero=True)["dx"], expected), where


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize("width", (9, 20))
def test_steps_that_no_output_takes_change_nothing(width, layout, device):
    """What lies in a run beside the steps that a tap reaches may be infinite."""
    case = make_case((2, 36, 21), width, torch.float32, layout=layout, device=device)
    case.activation = None
    case.x[:, :, 20] = torch.inf
    dweight = run_backward(case)["dweight"]
    assert torch.isfinite(dweight[:, : width - 1]).all()
