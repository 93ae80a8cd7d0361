"""The convolution of a shard, by the operators that write, and dilated as well.

A dilated one is that of each phase ``x[..., r::dilation]`` on its own; its state of
(width - 1) * dilation inputs is divided likewise.
"""

from __future__ import annotations

import torch

from .._dispatch import call_without_grad
from .._ops import ops


def _phase(tensor, r, dilation):
    return None if tensor is None else tensor[..., r::dilation]


def _other_id(seq_idx, r):
    """The rows in which position r is of another sequence than position 0, and so the state."""
    return (seq_idx[:, r] != seq_idx[:, 0])[:, None, None]


def _phase_states(states, seq_idx, r, dilation):
    """The states of phase r, which count if they have the id of its first position."""
    states = _phase(states, r, dilation)
    if states is None or seq_idx is None or r == 0:
        return states
    return states.masked_fill(_other_id(seq_idx, r), 0)


def forward(out, x, weight, bias, seq_idx, initial_states, silu, dilation):
    """Writes the convolution of x into out."""
    for r in range(min(dilation, x.shape[-1])):
        call_without_grad(
            ops.forward_out,
            _phase(x, r, dilation),
            weight,
            bias,
            _phase(seq_idx, r, dilation),
            _phase_states(initial_states, seq_idx, r, dilation),
            _phase(out, r, dilation),
            None,
            silu,
        )


def backward(
    dx, x, weight, bias, dout, seq_idx, initial_states, dfinal_states, silu, dilation, parameters
):
    """Writes dx; returns dweight and dbias, None unless parameters, and dinitial_states.

    dweight and dbias are float32, or float64 where x is. dfinal_states and seq_idx are not given
    together.
    """
    dtype, seqlen = torch.float64 if x.dtype == torch.float64 else torch.float32, x.shape[-1]
    dweight = torch.zeros_like(weight, dtype=dtype) if parameters else None
    dbias = torch.zeros_like(bias, dtype=dtype) if parameters and bias is not None else None
    dstates = None if initial_states is None else torch.zeros_like(initial_states)
    for r in range(dilation if seq_idx is None else min(dilation, seqlen)):
        dw = None if dweight is None else torch.empty_like(dweight)
        db = None if dbias is None else torch.empty_like(dbias)
        ds = _phase(dstates, r, dilation)
        call_without_grad(
            ops.backward_out,
            _phase(x, r, dilation),
            weight,
            bias,
            _phase(dout, r, dilation),
            _phase(seq_idx, r, dilation),
            _phase_states(initial_states, seq_idx, r, dilation),
            _phase(dfinal_states, (r - seqlen) % dilation, dilation),
            _phase(dx, r, dilation),
            dw,
            db,
            ds,
            silu,
        )
        if dweight is not None:
            dweight += dw
        if dbias is not None:
            dbias += db
        if ds is not None and seq_idx is not None and r > 0:
            ds.masked_fill_(_other_id(seq_idx, r), 0)
    return dweight, dbias, dstates
