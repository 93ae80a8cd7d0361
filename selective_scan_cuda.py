"""mamba_ssm's compiled extension by name, for where it is not built: the selective scan in plain
PyTorch, and in Triton for CUDA tensors where Triton is installed. Works with CPU tensors as well.

A single file, so that a compiled ``selective_scan_cuda.*.so`` beside it wins. See
``causal_conv1d.selective_scan`` for the formulas, the shapes and the memory.
"""

from __future__ import annotations

import torch

from causal_conv1d.selective_scan import selective_scan_bwd, selective_scan_fwd

__all__ = ["bwd", "fwd"]


def fwd(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
) -> list[torch.Tensor]:
    """[out, x], or [out, x, out_z] with z. ``x[:, :, -1, 1::2]`` is the last state."""
    out, x, out_z = selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return [out, x] if out_z is None else [out, x, out_z]


def bwd(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    dout: torch.Tensor,
    x: torch.Tensor | None,
    out: torch.Tensor | None,
    dz: torch.Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[torch.Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], then dz with z, then out_z with recompute_out_z.

    dD and ddelta_bias are None without D and delta_bias. dz, if given, is written in place. out is
    not needed and may be None, as may x.
    """
    *grads, dz, out_z = selective_scan_bwd(
        u, delta, A, B, C, D, z, delta_bias, dout, x, dz, delta_softplus, recompute_out_z
    )
    return [*grads, *(tensor for tensor in (dz, out_z) if tensor is not None)]
