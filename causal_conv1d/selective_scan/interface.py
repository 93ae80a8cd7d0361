"""The scan as mamba_ssm's compiled extensions have it; the modules selective_scan_cuda call it."""

from __future__ import annotations

from typing import Any

import torch

from .._dispatch import call_without_grad
from .._ops import ops as _ops
from . import plain
from .arguments import Inputs, check, empty_grads
from .operators import MOST_STATES, sum_dtype


def takes_plain(A: torch.Tensor) -> bool:
    """Whether the kernels do not take a scan with A."""
    return A.is_complex() or (A.dim() == 2 and A.shape[1] > MOST_STATES)


def _widened(u: torch.Tensor, tensors: Any) -> Any:
    """The others in float64 where u is: the kernels take all or none."""
    if u.dtype != torch.float64:
        return tensors
    return tuple(None if t is None else t.double() for t in tensors)


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
    is (batch, dim, 1, 2 * dstate), and ``x[:, :, -1, 1::2]`` the last state; the rest is 0.
    """
    out = torch.empty_like(delta, dtype=out_dtype or u.dtype)
    out_z = None if z is None else torch.empty_like(z)
    # With z the kernels call the gated result out.
    gated, ungated = (out, None) if z is None else (out_z, out)
    dtype = sum_dtype(u)
    is_plain = takes_plain(A)
    if is_plain:
        inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, None, None, bool(delta_softplus))
        check("selective_scan fwd", inputs)
        dtype = inputs.dtype
    x = torch.zeros((*u.shape[:2], 1, 2 * A.shape[-1]), dtype=dtype, device=u.device)
    last_state = x[:, :, 0, 1::2]
    if is_plain:
        plain.forward(inputs, gated, ungated, last_state)
    else:
        others = _widened(u, (delta, A, B, C, D, z, delta_bias))
        call_without_grad(
            _ops.scan_forward_out,
            u,
            *others,
            None,
            None,
            bool(delta_softplus),
            gated,
            ungated,
            last_state,
        )
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

    dout is the gradient of out_z, of out without z. x, the forward's, is not needed and may be
    None. dz, if given, is written in place, whatever its strides. out_z is returned with
    ``recompute_out_z`` and z. Each gradient has the dtype of its tensor.
    """
    if x is not None and (x.dim() != 4 or x.shape[1] != u.shape[1] or x.shape[3] != 2 * A.shape[1]):
        want = (*u.shape[:2], 1, 2 * A.shape[1])
        raise ValueError(f"selective_scan bwd: x must be {want}, got {tuple(x.shape)}")
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    with_out = z is not None and recompute_out_z
    if z is None:
        dz = None
    elif dz is None:
        dz = torch.empty_like(z)
    gradients = _plain_gradients if takes_plain(A) else _gradients
    *found, dz, ddelta_bias, out_z = gradients(tensors, bool(delta_softplus), dout, dz, with_out)
    return (*found, ddelta_bias, dz, out_z)


def _plain_gradients(tensors: Any, delta_softplus: bool, dout: Any, dz: Any, with_out: bool) -> Any:
    """Of the tensors in their order, and out once more; z's is dz."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, None, None, delta_softplus)
    check("selective_scan bwd", inputs, dout, dz)
    grads = empty_grads(inputs, with_out)
    grads.dz = dz
    plain.backward(inputs, dout, None, grads)
    found = (grads.du, grads.ddelta, grads.dA, grads.dB, grads.dC, grads.dD, dz, grads.ddelta_bias)
    for gradient, tensor in zip(found, tensors, strict=True):
        yield gradient if gradient is None or gradient is dz else gradient.to(tensor.dtype)
    yield grads.out


def _gradients(tensors: Any, delta_softplus: bool, dout: Any, dz: Any, with_out: bool) -> Any:
    """As _plain_gradients."""
    u, *others = tensors
    *first, _, delta_bias = (None if t is None else torch.empty_like(t) for t in tensors)
    found = [*first, dz, delta_bias, torch.empty_like(u) if with_out else None]
    written = _widened(u, found)
    call_without_grad(
        _ops.scan_backward_out,
        u,
        *_widened(u, others),
        None,
        None,
        delta_softplus,
        *_widened(u, (dout, None)),
        *written[:8],
        None,
        written[8],
    )
    for target, result in zip(found, written, strict=True):
        if target is not result:
            target.copy_(result)
    return found
