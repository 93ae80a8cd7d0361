"""Random shapes, strides, offsets, types and options against the reference."""

import torch
from helpers import (
    ACTIVATIONS,
    FLOATS,
    Layout,
    all_poison,
    allocate,
    assert_backward,
    assert_forward,
    assert_untouched_outside,
    make_case,
    operation,
    randn,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_update import assert_update, make_update

from causal_conv1d.reference import causal_conv1d_varlen_states_ref


def limits(max_examples):
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@st.composite
def layouts(draw, ndim=3):
    def each(*choices):
        return tuple(draw(st.sampled_from(choices)) for _ in range(ndim))

    order = draw(st.permutations(range(ndim)))
    return Layout(tuple(order), each(1, 1, 1, 2, 3), each(0, 0, 1, 3, 8), each(0, 0, 1, 2, 8))


sizes_of_batch = st.integers(1, 4)
sizes_of_dim = st.one_of(st.integers(1, 70), st.sampled_from((96, 127, 128, 129, 256)))
lengths = st.one_of(st.integers(1, 70), st.sampled_from((127, 128, 129, 250, 511, 513, 1025, 1100)))
widths = st.sampled_from((1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9, 16))
types = st.sampled_from(FLOATS)
ids = st.sampled_from((None, None, "packed", "long", "padded", "recurring", "all_padding"))
seeds = st.integers(0, 10_000)


@st.composite
def cases(draw):
    batch, dim, seqlen = draw(sizes_of_batch), draw(sizes_of_dim), draw(lengths)
    if dim * seqlen > 40_000:
        batch = 1
    dtype = draw(st.one_of(types, st.just(torch.float64)))
    mixed = dtype != torch.float64

    def type_or(dtype):
        return draw(types) if mixed else dtype

    where = draw(st.one_of(layouts(), st.just("expanded")))
    return dict(
        shape=(batch, dim, seqlen),
        width=draw(widths),
        dtype=dtype,
        weight_dtype=type_or(dtype),
        bias_dtype=type_or(dtype),
        state_dtype=type_or(dtype),
        bias=draw(st.booleans()),
        states=draw(st.booleans()),
        seq_idx=draw(ids),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        layout=where,
        dout_layout=draw(st.one_of(layouts(), st.just(None), st.just("expanded"))),
        param_layout=draw(st.sampled_from(("contiguous", "transposed", "slice", "strided"))),
        seed=draw(seeds),
    )


@limits(1500)
@given(options=cases(), out_layout=st.one_of(st.none(), layouts()))
def test_forward(options, out_layout, device):
    case = make_case(**options, device=device)
    out, final = assert_forward(case, out_layout, allow_zero=True)
    if out_layout is not None:
        assert_untouched_outside(out)
        assert_untouched_outside(final)


@limits(1500)
@given(options=cases(), dx_layout=st.one_of(st.none(), layouts()))
def test_backward(options, dx_layout, device):
    case = make_case(**options, device=device)
    found = assert_backward(case, dx_layout, allow_zero=True)
    if dx_layout is not None:
        assert_untouched_outside(found["dx"])
        if found["dinitial_states"] is not None:
            assert_untouched_outside(found["dinitial_states"])


@limits(1500)
@given(
    batch=sizes_of_batch,
    dim=sizes_of_dim,
    seqlen=st.one_of(st.none(), st.integers(1, 40)),
    width=widths,
    spare=st.sampled_from((0, 0, 1, 2, 7, 30)),
    kinds=st.tuples(types, types, types, types),
    is_double=st.sampled_from((False, False, False, True)),
    mode=st.sampled_from(("shift", "ring", "indexed", "indexed ring")),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    data=st.data(),
)
def test_update(
    batch, dim, seqlen, width, spare, kinds, is_double, mode, bias, activation, data, device
):
    if is_double:
        kinds = (torch.float64,) * 4
    if "ring" in mode and width - 1 + spare == 0:
        spare = 1
    arguments = make_update(
        seqlen,
        width,
        width - 1 + spare,
        kinds[0],
        batch=batch,
        dim=dim,
        weight_dtype=kinds[1],
        bias_dtype=kinds[2],
        state_dtype=kinds[3],
        bias=bias,
        mode=mode,
        layout=data.draw(layouts(2 if seqlen is None else 3)),
        state_layout=data.draw(layouts()),
        device=device,
    )
    if "ring" in mode:
        starts = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=batch, max_size=batch))
        arguments["cache_seqlens"].copy_(torch.tensor(starts))
    if "indexed" in mode:
        skipped = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
        arguments["conv_state_indices"][torch.tensor(skipped, device=device)] = -1
    assert_update(arguments, activation, allow_zero=True)


@limits(500)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=8),
    dim=sizes_of_dim,
    state_len=st.integers(0, 40),
    dtype=types,
    index_dtype=st.sampled_from((torch.int32, torch.int64)),
    x_layout=layouts(2),
    states_layout=layouts(),
)
def test_varlen_states(
    lengths, dim, state_len, dtype, index_dtype, x_layout, states_layout, device
):
    x = allocate((sum(lengths), dim), x_layout, dtype, device)
    x.copy_(randn(sum(lengths), dim, dtype=dtype))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype).to(device)
    states = allocate((len(lengths), dim, state_len), states_layout, dtype, device)
    assert all_poison(states)
    operation("varlen_states", device)(x, bounds, states)
    assert torch.equal(states, causal_conv1d_varlen_states_ref(x, bounds, state_len))
    assert_untouched_outside(states)
