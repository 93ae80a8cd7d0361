"""The convolution with options (packed sequences, gates, a residual, dilation): its operators.

As ``_operators.py`` has those without. The options are ``causal_conv1d_options`` of the C
interface. Calls without any stay with the operators without options.
"""

from __future__ import annotations

import torch

# How many of conv_forward's first arguments are its tensors; and of conv_backward's results, the
# argument that each is the gradient of.
TENSORS = 9
GRADIENT_OF = (0, 1, 2, 6, 8, 9)


def needs(needed, i) -> bool:
    """Whether conv_backward's i-th result is asked for."""
    return i == 0 or bool(needed >> i & 1)


def empty_states(x, weight, cu_seqlens, dilation):
    """Final states, or None if shapes are wrong, which will be told."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] < 1 or dilation < 1:
        return None
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rows < 0:
        return None
    return x.new_empty((rows, x.shape[1], (weight.shape[1] - 1) * dilation))


def empty_gradients(args):
    """Room for conv_backward's results, and None for those that are not needed."""
    x, weight, cu_seqlens, initial_states = args[0], args[1], args[5], args[6]
    dilation, needed = args[10], args[12]
    found = [
        torch.empty_like(args[of]) if needs(needed, i) and args[of] is not None else None
        for i, of in enumerate(GRADIENT_OF)
    ]
    if needs(needed, 3) and initial_states is None:
        found[3] = empty_states(x, weight, cu_seqlens, dilation)
    return found


def over(operations: dict) -> dict:
    """The operators by name, over the operations by name."""

    def conv_forward(*args):
        *tensors, dilation, return_final_states, silu = args
        x, weight, cu_seqlens = tensors[0], tensors[1], tensors[4]
        out = torch.empty_like(x)
        states = empty_states(x, weight, cu_seqlens, dilation) if return_final_states else None
        operations["conv_forward"](*tensors, out, states, dilation, silu)
        return out, x.new_empty(0) if states is None else states

    def conv_backward(*args):
        *tensors, dilation, residual_is_x, _, silu = args
        found = empty_gradients(args)
        operations["conv_backward"](*tensors, *found, dilation, residual_is_x, silu)
        return tuple(args[0].new_empty(0) if tensor is None else tensor for tensor in found)

    return {
        "conv_forward": conv_forward,
        "conv_forward_out": operations["conv_forward"],
        "conv_backward": conv_backward,
        "conv_backward_out": operations["conv_backward"],
    }
