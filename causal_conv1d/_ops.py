"""This copy's operators: ``torch.ops.causal_conv1d`` of the installed package.

A copy under another module name, as a kernel of the Hugging Face Hub has, registers operators of
its own under that name, so that both can be in one process.
"""

from __future__ import annotations

import torch

NAMESPACE = __package__.replace(".", "_")
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """An operator's full name."""
    return f"{NAMESPACE}::{name}"
