"""Extreme values: large, infinite, NaN, subnormal; SiLU element by element."""

import math

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    ALL_FLOATS,
    assert_backward,
    assert_forward,
    dtype_id,
    lay_out,
    make_case,
    ops,
)

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

LAYOUT_PAIR = ("channel_first", "channel_last")
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def pointwise(values, activation, layout="channel_first"):
    """act(values), by a convolution of width 1 with weight 1."""
    columns = 16
    padded = torch.nn.functional.pad(values, (0, -values.numel() % columns))
    x = lay_out(padded.view(1, columns, -1), layout)
    weight = torch.ones(columns, 1, dtype=values.dtype, device=values.device)
    out = causal_conv1d_fn(x, weight, activation=activation)
    return out.reshape(-1)[: values.numel()]


def pointwise_gradient(values, layout="channel_first"):
    """d silu / dz at values, in the same way."""
    columns = 16
    padded = torch.nn.functional.pad(values, (0, -values.numel() % columns))
    x = lay_out(padded.view(1, columns, -1), layout)
    weight = torch.ones(columns, 1, dtype=values.dtype, device=values.device)
    dx = torch.full_like(x, math.nan)
    ops.backward_out(
        x, weight, None, torch.ones_like(x), None, None, None, dx, None, None, None, True
    )
    return dx.reshape(-1)[: values.numel()]


def silu(z):
    return z * torch.sigmoid(z)


def dsilu(z):
    sigma = torch.sigmoid(z)
    return sigma * (1 + z * (1 - sigma))


def all_finite(dtype, device):
    """Every finite value of a 16-bit type."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    return values[torch.isfinite(values)].to(device)


@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_silu_of_float32_element_by_element(layout, device):
    """2e-6 relative wherever sigmoid(z) is a normal number; below that it may be taken as 0."""
    z = torch.cat([torch.linspace(-104, 104, 400_001), torch.logspace(-37, 38, 40_001)])
    z = torch.cat([z, -torch.logspace(-37, 2, 20_001)]).to(device)
    out, expected = pointwise(z, "silu", layout).double(), silu(z.double())
    tiny = torch.finfo(torch.float32).tiny
    is_normal = (torch.sigmoid(z.double()) >= tiny) & (expected.abs() >= tiny)
    assert is_normal.sum() > 400_000
    error = (out - expected).abs()
    worst = (error / expected.abs())[is_normal].max().item()
    assert worst <= 2e-6, worst
    assert (error <= tiny * z.double().abs().clamp(min=1))[~is_normal].all()


@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_derivative_of_silu_of_float32_element_by_element(layout, device):
    z = torch.linspace(-104, 104, 400_001, device=device)
    error = (pointwise_gradient(z, layout).double() - dsilu(z.double())).abs()
    assert error.max() <= 2e-6, error.max()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_silu_of_every_16_bit_value(layout, dtype, device):
    """sigmoid(z) to one unit in the last place of 1, so silu(z) to eps * |z|."""
    z = all_finite(dtype, device)
    out, expected = pointwise(z, "silu", layout).double(), silu(z.double())
    info = torch.finfo(dtype)
    allowed = info.eps * z.double().abs() + info.smallest_normal * info.eps
    assert torch.isfinite(out).all()
    assert ((out - expected).abs() <= allowed).all()
    gradient = pointwise_gradient(z, layout).double()
    assert ((gradient - dsilu(z.double())).abs() <= 2 * info.eps).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_the_identity_is_exact_for_every_16_bit_value(layout, dtype, device):
    """Subnormal ones included."""
    z = all_finite(dtype, device)
    assert torch.equal(pointwise(z, None, layout), z)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_the_identity_keeps_subnormals_and_extremes(layout, dtype, device):
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    values = [least, -least, 3 * least, info.smallest_normal / 2, info.max, info.min, 1.0]
    z = torch.tensor(values * 9, dtype=dtype, device=device)
    assert torch.equal(pointwise(z, None, layout), z)


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_large_values_of_either_sign(layout, dtype, device):
    """silu is z for a large z and vanishes for a large -z; its derivative is 1 and 0."""
    big = torch.finfo(dtype).max
    z = torch.tensor([100.0, 1e4, 3e4, big / 2, big] * 20, device=device).to(dtype)
    if dtype == torch.float64:
        z = z.fmin(torch.tensor(1e300, dtype=dtype, device=device))
    assert torch.equal(pointwise(z, "silu", layout), z)
    assert (pointwise(-z, "silu", layout).abs() <= 1e-30).all()
    torch.testing.assert_close(pointwise_gradient(z, layout), torch.ones_like(z))
    assert (pointwise_gradient(-z, layout).abs() <= 1e-30).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_infinity_and_nan_come_through(layout, dtype, activation, device):
    z = torch.tensor([math.inf, math.nan, 1.0] * 15, dtype=dtype, device=device)
    out = pointwise(z, activation, layout)
    assert (out[0::3] == math.inf).all() and out[1::3].isnan().all()
    assert torch.isfinite(out[2::3]).all()
    if activation is None:
        assert (pointwise(-z, None, layout)[0::3] == -math.inf).all()


@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_float16_overflows_to_infinity_and_not_before_the_end(layout, device):
    """Sums that leave the range of float16 on the way and come back are exact in float32."""
    x = lay_out(torch.tensor([[[60000.0, 60000.0, 60000.0]]], device=device).half(), layout)
    x = x.expand(1, 8, 3)
    weight = torch.tensor([[1.0, -1.0, 1.0]], device=device).half().expand(8, 3)
    expected = torch.tensor([60000.0, 0.0, 60000.0], device=device).half().expand(1, 8, 3)
    assert torch.equal(causal_conv1d_fn(x, weight), expected)
    assert (causal_conv1d_fn(x, weight.abs())[..., 1:] == math.inf).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_rounding_to_16_bits_is_to_nearest_even(layout, dtype, device):
    """Products of all 16-bit significands with one float32 weight, against torch's rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 500, generator=generator).to(dtype).to(device)
    weight = (1 + torch.rand(64, 1, generator=generator)).to(device)
    out = causal_conv1d_fn(lay_out(x, layout), weight)
    assert torch.equal(out, (x.float() * weight).to(dtype))
    half = 1 + torch.finfo(dtype).eps / 2  # halfway between 1 and the next value
    ones = torch.ones(1, 8, 9, dtype=dtype, device=device)
    out = causal_conv1d_fn(lay_out(ones, layout), torch.full((8, 1), half, device=device))
    assert torch.equal(out, ones)


@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_sums_have_the_documented_order(layout, device):
    """bias first, then k = 0..W-1, each a float32 sum."""
    x = lay_out(torch.ones(1, 8, 4, device=device), layout)
    weight = torch.tensor([[1e8, -1e8, 1.0, 0.0]], device=device).repeat(8, 1)
    bias = torch.full((8,), 1.0, device=device)
    # ((((1 + 1e8) - 1e8) + 1) + 0) = 1 as 1 is lost beside 1e8; any other order gives 0 or 2.
    assert (causal_conv1d_fn(x, weight, bias)[..., 3] == 1.0).all()


@pytest.mark.parametrize("layout", LAYOUT_PAIR)
def test_extreme_ids(layout, device):
    low, high = -(2**31), 2**31 - 1
    case = make_case((2, 8, 24), 4, states=True, layout=layout, device=device)
    ids = torch.tensor([[high] * 5 + [low] * 4 + [0] * 6 + [high] * 4 + [-1] * 2 + [1] * 3] * 2)
    ids[1, :5] = high - 1
    case.seq_idx = ids.int().to(device)
    assert_forward(case)
    assert_backward(case)


@pytest.mark.parametrize("layout", LAYOUT_PAIR)
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
def test_z_of_magnitude_50(layout, dtype, device):
    """Where exp is far from 1 on either side."""
    case = make_case((2, 16, 70), 4, dtype, layout=layout, device=device)
    case.x = lay_out(case.x * 50, layout)
    assert_forward(case)


def test_update_has_the_same_values_at_the_extremes(device):
    """As the forward, bit by bit."""
    values = torch.tensor([0.0, 1e-40, -1e-40, 50.0, -50.0, -90.0, 1e30, -1e30], device=device)
    weight = torch.ones(8, 1, device=device)
    state = torch.zeros(1, 8, 1, device=device)
    found = causal_conv1d_update(values[None], state, weight, None, "silu")
    expected = causal_conv1d_fn(values[None, :, None], weight, activation="silu")
    assert torch.equal(found, expected[:, :, 0])
