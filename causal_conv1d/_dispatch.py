"""How operators are called: with torch's autograd, or quickly below it.

The operators' kernels for autograd are Python, ``_autograd.py``, and cost some microseconds a call
even where nothing is differentiated. Calls that need none of it leave out autograd's dispatch key.
Everything else of torch, as dispatch modes, the profiler and tensor subclasses, sees them all the
same.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_C = torch._C
_CPU, _CUDA = _C.DispatchKey.AutogradCPU, _C.DispatchKey.AutogradCUDA
_is_excluded = _C._dispatch_tls_is_dispatch_key_excluded
_set_excluded = _C._dispatch_tls_set_dispatch_key_excluded

functorch_is_active = _C._are_functorch_transforms_active
_is_compiling, _Tensor, _tracer = torch.compiler.is_compiling, torch.Tensor, _C._get_tracing_state


def below_autograd(operator, x, *args):
    """operator(x, *args) without autograd, where torch.func is not at work."""
    key = _CUDA if x.is_cuda else _CPU
    if _is_excluded(key):
        return operator(x, *args)
    _set_excluded(key, True)
    try:
        return operator(x, *args)
    finally:
        _set_excluded(key, False)


def is_transformed(x) -> bool:
    """Whether x is no plain tensor, or torch.func, forward mode, torch.compile, torch.export or
    torch.jit.trace is at work: they must see the operators themselves, with autograd."""
    return (
        _is_compiling()
        or type(x) is not _Tensor
        or functorch_is_active()
        or forward_ad._current_level >= 0
        or _tracer() is not None
    )
