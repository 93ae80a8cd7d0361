"""Views as model code makes them; nothing outside a view is read into a result, or written."""

import math

import pytest
import torch
from helpers import (
    ALL_FLOATS,
    GRADIENTS,
    LAYOUTS,
    allocate,
    assert_backward,
    assert_forward,
    assert_untouched_outside,
    dtype_id,
    lay_out,
    layout,
    make_case,
    ops,
    randn,
    run_backward,
    run_forward,
)

from causal_conv1d import causal_conv1d_fn

B, D, L = 2, 12, 37


def first_half(device):
    """mamba_ssm: x, z = xz.chunk(2, dim=1)."""
    return torch.full((B, 2 * D, L), math.nan, device=device).chunk(2, dim=1)[0]


def half_of_dim_major(device):
    """mamba_ssm: xz comes from (d b) l, so that its strides are (L, B*L, 1)."""
    block = torch.full((2 * D, B, L), math.nan, device=device)
    return block.permute(1, 0, 2).chunk(2, dim=1)[0]


def split_of_projection(device):
    """mamba_ssm: xBC is split from a projection whose width is no multiple of 8."""
    block = torch.full((B, L, 7 + D + 2), math.nan, device=device)
    return block.split([7, D, 2], dim=-1)[1].transpose(1, 2)


def narrow_in_time(device):
    return torch.full((B, D, L + 6), math.nan, device=device).narrow(2, 5, L)


VIEWS = (first_half, half_of_dim_major, split_of_projection, narrow_in_time)


def view_id(function):
    return function.__name__


@pytest.mark.parametrize("make_out", VIEWS, ids=view_id)
@pytest.mark.parametrize("make_x", VIEWS, ids=view_id)
def test_models_views(make_x, make_out, device):
    """x, dout, out and dx are views; the memory around x and dout is NaN, that around out stays."""
    case = make_case((B, D, L), 4, device=device)
    expected, _ = assert_forward(case)
    expected_grads = assert_backward(case)
    case.x = make_x(device).copy_(case.x)
    case.dout = make_out(device).copy_(case.dout)
    out, dx = make_out(device), make_out(device)
    dweight, dbias = torch.empty_like(case.weight), torch.empty_like(case.bias)
    common = (case.x, case.weight, case.bias)
    ops.forward_out(*common, None, None, out, None, True)
    ops.backward_out(*common, case.dout, None, None, None, dx, dweight, dbias, None, True)
    assert torch.equal(out, expected)
    assert torch.equal(dx, expected_grads["dx"])
    assert_untouched_outside(out)
    assert_untouched_outside(dx)
    assert_backward(case)


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("seqlen", (1, 2, 7, 16, 33))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_around_outputs_stays(layout, seqlen, dtype, device):
    case = make_case(
        (B, 9, seqlen), 4, dtype, states=True, seq_idx="padded", layout=layout, device=device
    )
    out, final = run_forward(case, layout)
    grads = run_backward(case, layout)
    for view in (out, final, grads["dx"], grads["dinitial_states"]):
        assert_untouched_outside(view)
    for view in (out, final, grads["dx"], grads["dweight"], grads["dbias"]):
        assert torch.isfinite(view).all()


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("seq_idx", (None, "padded"))
@pytest.mark.parametrize("width", (3, 4, 6))
@pytest.mark.parametrize("shape", ((1, 1, 3), (1, 1, 227), (B, 3, 37), (B, 3, 1021)))
def test_rows_that_begin_aligned_and_end_in_a_vector(shape, width, seq_idx, dtype, device):
    """What follows a row within 16 bytes of memory is not written."""
    rows = layout((0, 1, 2), tails=(0, 0, -shape[2] % 16))
    case = make_case(shape, width, dtype, seq_idx=seq_idx, layout=rows, device=device)
    assert_forward(case, rows, allow_zero=True)
    for view in (run_forward(case, rows)[0], run_backward(case, rows)["dx"]):
        assert_untouched_outside(view)
        assert torch.isfinite(view).all()


def test_memory_around_dweight_and_dbias_stays(device):
    case = make_case((B, D, L), 4, device=device)
    expected = run_backward(case)
    dx = torch.empty_like(case.x)
    for where in ("slice", "strided"):
        dweight, dbias = (allocate(t.shape, where, device=device) for t in (case.weight, case.bias))
        ops.backward_out(
            case.x,
            case.weight,
            case.bias,
            case.dout,
            None,
            None,
            None,
            dx,
            dweight,
            dbias,
            None,
            True,
        )
        for found, name in ((dweight, "dweight"), (dbias, "dbias")):
            assert torch.equal(found, expected[name])
            assert_untouched_outside(found)


@pytest.mark.parametrize("transposed", (False, True), ids=("channel_first", "channel_last"))
def test_input_and_output_may_interleave_in_one_block(transposed, device):
    """Halves of one allocation that share no element are not an overlap."""
    case = make_case((B, D, L), 4, device=device)
    expected, _ = run_forward(case)
    expected_dx = run_backward(case)["dx"]
    if transposed:
        halves = torch.empty(B, L, 2 * D, device=device).transpose(1, 2).chunk(2, dim=1)
    else:
        halves = torch.empty(B, 2 * D, L, device=device).chunk(2, dim=1)
    x = halves[0].copy_(case.x)
    ops.forward_out(x, case.weight, case.bias, None, None, halves[1], None, True)
    assert torch.equal(halves[1], expected) and torch.equal(x, case.x)
    common = (x, case.weight, case.bias, case.dout, None, None, None)
    ops.backward_out(*common, halves[1], None, None, None, True)
    assert torch.equal(halves[1], expected_dx) and torch.equal(x, case.x)


@pytest.mark.parametrize("where", ("expanded batch", "expanded dim", "expanded seqlen"))
def test_expanded_inputs(where, device):
    """Stride 0 over any dimension of x and dout."""
    case = make_case((3, D, L), 4, device=device)
    dim = ("expanded batch", "expanded dim", "expanded seqlen").index(where)
    case.x = case.x.narrow(dim, 0, 1).expand(3, D, L)
    case.dout = case.dout.narrow(dim, 0, 1).expand(3, D, L)
    assert_forward(case)
    assert_backward(case)


@pytest.mark.parametrize("name", ("weight", "bias", "seq_idx", "initial_states", "dfinal_states"))
def test_expanded_other_inputs(name, device):
    case = make_case((3, D, L), 4, states=True, seq_idx="packed", device=device)
    value = getattr(case, name)
    setattr(case, name, value[:1].expand(value.shape))
    assert_forward(case)
    assert_backward(case)


def test_expanded_input_through_autograd(device):
    """The gradient of what was expanded is the sum over its copies."""
    weight = randn(D, 4, device=device)
    x = randn(1, D, L, device=device, seed=1).requires_grad_()
    causal_conv1d_fn(x.expand(3, D, L), weight, activation="silu").sum().backward()
    single = x.detach().clone().requires_grad_()
    causal_conv1d_fn(single, weight, activation="silu").sum().backward()
    torch.testing.assert_close(x.grad, 3 * single.grad, rtol=1e-6, atol=1e-6)


# What one element touches: outputs t..t+W-1 of its row and channel within its segment.


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("width", (1, 2, 4, 7, 9))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_one_bad_input_touches_its_window_only(layout, width, bad, device):
    case = make_case((B, D, L), width, layout=layout, device=device)
    case.weight[case.weight == 0] = 1
    expected, _ = run_forward(case)
    expected_dx = run_backward(case)["dx"]
    for t in (0, 1, 15, 16, L - 1):
        x = case.x
        case.x = lay_out(x, layout)
        case.x[1, 5, t] = bad
        out, _ = run_forward(case)
        dx = run_backward(case)["dx"]
        case.x = x
        touched = torch.zeros(B, D, L, dtype=torch.bool, device=device)
        touched[1, 5, t : t + width] = True
        assert torch.equal(out[~touched], expected[~touched])
        assert not torch.isfinite(out[touched]).logical_and(out[touched] != 0).any()
        # The gradient reaches back from each of those outputs by another window.
        touched[1, 5, max(0, t - width + 1) : t + width] = True
        assert torch.equal(dx[~touched], expected_dx[~touched])


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_one_bad_dout_touches_its_window_only(layout, device):
    case = make_case((B, D, L), 4, layout=layout, device=device)
    expected = run_backward(case)
    for t in (0, 1, 15, 16, L - 1):
        dout = case.dout
        case.dout = lay_out(dout, layout)
        case.dout[1, 5, t] = math.nan
        found = run_backward(case)
        case.dout = dout
        touched = torch.zeros(B, D, L, dtype=torch.bool, device=device)
        touched[1, 5, max(0, t - 3) : t + 1] = True
        assert found["dx"][touched].isnan().all()
        assert torch.equal(found["dx"][~touched], expected["dx"][~touched])
        for name in ("dweight", "dbias"):
            others = [d for d in range(D) if d != 5]
            assert found[name][5].isnan().all()
            assert torch.equal(found[name][others], expected[name][others])


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_a_bad_segment_does_not_leak_into_its_neighbours(layout, bad, device):
    """Segments shorter and longer than the window, beside one full of NaN or Inf, and padding."""
    case = make_case((B, D, L), 4, layout=layout, states=True, device=device)
    lengths = torch.tensor([3, 1, 2, 9, 6, 16])
    ids = torch.repeat_interleave(torch.tensor([0, 1, 2, 3, -1, 4]), lengths)
    case.seq_idx = ids.int().repeat(B, 1).to(device)
    case.dfinal_states = None
    expected, _ = assert_forward(case)
    expected_dx = assert_backward(case)["dx"]
    x, dout = case.x, case.dout
    for segment in (0, 1, 2, 3, -1, 4):
        inside = (case.seq_idx == segment)[:, None].expand(B, D, L)
        case.x, case.dout = lay_out(x, layout), lay_out(dout, layout)
        case.x[inside] = bad
        case.dout[inside] = bad
        out, _ = run_forward(case)
        dx = run_backward(case)["dx"]
        assert torch.equal(out[~inside], expected[~inside]), segment
        assert torch.equal(dx[~inside], expected_dx[~inside]), segment


def test_a_bad_initial_state_touches_the_first_outputs_only(device):
    case = make_case((B, D, L), 4, states=True, device=device)
    expected, _ = run_forward(case)
    case.initial_states[1, 5] = math.nan
    out, _ = run_forward(case)
    touched = torch.zeros(B, D, L, dtype=torch.bool, device=device)
    touched[1, 5, :3] = True
    assert out[touched].isnan().all()
    assert torch.equal(out[~touched], expected[~touched])


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_other_rows_and_channels_full_of_nan_do_not_leak(layout, device):
    case = make_case((3, D, L), 4, layout=layout, device=device)
    expected, _ = run_forward(case)
    grads = run_backward(case)
    for name in ("x", "dout"):
        bad = lay_out(getattr(case, name), layout)
        bad[0], bad[2] = math.nan, math.nan
        bad[1, 1::2] = math.nan
        setattr(case, name, bad)
    out, _ = run_forward(case)
    found = run_backward(case)
    assert torch.equal(out[1, ::2], expected[1, ::2])
    assert torch.equal(found["dx"][1, ::2], grads["dx"][1, ::2])


def test_inputs_stay_as_they_are(device):
    case = make_case((B, D, L), 4, states=True, seq_idx="padded", device=device)
    before = {k: v.clone() for k, v in vars(case).items() if isinstance(v, torch.Tensor)}
    run_forward(case)
    found = run_backward(case)
    assert all(found[name] is not None for name in GRADIENTS)
    for name, value in before.items():
        assert torch.equal(getattr(case, name), value), name
