"""The functions in operations that ONNX has, for ``torch.onnx.export``."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from . import _plain
from .onnx import _domain


def is_exporting() -> bool:
    """Whether torch.onnx.export is at work; torch imports its exporter when it is first used."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def _convolve(inputs, weight, bias, silu):
    """inputs begin width - 1 positions before the first output."""
    dtype = inputs.dtype
    bias = None if bias is None else bias.to(dtype)
    out = F.conv1d(inputs, weight.to(dtype)[:, None], bias, groups=weight.shape[0])
    return out * torch.sigmoid(out) if silu else out


class _TracedNode(torch.autograd.Function):
    """CausalConvWithState for the older exporter, which also wants values."""

    @staticmethod
    def forward(ctx, x, weight, bias, past_state, silu, domain):
        return _plain_nodes(x, weight[:, 0], bias, past_state, silu)

    @staticmethod
    def symbolic(g, x, weight, bias, past_state, silu, domain):
        activation = "silu" if silu else "none"
        absent = g.op("prim::Constant")
        absent.setType(torch._C.OptionalType.ofTensor())
        inputs = [absent if value is None else value for value in (x, weight, bias, past_state)]
        name = f"{domain}::CausalConvWithState"
        out, state = g.op(name, *inputs, activation_s=activation, outputs=2)
        out.setType(x.type())
        return out, state


def _node(x, weight, bias, past_state, silu, domain):
    """out and the last width - 1 inputs, by ONNX's CausalConvWithState in a domain."""
    dtype, (batch, dim, _), width = x.dtype, x.shape, weight.shape[1]
    weight = weight.to(dtype)[:, None]
    bias = None if bias is None else bias.to(dtype)
    past_state = None if past_state is None else past_state.to(dtype)
    if torch.jit.is_tracing():
        return _TracedNode.apply(x, weight, bias, past_state, silu, domain)
    return torch.onnx.ops.symbolic_multi_out(
        f"{domain}::CausalConvWithState",
        (x, weight, bias, past_state),
        {"activation": "silu" if silu else "none"},
        dtypes=(dtype, dtype),
        shapes=(x.shape, (batch, dim, width - 1)),
        version=1,
    )


def _has_node(x):
    return _domain.get() is not None and x.dtype != torch.float64


def forward_states(x, weight, bias, seq_idx, initial_states, silu):
    if seq_idx is not None:
        return _plain.forward_states(x, weight, bias, seq_idx, initial_states, silu)
    if _has_node(x):
        return _node(x, weight, bias, initial_states, silu, _domain.get())
    return _plain_nodes(x, weight, bias, initial_states, silu)


def _plain_nodes(x, weight, bias, initial_states, silu):
    width = weight.shape[1]
    if initial_states is None:
        inputs = F.pad(x, (width - 1, 0))
    else:
        inputs = torch.cat([initial_states.to(x.dtype), x], dim=-1)
    final_states = inputs[:, :, x.shape[2] :]
    return _convolve(inputs, weight, bias, silu), final_states


def update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    """out, and conv_state as it is afterwards."""
    if cache_seqlens is not None or conv_state_indices is not None:
        return _plain.update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    tokens = x[:, :, None] if x.dim() == 2 else x
    inputs = torch.cat([conv_state.to(x.dtype), tokens], dim=-1)
    before = conv_state.shape[2] - (weight.shape[1] - 1)
    if _has_node(x):
        past_state = conv_state[:, :, before:]
        out, _ = _node(tokens, weight, bias, past_state, silu, _domain.get())
    else:
        out = _convolve(inputs[:, :, before:], weight, bias, silu)
    after = inputs[:, :, tokens.shape[2] :].to(conv_state.dtype)
    return out[:, :, 0] if x.dim() == 2 else out, after
