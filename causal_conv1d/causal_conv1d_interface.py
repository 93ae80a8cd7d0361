"""``causal_conv1d_fn`` and ``causal_conv1d_update``, with upstream's names and signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from . import (
    _library,  # noqa: F401  registers the operators
    _onnx,
)
from ._arguments import (
    check_final_states_out,
    check_tensors,
    is_silu,
    refuse_to_write,
)
from ._autograd import Forward, Update, update_of_graph
from ._convolve import convolve
from ._dispatch import is_transformed
from ._dtensor import is_sequence_sharded, sequence_sharded
from ._ops import ops as _ops
from .reference import causal_conv1d_ref, causal_conv1d_update_ref

__all__ = [
    "CausalConv1dFn",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
]

# The operators without a Python function around them.
_forward = _ops.forward.plain._op
_forward_states = _ops.forward_states.plain._op
_forward_out = _ops.forward_out.plain._op
_update = _ops.update.plain._op


class CausalConv1dFn:
    """Upstream's name for :func:`causal_conv1d_fn`, called as a ``torch.autograd.Function`` is."""

    @staticmethod
    def apply(*args: Any) -> Any:
        return causal_conv1d_fn(*args)


def _legacy_form(bias, seq_idx, initial_states, return_final_states, final_states_out, activation):
    """Arguments of a call in an older positional form, in today's places.

    Besides upstream's own forms before 1.2, whose activation was the 4th or 5th argument, there is
    one in guides for Jetson, without ``return_final_states``: its 6th argument is the buffer for
    the final states and its 7th the activation.
    """
    if isinstance(bias, str) or isinstance(return_final_states, str):
        raise TypeError("causal_conv1d_fn: bias and return_final_states must not be strings")
    words = [
        a for a in (seq_idx, initial_states, final_states_out, activation) if isinstance(a, str)
    ]
    if len(words) > 1 or (isinstance(final_states_out, str) and activation is not None):
        raise TypeError("causal_conv1d_fn() got multiple values for argument 'activation'")
    buffer = None
    if isinstance(return_final_states, torch.Tensor) and return_final_states.ndim > 0:
        if isinstance(final_states_out, torch.Tensor):
            raise TypeError("causal_conv1d_fn() got two buffers for final_states_out")
        buffer, return_final_states = return_final_states, False
    if words:
        activation = words[0]
        seq_idx = None if isinstance(seq_idx, str) else seq_idx
        initial_states = None if isinstance(initial_states, str) else initial_states
        final_states_out = None if isinstance(final_states_out, str) else final_states_out
    elif final_states_out is not None and not isinstance(final_states_out, torch.Tensor):
        check_tensors("causal_conv1d_fn", {}, {"final_states_out": final_states_out})
    return seq_idx, initial_states, return_final_states, final_states_out, activation, buffer


def _recorded(x, weight, bias, seq_idx, initial_states, with_states, states_out, silu):
    """The call where gradients are recorded."""
    if (
        states_out is not None
        and initial_states is not None
        and _share_memory(states_out, initial_states)
    ):
        initial_states = initial_states.clone()  # the backward needs what was in it
    operator = _forward_states if with_states else _forward
    args = (operator, x, weight, bias, seq_idx, initial_states, silu)
    found = Forward.apply(*args)  # type: ignore[attr-defined]
    if states_out is None:
        return found
    return found[0], _write_states(states_out, found[1], x)


@overload
def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: Literal[False] = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    pre_gate: torch.Tensor | None = None,
    post_gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dilation: int = 1,
    split_sizes: None = None,
) -> torch.Tensor: ...
@overload
def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    *,
    return_final_states: Literal[True],
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    pre_gate: torch.Tensor | None = None,
    post_gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dilation: int = 1,
    split_sizes: None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    pre_gate: torch.Tensor | None = None,
    post_gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dilation: int = 1,
    split_sizes: Sequence[int] | None = None,
) -> Any: ...
def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    pre_gate: torch.Tensor | None = None,
    post_gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dilation: int = 1,
    split_sizes: Sequence[int] | None = None,
) -> Any:
    """Depthwise causal 1-D convolution, optionally followed by SiLU; differentiable.

    .. code-block:: text

        out[b,d,t] = act(bias[d] + sum over k = 0..W-1 of weight[d,k] * x~[b,d,t-(W-1)+k])

    where ``x~[b,d,s]`` is ``x[b,d,s]`` for s >= 0 and ``initial_states[b,d,(W-1)+s]`` or 0 before.
    Sums are fp32 in one fixed order, so outputs are bitwise equal whatever the layout, and whether
    a sequence is given whole, in chunks with states, or token by token to
    :func:`causal_conv1d_update`. Gradients are deterministic. Follows upstream's 1.7.0.

    Args:
        x: (batch, dim, seqlen), on the CPU or a CUDA device, with any strides. float32, float16 or
            bfloat16, each tensor on its own; or all tensors float64.
        weight: (dim, width), any width >= 1; up to 8 is fast.
        bias: (dim,) or None.
        seq_idx: (batch, seqlen) int32, or int64 of values that fit int32, or None: the id of the
            packed sequence that each position belongs to. Only inputs of the same id count. The
            initial state has the id of position 0. Where the id is negative (padding) the output
            is 0.
        initial_states: (batch, dim, width - 1) or None: the inputs before the first.
        return_final_states: also return the last width - 1 inputs (of ``x~``, so a sequence
            shorter than that keeps a part of its initial state). Padding enters as zeros, and that
            at the end of a row does not count: its states are those after its last real position.
            Ids >= 0 do not change them.
        final_states_out: (batch, dim, width - 1) or None: where to write them; only used with
            ``return_final_states``. It may be ``initial_states``, and a view of a cache.
        activation: None, "silu" or "swish" (the same).
        pre_gate: x's shape and dtype, or None: takes x's place multiplied by it, in states too.
        post_gate: x's shape and dtype, or None: the activation's result is multiplied by it.
        residual: x's shape and dtype, or None: added at the end; it may be x itself.
        dilation: steps from one tap to the next. Where this page says ``width - 1`` of states it is
            then ``(width - 1) * dilation``.
        split_sizes: numbers of channels whose sum is dim, or None: out is then a tuple of as many
            tensors, each dense in x's layout, as ``out.split(split_sizes, dim=1)`` and copies of
            its parts would be.

    Returns:
        out, (batch, dim, seqlen) in x's dtype and layout; with ``return_final_states`` the tuple
        (out, final_states), the latter (batch, dim, width - 1) in x's dtype.

    Raises:
        RuntimeError: an argument of wrong shape, dtype or device; the message names it.
        TypeError: an argument that is no tensor.
        NotImplementedError: another activation.

    Older positional forms are accepted as well: activation as the 4th or 5th argument (upstream
    before 1.2), and ``(x, weight, bias, seq_idx, initial_states, final_states_out, activation)``.

    Example::

        >>> causal_conv1d_fn(torch.randn(2, 64, 100), torch.randn(64, 4)).shape
        torch.Size([2, 64, 100])
    """
    buffer = None
    if (
        return_final_states is not False
        or final_states_out is not None
        or (isinstance(bias, str) or isinstance(seq_idx, str) or isinstance(initial_states, str))
    ):
        (seq_idx, initial_states, return_final_states, final_states_out, activation, buffer) = (
            _legacy_form(
                bias, seq_idx, initial_states, return_final_states, final_states_out, activation
            )
        )
    silu = activation == "silu" or is_silu(activation)
    states_out = final_states_out if return_final_states else buffer
    with_states = return_final_states or buffer is not None
    if (
        pre_gate is not None
        or post_gate is not None
        or residual is not None
        or split_sizes is not None
        or (dilation != 1 and not is_sequence_sharded(x))
    ):
        tensors = {"x": x, "weight": weight, "bias": bias, "seq_idx": seq_idx}
        tensors.update(cu_seqlens=None, initial_states=initial_states, pre_gate=pre_gate)
        tensors.update(post_gate=post_gate, residual=residual)
        caller = "causal_conv1d_fn"
        found = convolve(caller, tensors, dilation, silu, split_sizes, states_out, with_states)
        return found if buffer is None else found[0]
    states = initial_states, with_states, states_out
    if is_transformed(x):
        found = _traced(x, weight, bias, seq_idx, *states, silu, dilation)
        return found if buffer is None else found[0]
    try:
        if torch.is_grad_enabled() and (
            x.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (initial_states is not None and initial_states.requires_grad)
            or (states_out is not None and states_out.requires_grad)
        ):
            found = _recorded(x, weight, bias, seq_idx, *states, silu)
        elif states_out is not None:
            found = torch.empty_like(x), states_out
            _forward_out(x, weight, bias, seq_idx, initial_states, *found, silu)
        else:
            operator = _forward_states if with_states else _forward
            found = operator(x, weight, bias, seq_idx, initial_states, silu)
    except Exception:
        _check_fn_tensors(x, weight, bias, seq_idx, initial_states, states_out)
        raise
    return found if buffer is None else found[0]


def _check_fn_tensors(x, weight, bias, seq_idx, initial_states, final_states_out):
    optional = {"bias": bias, "seq_idx": seq_idx, "initial_states": initial_states}
    optional["final_states_out"] = final_states_out
    check_tensors("causal_conv1d_fn", {"x": x, "weight": weight}, optional)


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _write_states(final_states_out, final_states, x):
    """Copies final_states into the tensor given for them; autograd knows copy_."""
    check_final_states_out(final_states_out, final_states, x)
    return final_states_out.copy_(final_states)


def _traced(x, weight, bias, seq_idx, initial_states, with_states, states_out, silu, dilation):
    """causal_conv1d_fn by operators alone, for tracers, transformations and tensor subclasses.

    dilation is 1 unless x is sharded over its sequence.
    """
    _check_fn_tensors(x, weight, bias, seq_idx, initial_states, states_out)
    args = (x, weight, bias, seq_idx, initial_states, silu)
    if is_sequence_sharded(x):
        found = sequence_sharded(*args[:5], with_states, silu, dilation)
        if not with_states:
            return found
    elif _onnx.is_exporting():
        found = _onnx.forward_states(*args)
        if not with_states:
            return found[0]
    elif not with_states:
        return _ops.forward.default(*args)
    else:
        if states_out is not None and initial_states is not None:
            args = (x, weight, bias, seq_idx, _ops.keep.default(initial_states), silu)
        found = _ops.forward_states.default(*args)
    if states_out is None:
        return found
    return found[0], _write_states(states_out, found[1], x)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    *,
    dilation: int = 1,
) -> torch.Tensor:
    """The convolution of new tokens that follow a running state, which takes them in.

    Bitwise equal to :func:`causal_conv1d_fn` on the whole sequence. It has no derivative: a
    gradient that reaches it raises, as do forward mode and a leaf that requires grad as conv_state.

    Args:
        x: (batch, dim) or (batch, dim, seqlen): the new tokens, usually one.
        conv_state: (batch, dim, state_len) with state_len >= width - 1; changed in place. Any
            strides; its dtype may differ from x's.
        weight: (dim, width).
        bias: (dim,) or None.
        activation: None, "silu" or "swish".
        cache_seqlens: (batch,) int32 or int64, or None. None: the state shifts left by seqlen and
            takes x at its end. Given: the state is a ring, and token i goes to position
            ``(cache_seqlens + i) % state_len``.
        conv_state_indices: (batch,) int32 or int64, or None: the row of conv_state of each batch
            entry; conv_state may then have any number of rows. A negative index is padding: the
            output is 0 and no state is touched. An index past the last row is an error on the CPU;
            on CUDA, where an error would need a synchronisation, the output is NaN. Entries with
            the same row all read it as it was before the call, and the last one's state stays.
        dilation: steps from one tap to the next; state_len is then at least
            ``(width - 1) * dilation``. Another than 1 takes some operations of torch's, and writes
            all of conv_state.

    Returns:
        out, of x's shape, dtype and layout.

    Raises:
        RuntimeError: an argument of wrong shape, dtype or device; the message names it.
        TypeError: an argument that is no tensor.
        NotImplementedError: another activation.
    """
    silu = activation == "silu" or is_silu(activation)
    args = (x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    if dilation != 1:
        _check_update_tensors(x, conv_state, weight, bias, cache_seqlens, conv_state_indices)
        return _ops.update_dilated.default(*args, dilation)
    if is_transformed(x):
        return _traced_update(*args)
    try:
        if torch.is_grad_enabled():
            if conv_state.requires_grad:
                if conv_state.is_leaf:
                    refuse_to_write("causal_conv1d_update", conv_state=conv_state)
                return update_of_graph(_update, *args)
            if x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
                return Update.apply(_update, *args)  # type: ignore[attr-defined]
        return _update(*args)
    except Exception:
        _check_update_tensors(x, conv_state, weight, bias, cache_seqlens, conv_state_indices)
        raise


def _check_update_tensors(x, conv_state, weight, bias, cache_seqlens, conv_state_indices):
    optional = {"bias": bias, "cache_seqlens": cache_seqlens}
    optional["conv_state_indices"] = conv_state_indices
    required = {"x": x, "conv_state": conv_state, "weight": weight}
    check_tensors("causal_conv1d_update", required, optional)


def _traced_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    _check_update_tensors(x, conv_state, weight, bias, cache_seqlens, conv_state_indices)
    args = (x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    if _onnx.is_exporting():
        out, after = _onnx.update(*args)
        conv_state[:] = after  # the older exporter does not know every copy_
        return out
    return _ops.update.default(*args)
