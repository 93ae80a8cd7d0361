"""``causal_conv1d_fn`` and ``causal_conv1d_update``, with upstream's names and signatures."""

from __future__ import annotations

import torch

from causal_conv1d import _library  # noqa: F401  registers torch.ops.causal_conv1d
from causal_conv1d.reference import causal_conv1d_ref, causal_conv1d_update_ref

__all__ = [
    "CausalConv1dFn",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
]

_forward = torch.ops.causal_conv1d.forward.default
_backward = torch.ops.causal_conv1d.backward.default
_update = torch.ops.causal_conv1d.update.default


def _is_silu(activation) -> bool:
    if activation is None:
        return False
    if activation == "silu" or activation == "swish":
        return True
    raise NotImplementedError("activation must be None, silu, or swish")


class CausalConv1dFn(torch.autograd.Function):
    """The differentiable form of :func:`causal_conv1d_fn`; it saves its inputs and nothing else."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        silu = _is_silu(activation)
        out = torch.empty_like(x)
        final_states = None
        if return_final_states:
            if final_states_out is not None:
                final_states = final_states_out
                ctx.mark_dirty(final_states)
            else:
                final_states = _empty_final_states(x, weight)
        _forward(x, weight, bias, seq_idx, initial_states, out, final_states, silu)
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_states)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return (out, final_states) if return_final_states else out

    @staticmethod
    def backward(ctx, dout, dfinal_states=None):
        x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
        if dout is None:
            if dfinal_states is None:
                return None, None, None, None, None, None, None, None
            dout = torch.zeros_like(x)
        arguments = (x, weight, bias, seq_idx, initial_states, dout, dfinal_states)
        # Gradients are recorded here only if the caller asked for a graph of the backward.
        gradients = _OnceDifferentiable.apply if torch.is_grad_enabled() else _gradients
        dx, dweight, dbias, dinitial_states = gradients(
            *arguments, ctx.silu, ctx.needs_input_grad[1:5]
        )
        return dx, dweight, dbias, None, dinitial_states, None, None, None


def _gradients(x, weight, bias, seq_idx, initial_states, dout, dfinal_states, silu, needs):
    dx = torch.empty_like(x)
    dweight = torch.empty_like(weight) if needs[0] else None
    dbias = torch.empty_like(bias) if needs[1] else None
    dinitial_states = torch.empty_like(initial_states) if needs[3] else None
    _backward(
        x,
        weight,
        bias,
        dout,
        seq_idx,
        initial_states,
        dfinal_states,
        dx,
        dweight,
        dbias,
        dinitial_states,
        silu,
    )
    return dx, dweight, dbias, dinitial_states


class _OnceDifferentiable(torch.autograd.Function):
    """The backward as a node of a graph: a second derivative fails instead of being left out."""

    @staticmethod
    def forward(ctx, *arguments):
        return _gradients(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("causal_conv1d_fn: there is no second derivative (double backward)")


def _empty_final_states(x, weight):
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[1] - 1))


def _legacy_form(
    bias, seq_idx, initial_states, return_final_states, final_states_out, activation
) -> tuple:
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
        activation, final_states_out = final_states_out, None  # no tensor: refused as activation
    return seq_idx, initial_states, return_final_states, final_states_out, activation, buffer


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
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
        seq_idx: (batch, seqlen) int32 or None: the id of the packed sequence that each position
            belongs to. Only inputs of the same id count. The initial state has the id of
            position 0. Where the id is negative (padding) the output is 0.
        initial_states: (batch, dim, width - 1) or None: the inputs before the first.
        return_final_states: also return the last width - 1 inputs (of ``x~``, so a sequence
            shorter than that keeps a part of its initial state).
        final_states_out: (batch, dim, width - 1) or None: where to write them; only used with
            ``return_final_states``.
        activation: None, "silu" or "swish" (the same).

    Returns:
        out, (batch, dim, seqlen) in x's dtype and layout; with ``return_final_states`` the tuple
        (out, final_states), the latter (batch, dim, width - 1) in x's dtype.

    Raises:
        RuntimeError: an argument of wrong shape, dtype or device; the message names it.
        NotImplementedError: another activation.

    Older positional forms are accepted as well: activation as the 4th or 5th argument (upstream
    before 1.2), and ``(x, weight, bias, seq_idx, initial_states, final_states_out, activation)``.

    Example::

        >>> x = torch.randn(2, 64, 100)
        >>> weight, bias = torch.randn(64, 4), torch.randn(64)
        >>> causal_conv1d_fn(x, weight, bias, activation="silu").shape
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
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (initial_states is not None and initial_states.requires_grad)
    ):
        if buffer is not None:
            return CausalConv1dFn.apply(
                x, weight, bias, seq_idx, initial_states, True, buffer, activation
            )[0]
        return CausalConv1dFn.apply(
            x,
            weight,
            bias,
            seq_idx,
            initial_states,
            bool(return_final_states),
            final_states_out,
            activation,
        )
    out = torch.empty_like(x)
    if return_final_states:
        buffer = final_states_out
        if buffer is None:
            buffer = _empty_final_states(x, weight)
    _forward(x, weight, bias, seq_idx, initial_states, out, buffer, _is_silu(activation))
    return (out, buffer) if return_final_states else out


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
):
    """The convolution of new tokens that follow a running state, which takes them in.

    Bitwise equal to :func:`causal_conv1d_fn` on the whole sequence. Not differentiable.

    Args:
        x: (batch, dim) or (batch, dim, seqlen): the new tokens, usually one.
        conv_state: (batch, dim, state_len) with state_len >= width - 1; changed in place. Any
            strides, and a dtype of its own.
        weight: (dim, width).
        bias: (dim,) or None.
        activation: None, "silu" or "swish".
        cache_seqlens: (batch,) int32 or None. None: the state shifts left by seqlen and takes x at
            its end. Given: the state is a ring, and token i goes to position
            ``(cache_seqlens + i) % state_len``.
        conv_state_indices: (batch,) int32 or None: the row of conv_state of each batch entry;
            conv_state may then have any number of rows. A negative index is padding: the output is
            0 and no state is touched. An index past the last row is an error on the CPU; on CUDA,
            where no one can look without a synchronisation, the output is NaN. Using a row twice
            in a call leaves its state unspecified.

    Returns:
        out, of x's shape, dtype and layout.

    Raises:
        RuntimeError: an argument of wrong shape, dtype or device; the message names it.
        NotImplementedError: another activation.
    """
    silu = _is_silu(activation)
    out = torch.empty_like(x)
    _update(x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices)
    return out
