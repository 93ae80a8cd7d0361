"""torch.compile, fake tensors and the operators' registration."""

import pytest
import torch
from helpers import LAYOUTS, dtype_id, make_case, ops
from torch._subclasses.fake_tensor import FakeTensorMode

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states

SHAPE = (2, 8, 33)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments_of(case):
    return (case.x, case.weight, case.bias, case.seq_idx, case.initial_states)


def loss(x, weight, bias, seq_idx, initial_states):
    """Takes part in a graph on both sides, and uses the final states too."""
    out, final_states = causal_conv1d_fn(
        x * 2, weight, bias, seq_idx, initial_states, True, None, "silu"
    )
    return (out + 1).square().sum() + final_states.square().sum()


def value_and_gradients(function, case):
    case = case.map(lambda tensor: tensor.detach().clone().requires_grad_())
    value = function(*arguments_of(case))
    inputs = [tensor for tensor in arguments_of(case) if tensor is not None]
    inputs = [tensor for tensor in inputs if tensor.is_floating_point()]
    return value.detach(), torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("seq_idx", (None, "padded"))
def test_compiled_forward_and_backward_equal_eager(seq_idx, backend, device):
    case = make_case(SHAPE, 4, states=True, seq_idx=seq_idx, device=device)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    value, gradients = value_and_gradients(compiled, case)
    expected_value, expected = value_and_gradients(loss, case)
    torch.testing.assert_close(value, expected_value)
    assert len(gradients) == 4
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "channel_last_slice"))
def test_compiled_fn_alone_is_bitwise_eager(layout, dtype, device):
    case = make_case(SHAPE, 4, dtype, layout=layout, device=device)

    def function(x, weight, bias):
        return causal_conv1d_fn(x, weight, bias, activation="silu")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = (case.x, case.weight, case.bias)
    expected, out = function(*inputs), compiled(*inputs)
    assert torch.equal(out, expected) and out.stride() == expected.stride()


@pytest.mark.parametrize("needs_grad", (False, True), ids=("", "gradients"))
def test_compiled_fn_with_dynamic_shapes(needs_grad, device):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 8, 33), (3, 8, 47), (1, 8, 64)):
        case = make_case(shape, 4, states=True, device=device)
        if needs_grad:
            value, gradients = value_and_gradients(compiled, case)
            expected_value, expected = value_and_gradients(loss, case)
            for found, wanted in zip(gradients, expected, strict=True):
                torch.testing.assert_close(found, wanted)
        else:
            value, expected_value = compiled(*arguments_of(case)), loss(*arguments_of(case))
        torch.testing.assert_close(value, expected_value)


def test_compiled_fn_writes_final_states_out(device):
    case = make_case(SHAPE, 4, states=True, device=device)

    def function(buffer):
        return causal_conv1d_fn(
            case.x, case.weight, case.bias, None, case.initial_states, True, buffer, "silu"
        )

    buffer = torch.full(case.state_shape, torch.nan, device=device)
    out, final_states = torch.compile(function, fullgraph=True, backend="aot_eager")(buffer)
    expected_out, expected = function(torch.empty_like(buffer))
    assert torch.equal(out, expected_out)
    assert torch.equal(buffer, expected) and torch.equal(final_states, expected)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("mode", ("shift", "indexed ring"))
def test_compiled_update_equals_eager(mode, backend, device):
    case = make_case((2, 8, 5), 4, states=True, device=device)
    lens = indices = None
    if mode == "indexed ring":
        lens = torch.tensor([2, 5], dtype=torch.int32, device=device)
        indices = torch.tensor([1, -1], dtype=torch.int32, device=device)

    def function(x, state):
        y = causal_conv1d_update(x * 2, state, case.weight, case.bias, "silu", lens, indices)
        return y + 1

    state, expected_state = case.initial_states.clone(), case.initial_states.clone()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for _ in range(3):
        out, expected = compiled(case.x, state), function(case.x, expected_state)
        assert torch.equal(out, expected)
        assert torch.equal(state, expected_state)
    assert not torch.equal(state, case.initial_states)


def test_compiled_varlen_states_equals_eager(device):
    x = make_case((1, 8, 20), device=device).x[0].T.contiguous()
    bounds = torch.tensor([0, 3, 3, 20], dtype=torch.int32, device=device)

    def function(x, bounds):
        return causal_conv1d_varlen_states(x * 2, bounds, 4)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, bounds), function(x, bounds))


def operator_arguments(name, is_full, device):
    """Arguments of an operator; with and without all that is optional."""
    case = make_case(
        SHAPE, 4, bias=is_full, states=is_full, seq_idx="padded" if is_full else None, device=device
    )

    def full(tensor):
        return torch.zeros_like(tensor) if is_full else None

    common = (case.x, case.weight, case.bias)
    if name.startswith("forward"):
        inputs = (*common, case.seq_idx, case.initial_states)
        written = (torch.zeros_like(case.x), full(case.initial_states))
        return (*inputs, *(written if name.endswith("out") else ()), True)
    if name.startswith("backward"):
        inputs = (*common, case.dout, case.seq_idx, case.initial_states, case.dfinal_states)
        if name == "backward":
            return (*inputs, is_full, is_full, is_full, True)
        written = (full(case.weight), full(case.bias), full(case.initial_states))
        return (*inputs, torch.zeros_like(case.x), *written, True)
    if name.startswith("update"):
        state = torch.zeros(2, 8, 4, device=device)
        lens = torch.tensor([1, 2], dtype=torch.int32, device=device) if is_full else None
        indices = torch.tensor([1, 0], dtype=torch.int32, device=device) if is_full else None
        out = (torch.zeros_like(case.x),) if name.endswith("out") else ()
        return (case.x, state, case.weight, case.bias, *out, True, lens, indices)
    bounds = torch.tensor([0, 20, 33], dtype=torch.int32, device=device)
    return (case.x[0].T.contiguous(), bounds, 4)


DIFFERENTIABLE = ("forward", "forward_states", "backward", "varlen_states")
MUTATED = {
    **dict.fromkeys(DIFFERENTIABLE, set()),
    "forward_out": {"out", "final_states_out"},
    "backward_out": {"dx", "dweight", "dbias", "dinitial_states"},
    "update": {"conv_state"},
    "update_out": {"conv_state", "out"},
}


@pytest.mark.parametrize("is_full", (False, True), ids=("required", "optional"))
@pytest.mark.parametrize("name", MUTATED)
def test_opcheck(name, is_full, device):
    operator, arguments = getattr(ops, name).default, operator_arguments(name, is_full, device)
    torch.library.opcheck(operator, arguments)
    if name in DIFFERENTIABLE:
        arguments = tuple(
            a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in arguments
        )
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", MUTATED)
def test_schema_says_what_is_written(name):
    schema = getattr(ops, name).default._schema
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    assert written == MUTATED[name]
    assert len(schema.returns) == 0 if name.endswith("out") else len(schema.returns) > 0
    assert not any(r.alias_info for r in schema.returns)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_have_the_shape_type_and_layout_of_real_ones(layout, device):
    case = make_case(SHAPE, 4, torch.bfloat16, layout=layout, states=True, device=device)
    real = causal_conv1d_fn(case.x, case.weight, case.bias, None, case.initial_states, True)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (case.x, case.weight, case.bias)]
        states = mode.from_tensor(case.initial_states)
        fake = causal_conv1d_fn(*fakes, None, states, True)
        y = causal_conv1d_update(fakes[0], states, *fakes[1:])
        assert y.shape == case.x.shape and y.dtype == torch.bfloat16
    for a, b in zip(fake, real, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        assert a.stride() == b.stride()
