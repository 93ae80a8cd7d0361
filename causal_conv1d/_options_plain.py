"""The operators with options in plain PyTorch, as ``_plain.py`` has those without."""

from __future__ import annotations

import torch

from ._options import GRADIENT_OF, needs
from ._plain import Linear, _like_parameter, _slope, after_checks
from .reference import compute_dtype


class Packed(Linear):
    """The linear maps for sequences that cu_seqlens packs into one row.

    padded has the row and then the states of each sequence: (1, dim, total + sequences * history).
    """

    def __init__(self, x, width, cu_seqlens, dtype, dilation):
        super().__init__(x, width, None, dtype, dilation)
        count, history = cu_seqlens.shape[0] - 1, self.history
        self.count = count
        bounds = cu_seqlens.long().clamp(0, self.seqlen).cummax(0).values
        time = torch.arange(self.seqlen, device=x.device)
        ids = torch.searchsorted(bounds, time, right=True) - 1
        is_padding = (ids < 0) | (ids >= count)
        self.is_padding = is_padding[None, None]
        self.ids = ids.clamp(0, max(count - 1, 0))
        # Where each sequence's inputs before its first would be, counted from that.
        self.before = self.seqlen + history * torch.arange(1, count + 1, device=x.device)
        self.bounds = bounds
        starts = bounds[self.ids]
        self.places, self.ignored = [], []
        for k in range(width):
            place = self._place(time - (history - k * dilation), starts, self.ids)
            self.places.append(place.masked_fill(is_padding, 0))
            self.ignored.append(self.is_padding)
        end, column = bounds[1:, None], torch.arange(history, device=x.device)
        sequences = torch.arange(count, device=x.device)[:, None]
        self.kept = self._place(end - history + column, bounds[:-1, None], sequences).flatten()

    def _place(self, time, start, sequence):
        """In padded, of an input of a sequence that begins at start."""
        if self.count == 0:
            return torch.zeros_like(time)
        return torch.where(time >= start, time, self.before[sequence] + time - start)

    def pad(self, x, initial_states):
        states = x.new_zeros(1, self.dim, self.count * self.history)
        if initial_states is not None:
            states = self._flat(initial_states)
        return torch.cat([x.to(self.dtype), states.to(self.dtype)], dim=-1)

    def _flat(self, states):
        return states.transpose(0, 1).flatten(1)[None]

    def split(self, padded):
        x, states = padded.tensor_split([self.seqlen], dim=2)
        return x, self._rows(states)

    def _rows(self, states):
        return states[0].unflatten(1, (self.count, self.history)).transpose(0, 1)

    def taps(self, padded):
        return [
            padded.index_select(2, place).masked_fill(self.is_padding, 0) for place in self.places
        ]

    def correlate(self, dz, weight):
        total = dz.new_zeros(1, self.dim, self.seqlen + self.count * self.history)
        for k, place in enumerate(self.places):
            part = (weight[..., k, None] * dz).masked_fill(self.is_padding, 0)
            total = total.index_add(2, place, part)
        return total

    def final_states(self, padded):
        return self._rows(padded.index_select(2, self.kept))

    def spread(self, dfinal_states):
        zeros = dfinal_states.new_zeros(1, self.dim, self.seqlen + self.count * self.history)
        return zeros.index_add(2, self.kept, self._flat(dfinal_states))


def _linear(x, weight, seq_idx, cu_seqlens, dtype, dilation):
    width = weight.shape[-1]
    if cu_seqlens is None:
        return Linear(x, width, seq_idx, dtype, dilation)
    return Packed(x, width, cu_seqlens, dtype, dilation)


def _inputs(x, pre_gate, dtype):
    """pre_gate * x, of values that x's type has, but derivatives of the type that sums have."""
    if pre_gate is None:
        return x.to(dtype)
    product = pre_gate.to(dtype) * x.to(dtype)
    rounded = product.detach().to(x.dtype).to(dtype)
    return product + torch.where(rounded.isfinite(), rounded - product.detach(), 0)


def _activations(linear, taps, weight, bias, silu):
    """What goes into the activation, and what comes out of it."""
    bias = None if bias is None else bias.to(linear.dtype)
    z = linear.convolve(taps, weight.to(linear.dtype), bias)
    return z, z * torch.sigmoid(z) if silu else z


def conv_forward(
    x,
    weight,
    bias,
    seq_idx,
    cu_seqlens,
    initial_states,
    pre_gate,
    post_gate,
    residual,
    dilation,
    return_final_states,
    silu,
):
    """out, and the final states, of size 0 if they are not wanted."""
    dtype = compute_dtype(x, weight, bias, initial_states)
    linear = _linear(x, weight, seq_idx, cu_seqlens, dtype, dilation)
    padded = linear.pad(_inputs(x, pre_gate, dtype), initial_states)
    _, out = _activations(linear, linear.taps(padded), weight, bias, silu)
    if post_gate is not None:
        out = out * post_gate.to(dtype)
    out = linear.outputs(out)
    if residual is not None:
        out = out + residual.to(dtype)
    states = linear.final_states(padded) if return_final_states else x.new_zeros(0)
    return out.to(x.dtype), states.to(x.dtype)


def gradients(
    x,
    weight,
    bias,
    dout,
    seq_idx,
    cu_seqlens,
    initial_states,
    dfinal_states,
    pre_gate,
    post_gate,
    dilation,
    residual_is_x,
    silu,
):
    """conv_backward's results in the type that sums have, each row's of weight and bias; None for
    the gradient of a gate that is not given."""
    dtype = compute_dtype(x, weight, bias, initial_states)
    linear = _linear(x, weight, seq_idx, cu_seqlens, dtype, dilation)
    taps = linear.taps(linear.pad(_inputs(x, pre_gate, dtype), initial_states))
    dz = linear.outputs(dout.to(dtype))
    dpre_gate = dpost_gate = None
    if silu or post_gate is not None:
        z, activated = _activations(linear, taps, weight, bias, silu)
    if post_gate is not None:
        dpost_gate = linear.outputs(dz * activated)
        dz = linear.outputs(dz * post_gate.to(dtype))
    if silu:
        dz = linear.outputs(dz * _slope(z, silu))
    dpadded = linear.correlate(dz, weight.to(dtype))
    if dfinal_states is not None:
        dpadded = dpadded + linear.spread(dfinal_states.to(dtype))
    dx, dstates = linear.split(dpadded)
    if pre_gate is not None:
        dpre_gate = dx * x.to(dtype)
        dx = dx * pre_gate.to(dtype)
    if residual_is_x:
        dx = dx + dout.to(dtype)
    return dx, linear.accumulate(dz, taps), dz.sum(2), dstates, dpre_gate, dpost_gate


def conv_backward(*args):
    """The gradients, each of size 0 if it is not needed."""
    *inputs, needed, silu = args
    x, weight, bias, initial_states = args[0], args[1], args[2], args[6]
    dx, dweight, dbias, *others = gradients(*inputs, silu)
    found = [
        dx.to(x.dtype),
        _like_parameter(dweight, weight),
        None if bias is None else _like_parameter(dbias, bias),
        others[0].to((x if initial_states is None else initial_states).dtype),
        *(None if gradient is None else gradient.to(x.dtype) for gradient in others[1:]),
    ]
    return tuple(
        x.new_zeros(0) if gradient is None or not needs(needed, i) else gradient
        for i, gradient in enumerate(found)
    )


def backward_of_backward(args, above):
    """The gradients of sum(g * r) over the results r of :func:`conv_backward`, g being those above.

    Returns:
        Those of conv_backward's first ten arguments; None for what is not given or no float.
    """
    *tensors, dilation, residual_is_x, needed, silu = args
    kept = [i for i, gradient in enumerate(above) if gradient is not None and needs(needed, i)]
    kept = [i for i in kept if i == 3 or tensors[GRADIENT_OF[i]] is not None]
    places = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

    def results(*given):
        filled = list(tensors)
        for place, tensor in zip(places, given, strict=True):
            filled[place] = tensor
        found = conv_backward(*filled, dilation, residual_is_x, needed, silu)
        return tuple(found[i] for i in kept)

    _, pull = torch.func.vjp(results, *(tensors[place] for place in places))
    found = dict(zip(places, pull(tuple(above[i] for i in kept)), strict=True))
    return [found.get(i) for i in range(len(tensors))]


def operations(checks: dict) -> dict:
    """The operations by name, each with the check of its arguments first."""

    def write_forward(*args):
        *tensors, out, final_states_out, dilation, silu = args
        results = conv_forward(*tensors, dilation, final_states_out is not None, silu)
        for target, result in zip((out, final_states_out), results, strict=True):
            if target is not None:
                target.copy_(result)

    def write_backward(*args):
        inputs, written, (dilation, residual_is_x, silu) = args[:10], args[10:16], args[16:]
        dx, dweight, dbias, *others = gradients(*inputs, dilation, residual_is_x, silu)
        results = (dx, dweight.sum(0), dbias.sum(0), *others)
        for target, result in zip(written, results, strict=True):
            if target is not None:
                target.copy_(result)

    return after_checks({"conv_forward": write_forward, "conv_backward": write_backward}, checks)
