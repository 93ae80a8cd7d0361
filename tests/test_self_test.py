"""Kernels that fail on a GPU are found at the first call there, and torch takes their place.

On the CPU the parts are tested, with broken kernels put in the place of CUDA's; with --device cuda
the whole, by the public functions.
"""

import types
import warnings

import helpers
import pytest
import torch
from helpers import LAYOUTS, assert_backward, assert_forward, dtype_id, make_case, ops, randn

from causal_conv1d import (
    _ctypes_ops,
    _library,
    _self_test,
    _torch_ops,
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from causal_conv1d.reference import causal_conv1d_ref, causal_conv1d_update_ref

NO_IMAGE = "causal_conv1d_fn: no kernel image is available for execution on the device"
WRITTEN = _self_test.WRITTEN
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL_DTYPES = (*DTYPES, torch.float64)
FORWARD = ("forward", torch.float32, "channel-first")


def right_kernels():
    return {name: getattr(ops, name) for name in WRITTEN}


def refuse(*args):
    raise RuntimeError(NO_IMAGE)


def packers():
    schemas = _ctypes_ops.schemas(_library.cpu.library)
    return {name: _ctypes_ops.Packer(name, schema) for name, schema in schemas.items()}


def expected_kernels():
    return _ctypes_ops.cpu_kernels(_library.cpu.library, packers())


def fallback():
    return _torch_ops.kernels(_ctypes_ops.checks(_library.cpu.library, packers()))


def find_problem(kernel, name, dtype, layout, device):
    expected = expected_kernels()[name]
    return _self_test.find_problem(kernel, expected, name, dtype, layout, torch.device(device, 0))


# --------------------------------------------------------------------------------- what is found


by_dtype = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
by_layout = pytest.mark.parametrize("layout", _self_test.LAYOUTS)
by_name = pytest.mark.parametrize("name", WRITTEN)


@by_dtype
@by_layout
@by_name
def test_right_kernels_have_no_problem(name, layout, dtype, device):
    def kernel(*args):
        assert _self_test._key(name, args[0]) in (
            (name, dtype, layout),
            (name, dtype, "channel-first"),
        )
        right_kernels()[name](*args)

    assert find_problem(kernel, name, dtype, layout, device) is None


@by_dtype
@by_layout
@pytest.mark.parametrize(
    ("name", "position"), [(name, i) for name in WRITTEN for i in WRITTEN[name]]
)
@pytest.mark.parametrize("end", (0, -1), ids=("first", "last"))
def test_one_wrong_element_is_found(end, name, position, layout, dtype, device):
    def wrong(*args):
        right_kernels()[name](*args)
        args[position][(end,) * args[position].dim()].add_(1)

    problem = find_problem(wrong, name, dtype, layout, device)
    assert problem is not None and problem.startswith(WRITTEN[name][position])
    assert dtype_id(dtype) in problem and layout in problem


@by_layout
@by_name
def test_a_kernel_that_does_nothing_is_found(name, layout, device):
    assert "wrong" in find_problem(lambda *args: None, name, torch.float32, layout, device)


@by_name
def test_the_error_of_a_missing_kernel_is_told(name, device):
    assert find_problem(refuse, name, torch.float32, "channel-last", device) == NO_IMAGE


def test_bits_are_those_of_the_c_interface():
    """8 * operator + 4 * is_channel_last + dtype, as csrc/torch/register.h counts them."""
    names = list(_ctypes_ops.schemas(_library.cpu.library))
    for (name, dtype, layout), bit in _self_test.BITS.items():
        place = 8 * names.index(name) + 4 * (layout == "channel-last")
        assert bit == 1 << (place + _ctypes_ops._DTYPES[dtype])
    assert len(_self_test.BITS) == (2 + 2 + 1 + 1) * 4


@pytest.mark.parametrize("value", ("0", "false", "No", "off"))
def test_it_can_be_switched_off(value, monkeypatch):
    monkeypatch.delenv("CAUSAL_CONV1D_SELF_TEST", raising=False)
    assert _self_test.is_wanted()
    monkeypatch.setenv("CAUSAL_CONV1D_SELF_TEST", value)
    assert not _self_test.is_wanted()


class CheckedOnCPU(_self_test.CheckedKernels):
    check = _self_test.CheckedKernels.test


def test_right_kernels_are_trusted_at_the_first_call():
    case, trusted = make_case((2, 6, 9), 4), []
    checked = CheckedOnCPU(
        right_kernels(),
        expected_kernels(),
        dict.fromkeys(WRITTEN, refuse),
        lambda device, bits: trusted.append((device, bits)),
    )
    out = torch.empty_like(case.x)
    for _ in range(2):
        checked.operator("forward")(case.x, case.weight, None, None, None, out, None, True)
    assert torch.equal(out, causal_conv1d_fn(case.x, case.weight, activation="silu"))
    cpu = case.x.device
    assert trusted == [(cpu, 1)]
    assert checked.problems == {cpu: {FORWARD: None}}
    half, last = case.x.half(), case.x.mT.contiguous().mT
    checked.operator("forward")(half, case.weight, None, None, None, half.clone(), None, True)
    checked.operator("forward")(last, case.weight, None, None, None, out, None, True)
    assert trusted == [(cpu, 1), (cpu, 0b11), (cpu, 0b10011)] and checked.problem(cpu) is None


def test_torch_takes_the_place_of_broken_kernels_with_one_warning():
    case, trusted = make_case((2, 6, 9), 4), []
    kernels = dict.fromkeys(WRITTEN, refuse) | {"update": ops.update}
    checked = CheckedOnCPU(
        kernels, expected_kernels(), fallback(), lambda device, bits: trusted.append(bits)
    )
    out = torch.empty_like(case.x)
    arguments = (case.x, case.weight, case.bias, None, None, out, None, True)
    with pytest.warns(RuntimeWarning, match=f"self-test.*{NO_IMAGE}") as caught:
        checked.operator("forward")(*arguments)
    assert len(caught) == 1 and not trusted
    expected = causal_conv1d_ref(case.x, case.weight, case.bias, activation="silu")
    assert torch.equal(out, expected)
    out.fill_(torch.nan)
    with warnings.catch_warnings():  # of the same call, another dtype and another operator: none
        warnings.simplefilter("error")
        checked.operator("forward")(*arguments)
        assert torch.equal(out, expected)
        half = torch.empty_like(out, dtype=torch.half)
        checked.operator("forward")(case.x.half(), *arguments[1:5], half, None, True)
        state, token = torch.zeros(2, 6, 4), case.x[:, :, 0].contiguous()
        checked.operator("update")(token, state, case.weight, None, token.clone(), True, None, None)
    expected = causal_conv1d_ref(case.x.half(), case.weight, case.bias, activation="silu")
    assert torch.equal(half, expected)
    assert trusted == [1 << 16]  # update in float32, which is not broken
    assert checked.problem(case.x.device) == NO_IMAGE


# -------------------------------------------------------------------- torch's operations are right


@pytest.fixture
def by_torch(monkeypatch):
    """The helpers' operators are those in plain torch."""
    kernels = fallback()
    monkeypatch.setattr(helpers, "ops", types.SimpleNamespace(**kernels))
    return kernels


OPTIONS = (
    {"activation": None, "bias": False},
    {"states": True},
    {"seq_idx": "padded"},
    {"states": True, "seq_idx": "recurring", "activation": None},
    {"states": True, "seq_idx": "packed"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=dtype_id)
def test_forward_and_backward_in_torch(dtype, options, by_torch, device):
    case = make_case((2, 12, 37), 4, dtype, device=device, **options)
    assert_forward(case)
    assert_backward(case)


@pytest.mark.parametrize("width", (1, 2, 9))
@pytest.mark.parametrize("seqlen", (1, 2, 8))
def test_forward_and_backward_in_torch_of_short_sequences(seqlen, width, by_torch, device):
    case = make_case((2, 3, seqlen), width, states=True, seq_idx="packed", device=device)
    assert_forward(case, allow_zero=True)
    assert_backward(case, allow_zero=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward_in_torch_of_any_layout(layout, by_torch, device):
    case = make_case((2, 12, 37), 4, states=True, layout=layout, device=device)
    assert_forward(case, layout)
    assert_backward(case, layout)


def index(values, device):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("indices", (None, [2, -1, 0]), ids=("", "indexed"))
@pytest.mark.parametrize("lens", (None, [0, 3, 1003]), ids=("shift", "ring"))
@pytest.mark.parametrize("seqlen", (None, 1, 2, 9))
@pytest.mark.parametrize("state_len", (3, 5))
def test_update_in_torch(state_len, seqlen, lens, indices, by_torch, device):
    shape = (3, 8) if seqlen is None else (3, 8, seqlen)
    x, weight, bias = randn(*shape, device=device), randn(8, 4, device=device), randn(8, seed=1)
    bias = bias.to(device)
    state = randn(5, 8, state_len, dtype=torch.bfloat16, device=device)
    lens, indices = index(lens, device), index(indices, device)
    expected_state, out = state.clone(), torch.empty_like(x)
    expected = causal_conv1d_update_ref(x, expected_state, weight, bias, "silu", lens, indices)
    by_torch["update"](x, state, weight, bias, out, True, lens, indices)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, expected_state)


def test_update_in_torch_with_an_index_past_the_last_row(by_torch, device):
    """As on CUDA, where nobody can look: NaN, and no state is touched."""
    x, weight = randn(3, 8, device=device), randn(8, 4, device=device)
    state = randn(2, 8, 4, device=device)
    before, out = state.clone(), torch.empty_like(x)
    by_torch["update"](x, state, weight, None, out, True, None, index([2, 0, -1], device))
    assert out[0].isnan().all() and out[1].isfinite().all() and not out[2].any()
    assert torch.equal(state[1], before[1]) and torch.equal(state[0, :, :3], before[0, :, 1:])
    assert torch.equal(state[0, :, 3], x[1])


def test_varlen_states_in_torch(by_torch, device):
    x, bounds = randn(20, 6, device=device), index([0, 2, 2, 20], device)
    states = torch.empty(3, 6, 4, device=device)
    by_torch["varlen_states"](x, bounds, states)
    assert torch.equal(states, causal_conv1d_varlen_states(x, bounds, 4))
    states = torch.empty(2, 6, 4, device=device)
    by_torch["varlen_states"](x[:0], index([0, 0, 0], device), states)
    assert not states.any()


def test_torchs_operations_refuse_what_the_kernels_refuse(by_torch, device):
    case = make_case((2, 6, 9), 4, states=True, device=device)
    out = torch.full_like(case.x, torch.nan)
    for change in ({1: case.weight[:3]}, {2: case.weight}, {4: case.x}, {5: out.half()}):
        arguments = [case.x, case.weight, case.bias, None, case.initial_states, out, None, True]
        for i, value in change.items():
            arguments[i] = value
        with pytest.raises(RuntimeError) as expected:
            ops.forward(*arguments)
        with pytest.raises(RuntimeError) as found:
            by_torch["forward"](*arguments)
        assert str(found.value) == str(expected.value)
    assert out.isnan().all()


# ---------------------------------------------------------------------------- the whole, on a GPU


@pytest.fixture
def untested(cuda):
    """cuda:0 as it is before the first call, and afterwards as it was."""
    if _library.self_test is None:
        pytest.skip("CAUSAL_CONV1D_SELF_TEST switches the self-test off")
    gpu = torch.device("cuda", 0)
    problems, trust = _library.self_test.problems, _library.self_test.trust
    before = problems.pop(gpu, {})
    assert all(problem is None for problem in before.values())
    trust(gpu, 0)
    yield gpu
    problems[gpu] = before
    trust(gpu, sum(_self_test.BITS[key] for key in before))


@pytest.fixture
def broken(untested, monkeypatch):
    """cuda:0 as it is before the first call, with kernels that fail."""
    for name in WRITTEN:
        monkeypatch.setitem(_library.self_test.kernels, name, refuse)
    return untested


def loss(x, weight, bias, states):
    out, final_states = causal_conv1d_fn(
        x * 2, weight, bias, None, states, return_final_states=True, activation="silu"
    )
    return (out + 1).square().sum() + final_states.square().sum()


def test_the_first_call_tests_the_kernels(untested):
    problems = _library.self_test.problems
    case = make_case((2, 6, 9), 4, device=untested)
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_fn: weight must be"):
        causal_conv1d_fn(case.x, case.weight[:3])
    assert problems[untested] == {FORWARD: None}
    out = causal_conv1d_fn(case.x, case.weight, case.bias, activation="silu")
    assert_is_reference(out, case)
    half = case.x.half().mT.contiguous().mT
    causal_conv1d_fn(half, case.weight)
    causal_conv1d_update(case.x[:, :, 0], torch.zeros(2, 6, 4, device=untested), case.weight)
    tested = (
        FORWARD,
        ("forward", torch.half, "channel-last"),
        ("update", torch.float32, "channel-first"),
    )
    assert problems[untested] == dict.fromkeys(tested)
    with pytest.MonkeyPatch.context() as patch:  # the C++ operators do without Python from now on
        patch.setattr(_self_test, "_key", refuse)
        if _library.cuda.registration == _library.STABLE_ABI:
            assert_is_reference(
                causal_conv1d_fn(case.x, case.weight, case.bias, activation="silu"), case
            )
            causal_conv1d_fn(half, case.weight)


def assert_is_reference(out, case):
    expected = causal_conv1d_ref(case.x, case.weight, case.bias, activation="silu")
    torch.testing.assert_close(out, expected)


def test_a_call_within_a_graph_capture_leaves_the_test_to_a_later_one(untested):
    problems = _library.self_test.problems
    case = make_case((2, 6, 9), 4, device=untested)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal_conv1d_fn(case.x, case.weight, case.bias, activation="silu")
    assert untested not in problems
    graph.replay()
    assert_is_reference(out, case)
    causal_conv1d_fn(case.x, case.weight)
    assert problems[untested] == {FORWARD: None}


def test_the_test_may_synchronise_where_calls_may_not(untested):
    torch.cuda.set_sync_debug_mode("error")
    try:
        causal_conv1d_fn(torch.ones(2, 6, 9, device=untested), torch.ones(6, 4, device=untested))
        assert torch.cuda.get_sync_debug_mode() == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert _library.self_test.problems[untested] == {FORWARD: None}


@pytest.mark.parametrize("is_compiled", (False, True), ids=("", "compiled"))
def test_broken_kernels_are_replaced(is_compiled, broken):
    case = make_case((2, 6, 9), 4, states=True, device=broken)
    leaves = [case.x, case.weight, case.bias, case.initial_states]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if is_compiled else loss
    with pytest.warns(RuntimeWarning, match="fail their self-test on cuda:0.*no kernel image"):
        value = function(*leaves)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*self-test.*")
        gradients = torch.autograd.grad(value, leaves)

    def expected_loss(x, weight, bias, states):
        out, final_states = causal_conv1d_ref(
            x * 2, weight, bias, states, return_final_states=True, activation="silu"
        )
        return (out + 1).square().sum() + final_states.square().sum()

    expected = expected_loss(*leaves)
    torch.testing.assert_close(value, expected)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_broken_kernels_are_replaced_in_update_and_in_graphs(broken):
    x, weight = randn(2, 8, device=broken), randn(8, 4, device=broken)
    state, expected_state = randn(3, 8, 4, device=broken), randn(3, 8, 4, device=broken)
    indices = index([2, 0], broken)
    with pytest.warns(RuntimeWarning, match="self-test"):
        causal_conv1d_update(x, state.clone(), weight, None, "silu", None, indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal_conv1d_update(x, state, weight, None, "silu", None, indices)
    state.copy_(expected_state)
    graph.replay()
    expected = causal_conv1d_update_ref(x, expected_state, weight, None, "silu", None, indices)
    torch.testing.assert_close(out, expected)
    assert torch.equal(state, expected_state)


def test_errors_keep_their_text_where_kernels_are_broken(broken):
    x = torch.ones(2, 6, 9, device=broken)
    with pytest.warns(RuntimeWarning, match="self-test"):
        causal_conv1d_fn(x, torch.ones(6, 4, device=broken))
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_fn: weight must be .*\(3, 4\)"):
        causal_conv1d_fn(x, torch.ones(3, 4, device=broken))
