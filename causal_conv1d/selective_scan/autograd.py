"""The derivatives of the selective scan's operators, as ``_autograd.py`` has the convolution's.

Reverse mode runs on the compiled kernels and saves the inputs alone. Gradients of gradients and
forward mode go through ``formula.py``. ``state_update`` changes its state in place and has no
derivative: it raises an error where one is asked for.
"""

from __future__ import annotations

import torch
from torch.autograd.function import _SingleLevelFunction

from .. import _autograd
from .._arguments import refuse_to_write
from .._autograd import _Below, _record, _tell_wrappers, has_tangent, needs_grad
from .._dispatch import is_transformed
from .._operators import argument_names
from .._ops import NAMESPACE, add_op_namespace_prefix
from .._ops import ops as _ops
from .._torch_ops import ANY_DEVICE
from . import fake, formula
from .operators import GRADIENTS, INPUTS

_backward = _ops.scan_backward.plain._op  # without a Python function around it


class ScanForward(_SingleLevelFunction):
    """scan_forward, which operator computes, as a node of a graph."""

    @staticmethod
    def forward(ctx, operator, *args):
        *inputs, ctx.delta_softplus, need_last_states = args
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        out, last_states = operator(*args)
        if not need_last_states:
            ctx.mark_non_differentiable(last_states)
        return out, last_states

    @staticmethod
    def backward(ctx, dout, dlast_states):
        nothing = (None,) * (INPUTS + 2)
        if dout is None and dlast_states is None:
            return nothing
        inputs = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(inputs[0])
        wanted = [i for i in range(GRADIENTS) if ctx.needs_input_grad[1 + i]]
        needed = sum(1 << i for i in wanted)
        # Gradients are recorded here only if the caller asked for a graph of the backward.
        operator = _backward
        if torch.is_grad_enabled() or is_transformed(inputs[0]):
            operator = _ops.scan_backward.default
        found = operator(*inputs, ctx.delta_softplus, dout, dlast_states, needed)
        gradients = [found[i] if i in wanted else None for i in range(GRADIENTS)]
        return (None, *gradients, *nothing[1 + GRADIENTS :])


class ScanBackward(_SingleLevelFunction):
    """scan_backward, which operator computes, as a node of a graph."""

    @staticmethod
    def forward(ctx, operator, *args):
        *inputs, ctx.delta_softplus, dout, dlast_states, ctx.needed = args
        ctx.save_for_backward(*inputs, dout, dlast_states)
        ctx.set_materialize_grads(False)
        results = operator(*args)
        ctx.mark_non_differentiable(
            *(result for i, result in enumerate(results) if not ctx.needed >> i & 1)
        )
        return results

    @staticmethod
    def backward(ctx, *gradients):
        if all(gradient is None for gradient in gradients):
            return (None,) * (INPUTS + 4)
        *inputs, dout, dlast_states = ctx.saved_tensors
        args = (*inputs, ctx.delta_softplus, dout, dlast_states, ctx.needed)
        *found, ddout, ddlast_states = formula.backward_of_backward(args, gradients)
        return (None, *found, None, None, ddout, ddlast_states, None)


class StateUpdate(_SingleLevelFunction):
    """state_update, which operator computes, as a node of a graph; it raises when a gradient comes.

    An operator raises, so that torch.compile can trace a backward that is never run.
    """

    @staticmethod
    def forward(ctx, operator, state, *rest):
        ctx.save_for_backward(*rest[:8])
        return operator(state, *rest)

    @staticmethod
    def backward(ctx, dout):
        gradients = (
            None if tensor is None else _ops.state_update_gradient.default(tensor, dout)
            for tensor in ctx.saved_tensors
        )
        return (None, None, *gradients, None, None)


class StateUpdateOfGraph(_SingleLevelFunction):
    """state_update with a state that is a part of a graph: out, and the state afterwards.

    Both raise when a gradient comes. The caller copies the state into its place, by an operation
    that autograd knows.
    """

    @staticmethod
    def forward(ctx, operator, state, *rest):
        ctx.save_for_backward(rest[0])
        after = state.detach().clone()
        return operator(after, *rest), after

    @staticmethod
    def backward(ctx, dout, dafter):
        (x,) = ctx.saved_tensors
        return (None, dafter, _ops.state_update_gradient.default(x, dout), *(None,) * 9)


def state_update_of_graph(operator, state, *rest):
    """state_update of a state that requires grad and is no leaf."""
    out, after = _record(StateUpdateOfGraph, operator, state, *rest)
    with torch.enable_grad():
        state.copy_(after)
    return out


def _state_update_gradient(like, dout):
    raise RuntimeError(
        "selective_state_update: it has no derivative, as its state changes in place; where "
        "gradients are needed, use selective_scan_fn with initial_states"
    )


def _forward_kernel(*args):
    inputs = args[:GRADIENTS]
    if has_tangent(*inputs):
        fake.check(
            "scan_forward", dict(zip(argument_names("scan_forward"), args[:10], strict=False))
        )
        return formula.forward(*args)
    if needs_grad(*inputs):
        return _record(ScanForward, _Below(_ops.scan_forward.default), *args)
    return _Below(_ops.scan_forward.default)(*args)


def _backward_kernel(*args):
    tensors = (*args[:GRADIENTS], *args[INPUTS : INPUTS + 2])
    if has_tangent(*tensors):
        named = dict(zip(argument_names("scan_backward"), args[: INPUTS + 2], strict=False))
        fake.check("scan_backward", named)
        return formula.backward(*args)
    if needs_grad(*tensors):
        return _record(ScanBackward, _Below(_ops.scan_backward.default), *args)
    return _Below(_ops.scan_backward.default)(*args)


def _state_update_kernel(*args):
    state, *rest = args[:9]
    if state.is_leaf:
        refuse_to_write("selective_state_update", state=state)
    if has_tangent(state, *rest):
        raise RuntimeError(
            "selective_state_update: it has no derivative in forward mode, as its state changes in "
            "place; use selective_scan_fn with initial_states"
        )
    operator = _Below(_ops.state_update.default)
    if needs_grad(state):
        return state_update_of_graph(operator, *args)
    _tell_wrappers(state)
    if needs_grad(*rest):
        return _record(StateUpdate, operator, *args)
    return operator(*args)


def _define_gradient(loaded) -> None:
    """The operator that raises; it takes dout to be a part of the backward."""
    name = "state_update_gradient"
    loaded.define([f"{name}(Tensor like, Tensor dout) -> Tensor"])
    loaded.register({name: _state_update_gradient}, ANY_DEVICE)
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    full = add_op_namespace_prefix(name)
    torch.library.register_fake(full, lambda like, dout: torch.empty_like(like), lib=library)
    torch.library.register_vmap(
        full, lambda info, dims, *args: _state_update_gradient(*args), lib=library
    )
    loaded.registrations.append(library)


def register(loaded) -> None:
    _define_gradient(loaded)
    kernels = {
        "scan_forward": _forward_kernel,
        "scan_backward": _backward_kernel,
        "state_update": _state_update_kernel,
    }
    for operation in kernels.copy():
        name = f"{operation}_out"
        kernels[name] = _autograd._writing_kernel(operation, getattr(_ops, name).default)
    loaded.register(kernels, "Autograd")
    for name in ("scan_forward_out", "scan_backward_out", "state_update", "state_update_out"):
        packet, operation = getattr(_ops, name), name.removesuffix("_out")
        negated = {
            name: _autograd._negated_kernel(operation, packet.default),
            f"{name}.plain": _autograd._negated_kernel(operation, packet.plain),
        }
        loaded.register(negated, "Negative")
