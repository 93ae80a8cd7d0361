"""Names that torch.distributed lacks in a torch built without it, as NVIDIA's for JetPack may be.

mamba_ssm takes them when it is imported, although it needs none of them on one device.
"""

from __future__ import annotations

import os

import torch.distributed

COLLECTIVES = (
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "_all_gather_base",
    "_reduce_scatter_base",
)


def _refusal(name):
    def refuse(*args, **kwargs):
        raise RuntimeError(f"torch.distributed.{name}: this torch is built without distributed")

    refuse.__name__ = name
    return refuse


def _never_initialized() -> bool:
    return False


def add_missing_names() -> None:
    """Adds to a torch.distributed that is not available the names it lacks: collectives that raise
    RuntimeError when called, and an ``is_initialized`` that returns False.

    A torch with distributed is left alone, as is everything with
    ``CAUSAL_CONV1D_DISTRIBUTED_STUBS=0`` in the environment.
    """
    distributed = torch.distributed
    if distributed.is_available() or os.environ.get("CAUSAL_CONV1D_DISTRIBUTED_STUBS") == "0":
        return
    stubs = {name: _refusal(name) for name in COLLECTIVES}
    stubs["is_initialized"] = _never_initialized
    for name, stub in stubs.items():
        if not hasattr(distributed, name):
            setattr(distributed, name, stub)
