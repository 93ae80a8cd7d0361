"""SiLU and its derivative where exp leaves the range of the type, at infinity and at NaN.

Every operator, type and layout; wherever in vectors, tiles and rows the value stands.
"""

import math

import pytest
import torch
from helpers import (
    ALL_FLOATS,
    dtype_id,
    generator_of,
    lay_out,
    make_case,
    randn,
    reference_backward,
    reference_forward,
    run_backward,
    run_forward,
    sequence_ids,
)

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.reference import causal_conv1d_ref, causal_conv1d_update_ref

LAYOUTS = ("channel_first", "channel_last", "strided")
WIDTHS = (1, 4, 6, 9)
SPECIAL = (-math.inf, math.inf, math.nan)
# By magnitude; both signs are taken. float32's exp(-z) is a normal number up to 87.3 and finite up
# to 88.7; that of float64 up to 709.
ENDS = (
    *(
        20.0,
        60.0,
        80.0,
        85.0,
        87.25,
        87.5,
        88.0,
        88.25,
        88.5,
        88.625,
        88.75,
        89.0,
        90.0,
        95.0,
        100.0,
    ),
    *(103.0, 104.0, 110.0, 128.0, 200.0, 512.0, 700.0, 708.5, 709.5, 710.0, 745.0, 750.0, 1e3, 6e4),
    *(1e10, 1e30, 3e38, 1e300),
)


def finite_ends(dtype):
    largest = torch.finfo(dtype).max
    values = torch.tensor([v for v in (*ENDS, largest) if v <= largest], dtype=torch.float64)
    return torch.cat([values, -values]).to(dtype)


def dsilu(z):
    sigma = torch.sigmoid(z)
    return sigma * (1 + z * (1 - sigma))


def assert_at_the_ends(found, z, function, name):
    """found is function(z) in z's type; 0 stands for what is smaller than the type's sigmoid."""
    found, dtype, z = found.double(), z.dtype, z.double()
    expected = function(z)
    info = torch.finfo(dtype)
    assert torch.isfinite(found).all(), name
    error = (found - expected).abs()
    vanished = -750 if dtype == torch.float64 else -110
    assert not found[z <= vanished].any(), f"{name}: not 0 at {z[(z <= vanished) & (found != 0)]}"
    if dtype == torch.float64:
        allowed = 1e-13 * expected.abs() + 1e-305
    elif dtype == torch.float32:
        # 1e-37 to -88.5 and then between the value and 0.
        allowed = 2e-6 * expected.abs() + torch.where(z >= -88.5, 1e-37, 4e-37)
    else:
        # Where the fast sigmoid of these types counts, its error beside 1; then the value or 0.
        least = info.smallest_normal * info.eps
        near = 2 * info.eps * (1 + expected.abs())
        allowed = torch.where(z > -30, near, expected.abs() + least + 1e-37)
    wrong = error > allowed
    assert not wrong.any(), (
        f"{name}: at {z[wrong][:5]} {found[wrong][:5]}, not {expected[wrong][:5]}"
    )


def single_tap(dim, width, dtype, device):
    """A weight that leaves x as it is."""
    weight = torch.zeros(dim, width, dtype=dtype, device=device)
    weight[:, -1] = 1
    return weight


@pytest.mark.parametrize("seq_idx", (None, "packed"), ids=("", "packed"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
def test_finite_values(dtype, width, layout, seq_idx, device):
    dim, seqlen = 70, 260
    ends = finite_ends(dtype)
    picks = torch.randint(0, len(ends), (2, dim, seqlen), generator=generator_of(1))
    case = make_case((2, dim, seqlen), width, dtype, bias=False, device=device)
    case.x = lay_out(ends[picks], layout, device)
    case.dout = lay_out(torch.ones_like(case.x), layout)
    case.weight = single_tap(dim, width, dtype, device)
    if seq_idx:
        case.seq_idx = sequence_ids(2, seqlen, seq_idx).to(device)
    out, _ = run_forward(case, layout)
    assert_at_the_ends(out, case.x, torch.nn.functional.silu, "out")
    dx = run_backward(case, layout, wanted=("dx",))["dx"]
    assert_at_the_ends(dx, case.x, dsilu, "dx")


@pytest.mark.parametrize("tokens", (None, 1, 3, 70))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
def test_finite_values_in_update(dtype, width, tokens, device):
    dim, batch = 70, 12
    ends = finite_ends(dtype)
    shape = (batch, dim) if tokens is None else (batch, dim, tokens)
    for layout in ("contiguous", "transposed") if tokens is None else LAYOUTS:
        x = ends[torch.randint(0, len(ends), shape, generator=generator_of(2))]
        state = ends[torch.randint(0, len(ends), (batch, dim, 9), generator=generator_of(3))]
        x, state = lay_out(x, layout, device), state.to(device)
        out = causal_conv1d_update(
            x, state, single_tap(dim, width, dtype, device), activation="silu"
        )
        assert_at_the_ends(out, x, torch.nn.functional.silu, "out")


def assert_same_kind(found, expected, name, tolerance):
    """NaN where NaN is expected and infinity where that is; the rest is about as expected."""
    expected = expected.to(found.dtype).double()
    torch.testing.assert_close(
        found.double(),
        expected,
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


@pytest.mark.parametrize("value", SPECIAL, ids=("-inf", "inf", "nan"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
def test_infinity_and_nan_at_every_position(dtype, width, layout, value, device):
    """Each of the channels has it at another time, and each time in another channel."""
    size = 67
    for seq_idx in (None, "packed"):
        case = make_case(
            (2, size, size),
            width,
            dtype,
            states=True,
            seq_idx=seq_idx,
            layout=layout,
            device=device,
        )
        order = torch.randperm(size, generator=generator_of(1)).to(device)
        case.x[0, torch.arange(size, device=device), order] = value
        if width > 1:
            channels = torch.arange(size, device=device)
            case.initial_states[1, channels, channels % (width - 1)] = value
        tolerance = 60 * torch.finfo(dtype).eps
        found, final = run_forward(case, layout)
        expected, expected_final = reference_forward(case)
        assert not torch.isfinite(expected).all()
        assert_same_kind(found, expected, "out", tolerance)
        assert_same_kind(final, expected_final, "final_states", 0)
        gradients, expected = run_backward(case, layout), reference_backward(case)
        for name in ("dx", "dinitial_states"):
            assert_same_kind(gradients[name], expected[name], name, tolerance)
        for name in ("dweight", "dbias"):
            assert torch.equal(gradients[name].isfinite(), expected[name].isfinite()), name


@pytest.mark.parametrize("value", SPECIAL, ids=("-inf", "inf", "nan"))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
def test_infinity_and_nan_in_update(dtype, width, value, device):
    dim, tokens = 70, 5
    for layout in LAYOUTS:
        x = lay_out(randn(dim + 1, dim, tokens, dtype=dtype, seed=1), layout, device)
        state = randn(dim + 1, dim, width + 1, dtype=dtype, device=device, seed=2)
        weight = randn(dim, width, dtype=dtype, device=device, seed=3, scale=width**-0.5)
        channels = torch.arange(dim, device=device)
        x[channels, channels, channels % tokens] = value
        state[channels + 1, channels, channels % (width + 1)] = value
        wide = state.double().clone()
        expected = causal_conv1d_update_ref(
            x.double(), wide, weight.double(), None, activation="silu"
        )
        found = causal_conv1d_update(x, state, weight, None, "silu")
        assert_same_kind(found, expected, "out", 60 * torch.finfo(dtype).eps)
        assert_same_kind(state, wide, "conv_state", 0)


@pytest.mark.parametrize("z", (-88.5, -200.0, -1e30, -math.inf, math.inf, math.nan))
def test_one_value_is_as_the_reference_has_it(z, device):
    found = []
    for function in (causal_conv1d_fn, causal_conv1d_ref):
        x = torch.full((1, 1, 1), z, device=device, requires_grad=True)
        out = function(x, torch.ones(1, 1, device=device), activation="silu")
        found.append(torch.stack([out[0, 0, 0], torch.autograd.grad(out.sum(), x)[0][0, 0, 0]]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("width", (1, 4, 6))
def test_layouts_chunks_and_update_give_the_same_bits(width, dtype, device):
    """As elsewhere, at the ends too; NaN may be any."""
    dim, seqlen = 37, 96
    ends = torch.cat(
        [finite_ends(dtype), torch.tensor(SPECIAL).to(dtype), torch.zeros(200).to(dtype)]
    )
    x = ends[torch.randint(0, len(ends), (2, dim, seqlen), generator=generator_of(4))].to(device)
    weight = single_tap(dim, width, dtype, device)
    expected = causal_conv1d_fn(x, weight, activation="silu")
    for layout in LAYOUTS:
        found = causal_conv1d_fn(lay_out(x, layout), weight, activation="silu")
        assert_same_bits(found, expected)
    state = torch.zeros(2, dim, width - 1, dtype=dtype, device=device)
    states, outs = state.clone(), []
    for chunk in x.split((31, 1, 64), dim=-1):
        out, states = causal_conv1d_fn(chunk, weight, None, None, states, True, activation="silu")
        outs.append(out)
    assert_same_bits(torch.cat(outs, dim=-1), expected)
    outs = [causal_conv1d_update(x[..., t], state, weight, None, "silu") for t in range(seqlen)]
    assert_same_bits(torch.stack(outs, dim=-1), expected)


def assert_same_bits(found, expected):
    assert torch.equal(found.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    found, expected = (
        found.nan_to_num(0, math.inf, -math.inf),
        expected.nan_to_num(0, math.inf, -math.inf),
    )
    assert torch.equal(found.contiguous().view(bits), expected.contiguous().view(bits))
