"""The operators in plain PyTorch, writing into tensors they are given.

They stand in for the CUDA kernels on a GPU where those fail their self-test: slower, with the same
semantics. Nothing here synchronises.
"""

from __future__ import annotations

import torch

from causal_conv1d.reference import _compute_dtype, causal_conv1d_ref


def forward(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu):
    activation = "silu" if silu else None
    result, final_states = causal_conv1d_ref(
        x, weight, bias, initial_states, True, None, activation, seq_idx
    )
    out.copy_(result)
    if final_states_out is not None:
        final_states_out.copy_(final_states)


def backward(
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
    silu,
):
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    dtype = _compute_dtype(x, weight, bias, initial_states)
    if initial_states is None:
        initial_states = x.new_zeros(batch, dim, width - 1)
    padded = torch.cat([initial_states.to(dtype), x.to(dtype)], dim=-1)
    weight_ = weight.to(dtype)

    ignored = None  # by tap: where it does not count
    if seq_idx is not None and seqlen > 0:
        ids = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=-1)
        ignored = [
            (ids[:, None, k : k + seqlen] != seq_idx[:, None, :]) | (seq_idx[:, None, :] < 0)
            for k in range(width)
        ]

    def tap(k):
        values = padded[:, :, k : k + seqlen]
        return values if ignored is None else values.masked_fill(ignored[k], 0)

    dz = dout.to(dtype)
    if silu:
        z = torch.zeros_like(dz)
        if bias is not None:
            z = z + bias.to(dtype)[:, None]
        for k in range(width):
            z = z + weight_[:, k, None] * tap(k)
        sigmoid = torch.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    if ignored is not None:
        dz = dz.masked_fill(seq_idx[:, None, :] < 0, 0)

    dpadded = torch.zeros_like(padded)
    for k in range(width):
        part = weight_[:, k, None] * dz
        if ignored is not None:
            part = part.masked_fill(ignored[k], 0)
        dpadded[:, :, k : k + seqlen] += part
    if dfinal_states is not None:
        dpadded[:, :, seqlen:] += dfinal_states.to(dtype)

    dx.copy_(dpadded[:, :, width - 1 :])
    if dinitial_states is not None:
        dinitial_states.copy_(dpadded[:, :, : width - 1])
    if dweight is not None:
        dweight.copy_(torch.stack([(dz * tap(k)).sum((0, 2)) for k in range(width)], dim=1))
    if dbias is not None:
        dbias.copy_(dz.sum((0, 2)))


def update(x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices):
    tokens = x[:, :, None] if x.dim() == 2 else x
    batch, _, seqlen = tokens.shape
    rows, _, state_len = conv_state.shape
    width = weight.shape[1]
    if batch == 0:
        return

    history = conv_state[:batch]
    if conv_state_indices is not None:
        indices = conv_state_indices.long()
        if rows > 0:
            history = conv_state.index_select(0, indices.clamp(0, rows - 1))
        else:
            history = conv_state.new_zeros(batch, *conv_state.shape[1:])

    def rotated(values, start):
        """Position p of the result is position (start + p) mod S of values, by batch entry."""
        position = torch.arange(state_len, device=x.device)
        index = (start.long()[:, None] + position).remainder(max(state_len, 1))
        return values.gather(2, index[:, None, :].expand(values.shape))

    if cache_seqlens is not None:
        history = rotated(history, cache_seqlens)  # the oldest input first
    dtype = _compute_dtype(x, conv_state)
    history = history.to(dtype)
    result = causal_conv1d_ref(
        tokens,
        weight,
        bias,
        initial_states=history[:, :, state_len - (width - 1) :],
        activation="silu" if silu else None,
    )
    after = torch.cat([history, tokens.to(dtype)], dim=-1)[:, :, seqlen:].to(conv_state.dtype)
    if cache_seqlens is not None:
        after = rotated(after, -(cache_seqlens.long() + seqlen))  # back to the ring's positions

    if conv_state_indices is None:
        conv_state[:batch].copy_(after)
    else:
        result = result.masked_fill((indices < 0)[:, None, None], 0)
        result = result.masked_fill((indices >= rows)[:, None, None], torch.nan)
        # The batch entry that each row belongs to, or none: -1.
        owner = torch.full((rows + 1,), -1, device=x.device)
        is_row = (indices >= 0) & (indices < rows)
        entries = torch.arange(batch, device=x.device)
        owner.scatter_(0, torch.where(is_row, indices, rows), entries)
        owner = owner[:rows]
        after = after.index_select(0, owner.clamp(min=0))
        conv_state.copy_(torch.where(owner[:, None, None] >= 0, after, conv_state))
    out.copy_(result.reshape(out.shape))


def varlen_states(x, cu_seqlens, states):
    state_len = states.shape[2]
    bounds = cu_seqlens.long()
    index = bounds[1:, None] - state_len + torch.arange(state_len, device=x.device)
    is_before = index < bounds[:-1, None]
    if x.shape[0] == 0:
        states.zero_()
        return
    taken = x[index.clamp(0, x.shape[0] - 1)]  # (batch, state_len, dim)
    states.copy_(taken.masked_fill(is_before[:, :, None], 0).transpose(1, 2))


OPERATORS = {
    "forward": forward,
    "backward": backward,
    "update": update,
    "varlen_states": varlen_states,
}


def kernels(checks: dict) -> dict:
    """The operators by name, with the checks of their arguments before them."""

    def kernel(operator):
        function, check = OPERATORS[operator], checks[operator]

        def run(*args):
            check(args)
            # Inference mode allows writing to every tensor, inference tensors included.
            with torch.inference_mode():
                function(*args)

        return run

    return {operator: kernel(operator) for operator in OPERATORS}
