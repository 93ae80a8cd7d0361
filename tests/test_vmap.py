"""torch.vmap: one call of an operator for all that is mapped, over every argument."""

import contextlib
import itertools

import pytest
import torch
import torch.func
from helpers import randn, sequence_ids
from test_derivatives import NESTED_VMAP, NO_NESTED_VMAP
from torch.utils._python_dispatch import TorchDispatchMode

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from causal_conv1d.reference import (
    causal_conv1d_ref,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states_ref,
)

V, B, D, L, W = 3, 2, 4, 9, 4
SHAPES = {"x": (B, D, L), "weight": (D, W), "bias": (D,), "initial_states": (B, D, W - 1)}
# Older ones fail at a dispatch mode around torch.func.
MODES_WORK = torch.__version__ >= (2, 9)
MAPPED = [m for m in itertools.product((False, True), repeat=4) if any(m)]


nested = pytest.mark.skipif(not NESTED_VMAP, reason=NO_NESTED_VMAP)


class Calls(TorchDispatchMode):
    """The names of this library's operators that were called."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "causal_conv1d":
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


def values(mapped, device, dtype=torch.float64):
    """Each argument, with a dimension of size V first if it is mapped."""
    return [
        randn(*((V,) if is_mapped else ()), *shape, dtype=dtype, device=device, seed=i)
        for i, (shape, is_mapped) in enumerate(zip(SHAPES.values(), mapped, strict=True))
    ]


def entry(arguments, mapped, v):
    return [a[v] if is_mapped else a for a, is_mapped in zip(arguments, mapped, strict=True)]


def fn(x, weight, bias, states, seq_idx=None):
    return causal_conv1d_fn(x, weight, bias, seq_idx, states, True, None, "silu")


def ref(x, weight, bias, states, seq_idx=None):
    return causal_conv1d_ref(x, weight, bias, states, True, None, "silu", seq_idx)


def dims(mapped):
    return tuple(0 if is_mapped else None for is_mapped in mapped)


def assert_stacked(found, expected):
    """found are those of vmap, expected a list of tuples."""
    for i, tensor in enumerate(found):
        torch.testing.assert_close(tensor, torch.stack([e[i] for e in expected]))
        assert tensor.any()


@pytest.mark.parametrize("mapped", MAPPED, ids=str)
def test_fn(mapped, device):
    arguments = values(mapped, device)
    with Calls() if MODES_WORK else contextlib.nullcontext() as calls:
        found = torch.vmap(fn, dims(mapped))(*arguments)
    assert calls is None or calls.names == ["forward_states"]
    assert_stacked(found, [ref(*entry(arguments, mapped, v)) for v in range(V)])


@pytest.mark.parametrize("is_mapped", (False, True), ids=("ids", "ids mapped"))
@pytest.mark.parametrize("mapped", MAPPED, ids=str)
def test_fn_with_seq_idx(mapped, is_mapped, device):
    arguments = [*values(mapped, device), sequence_ids(V, B * L, "padded").reshape(V, B, L)]
    arguments[4] = arguments[4].to(device)
    if not is_mapped:
        arguments[4] = arguments[4][0]
    mapped = (*mapped, is_mapped)
    found = torch.vmap(fn, dims(mapped))(*arguments)
    assert_stacked(found, [ref(*entry(arguments, mapped, v)) for v in range(V)])


@pytest.mark.parametrize("mapped", ((True, True, False, False), (True, False, True, True)), ids=str)
def test_any_dimension(mapped, device):
    arguments = values(mapped, device)
    moved = [a.movedim(0, -1) if m else a for a, m in zip(arguments, mapped, strict=True)]
    found = torch.vmap(fn, tuple(-1 if m else None for m in mapped), (1, 2))(*moved)
    found = (found[0].movedim(1, 0), found[1].movedim(2, 0))
    assert_stacked(found, [ref(*entry(arguments, mapped, v)) for v in range(V)])


def loss(function, *arguments):
    out, final = function(*arguments)
    return out.square().sum() + (out * final.sum()).sin().sum()


@pytest.mark.parametrize("mapped", MAPPED, ids=str)
def test_gradients_of_each_entry(mapped, device):
    arguments = values(mapped, device)

    def gradient(function):
        return torch.func.grad(lambda *a: loss(function, *a), (0, 1, 2, 3))

    with Calls() if MODES_WORK else contextlib.nullcontext() as calls:
        found = torch.vmap(gradient(fn), dims(mapped))(*arguments)
    assert calls is None or calls.names == ["forward_states", "backward"]
    expected = [gradient(ref)(*entry(arguments, mapped, v)) for v in range(V)]
    assert_stacked(found, expected)


@pytest.mark.parametrize("kind", (None, "padded"))
@pytest.mark.parametrize("create_graph", (False, True))
def test_per_sample_gradients(create_graph, kind, device):
    """Of the parameters, for each entry of the batch, and their derivative."""
    if create_graph and not NESTED_VMAP:
        pytest.skip(NO_NESTED_VMAP)
    x, weight, bias, _ = values((False,) * 4, device)
    ids = None if kind is None else sequence_ids(B, L, kind).to(device)

    def per_sample(function):
        def of(weight, bias, x, ids):
            row = None if ids is None else ids[None]
            return loss(function, x[None], weight, bias, None, row)

        return torch.vmap(torch.func.grad(of, (0, 1)), (None, None, 0, None if ids is None else 0))

    if not create_graph:
        found = per_sample(fn)(weight, bias, x, ids)
        expected = per_sample(ref)(weight, bias, x, ids)
    else:

        def total(function):
            return lambda w, b: sum(g.pow(3).sum() for g in per_sample(function)(w, b, x, ids))

        found = torch.func.grad(total(fn), (0, 1))(weight, bias)
        expected = torch.func.grad(total(ref), (0, 1))(weight, bias)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert a.any()


@pytest.mark.parametrize("mapped", MAPPED, ids=str)
def test_nothing_mapped_over(mapped, device):
    """A mapped dimension of size 0."""
    arguments = [
        a[:0] if is_mapped else a
        for a, is_mapped in zip(values(mapped, device), mapped, strict=True)
    ]
    out, final = torch.vmap(fn, dims(mapped))(*arguments)
    assert out.shape == (0, B, D, L) and final.shape == (0, B, D, W - 1)

    def total(*arguments):
        out, final = fn(*arguments)
        return out.pow(3).sum() + final.pow(3).sum()

    gradients = torch.vmap(torch.func.grad(total, (0, 1, 2, 3)), dims(mapped))
    for gradient, shape in zip(gradients(*arguments), SHAPES.values(), strict=True):
        assert gradient.shape == (0, *shape)


@pytest.mark.parametrize("shape", ((0, D, L), (B, 0, L), (B, D, 0)), ids=str)
def test_entries_without_elements(shape, device):
    x = torch.zeros(V, *shape, device=device)
    weight = torch.ones(V, shape[1], W, device=device)
    for args, in_dims in (((x, weight[0]), (0, None)), ((x, weight), (0, 0))):
        assert torch.vmap(causal_conv1d_fn, in_dims)(*args).shape == x.shape
    jacobian = torch.func.jacrev(causal_conv1d_fn)(x[0], weight[0])
    assert jacobian.shape == (*shape, *shape)


@nested
def test_two_levels(device):
    x = randn(2, V, B, D, L, dtype=torch.float64, device=device)
    weight = randn(2, D, W, dtype=torch.float64, device=device)
    inner = torch.vmap(lambda x, w: causal_conv1d_fn(x, w, activation="silu"), (0, None))
    found = torch.vmap(inner)(x, weight)
    for i, j in itertools.product(range(2), range(V)):
        expected = causal_conv1d_ref(x[i, j], weight[i], activation="silu")
        torch.testing.assert_close(found[i, j], expected)


@nested
def test_gradients_through_a_map(device):
    arguments = values((True, True, False, False), device)

    def total(function):
        def of(x, weight, bias, states):
            mapped = torch.vmap(function, (0, 0, None, None))(x, weight, bias, states)
            return sum(tensor.pow(3).sum() for tensor in mapped)

        return torch.func.grad(of, (0, 1, 2, 3))(*arguments)

    for a, b in zip(total(fn), total(ref), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------- update


def run_update(function, x, state, weight, bias, lens=None, rows=None):
    out = function(x, state, weight, bias, "silu", lens, rows)
    return out, state


@pytest.mark.parametrize("seqlen", (None, 5))
@pytest.mark.parametrize("mapped", [m for m in MAPPED if m[3]], ids=str)
def test_update(mapped, seqlen, device):
    x, weight, bias, state = values(mapped, device)
    x = x[..., 0] if seqlen is None else x[..., :seqlen]
    arguments, order = [x, state, weight, bias], (mapped[0], mapped[3], mapped[1], mapped[2])
    expected = []
    for v in range(V):
        own = [tensor.clone() for tensor in entry(arguments, order, v)]
        expected.append(run_update(causal_conv1d_update_ref, *own))
    found = torch.vmap(lambda *a: causal_conv1d_update(*a, "silu"), dims(order))(*arguments)
    assert_stacked((found, state), expected)


@pytest.mark.parametrize("what", ("ring", "indexed", "indexed ring"))
def test_update_of_rings_and_rows(what, device):
    x = randn(V, B, D, device=device)
    state = randn(V, 5, D, 6, device=device, seed=1)
    if what == "ring":
        state = state[:, :B].contiguous()
    weight = randn(D, W, device=device, seed=2)

    def index(rows):
        return torch.tensor(rows, dtype=torch.int32, device=device)

    lens = index([[1, 2], [7, 0], [5, 5]]) if "ring" in what else None
    rows = index([[4, 0], [-1, 3], [2, 1]]) if "indexed" in what else None
    expected = []
    for v in range(V):
        mine = [None if a is None else a[v].clone() for a in (lens, rows)]
        own = run_update(causal_conv1d_update_ref, x[v], state[v].clone(), weight, None, *mine)
        expected.append(own)
    in_dims = (0, 0, None if lens is None else 0, None if rows is None else 0)
    found = torch.vmap(
        lambda x, s, lens, rows: causal_conv1d_update(x, s, weight, None, "silu", lens, rows),
        in_dims,
    )(x, state, lens, rows)
    assert_stacked((found, state), expected)


def test_update_and_varlen_states_of_nothing(device):
    x, state = torch.zeros(0, B, D, device=device), torch.zeros(0, B, D, 5, device=device)
    weight, bounds = torch.ones(D, W, device=device), torch.zeros(0, 3, device=device).int()
    out = torch.vmap(lambda x, s: causal_conv1d_update(x, s, weight))(x, state)
    assert out.shape == x.shape
    for in_dims in ((0, None), (None, 0), (0, 0)):
        args = (x if in_dims[0] == 0 else torch.zeros(B, D, device=device),)
        args += (bounds if in_dims[1] == 0 else torch.tensor([0, 1, 2], device=device),)
        found = torch.vmap(lambda x, b: causal_conv1d_varlen_states(x, b, 4), in_dims)(*args)
        assert found.shape == (0, 2, D, 4)


def test_update_needs_a_state_for_each_entry(device):
    x, weight, _, state = values((True, False, False, False), device)
    with pytest.raises(RuntimeError, match="causal_conv1d_update: vmap must map conv_state"):
        torch.vmap(lambda x: causal_conv1d_update(x, state, weight))(x)


@pytest.mark.parametrize("mapped", ((True, False), (False, True), (True, True)), ids=str)
def test_varlen_states(mapped, device):
    x = randn(V, 20, D, device=device)
    bounds = torch.tensor([[0, 3, 9, 20], [1, 1, 5, 7], [0, 0, 0, 20]], device=device)
    arguments = [x if mapped[0] else x[0], bounds if mapped[1] else bounds[0]]
    found = torch.vmap(lambda x, b: causal_conv1d_varlen_states(x, b, 4), dims(mapped))(*arguments)
    for v in range(V):
        expected = causal_conv1d_varlen_states_ref(*entry(arguments, mapped, v), 4)
        assert torch.equal(found[v], expected)
