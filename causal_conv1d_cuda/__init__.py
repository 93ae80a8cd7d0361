"""Upstream's raw extension module by name, with every argument list it has had.

The number of positional arguments tells the forms apart:

=====================  ==========================================================================
causal_conv1d_fwd      4 (x, weight, bias, silu), 5 (..., seq_idx, silu) and 7 (..., seq_idx,
                       initial_states, final_states_out, silu) return out; 8 (..., seq_idx,
                       initial_states, out, final_states_out, silu) writes out and returns None
causal_conv1d_bwd      6 (x, weight, bias, dout, dx, silu), 7 (..., dout, seq_idx, dx, silu) and 10
                       (..., dout, seq_idx, initial_states, dfinal_states, dx,
                       return_dinitial_states, silu) return [dx, dweight, dbias(, dinitial_states)];
                       12 (..., dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias,
                       dinitial_states, silu) adds to the float32 dweight and dbias and returns None
causal_conv1d_update   5 (x, conv_state, weight, bias, silu), 6 (..., silu, cache_seqlens) and 7
                       (..., silu, cache_seqlens, conv_state_indices) return out; 8 (..., bias, out,
                       silu, cache_seqlens, conv_state_indices) writes out and returns None
=====================  ==========================================================================

A package, so that a compiled ``causal_conv1d_cuda.*.so`` left behind by upstream does not win.
Works with CPU tensors as well.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from causal_conv1d.cpp_functions import (
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
    causal_conv1d_update_function,
    write_backward,
    write_forward,
    write_update,
)

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_update"]


def _refuse(name: str, arities: str, args: tuple) -> NoReturn:
    raise TypeError(f"{name}() takes {arities} positional arguments but {len(args)} were given")


def causal_conv1d_fwd(*args: Any) -> torch.Tensor | None:
    """Forward; see the module's table of argument lists."""
    if len(args) == 8:
        x, weight, bias, seq_idx, initial_states, out, final_states_out, silu = args
        write_forward(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu)
        return None
    if len(args) == 7:
        return causal_conv1d_fwd_function(*args)
    if len(args) == 5:
        x, weight, bias, seq_idx, silu = args
        return causal_conv1d_fwd_function(x, weight, bias, seq_idx, None, None, silu)
    if len(args) == 4:
        x, weight, bias, silu = args
        return causal_conv1d_fwd_function(x, weight, bias, None, None, None, silu)
    _refuse("causal_conv1d_fwd", "4, 5, 7 or 8", args)


def causal_conv1d_bwd(*args: Any) -> list[torch.Tensor | None] | None:
    """Backward; see the module's table of argument lists."""
    if len(args) == 12:
        _accumulate_bwd(*args)
        return None
    if len(args) == 10:
        return list(causal_conv1d_bwd_function(*args))
    if len(args) == 7:
        x, weight, bias, dout, seq_idx, dx, silu = args
    elif len(args) == 6:
        x, weight, bias, dout, dx, silu = args
        seq_idx = None
    else:
        _refuse("causal_conv1d_bwd", "6, 7, 10 or 12", args)
    return list(
        causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, None, None, dx, False, silu)[:3]
    )


def _accumulate_bwd(*args: Any) -> None:
    sums = [tensor for tensor in args[8:10] if tensor is not None]  # dweight and dbias
    before = [tensor.detach().clone() for tensor in sums]
    # The operator writes them, and so checks them like all others, before anything is written.
    write_backward(*args)
    for tensor, old in zip(sums, before, strict=True):
        tensor.add_(old)


def causal_conv1d_update(*args: Any) -> torch.Tensor | None:
    """Update; see the module's table of argument lists."""
    if len(args) == 8:
        x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices = args
        write_update(x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices)
        return None
    if 5 <= len(args) <= 7:
        return causal_conv1d_update_function(*args, *(None,) * (7 - len(args)))
    _refuse("causal_conv1d_update", "5, 6, 7 or 8", args)
