"""The selective scan's values and gradients, in every type, option and layout."""

import pytest
import torch
from helpers import FLOATS, LAYOUTS, assert_close, assert_untouched_outside, dtype_id, randn
from hypothesis import given
from hypothesis import strategies as st
from scan_helpers import (
    INPUTS,
    OPTIONAL,
    arguments,
    assert_gradients,
    assert_scan,
    expected_of,
    gradients_of_outputs,
    make_scan,
    ops,
    run_backward,
    run_forward,
    widened,
)
from test_random import layouts, limits
from tolerances import SCAN

from causal_conv1d import selective_scan_fn
from causal_conv1d.reference import selective_scan_ref


@pytest.mark.parametrize("softplus", [False, True], ids=["linear", "softplus"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=dtype_id)
def test_agrees_with_the_reference(device, dtype, softplus):
    assert_scan(make_scan(dim=24, seqlen=130, dtype=dtype, device=device), softplus)


@pytest.mark.parametrize("without", [*((name,) for name in OPTIONAL), OPTIONAL], ids=str)
def test_options(device, without):
    assert_scan(make_scan(without=without, dtype=torch.float64, device=device), True)


@pytest.mark.parametrize("constant", ["B", "C", "BC"])
def test_constant_projections(device, constant):
    assert_scan(make_scan(constant=constant, dtype=torch.float64, device=device), True)


@pytest.mark.parametrize("dstate", [1, 2, 3, 8, 16, 17, 64, 100, 256])
def test_any_number_of_states(device, dstate):
    assert_scan(make_scan(dstate=dstate, dim=4, dtype=torch.float32, device=device), True)


@pytest.mark.parametrize("seqlen", [1, 2, 31, 64, 65, 257, 1100])
def test_any_length(device, seqlen):
    assert_scan(make_scan(1, 3, seqlen, 4, 1, device=device), True)


@pytest.mark.parametrize(
    "bounds", [[0, 37], [0, 1, 2, 37], [0, 20, 20, 37], [0, 0, 37, 37]], ids=str
)
def test_packed_sequences(device, bounds):
    """Each with states of its own, the empty ones too, as if it were alone."""
    inputs = make_scan(1, bounds=bounds, dtype=torch.float64, device=device)
    assert_scan(inputs, True)
    out, _, last = run_forward(inputs, True)
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        alone = {
            name: value[..., start:stop] if name in ("u", "delta", "z", "B", "C") else value
            for name, value in inputs.items()
        }
        alone |= {"cu_seqlens": None, "initial_states": inputs["initial_states"][i : i + 1]}
        found, _, state = run_forward(alone, True)
        pairs = ((found, out[..., start:stop]), (state, last[i : i + 1]))
        if device == "cpu":
            assert all(torch.equal(*pair) for pair in pairs)
        else:  # chunks of time begin elsewhere
            for pair in pairs:
                torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


def test_int32_bounds(device):
    inputs = make_scan(1, bounds=[0, 5, 37], device=device)
    first = run_forward(inputs, True)
    inputs["cu_seqlens"] = inputs["cu_seqlens"].int()
    assert all(map(torch.equal, first, run_forward(inputs, True)))


def test_in_pieces(device):
    """A sequence in two calls, the second from the first's last states."""
    inputs = make_scan(seqlen=50, device=device)
    whole, _, end = run_forward(inputs, True)

    def part(steps, states):
        cut = {n: inputs[n][..., steps] for n in ("u", "delta", "z", "B", "C")}
        return run_forward(inputs | cut | {"initial_states": states}, True)

    first, _, state = part(slice(0, 23), inputs["initial_states"])
    second, _, last = part(slice(23, 50), state)
    assert_close(torch.cat([first, second], -1), whole.double(), 1e-6, name="out")
    assert_close(last, end.double(), 1e-6, name="last states")


@pytest.mark.parametrize("where", [name for name in LAYOUTS if name != "channel_first"])
def test_layouts(device, where):
    inputs = make_scan(
        layouts={
            **dict.fromkeys(("u", "delta", "z", "initial_states"), where),
            "A": "transposed",
            "B": "state_fastest",
            "C": "strided",
            "D": "strided",
            "delta_bias": "slice",
        },
        device=device,
    )
    for tensor in assert_scan(inputs, True, where):
        if tensor.dim() == 3:
            assert_untouched_outside(tensor)


def test_bits_do_not_depend_on_strides(device):
    plain = make_scan(dim=40, seqlen=200, dstate=16, device=device)
    names = dict.fromkeys(("u", "delta", "z"), "channel_last_slice") | {"B": "state_fastest"}
    other = make_scan(dim=40, seqlen=200, dstate=16, layouts=names, device=device)
    for first, second in zip(assert_scan(plain, True), assert_scan(other, True), strict=True):
        assert torch.equal(first, second)


def test_expanded_inputs(device):
    inputs = make_scan(layouts=dict.fromkeys(("u", "delta", "z"), "expanded"), device=device)
    assert inputs["u"].stride(0) == 0
    assert_scan(inputs, True)


def test_is_deterministic(device):
    inputs = make_scan(3, 64, 700, 16, 1, torch.bfloat16, device=device)
    dout, dlast = gradients_of_outputs(inputs)

    def run():
        found, out = run_backward(inputs, True, dout, dlast)
        return [*run_forward(inputs, True), out, *found.values()]

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize(
    ("batch", "dim", "seqlen"), [(0, 6, 5), (2, 0, 5), (2, 6, 0)], ids=["batch", "dim", "steps"]
)
def test_empty(device, batch, dim, seqlen):
    inputs = make_scan(batch, dim, seqlen, 3, 1, device=device)
    assert_scan(inputs, True, allow_zero=True)
    if seqlen == 0:
        assert torch.equal(run_forward(inputs, True)[2], inputs["initial_states"])


def test_large_steps(device):
    """softplus of what exp overflows, and decays that underflow."""
    inputs = make_scan(without=("delta_bias",), device=device)
    inputs["delta"] = inputs["delta"] * 200 - 50
    assert_scan(inputs, True)


@st.composite
def scans(draw):
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    dim = groups * draw(st.one_of(st.integers(1, 20), st.sampled_from((32, 33, 64))))
    dtype = draw(st.sampled_from((*FLOATS, torch.float64)))
    packed = draw(st.booleans())
    seqlen = draw(st.one_of(st.integers(1, 40), st.sampled_from((63, 64, 65, 128, 300))))
    bounds = None
    if packed:
        inner = draw(st.lists(st.integers(0, seqlen), max_size=4))
        bounds = [0, *sorted(inner), seqlen]

    def own_dtype():
        return dtype if dtype == torch.float64 else draw(st.sampled_from(FLOATS))

    names = st.sampled_from(("contiguous", "state_fastest", "slice", "strided"))
    constant = draw(st.sampled_from(("", "", "B", "C", "BC")))
    where = {name: draw(layouts()) for name in ("u", "delta", "z", "initial_states")}
    where |= {name: draw(names) for name in "BC" if name not in constant}
    return draw(st.booleans()), dict(
        batch=1 if packed else draw(st.integers(1, 3)),
        dim=dim,
        seqlen=seqlen,
        dstate=draw(st.sampled_from((1, 2, 3, 4, 8, 15, 16, 17, 33))),
        groups=groups,
        dtype=dtype,
        dtypes={name: own_dtype() for name in INPUTS},
        without=tuple(name for name in OPTIONAL if draw(st.booleans())),
        constant=constant,
        bounds=bounds,
        layouts=where,
        seed=draw(st.integers(0, 10_000)),
    )


@limits(40)
@given(case=scans(), where=layouts())
def test_random(device, case, where):
    softplus, options = case
    results = assert_scan(make_scan(**options, device=device), softplus, where, True, factor=10)
    for tensor in results:
        if tensor.dim() == 3:
            assert_untouched_outside(tensor)


# --------------------------------------------------------------------------------------- functions


def call(inputs, softplus=True, **options):
    return selective_scan_fn(**inputs, delta_softplus=softplus, **options)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=dtype_id)
def test_function_and_its_gradients(device, dtype):
    inputs = make_scan(dim=24, seqlen=130, dtype=dtype, device=device)
    leaves = {
        name: value.requires_grad_() if name in INPUTS else value for name, value in inputs.items()
    }
    out, last = call(leaves, return_last_state=True)
    dout, dlast = gradients_of_outputs(inputs)
    expected_out, expected_last, expected = expected_of(inputs, True, dout, dlast)
    assert out.dtype == dtype and out.stride() == inputs["u"].stride()
    assert_close(out, expected_out, SCAN[dtype])
    assert_close(last, expected_last, SCAN[last.dtype])
    given = [leaves[name] for name in INPUTS]
    found = torch.autograd.grad((out, last), given, (dout, dlast))
    assert_gradients(dict(zip(INPUTS, found, strict=True)), expected, inputs)


def test_gradients_through_one_of_the_results(device):
    inputs = make_scan(dtype=torch.float64, device=device)
    dout, dlast = gradients_of_outputs(inputs)
    for i, above in enumerate((dout, dlast)):
        leaves = widened(inputs, requires_grad=True)
        given = [leaves[name] for name in INPUTS]
        results = call(leaves, return_last_state=True)
        found = torch.autograd.grad(results[i], given, above, allow_unused=True)
        expected = selective_scan_ref(**leaves, delta_softplus=True, return_last_state=True)
        expected = torch.autograd.grad(expected[i], given, above, allow_unused=True)
        for name, first, second in zip(INPUTS, found, expected, strict=True):
            if second is None:  # C, D and z, of the last states
                assert first is None or not first.any()
            else:
                assert_close(first, second, 1e-12, name=name)


def test_gradients_of_a_part_alone(device):
    """The operator is asked for no more, and what is not needed takes no memory."""
    inputs = make_scan(device=device)
    dout, dlast = gradients_of_outputs(inputs)
    whole = ops.scan_backward(*arguments(inputs, True), dout, dlast, 511)
    for needed in (1, 4, 0b101000):
        found = ops.scan_backward(*arguments(inputs, True), dout, dlast, needed)
        for i, (part, all_of_it) in enumerate(zip(found, whole, strict=True)):
            assert torch.equal(part, all_of_it) if needed >> i & 1 else part.shape == (0,)


def test_projections_without_groups(device):
    """mamba_ssm's (batch, dstate, seqlen)."""
    inputs = make_scan(groups=1, device=device)
    flat = inputs | {"B": inputs["B"][:, 0].clone(), "C": inputs["C"][:, 0].clone()}
    for name in "BC":
        flat[name].requires_grad_()
    out = call(flat)
    assert torch.equal(out, call(inputs))
    assert torch.autograd.grad(out.sum(), flat["B"])[0].shape == flat["B"].shape


def test_positional_as_mamba_ssm(device):
    inputs = make_scan(without=("initial_states",), device=device)
    args = [inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    out, last = selective_scan_fn(*args, True, True)
    expected, expected_last = call(inputs, return_last_state=True)
    assert torch.equal(out, expected) and torch.equal(last, expected_last)
    assert last.dtype == torch.float32


@pytest.mark.parametrize("bounds", [None, [0, 9, 9, 37]], ids=["rows", "packed"])
@pytest.mark.parametrize("variable", [True, False], ids=["variable", "constant"])
def test_complex(device, variable, bounds):
    """A complex A, which plain PyTorch computes."""
    batch = 2 if bounds is None else 1
    inputs = make_scan(batch, bounds=bounds, dtype=torch.float64, device=device)
    inputs["A"] = torch.complex(inputs["A"], randn(6, 5, dtype=torch.float64, device=device))
    states = inputs["initial_states"]
    inputs["initial_states"] = torch.complex(states, states.flip(0))
    for name, seed in (("B", 31), ("C", 32)):
        shape = (batch, 2, 5, 74) if variable else (6, 5, 2)
        values = randn(*shape, dtype=torch.float64, device=device, seed=seed)
        inputs[name] = values if variable else torch.view_as_complex(values)
    results = []
    for function in (selective_scan_fn, selective_scan_ref):
        leaves = [inputs[name].clone().requires_grad_() for name in INPUTS]
        given = inputs | dict(zip(INPUTS, leaves, strict=True))
        out, last = function(**given, delta_softplus=True, return_last_state=True)
        loss = (out**2).sum() + torch.view_as_real(last).pow(2).sum()
        results.append([out, last, *torch.autograd.grad(loss, leaves)])
    for first, second in zip(*results, strict=True):
        real = torch.view_as_real if second.is_complex() else torch.Tensor.detach
        assert first.dtype == second.dtype
        assert_close(real(first), real(second), 1e-12)


def test_more_states_than_the_kernels_take(device):
    inputs = make_scan(1, 2, 9, 300, 1, dtype=torch.float64, device=device)
    out, last = call(inputs, return_last_state=True)
    expected = selective_scan_ref(**inputs, delta_softplus=True, return_last_state=True)
    assert_close(out, expected[0], 1e-12)
    assert_close(last, expected[1], 1e-12)
