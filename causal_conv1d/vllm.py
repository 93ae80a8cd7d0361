"""vLLM's ``causal_conv1d_fn`` and ``causal_conv1d_update`` (0.33), by name, arguments and order.

They work on a pool of states, ``conv_states`` (slots, dim, state_len), which is changed in place:
the history of a sequence is columns 0 .. width - 2 of its slot, as are its last inputs afterwards.
See ``docs/serving.md`` for an example and for what differs from vLLM.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _library  # noqa: F401  registers the operators
from ._arguments import check_tensors, is_silu
from ._dispatch import call_without_grad
from ._ops import ops as _ops

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]


def _silu(activation: bool | str | None) -> bool:
    return activation if isinstance(activation, bool) else is_silu(activation)


def _slots(indices: torch.Tensor | None, sequences: int) -> torch.Tensor | None:
    """A slot for each sequence; of a table of blocks its first column."""
    if indices is None:
        return None
    return (indices[:, 0] if indices.dim() == 2 else indices)[:sequences]


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: bool | str | None = "silu",
    pad_slot_id: int = -1,
    null_block_id: int = 0,
    metadata: Any = None,
    validate_data: bool = False,
) -> torch.Tensor:
    """The convolution of packed sequences that continue states of a pool, which take them in.

    Args:
        x: (dim, total), any strides.
        weight: (dim, width).
        bias: (dim,) or None.
        conv_states: (slots, dim, state_len) with state_len >= width - 1, any strides and any of the
            float types; changed in place.
        query_start_loc: (sequences + 1,) int32 or int64: sequence i is the columns
            ``query_start_loc[i]`` to ``query_start_loc[i + 1]`` of x. It may be empty.
        cache_indices: (sequences,) int32 or int64: the slot of each sequence; None: slot i.
        has_initial_state: (sequences,) bool: whether the history is that of the slot, else zeros;
            None: zeros for all.
        activation: None, "silu", "swish" (the same), or a bool for SiLU.
        pad_slot_id: has no effect, as in vLLM's.
        null_block_id: sequences with this slot are skipped: their state stays as it is.
        metadata: has no effect on values.
        validate_data: has no effect; arguments are always checked.

    Returns:
        (dim, total) in x's dtype and layout, with zeros for sequences that are skipped and for
        columns of none.
    """
    try:
        sequences = query_start_loc.shape[0] - 1
        slots = _slots(cache_indices, sequences)
        if has_initial_state is None:
            has_initial_state = x.new_zeros(max(sequences, 0), dtype=torch.bool)
        out = torch.empty_like(x)
        pad = -1 if slots is None else null_block_id
        call_without_grad(
            _ops.pool, x, conv_states, weight, bias, out, query_start_loc, slots,
            has_initial_state[:sequences], None, None, None, pad, 0, _silu(activation),
        )  # fmt: skip
    except Exception:
        required = {"x": x, "weight": weight, "conv_states": conv_states}
        required["query_start_loc"] = query_start_loc
        optional = {"bias": bias, "cache_indices": cache_indices}
        optional["has_initial_state"] = has_initial_state
        check_tensors("causal_conv1d_fn", required, optional)
        raise
    return out


def _tokens(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(dim, batch * seqlen) of (batch, dim, seqlen), and whether that is x's own memory."""
    batch, dim, seqlen = x.shape
    is_view = batch == 1 or seqlen == 1 or x.stride(0) == seqlen * x.stride(2)
    return x.transpose(1, 2).reshape(batch * seqlen, dim).t(), is_view


def _update_pool(x, out, sequences, query_start_loc, max_seqlen, states, *rest):
    weight, bias, silu, indices, accepted, null_block_id = rest
    slots = _slots(indices, sequences)
    pad = -1 if slots is None else null_block_id
    accepted = None if accepted is None else accepted[:sequences]
    call_without_grad(
        _ops.pool, x, states, weight, bias, out, query_start_loc, slots, None, accepted, None,
        None, pad, max_seqlen, silu,
    )  # fmt: skip


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: bool | str | None = None,
    conv_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    max_query_len: int = -1,
    null_block_id: int = 0,
    validate_data: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The convolution of new tokens that continue states of a pool, which take them in.

    Args:
        x: (batch, dim), (batch, dim, seqlen) or, with query_start_loc, (tokens, dim). The result
            replaces it unless out is given.
        conv_state: (slots, dim, state_len) with state_len >= width - 1; changed in place.
        weight: (dim, width).
        bias: (dim,) or None.
        activation: None, "silu", "swish" (the same), or a bool for SiLU.
        conv_state_indices: (batch,) int32 or int64, or (batch, blocks), of which column 0 counts:
            the slot of each entry; None: slot i.
        num_accepted_tokens: (batch,) int32 or int64, each a >= 1: the history is columns a - 1 to
            a + width - 3, and afterwards the state is that history without its first input, and
            all new tokens behind it; needs state_len >= width - 2 + new tokens.
        query_start_loc: (batch + 1,) int32 or int64: entry i is the rows ``query_start_loc[i]`` to
            ``query_start_loc[i + 1]`` of x.
        max_query_len: the most tokens of an entry, or -1; for speed alone.
        null_block_id: entries with this slot are skipped: their state stays as it is.
        validate_data: has no effect; arguments are always checked.
        out: x's shape and dtype, or None: for the result.

    Returns:
        out, or x: with zeros for entries that are skipped and for rows of none.
    """
    try:
        rest = (
            conv_state, weight, bias, _silu(activation), conv_state_indices, num_accepted_tokens,
            null_block_id,
        )  # fmt: skip
        result = x if out is None else out
        if query_start_loc is not None:
            count = query_start_loc.shape[0] - 1
            longest = max(max_query_len, 0)
            _update_pool(x.t(), result.t(), count, query_start_loc, longest, *rest)
        elif x.dim() == 2:
            _update_pool(x.t(), result.t(), x.shape[0], None, 1, *rest)
        else:
            batch, _, seqlen = x.shape
            tokens, is_view = _tokens(x)
            target = tokens
            if out is not None:
                target, is_view = _tokens(out)
            bounds = torch.arange(batch + 1, device=x.device, dtype=torch.int32) * seqlen
            _update_pool(tokens, target, batch, bounds, seqlen, *rest)
            if not is_view:
                result.copy_(target.t().reshape(batch, seqlen, -1).transpose(1, 2))
    except Exception:
        required = {"x": x, "conv_state": conv_state, "weight": weight}
        optional = {"bias": bias, "conv_state_indices": conv_state_indices, "out": out}
        optional |= {"num_accepted_tokens": num_accepted_tokens}
        optional |= {"query_start_loc": query_start_loc}
        check_tensors("causal_conv1d_update", required, optional)
        raise
    return result
