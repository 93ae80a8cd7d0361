"""Gradients through torch's autograd."""

import itertools

import pytest
import torch
from helpers import ACTIVATIONS, GRADIENTS, assert_gradients, lay_out, make_case, randn

from causal_conv1d import causal_conv1d_fn
from causal_conv1d.reference import causal_conv1d_ref

SHAPE = (2, 6, 11)


def leaves(case):
    """The case with float inputs that require gradients."""
    dout, dfinal = case.dout, case.dfinal_states
    case = case.map(lambda tensor: tensor.detach().requires_grad_())
    case.dout, case.dfinal_states = dout, dfinal
    return case


def fn(case, **options):
    return causal_conv1d_fn(
        case.x,
        case.weight,
        case.bias,
        case.seq_idx,
        case.initial_states,
        activation=case.activation,
        **options,
    )


def inputs_of(case):
    tensors = (case.x, case.weight, case.bias, case.initial_states)
    return {n: t for n, t in zip(GRADIENTS, tensors, strict=True) if t is not None}


def gradients_of(case, outputs, grads, inputs=None):
    inputs = inputs or inputs_of(case)
    found = torch.autograd.grad(outputs, list(inputs.values()), grads, allow_unused=True)
    return dict.fromkeys(GRADIENTS) | dict(zip(inputs, found, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", (1, 2, 4, 6, 9))
@pytest.mark.parametrize("seq_idx", (None, "padded", "recurring"))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_gradcheck(layout, seq_idx, width, activation, device):
    """Of out and final_states together, over x, weight, bias and initial_states."""
    case = leaves(
        make_case(
            (2, 3, 7),
            width,
            torch.float64,
            states=True,
            seq_idx=seq_idx,
            activation=activation,
            layout=layout,
            device=device,
        )
    )

    def function(x, weight, bias, initial_states):
        return causal_conv1d_fn(
            x, weight, bias, case.seq_idx, initial_states, True, None, activation
        )

    inputs = (case.x, case.weight, case.bias, case.initial_states)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


@pytest.mark.parametrize("seq_idx", (None, "padded"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation, seq_idx, device):
    case = leaves(
        make_case((2, 3, 7), 4, torch.float64, states=True, seq_idx=seq_idx, device=device)
    )

    def function(x, weight, bias, initial_states):
        return causal_conv1d_ref(
            x, weight, bias, initial_states, True, None, activation, case.seq_idx
        )

    inputs = (case.x, case.weight, case.bias, case.initial_states)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_gradients_through_the_final_states_only(layout, device):
    case = leaves(make_case(SHAPE, 4, states=True, layout=layout, device=device))
    _, final_states = fn(case, return_final_states=True)
    found = gradients_of(case, final_states, case.dfinal_states)
    expected = torch.zeros_like(case.x)
    expected[..., -3:] = case.dfinal_states
    assert torch.equal(found["dx"], expected)
    for name in ("dweight", "dbias", "dinitial_states"):
        assert found[name] is None or not found[name].any(), name


def test_gradients_of_a_short_sequence_go_through_to_the_initial_state(device):
    case = leaves(make_case((2, 6, 2), 6, states=True, device=device))
    _, final_states = fn(case, return_final_states=True)
    found = gradients_of(case, final_states, case.dfinal_states)
    assert torch.equal(found["dx"], case.dfinal_states[..., 3:])
    assert torch.equal(found["dinitial_states"][..., 2:], case.dfinal_states[..., :3])
    assert not found["dinitial_states"][..., :2].any()


def test_gradients_through_out_only_although_final_states_were_returned(device):
    case = leaves(make_case(SHAPE, 4, states=True, device=device))
    out, _ = fn(case, return_final_states=True)
    found = gradients_of(case, out, case.dout)
    case.dfinal_states = None
    assert_gradients(case, found)


def test_gradients_flow_through_a_chain_of_chunks(device):
    """Two chunks joined by the state have the gradients of the whole."""
    case = leaves(make_case((2, 6, 30), 4, states=True, device=device))
    states, outs = case.initial_states, []
    for x in case.x.split((13, 17), dim=-1):
        out, states = causal_conv1d_fn(
            x, case.weight, case.bias, None, states, True, None, case.activation
        )
        outs.append(out)
    outputs = (torch.cat(outs, dim=-1), states)
    assert_gradients(case, gradients_of(case, outputs, (case.dout, case.dfinal_states)))


SUBSETS = [c for n in range(1, 5) for c in itertools.combinations(GRADIENTS, n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_any_subset_of_inputs_may_need_gradients(wanted, device):
    case = make_case(SHAPE, 4, states=True, device=device)
    inputs = {name: tensor for name, tensor in inputs_of(case).items() if name in wanted}
    for tensor in inputs.values():
        tensor.requires_grad_()
    outputs = fn(case, return_final_states=True)
    grads = (case.dout, case.dfinal_states)
    if wanted == ("dweight",) or wanted == ("dbias",) or wanted == ("dweight", "dbias"):
        outputs, grads = outputs[:1], grads[:1]  # final_states depend on neither
        case.dfinal_states = None
    found = gradients_of(case, outputs, grads, inputs)
    assert {name for name in GRADIENTS if found[name] is not None} == set(wanted)
    assert_gradients(case, found)


def test_without_anything_that_needs_gradients_there_is_no_graph(device):
    case = make_case(SHAPE, 4, states=True, device=device)
    out, final_states = fn(case, return_final_states=True)
    assert not out.requires_grad and out.grad_fn is None and not final_states.requires_grad
    case = leaves(case)
    with torch.no_grad():
        assert not fn(case).requires_grad
    assert fn(case).requires_grad


def test_bias_and_initial_states_may_be_absent(device):
    case = leaves(make_case(SHAPE, 4, bias=False, device=device))
    assert_gradients(case, gradients_of(case, fn(case), case.dout))


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
@pytest.mark.parametrize("dout_layout", ("expanded", "channel_last", "strided", "scalar"))
def test_dout_of_any_layout(dout_layout, layout, device):
    """Such as the one of stride 0 that out.sum() makes."""
    case = leaves(make_case(SHAPE, 4, layout=layout, device=device))
    out = fn(case)
    if dout_layout == "scalar":
        case.dout = torch.ones_like(case.x)
        found = gradients_of(case, out.sum(), None)
    else:
        case.dout = lay_out(case.dout, dout_layout)
        found = gradients_of(case, out, case.dout)
    assert_gradients(case, found)


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_out_may_be_changed_in_place_before_the_backward(layout, device):
    case = leaves(make_case(SHAPE, 4, layout=layout, device=device))
    residual = randn(*SHAPE, device=device, seed=9)
    out = fn(case)
    expected = out.detach() + residual
    out += residual
    out.add_(0.0).mul_(1.0)
    assert torch.equal(out, expected)
    assert_gradients(case, gradients_of(case, out, case.dout))


def test_final_states_out_is_written_returned_and_differentiable(device):
    case = leaves(make_case(SHAPE, 4, states=True, device=device))
    _, expected = fn(case, return_final_states=True)
    buffer = torch.full(case.state_shape, torch.nan, device=device)
    version = buffer._version
    out, final_states = fn(case, return_final_states=True, final_states_out=buffer)
    assert final_states.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, expected)
    assert buffer._version > version, "autograd must see that the buffer was written"
    assert final_states.requires_grad
    grads = (case.dout, case.dfinal_states)
    assert_gradients(case, gradients_of(case, (out, final_states), grads))


def test_a_graph_that_needs_the_old_final_states_out_notices_the_write(device):
    case = leaves(make_case(SHAPE, 4, states=True, device=device))
    buffer = torch.ones(case.state_shape, device=device)
    factor = torch.ones(case.state_shape, device=device, requires_grad=True)
    product = factor * buffer  # saves buffer
    fn(case, return_final_states=True, final_states_out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_an_input_changed_in_place_before_the_backward_is_noticed(device):
    case = leaves(make_case(SHAPE, 4, device=device))
    x = case.x.detach().clone().requires_grad_() * 1
    out = causal_conv1d_fn(x, case.weight, case.bias, activation="silu")
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_twice_with_retain_graph_accumulates(device):
    case = leaves(make_case(SHAPE, 4, device=device))
    out = fn(case)
    out.backward(case.dout, retain_graph=True)
    first = case.weight.grad.clone()
    out.backward(case.dout)
    torch.testing.assert_close(case.weight.grad, 2 * first, rtol=1e-6, atol=0)


def test_only_the_inputs_are_saved_for_the_backward(device):
    case = leaves(make_case(SHAPE, 4, states=True, seq_idx="packed", device=device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fn(case, return_final_states=True)
    inputs = (case.x, case.weight, case.bias, case.seq_idx, case.initial_states)
    known = {tensor.data_ptr() for tensor in inputs}
    assert saved and all(tensor.data_ptr() in known for tensor in saved)
