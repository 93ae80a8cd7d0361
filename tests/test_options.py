"""The convolution with options: packed sequences, gates, a residual, a dilation, parts of out."""

import dataclasses
import random

import pytest
import torch
from helpers import ALL_FLOATS, FLOATS, dtype_id, lay_out, ops, randn
from options_cases import (
    GRADIENTS,
    assert_case,
    bounds_of,
    call,
    described,
    make_case,
    random_case,
    random_lengths,
    run_backward,
    run_forward,
)

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_fn
from causal_conv1d.reference import causal_conv1d_ref, causal_conv1d_update_ref

TWO_LAYOUTS = ("channel_first", "channel_last")
LENGTHS = [3, 0, 1, 2, 40, 0, 9, 70, 5, 0, 0]
PACKED = (1, 24, sum(LENGTHS))


@pytest.mark.parametrize("chunk", range(8))
def test_random_cases(chunk, device):
    for number in range(20):
        rng = random.Random(1000 * chunk + number)
        case = random_case(rng, device)
        try:
            assert_case(*case)
        except Exception as error:
            raise AssertionError(f"{number}: {described(*case)}") from error


@pytest.mark.parametrize("dilation", (1, 2, 3, 4))
@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_every_width(layout, dilation, device):
    for width in range(1, 10):
        for lengths in (None, LENGTHS):
            case = make_case(
                PACKED,
                width,
                lengths=lengths,
                states=width % 2 == 0,
                dilation=dilation,
                layout=layout,
                device=device,
            )
            assert_case(case, layout, layout)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dilation", (2, 7, 64, 128, 129, 1000))
def test_long_dilated_rows(dilation, dtype, device):
    """CUDA takes them channel-first by tiles, as far as taps reach."""
    for width, states, activation in ((4, True, "silu"), (3, False, None), (8, True, "silu")):
        case = make_case(
            (2, 3, 5003),
            width,
            dtype,
            around=(),
            states=states,
            dilation=dilation,
            activation=activation,
            device=device,
        )
        found = assert_case(case)
        for name, gradient in run_backward(case).items():
            assert torch.equal(gradient, found[name]), name
        for where in ("channel_first_slice", "channel_last"):
            moved = dataclasses.replace(
                case, x=lay_out(case.x, where), dout=lay_out(case.dout, where)
            )
            assert torch.equal(run_forward(moved, where)[0], found["out"]), where
            assert torch.equal(run_backward(moved, where)["dx"], found["dx"]), where


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("around", ("pre_gate", "post_gate", "residual", "x"))
def test_each_of_gates_and_residual_alone(around, dtype, device):
    for layout in TWO_LAYOUTS:
        for activation in (None, "silu"):
            for width in (3, 4, 7):
                case = make_case(
                    (2, 40, 130),
                    width,
                    dtype,
                    around=(around,),
                    bias=False,
                    activation=activation,
                    layout=layout,
                    device=device,
                )
                assert_case(case, layout, layout)


def alone(case, i):
    """The i-th of the packed sequences as a case of its own."""
    start, stop = case.cu_seqlens[i : i + 2].tolist()
    fields = {"cu_seqlens": None}
    for name in ("x", "pre_gate", "post_gate", "residual", "dout"):
        tensor = getattr(case, name)
        fields[name] = None if tensor is None else tensor[:, :, start:stop]
    if case.residual_is_x:
        fields["residual"] = fields["x"]
    for name in ("initial_states", "dfinal_states"):
        tensor = getattr(case, name)
        fields[name] = None if tensor is None else tensor[i : i + 1]
    return dataclasses.replace(case, **fields), slice(start, stop)


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_packed_is_each_sequence_alone_bit_by_bit(layout, dtype, device):
    for width, dilation, states, around in (
        (4, 1, False, ()),
        (4, 1, True, ()),
        (7, 1, True, ("pre_gate", "post_gate")),
        (9, 1, True, ("x",)),
        (3, 3, True, ("residual",)),
        (4, 2, False, ()),
    ):
        case = make_case(
            PACKED,
            width,
            dtype,
            lengths=LENGTHS,
            states=states,
            dilation=dilation,
            around=around,
            layout=layout,
            device=device,
        )
        out, final = run_forward(case, layout)
        found = run_backward(case, layout)
        for i in range(len(LENGTHS)):
            one, steps = alone(case, i)
            expected, expected_final = run_forward(one, layout)
            assert torch.equal(out[:, :, steps], expected), (width, i)
            assert torch.equal(final[i : i + 1], expected_final), (width, i)
            gradients = run_backward(one, layout)
            for name in ("dx", "dpre_gate", "dpost_gate"):
                if name in found:
                    assert torch.equal(found[name][:, :, steps], gradients[name]), (width, i, name)
            if states:
                own = found["dinitial_states"][i : i + 1]
                assert torch.equal(own, gradients["dinitial_states"]), (width, i)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_a_boundary_at_every_step(layout, dtype, device):
    """Kernels take vectors of steps that have all of their taps faster than others."""
    case = make_case((1, 2, 140), 4, dtype, layout=layout, device=device)
    for boundary in range(1, 140):
        bounds = torch.tensor([0, boundary, 140], dtype=torch.int32, device=device)
        whole = dataclasses.replace(case, cu_seqlens=bounds)
        out, _ = run_forward(whole, layout)
        found = run_backward(whole, layout)
        for i in range(2):
            one, steps = alone(whole, i)
            expected, _ = run_forward(one, layout)
            assert torch.equal(out[:, :, steps], expected), boundary
            gradients = run_backward(one, layout)
            assert torch.equal(found["dx"][:, :, steps], gradients["dx"]), boundary
        assert_case(whole, layout, layout)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("around", (("pre_gate", "post_gate"), ("post_gate", "x")), ids="-".join)
def test_packed_with_states_and_gates(around, dtype, device):
    lengths = [*LENGTHS, 6]  # rows of whole vectors
    for layout in TWO_LAYOUTS:
        for width in (2, 4, 7):
            case = make_case(
                (1, 24, sum(lengths)),
                width,
                dtype,
                lengths=lengths,
                states=True,
                around=around,
                layout=layout,
                device=device,
            )
            assert_case(case, layout, layout)


@pytest.mark.parametrize("dtype", ALL_FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_packed_without_options_is_fn_of_each_sequence(layout, dtype, device):
    case = make_case(PACKED, 4, dtype, lengths=LENGTHS, around=(), layout=layout, device=device)
    out = causal_conv1d_varlen_fn(
        case.x, case.weight, case.bias, case.cu_seqlens, None, False, "silu"
    )
    parts = [
        causal_conv1d_fn(x, case.weight, case.bias, activation="silu")
        for x in case.x.split(LENGTHS, 2)
    ]
    assert torch.equal(out, torch.cat(parts, 2))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_pre_gate_is_a_product_before(layout, dtype, device):
    for width in (3, 7):
        case = make_case((2, 24, 130), width, dtype, layout=layout, device=device)
        for activation in (None, "silu"):
            product = case.pre_gate * case.x
            found = causal_conv1d_fn(
                case.x, case.weight, case.bias, activation=activation, pre_gate=case.pre_gate
            )
            expected = causal_conv1d_fn(product, case.weight, case.bias, activation=activation)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_what_follows_has_one_rounding(layout, device):
    """In float32 a gate or a residual alone is torch's own operation; both are one rounding."""
    case = make_case((2, 24, 130), 4, layout=layout, device=device)
    plain = (case.x, case.weight, case.bias)
    out, gate, residual = causal_conv1d_fn(*plain), case.post_gate, case.residual
    assert torch.equal(causal_conv1d_fn(*plain, post_gate=gate), out * gate)
    assert torch.equal(causal_conv1d_fn(*plain, residual=residual), out + residual)
    both = causal_conv1d_fn(*plain, post_gate=gate, residual=residual)
    assert torch.equal(both, (out.double() * gate.double() + residual.double()).float())


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_whole_is_chunks_with_states(dtype, device):
    for width, dilation, layout in (
        (4, 3, "channel_first"),
        (7, 1, "channel_last"),
        (3, 2, "strided"),
    ):
        case = make_case((2, 24, 90), width, dtype, dilation=dilation, layout=layout, device=device)
        whole, last = call(case)
        outs, states = [], None
        for start, stop in ((0, 1), (1, 2), (2, 7), (7, 60), (60, 90)):
            fields = {"initial_states": states}
            for name in ("x", "pre_gate", "post_gate", "residual"):
                fields[name] = getattr(case, name)[:, :, start:stop]
            out, states = call(dataclasses.replace(case, **fields))
            outs.append(out)
        assert torch.equal(torch.cat(outs, 2), whole) and torch.equal(states, last)


def test_every_layout_gives_the_same_bits(device):
    case = make_case(PACKED, 4, torch.bfloat16, lengths=LENGTHS, states=True, device=device)
    expected, expected_final = run_forward(case)
    expected_dx = run_backward(case)["dx"]
    for where in ("channel_last", "channel_last_slice", "channel_first_slice", "strided"):
        moved = dataclasses.replace(case)
        for name in ("x", "pre_gate", "post_gate", "residual", "dout"):
            setattr(moved, name, lay_out(getattr(case, name), where))
        out, final = run_forward(moved, where)
        assert torch.equal(out, expected) and torch.equal(final, expected_final), where
        assert torch.equal(run_backward(moved, where)["dx"], expected_dx), where


def test_gradients_are_the_same_each_time(device):
    case = make_case((1, 72, 900), 4, lengths=[300, 1, 0, 599], states=True, device=device)
    first = run_backward(case)
    for _ in range(3):
        for name, gradient in run_backward(case).items():
            assert torch.equal(gradient, first[name]), name


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_what_is_in_no_sequence_is_not_read(layout, device):
    """NaN there reaches nothing, and neither does NaN in a neighbour."""
    case = make_case(
        (1, 24, 60), 4, lengths=[10, 0, 20, 15], begin=5, around=("residual",), layout=layout,
        device=device,
    )  # fmt: skip
    expected, final = run_forward(case, layout)
    before = run_backward(case, layout)
    outside = torch.ones(60, dtype=torch.bool, device=device)
    outside[5:50] = False
    assert torch.equal(expected[..., outside], case.residual[..., outside])
    for where in (outside, torch.arange(60, device=device) == 14):
        case.x[..., where] = torch.nan
        case.dout[..., outside] = torch.nan
        out, _ = run_forward(case, layout)
        kept = torch.ones(60, dtype=torch.bool, device=device)
        kept[5:15] = bool(where is outside)
        assert torch.equal(out[..., kept], expected[..., kept])
        dx = run_backward(case, layout)["dx"]
        assert torch.equal(dx[..., 15:50], before["dx"][..., 15:50])
        assert not dx[..., outside].any()


def test_no_sequences_no_steps_no_channels(device):
    for shape, lengths in (
        ((1, 8, 9), []),
        ((1, 8, 0), []),
        ((1, 8, 0), [0, 0]),
        ((1, 0, 9), [4, 5]),
        ((1, 8, 9), [0, 0, 0]),
    ):
        for dilation in (1, 2):
            case = make_case(
                shape, 4, lengths=lengths, states=True, dilation=dilation, device=device
            )
            out, final = run_forward(case)
            found = run_backward(case)
            if shape[1] == 0:
                continue
            if sum(lengths) == 0:
                assert torch.equal(out, case.residual)
                assert torch.equal(final, case.initial_states)
                assert torch.equal(found["dinitial_states"], case.dfinal_states)
                assert not found["dweight"].any() and not found["dbias"].any()


def test_cu_seqlens_that_are_wrong(device, tells_values):
    x, weight = randn(1, 8, 10, device=device), randn(8, 4, device=device)
    for values in ([0, 6, 4, 10], [0, 11], [-1, 5, 10], [0, 4, 2**31 + 5]):
        bounds = torch.tensor(values, device=device)
        if tells_values:
            with pytest.raises(RuntimeError, match="^causal_conv1d_fn: cu_seqlens must"):
                causal_conv1d_varlen_fn(x, weight, None, bounds)
            continue
        right = bounds.clamp(0, 10).cummax(0).values
        found = causal_conv1d_varlen_fn(x, weight, None, bounds, None, True)
        expected = causal_conv1d_varlen_fn(x, weight, None, right, None, True)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("is_transposed", (False, True))
def test_tokens_by_channels(is_transposed, index_dtype, device):
    """x (total, dim) is (1, dim, total) otherwise written, in either layout."""
    layout = "channel_first" if is_transposed else "channel_last"
    case = make_case(
        PACKED, 4, lengths=LENGTHS, states=True, layout=layout, index_dtype=index_dtype,
        device=device,
    )  # fmt: skip
    expected, expected_final = call(case)
    flat = {name: getattr(case, name)[0].t() for name in ("x", "pre_gate", "post_gate", "residual")}
    out, final = call(dataclasses.replace(case, **flat))
    assert torch.equal(out, expected[0].t()) and torch.equal(final, expected_final)
    assert out.stride() == flat["x"].stride() and out.shape == flat["x"].shape
    without = causal_conv1d_varlen_fn(flat["x"], case.weight, case.bias, case.cu_seqlens)
    assert isinstance(without, torch.Tensor) and without.shape == flat["x"].shape


def test_the_gradient_of_x_that_is_the_residual_is_rounded_once(device):
    case = make_case(PACKED, 4, torch.bfloat16, lengths=LENGTHS, around=("x",), device=device)
    expected = run_backward(case)["dx"]
    for form in (lambda x: x, lambda x: x[0].t()):
        x = form(case.x.detach()).requires_grad_()
        out = causal_conv1d_varlen_fn(
            x, case.weight, case.bias, case.cu_seqlens, activation="silu", residual=x
        )
        (dx,) = torch.autograd.grad(out, x, form(case.dout))
        assert torch.equal(dx, form(expected))


def test_the_reference_of_packed_sequences(device):
    """A token at a time, as told in words."""
    lengths, width, dilation = [4, 0, 5], 3, 2
    x, weight, states = randn(1, 2, 10), randn(2, width), randn(3, 2, 4)
    bounds = bounds_of(lengths, 1)
    out, final = causal_conv1d_ref(
        x, weight, None, states, True, cu_seqlens=bounds, dilation=dilation
    )
    expected = torch.zeros_like(x)
    for i, (start, stop) in enumerate(((1, 5), (5, 5), (5, 10))):
        history = torch.cat([states[i], x[0, :, start:stop]], 1)
        for t in range(start, stop):
            for k in range(width):
                expected[0, :, t] += weight[:, k] * history[:, t - start + k * dilation]
        assert torch.equal(final[i], history[:, history.shape[1] - 4 :])
    torch.testing.assert_close(out, expected)


# ----------------------------------------------------------------------------------- parts of out


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
@pytest.mark.parametrize("sizes", ([8, 8, 8], [24], [0, 1, 23], (5, 0, 19)), ids=str)
def test_parts_of_out(sizes, layout, device):
    for lengths in (None, LENGTHS):
        shape = PACKED if lengths else (3, 24, 70)
        case = make_case(shape, 4, lengths=lengths, states=True, layout=layout, device=device)
        leaf = case.map(lambda t: t.detach().requires_grad_())
        out, final = call(leaf)
        parts, states = call(leaf, split_sizes=sizes)
        assert torch.equal(states, final) and isinstance(parts, tuple)
        for part, whole in zip(parts, out.split(list(sizes), 1), strict=True):
            assert torch.equal(part, whole)
            assert part.stride() == torch.empty_like(whole).stride() and part._base is None
        names = [of for of in (*GRADIENTS.values(), "residual")]
        inputs = [getattr(leaf, name) for name in names]
        above = (case.dout, case.dfinal_states)
        expected = torch.autograd.grad((out, final), inputs, above)
        douts = case.dout.split(list(sizes), 1)
        found = torch.autograd.grad((*parts, states), inputs, (*douts, case.dfinal_states))
        for name, a, b in zip(names, found, expected, strict=True):
            if name in ("weight", "bias"):  # whose sums may have another order
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(a, b), name


def test_a_part_without_a_gradient(device):
    case = make_case((2, 24, 30), 4, around=("x",), device=device)
    leaf = case.map(lambda t: t.detach().requires_grad_())
    parts = causal_conv1d_fn(leaf.x, leaf.weight, residual=leaf.x, split_sizes=[8, 16])
    dx, dweight = torch.autograd.grad(parts[1].sum(), (leaf.x, leaf.weight))
    assert not dx[:, :8].any() and not dweight[:8].any() and dx[:, 8:].any()


@pytest.mark.parametrize("sizes", ([8, 8], [30, -6], [25], []), ids=str)
def test_sizes_of_parts_that_are_wrong(sizes, device):
    x, weight = randn(2, 24, 30, device=device), randn(24, 4, device=device)
    for needs_grad in (False, True):
        with pytest.raises(RuntimeError, match="^causal_conv1d_fn: split_sizes must be sizes >= 0"):
            causal_conv1d_fn(x.requires_grad_(needs_grad), weight, split_sizes=sizes)


# ------------------------------------------------------------------------------------------ update


@pytest.mark.parametrize("seqlen", (None, 1, 5, 40))
@pytest.mark.parametrize("mode", ("shift", "ring", "indexed", "indexed ring"))
def test_update_with_a_dilation(mode, seqlen, device):
    for width, dilation, spare in ((4, 3, 0), (3, 2, 4), (1, 2, 2)):
        shape = (3, 10) if seqlen is None else (3, 10, seqlen)
        x, weight, bias = (
            randn(*s, device=device, seed=i) for i, s in enumerate((shape, (10, width), (10,)))
        )
        state = randn(
            5 if "indexed" in mode else 3, 10, (width - 1) * dilation + spare, device=device
        )
        lens = torch.tensor([0, 3, 99], device=device) if "ring" in mode else None
        if lens is not None and state.shape[2] == 0:
            continue
        indices = torch.tensor([4, -1, 2], device=device) if "indexed" in mode else None
        args = (weight, bias, "silu", lens, indices)
        other = state.double()
        found = causal_conv1d_update(x, state, *args, dilation=dilation)
        wide = (weight.double(), bias.double(), "silu", lens, indices)
        expected = causal_conv1d_update_ref(x.double(), other, *wide, dilation=dilation)
        torch.testing.assert_close(found, expected.float())
        assert torch.equal(state, other.float())


def test_update_with_a_dilation_goes_on_from_fn(device):
    case = make_case((2, 10, 30), 4, around=(), dilation=3, device=device)
    whole, _ = call(case)
    plain = (case.weight, case.bias)
    options = {"activation": "silu", "dilation": 3}
    out, state = causal_conv1d_fn(case.x[..., :20], *plain, return_final_states=True, **options)
    outs = [out]
    for t in range(20, 30):
        outs.append(causal_conv1d_update(case.x[..., t], state, *plain, **options)[..., None])
    assert torch.equal(torch.cat(outs, 2), whole)


def test_update_with_a_dilation_refuses(device, tells_values):
    x, weight = randn(2, 10, device=device), randn(10, 4, device=device)
    state = randn(2, 10, 5, device=device)
    before = state.clone()
    with pytest.raises(RuntimeError, match=r"conv_state must have state_len >= .* = 6, got"):
        causal_conv1d_update(x, state, weight, dilation=2)
    with pytest.raises(
        RuntimeError, match="^causal_conv1d_update: dilation must be 1..65536, got 0"
    ):
        causal_conv1d_update(x, state, weight, dilation=0)
    if tells_values:
        with pytest.raises(RuntimeError, match="conv_state_indices must be < 2, got 2 at 1"):
            wide, rows = randn(2, 10, 6), torch.tensor([0, 2])
            causal_conv1d_update(x, wide, weight, None, None, None, rows, dilation=2)
    assert torch.equal(state, before)


# ------------------------------------------------------------------------------- without an option


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_a_call_without_options_takes_the_old_operators(device):
    x, weight = randn(2, 8, 10, device=device), randn(8, 4, device=device)
    with Names() as names:
        causal_conv1d_fn(x, weight)
        causal_conv1d_fn(x, weight, dilation=1, pre_gate=None)
        causal_conv1d_update(x[:, :, 0], torch.zeros(2, 8, 3, device=device), weight)
        causal_conv1d_fn(x, weight, residual=x)
    found = [name.partition("::")[2] for name in names.called if "causal_conv1d" in name]
    assert found == ["forward", "forward", "update", "conv_forward"]


def test_dilation_of_another_type_is_refused(device):
    x, weight = randn(2, 8, 10, device=device), randn(8, 4, device=device)
    for dilation in (0, -1, 65537):
        with pytest.raises(RuntimeError, match="^causal_conv1d_fn: dilation must be 1..65536"):
            causal_conv1d_fn(x, weight, dilation=dilation)
    with pytest.raises((TypeError, RuntimeError), match="dilation"):
        causal_conv1d_fn(x, weight, dilation="2")


# -------------------------------------------------------------------------------------------- CUDA


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_a_cuda_graph_follows_the_contents_of_cu_seqlens(layout, cuda):
    case = make_case(
        (1, 136, 700), 4, torch.bfloat16, lengths=[700, *[0] * 9], states=True, layout=layout,
        device=cuda,
    )  # fmt: skip
    leaf = case.map(lambda t: t.detach().requires_grad_())
    inputs = [leaf.x, leaf.weight, leaf.bias, leaf.initial_states, leaf.pre_gate, leaf.post_gate]

    def run():
        out, final = call(leaf)
        above = (case.dout, case.dfinal_states)
        return [out, final, *torch.autograd.grad((out, final), inputs, above)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    rng = random.Random(1)
    for _ in range(8):
        begin, lengths = random_lengths(rng, 700)
        lengths = (lengths + [0] * 10)[:10]
        leaf.cu_seqlens.copy_(bounds_of(lengths, begin))
        graph.replay()
        for i, (found, expected) in enumerate(zip(captured, run(), strict=True)):
            assert torch.equal(found, expected), (lengths, i)


def test_nothing_synchronises(cuda):
    case = make_case(PACKED, 4, lengths=LENGTHS, states=True, dilation=2, device=cuda)
    leaf = case.map(lambda t: t.detach().requires_grad_())
    call(leaf)
    state, token = torch.zeros(1, 24, 6, device=cuda), case.x[:, :, 0].contiguous()
    rows = torch.zeros(1, dtype=torch.int64, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, final = call(leaf)
        torch.autograd.grad((out, final), [leaf.x, leaf.weight], (case.dout, case.dfinal_states))
        causal_conv1d_update(token, state, case.weight, None, None, None, rows, dilation=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_functional_operators_give_the_bits_of_those_that_write(device):
    case = make_case(PACKED, 4, lengths=LENGTHS, states=True, dilation=2, device=device)
    out, final = run_forward(case)
    ids, around = (None, case.cu_seqlens), (case.pre_gate, case.post_gate)
    inputs = (case.x, case.weight, case.bias)
    found = ops.conv_forward(
        *inputs, *ids, case.initial_states, *around, case.residual, 2, True, True
    )
    assert torch.equal(found[0], out) and torch.equal(found[1], final)
    expected = run_backward(case)
    for needed in (0b111110, 0b010100, 0):
        states = (case.initial_states, case.dfinal_states)
        gradients = ops.conv_backward(
            *inputs, case.dout, *ids, *states, *around, 2, False, needed, True
        )
        for i, (name, gradient) in enumerate(zip(GRADIENTS, gradients, strict=True)):
            if i == 0 or needed >> i & 1:
                assert torch.equal(gradient, expected[name].to(gradient.dtype)), name
            else:
                assert gradient.numel() == 0
