"""Out as several tensors along the channels, each dense: q, k and v of one convolution.

The forward writes each of them from a part of x, the backward a part of dx from the gradient of
each, so nothing is copied. Their operators are in Python, over those with options.
"""

from __future__ import annotations

import itertools

import torch
from torch.autograd.function import _SingleLevelFunction

from . import _fake, _options_plain, _vmap
from ._autograd import _Below, _record, has_tangent, needs_grad
from ._dispatch import functorch_is_active
from ._operators import argument_names
from ._ops import NAMESPACE, add_op_namespace_prefix
from ._ops import ops as _ops
from ._options import TENSORS, empty_gradients, empty_states
from ._options_autograd import RESIDUAL, as_gradients, requested
from ._torch_ops import ANY_DEVICE

_SCHEMAS = (
    "split_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, "
    "Tensor? initial_states, Tensor? pre_gate, Tensor? post_gate, Tensor? residual, int dilation, "
    "bool return_final_states, bool silu, int[] split_sizes) -> Tensor[]",
    "split_backward(Tensor x, Tensor weight, Tensor? bias, Tensor[] douts, Tensor? seq_idx, "
    "Tensor? cu_seqlens, Tensor? initial_states, Tensor? dfinal_states, Tensor? pre_gate, "
    "Tensor? post_gate, int dilation, bool residual_is_x, int needed, bool silu) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states, Tensor dpre_gate, "
    "Tensor dpost_gate)",
)
# The arguments that have channels first, and those that have them second; the others have none.
_PARAMETERS = ("weight", "bias", "dweight", "dbias")
_WHOLE = ("seq_idx", "cu_seqlens")


def _ranges(sizes):
    bounds = [0, *itertools.accumulate(sizes)]
    return list(itertools.pairwise(bounds))


def _part(name, tensor, start, stop):
    """A tensor's channels from start to stop."""
    if tensor is None or name in _WHOLE:
        return tensor
    return tensor[start:stop] if name in _PARAMETERS else tensor[:, start:stop]


def _check_forward(tensors, dilation, split_sizes):
    names = argument_names("conv_forward")[:TENSORS]
    _fake.check("conv_forward", dict(zip(names, tensors, strict=True)), dilation)
    dim = tensors[0].shape[1]
    if any(size < 0 for size in split_sizes) or sum(split_sizes) != dim:
        raise RuntimeError(
            f"causal_conv1d_fn: split_sizes must be sizes >= 0 whose sum is dim = {dim}, got "
            f"{list(split_sizes)}"
        )


def _empty_forward(tensors, dilation, return_final_states, split_sizes):
    """Room for the parts of out and, if they are wanted, the final states."""
    x, weight, cu_seqlens = tensors[0], tensors[1], tensors[4]
    outs = [torch.empty_like(x[:, start:stop]) for start, stop in _ranges(split_sizes)]
    states = empty_states(x, weight, cu_seqlens, dilation) if return_final_states else None
    return outs, states


def _fake_forward(*args):
    *tensors, dilation, return_final_states, _, split_sizes = args
    _check_forward(tensors, dilation, split_sizes)
    outs, states = _empty_forward(tensors, dilation, return_final_states, split_sizes)
    return outs if states is None else [*outs, states]


def forward(*args):
    """split_forward: the parts of out, and then the final states if they are wanted."""
    *tensors, dilation, return_final_states, silu, split_sizes = args
    _check_forward(tensors, dilation, split_sizes)
    outs, states = _empty_forward(tensors, dilation, return_final_states, split_sizes)
    names = argument_names("conv_forward")
    for out, (start, stop) in zip(outs, _ranges(split_sizes), strict=True):
        parts = [_part(n, t, start, stop) for n, t in zip(names, tensors, strict=False)]
        states_out = _part("final_states_out", states, start, stop)
        _ops.conv_forward_out.plain(*parts, out, states_out, dilation, silu)
    return outs if states is None else [*outs, states]


def _filled(found, x):
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in found)


def _backward(*args):
    *tensors, dilation, residual_is_x, _, silu = args
    douts, found = tensors[3], empty_gradients(args)
    names = argument_names("conv_backward")
    for dout, (start, stop) in zip(douts, _ranges([d.shape[1] for d in douts]), strict=True):
        parts = []
        for name, tensor in zip(names, (*tensors, *found), strict=False):
            parts.append(dout if tensor is douts else _part(name, tensor, start, stop))
        _ops.conv_backward_out.plain(*parts, dilation, residual_is_x, silu)
    return _filled(found, tensors[0])


def _fake_backward(*args):
    return _filled(empty_gradients(args), args[0])


def _backward_of_whole(*args):
    """split_backward by the operator of a whole dout, which has derivatives."""
    return _ops.conv_backward.default(*args[:3], torch.cat(args[3], 1), *args[4:])


class SplitForward(_SingleLevelFunction):
    """split_forward, which operator computes, as a node of a graph."""

    @staticmethod
    def forward(ctx, operator, *args):
        *tensors, ctx.dilation, ctx.with_states, ctx.silu, ctx.sizes = args
        ctx.residual_is_x = tensors[RESIDUAL] is tensors[0]
        ctx.save_for_backward(*tensors[:RESIDUAL])
        ctx.set_materialize_grads(False)
        return tuple(operator(*args))

    @staticmethod
    def backward(ctx, *above):
        gradients = [None] * (TENSORS - 1)
        x, weight, bias, *ids, states, pre_gate, post_gate = ctx.saved_tensors
        dfinal_states = above[-1] if ctx.with_states else None
        douts = [
            torch.zeros_like(x[:, start:stop]) if dout is None else dout
            for dout, (start, stop) in zip(above, _ranges(ctx.sizes), strict=False)
        ]
        needs = ctx.needs_input_grad[1 : 1 + TENSORS]
        wanted, needed = requested(needs)
        if wanted:
            tensors = (*ids, states, dfinal_states, pre_gate, post_gate)
            args = (x, weight, bias, douts, *tensors, ctx.dilation, ctx.residual_is_x)
            operator = _ops.split_backward.default
            if torch.is_grad_enabled() or functorch_is_active():
                operator = _backward_of_whole
            gradients = as_gradients(operator(*args, needed, ctx.silu), wanted)
        dresidual = None
        if needs[RESIDUAL] and not ctx.residual_is_x:
            dresidual = torch.cat(douts, 1)
        return (None, *gradients, dresidual, None, None, None, None)


def _forward_kernel(*args):
    inputs = [tensor for tensor in args[:TENSORS] if tensor is not None]
    if has_tangent(*inputs):
        _check_forward(args[:TENSORS], args[TENSORS], args[-1])
        out, states = _options_plain.conv_forward(*args[:-1])
        outs = [part.clone() for part in out.split(list(args[-1]), 1)]
        return [*outs, states] if args[TENSORS + 1] else outs
    operator = _Below(_ops.split_forward.default)
    if needs_grad(*inputs):
        return list(_record(SplitForward, operator, *args))
    return operator(*args)


def _backward_kernel(*args):
    inputs = [*args[:3], *args[3], *args[4:10]]
    inputs = [tensor for tensor in inputs if tensor is not None]
    if has_tangent(*inputs) or needs_grad(*inputs):
        return _backward_of_whole(*args)
    return _Below(_ops.split_backward.default)(*args)


def _mapped_forward(info, in_dims, *args):
    *args, split_sizes = args
    (out, states), places = _vmap.conv_forward(info, in_dims[:-1], *args)
    outs = out.movedim(places[0], 0).split(list(split_sizes), 2)
    found = [part.clone() for part in outs]
    dims = [0] * len(found)
    if args[TENSORS + 1]:
        found, dims = [*found, states], [*dims, places[1]]
    return found, dims


def _mapped_backward(info, in_dims, *args):
    raise RuntimeError("causal_conv1d_bwd: vmap of split_backward: use conv_backward")


def register(loaded) -> None:
    loaded.define(_SCHEMAS)
    loaded.register({"split_forward": forward, "split_backward": _backward}, ANY_DEVICE)
    kernels = {"split_forward": _forward_kernel, "split_backward": _backward_kernel}
    loaded.register(kernels, "Autograd")
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, fake, mapped in (
        ("split_forward", _fake_forward, _mapped_forward),
        ("split_backward", _fake_backward, _mapped_backward),
    ):
        full = add_op_namespace_prefix(name)
        torch.library.register_fake(full, fake, lib=library)
        torch.library.register_vmap(full, mapped, lib=library)
    loaded.registrations.append(library)
