"""Every derivative that torch can ask for: forward mode, of higher order, and under torch.func."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.func
from helpers import dtype_id, make_case, randn, sequence_ids
from torch.utils._pytree import tree_leaves

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from causal_conv1d.reference import causal_conv1d_ref, causal_conv1d_varlen_states_ref

IDS = (None, "padded", "recurring")


def fn(x, weight, bias, seq_idx, states, activation):
    return causal_conv1d_fn(x, weight, bias, seq_idx, states, True, None, activation)


def ref(x, weight, bias, seq_idx, states, activation):
    return causal_conv1d_ref(x, weight, bias, states, True, None, activation, seq_idx)


def arguments_of(device, width=4, shape=(2, 3, 6), seed=0):
    """x, weight, bias and initial states in float64."""
    case = make_case(shape, width, torch.float64, states=True, device=device, seed=seed)
    return case.x, case.weight, case.bias, case.initial_states


def ids_of(kind, device, shape=(2, 6)):
    return None if kind is None else sequence_ids(*shape, kind).to(device)


def loss_of(function, seq_idx, activation):
    """In which values and final states act upon each other, so that no term is linear."""

    def loss(x, weight, bias, states):
        out, final = function(x, weight, bias, seq_idx, states, activation)
        return out.square().sum() + (out * final.sum()).sin().sum() + final.pow(3).sum()

    return loss


def assert_same(found, expected):
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert any(b.any() for b in expected), "the expected values are all 0, nothing is tested"


ALL = (0, 1, 2, 3)
# It fails in an assertion of its own.
NESTED_VMAP = torch.__version__ >= (2, 6)
NO_NESTED_VMAP = "torch 2.5 cannot run an operator's batching rule within another transform"
ones = torch.ones_like
TRANSFORMS = {
    "grad": lambda f, a: torch.func.grad(f, ALL)(*a),
    "vjp": lambda f, a: torch.func.vjp(f, *a)[1](torch.tensor(2.0).to(a[0])),
    "jvp": lambda f, a: torch.func.jvp(f, a, tuple(map(ones, a))),
    "linearize": lambda f, a: torch.func.linearize(f, *a)[1](*map(ones, a)),
    "jacrev": lambda f, a: torch.func.jacrev(f, ALL)(*a),
    "jacfwd": lambda f, a: torch.func.jacfwd(f, ALL)(*a),
    "hessian": lambda f, a: torch.func.hessian(f, ALL)(*a),
    "reverse over reverse": lambda f, a: torch.func.jacrev(torch.func.jacrev(f, (0, 1)), ALL)(*a),
    "reverse over forward": lambda f, a: torch.func.jacrev(torch.func.jacfwd(f, (0, 1)), ALL)(*a),
    "forward over forward": lambda f, a: torch.func.jacfwd(torch.func.jacfwd(f, (0, 1)), ALL)(*a),
    "functional hvp": lambda f, a: torch.autograd.functional.hvp(f, a, a),
    "functional vhp": lambda f, a: torch.autograd.functional.vhp(f, a, a),
    "functional jacobian": lambda f, a: torch.autograd.functional.jacobian(f, a, vectorize=True),
    "forward-mode jacobian": lambda f, a: torch.autograd.functional.jacobian(
        f, a, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize("activation", (None, "silu"))
@pytest.mark.parametrize("seq_idx", IDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(transform, seq_idx, activation, device):
    if transform == "reverse over reverse" and not NESTED_VMAP:
        pytest.skip(NO_NESTED_VMAP)
    arguments, ids = arguments_of(device), ids_of(seq_idx, device)
    run = TRANSFORMS[transform]
    expected = run(loss_of(ref, ids, activation), arguments)
    assert_same(run(loss_of(fn, ids, activation), arguments), expected)
    with torch.no_grad():  # it is the caller's, not the transform's
        assert_same(run(loss_of(fn, ids, activation), arguments), expected)


@pytest.mark.parametrize("width", (1, 2, 6, 9))
def test_second_derivatives_of_other_widths(width, device):
    arguments = arguments_of(device, width)
    expected = torch.func.hessian(loss_of(ref, None, "silu"), ALL)(*arguments)
    assert_same(torch.func.hessian(loss_of(fn, None, "silu"), ALL)(*arguments), expected)


@pytest.mark.parametrize("seed", range(4))
def test_gradcheck_in_every_mode_of_random_options(seed, device):
    """Reverse and forward, batched, and of second order."""
    generator = torch.Generator().manual_seed(seed)

    def choose(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    batch, dim, seqlen, width = (choose(range(1, n)) for n in (4, 4, 7, 6))
    activation, layout = choose((None, "silu")), choose(("channel_first", "channel_last"))
    case = make_case(
        (batch, dim, seqlen), width, torch.float64, states=True, layout=layout, device=device
    )
    ids = ids_of(choose(IDS), device, (batch, seqlen))
    leaves = [t.detach().requires_grad_() for t in (case.x, case.weight, case.bias)]
    leaves.append(case.initial_states.detach().requires_grad_())

    def function(x, weight, bias, states):
        return fn(x, weight, bias, ids, states, activation)

    assert torch.autograd.gradcheck(
        function,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("argument", ALL)
def test_nested_gradients_with_a_loss_that_is_not_linear_in_the_output(argument, device):
    """The inner function's value itself depends on what the outer one differentiates."""
    arguments = list(arguments_of(device))

    def outer(function):
        def of(value):
            mine = [*arguments[:argument], value, *arguments[argument + 1 :]]

            def inner(scale):
                out, _ = function(mine[0] * scale, mine[1], mine[2], None, mine[3], "silu")
                return out.square().sum()

            return torch.func.grad(inner)(torch.ones((), dtype=torch.float64, device=device))

        return torch.func.grad(of)(arguments[argument])

    assert_same(outer(fn), outer(ref))


@pytest.mark.parametrize("seq_idx", IDS)
def test_gradient_penalty(seq_idx, device):
    leaves = [tensor.requires_grad_() for tensor in arguments_of(device)]
    ids = ids_of(seq_idx, device)

    def penalty(function):
        loss = loss_of(function, ids, "silu")(*leaves)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    assert_same(penalty(fn), penalty(ref))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=dtype_id)
def test_gradient_penalty_in_other_types(dtype, device):
    """Each gradient has its tensor's type, and is right to about its rounding."""
    case = make_case((2, 8, 33), 4, dtype, weight_dtype=torch.float32, states=True, device=device)
    tensors = (case.x, case.weight, case.bias, case.initial_states)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]

    def penalty(function, leaves):
        out, _ = function(*leaves[:3], None, leaves[3], "silu")
        (dx,) = torch.autograd.grad(out.double().square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.double().square().sum(), leaves)

    found, expected = penalty(fn, leaves), penalty(ref, exact)
    for leaf, a, b in zip(leaves, found, expected, strict=True):
        assert a.dtype == leaf.dtype
        assert (a.double() - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()


def test_gradients_of_the_backward_alone(device):
    """With respect to what came from above, and only some of it wanted."""
    x, weight, bias, states = (tensor.requires_grad_() for tensor in arguments_of(device))
    above = randn(*x.shape, dtype=torch.float64, device=device, seed=5).requires_grad_()

    def second(function):
        out, _ = function(x, weight, bias, None, states, "silu")
        (dweight,) = torch.autograd.grad(out, weight, above, create_graph=True)
        return torch.autograd.grad(dweight.square().sum(), (above, x))

    assert_same(second(fn), second(ref))


def test_third_derivative(device):
    arguments = arguments_of(device)

    def third(function):
        loss = loss_of(function, None, "silu")

        def curvature(x):
            return torch.func.hessian(lambda x: loss(x, *arguments[1:]))(x).square().sum()

        return torch.func.grad(curvature)(arguments[0])

    assert_same(third(fn), third(ref))


# ------------------------------------------------------------------------------------- dual tensors


@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad))
@pytest.mark.parametrize("argument", ALL)
def test_dual_tensors(argument, mode, device):
    arguments = arguments_of(device)
    tangent = ones(arguments[argument])

    def tangents(function):
        with forward_ad.dual_level(), mode():
            mine = list(arguments)
            mine[argument] = forward_ad.make_dual(mine[argument], tangent)
            found = function(*mine[:3], None, mine[3], "silu")
            return [forward_ad.unpack_dual(tensor).tangent for tensor in found]

    found, expected = tangents(fn), tangents(ref)
    if argument in (1, 2):  # the final states do not depend on them
        assert found.pop() is None
        expected.pop()
    assert_same(found, expected)


def test_without_tangents_a_dual_level_changes_nothing(device):
    x, weight, bias, states = arguments_of(device)
    expected = fn(x, weight, bias, None, states, "silu")
    with forward_ad.dual_level():
        found = fn(x, weight, bias, None, states, "silu")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and forward_ad.unpack_dual(a).tangent is None


def test_frozen_parameters_in_forward_mode(device):
    x, weight, bias, _ = arguments_of(device)
    for parameter in (weight, torch.nn.Parameter(weight)):
        with torch.no_grad():
            _, found = torch.func.jvp(
                lambda x, w=parameter: causal_conv1d_fn(x, w, bias), (x,), (x,)
            )
        assert_same(found, causal_conv1d_fn(x, weight, None))


# ------------------------------------------------------------------------------ the other functions


def test_update_has_no_derivative_and_says_so(device):
    x, weight, bias, states = arguments_of(device)
    token = x[:, :, 0]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(token, ones(token))
        with pytest.raises(RuntimeError, match=r"^causal_conv1d_update: .* forward mode"):
            causal_conv1d_update(dual, states.clone(), weight, bias)
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_update: .* forward mode"):
        torch.func.jvp(
            lambda t: causal_conv1d_update(t, states.clone(), weight), (token,), (token,)
        )
    for leaf in (0, 1, 2):
        arguments = [token.clone(), weight.clone(), bias.clone()]
        arguments[leaf].requires_grad_()
        state = states.clone()
        out = causal_conv1d_update(arguments[0], state, *arguments[1:], "silu")
        assert torch.equal(out, causal_conv1d_update(token, states.clone(), weight, bias, "silu"))
        assert out.requires_grad and not state.requires_grad
        with pytest.raises(RuntimeError, match=r"^causal_conv1d_update: it has no derivative"):
            out.sum().backward()
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_update: it has no derivative"):
        torch.func.grad(lambda w: causal_conv1d_update(token, states.clone(), w).sum())(weight)


@pytest.mark.parametrize("is_view", (False, True))
def test_update_of_a_state_in_a_graph(is_view, device):
    """As that of a cache which took its values from a layer before; a gradient then raises."""
    x, weight, bias, states = arguments_of(device)
    state = states.clone().requires_grad_() * 1
    state = state[:, :, :] if is_view else state
    expected = states.clone()
    token = x[:, :, 0].contiguous()
    out = causal_conv1d_update(token, state, weight, bias, "silu")
    assert torch.equal(out, causal_conv1d_update(token, expected, weight, bias, "silu"))
    assert torch.equal(state, expected)
    for result in (out, state):
        with pytest.raises(RuntimeError, match=r"^causal_conv1d_update: it has no derivative"):
            result.sum().backward(retain_graph=True)


def test_update_refuses_a_leaf_that_requires_grad(device):
    x, weight, bias, states = arguments_of(device)
    state = states.clone().requires_grad_()
    before = state.detach().clone()
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_update: conv_state requires grad"):
        causal_conv1d_update(x, state, weight, bias)
    assert torch.equal(state, before)
    with torch.no_grad():
        causal_conv1d_update(x, state, weight, bias)
    assert not torch.equal(state, before)


def test_varlen_states_are_differentiable(device):
    x = randn(12, 3, dtype=torch.float64, device=device).requires_grad_()
    bounds = torch.tensor([0, 2, 2, 12], device=device)
    assert torch.autograd.gradcheck(
        lambda x: causal_conv1d_varlen_states(x, bounds, 4), x, check_forward_ad=True
    )
    found = torch.func.grad(lambda x: causal_conv1d_varlen_states(x, bounds, 4).pow(3).sum())(x)
    cubes = causal_conv1d_varlen_states_ref(x, bounds, 4).pow(3)
    assert_same(found, torch.autograd.grad(cubes.sum(), x))
