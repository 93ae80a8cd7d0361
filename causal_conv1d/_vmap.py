"""Batching rules for ``torch.vmap``: one call of an operator for all that is mapped.

The mapped dimension is folded into the batch, or into the channels where weight or bias are mapped
or their gradients are wanted for each of its entries. seq_idx has no channels, so if both are
mapped, torch's own operations compute, mapped by their own rules.
"""

from __future__ import annotations

import torch

from . import _plain
from ._ops import NAMESPACE, add_op_namespace_prefix
from ._ops import ops as _ops
from ._options import GRADIENT_OF, TENSORS, needs


class _Folding:
    """The dimension that is mapped, of a given size, as a part of the batch or of the channels.

    x, mapped over its dimension x_dim if that is not None, is (batch, dim, ...). for_each_row: each
    row gets parameters of its own, for torch's operations.
    """

    def __init__(self, size: int, into_channels: bool, x, x_dim, for_each_row=False):
        self.size, self.into_channels, self.for_each_row = size, into_channels, for_each_row
        shape = list(x.shape)
        if x_dim is not None:
            del shape[x_dim]
        self.batch, self.dim = shape[:2]

    def _first(self, tensor, dim):
        if dim is None:
            return tensor.expand(self.size, *tensor.shape)
        return tensor.movedim(dim, 0)

    def batched(self, tensor, dim):
        """Folds a tensor (batch, dim, ...)."""
        if tensor is None:
            return None
        tensor = self._first(tensor, dim)
        if self.into_channels:
            return tensor.movedim(0, 1).flatten(1, 2)
        return tensor.flatten(0, 1)

    def rows(self, tensor, dim):
        """Folds a tensor (batch, ...) without channels."""
        if tensor is None or self.into_channels:
            return tensor
        return self._first(tensor, dim).flatten(0, 1)

    def parameters(self, tensor, dim):
        """Folds a tensor (dim, ...)."""
        if tensor is None or not (self.into_channels or self.for_each_row):
            return tensor
        tensor = self._first(tensor, dim)
        if self.into_channels:
            return tensor.flatten(0, 1)
        return tensor.repeat_interleave(self.batch, 0)

    def unfold(self, tensor, is_parameter=False):
        """The result with the mapped dimension in its place, and where that is."""
        if is_parameter and self.for_each_row:
            return tensor.unflatten(0, (self.size, self.batch)).sum(1), 0
        place = 1 if self.into_channels and not is_parameter else 0
        own = self.dim if self.into_channels or is_parameter else self.batch
        return tensor.unflatten(place, (self.size, own)), place


def _forward(operator, plain):
    def rule(info, in_dims, x, weight, bias, seq_idx, initial_states, silu):
        x_dim, weight_dim, bias_dim, ids_dim, states_dim = in_dims[:5]
        fold = _Folding(info.batch_size, weight_dim is not None or bias_dim is not None, x, x_dim)
        call = operator
        if fold.into_channels and ids_dim is not None:
            fold, call = _Folding(info.batch_size, False, x, x_dim, for_each_row=True), plain
        found = call(
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
    fold = _Folding(info.batch_size, for_each, x, x_dim)
    kept = (True, needs[0], needs[1] and bias is not None, needs[2])
    call = _ops.backward.default
    if fold.into_channels and ids_dim is not None:
        fold = _Folding(info.batch_size, False, x, x_dim, for_each_row=True)
        call = _plain.backward
    found = call(
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


def _one_by_one(operator, size, in_dims, args):
    """A call of the operator for each entry, where they do not fold into one."""
    if size == 0:
        raise RuntimeError("causal_conv1d_fn: vmap over no entries cannot map its sequences' ids")
    found = [
        operator(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])


def conv_forward(info, in_dims, *args):
    """A row of packed sequences stays one: what is mapped then joins the channels."""
    tensors, (dilation, return_final_states, silu) = args[:TENSORS], args[TENSORS:]
    x, weight, bias, seq_idx, cu_seqlens, *others = tensors
    x_dim, weight_dim, bias_dim, ids_dim, bounds_dim, *other_dims = in_dims[:TENSORS]
    into_channels = weight_dim is not None or bias_dim is not None or cu_seqlens is not None
    if bounds_dim is not None or (into_channels and ids_dim is not None):
        return _one_by_one(_ops.conv_forward.default, info.batch_size, in_dims, args)
    fold = _Folding(info.batch_size, into_channels, x, x_dim)
    out, states = _ops.conv_forward.default(
        fold.batched(x, x_dim),
        fold.parameters(weight, weight_dim),
        fold.parameters(bias, bias_dim),
        fold.rows(seq_idx, ids_dim),
        cu_seqlens,
        *(fold.batched(tensor, dim) for tensor, dim in zip(others, other_dims, strict=True)),
        dilation,
        return_final_states,
        silu,
    )
    out, place = fold.unfold(out)
    if not return_final_states:
        return (out, states), (place, None)
    return (out, fold.unfold(states)[0]), (place, place)


def _conv_backward(info, in_dims, *args):
    x, weight, bias, dout, seq_idx, cu_seqlens, *others = args[:10]
    x_dim, weight_dim, bias_dim, dout_dim, ids_dim, bounds_dim, *other_dims = in_dims[:10]
    needed = args[12]
    for_each = weight_dim is not None or bias_dim is not None or bool(needed & 0b110)
    into_channels = for_each or cu_seqlens is not None
    if bounds_dim is not None or (into_channels and ids_dim is not None):
        return _one_by_one(_ops.conv_backward.default, info.batch_size, in_dims, args)
    fold = _Folding(info.batch_size, into_channels, x, x_dim)
    found = _ops.conv_backward.default(
        fold.batched(x, x_dim),
        fold.parameters(weight, weight_dim),
        fold.parameters(bias, bias_dim),
        fold.batched(dout, dout_dim),
        fold.rows(seq_idx, ids_dim),
        cu_seqlens,
        *(fold.batched(tensor, dim) for tensor, dim in zip(others, other_dims, strict=True)),
        *args[10:],
    )
    results = []
    for i, result in enumerate(found):
        kept = needs(needed, i) and (i == 3 or args[GRADIENT_OF[i]] is not None)
        results.append(fold.unfold(result, is_parameter=i in (1, 2)) if kept else (result, None))
    tensors, places = zip(*results, strict=True)
    return tensors, places


def _update(info, in_dims, x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    x_dim, state_dim, weight_dim, bias_dim, _, lens_dim, indices_dim = in_dims
    if state_dim is None:
        raise RuntimeError(
            "causal_conv1d_update: vmap must map conv_state too, as it is changed in place"
        )
    fold = _Folding(info.batch_size, weight_dim is not None or bias_dim is not None, x, x_dim)
    state = conv_state.movedim(state_dim, 0)
    if fold.into_channels and (lens_dim is not None or indices_dim is not None):
        raise RuntimeError(
            "causal_conv1d_update: vmap cannot map cache_seqlens or conv_state_indices together "
            "with weight or bias"
        )
    tokens = fold.batched(x, x_dim)
    indices = fold.rows(conv_state_indices, indices_dim)
    if indices is not None and not fold.into_channels:
        # Rows of the entries' own states, and what is out of range stays so.
        rows, size = state.shape[1], info.batch_size
        entry = torch.arange(size, device=x.device).repeat_interleave(fold.batch)
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
    own = _Folding(info.batch_size, fold.into_channels, conv_state, state_dim)
    after, place = own.unfold(folded)
    state.copy_(after.movedim(place, 0))  # the folded state may be a copy
    return fold.unfold(out)


def _varlen_states(info, in_dims, x, cu_seqlens, state_len):
    x_dim, bounds_dim = in_dims[:2]
    size, operator = info.batch_size, _ops.varlen_states.default
    if bounds_dim is None:
        states = operator(x.movedim(x_dim, 1).flatten(1), cu_seqlens, state_len)
        return states.unflatten(1, (size, x.movedim(x_dim, 0).shape[2])), 1
    # The entries' tokens one after the other. From an entry's last bound to the first of the next
    # is no sequence: its states are left out.
    fold = _Folding(size, False, x, x_dim)
    bounds = cu_seqlens.movedim(bounds_dim, 0).long()
    step = torch.arange(size, device=x.device)[:, None]
    bounds_in_all = (bounds + step * fold.batch).flatten()
    if size == 0:
        bounds_in_all = bounds.new_zeros(1)
    states = operator(fold.batched(x, x_dim), bounds_in_all, state_len)
    batch = bounds.shape[1] - 1
    wanted = step * (batch + 1) + torch.arange(batch, device=x.device)
    return states[wanted], 0


def register(loaded) -> None:
    rules = {
        "forward": _forward(_ops.forward.default, _plain.forward),
        "forward_states": _forward(_ops.forward_states.default, _plain.forward_states),
        "backward": _backward,
        "update": _update,
        "varlen_states": _varlen_states,
        "conv_forward": conv_forward,
        "conv_backward": _conv_backward,
    }
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, rule in rules.items():
        torch.library.register_vmap(add_op_namespace_prefix(name), rule, lib=library)
    loaded.registrations.append(library)
