"""The update of a decode state equals the reference: out and the state."""

import math

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    ALL_FLOATS,
    FLOATS,
    LAYOUTS,
    allocate,
    assert_close,
    assert_untouched_outside,
    dtype_id,
    lay_out,
    ops,
    randn,
)
from tolerances import OUT

from causal_conv1d import causal_conv1d_update
from causal_conv1d.reference import causal_conv1d_update_ref

BATCH, DIM = 3, 20
MODES = ("shift", "ring", "indexed", "indexed ring")


def make_update(
    seqlen=1,
    width=4,
    state_len=None,
    dtype=torch.float32,
    *,
    batch=BATCH,
    dim=DIM,
    weight_dtype=None,
    bias_dtype=None,
    state_dtype=None,
    bias=True,
    mode="shift",
    layout="contiguous",
    state_layout="contiguous",
    device="cpu",
):
    """Arguments of causal_conv1d_update by name; seqlen None gives x without a time dimension."""
    weight_dtype = weight_dtype or dtype
    state_len = width - 1 if state_len is None else state_len
    rows = batch + 3 if "indexed" in mode else batch
    x_shape = (batch, dim) if seqlen is None else (batch, dim, seqlen)
    state = randn(rows, dim, state_len, dtype=state_dtype or dtype, seed=2)
    arguments = {
        "x": lay_out(randn(*x_shape, dtype=dtype, seed=1), layout, device),
        "conv_state": lay_out(state, state_layout, device),
        "weight": randn(dim, width, dtype=weight_dtype, device=device, seed=3, scale=width**-0.5),
        "bias": randn(dim, dtype=bias_dtype or weight_dtype, device=device, seed=4),
        "cache_seqlens": None,
        "conv_state_indices": None,
    }
    if not bias:
        arguments["bias"] = None
    if "ring" in mode:
        starts = torch.arange(batch, dtype=torch.int32) * 5 + 2
        arguments["cache_seqlens"] = starts.to(device)
    if "indexed" in mode:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(5))
        arguments["conv_state_indices"] = order[:batch].int().to(device)
    return arguments


def reference_update(arguments, activation, power=1):
    """out and conv_state in float64; with power=2 the sums of the squares of out's terms."""
    wide = {
        name: value.double() ** power if value is not None and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    wide["conv_state"] = wide["conv_state"].clone()
    return causal_conv1d_update_ref(**wide, activation=activation), wide["conv_state"]


def typical_update(arguments):
    return reference_update(arguments, None, power=2)[0].sqrt()


def assert_update(arguments, activation="silu", allow_zero=False):
    """out and conv_state equal the reference's; returns out."""
    expected, expected_state = reference_update(arguments, activation)
    typical = typical_update(arguments)
    conv_state = arguments["conv_state"]
    out = causal_conv1d_update(**arguments, activation=activation)
    x = arguments["x"]
    assert out.dtype == x.dtype and out.shape == x.shape
    assert_close(out, expected, OUT[x.dtype], typical, allow_zero, "out")
    assert torch.equal(conv_state, expected_state.to(conv_state.dtype)), "conv_state"
    if conv_state._base is not None:
        assert_untouched_outside(conv_state)
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", (1, 2, 3, 4, 5, 8, 9, 16))
@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("seqlen", (None, 1, 3, 25))
def test_every_width(seqlen, dtype, width, mode, device):
    for state_len in (width - 1, width, width + 6):
        if state_len == 0 and "ring" in mode:
            continue  # a ring without positions
        assert_update(make_update(seqlen, width, state_len, dtype, mode=mode, device=device))


@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seqlen", (None, 1, 2, 7, 40))
def test_every_option(seqlen, mode, activation, bias, device):
    assert_update(make_update(seqlen, mode=mode, bias=bias, device=device), activation)


@pytest.mark.parametrize("state_layout", LAYOUTS)
@pytest.mark.parametrize("layout", (*LAYOUTS, "expanded"))
def test_every_layout(layout, state_layout, device):
    for mode in ("shift", "indexed ring"):
        assert_update(
            make_update(5, 4, 6, mode=mode, layout=layout, state_layout=state_layout, device=device)
        )


@pytest.mark.parametrize("layout", ("contiguous", "transposed", "slice", "strided", "expanded"))
def test_every_layout_of_a_single_token(layout, device):
    for dtype in FLOATS:
        assert_update(make_update(None, 4, 4, dtype, layout=layout, device=device))


@pytest.mark.parametrize("state_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_types_of_x_weight_bias_and_state_are_independent(dtype, weight_dtype, state_dtype, device):
    for bias_dtype in FLOATS:
        for seqlen in (None, 5):
            assert_update(
                make_update(
                    seqlen,
                    dtype=dtype,
                    weight_dtype=weight_dtype,
                    bias_dtype=bias_dtype,
                    state_dtype=state_dtype,
                    device=device,
                )
            )


@pytest.mark.parametrize("dim", (1, 2, 7, 8, 33, 257))
@pytest.mark.parametrize("batch", (1, 2, 65))
def test_every_size(batch, dim, device):
    for dtype in FLOATS:
        assert_update(make_update(None, batch=batch, dim=dim, dtype=dtype, device=device))


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", (64, 128, 130, 136, 200))
def test_few_tokens_of_many_channels(dim, mode, layout, device):
    """Some kernels take whole vectors of tokens and of states, others a warp's states together."""
    for dtype in FLOATS:
        for seqlen in (None, 2, 4):
            for state_len in (3, 4):
                arguments = make_update(
                    seqlen,
                    4,
                    state_len,
                    dtype,
                    dim=dim,
                    mode=mode,
                    layout="contiguous" if seqlen is None else layout,
                    state_layout=layout,
                    device=device,
                )
                assert_update(arguments)


@pytest.mark.parametrize("start", (0, 1, 4, 5, 6, 2**31 - 1, 2**31 - 5))
@pytest.mark.parametrize("seqlen", (None, 3, 12))
def test_ring_positions_are_modulo_the_state_length(seqlen, start, device):
    arguments = make_update(seqlen, 4, 5, mode="ring", device=device)
    arguments["cache_seqlens"].fill_(start)
    assert_update(arguments)


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dim", (1, 20))
def test_ring_without_positions(dim, dtype, device):
    """A width of 1 needs no state: there is no place that cache_seqlens could tell."""
    arguments = make_update(8, 1, 0, dtype, batch=1, dim=dim, device=device)
    arguments["conv_state"] = arguments["conv_state"].as_strided((1, dim, 0), (0, 0, 1))
    expected = assert_update(arguments)
    arguments["cache_seqlens"] = torch.tensor([3], dtype=torch.int32, device=device)
    assert torch.equal(causal_conv1d_update(**arguments, activation="silu"), expected)


@pytest.mark.parametrize("seqlen", (None, 1, 9))
@pytest.mark.parametrize("mode", ("indexed", "indexed ring"))
def test_negative_index_gives_zero_and_touches_no_state(mode, seqlen, device):
    arguments = make_update(seqlen, 4, 6, mode=mode, device=device)
    arguments["conv_state_indices"] = torch.tensor([4, -1, 0], dtype=torch.int32, device=device)
    out = assert_update(arguments)
    assert not out[1].any() and out[0].any() and out[2].any()
    arguments["conv_state_indices"].copy_(torch.tensor([-1, -(2**31), -7]))
    before = arguments["conv_state"].clone()
    assert_update(arguments, allow_zero=True)
    assert torch.equal(arguments["conv_state"], before)


def test_state_rows_that_no_index_names_stay_as_they_are(device):
    arguments = make_update(2, 4, 6, mode="indexed", device=device)
    arguments["conv_state"][1] = math.nan
    arguments["conv_state"][5] = math.nan
    arguments["conv_state_indices"] = torch.tensor([4, 2, 0], dtype=torch.int32, device=device)
    before = arguments["conv_state"].clone()
    out = causal_conv1d_update(**arguments)
    assert torch.isfinite(out).all()
    for row in (1, 5):
        assert arguments["conv_state"][row].isnan().all()
    assert torch.equal(arguments["conv_state"][3], before[3])


@pytest.mark.parametrize("out_layout", LAYOUTS)
def test_out_is_written_in_place_in_any_layout(out_layout, device):
    arguments = make_update(5, 4, 6, device=device)
    expected, expected_state = reference_update(arguments, "silu")
    out = allocate(arguments["x"].shape, out_layout, device=device)
    state, x = arguments["conv_state"], arguments["x"]
    ops.update_out(x, state, arguments["weight"], arguments["bias"], out, True, None, None)
    assert_close(out, expected, OUT[torch.float32])
    assert torch.equal(state, expected_state.float())
    assert_untouched_outside(out)


def test_index_beyond_the_state_reads_and_writes_no_memory_outside(device, tells_values):
    """An error on the CPU; on CUDA, which cannot look without a synchronisation, NaN in out."""
    arguments = make_update(2, 4, 6, mode="indexed", device=device)
    rows = arguments["conv_state"].shape[0]
    arguments["conv_state_indices"] = torch.tensor([0, rows, 1], dtype=torch.int32, device=device)
    before = arguments["conv_state"].clone()
    if tells_values:
        with pytest.raises(RuntimeError, match="causal_conv1d_update: .*conv_state_indices"):
            causal_conv1d_update(**arguments)
        assert torch.equal(arguments["conv_state"], before)
    else:
        out = causal_conv1d_update(**arguments)
        assert out[1].isnan().all() and torch.isfinite(out[0]).all()
        assert torch.equal(arguments["conv_state"][2:], before[2:])


# ------------------------------------------------------------------------- a row of several entries


def assert_as_copies(arguments, activation="silu"):
    """out is that of a copy of the row for each entry; the row's state that of its last entry."""
    indices = arguments["conv_state_indices"]
    before = arguments["conv_state"].clone()
    copies = arguments | {
        "conv_state": before[indices.long().clamp(min=0)],
        "conv_state_indices": None,
    }
    expected = causal_conv1d_update(**copies, activation=activation)
    expected[indices < 0] = 0
    for entry, row in enumerate(indices.tolist()):
        if row >= 0:
            before[row] = copies["conv_state"][entry]
    out = causal_conv1d_update(**arguments, activation=activation)
    assert torch.equal(out, expected)
    assert torch.equal(arguments["conv_state"], before)


CHOSEN_INDICES = (
    (1, 1, 1),
    (4, 0, 4),
    (2, 2, 0),
    (0, 3, 3),
    (5, -1, 5),
    (-1, 2, 2),
    (-3, -3, 1),
)


@pytest.mark.parametrize("mode", ("indexed", "indexed ring"))
@pytest.mark.parametrize("seqlen", (None, 1, 2, 9, 40))
@pytest.mark.parametrize("indices", CHOSEN_INDICES)
def test_entries_of_one_row_all_read_it_as_it_was(indices, seqlen, mode, device):
    for width, state_len in ((1, 2), (2, 1), (4, 3), (4, 6), (9, 8)):
        for layout in ("contiguous", "channel_last") if seqlen else ("contiguous", "transposed"):
            arguments = make_update(
                seqlen, width, state_len, mode=mode, layout=layout, device=device
            )
            arguments["conv_state_indices"] = torch.tensor(indices, device=device).int()
            saved = arguments | {"conv_state": arguments["conv_state"].clone()}
            assert_as_copies(arguments)
            assert_update(saved)


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("rows", (1, 3, 200, 100_000))
def test_many_entries_of_few_rows(rows, dtype, device):
    """More entries than threads or units of work, again and again, and more than a small table."""
    generator = torch.Generator().manual_seed(1)
    for batch in (2, 31, 128, 129, 700):
        arguments = make_update(None, 4, 4, dtype, batch=batch, dim=5, device=device)
        arguments["conv_state"] = randn(rows, 5, 4, dtype=dtype, device=device, seed=6)
        indices = torch.randint(-1, rows, (batch,), generator=generator)
        indices[0] = indices[-1]  # at least one row has two
        arguments["conv_state_indices"] = indices.to(device)
        assert_as_copies(arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state_len", (3, 4))
@pytest.mark.parametrize("layout", ("contiguous", "channel_last"))
def test_more_channels_than_a_gpu_has_threads(layout, state_len, mode, device):
    """There a thread of CUDA's kernels has two entries, and the last one a single entry."""
    arguments = make_update(
        None,
        4,
        state_len,
        torch.bfloat16,
        batch=129,
        dim=16640,
        mode=mode,
        state_layout=layout,
        device=device,
    )
    indices = arguments["conv_state_indices"]
    if indices is None:
        assert_update(arguments)
        return
    assert_as_copies(arguments)
    indices[6] = -1  # an entry of padding beside one that is none
    indices[21] = indices[100]  # two of one row, and two beside each other
    indices[40] = indices[41]
    assert_as_copies(arguments)


def test_entries_of_one_row_on_any_number_of_threads(device):
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            arguments = make_update(3, 4, 6, batch=300, dim=300, mode="indexed", device=device)
            generator = torch.Generator().manual_seed(1)
            arguments["conv_state_indices"] = torch.randint(0, 7, (300,), generator=generator)
            arguments["conv_state_indices"] = arguments["conv_state_indices"].int().to(device)
            assert_as_copies(arguments)
    finally:
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------- int64


@pytest.mark.parametrize("mode", ("ring", "indexed", "indexed ring"))
@pytest.mark.parametrize("seqlen", (None, 3, 12))
def test_int64_indices_are_as_int32_ones(seqlen, mode, device):
    for names in (
        ("cache_seqlens",),
        ("conv_state_indices",),
        ("cache_seqlens", "conv_state_indices"),
    ):
        arguments = make_update(seqlen, 4, 5, mode=mode, device=device)
        expected = arguments | {"conv_state": arguments["conv_state"].clone()}
        for name in names:
            if arguments[name] is not None:
                arguments[name] = lay_out(arguments[name].long(), "strided")
        out = causal_conv1d_update(**expected, activation="silu")
        assert torch.equal(assert_update(arguments), out)
        assert torch.equal(arguments["conv_state"], expected["conv_state"])


@pytest.mark.parametrize("start", (2**32, 2**32 + 4, 2**40 + 3, 2**63 - 1, 2**63 - 40))
def test_int64_ring_positions_are_modulo_the_state_length(start, device):
    arguments = make_update(7, 4, 5, mode="ring", device=device)
    arguments["cache_seqlens"] = torch.full((BATCH,), start, dtype=torch.int64, device=device)
    short = arguments | {"conv_state": arguments["conv_state"].clone()}
    short["cache_seqlens"] = torch.full((BATCH,), start % 5, dtype=torch.int32, device=device)
    out = causal_conv1d_update(**short, activation="silu")
    assert torch.equal(assert_update(arguments), out)


@pytest.mark.parametrize("row", (2**32, 2**32 + 1, 2**63 - 1))
def test_int64_index_of_which_32_bits_would_be_a_row(row, device, tells_values):
    """It is out of range: an error on the CPU, NaN in out on CUDA."""
    arguments = make_update(2, 4, 6, mode="indexed", device=device)
    arguments["conv_state_indices"] = torch.tensor([3, row, 4], device=device)
    before = arguments["conv_state"].clone()
    if tells_values:
        with pytest.raises(RuntimeError, match=f"conv_state_indices must be < 6, got {row} at 1"):
            causal_conv1d_update(**arguments)
        assert torch.equal(arguments["conv_state"], before)
    else:
        out = causal_conv1d_update(**arguments)
        assert out[1].isnan().all() and torch.isfinite(out[0]).all()
        assert torch.equal(arguments["conv_state"][:3], before[:3])


@pytest.mark.parametrize("row", (-1, -(2**31) - 1, -(2**32), -(2**63)))
def test_negative_int64_index_is_padding(row, device):
    arguments = make_update(2, 4, 6, mode="indexed", device=device)
    arguments["conv_state_indices"] = torch.tensor([3, row, 4], device=device)
    out = assert_update(arguments)
    assert not out[1].any() and out[0].any()
