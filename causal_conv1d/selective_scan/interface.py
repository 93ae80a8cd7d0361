"""The functions that callers use: they check the arguments, allocate, and choose a backend."""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import plain
from .arguments import Grads, Inputs, check


@functools.cache
def _triton():
    """(forward, backward) or None; Triton is imported when a CUDA tensor first asks."""
    try:
        from .triton_backward import backward
        from .triton_forward import forward
    except ImportError:
        return None
    return forward, backward


def _backend(inputs):
    if inputs.u.is_cuda and inputs.dtype == torch.float32 and inputs.A.shape[1] <= 256:
        kernels = _triton()
        if kernels is not None:
            return kernels
    return plain.forward, plain.backward


@torch.no_grad()
def selective_scan_fwd(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns (out, x, out_z); out_z is None without z.

    u, delta, z: (batch, dim, seqlen), any strides. A: (dim, dstate), real or complex. B, C:
    (dim, dstate), or (batch, groups, dstate, seqlen), twice seqlen with complex A. D, delta_bias:
    (dim,). D, z and delta_bias may be None. out has out_dtype (default: u's) and delta's layout. x
    is (batch, dim, ceil(seqlen / CHUNK), 2 * dstate): the product of exp(dt A) since the beginning
    (even places) and the state (odd places) at the end of each chunk, so that
    ``x[:, :, -1, 1::2]`` is the last state. Raises ValueError, naming the argument, for shapes
    that do not fit.
    """
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    check("selective_scan fwd", inputs)
    out = torch.empty_like(delta, dtype=out_dtype or u.dtype)
    out_z = None if z is None else torch.empty_like(z)
    x = torch.empty(inputs.x_shape, dtype=inputs.dtype, device=u.device)
    if u.numel() > 0:
        _backend(inputs)[0](inputs, out, out_z, x)
    return out, x, out_z


@torch.no_grad()
def selective_scan_bwd(
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
    dz: torch.Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Returns (du, ddelta, dA, dB, dC, dD, ddelta_bias, dz, out_z), None where absent.

    dout is the gradient of out_z, of out without z. x is the forward's, or None: then its states
    are computed again. dz, if given, is written in place, whatever its strides. out_z is returned
    with ``recompute_out_z`` and z. Each gradient has the dtype of its tensor.
    """
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    check("selective_scan bwd", inputs, dout, dz)
    if x is None and inputs.x_shape[2] > 1:
        x = selective_scan_fwd(u, delta, A, B, C, None, None, delta_bias, delta_softplus)[1]
    if x is not None and x.shape != inputs.x_shape:
        raise ValueError(f"selective_scan bwd: x must be {inputs.x_shape}, got {tuple(x.shape)}")

    def zeros(tensor: Any) -> Any:
        if tensor is None:
            return None
        dtype = inputs.real_dtype.to_complex() if tensor.is_complex() else inputs.real_dtype
        return torch.zeros_like(tensor, dtype=dtype)

    if z is None:
        dz = None
    elif dz is None:
        dz = torch.empty_like(z)
    grads = Grads(
        torch.empty_like(u),
        torch.empty_like(delta),
        zeros(A),
        zeros(B),
        zeros(C),
        zeros(D),
        zeros(delta_bias),
        dz,
        torch.empty_like(z) if z is not None and recompute_out_z else None,
    )
    if u.numel() > 0:
        _backend(inputs)[1](inputs, dout, x, grads)
    return (
        grads.du,
        grads.ddelta,
        grads.dA.to(A.dtype),
        grads.dB.to(B.dtype),
        grads.dC.to(C.dtype),
        None if grads.dD is None or D is None else grads.dD.to(D.dtype),
        None
        if grads.ddelta_bias is None or delta_bias is None
        else grads.ddelta_bias.to(delta_bias.dtype),
        grads.dz,
        grads.out_z,
    )
