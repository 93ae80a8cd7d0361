"""The backward operator equals the gradient of the reference, option by option."""

import math

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    ALL_FLOATS,
    FLOATS,
    GRADIENTS,
    LAYOUTS,
    allocate,
    assert_backward,
    assert_gradients,
    dtype_id,
    make_case,
    ops,
    run_backward,
)

from causal_conv1d import causal_conv1d_fn

SHAPE = (2, 24, 77)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", (1, 2, 3, 4, 5, 8, 9, 16))
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_every_width(layout, dtype, width, activation, device):
    assert_backward(
        make_case(
            SHAPE, width, dtype, activation=activation, layout=layout, states=True, device=device
        ),
        allow_zero=width == 1,
    )


@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("states", (False, True), ids=("", "states"))
@pytest.mark.parametrize("seq_idx", (None, "packed", "padded", "recurring"))
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_every_option(layout, dtype, seq_idx, states, bias, device):
    assert_backward(
        make_case(
            SHAPE, 4, dtype, bias=bias, states=states, seq_idx=seq_idx, layout=layout, device=device
        )
    )


@pytest.mark.parametrize("dx_layout", ("channel_first", "channel_last", "channel_last_slice"))
@pytest.mark.parametrize("dout_layout", (*LAYOUTS, "expanded"))
@pytest.mark.parametrize("layout", (*LAYOUTS, "expanded"))
def test_x_dout_and_dx_each_have_their_own_layout(layout, dout_layout, dx_layout, device):
    case = make_case((2, 9, 41), layout=layout, dout_layout=dout_layout, states=True, device=device)
    assert_backward(case, dx_layout)


@pytest.mark.parametrize("state_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_types_of_x_weight_and_states_are_independent(
    layout, dtype, weight_dtype, state_dtype, device
):
    for bias_dtype in FLOATS:
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
        assert_backward(case)


@pytest.mark.parametrize("grad_dtype", FLOATS, ids=dtype_id)
def test_dweight_and_dbias_come_in_any_type(grad_dtype, device):
    case = make_case(SHAPE, dtype=torch.bfloat16, states=True, device=device)
    found = {name: None for name in GRADIENTS}
    found["dx"] = torch.full_like(case.x, math.nan)
    found["dweight"] = allocate(case.weight.shape, "transposed", grad_dtype, device)
    found["dbias"] = allocate(case.bias.shape, "strided", grad_dtype, device)
    ops.backward_out(
        case.x,
        case.weight,
        case.bias,
        case.dout,
        None,
        case.initial_states,
        case.dfinal_states,
        found["dx"],
        found["dweight"],
        found["dbias"],
        None,
        case.silu,
    )
    assert_gradients(case, found)


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize("absent", GRADIENTS[1:])
def test_a_gradient_left_out_changes_no_other(absent, layout, device):
    case = make_case(SHAPE, states=True, layout=layout, device=device)
    everything = run_backward(case)
    wanted = [name for name in GRADIENTS if name != absent]
    found = assert_backward(case, wanted=wanted)
    assert found[absent] is None
    for name in wanted:
        assert torch.equal(found[name], everything[name])


@pytest.mark.parametrize("seqlen", (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129))
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_lengths_around_the_vector_sizes(layout, dtype, seqlen, device):
    for dim in (1, 7, 8, 9, 32, 33):
        assert_backward(
            make_case((2, dim, seqlen), 4, dtype, states=True, layout=layout, device=device)
        )


@pytest.mark.parametrize("seqlen", (255, 256, 257, 1023, 1024, 1025, 2047, 2049, 4100))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_lengths_around_the_tile_sizes(layout, seqlen, device):
    assert_backward(
        make_case((1, 40, seqlen), states=True, seq_idx="long", layout=layout, device=device)
    )


# Rows that one warp of the CUDA kernel takes in parts, that two or four share, that are alone, and
# more of them than a block takes.
@pytest.mark.parametrize(
    "shape",
    (
        (1, 5, 4096),
        (3, 3, 2500),
        (1, 2, 20011),
        (5, 1030, 600),
        (3, 1100, 1003),
        (40, 1025, 129),
        (2, 1026, 4099),
    ),
)
@pytest.mark.parametrize("seq_idx", (None, "packed"))
def test_how_many_parts_a_channel_has(seq_idx, shape, device):
    states = seq_idx is None
    assert_backward(
        make_case(shape, 4, torch.float32, states=states, seq_idx=seq_idx, device=device)
    )


@pytest.mark.parametrize("seqlen", (77, 80, 512))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_infinity_reaches_only_what_depends_on_it(layout, seqlen, device):
    """Without activation the last x of a row meets the last weight alone."""
    case = make_case((2, 9, seqlen), activation=None, layout=layout, device=device)
    expected = run_backward(case)
    case.x[0, :, -1] = math.inf
    found = run_backward(case)
    for name in ("dx", "dbias"):
        assert torch.equal(found[name], expected[name])
    assert torch.equal(found["dweight"][:, :-1], expected["dweight"][:, :-1])
    assert not torch.isfinite(found["dweight"][:, -1]).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_long_sums_for_dweight_and_dbias_stay_accurate(layout, dtype, device):
    """All terms positive, so that an accumulator narrower than float32 shows at once."""
    case = make_case((2, 8, 20_000), dtype=dtype, activation=None, layout=layout, device=device)
    case.x, case.dout = case.x.abs(), case.dout.abs()
    assert_backward(case)


@pytest.mark.parametrize("width", (2, 4, 7, 16))
@pytest.mark.parametrize("seqlen", (1, 2, 3, 6))
def test_short_sequences_pass_gradients_on_to_the_initial_state(seqlen, width, device):
    for seq_idx in (None, "packed"):
        assert_backward(
            make_case((2, 5, seqlen), width, states=True, seq_idx=seq_idx, device=device)
        )


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize("width", (3, 4, 7))
@pytest.mark.parametrize("seqlen", (40, 77, 256, 261))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
def test_no_gradient_comes_from_padding(dtype, seqlen, width, layout, device):
    """Whatever dout is there, NaN included, and whatever x is there; a row may end with it."""
    case = make_case((2, 8, seqlen), width, dtype, seq_idx="padded", layout=layout, device=device)
    is_padding = (case.seq_idx < 0)[:, None, :].expand(case.x.shape)
    assert is_padding.any() and not is_padding.all()
    expected = assert_backward(case)
    assert not expected["dx"][is_padding].any()
    case.dout[is_padding] = math.nan
    case.x[is_padding] = math.inf
    found = run_backward(case)
    for name in ("dx", "dweight", "dbias"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=dtype_id)
def test_gradients_have_the_type_of_their_argument(dtype, weight_dtype, device):
    case = make_case(
        SHAPE,
        dtype=dtype,
        weight_dtype=weight_dtype,
        bias_dtype=torch.float32,
        state_dtype=torch.float32,
        states=True,
        device=device,
    )
    case = case.map(lambda tensor: tensor.requires_grad_())
    out, final = causal_conv1d_fn(
        case.x,
        case.weight,
        case.bias,
        initial_states=case.initial_states,
        return_final_states=True,
        activation=case.activation,
    )
    inputs = (case.x, case.weight, case.bias, case.initial_states)
    dout, dfinal = case.dout.detach(), case.dfinal_states.detach()
    grads = torch.autograd.grad((out, final), inputs, (dout, dfinal))
    for grad, tensor in zip(grads, inputs, strict=True):
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape
    assert_gradients(case, dict(zip(GRADIENTS, grads, strict=True)))


@pytest.mark.parametrize("shape", ((3, 3, 1003), (2, 2, 1024), (2, 3, 517)), ids=str)
@pytest.mark.parametrize("seq_idx", (None, "padded"))
@pytest.mark.parametrize("states", (False, True), ids=("", "states"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", (3, 4, 7))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
def test_long_rows(dtype, width, activation, states, seq_idx, shape, device):
    """Rows of several tiles, of which the first and the last differ from those between."""
    case = make_case(
        shape,
        width,
        dtype,
        states=states,
        seq_idx=seq_idx,
        activation=activation,
        device=device,
    )
    assert_backward(case)
