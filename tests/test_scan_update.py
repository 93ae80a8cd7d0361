"""selective_state_update: one token, whose state changes in place."""

import pytest
import torch
from helpers import (
    FLOATS,
    all_poison,
    allocate,
    assert_close,
    assert_untouched_outside,
    dtype_id,
    randn,
)
from hypothesis import given
from hypothesis import strategies as st
from state_update_cases import NAMES, STATE_LAYOUTS, assert_update, make_update
from test_random import limits

from causal_conv1d import selective_scan_fn, selective_state_update
from causal_conv1d.reference import selective_state_update_ref

ops = torch.ops.causal_conv1d


@pytest.mark.parametrize("softplus", [False, True], ids=["linear", "softplus"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("heads", [0, 4], ids=["without_heads", "heads"])
def test_agrees_with_the_reference(device, heads, dtype, softplus):
    assert_update(make_update(heads=heads, dim=40, dtype=dtype, device=device), softplus)


@pytest.mark.parametrize("without", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")], ids=str)
def test_options(device, without):
    assert_update(make_update(without=without, dtype=torch.float64, device=device), True)


@pytest.mark.parametrize("dstate", [1, 3, 16, 17, 64, 128, 256, 300])
def test_any_number_of_states(device, dstate):
    assert_update(make_update(dstate=dstate, device=device), True)


@pytest.mark.parametrize("token", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("same", [True, False], ids=["state_of_that_type", "state_fp32"])
def test_many_states(device, token, same):
    """Enough that a thread of the CUDA kernel has several entries, and at the end fewer."""
    types = dict.fromkeys(("A", "D", "dt_bias"), torch.float32)
    types["state"] = token if same else torch.float32
    for batch, heads, dim, dstate in ((35, 1, 1902, 16), (9, 4, 234, 128), (6, 2, 400, 256)):
        rows = list(range(batch + 2, 2, -1))
        rows[1] = rows[-1] = -1
        for indices in (None, rows):
            arguments = make_update(
                batch,
                heads,
                dim,
                dstate,
                min(heads, 2),
                token,
                dtypes=types,
                indices=indices,
                rows=batch + 3,
                device=device,
            )
            if indices is None:
                arguments["state"] = arguments["state"][:batch]
            assert_update(arguments, True)


@pytest.mark.parametrize("where", STATE_LAYOUTS)
def test_strides_of_the_state(device, where):
    arguments = make_update(where=where, device=device)
    assert_update(arguments, True)
    assert_untouched_outside(arguments["state"])


def test_expanded_parameters_of_mamba2(device):
    """A, dt, D and dt_bias of a head for all its channels."""
    arguments = make_update(device=device)
    for name in ("A", "dt", "D", "dt_bias"):
        first = arguments[name][..., :1] if name != "A" else arguments[name][:, :1, :1]
        arguments[name] = first.expand(arguments[name].shape)
    assert_update(arguments, True)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("heads", [0, 4], ids=["without_heads", "heads"])
def test_indices(device, heads, kind):
    """Rows in any order, and padding, which touches nothing."""
    arguments = make_update(heads=heads, indices=[5, -1, 2], rows=7, device=device)
    arguments["state_batch_indices"] = arguments["state_batch_indices"].to(kind)
    before = arguments["state"].clone()
    out = assert_update(arguments, True)
    assert not out[1].any()
    for row in (0, 1, 3, 4, 6):
        assert torch.equal(arguments["state"][row], before[row])


def test_an_index_past_the_last_row(device):
    arguments = make_update(indices=[0, 7, 1], rows=7, device=device)
    if device == "cpu":
        before = arguments["state"].clone()
        with pytest.raises(RuntimeError, match="state_indices must be < 7, got 7 at 1"):
            selective_state_update(**arguments)
        assert torch.equal(arguments["state"], before)
    else:
        out = assert_update(arguments, False)
        assert out[1].isnan().all() and not out[::2].isnan().any()


def test_follows_the_scan(device):
    """Token by token is the whole sequence."""
    batch, dim, seqlen, dstate = 2, 20, 12, 16
    u, dt, z = (randn(batch, dim, seqlen, seed=i, device=device) for i in range(3))
    B, C = (randn(batch, dstate, seqlen, seed=i, device=device) for i in range(3, 5))
    A, D = -randn(dim, dstate, seed=5, device=device).exp(), randn(dim, seed=6, device=device)
    expected, last = selective_scan_fn(u, dt, A, B, C, D, z, D, True, True)
    state = torch.zeros(batch, dim, dstate, device=device)
    steps = zip(*(t.unbind(-1) for t in (u, dt, B, C, z)), strict=True)
    outs = [selective_state_update(state, x, t, A, b, c, D, g, D, True) for x, t, b, c, g in steps]
    assert_close(torch.stack(outs, -1), expected.double(), 1e-6)
    assert_close(state, last.double(), 1e-6)


def test_out_operator(device):
    arguments = make_update(device=device)
    out = allocate((3, 4, 6), "strided", device=device)
    tensors = list(arguments.values())
    expected = ops.state_update(*[t if t is None else t.clone() for t in tensors], True)
    assert ops.state_update_out(*tensors, out, True) is None
    assert torch.equal(out, expected)
    assert_untouched_outside(out)


@st.composite
def updates(draw):
    groups = draw(st.sampled_from((1, 1, 2)))
    heads = groups * draw(st.integers(1, 3))
    batch, rows = draw(st.integers(1, 4)), 6
    dtype = draw(st.sampled_from((*FLOATS, torch.float64)))
    indices = None
    if draw(st.booleans()):
        indices = draw(st.permutations(range(-2, rows)))[:batch]
    types = {
        name: dtype if dtype == torch.float64 else draw(st.sampled_from(FLOATS)) for name in NAMES
    }
    return draw(st.booleans()), dict(
        batch=batch,
        heads=heads,
        dim=draw(st.sampled_from((1, 2, 7, 16, 33, 64))),
        dstate=draw(st.sampled_from((1, 2, 7, 8, 16, 33))),
        groups=groups,
        dtype=dtype,
        dtypes=types,
        without=tuple(n for n in ("D", "z", "dt_bias") if draw(st.booleans())),
        indices=indices,
        rows=None if indices is None else rows,
        where=draw(st.sampled_from(tuple(STATE_LAYOUTS))),
        seed=draw(st.integers(0, 10_000)),
    )


@limits(60)
@given(case=updates())
def test_random(device, case):
    softplus, options = case
    arguments = make_update(**options, device=device)
    indices = options["indices"]
    if indices is not None and all(i < 0 for i in indices):
        arguments["state_batch_indices"][0] = 0
    assert_update(arguments, softplus)
    assert_untouched_outside(arguments["state"])


# ----------------------------------------------------------------------------- within torch's modes


def test_raises_the_version_of_the_state(device):
    arguments = make_update(heads=0, device=device)
    version = arguments["state"]._version
    selective_state_update(**arguments)
    assert arguments["state"]._version == version + 1


def test_backward_that_needs_the_old_state(device):
    arguments = make_update(heads=0, device=device)
    weight = torch.ones_like(arguments["state"], requires_grad=True)
    product = weight * arguments["state"]
    selective_state_update(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_leaf_that_requires_grad_is_refused(device):
    arguments = make_update(heads=0, device=device)
    before = arguments["state"].clone()
    arguments["state"].requires_grad_()
    with pytest.raises(RuntimeError, match="selective_state_update: state requires grad and would"):
        selective_state_update(**arguments)
    assert torch.equal(arguments["state"], before)
    with torch.no_grad():
        selective_state_update(**arguments)
    assert not torch.equal(arguments["state"], before)


@pytest.mark.parametrize("name", ["x", "A", "B", "dt_bias"])
def test_a_gradient_that_arrives_raises(device, name):
    arguments = make_update(device=device)
    arguments[name].requires_grad_()
    out = selective_state_update(**arguments)
    assert out.requires_grad and not arguments["state"].requires_grad
    with pytest.raises(RuntimeError, match="selective_state_update: it has no derivative"):
        out.sum().backward()


def test_a_state_of_a_graph_stays_one(device):
    arguments = make_update(device=device)
    leaf = arguments["state"].requires_grad_()
    state = arguments["state"] = leaf * 1
    out = selective_state_update(**arguments)
    assert state.requires_grad and out.requires_grad
    with pytest.raises(RuntimeError, match="selective_state_update: it has no derivative"):
        state.sum().backward()


def test_forward_mode_is_refused(device):
    arguments = make_update(device=device)
    tangent = torch.ones_like(arguments["x"])
    with pytest.raises(RuntimeError, match="no derivative in forward mode"):
        torch.func.jvp(
            lambda x: selective_state_update(**arguments | {"x": x}), (arguments["x"],), (tangent,)
        )


@pytest.mark.parametrize("dims", [(0,) * 9, (2, None, None, 0, None, 1, None, None, None)], ids=str)
@pytest.mark.parametrize("indices", [None, [4, 0, 5]], ids=["rows", "indices"])
@pytest.mark.parametrize("heads", [0, 4], ids=["without_heads", "heads"])
def test_vmap(device, heads, dims, indices):
    options = {"indices": indices, "rows": 6} if indices else {}
    options["heads"] = heads
    each = [make_update(seed=i, dtype=torch.float64, device=device, **options) for i in range(2)]
    mapped = [
        each[0][name] if dim is None else torch.stack([one[name] for one in each], dim)
        for name, dim in zip(NAMES, dims, strict=True)
    ]
    rows = each[0]["state_batch_indices"]

    def call(*args):
        return selective_state_update(*args, True, rows)

    state = mapped[0].clone()
    out = torch.vmap(call, in_dims=dims)(state, *mapped[1:])
    for i in range(2):
        own = [
            t if d is None else t.select(d, i).clone() for t, d in zip(mapped, dims, strict=True)
        ]
        assert_close(out[i], selective_state_update_ref(*own, True, rows), 1e-12)
        assert_close(state.select(dims[0], i), own[0], 1e-12)


def test_vmap_must_map_the_state(device):
    arguments = make_update(device=device)
    with pytest.raises(RuntimeError, match="selective_state_update: vmap must map state too"):
        torch.vmap(lambda x: selective_state_update(**arguments | {"x": x}))(
            torch.stack([arguments["x"]] * 2)
        )


def test_compile(device):
    """Without a break of the graph, and the state changes."""
    arguments = make_update(heads=0, indices=[1, -1, 0], device=device)
    state = arguments["state"].clone()
    expected = selective_state_update(**arguments | {"state": state}, dt_softplus=True)
    call = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(**arguments, dt_softplus=True), expected)
    assert torch.equal(arguments["state"], state)


@pytest.mark.parametrize("heads", [0, 4], ids=["without_heads", "heads"])
def test_opcheck(device, heads):
    arguments = make_update(heads=heads, indices=[1, -1, 0], device=device)
    torch.library.opcheck(ops.state_update.default, (*arguments.values(), True))
    torch.library.opcheck(
        ops.state_update_out.default, (*arguments.values(), arguments["x"].clone(), True)
    )


def test_nothing_is_written_after_an_error(device):
    arguments = make_update(device=device)
    arguments["state"].fill_(torch.nan)
    arguments["C"] = arguments["C"][:, :, 1:]
    with pytest.raises(RuntimeError, match="selective_state_update: C must be"):
        selective_state_update(**arguments)
    assert all_poison(arguments["state"])
