"""The convolution and the selective scan of sequences that lie in shards on several ranks.

On torch.distributed, with NCCL or Gloo. ``megatron`` and ``fla`` have the call forms of
Megatron-LM and of flash-linear-attention.
"""

from .convolution import causal_conv1d_cp
from .groups import gather_lengths
from .scan import selective_scan_cp

__all__ = ["causal_conv1d_cp", "gather_lengths", "selective_scan_cp"]
