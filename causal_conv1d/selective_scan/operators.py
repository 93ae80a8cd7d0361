"""The selective scan's operators, over three operations that write what they are given.

As ``_operators.py`` has the convolution's. The arguments are those of ``csrc/selective_scan.h`` in
its order, the flag after the inputs.
"""

from __future__ import annotations

import torch

# The most states that the kernels take.
MOST_STATES = 256
# How many of an operator's first arguments are the inputs of a scan, with delta_softplus; and how
# many of them have gradients, which come in the same order.
INPUTS, GRADIENTS = 11, 9


# The dimensions of state_update's tensors, and the one of heads, which may be left out.
HEADS = {
    "state": (4, 1),
    "x": (3, 1),
    "dt": (3, 1),
    "A": (3, 0),
    "B": (3, 1),
    "C": (3, 1),
    "D": (2, 0),
    "z": (3, 1),
    "dt_bias": (2, 0),
    "out": (3, 1),
}


def with_heads(name, tensor):
    """A tensor of state_update with its dimension of heads."""
    dims, place = HEADS.get(name, (0, 0))
    if tensor is None or tensor.dim() != dims - 1:
        return tensor
    return tensor.unsqueeze(place)


def sum_dtype(u):
    """In which states are kept and sums are formed."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def sequences(u, cu_seqlens):
    return u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def empty_last_states(u, A, cu_seqlens):
    """The states after the last step, or None if shapes are wrong, which will be told."""
    if u.dim() != 3 or A.dim() != 2 or (cu_seqlens is not None and cu_seqlens.dim() != 1):
        return None
    shape = (sequences(u, cu_seqlens), u.shape[1], A.shape[1])
    return u.new_empty(shape, dtype=sum_dtype(u))


def is_needed(tensor, needed, i) -> bool:
    """Whether bit i of needed asks for the gradient of a tensor that is there."""
    return tensor is not None and bool(needed >> i & 1)


def over(operations: dict) -> dict:
    """The operators by name, over the operations by name."""

    def scan_forward(*args):
        *inputs, need_last_states = args
        u, A, cu_seqlens = inputs[0], inputs[2], inputs[9]
        out = torch.empty_like(u)
        last_states = empty_last_states(u, A, cu_seqlens) if need_last_states else None
        operations["scan_forward"](*inputs, out, None, last_states)
        return out, u.new_empty(0) if last_states is None else last_states

    def scan_backward(*args):
        *args, needed = args
        found = [
            torch.empty_like(tensor) if is_needed(tensor, needed, i) else None
            for i, tensor in enumerate(args[:GRADIENTS])
        ]
        operations["scan_backward"](*args, *found, None)
        return tuple(args[0].new_empty(0) if tensor is None else tensor for tensor in found)

    def state_update(*args):
        *args, dt_softplus = args
        out = torch.empty_like(args[1])
        operations["state_update"](*args, out, dt_softplus)
        return out

    return {
        "scan_forward": scan_forward,
        "scan_forward_out": operations["scan_forward"],
        "scan_backward": scan_backward,
        "scan_backward_out": operations["scan_backward"],
        "state_update": state_update,
        "state_update_out": operations["state_update"],
    }
