"""The selective scan where it is rarely met: steps of no sequence, vmap over one or no entry, and
more states than the kernels take."""

import pytest
import torch

from causal_conv1d import selective_scan_fn, selective_state_update


def packed(device):
    """A scan of ones, whose only sequence is step 1 of 4."""
    ones = torch.ones(1, 1, 4, dtype=torch.float64, device=device)
    bounds = torch.tensor([1, 2], device=device)
    A = -torch.ones(1, 1, dtype=torch.float64, device=device)
    D = torch.ones(1, dtype=torch.float64, device=device)
    return ones, lambda u, delta: selective_scan_fn(u, delta, A, ones, ones, D, cu_seqlens=bounds)


def test_steps_of_no_sequence_are_zero_in_forward_mode(device):
    ones, function = packed(device)
    out, tangent = torch.func.jvp(lambda u: function(u, ones), (ones,), (ones,))
    expected = torch.tensor([[[0.0, 2, 0, 0]]], dtype=torch.float64, device=device)
    assert torch.equal(function(ones, ones), expected)
    assert torch.equal(out, expected) and torch.equal(tangent, expected)


def test_steps_of_no_sequence_have_no_gradient_of_a_gradient(device):
    ones, function = packed(device)
    u, delta = (ones.clone().requires_grad_() for _ in range(2))
    (first,) = torch.autograd.grad(function(u, delta).sum(), u, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), delta)
    assert torch.equal(second, torch.tensor([[[0.0, 1, 0, 0]]], dtype=second.dtype, device=device))


def test_forward_mode_checks_the_bounds(device):
    u = torch.ones(1, 1, 6, device=device)
    A = -torch.ones(1, 3, device=device)
    B = torch.ones(1, 3, 6, device=device)
    bounds = torch.tensor([4, 2], device=device)

    def function(u):
        return selective_scan_fn(u, u, A, B, B, cu_seqlens=bounds)

    with pytest.raises(RuntimeError, match="cu_seqlens must ascend"):
        torch.func.jvp(function, (u,), (u,))


@pytest.mark.parametrize(
    "shape, dim", [((4, 1, 3, 2), 0), ((4, 1, 5, 3, 2), 0), ((2, 1, 4, 3, 2), 2)], ids=str
)
def test_vmap_of_the_update_with_a_batch_of_one(device, shape, dim):
    """Each entry's state is updated once, where it lies."""
    state = torch.randn(shape, device=device)
    entries = state.movedim(dim, 0)
    x = torch.randn(entries.shape[:-1], device=device)
    A = -torch.ones(entries.shape[2:], device=device)
    B = torch.ones(entries.shape[1], shape[-1], device=device)

    def function(state, x):
        return selective_state_update(state, x, x, A, B, B)

    alone = entries.clone()
    expected = torch.stack([function(*pair) for pair in zip(alone, x, strict=True)])
    found = torch.vmap(function, in_dims=(dim, 0))(state, x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entries, alone)


def test_vmap_of_no_entry(device):
    one = torch.ones(1, 1, 4, device=device)
    A = -torch.ones(1, 1, device=device)
    none = torch.zeros(0, 1, 1, 4, device=device)
    found = torch.vmap(lambda u: selective_scan_fn(u, one, A, one, one))(none)
    assert found.shape == none.shape
    gradient = torch.func.grad(lambda u: selective_scan_fn(u, one, A, one, one).sum())
    assert torch.vmap(gradient)(none).shape == none.shape
    state, x = torch.zeros(0, 1, 3, 2, device=device), torch.zeros(0, 1, 3, device=device)
    A, B = -torch.ones(3, 2, device=device), torch.ones(1, 2, device=device)
    found = torch.vmap(lambda s, x: selective_state_update(s, x, x, A, B, B))(state, x)
    assert found.shape == x.shape


@pytest.fixture
def many(device):
    """A scan with more states than the kernels take."""
    shapes = (1, 2, 6), (1, 2, 6), (2, 257), (1, 257, 6), (1, 257, 6)
    u, delta, A, B, C = (torch.randn(shape, device=device) for shape in shapes)
    return [u, delta, -A.exp(), B, C]


@pytest.mark.parametrize("bounds", [[0, 7], [-1, 6], [4, 2], [0, 5, 3, 6], [0.0, 6.0]], ids=str)
def test_many_states_bounds_are_checked(many, bounds):
    bounds = torch.tensor(bounds, device=many[0].device)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        selective_scan_fn(*many, cu_seqlens=bounds)


@pytest.mark.parametrize("place, name", list(enumerate(("u", "delta", "A", "B", "C"))))
def test_many_states_types_are_checked(many, place, name):
    many[place] = many[place].long()
    with pytest.raises(ValueError, match=f"{name} must be of a float type"):
        selective_scan_fn(*many)


def test_many_states_under_func_grad(many):
    u, *rest = many
    found = torch.func.grad(lambda u: selective_scan_fn(u, *rest).sum())(u)
    leaf = u.clone().requires_grad_()
    (expected,) = torch.autograd.grad(selective_scan_fn(leaf, *rest).sum(), leaf)
    assert torch.equal(found, expected)


def many_update(device, **changed):
    arguments = {
        "state": torch.randn(2, 4, 300, device=device),
        "x": torch.randn(2, 4, device=device),
        "dt": torch.randn(2, 4, device=device),
        "A": -torch.rand(4, 300, device=device),
        "B": torch.randn(2, 300, device=device),
        "C": torch.randn(2, 300, device=device),
    }
    return arguments | {name: value.to(device) for name, value in changed.items()}


@pytest.mark.parametrize(
    "name, value",
    [
        ("dt", torch.randn(4, 2)),
        ("dt", torch.randn(1, 4)),
        ("x", torch.ones(2, 4, dtype=torch.long)),
        ("A", torch.ones(300, 4)),
        ("A", torch.tensor(1.0)),
        ("state", torch.ones(2, 4, 300, dtype=torch.int32)),
    ],
)
def test_many_states_the_updates_arguments_are_checked(device, name, value):
    arguments = many_update(device, **{name: value})
    before = arguments["state"].clone()
    with pytest.raises(RuntimeError, match=f"selective_state_update: {name} must"):
        selective_state_update(**arguments)
    assert torch.equal(arguments["state"], before)


@pytest.mark.parametrize("indices", [[0, 2], [0, 0], [0.0, 1.0]], ids=str)
def test_many_states_the_updates_rows_are_checked(indices):
    with pytest.raises(RuntimeError, match="indices must"):
        selective_state_update(**many_update("cpu"), state_batch_indices=torch.tensor(indices))


def test_many_states_the_update_has_no_derivative(device):
    arguments = many_update(device)
    arguments["x"].requires_grad_()
    out = selective_state_update(**arguments)
    with pytest.raises(RuntimeError, match="selective_state_update: it has no derivative"):
        out.sum().backward()
