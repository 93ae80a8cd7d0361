"""The compiled extension ``selective_scan_cuda_core`` of VMamba and Mamba-YOLO by name, for where
it is not built: :mod:`selective_scan_cuda_oflex` with out in u's dtype. A compiled one beside this
file wins.
"""

from __future__ import annotations

from typing import Any

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
    nrows: Any,
    *rest: Any,
) -> list[torch.Tensor]:
    """[out, x]: see :func:`selective_scan_cuda_oflex.fwd`."""
    if rest:  # the mamba_yolo.py that goes round for Jetson gives nrows, backnrows, delta_softplus
        (delta_softplus,) = rest
    return selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)
