"""flash-linear-attention's call form of the convolution under context parallelism."""

from __future__ import annotations

from typing import Any

import torch

from .convolution import causal_conv1d_cp
from .groups import find_group

# Ids of the sequences that end in part k are k * MOST and above: what one part may hold.
MOST = 1 << 20


def _ids(context: Any, rank: int, ranks: int, length: int) -> torch.Tensor:
    """The id of each local step, the same on every rank for a sequence that goes on.

    The context has the bounds of the local sequences, and how many parts ago the first began. A
    sequence is named by the part in which it begins and its place among that part's, from the last
    one on: the last alone can go on.
    """
    bounds = context.cu_seqlens
    step = torch.arange(length, device=bounds.device, dtype=bounds.dtype)
    number = torch.searchsorted(bounds, step, right=True) - 1
    if context.layout == "contiguous":
        parts = [(rank, 0, bounds.shape[0] - 1, context.pre_num_ranks)]
    else:
        front, back = context.pre_num_ranks_by_part
        middle = context.front_num_seqs
        parts = [
            (rank, 0, middle, front),
            (2 * ranks - 1 - rank, middle, bounds.shape[0] - 1, back),
        ]
    ids = torch.empty_like(number)
    for part, first, last, ago in parts:
        name = part * MOST + (last - 1 - number)
        if ago:
            name = name.where(number > first, (part - ago) * MOST)
        ids = name.where(number >= first, ids)
    return ids.to(torch.int32)[None]


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: Any = None,
) -> tuple[torch.Tensor, None]:
    """``causal_conv1d_cp`` as ``fla.modules.causal_conv1d.causal_conv1d`` is called.

    Args:
        x: (1, length, dim), this rank's shard.
        weight: (dim, width).
        bias: (dim,) or None.
        residual: x's shape, or None; added after the activation.
        initial_state: refused, as there.
        output_final_state: refused, as there.
        activation: None, "silu" or "swish".
        backend: not read.
        cu_seqlens: not read: cp_context has the bounds.
        cu_seqlens_cpu: not read.
        chunk_indices: not read.
        cp_context: an ``FLACPContext``, contiguous or zigzag.

    Returns:
        (out, None), out as x.
    """
    caller = "causal_conv1d"
    if cp_context is None or cp_context.group is None:
        raise RuntimeError(f"{caller}: cp_context must be a context with a process group")
    if initial_state is not None or output_final_state:
        raise RuntimeError(f"{caller}: with cp_context there are no initial and final states")
    group = find_group(caller, cp_context.group)
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    ids = _ids(cp_context, rank, ranks, x.shape[1])
    layout = cp_context.layout
    out = causal_conv1d_cp(x.mT, weight, bias, activation, group, ids, layout=layout).mT
    return (out if residual is None else out + residual), None
