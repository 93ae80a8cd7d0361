"""The forward operator equals the reference, option by option."""

import itertools

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    ALL_FLOATS,
    FLOATS,
    LAYOUTS,
    assert_forward,
    dtype_id,
    make_case,
    reference_forward,
)

from causal_conv1d import causal_conv1d_fn

SHAPE = (2, 24, 77)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", (1, 2, 3, 4, 5, 8, 9, 16))
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_every_width(layout, dtype, width, activation, device):
    assert_forward(
        make_case(
            SHAPE, width, dtype, activation=activation, layout=layout, states=True, device=device
        )
    )


@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("states", (False, True), ids=("", "states"))
@pytest.mark.parametrize("seq_idx", (None, "packed", "padded", "recurring"))
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_every_option(layout, dtype, seq_idx, states, bias, device):
    assert_forward(
        make_case(
            SHAPE,
            4,
            dtype,
            bias=bias,
            states=states,
            seq_idx=seq_idx,
            layout=layout,
            device=device,
        )
    )


@pytest.mark.parametrize("out_layout", (None, *LAYOUTS))
@pytest.mark.parametrize("layout", (*LAYOUTS, "expanded"))
def test_every_layout(layout, out_layout, device):
    case = make_case(SHAPE, layout=layout, states=True, seq_idx="padded", device=device)
    assert_forward(case, out_layout)


@pytest.mark.parametrize(
    "dtypes",
    [
        dtypes
        for dtypes in itertools.product(FLOATS, repeat=4)
        if len(set(dtypes)) > 1 and (dtypes[1] == dtypes[2] or dtypes[2] == dtypes[3])
    ],
    ids=lambda dtypes: "-".join(dtype_id(dtype) for dtype in dtypes),
)
def test_types_of_x_weight_bias_and_states_are_independent(dtypes, device):
    dtype, weight_dtype, bias_dtype, state_dtype = dtypes
    for layout in ("channel_first", "channel_last"):
        case = make_case(
            SHAPE,
            4,
            dtype,
            weight_dtype=weight_dtype,
            bias_dtype=bias_dtype,
            state_dtype=state_dtype,
            states=True,
            layout=layout,
            device=device,
        )
        assert_forward(case)


@pytest.mark.parametrize("param_layout", ("contiguous", "transposed", "slice", "strided"))
def test_any_layout_of_weight_bias_and_seq_idx(param_layout, device):
    for layout in ("channel_first", "channel_last"):
        case = make_case(
            SHAPE, seq_idx="padded", layout=layout, param_layout=param_layout, device=device
        )
        assert_forward(case)


@pytest.mark.parametrize("seqlen", (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129))
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_lengths_around_the_vector_sizes(layout, dtype, seqlen, device):
    for dim in (1, 7, 8, 9, 32, 33):
        case = make_case((2, dim, seqlen), 4, dtype, states=True, layout=layout, device=device)
        assert_forward(case)


@pytest.mark.parametrize("seqlen", (255, 256, 257, 1023, 1024, 1025, 2047, 2049, 4100))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_lengths_around_the_tile_sizes(layout, seqlen, device):
    case = make_case((1, 40, seqlen), states=True, seq_idx="long", layout=layout, device=device)
    assert_forward(case)


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_initial_state_feeds_only_the_first_segment(layout, device):
    """The second segment does not see the state, although its window reaches into it."""
    case = make_case((1, 8, 6), 4, states=True, layout=layout, device=device)
    case.seq_idx = torch.tensor([[5, 7, 7, 7, 7, 7]], dtype=torch.int32, device=device)
    out, _ = assert_forward(case)
    case.initial_states += 1
    changed, _ = assert_forward(case)
    assert not torch.equal(out[..., 0], changed[..., 0])
    assert torch.equal(out[..., 1:], changed[..., 1:])


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_padding_gives_zero(layout, device):
    case = make_case((2, 8, 40), states=True, seq_idx="padded", layout=layout, device=device)
    is_padding = (case.seq_idx < 0)[:, None, :].expand(case.x.shape)
    assert is_padding.any() and not is_padding.all()
    out, _ = assert_forward(case)
    assert not out[is_padding].any()
    assert out[~is_padding].ne(0).all()


@pytest.mark.parametrize("width", (2, 4, 7, 16))
@pytest.mark.parametrize("seqlen", (1, 2, 3, 6))
@pytest.mark.parametrize("states", (False, True), ids=("", "states"))
def test_final_states_of_short_sequences_keep_the_initial_state(states, seqlen, width, device):
    """With and without seq_idx: ids do not matter to the final state, but for padding."""
    for seq_idx in (None, "packed"):
        case = make_case((2, 5, seqlen), width, states=states, seq_idx=seq_idx, device=device)
        _, final = assert_forward(case)
        kept = min(width - 1, seqlen)
        assert torch.equal(final[..., width - 1 - kept :], case.x[..., seqlen - kept :])
        if states:
            assert torch.equal(
                final[..., : width - 1 - kept], case.initial_states[..., kept : width - 1]
            )
        else:
            assert not final[..., : width - 1 - kept].any()


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
def test_causal_conv1d_fn_is_the_operator(dtype, device):
    case = make_case(SHAPE, 4, dtype, states=True, seq_idx="packed", device=device)
    expected, expected_final = assert_forward(case)
    out, final = causal_conv1d_fn(
        case.x,
        case.weight,
        case.bias,
        case.seq_idx,
        case.initial_states,
        return_final_states=True,
        activation="swish",
    )
    assert out.dtype == final.dtype == dtype
    assert torch.equal(out, expected) and torch.equal(final, expected_final)


def test_reference_is_torch_conv1d(device):
    """The reference itself, against torch's own convolution, where that says the same."""
    case = make_case((2, 6, 50), 4, torch.float64, activation=None, device=device)
    expected = torch.nn.functional.conv1d(
        case.x, case.weight[:, None], case.bias, padding=3, groups=6
    )[..., :50]
    torch.testing.assert_close(reference_forward(case)[0], expected, rtol=1e-13, atol=1e-13)


def test_reference_of_packed_sequences_is_that_of_each_alone(device):
    case = make_case((1, 6, 12), 4, torch.float64, seq_idx="packed", device=device)
    lengths = [5, 1, 2, 4]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    case.seq_idx = ids[None].int().to(device)
    expected = []
    for x in case.x.split(lengths, dim=-1):
        alone = make_case((1, 6, 12), 4, torch.float64, device=device)
        alone.x = x
        expected.append(reference_forward(alone)[0])
    expected = torch.cat(expected, dim=-1)
    torch.testing.assert_close(reference_forward(case)[0], expected, rtol=1e-13, atol=1e-13)
