"""The operators that ``_ops.py`` names, over four operations that write what they are given.

An operation is called with its tensors in the order of the struct of the C interface, and ``silu``
where its form that writes, ``forward_out`` for example, has it.
"""

from __future__ import annotations

import functools

import torch

from ._ops import ops

# The operations, and the functions that errors name.
CALLERS = {
    "forward": "causal_conv1d_fn",
    "backward": "causal_conv1d_bwd",
    "update": "causal_conv1d_update",
    "varlen_states": "causal_conv1d_varlen_states",
    "scan_forward": "selective_scan_fwd",
    "scan_backward": "selective_scan_bwd",
    "state_update": "selective_state_update",
    "conv_forward": "causal_conv1d_fn",
    "conv_backward": "causal_conv1d_bwd",
    "pool": "causal_conv1d_pool",
}


@functools.cache
def argument_names(operation: str) -> tuple[str, ...]:
    """All arguments of an operation, once the operators are defined: those of the one that writes.

    The schemas stand in ``csrc/torch/ops.h`` alone.
    """
    if operation == "varlen_states":  # which has no such operator
        return ("x", "cu_seqlens", "states")
    return tuple(argument.name for argument in _schema(operation).arguments)


@functools.cache
def written_names(operation: str) -> tuple[str, ...]:
    """The arguments that an operation writes."""
    if operation == "varlen_states":
        return ("states",)
    arguments = _schema(operation).arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _schema(operation):
    # All results of a pool are written into what is given.
    return getattr(ops, "pool" if operation == "pool" else f"{operation}_out").default._schema


def operation_of(operator: str) -> str:
    """The operation of an operator: that of forward, forward_states and forward_out is forward."""
    return next(name for name in CALLERS if operator.startswith(name))


def empty_states(x, weight):
    """Final states for x and weight, or None if their shapes are wrong, which will be told."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] < 1:
        return None
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[1] - 1))


def empty_varlen_states(x, cu_seqlens, state_len):
    batch, dim = cu_seqlens.shape[0] - 1, x.shape[1]
    return x.new_empty((batch, state_len, dim)).transpose(1, 2)


def empty_gradients(
    x, weight, bias, initial_states, need_dweight, need_dbias, need_dinitial_states
):
    """dx, dweight, dbias and dinitial_states, each of size 0 if it is not needed."""
    dinitial_states = x.new_empty(0)
    if need_dinitial_states:
        if initial_states is None:
            dinitial_states = empty_states(x, weight)
        else:
            dinitial_states = torch.empty_like(initial_states)
    return (
        torch.empty_like(x),
        torch.empty_like(weight) if need_dweight else weight.new_empty(0),
        torch.empty_like(bias) if need_dbias and bias is not None else weight.new_empty(0),
        dinitial_states,
    )


def over(operations: dict, check_varlen_sizes) -> dict:
    """The operators by name, over the operations by name.

    ``check_varlen_sizes(x, cu_seqlens, state_len)`` raises for what no states can be made of.
    """

    def forward(x, weight, bias, seq_idx, initial_states, silu):
        out = torch.empty_like(x)
        operations["forward"](x, weight, bias, seq_idx, initial_states, out, None, silu)
        return out

    def forward_states(x, weight, bias, seq_idx, initial_states, silu):
        out, states = torch.empty_like(x), empty_states(x, weight)
        operations["forward"](x, weight, bias, seq_idx, initial_states, out, states, silu)
        return out, states

    def backward(
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dweight, dbias, dstates, silu
    ):
        needs = (True, dweight, dbias and bias is not None, dstates)
        found = empty_gradients(x, weight, bias, initial_states, *needs[1:])
        written = [tensor if need else None for tensor, need in zip(found, needs, strict=True)]
        operations["backward"](
            x, weight, bias, dout, seq_idx, initial_states, dfinal_states, *written, silu
        )
        return found

    def update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
        out = torch.empty_like(x)
        operations["update"](
            x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices
        )
        return out

    def varlen_states(x, cu_seqlens, state_len):
        check_varlen_sizes(x, cu_seqlens, state_len)
        states = empty_varlen_states(x, cu_seqlens, state_len)
        operations["varlen_states"](x, cu_seqlens, states)
        return states

    return {
        "forward": forward,
        "forward_states": forward_states,
        "forward_out": operations["forward"],
        "backward": backward,
        "backward_out": operations["backward"],
        "update": update,
        "update_out": operations["update"],
        "varlen_states": varlen_states,
    }
