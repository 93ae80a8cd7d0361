"""Depthwise causal 1-D convolution for state-space models, on any CPU and NVIDIA GPU.

A drop-in replacement of Dao-AILab's ``causal_conv1d``. The public functions are
:func:`causal_conv1d_fn`, :func:`causal_conv1d_update` and :func:`causal_conv1d_varlen_states`, and
Mamba's selective scan, :func:`selective_scan_fn` and :func:`selective_state_update`;
``python -m causal_conv1d`` checks the installation.
"""

import sys

from . import _installation
from ._version import __version__

try:
    _installation.require_torch()

    from . import _distributed, onnx
    from ._transformers import use_in_transformers
    from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
    from .causal_conv1d_varlen import causal_conv1d_varlen_fn, causal_conv1d_varlen_states
    from .modules import CausalConv1d, ShortConvolution
    from .selective_scan.functions import selective_scan_fn, selective_state_update
except ImportError as problem:
    if not _installation.doctor_is_starting():
        raise
    sys.exit(_installation.report(problem))

_distributed.add_missing_names()


def __getattr__(name: str):
    """What lies over several processes is imported when it is first asked for."""
    if name in ("causal_conv1d_cp", "selective_scan_cp"):
        from . import distributed

        return getattr(distributed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CausalConv1d",
    "ShortConvolution",
    "__version__",
    "causal_conv1d_cp",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_fn",
    "causal_conv1d_varlen_states",
    "onnx",
    "selective_scan_cp",
    "selective_scan_fn",
    "selective_state_update",
    "use_in_transformers",
]
