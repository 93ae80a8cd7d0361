"""The layer, whose names and results are those of FLA's ShortConvolution."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import randn

import causal_conv1d
from causal_conv1d import CausalConv1d, ShortConvolution

BATCH, SEQLEN, DIM = 2, 23, 24


def make_layer(device, width=4, **options):
    torch.manual_seed(0)
    return CausalConv1d(DIM, width, device=device, **options)


def make_x(device, *shape, seed=1):
    return randn(*(shape or (BATCH, SEQLEN, DIM)), device=device, seed=seed)


def plain(layer, x):
    """The layer's own Conv1d, and its activation."""
    z = torch.nn.Conv1d.forward(layer, x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
    return F.silu(z) if layer.activation else z


def test_names():
    assert ShortConvolution is CausalConv1d is causal_conv1d.modules.CausalConv1d
    assert list(inspect.signature(CausalConv1d).parameters)[:7] == (
        "hidden_size kernel_size bias activation backend device dtype".split()
    )
    assert list(inspect.signature(CausalConv1d.forward).parameters)[1:8] == (
        "x residual mask cache output_final_state cu_seqlens chunk_indices".split()
    )
    assert list(inspect.signature(CausalConv1d.step).parameters)[1:] == (
        "x residual cache output_final_state cu_seqlens".split()
    )
    layer = CausalConv1d(8, 4, True, "swish", "triton", None, torch.float64)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {"weight": (8, 1, 4), "bias": (8,)} and layer.weight.dtype == torch.float64
    assert layer.state_size == 32 and layer.hidden_size == 8 and "swish" in repr(layer)
    with pytest.raises(ValueError, match="activation must be None, silu or swish, got 'gelu'"):
        CausalConv1d(8, 4, activation="gelu")


@pytest.mark.parametrize(
    "options", ({}, {"bias": True, "dilation": 3}, {"activation": None}), ids=str
)
def test_values_and_gradients(options, device):
    layer, x = make_layer(device, **options), make_x(device).requires_grad_()
    out, state = layer(x)
    assert state is None
    expected = plain(layer, x)
    torch.testing.assert_close(out, expected)
    inputs, above = [x, *layer.parameters()], make_x(device, seed=5)
    found = torch.autograd.grad(out, inputs, above)
    for a, b in zip(found, torch.autograd.grad(expected, inputs, above), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_residual_gates_and_mask(device):
    layer, x = make_layer(device), make_x(device)
    residual, pre, post = (make_x(device, seed=seed) for seed in (2, 3, 4))
    mask = torch.ones(BATCH, SEQLEN, dtype=torch.int64, device=device)
    mask[0, :5] = 0
    before = x.clone()
    masked = x * mask[..., None]
    torch.testing.assert_close(layer(x, residual)[0], plain(layer, x) + residual)
    torch.testing.assert_close(layer(x, x)[0], plain(layer, x) + x)
    torch.testing.assert_close(layer(x, residual, mask)[0], plain(layer, masked) + residual)
    found, state = layer(x, pre_gate=pre, post_gate=post, output_final_state=True)
    torch.testing.assert_close(found, plain(layer, pre * x) * post)
    assert torch.equal(state, (pre * x)[:, -4:].mT)
    assert torch.equal(x, before), "x must stay"
    bounds = torch.tensor([0, 4], device=device)
    with pytest.raises(ValueError, match="mask and cu_seqlens must not be given together"):
        layer(x[:1], mask=mask[:1], cu_seqlens=bounds)


@pytest.mark.parametrize("dilation", (1, 2))
@pytest.mark.parametrize("with_residual", (False, True))
def test_prompt_then_tokens(with_residual, dilation, device):
    layer, x = make_layer(device, dilation=dilation), make_x(device)
    residual = make_x(device, seed=2) if with_residual else None

    def part(start, stop):
        return None if residual is None else residual[:, start:stop]

    columns = 3 * dilation + 1
    with torch.no_grad():
        whole, last = layer(x, residual, output_final_state=True)
        for split in (0, 1, 2, 15):
            state = layer.state(BATCH)
            assert state.shape == (BATCH, DIM, columns) and not state.any()
            outs = []
            if split:
                out, state = layer(
                    x[:, :split], part(0, split), cache=state, output_final_state=True
                )
                outs.append(out)
            for t in range(split, SEQLEN):
                token = x[:, t : t + 1]
                out, after = layer(token, part(t, t + 1), cache=state, output_final_state=True)
                assert after is state, "it changes in place"
                outs.append(out)
            assert torch.equal(torch.cat(outs, 1), whole) and torch.equal(state, last)
    assert torch.equal(last, x[:, -columns:].mT)


def test_a_state_of_a_graph(device):
    layer, x = make_layer(device), make_x(device).requires_grad_()
    whole, _ = layer(x)
    first, state = layer(x[:, :2], output_final_state=True)
    second, state = layer(x[:, 2:3], cache=state, output_final_state=True)
    third, _ = layer(x[:, 3:], cache=state)
    out = torch.cat([first, second, third], 1)
    assert torch.equal(out, whole)
    above = make_x(device, seed=5)
    inputs = [x, layer.weight]
    for a, b in zip(
        torch.autograd.grad(out, inputs, above),
        torch.autograd.grad(whole, inputs, above),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_packed_sequences(device):
    layer, x = make_layer(device, bias=True), make_x(device, 1, SEQLEN, DIM)
    residual, lengths = make_x(device, 1, SEQLEN, DIM, seed=2), [3, 0, 1, 2, 10, 7]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    cache = randn(len(lengths), DIM, 4, device=device, seed=3)
    found, states = layer(
        x, residual, cache=cache, output_final_state=True, cu_seqlens=bounds, chunk_indices=bounds
    )
    start = 0
    for i, length in enumerate(lengths):
        steps = slice(start, start + length)
        out, state = layer(
            x[:, steps], residual[:, steps], cache=cache[i : i + 1], output_final_state=True
        )
        assert torch.equal(found[:, steps], out) and torch.equal(states[i : i + 1], state), i
        start += length
    _, states = layer(x, output_final_state=True, cu_seqlens=bounds)
    assert torch.equal(states[0, :, 1:], x[0, :3].T) and not states[0, :, 0].any()


def test_packed_tokens(device):
    layer = make_layer(device)
    tokens, cache = make_x(device, 1, 5, DIM), randn(5, DIM, 4, device=device)
    bounds = torch.arange(6, device=device)
    with torch.no_grad():
        other = cache.clone()
        expected, after = layer(tokens.mT.reshape(DIM, 5).T[:, None], None, None, other, True)
        out, state = layer(tokens, cache=cache, output_final_state=True, cu_seqlens=bounds)
        again = layer.step(tokens, None, expected.new_zeros(5, DIM, 4), True, bounds)
    assert torch.equal(out[0], expected[:, 0]) and state is cache
    assert torch.equal(cache, other) and torch.equal(after, other)
    assert again[0].shape == tokens.shape and again[1].shape == (5, DIM, 4)


def test_heads(device):
    layer, x = make_layer(device), make_x(device)
    out, _ = layer(x.unflatten(2, (4, 6)), output_final_state=True)
    assert torch.equal(out.flatten(2), layer(x)[0]) and out.shape == (BATCH, SEQLEN, 4, 6)


def test_compiled_and_exported(device):
    layer, x = make_layer(device, bias=True), make_x(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = layer(x, x, output_final_state=True)
    for a, b in zip(compiled(x, x, output_final_state=True), expected, strict=True):
        assert torch.equal(a, b)
    program = torch.export.export(layer, (x,)).module()
    assert torch.equal(program(x)[0], layer(x)[0])
