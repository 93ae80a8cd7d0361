"""Outputs are equal bit by bit, however x lies in memory and however a sequence is cut."""

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    ALL_FLOATS,
    LAYOUTS,
    allocate,
    assert_backward,
    dtype_id,
    lay_out,
    make_case,
    ops,
    run_backward,
    run_forward,
)

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

WIDTHS = (1, 2, 4, 5, 8, 9)
SHAPE = (2, 19, 83)

pytestmark = [
    pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id),
    pytest.mark.parametrize("activation", ACTIVATIONS),
]


def fn(case, x, **options):
    return causal_conv1d_fn(x, case.weight, case.bias, activation=case.activation, **options)


@pytest.mark.parametrize("seq_idx", (None, "padded"))
@pytest.mark.parametrize("width", WIDTHS)
def test_every_layout_of_x_and_out(width, seq_idx, dtype, activation, device):
    case = make_case(
        SHAPE, width, dtype, states=True, seq_idx=seq_idx, activation=activation, device=device
    )
    expected, expected_final = run_forward(case)
    values, states = case.x, case.initial_states
    for where in LAYOUTS:
        case.x = lay_out(values, where)
        case.initial_states = lay_out(states, where)
        for out_where in (None, "channel_first", "channel_last"):
            out, final = run_forward(case, out_where)
            assert torch.equal(out, expected), (where, out_where)
            assert torch.equal(final, expected_final), (where, out_where)


@pytest.mark.parametrize("width", WIDTHS)
def test_dx_in_every_layout(width, dtype, activation, device):
    """dx and dinitial_states are sums over the taps, in the same order whatever the layout."""
    case = make_case(SHAPE, width, dtype, states=True, activation=activation, device=device)
    x, dout = case.x, case.dout
    expected = run_backward(case, "channel_first")
    for where in ("channel_first_slice", "channel_last", "channel_last_slice", "strided"):
        case.x, case.dout = lay_out(x, where), lay_out(dout, where)
        found = run_backward(case, where)
        for name in ("dx", "dinitial_states"):
            assert torch.equal(found[name], expected[name]), (where, name)


@pytest.mark.parametrize("states", (False, True))
@pytest.mark.parametrize("width", (2, 4, 7))
def test_dx_wherever_a_row_is_divided(width, states, dtype, activation, device):
    """Channel-last, a row is cut into chunks along time, some of which share what lies between."""
    for seqlen in (*range(1, 12), *range(60, 150)):
        case = make_case(
            (1, 40, seqlen), width, dtype, states=states, activation=activation, device=device
        )
        expected = run_backward(case, "channel_first")
        case.x, case.dout = (lay_out(t, "channel_last") for t in (case.x, case.dout))
        found = assert_backward(case, "channel_last")
        for name in ("dx", "dinitial_states") if states else ("dx",):
            assert torch.equal(found[name], expected[name]), (seqlen, name)


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_every_alignment(layout, dtype, activation, device):
    case = make_case((1, 16, 64), 4, dtype, layout=layout, activation=activation, device=device)
    expected = fn(case, case.x)
    order = (0, 1, 2) if layout == "channel_first" else (0, 2, 1)
    for offset in range(1, 17):
        block = torch.full((16 * 64 + offset,), torch.nan, dtype=dtype, device=device)
        shape = [case.x.shape[i] for i in order]
        x = block[offset:].view(shape).permute(order)
        x.copy_(case.x)
        assert torch.equal(fn(case, x), expected), offset


@pytest.mark.parametrize("shape", ((3, 5, 1003), (4, 3, 261), (5, 7, 20), (9, 2, 517), (2, 3, 7)))
def test_gradients_of_rows_wherever_they_lie(shape, dtype, activation, device):
    """Rows of any alignment, one after the other or with gaps; sums as well have one order."""
    case = make_case(shape, 4, dtype, activation=activation, device=device)

    def placed(values, offset, gap):
        batch, dim, seqlen = values.shape
        block = torch.full((offset + batch * dim * (seqlen + gap),), torch.nan, dtype=dtype)
        block = block.to(device)
        rows = block[offset:].view(batch, dim, seqlen + gap)[..., :seqlen]
        return rows.copy_(values), block

    def gradients(x, dout, dx):
        dweight, dbias = torch.empty_like(case.weight), torch.empty_like(case.bias)
        silu = activation is not None
        ops.backward_out(
            x, case.weight, case.bias, dout, None, None, None, dx, dweight, dbias, None, silu
        )
        return dx, dweight, dbias

    expected = gradients(case.x, case.dout, torch.full_like(case.x, torch.nan))
    x, dout = case.x, case.dout
    for offset, gap in ((0, 0), (1, 0), (7, 0), (0, 1), (3, 5), (8, 13), (5, 0)):
        for moved in ("x", "dout", "dx", "all"):
            to_x, to_dout, to_dx = (
                (offset, gap) if moved in (name, "all") else (0, 0) for name in ("x", "dout", "dx")
            )
            dx, block = placed(torch.full_like(x, torch.nan), *to_dx)
            found = gradients(placed(x, *to_x)[0], placed(dout, *to_dout)[0], dx)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b), (offset, gap, moved)
            assert block.isnan().sum() == block.numel() - x.numel(), "written beside dx"


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize("width", WIDTHS)
def test_whole_equals_chunks_with_states(width, layout, dtype, activation, device):
    case = make_case(
        SHAPE, width, dtype, states=True, activation=activation, layout=layout, device=device
    )
    expected, expected_final = run_forward(case)
    for lengths in ((40, 43), (1, 2, 3, 77), (64, 16, 1, 1, 1), (1,) * 83):
        states, outs = case.initial_states, []
        for chunk in case.x.split(lengths, dim=-1):
            out, states = fn(case, chunk, initial_states=states, return_final_states=True)
            outs.append(out)
        assert torch.equal(torch.cat(outs, dim=-1), expected), lengths
        assert torch.equal(states, expected_final), lengths


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize("width", WIDTHS)
def test_whole_equals_packed_chunks_of_seq_idx(width, layout, dtype, activation, device):
    """Sequences packed in one row by seq_idx equal each sequence alone."""
    case = make_case((1, 19, 83), width, dtype, activation=activation, layout=layout, device=device)
    lengths = [1, 2, 30, 3, 40, 7]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    packed = fn(case, case.x, seq_idx=ids[None].int().to(device))
    alone = [fn(case, x) for x in case.x.split(lengths, dim=-1)]
    assert torch.equal(packed, torch.cat(alone, dim=-1))


@pytest.mark.parametrize("tokens", (1, 2, 5))
@pytest.mark.parametrize("mode", ("shift", "ring"))
@pytest.mark.parametrize("width", WIDTHS)
def test_whole_equals_token_by_token(width, mode, tokens, dtype, activation, device):
    case = make_case((2, 19, 40), width, dtype, activation=activation, device=device)
    expected = fn(case, case.x)
    for state_len in (width - 1, width, width + 5):
        if mode == "ring" and state_len == 0:
            continue  # a ring without positions
        state = torch.zeros(2, 19, state_len, dtype=dtype, device=device)
        outs = []
        for start in range(0, 40, tokens):
            seqlens = None
            if mode == "ring":
                seqlens = torch.full((2,), start, dtype=torch.int32, device=device)
            out = causal_conv1d_update(
                case.x[..., start : start + tokens],
                state,
                case.weight,
                case.bias,
                activation,
                cache_seqlens=seqlens,
            )
            outs.append(out)
        assert torch.equal(torch.cat(outs, dim=-1), expected), state_len


def test_update_in_every_layout(dtype, activation, device):
    case = make_case((3, 19, 6), 4, dtype, states=True, activation=activation, device=device)
    state = lay_out(case.initial_states, "channel_first")
    expected = causal_conv1d_update(case.x, state, case.weight, case.bias, activation)
    for where in LAYOUTS:
        for state_where in LAYOUTS:
            x = lay_out(case.x, where)
            other = allocate(state.shape, state_where, dtype, device).copy_(case.initial_states)
            out = causal_conv1d_update(x, other, case.weight, case.bias, activation)
            assert torch.equal(out, expected), (where, state_where)
            assert torch.equal(other, state), (where, state_where)


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_a_row_does_not_depend_on_batch_or_channels_beside_it(layout, dtype, activation, device):
    case = make_case((5, 19, 83), 4, dtype, activation=activation, layout=layout, device=device)
    expected = fn(case, case.x)
    for b, d in ((0, slice(0, 1)), (4, slice(18, 19)), (2, slice(3, 12))):
        out = causal_conv1d_fn(
            case.x[b : b + 1, d], case.weight[d], case.bias[d], activation=activation
        )
        assert torch.equal(out, expected[b : b + 1, d])


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize("width", (2, 4, 7))
def test_dx_of_packed_sequences_equals_each_alone(width, layout, dtype, activation, device):
    """Wherever in tiles and groups of rows sequences begin; where ids are negative dx is zero."""
    lengths = (1, 2, 126, 3, 124, 256, 5, 300, 4, 129, 150)
    ids = torch.tensor((0, 1, 2, 0, 3, 4, -1, 5, 6, -1, 7))  # 0 comes back
    case = make_case(
        (2, 136, sum(lengths)), width, dtype, activation=activation, layout=layout, device=device
    )
    row = torch.repeat_interleave(ids, torch.tensor(lengths)).int().to(device)
    case.seq_idx = row.expand(2, -1).contiguous()
    packed = run_backward(case)["dx"].split(lengths, dim=-1)
    xs, douts = case.x.split(lengths, dim=-1), case.dout.split(lengths, dim=-1)
    case.seq_idx = None
    for i in range(len(lengths)):
        case.x, case.dout = xs[i], douts[i]
        expected = run_backward(case, layout)["dx"] if ids[i] >= 0 else torch.zeros_like(xs[i])
        assert torch.equal(packed[i], expected), i


@pytest.mark.parametrize("width", (2, 4, 7))
def test_gradients_wherever_channels_begin(width, dtype, activation, device):
    """channel_last, slices of wider tensors from a channel on that is 16-byte aligned, or less,
    or not at all, x's and dout's not alike; the last warp has some channels, or one vector."""
    for dim in (8, 136, 260):
        case = make_case(
            (2, dim, 150), width, dtype, activation=activation, layout="channel_last", device=device
        )
        x, dout = case.x, case.dout
        expected = run_backward(case, "channel_last")
        for begins in ((4, 4), (8, 4), (4, 0), (2, 2), (1, 3)):
            wide = [torch.full((2, 150, dim + 16), 3.0, dtype=dtype, device=device) for _ in begins]
            case.x, case.dout = (
                w[:, :, n : n + dim].transpose(1, 2) for w, n in zip(wide, begins, strict=True)
            )
            case.x.copy_(x)
            case.dout.copy_(dout)
            found = run_backward(case, "channel_last")
            for name in ("dx", "dweight", "dbias"):
                assert torch.equal(found[name], expected[name]), (dim, begins, name)


@pytest.mark.parametrize("kind", ("packed", "padded", "recurring"))
@pytest.mark.parametrize("width", (3, 4, 5, 6, 7, 8))
def test_ids_of_whole_warps(width, kind, dtype, activation, device):
    """Rows of channels that fill warps, with ids that change all the time: as with any strides.
    What x is in padding changes nothing."""
    case = make_case(
        (2, 136, 150), width, dtype, seq_idx=kind, activation=activation, device=device
    )
    x, dout = case.x, case.dout
    case.x, case.dout = lay_out(x, "strided"), lay_out(dout, "strided")
    expected_out, expected = run_forward(case, "strided")[0], run_backward(case, "strided")
    x = x.masked_fill((case.seq_idx < 0)[:, None, :], float("nan"))
    case.x, case.dout = lay_out(x, "channel_last"), lay_out(dout, "channel_last")
    found = run_backward(case, "channel_last")
    assert torch.equal(run_forward(case, "channel_last")[0], expected_out)
    assert torch.equal(found["dx"], expected["dx"])
    torch.testing.assert_close(found["dweight"], expected["dweight"], rtol=1e-3, atol=1e-3)
