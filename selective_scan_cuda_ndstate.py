"""The compiled extension ``selective_scan_cuda_ndstate`` of VMamba and Mamba-YOLO by name, for
where it is not built: :mod:`selective_scan_cuda_core` for dstate = 1, without that axis. A compiled
one beside this file wins.
"""

from __future__ import annotations

from typing import Any

import torch

import selective_scan_cuda_oflex

__all__ = ["bwd", "fwd"]


def fwd(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    nrows: int,
) -> list[torch.Tensor]:
    """[out, x]. A: (dim,); B, C: (batch, groups, seqlen)."""
    A, B, C = A.unsqueeze(1), B.unsqueeze(2), C.unsqueeze(2)
    return selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)


def bwd(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    dout: torch.Tensor,
    x: torch.Tensor | None,
    delta_softplus: bool,
    nrows: int,
) -> list[Any]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias]; the last two None without D and delta_bias."""
    A, B, C = A.unsqueeze(1), B.unsqueeze(2), C.unsqueeze(2)
    du, ddelta, dA, dB, dC, *rest = selective_scan_cuda_oflex.bwd(
        u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows
    )
    return [du, ddelta, dA.squeeze(1), dB.squeeze(2), dC.squeeze(2), *rest]
