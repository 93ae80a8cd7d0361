"""The semantics of this package in plain PyTorch; every test compares with it.

With x of shape (batch, dim, seqlen) and weight of shape (dim, width), W = width:

    out[b,d,t] = act(bias[d] + sum over k = 0..W-1 of weight[d,k] * x~[b,d,t-(W-1)+k])
    x~[b,d,s]  = x[b,d,s] for s >= 0; initial_states[b,d,(W-1)+s] for s < 0 if given, else 0

act is the identity or silu(z) = z * sigmoid(z); :func:`causal_conv1d_ref` says what gates, a
residual, a dilation and packed sequences add to that. Everything is computed in the widest type
among the arguments, float32 at least; float64 arguments therefore give float64 results.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F

from ._arguments import is_silu

__all__ = [
    "TOLERANCE",
    "causal_conv1d_ref",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states_ref",
    "selective_scan_ref",
    "selective_state_update_ref",
]

# Relative errors of the kernels in the 2-norm: a few roundings of float32, one rounding of the
# 16-bit types.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def causal_conv1d_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    pre_gate: torch.Tensor | None = None,
    post_gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dilation: int = 1,
) -> Any:
    """Causal depthwise convolution over the last dimension of x.

    With ``seq_idx``, several sequences share a row: a tap at s counts for t only if id(s) == id(t),
    where id(s) = seq_idx[b,s] for s >= 0, and the initial state carries the id seq_idx[b,0].
    Where seq_idx[b,t] < 0 (padding), out is 0 and no gradient comes from it.

    The final states are the last width - 1 inputs, whatever their ids:
    final_states[b,d,j] = x~[b,d,e-(width-1)+j] with e = seqlen. A sequence shorter than width - 1
    keeps the end of its initial state. With ``seq_idx``, padding does not count: e is the time
    behind the row's last position that is no padding, padding before that is a 0 among the inputs
    whatever x holds there, and so is the initial state of a row that begins with padding. A row of
    padding alone keeps its initial state.

    With ``dilation`` d the taps are d steps apart, and states have (width - 1) * d columns. In
    place of x there is pre_gate * x, in x's dtype; states hold that. The activation's result is
    multiplied by post_gate, and residual is added to that. Where there is padding, out is the
    residual, or 0.

    Args:
        x: (batch, dim, seqlen), any float type.
        weight: (dim, width), width >= 1, any float type.
        bias: (dim,) or None, any float type.
        initial_states: (batch, dim, (width - 1) * dilation) or None, any float type.
        return_final_states: whether to return (out, final_states) instead of out.
        final_states_out: (batch, dim, (width - 1) * dilation) or None; with return_final_states,
            the tensor that the final states are written to and returned in.
        activation: None, "silu" or "swish" (the same as "silu").
        seq_idx: (batch, seqlen) int32 or int64, or None.
        cu_seqlens: (sequences + 1,) int32 or int64, or None: boundaries, ascending, between 0 and
            seqlen, of the sequences in a batch of 1. Each is convolved alone, from and to its own
            row of the states; steps of no sequence are padding.
        pre_gate: x's shape and type, or None.
        post_gate: the same.
        residual: the same.
        dilation: steps from one tap to the next.

    Returns:
        out (batch, dim, seqlen) in x's dtype; with return_final_states also the final states
        (batch or sequences, dim, (width - 1) * dilation), in x's dtype unless final_states_out says
        otherwise.
    """
    if cu_seqlens is not None:
        out, final_states = _each_sequence(
            x,
            weight,
            bias,
            initial_states,
            activation,
            cu_seqlens,
            (pre_gate, post_gate, residual),
            dilation,
        )
        if not return_final_states:
            return out
        if final_states_out is not None:
            final_states = final_states_out.copy_(final_states)
        return out, final_states
    silu = is_silu(activation)
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    history = (width - 1) * dilation
    dtype = compute_dtype(x, weight, bias, initial_states)

    if pre_gate is not None:
        x = pre_gate * x
    if initial_states is None:
        initial_states = x.new_zeros(batch, dim, history)
    padded = torch.cat([initial_states.to(dtype), x.to(dtype)], dim=-1)  # from s = -history on
    if seq_idx is not None and seqlen > 0:
        ids = torch.cat([seq_idx[:, :1].expand(-1, history), seq_idx], dim=-1)
        is_padding = seq_idx[:, None, :] < 0

    z = x.new_zeros(batch, dim, seqlen, dtype=dtype)
    if bias is not None:
        z = z + bias.to(dtype)[:, None]
    for k in range(width):
        start = k * dilation
        tap = padded[:, :, start : start + seqlen]
        if seq_idx is not None and seqlen > 0:
            is_other = ids[:, None, start : start + seqlen] != seq_idx[:, None, :]
            tap = tap.masked_fill(is_other | is_padding, 0)
        z = z + weight.to(dtype)[:, k, None] * tap

    out = z * torch.sigmoid(z) if silu else z
    if post_gate is not None:
        out = out * post_gate.to(dtype)
    if seq_idx is not None and seqlen > 0:
        out = out.masked_fill(is_padding, 0)
    if residual is not None:
        out = out + residual.to(dtype)
    out = out.to(x.dtype)
    if not return_final_states:
        return out

    if seq_idx is None or seqlen == 0:
        final_states = padded[:, :, seqlen:]
    else:
        final_states = _final_states(padded, seq_idx, history)
    final_states = final_states.to(x.dtype)
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return out, final_states


def _each_sequence(x, weight, bias, initial_states, activation, cu_seqlens, around, dilation):
    """out, and the final states: those of each sequence alone."""
    batch, dim, seqlen = x.shape
    if batch != 1:
        raise RuntimeError(f"x must be (1, dim, total) with cu_seqlens, got {tuple(x.shape)}")
    bounds = [int(bound) for bound in cu_seqlens]  # not tolist, which torch.func once did not know
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > seqlen:
        raise RuntimeError(f"cu_seqlens must ascend from 0 to at most {seqlen}, got {bounds}")
    residual = around[2]
    before, after = (slice(0, bounds[0]), slice(bounds[-1], seqlen))
    outside = x.new_zeros(x.shape) if residual is None else residual
    outs, states = [outside[:, :, before]], []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        parts = (x, *around)
        part, pre_gate, post_gate, added = (
            None if tensor is None else tensor[:, :, start:stop] for tensor in parts
        )
        out, state = causal_conv1d_ref(
            part,
            weight,
            bias,
            None if initial_states is None else initial_states[i : i + 1],
            True,
            activation=activation,
            pre_gate=pre_gate,
            post_gate=post_gate,
            residual=added,
            dilation=dilation,
        )
        outs.append(out)
        states.append(state)
    states = states or [x.new_zeros(0, dim, (weight.shape[1] - 1) * dilation)]
    return torch.cat([*outs, outside[:, :, after]], dim=-1), torch.cat(states)


def _final_states(padded: torch.Tensor, seq_idx: torch.Tensor, history: int) -> torch.Tensor:
    """The last inputs x~ (from s = -history on) that padding leaves, as many as history."""
    batch, dim = padded.shape[:2]
    is_real = seq_idx >= 0
    time = torch.arange(1, seq_idx.shape[1] + 1, device=seq_idx.device)
    end = torch.where(is_real, time, 0).amax(dim=1, keepdim=True)
    index = end + torch.arange(history, device=seq_idx.device)  # of the states in padded
    counts_before = is_real[:, :1] | (end == 0)  # the initial state
    counts = torch.cat([counts_before.expand(-1, history), is_real], dim=-1).gather(1, index)
    states = padded.gather(2, index[:, None, :].expand(batch, dim, history))
    return states.masked_fill(~counts[:, None, :], 0)


def causal_conv1d_update_ref(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    *,
    dilation: int = 1,
) -> torch.Tensor:
    """One or more tokens appended to a running state, which changes in place.

    Without ``cache_seqlens`` the state holds the last S inputs, oldest first: it shifts left by
    seqlen and takes x at its end. With it the state is a ring: token i of row b goes to position
    (cache_seqlens[b] + i) mod S, and the inputs before it are read at the positions before that.
    seqlen may exceed S.

    ``conv_state_indices[b]`` is the row of conv_state that belongs to batch entry b; a negative one
    is padding: its out is 0 and no state is touched. One past the last row gives NaN and touches no
    state. Entries with the same row all read it as it was before the call; afterwards it holds what
    the last of them makes of it.

    Args:
        x: (batch, dim) or (batch, dim, seqlen), any float type.
        conv_state: (batch, dim, S), or with conv_state_indices (any number of rows, dim, S);
            S >= (width - 1) * dilation, any float type; changed in place.
        weight: (dim, width), width >= 1, any float type.
        bias: (dim,) or None, any float type.
        activation: None, "silu" or "swish" (the same as "silu").
        cache_seqlens: (batch,) int32 or int64, or None.
        conv_state_indices: (batch,) int32 or int64, or None.
        dilation: steps from one tap to the next.

    Returns:
        out, of x's shape and dtype.
    """
    is_silu(activation)
    tokens = x[:, :, None] if x.dim() == 2 else x
    batch, dim, seqlen = tokens.shape
    width, (rows, _, state_len) = weight.shape[1], conv_state.shape
    dtype = compute_dtype(x, conv_state)

    history = conv_state
    if conv_state_indices is not None:
        indices = conv_state_indices.long()
        if rows > 0:
            history = conv_state.index_select(0, indices.clamp(0, rows - 1))
        else:
            history = conv_state.new_zeros(batch, dim, state_len)
    history = history.to(dtype)

    position = torch.arange(state_len, device=x.device)
    if cache_seqlens is not None and state_len > 0:  # from the ring: the oldest input first
        head = cache_seqlens.long().remainder(state_len)[:, None]
        history = _take(history, (head + position) % state_len)
    out = causal_conv1d_ref(
        tokens,
        weight,
        bias,
        initial_states=history[:, :, state_len - (width - 1) * dilation :],
        activation=activation,
        dilation=dilation,
    )
    after = torch.cat([history, tokens.to(dtype)], dim=-1)[:, :, seqlen:]
    if cache_seqlens is not None and state_len > 0:  # back to the ring's positions
        after = _take(after, (position - head - seqlen) % state_len)
    after = after.detach().to(conv_state.dtype)

    if conv_state_indices is None:
        conv_state.copy_(after)
        return out.reshape(x.shape)
    is_row = (indices >= 0) & (indices < rows)
    out = out.masked_fill((indices < 0)[:, None, None], 0)
    out = out.masked_fill((indices >= rows)[:, None, None], torch.nan)
    if batch > 0:
        # The last batch entry of each row, -1 if there is none; one row more takes what has no row.
        entry = torch.arange(batch, device=x.device)
        last = torch.full((rows + 1,), -1, device=x.device)
        last = last.scatter_reduce(0, torch.where(is_row, indices, rows), entry, "amax")[:rows]
        after = after.index_select(0, last.clamp(min=0))
        conv_state.copy_(torch.where((last >= 0)[:, None, None], after, conv_state))
    return out.reshape(x.shape)


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values (batch, dim, S) at the positions (batch, S) of their last dimension."""
    return values.gather(2, index[:, None, :].expand(values.shape))


def causal_conv1d_varlen_states_ref(
    x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int
) -> torch.Tensor:
    """The last state_len inputs of each of several sequences packed one after the other.

    states[i,d,j] = x[cu_seqlens[i+1] - state_len + j, d], or 0 where that lies before cu_seqlens[i]

    Args:
        x: (total_tokens, dim), any float type.
        cu_seqlens: (batch + 1,) int32 or int64, the boundaries of the sequences, ascending.
        state_len: int >= 0.

    Returns:
        states (batch, dim, state_len) in x's dtype.
    """
    bounds = cu_seqlens.tolist()
    batch = len(bounds) - 1
    states = x.new_zeros(batch, x.shape[1], state_len)
    for i in range(batch):
        last = x[max(bounds[i], bounds[i + 1] - state_len) : bounds[i + 1]]
        states[i, :, state_len - len(last) :] = last.T
    return states


def selective_scan_ref(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_states: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Any:
    """The selective scan of Mamba, a step at a time; differentiable any number of times.

    With g = d // (dim / groups), for each batch entry b and channel d:

        dt[t]  = delta[b,d,t] + delta_bias[d], through log(1 + exp(.)) with delta_softplus
        h[n,t] = exp(dt[t] A[d,n]) h[n,t-1] + dt[t] B[b,g,n,t] u[b,d,t]
        y[t]   = sum over n of C[b,g,n,t] h[n,t], + D[d] u[b,d,t]
        out[t] = y[t] z[b,d,t] sigmoid(z[b,d,t]), or y[t] without z

    h before step 0 is initial_states or 0. With cu_seqlens the batch is 1, and sequence i is the
    steps cu_seqlens[i] .. cu_seqlens[i+1] - 1, with states of its own.

    Args:
        u: (batch, dim, seqlen), any float type.
        delta: as u.
        A: (dim, dstate), real or complex.
        B: (batch, groups, dstate, seqlen), (batch, dstate, seqlen), or (dim, dstate) if it is
            constant in time. With a complex A the last is complex, the others have pairs of real
            numbers along seqlen, and y is twice the real part of the sum.
        C: as B.
        D: (dim,) or None.
        z: as u, or None.
        delta_bias: (dim,) or None.
        delta_softplus: whether dt goes through softplus.
        return_last_state: whether to return (out, last_state) instead of out.
        initial_states: (batch or sequences, dim, dstate) or None.
        cu_seqlens: (sequences + 1,) int32 or int64, or None: boundaries, ascending, between 0 and
            seqlen. Out is 0 where no sequence is.

    Returns:
        out (batch, dim, seqlen) in u's dtype; with return_last_state also the states after the
        last step (batch or sequences, dim, dstate), in float32, in float64 if u is, or complex.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, dim, seqlen = u.shape
    wide, rate = u.to(dtype), A if A.is_complex() else A.to(dtype)
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    decay = torch.exp(dt[:, :, None] * rate[:, :, None])  # (batch, dim, dstate, seqlen)
    added = (dt * wide)[:, :, None] * _over_time(B, A, dtype, dim)

    # Not tolist, which torch.func did not know before torch 2.6.
    bounds = [0, seqlen] if cu_seqlens is None else [int(bound) for bound in cu_seqlens]
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > seqlen:
        raise RuntimeError(f"cu_seqlens must ascend from 0 to seqlen = {seqlen}, got {bounds}")
    decays, additions = (
        decay.unbind(-1),
        added.unbind(-1),
    )  # selecting each would add up in backward
    states, last = [added.new_zeros(added.shape[:3])] * seqlen, []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if initial_states is None:
            state = added.new_zeros(added.shape[:3])
        else:
            state = initial_states if cu_seqlens is None else initial_states[i : i + 1]
            state = state.to(added.dtype)
        for t in range(start, stop):
            state = decays[t] * state + additions[t]
            states[t] = state
        last.append(state)
    y = torch.stack(states, -1) if states else torch.zeros_like(added)
    y = (y * _over_time(C, A, dtype, dim)).sum(2)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D.to(dtype)[:, None] * wide
    if z is not None:
        gate = z.to(dtype)
        y = y * gate * torch.sigmoid(gate)
    if bounds[0] > 0 or bounds[-1] < seqlen:  # steps of no sequence
        inside = torch.arange(seqlen, device=y.device)
        y = y.masked_fill((inside < bounds[0]) | (inside >= bounds[-1]), 0)
    out = y.to(u.dtype)
    if not return_last_state:
        return out
    return out, torch.cat(last) if last else added.new_zeros(0, dim, A.shape[1])


def _over_time(projection, A, dtype, dim):
    """B or C as (batch or 1, dim, dstate, seqlen or 1)."""
    if projection.dim() == 2:
        return projection.to(A.dtype if A.is_complex() else dtype)[None, :, :, None]
    projection = projection.to(dtype)
    if projection.dim() == 3:
        projection = projection[:, None]
    if A.is_complex():
        projection = torch.view_as_complex(projection.unflatten(-1, (-1, 2)).contiguous())
    return projection.repeat_interleave(dim // projection.shape[1], dim=1)


def _write_rows(rows, index, values):
    """``rows[index] = values`` for the indices of rows; the host does not wait for them.

    One that is of no row does what the first does that is of one, or writes back what row 0 has.
    """
    if len(rows) == 0 or len(index) == 0:
        return
    given = (index >= 0) & (index < len(rows))
    first, is_any = given.int().argmax(0, keepdim=True), given.any()
    spare_index = torch.where(is_any, index.index_select(0, first), 0)
    spare_values = torch.where(is_any, values.index_select(0, first), rows[:1])
    mask = given.reshape(-1, *(1,) * (values.dim() - 1))
    rows[torch.where(given, index, spare_index)] = torch.where(mask, values, spare_values)


def selective_state_update_ref(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token of a selective scan: the state takes it in, in place.

        state = exp(dt A) state + dt B x
        out   = sum over dstate of C state, + D x, times z sigmoid(z) with z

    Args:
        state: (batch, dim, dstate) or (batch, heads, dim, dstate); with state_batch_indices any
            number of rows instead of batch.
        x: (batch, dim) or (batch, heads, dim).
        dt: as x.
        A: (dim, dstate) or (heads, dim, dstate).
        B: (batch, dstate) or (batch, groups, dstate), of groups of neighbouring heads.
        C: as B.
        D: (dim,) or (heads, dim), or None.
        z: as x, or None.
        dt_bias: (dim,) or (heads, dim), or None.
        dt_softplus: whether dt + dt_bias goes through softplus.
        state_batch_indices: (batch,) int32 or int64, or None: the row of state of each batch
            entry. A negative one is padding: its out is 0 and no state is touched. One past the
            last row gives NaN and touches no state.

    Returns:
        out, of x's shape and dtype.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = state if state.dim() == 4 else state[:, None]
    count, heads, dim, dstate = rows.shape

    def with_heads(tensor, dims):
        return None if tensor is None else tensor.to(dtype).reshape(-1, *dims)

    token, step, gate = (with_heads(t, (heads, dim)) for t in (x, dt, z))
    skip, bias = (None if t is None else t.to(dtype).reshape(heads, dim) for t in (D, dt_bias))
    B, C = (t.to(dtype).reshape(len(x), t.shape[1] if t.dim() == 3 else 1, dstate) for t in (B, C))
    B, C = (t.repeat_interleave(heads // t.shape[1], dim=1)[:, :, None] for t in (B, C))
    if bias is not None:
        step = step + bias
    if dt_softplus:
        step = F.softplus(step)
    step = step[..., None]
    before = rows
    if state_batch_indices is not None:
        index = state_batch_indices.long()
        before = (
            rows[index.clamp(0, max(count - 1, 0))]
            if count > 0
            else rows.new_zeros(len(x), heads, dim, dstate)
        )
    after = torch.exp(step * A.to(dtype).reshape(heads, dim, dstate)) * before.to(dtype)
    after = after + step * B * token[..., None]
    out = (after * C).sum(-1)
    if skip is not None:
        out = out + skip * token
    if gate is not None:
        out = out * gate * torch.sigmoid(gate)
    after = after.detach().to(state.dtype)
    if state_batch_indices is None:
        rows.copy_(after)
    else:
        out = out.masked_fill((index < 0)[:, None, None], 0)
        out = out.masked_fill((index >= count)[:, None, None], torch.nan)
        _write_rows(rows, index, after)
    return out.to(x.dtype).reshape(x.shape)
