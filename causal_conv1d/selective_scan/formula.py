"""The operators of a scan in torch's own differentiable operations, a step at a time.

Slow, and of as much memory as all states take; it serves where the kernels have no derivative:
forward mode, and gradients of gradients.
"""

from __future__ import annotations

import torch

from ..reference import selective_scan_ref
from .operators import is_needed, sum_dtype


def _wide(inputs, cu_seqlens, delta_softplus):
    """out in the type that sums have, and the last states."""
    *inputs, initial_states = inputs
    inputs = [inputs[0].to(sum_dtype(inputs[0])), *inputs[1:]]
    return selective_scan_ref(
        *inputs, delta_softplus, True, initial_states=initial_states, cu_seqlens=cu_seqlens
    )


def forward(*args):
    """scan_forward."""
    *inputs, cu_seqlens, delta_softplus, need_last_states = args
    u = inputs[0]
    out, last_states = _wide(inputs, cu_seqlens, delta_softplus)
    return out.to(u.dtype), last_states if need_last_states else u.new_empty(0)


def _over_given(function, tensors):
    """function of a list with None in it, as a function of those that are given; and those."""

    def run(*given):
        rest = iter(given)
        return function([None if tensor is None else next(rest) for tensor in tensors])

    return run, [tensor for tensor in tensors if tensor is not None]


def _gradients(inputs, cu_seqlens, delta_softplus, dout, dlast_states, needed):
    """Of the inputs that are needed, in their order."""
    wanted = [is_needed(tensor, needed, i) for i, tensor in enumerate(inputs)]

    def of_wanted(values):
        rest = iter(values)
        filled = [
            next(rest) if want else tensor for tensor, want in zip(inputs, wanted, strict=True)
        ]
        return _wide(filled, cu_seqlens, delta_softplus)

    given = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    if not given:
        return ()
    (out, last_states), pull = torch.func.vjp(lambda *values: of_wanted(values), *given)
    if dlast_states is None:
        dlast_states = torch.zeros_like(last_states)
    return pull((dout.to(out.dtype), dlast_states.to(last_states.dtype)))


def backward(*args):
    """scan_backward."""
    *inputs, cu_seqlens, delta_softplus, dout, dlast_states, needed = args
    found = iter(_gradients(inputs, cu_seqlens, delta_softplus, dout, dlast_states, needed))
    return tuple(
        next(found) if is_needed(tensor, needed, i) else inputs[0].new_empty(0)
        for i, tensor in enumerate(inputs)
    )


def backward_of_backward(args, above):
    """The gradients of sum(g * r) over the results r of :func:`backward`, g being those above.

    Returns:
        Those of the inputs, dout and dlast_states; None for what is not given.
    """
    *inputs, cu_seqlens, delta_softplus, dout, dlast_states, needed = args
    needed &= sum(1 << i for i, gradient in enumerate(above) if gradient is not None)
    tensors = [*inputs, dout, dlast_states]

    def gradients(filled):
        *rest, dout, dlast_states = filled
        return _gradients(rest, cu_seqlens, delta_softplus, dout, dlast_states, needed)

    function, given = _over_given(gradients, tensors)
    _, pull = torch.func.vjp(function, *given)
    kept = [g for i, g in enumerate(above) if is_needed(inputs[i], needed, i)]
    found = iter(pull(tuple(kept)))
    return [None if tensor is None else next(found) for tensor in tensors]
