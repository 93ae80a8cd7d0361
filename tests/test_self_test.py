"""Kernels that fail on a GPU are found at the first call there, and torch takes their place.

What the test compares is in tests/cpp/self_test_test.cpp.
"""

import ctypes
import functools
import os
import re
import subprocess
import sys
import threading
import types
import warnings

import helpers
import options_cases
import pytest
import torch
from helpers import LAYOUTS, assert_backward, assert_forward, dtype_id, make_case, ops, randn
from scan_helpers import assert_scan, make_scan
from test_scan_update import assert_update, make_update

from causal_conv1d import (
    _ctypes_ops,
    _library,
    _self_test,
    _torch_ops,
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    selective_scan_fn,
    selective_state_update,
)
from causal_conv1d._self_test import TESTED
from causal_conv1d.reference import causal_conv1d_ref, causal_conv1d_update_ref

NO_IMAGE = "causal_conv1d_fn: no kernel image is available for execution on the device"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = 8 * len(TESTED)  # numbers that they may have


def fallback():
    return _torch_ops.operations(_library.cpu.library, warn=lambda device: None)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=dtype_id)
@pytest.mark.parametrize("operator", TESTED)
def test_kernels_are_numbered_as_in_the_c_interface(operator, dtype):
    """8 * operator + 4 * is_channel_last + dtype, as csrc/torch/register.h counts them."""
    x, index = torch.empty(2, 6, 9, dtype=dtype), list(TESTED).index(operator)
    number = 8 * index + _ctypes_ops.DTYPES[dtype]
    kernel_number = functools.partial(_self_test.kernel_number, _library.cpu.library, operator)
    assert kernel_number(x) == number
    assert kernel_number(x[0]) == number
    last = number + 4 * (operator in ("forward", "backward"))
    assert kernel_number(x.mT.contiguous().mT) == last
    assert kernel_number(x.int()) is None
    # One step: the kernels run along channels, whatever the strides.
    assert kernel_number(x.new_empty(2, 64, 1)) == last
    assert kernel_number(x[:, :, :1]) == last
    assert kernel_number(x.mT[:, :1]) == number  # one channel: along time


@pytest.mark.parametrize("operator", ("forward", "backward"))
def test_options_run_the_kernels_of_what_they_extend(operator):
    x, cpu = torch.empty(2, 6, 9), _library.cpu.library
    for each in (x, x.mT.contiguous().mT, x.bfloat16(), x.int()):
        expected = _self_test.kernel_number(cpu, operator, each)
        assert _self_test.kernel_number(cpu, f"conv_{operator}", each) == expected


@pytest.mark.parametrize("value", ("0", "false", "No", "off"))
def test_it_can_be_switched_off(value, monkeypatch):
    monkeypatch.delenv("CAUSAL_CONV1D_SELF_TEST", raising=False)
    assert _self_test.is_wanted()
    monkeypatch.setenv("CAUSAL_CONV1D_SELF_TEST", value)
    assert not _self_test.is_wanted()


@pytest.mark.parametrize(
    "capability, advice",
    [
        ((7, 5), "8.7, 9.0; a build on this machine adds this GPU"),
        ((7, 0), "The CUDA kernels need compute capability 7.5 or newer"),
    ],
)
def test_torch_takes_the_place_of_wrong_kernels_with_one_warning(capability, advice, monkeypatch):
    """The part in Python, with a stand-in for the CUDA library."""
    library = types.SimpleNamespace(
        causal_conv1d_cuda_verdict=lambda number, device: _self_test.UNTESTED,
        causal_conv1d_cuda_self_test=lambda *args: _self_test.UNTESTED,
        causal_conv1d_cuda_self_test_size=lambda: 16,
        causal_conv1d_cuda_problem=lambda device: NO_IMAGE.encode(),
        causal_conv1d_cuda_architectures=lambda: b"8.7, 9.0",
        causal_conv1d_cuda_set_expected=lambda functions: None,
    )
    verdicts = {"forward": _self_test.WRONG, "update": _self_test.RIGHT}
    monkeypatch.setattr(
        _self_test.SelfTest, "find_verdict", lambda self, operator, x: verdicts[operator]
    )
    monkeypatch.setattr(_self_test, "_describe", lambda device: "cuda:0 (a GPU)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def wrong(*args):
        raise AssertionError("a wrong kernel is called")

    self_test = _self_test.SelfTest(library, _library.cpu.library)
    forward, update = (
        self_test.checked("forward", wrong),
        self_test.checked("update", ops.update_out),
    )
    case = make_case((2, 6, 9), 4)
    out = torch.empty_like(case.x)
    arguments = (case.x, case.weight, case.bias, None, None, out, None, True)
    with pytest.warns(RuntimeWarning, match=f"self-test on cuda:0 .*{NO_IMAGE}") as caught:
        forward(*arguments)
    assert advice in str(caught[0].message)
    assert len(caught) == 1 and self_test.problem(case.x.device) == NO_IMAGE
    expected = causal_conv1d_ref(case.x, case.weight, case.bias, activation="silu")
    assert torch.equal(out, expected)
    out.fill_(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(*arguments)
        assert torch.equal(out, expected)
        state, token = torch.zeros(2, 6, 4), case.x[:, :, 0].contiguous()
        update(token, state, case.weight, None, token.clone(), True, None, None)
    assert torch.equal(state[..., -1], token)


# -------------------------------------------------------------------- torch's operations are right


@pytest.fixture
def by_torch(monkeypatch):
    """The helpers' operators are those in plain torch."""
    kernels = fallback()
    named = {f"{name}_out": kernel for name, kernel in kernels.items()}
    monkeypatch.setattr(helpers, "ops", types.SimpleNamespace(**named))
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
    rows = 3 if indices is None else 5
    state = randn(rows, 8, state_len, dtype=torch.bfloat16, device=device)
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
            ops.forward_out(*arguments)
        with pytest.raises(RuntimeError) as found:
            by_torch["forward"](*arguments)
        assert str(found.value) == str(expected.value)
    assert out.isnan().all()


# ---------------------------------------------------------------------------- the whole, on a GPU


@pytest.fixture
def gpu(cuda):
    """cuda:0 with no kernel tested, and afterwards as it was."""
    if _library.self_test is None:
        pytest.skip("CAUSAL_CONV1D_SELF_TEST switches the self-test off")
    gpu = torch.device("cuda", 0)
    verdicts = {number: _library.self_test.verdict(number, 0) for number in range(KERNELS)}
    assert _self_test.WRONG not in verdicts.values()
    set_verdicts()
    yield gpu
    set_verdicts(right=[number for number in verdicts if verdicts[number] == _self_test.RIGHT])
    _library.self_test.warned = _torch_ops.Once()


def set_verdicts(right=(), wrong=(), problem=""):
    bits = [sum(1 << number for number in numbers) for numbers in (right, wrong)]
    function = _library.cuda.library.causal_conv1d_cuda_set_verdicts
    function.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p]
    function.restype = None
    function(0, *bits, problem.encode())


def found():
    """The numbers of the kernels that have been found right, and wrong, on cuda:0."""
    verdicts = [_library.self_test.verdict(number, 0) for number in range(KERNELS)]
    return [
        {number for number in range(KERNELS) if verdicts[number] == verdict}
        for verdict in (_self_test.RIGHT, _self_test.WRONG)
    ]


def number(operator, dtype, is_channel_last=False):
    return 8 * list(TESTED).index(operator) + 4 * is_channel_last + _ctypes_ops.DTYPES[dtype]


FORWARD = 0  # in float32, channel-first


@pytest.fixture
def broken(gpu):
    """cuda:0 with kernels that have been found wrong."""
    set_verdicts(wrong=range(KERNELS), problem=NO_IMAGE)
    return gpu


@pytest.fixture
def wrong_expectations(gpu):
    """cuda:0, whose kernels will be compared with functions that write nothing."""
    set_expected = _library.cuda.library.causal_conv1d_cuda_set_expected
    array = ctypes.c_void_p * len(TESTED)

    def addresses(prefix):
        functions = [getattr(_library.cpu.library, prefix + name) for name in TESTED]
        return array(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))

    set_expected(addresses("causal_conv1d_check_"))
    yield gpu
    set_expected(addresses("causal_conv1d_cpu_"))


def loss(x, weight, bias, states):
    out, final_states = causal_conv1d_fn(
        x * 2, weight, bias, None, states, return_final_states=True, activation="silu"
    )
    return (out + 1).square().sum() + final_states.square().sum()


def assert_is_reference(out, case, activation="silu"):
    expected = causal_conv1d_ref(case.x, case.weight, case.bias, activation=activation)
    torch.testing.assert_close(out, expected)


def test_the_first_call_of_a_kernel_tests_it(gpu):
    case = make_case((2, 6, 9), 4, device=gpu)
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_fn: weight must be"):
        causal_conv1d_fn(case.x, case.weight[:3])
    assert found() == [{FORWARD}, set()]
    out = causal_conv1d_fn(case.x, case.weight, case.bias, activation="silu")
    assert_is_reference(out, case)
    half = case.x.half().mT.contiguous().mT
    causal_conv1d_fn(half, case.weight)
    causal_conv1d_update(case.x[:, :, 0], torch.zeros(2, 6, 4, device=gpu), case.weight)
    update = number("update", torch.float32)
    assert found() == [{FORWARD, number("forward", torch.half, True), update}, set()]


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=dtype_id)
def test_all_kernels_pass(dtype, gpu):
    for layout in (False, True):
        x = randn(2, 9, 6, dtype=dtype, device=gpu).mT
        x = (x if layout else x.contiguous()).requires_grad_()
        weight = randn(6, 4, dtype=dtype, device=gpu)
        causal_conv1d_fn(x, weight).sum().backward()
        token = x[:, :, 0].detach().contiguous()
        causal_conv1d_update(token, torch.zeros(2, 6, 4, dtype=dtype, device=gpu), weight)
        causal_conv1d_varlen_states(x[0].detach().mT, index([0, 2, 9], gpu), 4)
    A, B = -torch.ones(6, 3, dtype=dtype, device=gpu), randn(2, 3, 9, dtype=dtype, device=gpu)
    selective_scan_fn(x, x, A, B, B).sum().backward()
    state = torch.zeros(2, 6, 3, dtype=dtype, device=gpu)
    selective_state_update(state, token, token, A, B[:, :, 0], B[:, :, 0])
    both = {number(name, dtype, last) for name in ("forward", "backward") for last in (False, True)}
    others = {number(name, dtype) for name in TESTED if name not in ("forward", "backward")}
    assert found() == [both | others, set()]


def test_a_wrong_scan_is_replaced(broken):
    inputs = make_scan(device=broken)
    with pytest.warns(RuntimeWarning, match="self-test on cuda:0 .*: " + re.escape(NO_IMAGE)):
        assert_scan(inputs, True)
    assert_update(make_update(device=broken), True)


def test_options_are_replaced(broken):
    for lengths in (None, [3, 0, 40, 21]):
        case = options_cases.make_case(
            (1, 24, 70), 4, lengths=lengths, states=True, dilation=2, device=broken
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = options_cases.assert_case(case)
            outs, _ = options_cases.call(case, split_sizes=[8, 16])
        assert torch.equal(torch.cat(outs, 1), found["out"])


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=dtype_id)
@pytest.mark.parametrize("operator", TESTED)
def test_a_difference_is_found(operator, dtype, wrong_expectations):
    gpu = wrong_expectations
    memory = torch.empty(_library.self_test.size, dtype=torch.uint8, device=gpu)
    stream = torch.cuda.current_stream(gpu).cuda_stream
    for last in (True, False) if operator in ("forward", "backward") else (False,):
        set_verdicts()
        kernel = number(operator, dtype, last)
        assert _library.self_test.run(kernel, 0, stream, memory.data_ptr()) == _self_test.WRONG
        assert found() == [set(), {kernel}]
        layout = "channel-last" if last else "channel-first"
        if list(TESTED).index(operator) > 3:
            layout = "contiguous"
        names = {"forward": "out", "backward": "dx", "update": "update's out"}
        names |= {"scan_forward": "selective_scan_fn's out", "scan_backward": "du"}
        names |= {"state_update": "selective_state_update's out"}
        name = names.get(operator, operator)
        problem = _library.self_test.problem(gpu)
        assert problem.startswith(f"{name} in {dtype_id(dtype)}, {layout}, is wrong by ")


def test_a_wrong_kernel_is_replaced_and_right_ones_are_used(wrong_expectations):
    gpu = wrong_expectations
    set_verdicts(right=[number("update", torch.float32)])
    case = make_case((2, 6, 9), 4, device=gpu)
    with pytest.warns(RuntimeWarning, match=r"self-test on cuda:0 .*: out in float32, channel"):
        out = causal_conv1d_fn(case.x, case.weight, case.bias, activation="silu")
    assert_is_reference(out, case)
    with warnings.catch_warnings():  # one a GPU
        warnings.simplefilter("error")
        causal_conv1d_fn(case.x.half(), case.weight, case.bias)
        causal_conv1d_update(case.x[:, :, 0], torch.zeros(2, 6, 4, device=gpu), case.weight)
    expected = {FORWARD, number("forward", torch.half)}
    assert found() == [{number("update", torch.float32)}, expected]


MISSING_KERNEL = """
import warnings, torch, causal_conv1d
x, weight = torch.ones(2, 6, 9).cuda(), torch.ones(6, 4).cuda()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        causal_conv1d.causal_conv1d_fn(x, weight)
    except Exception as error:  # torch's operations have no code either
        print(type(error).__name__)
print(*(str(w.message) for w in caught if "self-test" in str(w.message)))
"""


def test_a_missing_kernel_is_found(gpu):
    """The driver is told to use no machine code and to compile no PTX, which leaves nothing."""
    environment = dict(os.environ, CUDA_FORCE_PTX_JIT="1", CUDA_DISABLE_PTX_JIT="1")
    environment.pop("CAUSAL_CONV1D_SELF_TEST", None)
    result = subprocess.run(
        [sys.executable, "-P", "-c", MISSING_KERNEL],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert re.search("fail their self-test on cuda:0 .*: causal_conv1d_fn: CUDA: ", result.stdout)


def test_a_call_within_a_graph_capture_leaves_the_test_to_a_later_one(gpu):
    case = make_case((2, 6, 9), 4, device=gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal_conv1d_fn(case.x, case.weight, case.bias, activation="silu")
    assert found() == [set(), set()]
    graph.replay()
    assert_is_reference(out, case)
    causal_conv1d_fn(case.x, case.weight)
    assert found() == [{FORWARD}, set()]


def test_the_test_may_run_while_another_thread_captures(gpu):
    x, weight = torch.ones(2, 6, 9, device=gpu), torch.ones(6, 4, device=gpu)
    out, graph, errors = torch.empty_like(x), torch.cuda.CUDAGraph(), []
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):  # whose part of the memory pool torch cannot begin later
        kept = torch.empty(1, device=gpu)

    def call():
        try:
            with torch.cuda.stream(stream):
                ops.forward_out(x, weight, None, None, None, out, None, False)
        except RuntimeError as error:
            errors.append(error)

    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = x * 2
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert not errors and found() == [{FORWARD}, set()]
    graph.replay()
    assert_is_reference(out, types.SimpleNamespace(x=x, weight=weight, bias=None), None)
    assert torch.equal(y, x * 2)
    del kept


def test_the_test_may_synchronise_where_calls_may_not(gpu):
    torch.cuda.set_sync_debug_mode("error")
    try:
        causal_conv1d_fn(torch.ones(2, 6, 9, device=gpu), torch.ones(6, 4, device=gpu))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found() == [{FORWARD}, set()]


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
