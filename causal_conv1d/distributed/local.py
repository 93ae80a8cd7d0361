"""The convolution of some steps of a shard, by the operators that write."""

from __future__ import annotations

import torch

from .._dispatch import call_without_grad
from .._ops import ops


def _is_plain(cu_seqlens, call):
    return cu_seqlens is None and call.dilation == 1


def forward(out, x, weight, bias, seq_idx, cu_seqlens, initial_states, call):
    """Writes the convolution of x into out."""
    if _is_plain(cu_seqlens, call):
        args = (x, weight, bias, seq_idx, initial_states, out, None, call.silu)
        call_without_grad(ops.forward_out, *args)
        return
    args = (x, weight, bias, seq_idx, cu_seqlens, initial_states, None, None, None, out, None)
    call_without_grad(ops.conv_forward_out, *args, call.dilation, call.silu)


def backward(
    dx, x, weight, bias, dout, seq_idx, cu_seqlens, initial_states, dfinal, call, parameters
):
    """Writes dx; returns dweight and dbias, None unless parameters, and dinitial_states.

    dweight and dbias are float32, or float64 where x is.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight = torch.empty_like(weight, dtype=dtype) if parameters else None
    dbias = torch.empty_like(bias, dtype=dtype) if parameters and bias is not None else None
    dstates = None if initial_states is None else torch.empty_like(initial_states)
    inputs = (x, weight, bias, dout, seq_idx)
    if _is_plain(cu_seqlens, call):
        args = (*inputs, initial_states, dfinal, dx, dweight, dbias, dstates, call.silu)
        call_without_grad(ops.backward_out, *args)
    else:
        args = (*inputs, cu_seqlens, initial_states, dfinal, None, None, dx, dweight, dbias)
        args = (*args, dstates, None, None, call.dilation, False, call.silu)
        call_without_grad(ops.conv_backward_out, *args)
    return dweight, dbias, dstates
