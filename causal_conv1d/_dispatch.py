"""Which overload of an operator is called.

``forward.default`` and the other operators of ``_ops.py`` have kernels for autograd, which are in
Python, ``_autograd.py``, and cost some microseconds per call even where nothing is differentiated.
The overload ``plain`` has none. It is called where nothing but values is wanted, of plain tensors.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

functorch_is_active = torch._C._are_functorch_transforms_active
_count_modes, _tracer = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_is_compiling, _Tensor = torch.compiler.is_compiling, torch.Tensor


def is_transformed(x) -> bool:
    """Whether x is of a subclass, or torch.func, forward mode, torch.compile, torch.export,
    torch.jit.trace or a dispatch mode is at work: they know the default overload."""
    return (
        _is_compiling()
        or type(x) is not _Tensor
        or functorch_is_active()
        or _count_modes() > 0
        or forward_ad._current_level >= 0
        or _tracer() is not None
    )


def call_without_grad(operator, x, *args):
    """An operator, whose results have no gradient."""
    if is_transformed(x):
        with torch.no_grad():
            return operator.default(x, *args)
    return operator.plain(x, *args)
