"""The operators in plain PyTorch, returning their results.

Everything here is made of torch's own differentiable operations: it can be differentiated any
number of times, forward and reverse, and mapped by ``torch.vmap``. Nothing synchronises. It serves
where the kernels have no derivative, and on a GPU where they fail their self-test.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .reference import compute_dtype


class Linear:
    """The linear maps that forward and backward consist of, for one x's shape, width and ids.

    Inputs are a pair (x, initial_states) or, as one tensor from the first state on, padded: (batch,
    dim, history + seqlen), history being (width - 1) * dilation. weight is (dim, width), or (batch,
    dim, width): then each row has its own.
    """

    def __init__(self, x, width, seq_idx, dtype, dilation=1):
        self.batch, self.dim, self.seqlen = x.shape
        self.width, self.dtype = width, dtype
        self.history = (width - 1) * dilation
        # By tap: the places in padded of the inputs that it meets.
        self.places = [slice(k * dilation, k * dilation + self.seqlen) for k in range(width)]
        self.ids = seq_idx if self.seqlen > 0 else None
        if self.ids is not None:
            before = self.ids[:, :1].expand(-1, self.history)
            ids = torch.cat([before, self.ids], dim=-1)
            self.is_padding = self.ids[:, None, :] < 0
            self.ignored = [  # by tap: where it does not count
                (ids[:, None, place] != self.ids[:, None, :]) | self.is_padding
                for place in self.places
            ]

    def pad(self, x, initial_states):
        if initial_states is None:
            initial_states = x.new_zeros(self.batch, self.dim, self.history)
        return torch.cat([initial_states.to(self.dtype), x.to(self.dtype)], dim=-1)

    def split(self, padded):
        """x, and the initial states."""
        states, x = padded.tensor_split([self.history], dim=2)
        return x, states

    def outputs(self, values):
        """values, of out's shape, and 0 where out is padding."""
        return values if self.ids is None else values.masked_fill(self.is_padding, 0)

    def taps(self, padded):
        """For each tap the input that it meets at each output."""
        parts = [padded[:, :, place] for place in self.places]
        if self.ids is None:
            return parts
        return [part.masked_fill(self.ignored[k], 0) for k, part in enumerate(parts)]

    def convolve(self, taps, weight, bias=None):
        total = 0 if bias is None else bias[..., None]
        for k, tap in enumerate(taps):
            total = total + weight[..., k, None] * tap
        return total

    def correlate(self, dz, weight):
        """The gradient of padded, from dz: the transpose of convolve over its inputs."""
        total = 0
        for k, place in enumerate(self.places):
            part = weight[..., k, None] * dz
            if self.ids is not None:
                part = part.masked_fill(self.ignored[k], 0)
            total = total + F.pad(part, (place.start, self.history - place.start))
        return total

    def accumulate(self, dz, taps):
        """The gradient of each row's weight, from dz: the transpose of convolve over its weight."""
        return torch.stack([(dz * tap).sum(2) for tap in taps], dim=2)

    def _kept(self):
        """The position in padded of each final state, and a mask of the positions that count."""
        position = torch.arange(self.history, device=self.ids.device)
        time = torch.arange(1, self.seqlen + 1, device=self.ids.device)
        end = torch.where(self.ids >= 0, time, 0).amax(-1)  # after the last that is no padding
        index = (end[:, None] + position)[:, None, :].expand(-1, self.dim, -1)
        before = (end == 0) | (self.ids[:, 0] >= 0)
        before = before[:, None].expand(-1, self.history)
        return index, torch.cat([before, self.ids >= 0], dim=-1)[:, None, :]

    def final_states(self, padded):
        if self.ids is None:
            return padded[:, :, self.seqlen :]
        index, may_be = self._kept()
        return padded.masked_fill(~may_be, 0).gather(2, index)

    def spread(self, dfinal_states):
        """The gradient of padded, from dfinal_states: the transpose of final_states."""
        if self.ids is None:
            return F.pad(dfinal_states, (self.seqlen, 0))
        index, may_be = self._kept()
        zeros = dfinal_states.new_zeros(self.batch, self.dim, self.history + self.seqlen)
        return zeros.scatter_add(2, index, dfinal_states).masked_fill(~may_be, 0)


def _pre_activation(linear, taps, weight, bias):
    bias = None if bias is None else bias.to(linear.dtype)
    return linear.convolve(taps, weight.to(linear.dtype), bias)


def forward_states(x, weight, bias, seq_idx, initial_states, silu):
    """out, and the final states."""
    linear = Linear(x, weight.shape[-1], seq_idx, compute_dtype(x, weight, bias, initial_states))
    padded = linear.pad(x, initial_states)
    z = _pre_activation(linear, linear.taps(padded), weight, bias)
    out = z * torch.sigmoid(z) if silu else z
    return linear.outputs(out).to(x.dtype), linear.final_states(padded).to(x.dtype)


def forward(x, weight, bias, seq_idx, initial_states, silu):
    """out alone."""
    return forward_states(x, weight, bias, seq_idx, initial_states, silu)[0]


def _slope(z, silu):
    """The activation's first derivative."""
    if not silu:
        return torch.ones_like(z)
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


def _curvature(z, silu):
    """The activation's second derivative."""
    if not silu:
        return torch.zeros_like(z)
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 - sigmoid) * (2 + z * (1 - 2 * sigmoid))


def gradients(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, silu):
    """dx, and each row's dweight, dbias and dinitial_states, in the type that sums have."""
    linear = Linear(x, weight.shape[-1], seq_idx, compute_dtype(x, weight, bias, initial_states))
    taps = linear.taps(linear.pad(x, initial_states))
    dz = linear.outputs(dout.to(linear.dtype))
    if silu:
        z = _pre_activation(linear, taps, weight, bias)
        dz = linear.outputs(dz * _slope(z, silu))
    dpadded = linear.correlate(dz, weight.to(linear.dtype))
    if dfinal_states is not None:
        dpadded = dpadded + linear.spread(dfinal_states.to(linear.dtype))
    dx, dstates = linear.split(dpadded)
    return dx, linear.accumulate(dz, taps), dz.sum(2), dstates


def backward(
    x,
    weight,
    bias,
    dout,
    seq_idx,
    initial_states,
    dfinal_states,
    need_dweight,
    need_dbias,
    need_dinitial_states,
    silu,
):
    """dx, dweight, dbias and dinitial_states, each of size 0 if it is not needed."""
    inputs = (x, weight, bias, dout, seq_idx, initial_states, dfinal_states)
    dx, dweight, dbias, dstates = gradients(*inputs, silu)
    none = x.new_zeros(0)
    return (
        dx.to(x.dtype),
        _like_parameter(dweight, weight) if need_dweight else none,
        _like_parameter(dbias, bias) if need_dbias and bias is not None else none,
        dstates.to((x if initial_states is None else initial_states).dtype)
        if need_dinitial_states
        else none,
    )


def _like_parameter(gradients, parameter):
    """A parameter's gradient from each row's: their sum, unless each row has its own parameter."""
    if gradients.dim() > parameter.dim():
        gradients = gradients.sum(0)
    return gradients.to(parameter.dtype)


def backward_of_backward(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, above, silu
):
    """The gradients of sum(g * r) over the results r of :func:`backward`, g being those above.

    That sum is <dout, the tangent of out> + <dfinal_states, that of the final states>, if x,
    weight, bias and initial_states move by g, so it takes the forward's derivatives alone.

    Args:
        above: (gx, gweight, gbias, ginitial_states), each a tensor or None for zeros.

    Returns:
        The gradients of x, weight, bias, dout, initial_states and dfinal_states; None for what is
        not given.
    """
    width = weight.shape[1]
    linear = Linear(x, width, seq_idx, compute_dtype(x, weight, bias, initial_states))
    weight_ = weight.to(linear.dtype)
    gx, gweight, gbias, gstates = above
    gx = torch.zeros_like(x) if gx is None else gx
    gweight = torch.zeros_like(weight_) if gweight is None else gweight.to(linear.dtype)

    taps = linear.taps(linear.pad(x, initial_states))
    gpadded = linear.pad(gx, gstates)
    gtaps = linear.taps(gpadded)
    z = _pre_activation(linear, taps, weight, bias)
    zt = _pre_activation(linear, gtaps, weight, gbias) + linear.convolve(taps, gweight)
    dout_ = linear.outputs(dout.to(linear.dtype))
    along = linear.outputs(dout_ * _slope(z, silu))  # what reaches zt
    across = linear.outputs(dout_ * _curvature(z, silu) * zt)  # and z, by the slope
    dpadded = linear.correlate(across, weight_) + linear.correlate(along, gweight)
    dweight = linear.accumulate(across, taps) + linear.accumulate(along, gtaps)
    dbias = dstates = dfinal = None
    if bias is not None:
        dbias = _like_parameter(across.sum(2), bias)
    if initial_states is not None:
        dstates = dpadded[:, :, : width - 1].to(initial_states.dtype)
    if dfinal_states is not None:
        dfinal = linear.final_states(gpadded).to(dfinal_states.dtype)
    return (
        dpadded[:, :, width - 1 :].to(x.dtype),
        _like_parameter(dweight, weight),
        dbias,
        linear.outputs(_slope(z, silu) * zt).to(dout.dtype),
        dstates,
        dfinal,
    )


def update(
    x,
    conv_state,
    weight,
    bias,
    silu,
    cache_seqlens,
    conv_state_indices,
    convolve=forward,
    dilation=1,
):
    """out, and conv_state as it is afterwards; conv_state itself stays as it is.

    An index past the last row gives NaN: to raise an error would need a synchronisation. convolve
    takes what :func:`forward` does.
    """
    tokens = x[:, :, None] if x.dim() == 2 else x
    batch, _, seqlen = tokens.shape
    rows, _, state_len = conv_state.shape
    width = weight.shape[1]
    if batch == 0:
        return torch.empty_like(x), conv_state

    history = conv_state
    if conv_state_indices is not None:
        indices = conv_state_indices.long()
        if rows > 0:
            history = conv_state.index_select(0, indices.clamp(0, rows - 1))
        else:
            history = conv_state.new_zeros(batch, *conv_state.shape[1:])

    def rotated(values, start):
        """Position p of the result is position (start + p) mod S of values, by batch entry."""
        position = torch.arange(state_len, device=x.device)
        index = (start[:, None] + position).remainder(max(state_len, 1))
        return values.gather(2, index[:, None, :].expand(values.shape))

    if cache_seqlens is not None:
        head = cache_seqlens.long().remainder(max(state_len, 1))
        history = rotated(history, head)  # the oldest input first
    dtype = compute_dtype(x, conv_state)
    history = history.to(dtype)
    before = history[:, :, state_len - (width - 1) * dilation :]
    out = convolve(tokens, weight, bias, None, before, silu)
    after = torch.cat([history, tokens.to(dtype)], dim=-1)[:, :, seqlen:].to(conv_state.dtype)
    if cache_seqlens is not None:
        after = rotated(after, -(head + seqlen))  # back to the ring's positions
    if conv_state_indices is not None:
        out = out.masked_fill((indices < 0)[:, None, None], 0)
        out = out.masked_fill((indices >= rows)[:, None, None], torch.nan)
        # The last batch entry that each row belongs to, or -1.
        is_row = (indices >= 0) & (indices < rows)
        entries = torch.arange(batch, device=x.device)
        owner = torch.full((rows + 1,), -1, device=x.device)
        owner = owner.scatter_reduce(0, torch.where(is_row, indices, rows), entries, "amax")[:rows]
        after = after.index_select(0, owner.clamp(min=0))
        after = torch.where(owner[:, None, None] >= 0, after, conv_state)
    return out.reshape(x.shape), after


def varlen_states(x, cu_seqlens, state_len):
    bounds = cu_seqlens.long()
    index = bounds[1:, None] - state_len + torch.arange(state_len, device=x.device)
    is_before = index < bounds[:-1, None]
    if x.shape[0] == 0:
        return x.new_zeros(len(bounds) - 1, x.shape[1], state_len)
    taken = x[index.clamp(0, x.shape[0] - 1)]  # (batch, state_len, dim)
    return taken.masked_fill(is_before[:, :, None], 0).transpose(1, 2)


def operations(checks: dict) -> dict:
    """The operations of ``_operators.py`` by name, each with the check of its arguments first."""

    def write(targets, results):
        for target, result in zip(targets, results, strict=True):
            if target is not None:
                target.copy_(result)

    def write_forward(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu):
        results = forward_states(x, weight, bias, seq_idx, initial_states, silu)
        write((out, final_states_out), results)

    def write_backward(*args):
        inputs, outputs, silu = args[:7], args[7:11], args[11]
        dx, dweight, dbias, dstates = gradients(*inputs, silu)
        write(outputs, (dx, dweight.sum(0), dbias.sum(0), dstates))

    def write_update(x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices):
        results = update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
        write((out, conv_state), results)

    def write_varlen_states(x, cu_seqlens, states):
        states.copy_(varlen_states(x, cu_seqlens, states.shape[2]))

    functions = {
        "forward": write_forward,
        "backward": write_backward,
        "update": write_update,
        "varlen_states": write_varlen_states,
    }

    return after_checks(functions, checks)


def after_checks(functions: dict, checks: dict) -> dict:
    """The operations by name, each with the check of its arguments first."""

    def checked(operation):
        function, check = functions[operation], checks[operation]

        def run(*args):
            check(args)
            # Inference mode allows writing to every tensor; telling_torch has refused what is not.
            with torch.inference_mode():
                function(*args)

        return run

    return {operation: checked(operation) for operation in functions}
