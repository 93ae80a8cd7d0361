"""Upstream's ``cpp_functions`` (1.5.1 and later): forward, backward and update on plain tensors.

They go straight to the operators, record no gradient, and take their arguments by position.
"""

from __future__ import annotations

import torch

from . import _library  # noqa: F401  registers the operators
from ._arguments import check_tensors, refuse_to_write
from ._dispatch import call_without_grad
from ._operators import empty_gradients
from ._ops import ops as _ops

__all__ = [
    "causal_conv1d_bwd_function",
    "causal_conv1d_fwd_function",
    "causal_conv1d_update_function",
]


def write_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    out: torch.Tensor,
    final_states_out: torch.Tensor | None,
    silu: bool,
) -> None:
    """Writes out, and final_states_out if given."""
    refuse_to_write("causal_conv1d_fn", out=out, final_states_out=final_states_out)
    operator = _ops.forward_out
    call_without_grad(
        operator, x, weight, bias, seq_idx, initial_states, out, final_states_out, silu
    )


def causal_conv1d_fwd_function(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    final_states_out: torch.Tensor | None,
    silu_activation: bool,
) -> torch.Tensor:
    """out of :func:`causal_conv1d.causal_conv1d_fn`; final_states_out, if given, is written."""
    if final_states_out is None:
        operator = _ops.forward
        return call_without_grad(
            operator, x, weight, bias, seq_idx, initial_states, silu_activation
        )
    out = torch.empty_like(x)
    write_forward(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu_activation)
    return out


def causal_conv1d_bwd_function(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dout: torch.Tensor,
    seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    dfinal_states: torch.Tensor | None,
    dx: torch.Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients (dx, dweight, dbias, dinitial_states) in the dtypes of their tensors.

    dx, if given, is written in place, whatever its strides, and returned. dbias is None without
    bias, dinitial_states without ``return_dinitial_states``.
    """
    check_tensors("causal_conv1d_bwd", {"x": x, "weight": weight}, {"bias": bias})
    inputs = (x, weight, bias, dout, seq_idx, initial_states, dfinal_states)
    needs = (True, bias is not None, bool(return_dinitial_states))
    if dx is None:
        found = call_without_grad(_ops.backward, *inputs, *needs, silu_activation)
        dx, dweight, dbias, dinitial_states = found
        return dx, dweight, dbias if needs[1] else None, dinitial_states if needs[2] else None
    _, dweight, dbias, dinitial_states = empty_gradients(x, weight, bias, initial_states, *needs)
    dbias = dbias if needs[1] else None
    dinitial_states = dinitial_states if needs[2] else None
    write_backward(*inputs, dx, dweight, dbias, dinitial_states, silu_activation)
    return dx, dweight, dbias, dinitial_states


def write_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dout: torch.Tensor,
    seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    dfinal_states: torch.Tensor | None,
    dx: torch.Tensor,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    dinitial_states: torch.Tensor | None,
    silu: bool,
) -> None:
    """Writes the gradients that are given."""
    written = {"dx": dx, "dweight": dweight, "dbias": dbias, "dinitial_states": dinitial_states}
    refuse_to_write("causal_conv1d_bwd", **written)
    inputs = (x, weight, bias, dout, seq_idx, initial_states, dfinal_states)
    call_without_grad(_ops.backward_out, *inputs, *written.values(), silu)


def causal_conv1d_update_function(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu_activation: bool,
    cache_seqlens: torch.Tensor | None,
    conv_state_indices: torch.Tensor | None,
) -> torch.Tensor:
    """out of :func:`causal_conv1d.causal_conv1d_update`; conv_state is changed in place."""
    refuse_to_write("causal_conv1d_update", conv_state=conv_state)
    args = (x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices)
    return call_without_grad(_ops.update, *args)


def write_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    silu: bool,
    cache_seqlens: torch.Tensor | None,
    conv_state_indices: torch.Tensor | None,
) -> None:
    """Writes out; conv_state is changed in place."""
    refuse_to_write("causal_conv1d_update", conv_state=conv_state, out=out)
    args = (x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices)
    call_without_grad(_ops.update_out, *args)
