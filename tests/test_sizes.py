"""Every size: nothing at all, one of each, and very large."""

import math

import pytest
import torch
from helpers import (
    GRADIENTS,
    assert_backward,
    assert_forward,
    dtype_id,
    make_case,
    ops,
    run_backward,
    run_forward,
)
from test_update import assert_update, make_update
from tolerances import PARAM

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

EMPTY = [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0), (0, 5, 0)]


@pytest.mark.parametrize("seq_idx", (None, "padded"))
@pytest.mark.parametrize("states", (False, True), ids=("", "states"))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, layout, states, seq_idx, device):
    """Gradients of parameters are sums of nothing, but written; states pass through."""
    case = make_case(shape, 4, states=states, seq_idx=seq_idx, layout=layout, device=device)
    out, final = run_forward(case)
    assert out.shape == shape and final.shape == case.state_shape
    found = run_backward(case)
    for name in ("dweight", "dbias"):
        assert torch.equal(found[name], torch.zeros_like(found[name])), name
    if shape[2] == 0:
        if states:
            assert torch.equal(final, case.initial_states)
            assert torch.equal(found["dinitial_states"], case.dfinal_states)
        else:
            assert torch.equal(final, torch.zeros_like(final))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_through_autograd(shape, device):
    case = make_case(shape, 4, device=device)
    weight = case.weight.requires_grad_()
    out = causal_conv1d_fn(case.x, weight, case.bias, activation="silu")
    assert out.shape == shape
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("mode", ("shift", "ring", "indexed"))
@pytest.mark.parametrize(
    ("batch", "dim", "seqlen"), [(0, 5, 2), (2, 0, 2), (2, 5, 0), (0, 5, None)]
)
def test_empty_update_leaves_the_state_as_it_is(batch, dim, seqlen, mode, device):
    arguments = make_update(seqlen, batch=batch, dim=dim, mode=mode, device=device)
    before = arguments["conv_state"].clone()
    out = causal_conv1d_update(**arguments)
    assert out.shape == arguments["x"].shape
    assert torch.equal(arguments["conv_state"], before)


def test_state_without_room_for_anything(device):
    """width 1 needs no state at all."""
    assert_update(make_update(3, 1, 0, device=device))


@pytest.mark.parametrize("width", (1, 2, 4, 8, 9, 33))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_one_of_each(layout, width, device):
    for shape in ((1, 1, 1), (3, 1, 1), (1, 40, 1), (1, 1, 40)):
        case = make_case(shape, width, states=True, layout=layout, device=device)
        assert_forward(case)
        assert_backward(case, allow_zero=width == 1)


@pytest.mark.parametrize("width", (17, 64, 257))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_wide(layout, width, device):
    """Sequences shorter and longer than the window."""
    for seqlen in (3, 300):
        case = make_case((2, 5, seqlen), width, states=True, layout=layout, device=device)
        assert_forward(case)
        assert_backward(case)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize(
    "shape", [(1, 70_000, 5), (70_000, 2, 3), (1, 2, 1_000_003)], ids=("dim", "batch", "seqlen")
)
def test_one_large_size(shape, layout, dtype, device):
    case = make_case(shape, 4, dtype, states=True, layout=layout, device=device)
    assert_forward(case)
    assert_backward(case)


@pytest.mark.parametrize("width", (3, 4, 8))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
@pytest.mark.parametrize("where", ("channel_first_padded", "channel_first_slice", "strided"))
def test_nothing_of_a_row_in_its_last_part(where, dtype, width, device):
    """Channel-first, CUDA's parts of a row begin up to 16 bytes early, by where it lies in the
    tensor, and so the last of them may be past its end, where the poison is."""
    tile = 32 * (4 if dtype == torch.float32 and width <= 4 else 8)
    for seqlen in range(56 * tile - 8, 56 * tile + 4):
        assert_backward(make_case((2, 1, seqlen), width, dtype, layout=where, device=device))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
def test_nothing_of_a_row_in_its_last_part_but_the_next_row(dtype, device):
    tile = 128 if dtype == torch.float32 else 256
    for seqlen in range(56 * tile - 8, 56 * tile + 4):
        case = make_case((2, 3, seqlen), 4, dtype, device=device)
        expected = run_backward(case)
        case.x[:, ::2] = math.nan
        found = run_backward(case)
        for name in ("dx", "dweight", "dbias"):
            channel = (slice(None), 1) if name == "dx" else 1
            assert torch.equal(found[name][channel], expected[name][channel]), (seqlen, name)


def test_update_of_a_large_batch_and_dim(device):
    assert_update(make_update(1, batch=3, dim=70_000, device=device))
    assert_update(make_update(None, batch=1500, dim=8, device=device))


# Beyond 2^31: the result must be that of a small problem cut out of the large one.


@pytest.fixture
def room(cuda):
    """Skips unless the GPU has the memory."""

    def check(gibibytes):
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gibibytes:
            pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free:.0f} are free")

    yield check
    torch.cuda.empty_cache()


def huge(shape, layout, seed=0):
    order = (0, 1, 2) if layout == "channel_first" else (0, 2, 1)
    generator = torch.Generator("cuda").manual_seed(seed)
    block = torch.empty([shape[i] for i in order], dtype=torch.bfloat16, device="cuda")
    for part in block.flatten().split(2**28):
        part.normal_(generator=generator)
    return block.permute(order)


def parameters(dim, width=4):
    weight = torch.randn(dim, width, device="cuda", generator=torch.Generator("cuda"))
    return weight, torch.linspace(-1, 1, dim, device="cuda")


HUGE = {
    "seqlen": (1, 2, 2**30 + 77),
    "dim": (1, 2**16 + 9, 2**15 + 3),
    "batch": (2**16 + 3, 64, 515),
}


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize("shape", HUGE.values(), ids=HUGE.keys())
def test_more_than_2_to_the_31_elements(shape, layout, room):
    room(40)
    batch, dim, seqlen = shape
    assert batch * dim * seqlen > 2**31
    x, dout = huge(shape, layout), huge(shape, layout, seed=1)
    weight, bias = parameters(dim)
    out, dx = torch.empty_like(x), torch.empty_like(x)
    ops.forward_out(x, weight, bias, None, None, out, None, True)
    ops.backward_out(x, weight, bias, dout, None, None, None, dx, None, None, None, True)

    start = max(0, seqlen - 2000)  # the last row, and its end
    part = (slice(batch - 1, None), slice(dim - 1, None), slice(start, None))
    halo = x[batch - 1 :, dim - 1 :, max(0, start - 3) : start].contiguous()
    small_out, small_dx = torch.empty_like(x[part]), torch.empty_like(x[part])
    small = (x[part].contiguous(), weight[-1:], bias[-1:])
    states = halo if start else None
    ops.forward_out(*small, None, states, small_out, None, True)
    ops.backward_out(
        *small, dout[part].contiguous(), None, states, None, small_dx, None, None, None, True
    )
    assert torch.equal(out[part], small_out)
    assert torch.equal(dx[part], small_dx)

    # Without an activation dbias is the sum of dout; its last element takes the last channel.
    dbias = torch.empty_like(bias)
    ops.backward_out(x, weight, bias, dout, None, None, None, dx, None, dbias, None, False)
    parts = dout[:, -1].split(2**12 if batch > 1 else 1)
    total = sum(part.double().sum() for part in parts)
    assert abs(dbias[-1].double() - total) <= PARAM[torch.bfloat16] * math.sqrt(batch * seqlen)


@pytest.mark.parametrize("dimension", (0, 1, 2))
def test_strides_beyond_2_to_the_32(dimension, room):
    room(20)
    stride = 2**32 + 8
    shape = [3, 5, 17]
    shape[dimension] = 2
    block = torch.full((stride + 4096,), math.nan, dtype=torch.bfloat16, device="cuda")
    strides = [85, 17, 1]
    strides[dimension] = stride
    x = block.as_strided(shape, strides)
    case = make_case(tuple(shape), 4, torch.bfloat16, states=True, device="cuda")
    expected, _ = assert_forward(case)
    grads = assert_backward(case)
    x.copy_(case.x)
    case.x = x
    out, _ = run_forward(case)
    assert torch.equal(out, expected)
    found = run_backward(case)
    for name in GRADIENTS:
        tolerance = 0 if name in ("dx", "dinitial_states") else 1e-6
        torch.testing.assert_close(found[name], grads[name], rtol=tolerance, atol=tolerance)
