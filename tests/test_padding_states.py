"""Padding (seq_idx < 0) in the final states and their gradients."""

import math

import pytest
import torch
from helpers import (
    ALL_FLOATS,
    FLOATS,
    GRADIENTS,
    assert_backward,
    assert_forward,
    assert_gradients,
    dtype_id,
    generator_of,
    lay_out,
    make_case,
    randn,
    run_backward,
    run_forward,
)

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.reference import causal_conv1d_ref

WIDTHS = tuple(range(1, 10))
LAYOUTS = ("channel_first", "channel_last", "strided", "channel_first_slice", "channel_last_slice")
WITH_STATES = pytest.mark.parametrize("states", (False, True), ids=("", "states"))


def chosen_rows(seqlen):
    """Ids of rows with padding here and there; -1 and other negative ids are the same."""

    def row(*parts):
        ids = [id for id, length in parts for _ in range(length)]
        return (ids + [ids[-1] if ids else 0] * seqlen)[:seqlen]

    last = [-1] * (seqlen - 1)
    return [
        row((3, seqlen)),
        row((-1, seqlen)),
        row((0, 1), (-1, seqlen)),
        row((0, 2), (-(2**31), seqlen)),
        row((0, seqlen - 1), (-1, 1)),
        row((0, seqlen - 4), (1, 2), (-1, 2)),
        [*last, 0],
        [*last[1:], 0, 7][-seqlen:],
        row((-1, 1), (0, seqlen)),
        row((-5, 2), (0, 1), (-1, 1), (2, 2), (-1, 3), (0, 1), (-1, seqlen)),
        row((0, 1), (-1, seqlen - 2), (0, 1)),
        row(*[(t if t % 2 else -1, 1) for t in range(seqlen)]),
        row(*[(-1 if t % 2 else t, 1) for t in range(seqlen)]),
    ]


def random_rows(batch, seqlen, seed):
    """Runs of padding and of positions; every other row ends with padding."""
    generator = generator_of(seed)

    def draw(n):
        return int(torch.randint(0, n, (), generator=generator))

    ids = torch.zeros(batch, seqlen, dtype=torch.int32)
    for b in range(batch):
        start = 0
        while start < seqlen:
            length = 1 + draw((2, 5, 40)[draw(3)])
            ids[b, start : start + length] = draw(6) - 2
            start += length
        if b % 2:
            ids[b, seqlen - draw(seqlen + 1) :] = -1
    return ids


def poison(case):
    """The case with NaN wherever padding or what padding replaces stands, in all that is read."""
    ids, width = case.seq_idx, case.weight.shape[1]
    is_padding = (ids < 0)[:, None, :]
    case.x.masked_fill_(is_padding, math.nan)
    case.dout.masked_fill_(is_padding, math.nan)
    for b, row in enumerate(ids.tolist()):
        positions = state_positions(row, width)
        if case.dfinal_states is not None:
            for j, s in enumerate(positions):
                if s is None:
                    case.dfinal_states[b, :, j] = math.nan
        if case.initial_states is not None and row and row[0] < 0 and max(row) >= 0:
            case.initial_states[b] = math.nan
    return case


def make(shape, ids, width=4, dtype=torch.float32, *, states=True, device="cpu", **options):
    case = make_case(shape, width, dtype, states=states, device=device, **options)
    case.seq_idx = torch.as_tensor(ids, dtype=torch.int32).reshape(shape[0], shape[2]).to(device)
    return poison(case)


def state_positions(row, width):
    """The positions s of the final states' inputs x~[s]; None where that is 0 by the definition."""
    end = max((t + 1 for t, id in enumerate(row) if id >= 0), default=0)
    positions = []
    for s in range(end - (width - 1), end):
        counts = row[s] >= 0 if s >= 0 else end == 0 or row[0] >= 0
        positions.append(s if counts else None)
    return positions


def expected_states(case):
    """Element by element, independent of reference.py."""
    width = case.weight.shape[1]
    expected = torch.zeros(case.state_shape, dtype=case.x.dtype, device=case.x.device)
    for b, row in enumerate(case.seq_idx.tolist()):
        for j, s in enumerate(state_positions(row, width)):
            if s is not None and s >= 0:
                expected[b, :, j] = case.x[b, :, s]
            elif s is not None and case.initial_states is not None:
                expected[b, :, j] = case.initial_states[b, :, width - 1 + s].to(expected.dtype)
    return expected


def assert_all(case, layout=None):
    """final_states, out and all gradients."""
    _, final = assert_forward(case, layout, allow_zero=True)
    assert torch.equal(final, expected_states(case)), "final_states"
    found = assert_backward(case, layout, allow_zero=True)
    is_padding = (case.seq_idx < 0)[:, None, :].expand(case.x.shape)
    assert not found["dx"][is_padding].any(), "dx of padding"


@WITH_STATES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_chosen_rows(width, layout, states, device):
    for seqlen in (1, 2, 3, 5, 8, 23):
        ids = chosen_rows(seqlen)
        assert_all(
            make((len(ids), 9, seqlen), ids, width, states=states, layout=layout, device=device),
            layout,
        )


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_every_type(layout, dtype, device):
    ids = chosen_rows(11)
    for width in (3, 4, 6):
        for activation in (None, "silu"):
            options = {"layout": layout, "activation": activation, "device": device}
            assert_all(make((len(ids), 40, 11), ids, width, dtype, **options))


@pytest.mark.parametrize("state_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_states_of_another_type(dtype, state_dtype, device):
    ids = chosen_rows(6)
    assert_all(make((len(ids), 9, 6), ids, 4, dtype, state_dtype=state_dtype, device=device))


@WITH_STATES
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
@pytest.mark.parametrize("width", (2, 4, 7))
def test_random_rows(width, layout, states, device):
    for seed in range(12):
        seqlen = (1, 2, 4, 7, 30, 65, 150, 300)[seed % 8]
        ids = random_rows(5, seqlen, seed)
        assert_all(make((5, 21, seqlen), ids, width, states=states, layout=layout, device=device))


@pytest.mark.parametrize("width", (4, 9))
def test_long_rows_of_many_tiles(width, device):
    """Padding that covers whole chunks of time, and ends of rows near the chunks' ends."""
    for layout, dim, seqlen, chunk in (
        ("channel_first", 2, 66_000, 65_536),
        ("channel_last", 130, 1100, 512),
    ):
        for end in (width - 1, chunk - 1, chunk, chunk + 1, seqlen - 1):
            row = torch.arange(seqlen) // 300
            row[end:] = -1
            row[max(0, end - 2) : end - 1] = -1
            assert_all(make((1, dim, seqlen), row, width, layout=layout, device=device))


@WITH_STATES
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_through_the_final_states(width, layout, states, device):
    """Of final_states alone, by autograd: nothing but copies and zeros."""
    ids = chosen_rows(7)
    case = make((len(ids), 5, 7), ids, width, states=states, layout=layout, device=device)
    dfinal = randn(*case.state_shape, device=device, seed=9)
    inputs = [case.x, case.weight, case.bias]
    if states:
        inputs.append(case.initial_states)
    for tensor in inputs:
        tensor.requires_grad_()
    _, final = causal_conv1d_fn(
        case.x,
        case.weight,
        case.bias,
        case.seq_idx,
        case.initial_states,
        return_final_states=True,
        activation="silu",
    )
    found = torch.autograd.grad(final, inputs, dfinal, materialize_grads=True)
    expected = [torch.zeros_like(tensor) for tensor in inputs]
    for b, row in enumerate(ids):
        for j, s in enumerate(state_positions(row, width)):
            if s is not None and s >= 0:
                expected[0][b, :, s] = dfinal[b, :, j]
            elif s is not None and states:
                expected[3][b, :, width - 1 + s] = dfinal[b, :, j]
    for actual, value in zip(found, expected, strict=True):
        assert torch.equal(actual, value)


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_autograd_of_out_and_final_states(layout, device):
    ids = chosen_rows(12)
    case = make((len(ids), 33, 12), ids, layout=layout, device=device)
    inputs = [case.x, case.weight, case.bias, case.initial_states]
    for tensor in inputs:
        tensor.requires_grad_()
    outputs = causal_conv1d_fn(
        case.x,
        case.weight,
        case.bias,
        case.seq_idx,
        case.initial_states,
        return_final_states=True,
        activation="silu",
    )
    grads = (case.dout.detach(), case.dfinal_states.detach())
    found = torch.autograd.grad(outputs, inputs, grads)
    assert_gradients(case, dict(zip(GRADIENTS, found, strict=True)))


@pytest.mark.parametrize("width", (1, 2, 4, 6))
def test_gradcheck_of_the_reference(width, device):
    ids = torch.tensor(chosen_rows(5), device=device)
    x = randn(len(ids), 2, 5, dtype=torch.float64, device=device, seed=1).requires_grad_()
    weight = randn(2, width, dtype=torch.float64, device=device, seed=2).requires_grad_()
    states = randn(len(ids), 2, width - 1, dtype=torch.float64, device=device, seed=3)

    def function(x, weight, states):
        return causal_conv1d_ref(x, weight, None, states, True, activation="silu", seq_idx=ids)

    assert torch.autograd.gradcheck(function, (x, weight, states.requires_grad_()))


def test_the_reference_under_vmap_and_in_one_graph(device):
    """No step of it depends on values."""
    ids = torch.tensor(chosen_rows(5), device=device)
    x = randn(len(ids), 1, 2, 5, device=device, seed=1)
    weight, states = randn(2, 4, device=device, seed=2), randn(len(ids), 1, 2, 3, device=device)

    def function(x, states, ids):
        return causal_conv1d_ref(x, weight, None, states, True, activation="silu", seq_idx=ids)

    expected = function(x[:, 0], states[:, 0], ids)
    mapped = torch.func.vmap(function)(x, states, ids[:, None])
    traced = torch.compile(function, fullgraph=True, backend="eager")(x[:, 0], states[:, 0], ids)
    for i in range(2):
        assert torch.equal(mapped[i][:, 0], expected[i])
        assert torch.equal(traced[i], expected[i])


# ------------------------------------------------------------------------------------- continuation


@WITH_STATES
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_padded_batch_goes_on_with_update(width, dtype, states, device):
    """Rows of several lengths, padded on the right: tokens after them come out as those of each
    row alone without padding, bit by bit."""
    lengths, seqlen, tokens, dim = (0, 1, 2, 3, 4, 9, 10, 12), 12, 5, 21
    ids = [[0] * n + [-1] * (seqlen - n) for n in lengths]
    for layout in ("channel_first", "channel_last"):
        case = make(
            (len(ids), dim, seqlen), ids, width, dtype, states=states, layout=layout, device=device
        )
        following = randn(len(ids), dim, tokens, dtype=dtype, device=device, seed=8)
        parameters = (case.weight, case.bias)
        _, state = causal_conv1d_fn(
            case.x, *parameters, case.seq_idx, case.initial_states, True, activation="silu"
        )
        found = [
            causal_conv1d_update(following[..., i], state, *parameters, "silu")
            for i in range(tokens)
        ]
        found = torch.stack(found, dim=-1)
        for b, n in enumerate(lengths):
            whole = torch.cat([case.x[b : b + 1, :, :n], following[b : b + 1]], dim=-1)
            initial = None if case.initial_states is None else case.initial_states[b : b + 1]
            expected, final = causal_conv1d_fn(
                whole, *parameters, None, initial, True, activation="silu"
            )
            assert torch.equal(found[b], expected[0, :, n:]), (layout, n)
            assert torch.equal(state[b], final[0]), (layout, n)


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("width", (2, 4, 7))
def test_left_padding_is_as_no_padding(width, dtype, device):
    """Without initial states a row gives the same wherever in the padded batch it stands."""
    lengths, seqlen, dim = (1, 2, 3, 7, 12), 12, 21
    ids = [[-1] * (seqlen - n) + [0] * n for n in lengths]
    case = make((len(ids), dim, seqlen), ids, width, dtype, states=False, device=device)
    out, final = run_forward(case)
    for b, n in enumerate(lengths):
        expected, states = causal_conv1d_fn(
            case.x[b : b + 1, :, seqlen - n :],
            case.weight,
            case.bias,
            None,
            None,
            True,
            None,
            "silu",
        )
        assert torch.equal(out[b, :, seqlen - n :], expected[0])
        assert torch.equal(final[b], states[0])


# --------------------------------------------------------------------- final_states_out in place


@pytest.mark.parametrize("seq_idx", (False, True), ids=("", "seq_idx"))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
@pytest.mark.parametrize("width", (2, 4, 9))
def test_final_states_out_may_be_the_initial_states(width, layout, seq_idx, device):
    """For every length, shorter than the states and of several chunks."""
    threads = torch.get_num_threads()
    for seqlen in (0, 1, 2, 3, 7, 40, 200_001):
        dim = 3 if seqlen > 1000 else 70
        case = make_case((2, dim, seqlen), width, states=True, layout=layout, device=device)
        if seq_idx:
            ids = random_rows(2, seqlen, 3) if seqlen else torch.zeros(2, 0, dtype=torch.int32)
            case.seq_idx = ids.to(device)
        expected, expected_final = run_forward(case, layout)
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                states = lay_out(case.initial_states, layout)
                arguments = (case.x, case.weight, case.bias, case.seq_idx)
                found, final = causal_conv1d_fn(*arguments, states, True, states, "silu")
                assert final.data_ptr() == states.data_ptr()
                assert torch.equal(found, expected) and torch.equal(states, expected_final)
        finally:
            torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------- int64


@pytest.mark.parametrize("layout", ("contiguous", "transposed", "slice", "strided"))
@pytest.mark.parametrize("width", (4, 6))
def test_int64_ids_are_as_int32_ones(width, layout, device):
    ids = torch.cat([torch.tensor(chosen_rows(40)), random_rows(5, 40, 1)])
    ids[0, :3] = 2**31 - 1
    for where in ("channel_first", "channel_last"):
        case = make((len(ids), 9, 40), ids, width, layout=where, device=device)
        expected, gradients = run_forward(case), run_backward(case)
        case.seq_idx = lay_out(ids.long(), layout, device)
        for found, value in zip(run_forward(case), expected, strict=True):
            assert torch.equal(found, value)
        for name, found in run_backward(case).items():
            assert torch.equal(found, gradients[name]), name


@pytest.mark.parametrize("value", (2**31, -(2**31) - 1, 2**32, 2**63 - 1, -(2**63)))
def test_int64_ids_beyond_int32(value, device, tells_values):
    """An error on the CPU; on CUDA, which cannot look, their lower 32 bits count."""
    ids = torch.zeros(2, 12, dtype=torch.int64, device=device)
    ids[1, 5:7] = value
    case = make_case((2, 9, 12), states=True, device=device)
    case.seq_idx = ids
    if tells_values:
        message = rf"seq_idx must fit int32, got {value} at \(1, 5\)"
        with pytest.raises(RuntimeError, match="causal_conv1d_fn: " + message):
            run_forward(case)
        with pytest.raises(RuntimeError, match="causal_conv1d_bwd: " + message):
            run_backward(case)
    else:
        found = run_forward(case)
        case.seq_idx = ids.int()
        for a, b in zip(found, run_forward(case), strict=True):
            assert torch.equal(a, b)
