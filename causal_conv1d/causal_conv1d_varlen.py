"""Packed sequences: ``causal_conv1d_varlen_fn``, and upstream's ``causal_conv1d_varlen_states``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _library  # noqa: F401  registers the operators
from ._arguments import check_tensors, is_silu
from ._convolve import convolve
from ._dispatch import is_transformed
from ._ops import ops as _ops
from .reference import causal_conv1d_varlen_states_ref

__all__ = [
    "causal_conv1d_varlen_fn",
    "causal_conv1d_varlen_states",
    "causal_conv1d_varlen_states_ref",
]

_varlen_states = _ops.varlen_states


def causal_conv1d_varlen_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
    pre_gate: torch.Tensor | None = None,
    post_gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dilation: int = 1,
    *,
    split_sizes: Sequence[int] | None = None,
) -> Any:
    """The convolution of sequences that lie one after the other in a row; differentiable.

    Outputs are those of :func:`causal_conv1d.causal_conv1d_fn` for each sequence alone, bit for
    bit. On CUDA nothing waits for the GPU, and a captured graph may be replayed with other contents
    of cu_seqlens; sequences that are not there are empty ones at its end.

    Args:
        x: (total, dim) or (1, dim, total), any strides.
        weight: (dim, width).
        bias: (dim,) or None.
        cu_seqlens: (sequences + 1,) int32 or int64, on x's device: sequence i has the steps
            ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``, the latter excluded. It ascends, from 0
            or more to total or less; equal neighbours are an empty sequence. Steps of no sequence
            are padding: the output is 0 or the residual there. On the CPU one that falls or leaves
            0..total is an error; on CUDA, where an error would need a synchronisation, it is
            clamped.
        initial_states: (sequences, dim, (width - 1) * dilation) or None: the inputs before the
            first of each sequence.
        return_final_states: also return the last inputs of each sequence, of that shape.
        activation: None, "silu" or "swish".
        pre_gate: x's shape and dtype, or None: takes x's place multiplied by it, in states too.
        post_gate: x's shape and dtype, or None: the activation's result is multiplied by it.
        residual: x's shape and dtype, or None: added at the end; it may be x itself.
        dilation: steps from one tap to the next.
        split_sizes: numbers of channels whose sum is dim, or None: out is then a tuple of as many
            tensors, each dense.

    Returns:
        out, of x's shape, dtype and layout; with ``return_final_states`` the tuple (out,
        final_states).

    Raises:
        RuntimeError: an argument of wrong shape, dtype or device; the message names it.
        TypeError: an argument that is no tensor.
        NotImplementedError: another activation.

    Example::

        >>> tokens, weight = torch.randn(10, 64), torch.randn(64, 4)
        >>> bounds = torch.tensor([0, 3, 10])
        >>> out, states = causal_conv1d_varlen_fn(tokens, weight, None, bounds, None, True)
        >>> out.shape, states.shape
        (torch.Size([10, 64]), torch.Size([2, 64, 3]))
    """
    silu = is_silu(activation)
    tensors = {"x": x, "weight": weight, "bias": bias, "seq_idx": None, "cu_seqlens": cu_seqlens}
    tensors.update(initial_states=initial_states, pre_gate=pre_gate, post_gate=post_gate)
    tensors["residual"] = residual
    required = {name: tensors[name] for name in ("x", "weight", "cu_seqlens")}
    optional = {name: value for name, value in tensors.items() if name not in required}
    check_tensors("causal_conv1d_varlen_fn", required, optional)
    is_flat = x.dim() == 2
    if is_flat:
        for name in ("x", "pre_gate", "post_gate", "residual"):
            tensors[name] = _as_row("causal_conv1d_varlen_fn", name, tensors[name])
        if residual is x:
            tensors["residual"] = tensors["x"]
    caller = "causal_conv1d_varlen_fn"
    found = convolve(caller, tensors, dilation, silu, split_sizes, None, return_final_states)
    if not is_flat:
        return found
    out, *states = found if return_final_states else (found,)
    out = out[0].t() if split_sizes is None else tuple(part[0].t() for part in out)
    return (out, *states) if return_final_states else out


def _as_row(caller, name, tensor):
    """(total, dim) as (1, dim, total)."""
    if tensor is None:
        return None
    if tensor.dim() != 2:
        shape = tuple(tensor.shape)
        raise RuntimeError(f"{caller}: {name} must be (total, dim) as x is, got {shape}")
    return tensor.t()[None]


def causal_conv1d_varlen_states(
    x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int
) -> torch.Tensor:
    """The last ``state_len`` inputs of each packed sequence, zero-padded in front; differentiable.

    Args:
        x: (total_tokens, dim), any float dtype.
        cu_seqlens: (batch + 1,) int32 or int64: sequence i has tokens ``cu_seqlens[i]`` up to
            ``cu_seqlens[i + 1]``, the latter excluded.
        state_len: number of inputs to keep, >= 0.

    Returns:
        states, (batch, dim, state_len) in x's dtype: ``states[i, :, -1]`` is the last token of
        sequence i. dim is its contiguous axis, as in x.

    Raises:
        RuntimeError: an argument of wrong shape, dtype or device; the message names it.
    """
    required = {"x": x, "cu_seqlens": cu_seqlens}
    if is_transformed(x) or (torch.is_grad_enabled() and x.requires_grad):
        check_tensors("causal_conv1d_varlen_states", required, {})
        return _varlen_states.default(x, cu_seqlens, state_len)
    try:
        return _varlen_states.plain(x, cu_seqlens, state_len)
    except Exception:
        check_tensors("causal_conv1d_varlen_states", required, {})
        raise
