"""The selective scan as a recurrence, a step at a time, in float64 and differentiable."""

import torch
import torch.nn.functional as F


def selective_scan_reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False
):
    """(out, out_z, last_state), out_z None without z; shapes as in causal_conv1d.selective_scan."""
    dim = u.shape[1]

    def over_time(projection):
        """B or C as (batch or 1, dim, dstate, seqlen or 1)."""
        if projection.dim() == 2:
            return projection[None, :, :, None]
        if A.is_complex():
            projection = torch.view_as_complex(projection.unflatten(-1, (-1, 2)).contiguous())
        return projection.repeat_interleave(dim // projection.shape[1], dim=1)

    def at(projection, t):
        return projection[..., t if projection.shape[-1] > 1 else 0]

    B, C = over_time(B), over_time(C)
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    state = torch.zeros(*u.shape[:2], A.shape[1], dtype=A.dtype, device=u.device)
    outs = []
    for t in range(u.shape[2]):
        now = dt[:, :, t, None]
        state = torch.exp(now * A) * state + now * at(B, t) * u[:, :, t, None]
        y = (at(C, t) * state).sum(-1)
        y = 2 * y.real if y.is_complex() else y
        outs.append(y if D is None else y + D * u[:, :, t])
    out = torch.stack(outs, dim=2)
    return out, None if z is None else out * z * torch.sigmoid(z), state
