"""The derivatives of the operators with options, as ``_autograd.py`` has those without.

Reverse mode runs on the compiled kernels and saves the inputs alone. Gradients of gradients and
forward mode go through ``_options_plain.py``.
"""

from __future__ import annotations

import torch
from torch.autograd.function import _SingleLevelFunction

from . import _fake, _options_plain
from ._autograd import _Below, _negated_kernel, _record, _writing_kernel, has_tangent, needs_grad
from ._dispatch import is_transformed
from ._operators import argument_names
from ._ops import ops as _ops
from ._options import TENSORS

_backward = _ops.conv_backward.plain._op  # without a Python function around it
RESIDUAL = 8  # its place among the arguments of conv_forward


def requested(needs_input_grad) -> tuple[list[int], int]:
    """The results of conv_backward that are wanted for arguments of conv_forward, and needed."""
    inputs = (0, 1, 2, 5, 6, 7)  # in the order of the results
    wanted = [i for i, place in enumerate(inputs) if needs_input_grad[place]]
    return wanted, sum(1 << i for i in wanted)


def as_gradients(found, wanted) -> list:
    """conv_backward's results as gradients of conv_forward's tensors, without the residual's."""
    dx, dweight, dbias, dstates, dpre_gate, dpost_gate = (
        result if i in wanted else None for i, result in enumerate(found)
    )
    return [dx, dweight, dbias, None, None, dstates, dpre_gate, dpost_gate]


class ConvForward(_SingleLevelFunction):
    """conv_forward, which operator computes, as a node of a graph."""

    @staticmethod
    def forward(ctx, operator, *args):
        *tensors, ctx.dilation, need_states, ctx.silu = args
        ctx.residual_is_x = tensors[RESIDUAL] is tensors[0]
        ctx.save_for_backward(*tensors[:RESIDUAL])
        ctx.set_materialize_grads(False)
        out, final_states = operator(*args)
        if not need_states:
            ctx.mark_non_differentiable(final_states)
        return out, final_states

    @staticmethod
    def backward(ctx, dout, dfinal_states):
        gradients = [None] * (TENSORS - 1)
        needs = ctx.needs_input_grad[1 : 1 + TENSORS]
        wanted, needed = requested(needs)
        if wanted and (dout is not None or dfinal_states is not None):
            x, weight, bias, *ids, states, pre_gate, post_gate = ctx.saved_tensors
            tensors = (*ids, states, dfinal_states, pre_gate, post_gate)
            above = torch.zeros_like(x) if dout is None else dout
            args = (x, weight, bias, above, *tensors, ctx.dilation, ctx.residual_is_x)
            # Gradients are recorded here only if the caller asked for a graph of the backward.
            operator = _backward
            if torch.is_grad_enabled() or is_transformed(x):
                operator = _ops.conv_backward.default
            gradients = as_gradients(operator(*args, needed, ctx.silu), wanted)
        dresidual = dout if needs[RESIDUAL] and not ctx.residual_is_x else None
        return (None, *gradients, dresidual, None, None, None)


class ConvBackward(_SingleLevelFunction):
    """conv_backward, which operator computes, as a node of a graph."""

    @staticmethod
    def forward(ctx, operator, *args):
        *tensors, dilation, residual_is_x, needed, silu = args
        ctx.save_for_backward(*tensors)
        ctx.rest = (dilation, residual_is_x, needed, silu)
        ctx.set_materialize_grads(False)
        results = operator(*args)
        unneeded = [r for i, r in enumerate(results) if i > 0 and not needed >> i & 1]
        ctx.mark_non_differentiable(*unneeded)
        return results

    @staticmethod
    def backward(ctx, *above):
        if all(gradient is None for gradient in above):
            return (None,) * 15
        args = (*ctx.saved_tensors, *ctx.rest)
        found = _options_plain.backward_of_backward(args, above)
        return (None, *found, None, None, None, None)


def _check(operation, args, count) -> None:
    names = argument_names(operation)[:count]
    _fake.check(operation, dict(zip(names, args, strict=False)), args[count])


def _forward_kernel(*args):
    inputs = [tensor for tensor in args[:TENSORS] if tensor is not None]
    if has_tangent(*inputs):
        _check("conv_forward", args, TENSORS)
        return _options_plain.conv_forward(*args)
    operator = _Below(_ops.conv_forward.default)
    if needs_grad(*inputs):
        return _record(ConvForward, operator, *args)
    return operator(*args)


def _backward_kernel(*args):
    inputs = [tensor for tensor in args[:10] if tensor is not None]
    if has_tangent(*inputs):
        _check("conv_backward", args, 10)
        return _options_plain.conv_backward(*args)
    operator = _Below(_ops.conv_backward.default)
    if needs_grad(*inputs):
        return _record(ConvBackward, operator, *args)
    return operator(*args)


def register(loaded) -> None:
    kernels = {"conv_forward": _forward_kernel, "conv_backward": _backward_kernel}
    for operation in kernels.copy():
        operator = getattr(_ops, f"{operation}_out")
        kernels[f"{operation}_out"] = _writing_kernel(operation, operator.default)
        negated = {
            f"{operation}_out": _negated_kernel(operation, operator.default),
            f"{operation}_out.plain": _negated_kernel(operation, operator.plain),
        }
        loaded.register(negated, "Negative")
    loaded.register(kernels, "Autograd")
