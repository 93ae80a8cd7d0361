"""The final states of a sequence on several ranks, of which each rank has the inputs it holds.

Every rank gets all of them, by one sum over the ranks of disjoint contributions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .exchange import sum_disjoint


class Places(NamedTuple):
    """Where the final states come from: for each (row of them, column) a row of x and a step.

    A step of -1 or less is a column of the initial states, counted from their end; one of
    -halo - 1 is nothing.
    """

    rows: torch.Tensor
    steps: torch.Tensor


def places(call: Any, x, seq_idx, cu_seqlens) -> Places:
    columns = torch.arange(-call.halo, 0, device=x.device)
    if cu_seqlens is not None:
        steps = cu_seqlens[1:, None] + columns
        steps = steps.where(steps >= cu_seqlens[:-1, None], -call.halo - 1)
        return Places(torch.zeros_like(steps), steps)
    rows = torch.arange(x.shape[0], device=x.device)[:, None].expand(-1, call.halo)
    if seq_idx is None:
        return Places(rows, (columns + call.parts.total).expand(rows.shape))
    # After the last step that is no padding, on whichever rank that is.
    end = seq_idx.new_zeros(x.shape[0], dtype=torch.int64)
    for part in call.parts.mine:
        steps = torch.arange(part.start + 1, part.end + 1, device=x.device)
        real = seq_idx[:, part.slice()] >= 0
        end = torch.maximum(end, steps.where(real, 0).amax(-1))
    if dist.get_world_size(call.group) > 1:
        dist.all_reduce(end, dist.ReduceOp.MAX, group=call.group)
    return Places(rows, end[:, None] + columns)


def _inside(part, at: Places, seq_idx):
    """Which of the places a part holds, and where in the shard; padding does not count."""
    local = at.steps - part.start
    inside = (local >= 0) & (local < part.length)
    where = part.offset + local.clamp(0, part.length - 1)
    if seq_idx is not None:
        inside &= seq_idx[at.rows, where] >= 0
    return inside[..., None], where


def _inside_states(call, at: Places, seq_idx):
    """Which of the places are initial states, and their columns.

    In front of padding they count only where all of the row is padding.
    """
    column = at.steps + call.halo
    inside = (at.steps < 0) & (column >= 0)
    if seq_idx is not None and call.parts.first.length > 0:
        first = seq_idx[at.rows, call.parts.first.offset]
        inside &= (first >= 0) | (at.steps[:, -1:] == -1)
    return inside[..., None], column.clamp(0, call.halo - 1)


def collect(call: Any, at: Places, x, seq_idx, initial_states):
    """The final states, (rows, dim, halo) in x's dtype, on every rank."""
    found = x.new_zeros(*at.steps.shape, x.shape[1])
    if call.halo > 0:
        for part in call.parts.mine:
            inside, where = _inside(part, at, seq_idx)
            found = torch.where(inside, x[at.rows, :, where], found)
        if initial_states is not None and call.parts.first.rank == call.parts.rank:
            inside, column = _inside_states(call, at, seq_idx)
            values = initial_states[at.rows, :, column].to(x.dtype)
            found = torch.where(inside, values, found)
    return sum_disjoint(found.transpose(1, 2), call.group)


def add_to_dx(call: Any, at: Places, seq_idx, dfinal, dx) -> None:
    """Adds the gradient of the final states to that of the steps which they are."""
    for part in call.parts.mine if call.halo > 0 else []:
        inside, where = _inside(part, at, seq_idx)
        values = dfinal.transpose(1, 2).where(inside, 0).to(dx.dtype)
        dx.transpose(1, 2).index_put_((at.rows, where), values, accumulate=True)


def add_to_states(call: Any, at: Places, seq_idx, dfinal, dstates) -> None:
    """Adds the gradient of the final states to that of the initial states which they are."""
    if call.halo > 0:
        inside, column = _inside_states(call, at, seq_idx)
        values = dfinal.transpose(1, 2).where(inside, 0).to(dstates.dtype)
        dstates.transpose(1, 2).index_put_((at.rows, column), values, accumulate=True)
