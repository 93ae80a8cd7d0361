"""The functions in operations that ONNX has, for ``torch.onnx.export``."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from . import _plain


def is_exporting() -> bool:
    """Whether torch.onnx.export is at work; torch imports its exporter when it is first used."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def _convolve(inputs, weight, bias, silu):
    """Of the width - 1 inputs before the first output and those of the outputs."""
    dtype = inputs.dtype
    bias = None if bias is None else bias.to(dtype)
    out = F.conv1d(inputs, weight.to(dtype)[:, None], bias, groups=weight.shape[0])
    return out * torch.sigmoid(out) if silu else out


def forward_states(x, weight, bias, seq_idx, initial_states, silu):
    if seq_idx is not None:
        return _plain.forward_states(x, weight, bias, seq_idx, initial_states, silu)
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
    out = _convolve(inputs[:, :, before:], weight, bias, silu)
    after = inputs[:, :, tokens.shape[2] :].to(conv_state.dtype)
    return out[:, :, 0] if x.dim() == 2 else out, after
