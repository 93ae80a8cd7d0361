"""The selective scan of Mamba in plain PyTorch and Triton, forward and backward.

``selective_scan_cuda`` and its relatives (``_core``, ``_oflex``, ``_ndstate``, ``_nrow``), which
mamba_ssm and VMamba's descendants import, are thin modules over :func:`selective_scan_fwd` and
:func:`selective_scan_bwd`. With u, delta and z (batch, dim, seqlen), A (dim, dstate), state h:

    dt[b,d,t] = delta[b,d,t] + delta_bias[d], through softplus with delta_softplus
    h[b,d,n,t] = exp(dt[b,d,t] A[d,n]) h[b,d,n,t-1] + dt[b,d,t] B[b,g,n,t] u[b,d,t]
    out[b,d,t] = sum over n of C[b,g,n,t] h[b,d,n,t] + D[d] u[b,d,t]
    out_z[b,d,t] = out[b,d,t] z[b,d,t] sigmoid(z[b,d,t])

g = d // (dim / groups). B and C may each be (dim, dstate) instead, constant in time. With a complex
A they are complex too (in time, as pairs of real numbers along their last axis), and the sum over n
is twice its real part. Arithmetic is in float32, in float64 where u is. The backward is
deterministic.

Memory beyond inputs and results is bounded in seqlen: see ``plain.py`` and ``triton_backward.py``.
"""

from .arguments import CHUNK
from .interface import selective_scan_bwd, selective_scan_fwd

__all__ = ["CHUNK", "selective_scan_bwd", "selective_scan_fwd"]
