"""The operator ``pool`` in plain PyTorch, as ``_plain.py`` has others."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._plain import after_checks
from .reference import compute_dtype


class _Sequences:
    """The sequences of a call; i is a tensor of their numbers."""

    def __init__(self, x, conv_states, width, query_start_loc, cache_indices, has_state, accepted):
        self.x, self.states, self.history = x, conv_states, width - 1
        total, device = x.shape[1], x.device
        self.dtype = compute_dtype(x)
        bounds = torch.arange(total + 1, device=device)
        if query_start_loc is not None:
            bounds = query_start_loc.long().clamp(0, total).cummax(0).values
        self.bounds, self.count = bounds, bounds.shape[0] - 1
        self.begin, self.lengths = bounds[:-1], bounds.diff()
        self.all = torch.arange(self.count, device=device)
        self.slots = self.all if cache_indices is None else cache_indices.long()
        self.has_state = torch.ones_like(self.all) if has_state is None else has_state
        self.first_column = torch.zeros_like(self.all)
        if accepted is not None:
            most = conv_states.shape[2] - self.history
            self.first_column = (accepted.long() - 1).clamp(0, most)

    def skipped(self, pad_slot):
        slots = self.slots
        return (slots == pad_slot) | (slots < 0) | (slots >= self.states.shape[0])

    def inputs(self, i, j):
        """Input j of history and tokens: (dim, *j.shape)."""
        tokens = (self.begin[i] + j - self.history).clamp(0, self.x.shape[1] - 1)
        found = self.x[:, tokens].to(self.dtype)
        if self.history == 0:
            return found
        slots = self.slots[i].clamp(0, self.states.shape[0] - 1)
        columns = (self.first_column[i] + j).clamp(0, self.states.shape[2] - 1)
        before = self.states[slots, :, columns].movedim(-1, 0).to(self.dtype)
        before = before.masked_fill(self.has_state[i] == 0, 0)
        return torch.where(j >= self.history, found, before)


def _with_rows(tensor, rows, is_written, values):
    """The tensor after ``tensor[rows] = values`` where is_written, (rows, columns)."""
    dummy = torch.zeros_like(tensor[:1]) if len(tensor) else tensor.new_zeros(1, *tensor.shape[1:])
    after = torch.cat([tensor, dummy])
    is_row = is_written.any(-1) & (rows >= 0) & (rows < len(tensor))
    rows = torch.where(is_row, rows, len(tensor))
    mask = is_written.reshape(*is_written.shape, *(1,) * (tensor.dim() - 2))
    after[rows] = torch.where(mask, values.to(tensor.dtype), after[rows])
    return after[:-1]


def pool(
    x, conv_states, weight, bias, out, query_start_loc, cache_indices, has_initial_state,
    num_accepted_tokens, windows_out, window_indices, pad_slot, max_seqlen, silu,
):  # fmt: skip
    """Writes conv_states, out and windows_out."""
    width = weight.shape[1]
    s = _Sequences(
        x, conv_states, width, query_start_loc, cache_indices, has_initial_state,
        num_accepted_tokens,
    )  # fmt: skip
    if x.numel() == 0 or s.count == 0:
        out.zero_()
        return
    skipped = s.skipped(pad_slot)
    time = torch.arange(x.shape[1], device=x.device)
    i = torch.searchsorted(s.bounds, time, right=True) - 1
    outside = (i < 0) | (i >= s.count)
    i = i.clamp(0, s.count - 1)
    z = x.new_zeros(x.shape, dtype=s.dtype)
    if bias is not None:
        z = z + bias[:, None].to(s.dtype)
    for k in range(width):
        z = z + weight[:, k, None].to(s.dtype) * s.inputs(i, time - s.begin[i] + k)
    z = (F.silu(z) if silu else z).masked_fill(outside | skipped[i], 0)

    if windows_out is not None and windows_out.numel() > 0:
        tokens = torch.arange(windows_out.shape[1], device=x.device)[:, None]
        columns = torch.arange(width - 1, device=x.device)
        each = s.all[:, None, None].expand(-1, *tokens.shape[:1], width - 1)
        values = s.inputs(each, (tokens + 1 + columns).expand(each.shape))
        rows = s.all if window_indices is None else window_indices.long()
        is_written = (tokens[:, 0] < s.lengths[:, None]) & ~skipped[:, None]
        values = values.permute(1, 2, 0, 3).flatten(2)
        windows_out.copy_(_with_rows(windows_out, rows, is_written, values))
    if conv_states.numel() > 0:
        kept = torch.full_like(s.lengths, width - 1)
        if num_accepted_tokens is not None:
            kept = (width - 2 + s.lengths).clamp(max=conv_states.shape[2])
        columns = torch.arange(conv_states.shape[2], device=x.device)
        each = s.all[:, None].expand(-1, len(columns))
        values = s.inputs(each, columns + (width - 1 + s.lengths - kept)[:, None])
        is_written = (columns < kept[:, None]) & (~skipped & (s.lengths > 0))[:, None]
        states = _with_rows(
            conv_states.transpose(1, 2), s.slots, is_written, values.permute(1, 2, 0)
        )
        conv_states.copy_(states.transpose(1, 2))
    out.copy_(z)


def operations(checks: dict) -> dict:
    """As that of ``_plain.py``."""
    return after_checks({"pool": pool}, checks)
