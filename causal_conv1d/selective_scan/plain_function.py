"""The scans that the kernels do not take, of a complex A or more than 256 states, for autograd."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from . import plain
from .arguments import Inputs, check, empty_grads


class PlainScan(torch.autograd.Function):
    """``scan_forward`` in plain PyTorch, as a node of a graph."""

    @staticmethod
    def forward(*args):
        *inputs, need_last_states = args
        scan = Inputs(*inputs)
        check("selective_scan_fn", scan)
        out = torch.empty_like(scan.u)
        last_states = scan.u.new_empty(0)
        if need_last_states:
            last_states = scan.u.new_empty(scan.states_shape, dtype=scan.dtype)
        plain.forward(scan, out, None, last_states if need_last_states else None)
        return out, last_states

    @staticmethod
    def setup_context(ctx, inputs, output):
        *inputs, need_last_states = inputs
        ctx.save_for_backward(*inputs[:-1])
        ctx.delta_softplus = inputs[-1]
        ctx.set_materialize_grads(False)
        if not need_last_states:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlast_states):
        inputs = Inputs(*ctx.saved_tensors, ctx.delta_softplus)
        if dout is None:
            dout = torch.zeros_like(inputs.u)
        grads = empty_grads(inputs)
        plain.backward(inputs, dout, dlast_states, grads)
        found = (grads.du, grads.ddelta, grads.dA, grads.dB, grads.dC, grads.dD, grads.dz)
        found += (grads.ddelta_bias, grads.dinitial_states)
        gradients = (
            None if tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(found, ctx.saved_tensors, strict=False)
        )
        return (*gradients, None, None, None)
