"""Other implementations of the convolution on a GPU, and the reason for each that is missing."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

NAMES = ("F.conv1d + silu", "torch.compile", "FLA")
# Where FLA's functions are, the newest release first.
FLA_MODULES = ("fla.modules.causal_conv1d", "fla.modules.conv.triton.ops")


class Peer(NamedTuple):
    version: str
    forward: Callable  # (x, weight, bias, silu)
    backward: Callable | None = None  # (x, dout, weight, bias, silu)
    layout: str | None = None  # the only one that it takes
    packing: Callable | None = None  # keywords of both for cu_seqlens


def conv1d_and_silu(x, weight, bias, silu):
    dim, width = weight.shape
    z = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=dim)[..., : x.shape[2]]
    return F.silu(z) if silu else z


def shifted_products(x, weight, bias, silu):
    """The operation as torch.compile likes it: a pad and W multiply-adds, in one kernel."""
    width, seqlen = weight.shape[1], x.shape[2]
    padded = F.pad(x, (width - 1, 0))
    out = 0.0 if bias is None else bias[:, None].float()
    for k in range(width):
        out = out + weight[:, k, None].float() * padded[:, :, k : k + seqlen].float()
    return (F.silu(out) if silu else out).to(x.dtype)


def fla() -> Peer:
    """FLA's Triton kernels; ImportError says why they are missing."""
    reasons = []
    for name in FLA_MODULES:
        try:
            return fla_peer(name, importlib.import_module(name))
        except Exception as error:  # Triton without a driver raises RuntimeError
            reasons.append(f"{name}: {one_line(error)}")
    raise ImportError("; ".join(reasons))


def fla_peer(name, module):
    forward, backward = module.causal_conv1d_fwd, module.causal_conv1d_bwd

    def packing(cu_seqlens):
        """chunk_indices too, which it would compute with a synchronisation."""
        from fla.ops.utils import prepare_chunk_indices

        bounds = cu_seqlens.long()
        return {"cu_seqlens": bounds, "chunk_indices": prepare_chunk_indices(bounds, 64)}

    return Peer(
        f"{version('fla-core')}, {name}",
        lambda x, weight, bias, silu, **more: forward(
            x.mT, weight, bias, None, activation="silu" if silu else None, **more
        ),
        lambda x, dout, weight, bias, silu, **more: backward(
            x.mT, dout.mT, None, weight, bias, activation="silu" if silu else None, **more
        ),
        "last",
        packing,
    )


def version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@functools.cache
def find() -> tuple[dict[str, Peer], dict[str, str]]:
    """Peers by name, and why others are missing."""
    torch_version = f"torch {torch.__version__}"
    found = {
        "F.conv1d + silu": Peer(torch_version, conv1d_and_silu),
        "torch.compile": Peer(torch_version, torch.compile(shifted_products, dynamic=True)),
    }
    missing = {}
    try:
        found["FLA"] = fla()
    except ImportError as error:
        missing["FLA"] = str(error)
    return found, missing


def load_upstream(path):
    """Upstream's extension, which has a name that this library takes too."""
    loader = importlib.machinery.ExtensionFileLoader("causal_conv1d_cuda", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def described(wanted, upstream) -> dict[str, dict[str, str]]:
    """For the JSON: the version of each peer, or why it is missing."""
    found, missing = find() if wanted else ({}, {})
    report = {}
    for name in NAMES:
        if name not in wanted:
            report[name] = {"missing": "left out (--others, or --sms, which times none of them)"}
        elif name in found:
            report[name] = {"version": found[name].version}
        else:
            report[name] = {"missing": missing.get(name, "not found")}
    if upstream is None:
        report["upstream"] = {"missing": "no --upstream FILE was given"}
    else:
        report["upstream"] = {"version": f"the extension {upstream.__file__.rsplit('/', 1)[-1]}"}
    return report
