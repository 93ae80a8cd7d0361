"""Megatron-LM's call form of the convolution under context parallelism."""

from __future__ import annotations

from typing import Any

import torch

from .convolution import causal_conv1d_cp as _causal_conv1d_cp
from .groups import find_group


def causal_conv1d_cp(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cp_group: Any = None,
    global_seq_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """``causal_conv1d_cp`` with contiguous shards of equal length, channels last.

    Args:
        x: (batch, length, dim), this rank's shard.
        weight: (dim, width).
        bias: (dim,) or None.
        activation: None, "silu" or "swish".
        cp_group: the process group; None is the default group.
        global_seq_idx: (1 or batch, ranks * length) integers, or None: the ids of the whole.

    Returns:
        out, (batch, length, dim).
    """
    caller = "causal_conv1d_cp"
    group, seq_idx = find_group(caller, cp_group), None
    if global_seq_idx is not None:
        length, ranks = x.shape[1], torch.distributed.get_world_size(group)
        ids = global_seq_idx
        if ids.dim() != 2 or ids.shape[0] not in (1, x.shape[0]) or ids.shape[1] != ranks * length:
            raise RuntimeError(
                f"{caller}: global_seq_idx must be (1 or batch, ranks * length) = "
                f"({x.shape[0]}, {ranks * length}), got {tuple(ids.shape)}"
            )
        start = torch.distributed.get_rank(group) * length
        seq_idx = ids[:, start : start + length].to(torch.int32).expand(x.shape[0], -1)
    return _causal_conv1d_cp(x.mT, weight, bias, activation, group, seq_idx).mT
