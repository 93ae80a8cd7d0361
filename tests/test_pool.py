"""The operator ``pool``: values, what it refuses, and what torch sees."""

import random

import pool_cases
import pytest
import torch
from pool_cases import WRITTEN, copied

from causal_conv1d._operators import argument_names
from causal_conv1d._ops import ops

NAMES = (
    "x conv_states weight bias out query_start_loc cache_indices has_initial_state "
    "num_accepted_tokens windows_out window_indices pad_slot max_seqlen silu"
).split()


def test_names():
    assert list(argument_names("pool")) == NAMES


def make(seed, device, dtype=torch.float32, **given):
    return pool_cases.make(random.Random(seed), device, dtype, **given)


@pytest.mark.parametrize("seed", range(100))
def test_random_calls(seed, device):
    pool_cases.assert_case(*pool_cases.random_case(random.Random(seed), device))


def test_zeros_where_no_sequence_is(device):
    arguments = make(0, device, width=4, ragged=True)
    total = arguments["x"].shape[1]
    bounds = torch.linspace(1, total - 1, arguments["query_start_loc"].shape[0], device=device)
    slots = torch.arange(bounds.shape[0] - 1, device=device)
    arguments |= {"query_start_loc": bounds.int(), "cache_indices": slots, "pad_slot": 0}
    ops.pool(*arguments.values())
    first = bounds.int()[1]
    assert torch.all(arguments["out"][:, :first] == 0)  # of no sequence, and of a skipped one
    assert torch.all(arguments["out"][:, total - 1 :] == 0)
    assert torch.all(arguments["out"][:, first : total - 1] != 0)


def wrong_arguments():
    """Names and functions of the right value."""
    yield "x", lambda t: t[None]
    yield "x", lambda t: t.int()
    yield "conv_states", lambda t: t[:, :-1]
    yield "conv_states", lambda t: t[:, :, :2]
    yield "conv_states", lambda t: t[:1].expand(5, -1, -1)
    yield "weight", lambda t: t[:-1]
    yield "weight", lambda t: t[:, :0]
    yield "weight", lambda t: t.double()
    yield "bias", lambda t: torch.ones(3, device=t.device)
    yield "out", lambda t: t[:, :-1]
    yield "out", lambda t: t.half()
    yield "out", lambda t: t[:, :1].expand_as(t)
    yield "query_start_loc", lambda t: t[:0]
    yield "query_start_loc", lambda t: t.float()
    yield "query_start_loc", lambda t: t[None]
    yield "cache_indices", lambda t: t[:-1]
    yield "cache_indices", lambda t: t.bool()
    yield "has_initial_state", lambda t: t[:-1]
    yield "has_initial_state", lambda t: t.float()
    yield "num_accepted_tokens", lambda t: torch.ones(4, dtype=torch.int32, device=t.device)
    yield "windows_out", lambda t: t[0]
    yield "windows_out", lambda t: t[:, :, :-1]
    yield "windows_out", lambda t: t.double()
    yield "windows_out", lambda t: None
    yield "window_indices", lambda t: t[:-1]
    yield "window_indices", lambda t: t.float()
    yield "max_seqlen", lambda n: -1


def valid(device):
    dim, count = 6, 4
    x = torch.randn(dim, 11, device=device)
    return dict(
        zip(
            NAMES,
            (
                x,
                torch.randn(5, dim, 7, device=device),
                torch.randn(dim, 4, device=device),
                torch.randn(dim, device=device),
                torch.empty_like(x),
                torch.tensor([0, 4, 4, 5, 11], dtype=torch.int32, device=device),
                torch.arange(count, device=device),
                torch.ones(count, dtype=torch.bool, device=device),
                None,
                torch.zeros(count, 2, dim * 3, device=device),
                torch.arange(count, device=device),
                -1,
                0,
                True,
            ),
            strict=True,
        )
    )


@pytest.mark.parametrize("name, spoil", list(wrong_arguments()))
def test_meta_tensors_give_the_errors_of_real_ones(name, spoil, device):
    arguments = valid(device)
    like = arguments["x"] if name == "num_accepted_tokens" else arguments[name]
    arguments[name] = spoil(like)
    with pytest.raises(RuntimeError) as real:
        ops.pool(*arguments.values())
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments.values()]
    for i, (meta, actual) in enumerate(zip(on_meta, arguments.values(), strict=True)):
        if isinstance(meta, torch.Tensor) and 0 in actual.stride():
            on_meta[i] = torch.empty_strided(actual.shape, actual.stride(), device="meta")
    with pytest.raises(RuntimeError) as meta_error:
        ops.pool(*on_meta)
    assert str(meta_error.value) == str(real.value)
    assert str(real.value).startswith("causal_conv1d_pool: ")


def test_torch_sees_what_is_written(device):
    arguments = valid(device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.pool.default, tuple(arguments.values()), test_utils=tests)
    versions = {n: arguments[n]._version for n in WRITTEN}
    ops.pool(*arguments.values())
    assert all(arguments[n]._version > v for n, v in versions.items())


def test_it_has_no_derivative(device):
    arguments = valid(device)
    arguments["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="weight requires grad"):
        ops.pool(*arguments.values())


def test_under_a_compiler(device):
    arguments = valid(device)
    apart = copied(arguments)
    ops.pool(*apart.values())
    torch.compile(lambda *a: ops.pool(*a), backend="aot_eager")(*arguments.values())
    for name in WRITTEN:
        assert torch.equal(arguments[name], apart[name])


def test_a_graph_whose_sequences_change(cuda):
    arguments = valid(cuda)
    graph = torch.cuda.CUDAGraph()
    ops.pool(*copied(arguments).values())
    with torch.cuda.graph(graph):
        ops.pool(*arguments.values())
    for bounds in ([0, 1, 2, 3, 4], [0, 0, 11, 11, 11], [0, 4, 4, 5, 11]):
        arguments["query_start_loc"].copy_(torch.tensor(bounds))
        apart = copied(arguments)
        ops.pool(*apart.values())
        graph.replay()
        for name in WRITTEN:
            assert torch.equal(arguments[name], apart[name])
