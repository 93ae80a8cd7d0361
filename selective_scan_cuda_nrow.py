"""The compiled extension ``selective_scan_cuda_nrow`` of VMamba and Mamba-YOLO by name, for where
it is not built: :mod:`selective_scan_cuda_oflex` with out in u's dtype. A compiled one beside this
file wins.
"""

from __future__ import annotations

import torch

import selective_scan_cuda_oflex
from selective_scan_cuda_oflex import bwd

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
    """[out, x]: see :func:`selective_scan_cuda_oflex.fwd`."""
    return selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)
