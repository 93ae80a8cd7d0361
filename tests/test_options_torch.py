"""What torch does with the convolution with options: derivatives, compile, vmap and others."""

import itertools

import pytest
import torch
from helpers import lay_out, ops, randn
from options_cases import GRADIENTS, assert_close, call, leaves, make_case, reference_gradients
from tolerances import OUT
from torch.utils.checkpoint import checkpoint

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_fn

LENGTHS = [3, 0, 1, 4]
ROW = (1, 4, sum(LENGTHS))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(device, dtype=torch.float64, **options):
    options = {"lengths": LENGTHS, "states": True, "dilation": 2} | options
    return make_case(ROW, 3, dtype, device=device, **options)


def function_of(case, **options):
    """The call as a function of the tensors that are given, and those."""
    case, given = leaves(case)

    def run(*tensors):
        moved = case.map(lambda tensor: tensor)
        for name, tensor in zip(given, tensors, strict=True):
            setattr(moved, name, tensor)
        if case.residual_is_x:
            moved.residual = moved.x
        return call(moved, **options)

    return run, list(given.values())


FORMS = {
    "packed": {},
    "packed, x added": {"around": ("pre_gate", "x")},
    "seq_idx": {"lengths": None, "ids": "padded"},
    "dense": {"lengths": None, "dilation": 1, "activation": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_derivatives(form, device):
    run, tensors = function_of(small(device, **FORMS[form]))
    torch.autograd.gradcheck(run, tensors, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_derivatives_of_parts(device):
    run, tensors = function_of(small(device), split_sizes=[1, 3])

    def flat(*tensors):
        parts, final_states = run(*tensors)
        return (*parts, final_states)

    torch.autograd.gradcheck(flat, tensors, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(flat, tensors, fast_mode=True)


def test_any_of_the_inputs_may_need_gradients(device):
    case = make_case((1, 8, 40), 4, torch.float32, lengths=[9, 31], states=True, device=device)
    expected = reference_gradients(case)
    names = [*GRADIENTS.values(), "residual"]
    for count in (1, 2, 7):
        for chosen in itertools.combinations(names, count):
            moved = case.map(lambda tensor: tensor.detach().clone())
            inputs = [getattr(moved, name).requires_grad_() for name in chosen]
            out, final = call(moved)
            total = (out * case.dout).sum() + (final * case.dfinal_states).sum()
            found = torch.autograd.grad(total, inputs)
            for name, gradient in zip(chosen, found, strict=True):
                wanted = case.dout if name == "residual" else expected[f"d{name}"]
                assert_close(gradient, wanted, 2e-6, name=name)


def test_only_the_final_states_are_used(device):
    case, given = leaves(small(device))
    _, final = call(case)
    found = torch.autograd.grad(final, list(given.values()), case.dfinal_states, allow_unused=True)
    by_name = dict(zip(given, found, strict=True))
    assert by_name["x"].any() and by_name["initial_states"].any()
    for name in ("weight", "bias", "post_gate", "residual"):
        assert by_name[name] is None or not by_name[name].any()


def test_only_the_inputs_are_saved(device):
    case, given = leaves(small(device, torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(case)
        call(case, split_sizes=[1, 3])
    known = {t.untyped_storage().data_ptr() for t in (*given.values(), case.cu_seqlens)}
    assert saved and all(t.untyped_storage().data_ptr() in known for t in saved)
    assert case.residual.data_ptr() not in {t.data_ptr() for t in saved}


def test_an_input_that_was_changed_is_noticed(device):
    for name in ("pre_gate", "post_gate"):
        case, _ = leaves(small(device))
        changed = getattr(case, name).detach().clone()
        setattr(case, name, changed)
        out, _ = call(case)
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_final_states_out(device):
    for needs_grad in (False, True):
        case = make_case((2, 8, 20), 4, dilation=2, states=True, device=device)
        case.x.requires_grad_(needs_grad)
        expected, final = call(case)
        buffer = torch.full(case.state_shape, torch.nan, device=device)
        out, states = call(case, final_states_out=buffer)
        assert torch.equal(out, expected) and torch.equal(states, final) and states is buffer
        held = case.initial_states.clone()
        out, states = call(case, final_states_out=held, initial_states=held)
        assert torch.equal(out, expected) and torch.equal(held, final)
        if needs_grad:
            out.sum().backward()
    with pytest.raises(RuntimeError, match="^causal_conv1d_fn: final_states_out must"):
        call(case, final_states_out=buffer[:, :, 1:])


def arguments(device, is_full):
    """Of conv_forward and conv_backward, with and without all that is optional."""
    case = small(device, torch.float32)
    optional = (None, case.cu_seqlens, case.initial_states)
    around = (case.pre_gate, case.post_gate, case.residual)
    if not is_full:
        optional, around = (None,) * 3, (None,) * 3
    bias = case.bias if is_full else None
    forward = (case.x, case.weight, bias, *optional, *around, 2, is_full, True)
    states = (optional[2], case.dfinal_states if is_full else None)
    needed = 0b111110 if is_full else 0
    rest = (*optional[:2], *states, *around[:2], 2, True, needed, True)
    return forward, (case.x, case.weight, bias, case.dout, *rest)


def requiring_grad(arguments):
    return tuple(
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    )


@pytest.mark.parametrize("is_full", (False, True), ids=("required", "optional"))
def test_opcheck(is_full, device):
    forward, backward = arguments(device, is_full)
    torch.library.opcheck(ops.conv_forward.default, requiring_grad(forward))
    torch.library.opcheck(ops.conv_backward.default, requiring_grad(backward))
    if not is_full:
        return
    torch.library.opcheck(ops.split_forward.default, requiring_grad((*forward, [3, 1])))
    parts = (*backward[:3], list(backward[3].split([3, 1], 1)), *backward[4:])
    torch.library.opcheck(ops.split_backward.default, parts)
    written = [t.clone() for t in ops.conv_forward(*forward)]
    torch.library.opcheck(ops.conv_forward_out.default, (*forward[:9], *written, 2, True))
    gradients = [t.clone() for t in ops.conv_backward(*backward)]
    given = (*backward[:10], *gradients, 2, True, True)
    torch.library.opcheck(ops.conv_backward_out.default, given)
    state = randn(1, 4, 6, device=device)
    lens = torch.tensor([3], device=device)
    given = (forward[0], state, *forward[1:3], True, lens, lens * 0, 2)
    torch.library.opcheck(ops.update_dilated.default, given)


def test_compiled(device):
    case = make_case((1, 8, 40), 4, lengths=[9, 0, 31], states=True, dilation=2, device=device)
    names = ("x", "weight", "bias", "initial_states", "pre_gate", "post_gate", "residual")

    def function(x, weight, bias, initial_states, pre_gate, post_gate, residual):
        around = (pre_gate, post_gate, residual)
        out, final = causal_conv1d_varlen_fn(
            x * 2, weight, bias, case.cu_seqlens, initial_states, True, "silu", *around, 2
        )
        first, second = causal_conv1d_fn(x, weight, pre_gate=pre_gate, split_sizes=(2, 6))
        total = (out + 1).square().sum() + final.pow(3).sum()
        return total + first.sum() + second.square().sum()

    def gradients(function):
        inputs = [getattr(case, name).detach().clone().requires_grad_() for name in names]
        value = function(*inputs)
        return (value, *torch.autograd.grad(value, inputs))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients(compiled), gradients(function), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_compiled_with_dynamic_shapes_and_export(device):
    weight = randn(4, 3, device=device)

    def function(x, bounds, gate):
        out, final = causal_conv1d_varlen_fn(x, weight, None, bounds, None, True, "silu", gate)
        return out * 2, final

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 4], [5, 0, 9], [1, 1, 1, 6]):
        x = randn(sum(lengths), 4, device=device)
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
        for found, expected in zip(compiled(x, bounds, x), function(x, bounds, x), strict=True):
            assert torch.equal(found, expected)

    class Layer(torch.nn.Module):
        def forward(self, x, bounds):
            return causal_conv1d_varlen_fn(x, weight, None, bounds, dilation=2, residual=x)

    program = torch.export.export(Layer(), (x, bounds))
    assert torch.equal(program.module()(x, bounds), Layer()(x, bounds))


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    weight = randn(8, 3)

    class Layer(torch.nn.Module):
        def forward(self, x, gate):
            around = {"pre_gate": gate, "post_gate": gate, "residual": x, "dilation": 2}
            return causal_conv1d_fn(x, weight, activation="silu", **around)

    inputs = randn(2, 8, 12), randn(2, 8, 12, seed=1)
    path = str(tmp_path / "layer.onnx")
    torch.onnx.export(Layer(), inputs, path, dynamo=False)
    session = onnxruntime.InferenceSession(path)
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    (out,) = session.run(None, given)
    torch.testing.assert_close(torch.from_numpy(out), Layer()(*inputs), rtol=1e-4, atol=1e-5)

    class Packed(torch.nn.Module):
        def forward(self, x, bounds):
            return causal_conv1d_varlen_fn(x, weight, None, bounds)

    packed = inputs[0][:1], torch.tensor([0, 3, 12])
    with pytest.raises(RuntimeError, match="cu_seqlens must not be given to an ONNX export"):
        torch.onnx.export(Packed(), packed, path, dynamo=False)


def test_compiled_update_with_a_dilation(device):
    x, weight = randn(2, 4, 5, device=device), randn(4, 3, device=device)
    state = randn(2, 4, 4, device=device)
    other = state.clone()

    def function(x, state):
        return causal_conv1d_update(x * 2, state, weight, dilation=2) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, state), function(x, other)) and torch.equal(state, other)


def test_update_with_a_dilation_has_no_derivative(device):
    x, weight = randn(2, 4, device=device), randn(4, 3, device=device).requires_grad_()
    out = causal_conv1d_update(x, randn(2, 4, 4, device=device), weight, dilation=2)
    with pytest.raises(RuntimeError, match="causal_conv1d_update: it has no derivative"):
        out.sum().backward()
    leaf = randn(2, 4, 4, device=device).requires_grad_()
    with pytest.raises(RuntimeError, match="conv_state requires grad"):
        causal_conv1d_update(x, leaf, weight, dilation=2)
    with pytest.raises(RuntimeError, match="vmap cannot map it with a dilation"):
        states = randn(3, 2, 4, 4, device=device)
        torch.vmap(lambda s: causal_conv1d_update(x, s, weight.detach(), dilation=2))(states)


def each_alone(function, in_dims, *inputs):
    """torch.vmap of function gives what its calls one by one give."""
    found = torch.vmap(function, in_dims)(*inputs)
    for i in range(3):
        one = (
            t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims, strict=True)
        )
        expected = function(*one)
        for a, b in zip(
            *(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True
        ):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


def test_vmap(device):
    x, gate = randn(3, 2, 4, 9, device=device), randn(2, 4, 9, device=device, seed=1)
    weight = randn(3, 4, 3, device=device, seed=2)
    one = weight[0]
    ids = torch.tensor([[0] * 4 + [1] * 5] * 2, dtype=torch.int32, device=device)
    bounds = torch.tensor([[0, 4, 9], [0, 0, 9], [2, 5, 7]], device=device)
    around = {"pre_gate": gate, "dilation": 2, "return_final_states": True}

    def packed(x, bounds):
        return causal_conv1d_varlen_fn(x[:1], one, None, bounds, None, True, None, residual=x[:1])

    each_alone(lambda x: causal_conv1d_fn(x, one, residual=x, **around), (0,), x)
    each_alone(lambda w: causal_conv1d_fn(x[0], w, seq_idx=ids, **around), (0,), weight)
    each_alone(
        lambda x, w, i: causal_conv1d_fn(x, w, seq_idx=i, **around),
        (0, 0, 0), x, weight, ids.expand(3, 2, 9),
    )  # fmt: skip
    each_alone(packed, (0, None), x, bounds[0])
    each_alone(packed, (0, 0), x, bounds)
    each_alone(lambda x: causal_conv1d_fn(x, one, post_gate=gate, split_sizes=[1, 3]), (0,), x)

    def loss(x, weight):
        return causal_conv1d_fn(x, weight, pre_gate=gate, residual=x).square().sum()

    def loss_of_parts(x, weight):
        parts = causal_conv1d_fn(x, weight, pre_gate=gate, split_sizes=[1, 3])
        return parts[0].square().sum() + parts[1].sum()

    for function in (loss, loss_of_parts):
        each_alone(torch.func.grad(function, (0, 1)), (0, 0), x, weight)


def test_torch_func(device):
    case = small(device)
    run, tensors = function_of(case)
    tensors = [t.detach() for t in tensors]

    def loss(weight):
        out, final = run(tensors[0], weight, *tensors[2:])
        return out.pow(3).sum() + final.square().sum()

    weight = tensors[1]
    _, tangent = torch.func.jvp(loss, (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(torch.func.grad(loss)(weight).sum(), tangent)
    hessian = torch.func.hessian(loss)(weight)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, weight))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_leaves_the_types_of_inputs(dtype, device):
    case = make_case((2, 8, 30), 4, dtype, other_dtype=torch.float32, device=device)
    expected, _ = call(case)
    with torch.autocast(device, dtype=dtype):
        found, _ = call(case)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_checkpoint(device):
    case = make_case((1, 8, 40), 4, lengths=[9, 31], dilation=2, device=device)
    names = ("x", "weight", "pre_gate")

    def gradients(run):
        inputs = [getattr(case, name).detach().clone().requires_grad_() for name in names]

        def function(x, weight, gate):
            bounds = case.cu_seqlens
            return causal_conv1d_varlen_fn(x * 2, weight, None, bounds, pre_gate=gate, dilation=2)

        return torch.autograd.grad(run(function, *inputs).square().sum(), inputs)

    saved = []

    def policy(context, operator, *args, **kwargs):
        is_ours = operator is ops.conv_forward.default
        saved.append(is_ours)
        policies = torch.utils.checkpoint.CheckpointPolicy
        return policies.MUST_SAVE if is_ours else policies.PREFER_RECOMPUTE

    def selective():
        return torch.utils.checkpoint.create_selective_checkpoint_contexts(policy)

    plain = gradients(lambda function, *inputs: function(*inputs))
    for options in ({}, {"context_fn": selective}):
        found = gradients(lambda f, *i: checkpoint(f, *i, use_reentrant=False, **options))  # noqa: B023
        assert all(map(torch.equal, found, plain))
    assert any(saved)


def test_fake_results_are_those_of_real_ones(device):
    for where in ("channel_first", "channel_last", "channel_last_slice", "strided"):
        case = make_case((2, 8, 30), 4, torch.bfloat16, states=True, dilation=2, device=device)
        case.x = lay_out(case.x, where)
        real = call(case)
        parts = call(case, split_sizes=[3, 5])[0]
        fake = call(case.map(lambda tensor: tensor.to("meta")))
        fake_parts = call(case.map(lambda tensor: tensor.to("meta")), split_sizes=[3, 5])[0]
        for a, b in zip((*fake, *fake_parts), (*real, *parts), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_gradients_agree_in_a_16_bit_type(device):
    """Through autograd, in the types of the tensors."""
    around = ("pre_gate", "x")
    shape, lengths = (1, 72, 300), [100, 1, 199]
    case = make_case(
        shape, 4, torch.bfloat16, lengths=lengths, states=True, around=around, device=device
    )
    leaf, given = leaves(case)
    out, final = call(leaf)
    names = [name for name in given if name != "residual"]
    inputs = [given[name] for name in names]
    found = torch.autograd.grad((out, final), inputs, (case.dout, case.dfinal_states))
    expected = reference_gradients(case, torch.bfloat16)
    for name, gradient in zip(names, found, strict=True):
        assert_close(gradient, expected[f"d{name}"], OUT[torch.bfloat16], name=name)


def test_flops(device):
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = randn(2, 8, 64, device=device).requires_grad_(), randn(8, 4, device=device)
    with FlopCounterMode(display=False) as counter:
        causal_conv1d_fn(x, weight, residual=x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 4
