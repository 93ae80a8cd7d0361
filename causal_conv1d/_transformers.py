"""transformers' Mamba models on this library's selective scan, where mamba_ssm is not installed.

From transformers 5 on a model's module has functions for the scan and for a token's update; before,
it has names that mamba_ssm's functions are imported to. Both are replaced.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

from ._when_imported import when_imported
from .causal_conv1d_interface import causal_conv1d_fn
from .selective_scan.functions import selective_scan_fn, selective_state_update

__all__ = ["use_in_transformers"]

# Those of Mamba 2 take the update alone.
MODELS = "mamba falcon_mamba jamba zamba".split()
MODELS += "mamba2 bamba falcon_h1 zamba2 granitemoehybrid nemotron_h".split()


def use_in_transformers() -> None:
    """Lets transformers' Mamba models use this library's selective scan.

    Mamba, FalconMamba, Jamba and Zamba get :func:`selective_scan_fn` and
    :func:`selective_state_update` in the place of loops in plain PyTorch; Mamba 2 and its relatives
    get the latter, for decoding. Call it once, before or after models are made; mamba_ssm is not
    needed. From transformers 5 on that holds on every device; before, on CUDA.
    """
    for model in MODELS:
        name = f"transformers.models.{model}.modeling_{model}"
        when_imported(name, lambda name=name: _replace(sys.modules[name]))


def _replace(module: Any) -> None:
    if hasattr(module, "selective_scan_fn"):  # before transformers 5
        module.selective_scan_fn = selective_scan_fn
        module.selective_state_update = selective_state_update
        module.mamba_inner_fn = mamba_inner_fn
        if hasattr(module, "is_fast_path_available"):
            module.is_fast_path_available = module.causal_conv1d_fn is not None
        return
    replacements = {
        "mamba_selective_scan": _scan,
        "mamba_selective_state_update": _update,
        "mamba2_selective_state_update": _update,
    }
    for name, function in replacements.items():
        if hasattr(module, name):
            setattr(module, name, function)


def _like(first: torch.Tensor, *tensors: torch.Tensor | None) -> Any:
    """In float64 if the first one is, as the kernels want: the models make some float32."""
    if first.dtype != torch.float64:
        return tensors
    return tuple(tensor if tensor is None else tensor.double() for tensor in tensors)


def _scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> Any:
    """transformers' mamba_selective_scan; the other arguments choose among its own ways."""
    u = hidden_states
    dt, A, B, C, D, z, delta_bias = _like(u, dt, A, B, C, D, z, delta_bias)
    return selective_scan_fn(u, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _update(
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' mamba_selective_state_update, whose z comes last."""
    x = hidden_states
    dt, A, B, C, D, z, dt_bias = _like(x, dt, A, B, C, D, z, dt_bias)
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def mamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    *,
    b_rms_weight: torch.Tensor | None = None,
    c_rms_weight: torch.Tensor | None = None,
    dt_rms_weight: torch.Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> torch.Tensor:
    """All of a Mamba block between its input's projection and its output: (batch, seqlen, dim).

    mamba_ssm's, for transformers before 5, whose B and C are None: they are projected from x.
    """
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    projected = F.linear(x.transpose(1, 2), x_proj_weight)
    dstate = A.shape[1]
    dt, B, C = projected.split((delta_proj_weight.shape[1], dstate, dstate), dim=-1)
    if dt_rms_weight is not None:  # of FalconMamba, ones in another length
        dt = _rms_norm(dt, b_c_dt_rms_eps)
    if b_rms_weight is not None:
        B = b_rms_weight * _rms_norm(B, b_c_dt_rms_eps)
    if c_rms_weight is not None:
        C = c_rms_weight * _rms_norm(C, b_c_dt_rms_eps)
    dt, B, C = delta_proj_weight @ dt.transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)
    dt, A, B, C, D, z, delta_bias = _like(x, dt, A, B, C, D, z, delta_bias)
    y = selective_scan_fn(x, dt, A, B, C, D, z, delta_bias, delta_softplus)
    bias = None if out_proj_bias is None else out_proj_bias.to(y.dtype)
    return F.linear(y.transpose(1, 2), out_proj_weight, bias)


def _rms_norm(tensor: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension, in float32."""
    wide = tensor.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(tensor.dtype)
