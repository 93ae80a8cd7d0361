"""``selective_scan_fn`` and ``selective_state_update``, with mamba_ssm's names and signatures."""

from __future__ import annotations

from typing import Any

import torch

from .. import (
    _library,  # noqa: F401  registers the operators
)
from .._arguments import check_tensors, refuse_to_write
from .._dispatch import is_transformed
from .._ops import ops as _ops
from ..reference import selective_state_update_ref
from . import fake
from .autograd import ScanForward, StateUpdate, state_update_of_graph
from .interface import takes_plain
from .operators import MOST_STATES
from .plain_function import PlainScan

__all__ = ["selective_scan_fn", "selective_state_update"]

# The operators without a Python function around them.
_scan_forward = _ops.scan_forward.plain._op
_state_update = _ops.state_update.plain._op


def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_states: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Any:
    """The selective scan of Mamba; differentiable.

    .. code-block:: text

        dt[b,d,t]  = delta[b,d,t] + delta_bias[d], through log(1 + exp(.)) with delta_softplus
        h[b,d,n,t] = exp(dt[b,d,t] A[d,n]) h[b,d,n,t-1] + dt[b,d,t] B[b,g,n,t] u[b,d,t]
        y[b,d,t]   = sum over n of C[b,g,n,t] h[b,d,n,t], + D[d] u[b,d,t]
        out[b,d,t] = y[b,d,t] z[b,d,t] sigmoid(z[b,d,t]), or y without z

    with g = d // (dim / groups). States and sums are float32, float64 where u is. Gradients are
    deterministic, and the inputs alone are saved for them. Follows mamba_ssm's 2.3.2, whose options
    end with ``return_last_state``.

    Args:
        u: (batch, dim, seqlen), on the CPU or a CUDA device, with any strides. float32, float16 or
            bfloat16, each tensor on its own; or all tensors float64.
        delta: (batch, dim, seqlen).
        A: (dim, dstate), dstate at most 256; a complex or larger A takes a slower path in plain
            PyTorch.
        B: (batch, dstate, seqlen), (batch, groups, dstate, seqlen), or (dim, dstate) if it is
            constant in time. With a complex A: complex if constant, else with pairs of real
            numbers along seqlen.
        C: as B.
        D: (dim,) or None.
        z: (batch, dim, seqlen) or None.
        delta_bias: (dim,) or None.
        delta_softplus: whether dt goes through softplus.
        return_last_state: also return the states after the last step.
        initial_states: (batch, dim, dstate) or None: h before the first step, 0 if not given.
        cu_seqlens: (sequences + 1,) int32 or int64, or None: boundaries of sequences that lie one
            after the other in a batch of 1, ascending from 0 to seqlen. Each begins with its own
            row of initial_states, (sequences, dim, dstate).

    Returns:
        out, (batch, dim, seqlen) in u's dtype and layout; with ``return_last_state`` the tuple
        (out, last_state), the latter (batch or sequences, dim, dstate) in float32, or float64
        where u is. It is differentiable, unlike mamba_ssm's.

    Raises:
        RuntimeError: an argument of wrong shape, dtype or device; the message names it.
        TypeError: an argument that is no tensor.

    Example::

        >>> u, delta = torch.randn(2, 64, 100), torch.rand(2, 64, 100)
        >>> A, B, C = -torch.rand(64, 16), torch.randn(2, 16, 100), torch.randn(2, 16, 100)
        >>> selective_scan_fn(u, delta, A, B, C).shape
        torch.Size([2, 64, 100])
    """
    try:
        if B.dim() == 3:
            B = B.unsqueeze(1)
        if C.dim() == 3:
            C = C.unsqueeze(1)
        tensors = (u, delta, A, B, C, D, z, delta_bias, initial_states)
        args = (*tensors, cu_seqlens, bool(delta_softplus), bool(return_last_state))
        if takes_plain(A):
            found = PlainScan.apply(*args)
        elif is_transformed(u):
            _check_scan_tensors(u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens)
            found = _ops.scan_forward.default(*args)
        elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            found = ScanForward.apply(_scan_forward, *args)  # type: ignore[attr-defined]
        else:
            found = _scan_forward(*args)
    except Exception:
        _check_scan_tensors(u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens)
        raise
    return found if return_last_state else found[0]


def _check_scan_tensors(u, delta, A, B, C, D, z, delta_bias, initial_states, cu_seqlens):
    required = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    optional = {
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_states": initial_states,
        "cu_seqlens": cu_seqlens,
    }
    check_tensors("selective_scan_fn", required, optional)


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token of the selective scan, whose state takes it in.

    .. code-block:: text

        dt    = dt + dt_bias, through log(1 + exp(.)) with dt_softplus
        state = exp(dt A) state + dt B x
        out   = sum over dstate of C state, + D x, times z sigmoid(z) with z

    Follows mamba_ssm's 2.3.2, and takes CPU tensors too. It has no derivative: a gradient that
    reaches it raises, as do forward mode and a leaf that requires grad as state.

    Args:
        state: (batch, dim, dstate) or (batch, heads, dim, dstate), changed in place; any strides,
            and a dtype of its own.
        x: (batch, dim) or (batch, heads, dim).
        dt: x's shape.
        A: (dim, dstate) or (heads, dim, dstate).
        B: (batch, dstate) or (batch, groups, dstate), of groups of neighbouring heads.
        C: as B.
        D: (dim,) or (heads, dim), or None.
        z: x's shape, or None.
        dt_bias: (dim,) or (heads, dim), or None.
        dt_softplus: whether dt goes through softplus.
        state_batch_indices: (batch,) int32 or int64, or None: the row of state of each batch
            entry, no two the same; state may then have any number of rows. A negative index is
            padding: the output is 0 and no state is touched. An index past the last row is an error
            on the CPU; elsewhere the output is NaN and no state is touched.

    Returns:
        out, of x's shape and dtype.

    Raises:
        RuntimeError: an argument of wrong shape, dtype or device; the message names it.
        TypeError: an argument that is no tensor.
    """
    try:
        args = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, bool(dt_softplus))
        operator = _state_update
        if state.dim() > 2 and state.shape[-1] > MOST_STATES:
            operator = _update_in_torch
        elif is_transformed(x):
            return _ops.state_update.default(*args)
        if torch.is_grad_enabled():
            if state.requires_grad:
                if state.is_leaf:
                    refuse_to_write("selective_state_update", state=state)
                return state_update_of_graph(operator, *args)
            if any(t is not None and t.requires_grad for t in args[1:9]):
                return StateUpdate.apply(operator, *args)  # type: ignore[attr-defined]
        return operator(*args)
    except Exception:
        required = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C}
        optional = {"D": D, "z": z, "dt_bias": dt_bias, "state_batch_indices": state_batch_indices}
        check_tensors("selective_state_update", required, optional)
        raise


@torch.no_grad()
def _update_in_torch(*args):
    """state_update of more states than the kernels take."""
    *tensors, indices, dt_softplus = args
    names = "state x dt A B C D z dt_bias state_indices".split()
    fake.check("state_update", dict(zip(names, (*tensors, indices), strict=True)), any_dstate=True)
    if indices is not None and indices.device.type == "cpu":
        rows, count = [row for row in indices.tolist() if row >= 0], len(tensors[0])
        if max(rows, default=-1) >= count or len(set(rows)) < len(rows):
            text = f"must name each of state's {count} rows at most once, got {indices.tolist()}"
            raise RuntimeError(f"selective_state_update: state_batch_indices {text}")
    return selective_state_update_ref(*tensors, dt_softplus, indices)
