"""What is written shares memory with nothing else of a call; views that only interleave may."""

import math
import time

import pytest
import torch

import causal_conv1d_cuda as raw
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states

B, D, L, W, S = 2, 6, 10, 4, 5


def ramp(*shape, device):
    return torch.linspace(-1, 1, math.prod(shape), device=device).reshape(shape)


@pytest.fixture
def weight(device):
    return ramp(D, W, device=device)


def assert_refused(text, memory, call):
    """Nothing of memory is written."""
    before = memory.clone()
    with pytest.raises(RuntimeError, match=text):
        call()
    assert torch.equal(memory, before)


# ------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize(
    "take",
    (
        lambda c: c[:, :, 0],
        lambda c: c[:, :, S - 1],
        lambda c: c[:, :, 2 : S + 1],
        lambda c: c[:, :, :S],
    ),
    ids=("first column", "last column", "columns and more", "whole"),
)
def test_x_within_the_state(take, weight, device):
    buffer = ramp(B, D, S + 2, device=device)
    assert_refused(
        "^causal_conv1d_update: conv_state must not overlap x in memory",
        buffer,
        lambda: causal_conv1d_update(take(buffer), buffer[:, :, :S], weight),
    )


def test_x_beside_the_state_in_its_rows(weight, device):
    """Ranges of memory cross, but no element is shared."""
    buffer = ramp(B, D, S + 2, device=device)
    state, x = buffer[:, :, :S].clone(), buffer[:, :, S].clone()
    expected = causal_conv1d_update(x, state, weight)
    assert torch.equal(causal_conv1d_update(buffer[:, :, S], buffer[:, :, :S], weight), expected)
    assert torch.equal(buffer[:, :, :S], state) and torch.equal(buffer[:, :, S], x)


@pytest.mark.parametrize("name", ("weight", "bias", "cache_seqlens", "conv_state_indices"))
def test_state_over_another_input(name, weight, device):
    state = ramp(B, D, S, device=device)
    inputs = {
        "weight": state[0, :, :W],
        "bias": state[0, :, 1],
        "cache_seqlens": state.view(torch.int32)[:, 0, 0],
        "conv_state_indices": state.view(torch.int32)[:, 0, 0],
    }
    arguments = {"x": ramp(B, D, device=device), "weight": weight} | {name: inputs[name]}
    assert_refused(
        f"^causal_conv1d_update: conv_state must not overlap {name} in memory",
        state,
        lambda: causal_conv1d_update(conv_state=state, **arguments),
    )


def test_state_that_overlaps_itself(weight, device):
    memory = ramp(64, device=device)
    state = memory.as_strided((B, D, S), (3 * S, S - 1, 1))
    assert_refused(
        "^causal_conv1d_update: conv_state is written and must not overlap itself",
        memory,
        lambda: causal_conv1d_update(ramp(B, D, device=device), state, weight),
    )


def test_state_of_distinct_elements_in_no_order(weight, device):
    """i + 4j + 14k has 36 values for i < 2, j < 6, k < 3, though 4 * 5 is more than 14."""
    memory = torch.zeros(64, device=device)
    state = memory.as_strided((B, D, 3), (1, 4, 14))
    x = ramp(B, D, device=device)
    dense = state.clone()
    expected = causal_conv1d_update(x, dense, weight)
    assert torch.equal(causal_conv1d_update(x, state, weight), expected)
    assert torch.equal(state, dense)


# ----------------------------------------------------------------------------- forward and backward


def test_final_states_over_an_input(weight, device):
    x = ramp(B, D, L, device=device)
    for name, x_, initial, out in (
        ("x", x, None, x[:, :, L - (W - 1) :]),
        ("initial_states", x.clone(), x[:, :, : W - 1], x[:, :, 1:W]),
    ):
        assert_refused(
            f"^causal_conv1d_fn: final_states_out must not overlap {name} in memory",
            x,
            lambda x_=x_, initial=initial, out=out: causal_conv1d_fn(
                x_,
                weight,
                initial_states=initial,
                return_final_states=True,
                final_states_out=out,
            ),
        )


@pytest.mark.parametrize("dim", (0, 1, 2))
def test_out_shifted_over_x(dim, weight, device):
    buffer = ramp(B + 1, D + 1, L + 1, device=device)
    x = buffer[:B, :D, :L]
    out = buffer.narrow(dim, 1, x.shape[dim])[:B, :D, :L]
    assert_refused(
        "^causal_conv1d_fn: out must not overlap x in memory",
        buffer,
        lambda: raw.causal_conv1d_fwd(x, weight, None, None, None, out, None, True),
    )


def halves(device):
    def of(buffer, first, second):
        return buffer[first], buffer[second]

    everything = slice(None)
    lower, upper = slice(None, D), slice(D, None)
    even, odd = slice(None, None, 2), slice(1, None, 2)
    yield of(ramp(B, 2 * D, L, device=device), (everything, lower), (everything, upper))
    yield of(ramp(B, 2 * D, L, device=device), (everything, even), (everything, odd))
    yield of(
        ramp(B, D, 2 * L, device=device),
        (everything, everything, even),
        (everything, everything, odd),
    )
    yield of(
        ramp(B, D, L + 3 + L, device=device),
        (everything, everything, slice(None, L)),
        (everything, everything, slice(L + 3, None)),
    )
    last = ramp(B, L, 2 * D, device=device).transpose(1, 2)
    yield of(last, (everything, lower), (everything, upper))


@pytest.mark.parametrize("which", range(5))
def test_halves_of_one_buffer(which, weight, device):
    x, out = list(halves(device))[which]
    expected_x, expected = x.clone(), causal_conv1d_fn(x.clone(), weight, activation="silu")
    raw.causal_conv1d_fwd(x, weight, None, None, None, out, None, True)
    assert torch.equal(out, expected) and torch.equal(x, expected_x)


def test_gradients_over_what_is_read(weight, device):
    x, dout = ramp(B, D, L, device=device), ramp(B, D, L + 1, device=device)
    assert_refused(
        "^causal_conv1d_bwd: dx must not overlap dout in memory",
        dout,
        lambda: raw.causal_conv1d_bwd(x, weight, None, dout[:, :, :L], dout[:, :, 1:], True),
    )


def test_other_elements_types(weight, device):
    """bfloat16 rows between float32 rows of one memory, in bytes."""
    rows = torch.zeros(B, D, 2 * S, device=device)
    state = rows[:, :, :S]
    x = rows.view(torch.bfloat16)[:, :, 2 * S : 2 * S + 1]
    causal_conv1d_update(x, state, weight)
    assert_refused(
        "conv_state must not overlap x",
        rows,
        lambda: causal_conv1d_update(
            rows.view(torch.bfloat16)[:, :, 2 * S - 1 : 2 * S], state, weight
        ),
    )


# -------------------------------------------------------------------------------------- no elements


def test_calls_without_elements_take_no_time(device):
    began = time.monotonic()
    x = torch.zeros(2**30, 1, 0, device=device)
    weight = ramp(1, W, device=device).requires_grad_()
    bias = ramp(1, device=device).requires_grad_()
    out = causal_conv1d_fn(x, weight, bias, activation="silu")
    assert out.shape == x.shape
    out.sum().backward()
    assert weight.grad.count_nonzero() == 0 and bias.grad.count_nonzero() == 0
    states = causal_conv1d_varlen_states(
        torch.zeros(4, 0, device=device), torch.zeros(1, device=device).int().expand(2**40), 3
    )
    assert states.shape == (2**40 - 1, 0, 3)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("seq_idx", (False, True))
def test_states_of_no_steps_are_the_initial_ones(seq_idx, weight, device):
    initial = ramp(B, D, W - 1, device=device).requires_grad_()
    ids = torch.zeros(B, 0, dtype=torch.int32, device=device) if seq_idx else None
    x = torch.zeros(B, D, 0, device=device)
    _, final = causal_conv1d_fn(
        x, weight, seq_idx=ids, initial_states=initial, return_final_states=True
    )
    assert torch.equal(final, initial)
    gradient = ramp(B, D, W - 1, device=device) + 3
    final.backward(gradient)
    assert torch.equal(initial.grad, gradient)


def test_a_width_beyond_all_filters(device):
    weight = torch.ones(1, 1, device=device).expand(1, 2**62)
    with pytest.raises(RuntimeError, match="^causal_conv1d_fn: weight must have width <= 65536"):
        causal_conv1d_fn(torch.ones(1, 1, 1, device=device), weight)
