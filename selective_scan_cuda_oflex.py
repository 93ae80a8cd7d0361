"""VMamba's compiled extension ``selective_scan_cuda_oflex`` by name, for where it is not built.

As :mod:`selective_scan_cuda`, but without z, with out in float32 on request, and with a delta of
fewer channels: (batch, delta_dim, seqlen), delta_bias (delta_dim,), where delta_dim divides dim and
each channel of delta serves dim / delta_dim neighbours. ``nrows`` chooses a kernel there and
nothing here. A compiled extension beside this file wins.
"""

from __future__ import annotations

from typing import Any

import torch

from causal_conv1d.selective_scan import selective_scan_bwd, selective_scan_fwd

__all__ = ["bwd", "fwd"]


def _repeats(u, delta):
    """How many channels of u each channel of delta serves."""
    repeats = u.shape[1] // max(1, delta.shape[1])
    if delta.shape[1] * repeats != u.shape[1]:
        raise ValueError(f"delta must have channels that divide {u.shape[1]}, got {delta.shape[1]}")
    return repeats


def _spread(tensor, axis, repeats):
    if tensor is None or repeats == 1:
        return tensor
    return tensor.repeat_interleave(repeats, dim=axis)


def _collect(grad, axis, repeats):
    if grad is None or repeats == 1:
        return grad
    return grad.unflatten(axis, (-1, repeats)).sum(axis + 1)


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
    out_float: bool = False,
) -> list[torch.Tensor]:
    """[out, x]. out is float32 with out_float, else of u's dtype."""
    repeats = _repeats(u, delta)
    delta, delta_bias = _spread(delta, 1, repeats), _spread(delta_bias, 0, repeats)
    dtype = torch.float32 if out_float else u.dtype
    out, x, _ = selective_scan_fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus, dtype)
    return [out, x]


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
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias]; the last two None without D and delta_bias.

    dout may be float32 whatever u is.
    """
    repeats = _repeats(u, delta)
    delta, delta_bias = _spread(delta, 1, repeats), _spread(delta_bias, 0, repeats)
    grads = selective_scan_bwd(
        u, delta, A, B, C, D, None, delta_bias, dout, x, None, delta_softplus, False
    )
    du, ddelta, dA, dB, dC, dD, ddelta_bias = grads[:7]
    return [
        du,
        _collect(ddelta, 1, repeats),
        dA,
        dB,
        dC,
        dD,
        _collect(ddelta_bias, 0, repeats),
    ]
