"""The last inputs of packed sequences are copied exactly."""

import pytest
import torch
from helpers import (
    ALL_FLOATS,
    allocate,
    assert_untouched_outside,
    dtype_id,
    lay_out,
    operation,
    randn,
)

from causal_conv1d import causal_conv1d_varlen_states
from causal_conv1d.reference import causal_conv1d_varlen_states_ref

LENGTHS = (5, 1, 0, 9, 3, 40)


def bounds_of(lengths, dtype=torch.int32, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype).to(device)


@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64), ids=dtype_id)
@pytest.mark.parametrize("state_len", (0, 1, 3, 4, 5, 16, 64))
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
def test_equals_the_reference(dtype, state_len, index_dtype, device):
    for dim in (1, 7, 8, 64):
        x = randn(sum(LENGTHS), dim, dtype=dtype, device=device)
        bounds = bounds_of(LENGTHS, index_dtype, device)
        states = causal_conv1d_varlen_states(x, bounds, state_len)
        assert states.dtype == dtype and states.shape == (len(LENGTHS), dim, state_len)
        assert torch.equal(states, causal_conv1d_varlen_states_ref(x, bounds, state_len))


def test_each_state_is_the_end_of_its_sequence(device):
    """Independently of the reference."""
    x = randn(sum(LENGTHS), 6, device=device)
    states = causal_conv1d_varlen_states(x, bounds_of(LENGTHS, device=device), 4)
    for state, sequence in zip(states, x.split(LENGTHS), strict=True):
        kept = min(4, len(sequence))
        assert torch.equal(state[:, 4 - kept :], sequence[len(sequence) - kept :].T)
        assert not state[:, : 4 - kept].any()


@pytest.mark.parametrize("layout", ("contiguous", "transposed", "slice", "strided", "expanded"))
def test_any_layout_of_x(layout, device):
    x = lay_out(randn(sum(LENGTHS), 6), layout, device)
    bounds = bounds_of(LENGTHS, device=device)
    states = causal_conv1d_varlen_states(x, bounds, 4)
    assert torch.equal(states, causal_conv1d_varlen_states_ref(x, bounds, 4))


@pytest.mark.parametrize(
    "layout", ("channel_first", "channel_last", "channel_last_slice", "strided", "batch_fastest")
)
def test_states_are_written_in_place_in_any_layout(layout, device):
    x = randn(sum(LENGTHS), 6, device=device)
    bounds = bounds_of(LENGTHS, device=device)
    states = allocate((len(LENGTHS), 6, 4), layout, device=device)
    operation("varlen_states", device)(x, bounds, states)
    assert torch.equal(states, causal_conv1d_varlen_states_ref(x, bounds, 4))
    assert_untouched_outside(states)


def test_tokens_before_the_first_bound_do_not_count(device):
    x = randn(10, 6, device=device)
    bounds = torch.tensor([2, 4, 9], dtype=torch.int32, device=device)
    states = causal_conv1d_varlen_states(x, bounds, 4)
    assert torch.equal(states[0, :, 2:], x[2:4].T) and not states[0, :, :2].any()
    assert torch.equal(states[1], x[5:9].T)


def test_no_sequence_and_no_token(device):
    x = randn(0, 6, device=device)
    assert causal_conv1d_varlen_states(x, bounds_of((), device=device), 4).shape == (0, 6, 4)
    states = causal_conv1d_varlen_states(x, bounds_of((0, 0), device=device), 4)
    assert states.shape == (2, 6, 4) and not states.any()
