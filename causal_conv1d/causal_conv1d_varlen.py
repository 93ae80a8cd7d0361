"""``causal_conv1d_varlen_states``, with upstream's name and signature."""

from __future__ import annotations

import torch

from . import _library  # noqa: F401  registers the operators
from ._arguments import check_tensors
from ._dispatch import is_transformed
from ._ops import ops as _ops
from .reference import causal_conv1d_varlen_states_ref

__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]

_varlen_states = _ops.varlen_states


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
