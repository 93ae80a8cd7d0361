"""Batching rules for ``torch.vmap``: one call of an operator for all that is mapped.

The mapped dimension is folded into the batch, or into the channels where weight or bias are mapped
or their gradients are wanted for each of its entries. seq_idx has no channels, so if both are
mapped, torch's own operations compute, mapped by their own rules.
"""

from __future__ import annotations

import torch

from causal_conv1d import _plain

_ops = torch.ops.causal_conv1d


class _Folding:
    """The dimension that is mapped, of a given size, as a part of the batch or of the channels."""

    def __init__(self, size: int, into_channels: bool):
        self.size, self.into_channels = size, into_channels

    def _first(self, tensor, dim):
        if dim is None:
            return tensor.expand(self.size, *tensor.shape)
        return tensor.movedim(dim, 0)

    def batched(self, tensor, dim):
        """Of a tensor (batch, dim, ...)."""
        if tensor is None:
            return None
        tensor = self._first(tensor, dim)
        if self.into_channels:
            return tensor.movedim(0, 1).flatten(1, 2)
        return tensor.flatten(0, 1)

    def rows(self, tensor, dim):
        """Of a tensor (batch, ...) without channels."""
        if tensor is None or self.into_channels:
            return tensor
        return self._first(tensor, dim).flatten(0, 1)

    def parameters(self, tensor, dim):
        """Of a tensor (dim, ...)."""
        if tensor is None or not self.into_channels:
            return tensor
        return self._first(tensor, dim).flatten(0, 1)

    def unfold(self, tensor, is_parameter=False):
        """The result with the mapped dimension in its place, and where that is."""
        place = 1 if self.into_channels and not is_parameter else 0
        return tensor.unflatten(place, (self.size, tensor.shape[place] // self.size)), place


def _by_torch(function, in_dims, args):
    """function, made of torch's operations, over the mapped tensors."""
    return torch.vmap(function, in_dims=tuple(in_dims), out_dims=0)(*args)


def _forward(operator, plain):
    def rule(info, in_dims, x, weight, bias, seq_idx, initial_states, silu):
        x_dim, weight_dim, bias_dim, ids_dim, states_dim = in_dims[:5]
        fold = _Folding(info.batch_size, weight_dim is not None or bias_dim is not None)
        if fold.into_channels and ids_dim is not None:
            args = (x, weight, bias, seq_idx, initial_states)
            found = _by_torch(lambda *mapped: plain(*mapped, silu), in_dims[:5], args)
            return found, (0, 0) if isinstance(found, tuple) else 0
        found = operator(
            fold.batched(x, x_dim),
            fold.parameters(weight, weight_dim),
            fold.parameters(bias, bias_dim),
            fold.rows(seq_idx, ids_dim),
            fold.batched(initial_states, states_dim),
            silu,
        )
        if not isinstance(found, (tuple, list)):
            return fold.unfold(found)
        (out, place), (states, _) = (fold.unfold(tensor) for tensor in found)
        return (out, states), (place, place)

    return rule


def _backward(info, in_dims, x, weight, bias, dout, seq_idx, initial_states, dfinal_states, *rest):
    *needs, silu = rest
    x_dim, weight_dim, bias_dim, dout_dim, ids_dim, states_dim, dfinal_dim = in_dims[:7]
    for_each = weight_dim is not None or bias_dim is not None or needs[0] or needs[1]
    fold = _Folding(info.batch_size, for_each)
    kept = (True, needs[0], needs[1] and bias is not None, needs[2])
    if fold.into_channels and ids_dim is not None:
        args = (x, weight, bias, dout, seq_idx, initial_states, dfinal_states)
        found = _by_torch(lambda *mapped: _plain.backward(*mapped, *rest), in_dims[:7], args)
        return found, (0, 0, 0, 0)
    found = _ops.backward.default(
        fold.batched(x, x_dim),
        fold.parameters(weight, weight_dim),
        fold.parameters(bias, bias_dim),
        fold.batched(dout, dout_dim),
        fold.rows(seq_idx, ids_dim),
        fold.batched(initial_states, states_dim),
        fold.batched(dfinal_states, dfinal_dim),
        *needs,
        silu,
    )
    results = []
    for i, (tensor, keep) in enumerate(zip(found, kept, strict=True)):
        results.append(fold.unfold(tensor, is_parameter=i in (1, 2)) if keep else (tensor, None))
    tensors, places = zip(*results, strict=True)
    return tensors, places


def _update(info, in_dims, x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    x_dim, state_dim, weight_dim, bias_dim, _, lens_dim, indices_dim = in_dims
    if state_dim is None:
        raise RuntimeError(
            "causal_conv1d_update: vmap must map conv_state too, as it is changed in place"
        )
    fold = _Folding(info.batch_size, weight_dim is not None or bias_dim is not None)
    state = conv_state.movedim(state_dim, 0)
    if fold.into_channels and (lens_dim is not None or indices_dim is not None):
        dims = (x_dim, 0, weight_dim, bias_dim, lens_dim, indices_dim)
        args = (x, state, weight, bias, cache_seqlens, conv_state_indices)
        out, after = _by_torch(
            lambda x, s, w, b, lens, rows: _plain.update(x, s, w, b, silu, lens, rows), dims, args
        )
        state.copy_(after)
        return out, 0
    tokens = fold.batched(x, x_dim)
    indices = fold.rows(conv_state_indices, indices_dim)
    if indices is not None and not fold.into_channels:
        # Rows of the entries' own states, and what is out of range stays so.
        rows, size = state.shape[1], info.batch_size
        entry = torch.arange(size, device=x.device).repeat_interleave(tokens.shape[0] // size)
        own = torch.where(indices < rows, indices + entry * rows, size * rows)
        indices = torch.where(indices < 0, -1, own)
    folded = fold.batched(state, 0)
    out = _ops.update.default(
        tokens,
        folded,
        fold.parameters(weight, weight_dim),
        fold.parameters(bias, bias_dim),
        silu,
        fold.rows(cache_seqlens, lens_dim),
        indices,
    )
    after, place = fold.unfold(folded)
    state.copy_(after.movedim(place, 0))  # the folded state may be a copy
    return fold.unfold(out)


def _varlen_states(info, in_dims, x, cu_seqlens, state_len):
    if in_dims[1] is not None:
        found = _by_torch(
            lambda x, bounds: _plain.varlen_states(x, bounds, state_len), in_dims[:2], (x, cu_seqlens)
        )
        return found, 0
    fold = _Folding(info.batch_size, into_channels=True)
    return fold.unfold(_ops.varlen_states.default(fold.batched(x, in_dims[0]), cu_seqlens, state_len))


def register(loaded) -> None:
    rules = {
        "forward": _forward(_ops.forward.default, _plain.forward),
        "forward_states": _forward(_ops.forward_states.default, _plain.forward_states),
        "backward": _backward,
        "update": _update,
        "varlen_states": _varlen_states,
    }
    library = torch.library.Library("causal_conv1d", "FRAGMENT")
    for name, rule in rules.items():
        torch.library.register_vmap(f"causal_conv1d::{name}", rule, lib=library)
    loaded.registrations.append(library)
