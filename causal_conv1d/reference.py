"""The semantics of this package in plain PyTorch; every test compares with it.

With x of shape (batch, dim, seqlen) and weight of shape (dim, width), W = width:

    out[b,d,t] = act(bias[d] + sum over k = 0..W-1 of weight[d,k] * x~[b,d,t-(W-1)+k])
    x~[b,d,s]  = x[b,d,s] for s >= 0; initial_states[b,d,(W-1)+s] for s < 0 if given, else 0

act is the identity or silu(z) = z * sigmoid(z). Everything is computed in the widest type among the
arguments, float32 at least; float64 arguments therefore give float64 results.
"""

import functools

import torch


def _is_silu(activation):
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError("activation must be None, silu, or swish")
    return activation is not None


def _compute_dtype(*tensors):
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def causal_conv1d_ref(
    x,
    weight,
    bias=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
    seq_idx=None,
):
    """Causal depthwise convolution over the last dimension of x.

    With ``seq_idx``, several sequences share a row: a tap at s counts for t only if id(s) == id(t),
    where id(s) = seq_idx[b,s] for s >= 0, and the initial state carries the id seq_idx[b,0].
    Where seq_idx[b,t] < 0 (padding), out is 0 and no gradient comes from it.

    The final state is the last width - 1 inputs, whatever their ids:
    final_states[b,d,j] = x~[b,d,seqlen-(width-1)+j]. A sequence shorter than width - 1 keeps the
    end of its initial state.

    Args:
        x: (batch, dim, seqlen), any float type.
        weight: (dim, width), width >= 1, any float type.
        bias: (dim,) or None, any float type.
        initial_states: (batch, dim, width - 1) or None, any float type.
        return_final_states: whether to return (out, final_states) instead of out.
        final_states_out: (batch, dim, width - 1) or None; with return_final_states, the tensor
            that the final states are written to and returned in.
        activation: None, "silu" or "swish" (the same as "silu").
        seq_idx: (batch, seqlen) int32 or None.

    Returns:
        out (batch, dim, seqlen) in x's dtype; with return_final_states also the final states
        (batch, dim, width - 1), in x's dtype unless final_states_out says otherwise.
    """
    silu = _is_silu(activation)
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    dtype = _compute_dtype(x, weight, bias, initial_states)

    if initial_states is None:
        initial_states = x.new_zeros(batch, dim, width - 1)
    padded = torch.cat([initial_states.to(dtype), x.to(dtype)], dim=-1)  # x~, from s = -(W-1) on
    if seq_idx is not None and seqlen > 0:
        ids = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=-1)
        is_padding = seq_idx[:, None, :] < 0

    z = x.new_zeros(batch, dim, seqlen, dtype=dtype)
    if bias is not None:
        z = z + bias.to(dtype)[:, None]
    for k in range(width):
        tap = padded[:, :, k : k + seqlen]
        if seq_idx is not None and seqlen > 0:
            is_other = ids[:, None, k : k + seqlen] != seq_idx[:, None, :]
            tap = tap.masked_fill(is_other | is_padding, 0)
        z = z + weight.to(dtype)[:, k, None] * tap

    out = z * torch.sigmoid(z) if silu else z
    if seq_idx is not None and seqlen > 0:
        out = out.masked_fill(is_padding, 0)
    out = out.to(x.dtype)
    if not return_final_states:
        return out

    final_states = padded[:, :, seqlen:].to(x.dtype)
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return out, final_states


def causal_conv1d_update_ref(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
):
    """One or more tokens appended to a running state, which changes in place.

    Without ``cache_seqlens`` the state holds the last S inputs, oldest first: it shifts left by
    seqlen and takes x at its end. With it the state is a ring: token i of row b goes to position
    (cache_seqlens[b] + i) mod S, and the inputs before it are read at the positions before that.
    seqlen may exceed S.

    ``conv_state_indices[b]`` is the row of conv_state that belongs to batch entry b; a negative one
    is padding: its out is 0 and no state is touched.

    Args:
        x: (batch, dim) or (batch, dim, seqlen), any float type.
        conv_state: (batch or more, dim, S), S >= width - 1, any float type; changed in place.
        weight: (dim, width), width >= 1, any float type.
        bias: (dim,) or None, any float type.
        activation: None, "silu" or "swish" (the same as "silu").
        cache_seqlens: (batch,) int32 or None.
        conv_state_indices: (batch,) int32 or None.

    Returns:
        out, of x's shape and dtype.
    """
    _is_silu(activation)
    tokens = x[:, :, None] if x.dim() == 2 else x
    batch, _, seqlen = tokens.shape
    width, state_len = weight.shape[1], conv_state.shape[2]
    dtype = _compute_dtype(x, conv_state)

    out = torch.zeros_like(tokens)
    position = torch.arange(state_len, device=x.device)
    for b in range(batch):
        row = b if conv_state_indices is None else int(conv_state_indices[b])
        if row < 0:
            continue
        # Where the state's inputs lie, from the oldest to the newest, before and after the update.
        before = after = position
        if cache_seqlens is not None and state_len > 0:
            start = int(cache_seqlens[b])
            before = (start + position) % state_len
            after = (start + seqlen + position) % state_len
        history = conv_state[row][:, before].to(dtype)
        out[b] = causal_conv1d_ref(
            tokens[b : b + 1],
            weight,
            bias,
            initial_states=history[None, :, state_len - (width - 1) :],
            activation=activation,
        )[0]
        inputs = torch.cat([history, tokens[b].to(dtype)], dim=-1)
        conv_state[row][:, after] = inputs[:, seqlen:].detach().to(conv_state.dtype)
    return out.reshape(x.shape)


def causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len):
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
