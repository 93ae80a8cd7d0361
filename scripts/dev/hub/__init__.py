"""The convolution and Mamba's selective scan, as a kernel of the Hugging Face Hub."""

from . import layers
from ._version import __version__
from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from .causal_conv1d_varlen import causal_conv1d_varlen_states
from .selective_scan.functions import selective_scan_fn, selective_state_update

__all__ = [
    "__version__",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "layers",
    "selective_scan_fn",
    "selective_state_update",
]
