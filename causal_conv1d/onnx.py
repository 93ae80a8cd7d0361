"""Export for ONNX Runtime with this library's own kernels, see ``docs/onnxruntime.md``."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

__all__ = ["causal_conv_nodes"]

_domain: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "domain of CausalConvWithState", default=None
)


@contextlib.contextmanager
def causal_conv_nodes(domain: str = "causal_conv1d") -> Iterator[None]:
    """Within it ``torch.onnx.export`` gives a convolution as one node, CausalConvWithState.

    Without it the convolution becomes nodes of ONNX that any runtime has. They stay where the node
    cannot stand for the call: with ``seq_idx``, ``cache_seqlens`` or ``conv_state_indices``, and in
    float64.

    Args:
        domain: the node's. ``"causal_conv1d"`` needs ``libcausal_conv1d_onnxruntime.so``;
            ``"com.microsoft"`` is ONNX Runtime's own operator, with its own kernels.

    Example::

        with causal_conv1d.onnx.causal_conv_nodes():
            torch.onnx.export(model, inputs, "model.onnx", dynamo=True)
    """
    token = _domain.set(domain)
    try:
        yield
    finally:
        _domain.reset(token)
