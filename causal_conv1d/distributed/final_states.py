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

    A step of -1 or less is a column of the row's initial states, counted from their end.
    """

    rows: torch.Tensor
    steps: torch.Tensor


def ends_of_rows(call: Any, group: Any, seq_idx) -> torch.Tensor:
    """After the last step of each row that is no padding, on whichever rank that is; else 0."""
    end = seq_idx.new_zeros(seq_idx.shape[0], dtype=torch.int64)
    for part in call.parts.mine:
        steps = torch.arange(part.start + 1, part.end + 1, device=seq_idx.device)
        real = seq_idx[:, part.slice()] >= 0
        end = torch.maximum(end, steps.where(real, 0).amax(-1))
    if dist.get_world_size(group) > 1:
        dist.all_reduce(end, dist.ReduceOp.MAX, group=group)
    return end


def _places(call: Any, x, ends, cu_seqlens) -> Places:
    columns = torch.arange(-call.halo, 0, device=x.device)
    if cu_seqlens is not None:
        begins, stops = cu_seqlens[:-1, None], cu_seqlens[1:, None]
        steps = stops + columns
        return Places(torch.zeros_like(steps), steps.where(steps >= begins, steps - begins))
    rows = torch.arange(x.shape[0], device=x.device)[:, None].expand(-1, call.halo)
    if ends is None:
        return Places(rows, (columns + call.parts.total).expand(rows.shape))
    return Places(rows, ends[:, None] + columns)


def _inside(part, at: Places, seq_idx):
    """Which of the places a part holds, and where in the shard; padding does not count."""
    local = at.steps - part.start
    inside = (local >= 0) & (local < part.length)
    where = part.offset + local.clamp(0, part.length - 1)
    if seq_idx is not None:
        inside &= seq_idx[at.rows, where] >= 0
    return inside[..., None], where


def _initial(call, at: Places, seq_idx, initial_states):
    """Which of the places are initial states, and those.

    In front of padding they count only where all of the row is padding.
    """
    inside = at.steps < 0
    if seq_idx is not None and call.parts.first.length > 0:
        first = seq_idx[at.rows, call.parts.first.offset]
        inside &= (first >= 0) | (at.steps[:, -1:] == -1)
    column = (at.steps + call.halo).clamp(0, call.halo - 1)[:, None]
    states = initial_states.gather(2, column.expand(initial_states.shape))
    return inside[..., None], states.transpose(1, 2)


def collect(call: Any, group: Any, x, seq_idx, cu_seqlens, ends, initial_states):
    """The final states, (rows, dim, halo) in x's dtype, on every rank.

    seq_idx and ends are of rows with ids that the caller gave.
    """
    at = _places(call, x, ends, cu_seqlens)
    found = x.new_zeros(*at.steps.shape, x.shape[1])
    if call.halo > 0:
        for part in call.parts.mine:
            inside, where = _inside(part, at, seq_idx)
            found = torch.where(inside, x[at.rows, :, where], found)
        if initial_states is not None and call.parts.first.rank == call.parts.rank:
            inside, states = _initial(call, at, seq_idx, initial_states)
            found = torch.where(inside, states.to(x.dtype), found)
    return sum_disjoint(found.transpose(1, 2), group)
