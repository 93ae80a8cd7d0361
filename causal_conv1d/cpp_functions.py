"""Upstream's ``cpp_functions`` (1.5.1 and later): forward, backward and update on plain tensors.

They go straight to the operators, record no gradient, and take their arguments by position.
"""

from __future__ import annotations

import torch

from causal_conv1d.causal_conv1d_interface import _backward, _forward, _update

__all__ = [
    "causal_conv1d_bwd_function",
    "causal_conv1d_fwd_function",
    "causal_conv1d_update_function",
]


def causal_conv1d_fwd_function(
    x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation
):
    """out of :func:`causal_conv1d.causal_conv1d_fn`; final_states_out, if given, is written."""
    out = torch.empty_like(x)
    _forward(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu_activation)
    return out


def causal_conv1d_bwd_function(
    x,
    weight,
    bias,
    dout,
    seq_idx,
    initial_states,
    dfinal_states,
    dx,
    return_dinitial_states,
    silu_activation,
):
    """Gradients (dx, dweight, dbias, dinitial_states) in the dtypes of their tensors.

    dx, if given, is written in place, whatever its strides, and returned. dbias is None without
    bias, dinitial_states without ``return_dinitial_states``.
    """
    if dx is None:
        dx = torch.empty_like(x)
    dweight = torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    dinitial_states = None
    if return_dinitial_states:
        if initial_states is None:
            dinitial_states = x.new_empty((x.shape[0], x.shape[1], weight.shape[1] - 1))
        else:
            dinitial_states = torch.empty_like(initial_states)
    _backward(
        x,
        weight,
        bias,
        dout,
        seq_idx,
        initial_states,
        dfinal_states,
        dx,
        dweight,
        dbias,
        dinitial_states,
        silu_activation,
    )
    return dx, dweight, dbias, dinitial_states


def causal_conv1d_update_function(
    x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices
):
    """out of :func:`causal_conv1d.causal_conv1d_update`; conv_state is changed in place."""
    out = torch.empty_like(x)
    _update(x, conv_state, weight, bias, out, silu_activation, cache_seqlens, conv_state_indices)
    return out
