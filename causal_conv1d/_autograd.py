"""The operators' derivatives: their kernels for torch's dispatch key Autograd.

Reverse mode runs on the compiled kernels and saves the inputs alone. The backward is an operator
with a derivative of its own, so gradients of gradients work, under ``torch.func`` too. Forward mode
goes through ``_plain.py``, where torch differentiates its own operations. ``update`` changes its
state in place and has no derivative: it raises an error where one is asked for.
"""

from __future__ import annotations

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import increment_version

from . import _fake, _plain
from ._arguments import refuse_to_write
from ._dispatch import functorch_is_active, is_transformed
from ._operators import CALLERS, argument_names, operation_of, written_names
from ._ops import NAMESPACE, add_op_namespace_prefix
from ._ops import ops as _ops
from ._torch_ops import ANY_DEVICE

_backward = _ops.backward.plain._op  # without a Python function around it


def has_tangent(*tensors) -> bool:
    """Whether forward mode is at work on one of the tensors; under torch.func: at any level."""
    if functorch_is_active():
        levels = torch._C._functorch.get_interpreter_stack()
        return any(level.key() == torch._C._functorch.TransformType.Jvp for level in levels)
    if forward_ad._current_level < 0:
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)


def needs_grad(*tensors) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


class _Below:
    """Calls an operator's kernel below autograd, with the grad modes of where this was made.

    torch switches these modes off in a Function's forward, but the outer levels of torch.func see
    what is called there and need them.
    """

    def __init__(self, operator):
        self.operator = operator
        self.grad = torch.is_grad_enabled()
        self.forward_grad = forward_ad._is_fwd_grad_enabled()

    def __call__(self, *args):
        with torch._C._AutoDispatchBelowAutograd():
            if not functorch_is_active():
                return self.operator(*args)
            with torch.set_grad_enabled(self.grad):
                with forward_ad._set_fwd_grad_enabled(self.forward_grad):
                    return self.operator(*args)


def _record(function, *args):
    """Calls a Function; under torch.func on its present level alone."""
    if not functorch_is_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return function.apply(*args)


class Forward(_SingleLevelFunction):
    """forward or forward_states, which operator computes, as a node of a graph."""

    @staticmethod
    def forward(ctx, operator, x, weight, bias, seq_idx, initial_states, silu):
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_states)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return operator(x, weight, bias, seq_idx, initial_states, silu)

    @staticmethod
    def backward(ctx, dout, dfinal_states=None):
        if dout is None and dfinal_states is None:
            return (None,) * 7
        x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(x)
        need_dweight, need_dbias, _, need_dstates = ctx.needs_input_grad[2:6]
        needs = (need_dweight, need_dbias, need_dstates)
        args = (x, weight, bias, dout, seq_idx, initial_states, dfinal_states, *needs, ctx.silu)
        # Gradients are recorded here only if the caller asked for a graph of the backward.
        operator = _backward
        if torch.is_grad_enabled() or is_transformed(x):
            operator = _ops.backward.default
        dx, dweight, dbias, dstates = operator(*args)
        return (
            None,
            dx,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            None,
            dstates if need_dstates else None,
            None,
        )


class Backward(_SingleLevelFunction):
    """backward, which operator computes, as a node of a graph."""

    @staticmethod
    def forward(ctx, operator, *args):
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, *needs, silu = args
        ctx.save_for_backward(x, weight, bias, dout, seq_idx, initial_states, dfinal_states)
        ctx.needs, ctx.silu = needs, silu
        ctx.set_materialize_grads(False)
        results = operator(*args)
        unneeded = [r for r, need in zip(results[1:], needs, strict=True) if not need]
        ctx.mark_non_differentiable(*unneeded)
        return results

    @staticmethod
    def backward(ctx, *gradients):
        given = zip(gradients, (True, *ctx.needs), strict=True)
        gradients = [gradient if need else None for gradient, need in given]
        if all(gradient is None for gradient in gradients):
            return (None,) * 12
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states = ctx.saved_tensors
        dx, dweight, dbias, ddout, dstates, ddfinal = _plain.backward_of_backward(
            x, weight, bias, dout, seq_idx, initial_states, dfinal_states, gradients, ctx.silu
        )
        return None, dx, dweight, dbias, ddout, None, dstates, ddfinal, None, None, None, None


class Update(_SingleLevelFunction):
    """update, which operator computes, as a node of a graph; it raises when a gradient comes.

    An operator raises, so that torch.compile can trace a backward that is never run.
    """

    @staticmethod
    def forward(ctx, operator, x, conv_state, weight, bias, *rest):
        ctx.save_for_backward(x, weight, bias)
        return operator(x, conv_state, weight, bias, *rest)

    @staticmethod
    def backward(ctx, dout):
        x, weight, bias = (
            None if tensor is None else _ops.update_gradient.default(tensor, dout)
            for tensor in ctx.saved_tensors
        )
        return None, x, None, weight, bias, *(None,) * (len(ctx.needs_input_grad) - 5)


class UpdateOfGraph(_SingleLevelFunction):
    """update with a state that is a part of a graph: out, and the state afterwards.

    Both raise when a gradient comes. The caller copies the state into its place, by an operation
    that autograd knows.
    """

    @staticmethod
    def forward(ctx, operator, x, conv_state, weight, bias, *rest):
        ctx.save_for_backward(x, weight)
        after = conv_state.detach().clone()
        return operator(x, after, weight, bias, *rest), after

    @staticmethod
    def backward(ctx, dout, dafter):
        x, weight = ctx.saved_tensors
        refused = _ops.update_gradient.default(x, dout), _ops.update_gradient.default(weight, dout)
        rest = (None,) * (len(ctx.needs_input_grad) - 4)
        return None, refused[0], dafter, refused[1], *rest


def update_of_graph(operator, x, conv_state, *rest):
    """update of a conv_state that requires grad and is no leaf."""
    out, after = _record(UpdateOfGraph, operator, x, conv_state, *rest)
    with torch.enable_grad():
        conv_state.copy_(after)
    return out


def _update_gradient(like, dout):
    raise RuntimeError(
        "causal_conv1d_update: it has no derivative, as its state changes in place; where "
        "gradients are needed, use causal_conv1d_fn with initial_states"
    )


class Keep(_SingleLevelFunction):
    """keep as a node of a graph."""

    @staticmethod
    def forward(ctx, operator, tensor):
        return operator(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient


def _keep_kernel(tensor):
    if has_tangent(tensor):
        return tensor.clone()
    if needs_grad(tensor):
        return _record(Keep, _Below(_ops.keep.default), tensor)
    return _Below(_ops.keep.default)(tensor)


def _register_own(loaded) -> None:
    """Operators that are needed for the graphs of torch.compile alone.

    keep is a clone that torch.compile does not compute again in the backward, as it does clones,
    from a tensor that has then been overwritten. update_gradient raises; it takes dout to be a part
    of the backward.
    """
    loaded.define(
        ["keep(Tensor tensor) -> Tensor", "update_gradient(Tensor like, Tensor dout) -> Tensor"]
    )
    kernels = {"keep": torch.clone, "update_gradient": _update_gradient}
    loaded.register(kernels, ANY_DEVICE)
    loaded.register({"keep": _keep_kernel}, "Autograd")
    library = torch.library.Library(NAMESPACE, "FRAGMENT")

    def fake_gradient(like, dout):
        return torch.empty_like(like)

    def keep_mapped(info, in_dims, tensor):
        return _ops.keep.default(tensor), in_dims[0]

    keep, gradient = map(add_op_namespace_prefix, ("keep", "update_gradient"))
    torch.library.register_fake(keep, torch.clone, lib=library)
    torch.library.register_vmap(keep, keep_mapped, lib=library)
    torch.library.register_fake(gradient, fake_gradient, lib=library)
    torch.library.register_vmap(gradient, lambda *args: _update_gradient(*args[-2:]), lib=library)
    loaded.registrations.append(library)


def _forward_kernel(operator, plain):
    def kernel(x, weight, bias, seq_idx, initial_states, silu):
        args = (x, weight, bias, seq_idx, initial_states, silu)
        inputs = (x, weight, bias, initial_states)
        if has_tangent(*inputs):
            _fake.check("forward", dict(zip(argument_names("forward"), args[:5], strict=False)))
            return plain(*args)
        if needs_grad(*inputs):
            return _record(Forward, _Below(operator), *args)
        return _Below(operator)(*args)

    return kernel


def _backward_kernel(*args):
    tensors = [tensor for i, tensor in enumerate(args[:7]) if i != 4]  # without seq_idx
    if has_tangent(*tensors):
        _fake.check("backward", dict(zip(argument_names("backward"), args[:7], strict=False)))
        return _plain.backward(*args)
    if needs_grad(*tensors):
        return _record(Backward, _Below(_ops.backward.default), *args)
    return _Below(_ops.backward.default)(*args)


def _tell_wrappers(*tensors) -> None:
    """A subclass's tensor has a version of its own, besides those of what it wraps."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            increment_version(tensor)


def update_kernel(operator):
    """For update, and for update with a dilation."""

    def kernel(*args):
        x, conv_state, weight, bias = args[:4]
        if conv_state.is_leaf:
            refuse_to_write("causal_conv1d_update", conv_state=conv_state)
        if has_tangent(x, conv_state, weight, bias):
            raise RuntimeError(
                "causal_conv1d_update: it has no derivative in forward mode, as its state changes "
                "in place; use causal_conv1d_fn with initial_states"
            )
        if needs_grad(conv_state):
            return update_of_graph(_Below(operator), *args)
        _tell_wrappers(conv_state)
        if needs_grad(x, weight, bias):
            return _record(Update, _Below(operator), *args)
        return _Below(operator)(*args)

    return kernel


def _varlen_states_kernel(x, cu_seqlens, state_len):
    if has_tangent(x) or needs_grad(x):
        _fake.check_varlen_states(x, cu_seqlens, state_len)
        return _plain.varlen_states(x, cu_seqlens, state_len)
    return _Below(_ops.varlen_states.default)(x, cu_seqlens, state_len)


def _writing_kernel(operation, operator):
    """For an operator that writes into given tensors: like torch's out= it has no derivative."""
    names = argument_names(operation)

    def kernel(*args):
        for name, tensor in zip(names, args, strict=True):
            if isinstance(tensor, torch.Tensor) and (has_tangent(tensor) or needs_grad(tensor)):
                raise RuntimeError(
                    f"{CALLERS[operation]}: {name} requires grad, and an operator that writes into "
                    f"given tensors has no derivative"
                )
        written = [t for n, t in zip(names, args, strict=True) if n in written_names(operation)]
        _tell_wrappers(*written)
        return _Below(operator)(*args)

    return kernel


def _negated_kernel(operation, operator):
    """For an operator that writes. Some views negate lazily (``Tensor.imag`` of a conjugate), and
    torch's own fallback for them fails on tensors that are written."""
    names = [argument.name for argument in operator._schema.arguments]

    def kernel(*args):
        for name, tensor in zip(names, args, strict=True):
            if name in written_names(operation) and tensor is not None and tensor.is_neg():
                raise RuntimeError(
                    f"{CALLERS[operation]}: {name} is written and must not be a lazily negated view"
                )
        return operator(*(a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args))

    return kernel


def register(loaded) -> None:
    _register_own(loaded)
    loaded.register(
        {
            "forward": _forward_kernel(_ops.forward.default, _plain.forward),
            "forward_states": _forward_kernel(_ops.forward_states.default, _plain.forward_states),
            "forward_out": _writing_kernel("forward", _ops.forward_out.default),
            "backward": _backward_kernel,
            "backward_out": _writing_kernel("backward", _ops.backward_out.default),
            "update": update_kernel(_ops.update.default),
            "update_out": _writing_kernel("update", _ops.update_out.default),
            "varlen_states": _varlen_states_kernel,
        },
        "Autograd",
    )
    loaded.register(
        {f"{name}.plain": torch.library.fallthrough_kernel for name in loaded.schemas}, "Autograd"
    )
    for name in ("forward_out", "backward_out", "update", "update_out"):
        packet, operation = getattr(_ops, name), operation_of(name)
        kernels = {
            name: _negated_kernel(operation, packet.default),
            f"{name}.plain": _negated_kernel(operation, packet.plain),
        }
        loaded.register(kernels, "Negative")
