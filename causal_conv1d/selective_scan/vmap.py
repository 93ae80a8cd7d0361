"""Batching rules of the selective scan's operators for ``torch.vmap``.

The mapped dimension becomes a part of the channels, or of the heads, which all have their own
parameters. Where index tensors are mapped, one call is made for each entry.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .._ops import NAMESPACE, add_op_namespace_prefix
from .._ops import ops as _ops
from .operators import HEADS, INPUTS, is_needed

# The dimension of channels of a scan's arguments by their place; B and C may be (dim, dstate).
_CHANNELS = {0: 1, 1: 1, 2: 0, 5: 0, 6: 1, 7: 0, 8: 1, 11: 1, 12: 1}


def _folded(tensor, dim, size, place):
    """The mapped dimension, in front of the one at place of each entry, as a part of it."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, place).flatten(place, place + 1)


def _dims(tensor, dim):
    """Of each entry."""
    return tensor.dim() - (dim is not None)


def _channels_of(i, tensor, dim):
    if i in (3, 4):  # B and C
        return 0 if _dims(tensor, dim) == 2 else 1
    return _CHANNELS[i]


def _one_by_one(operator, size, in_dims, args):
    """The results of a call for each entry, stacked."""
    entries = []
    for k in range(size):
        entry = (a if d is None else a.select(d, k) for a, d in zip(args, in_dims, strict=True))
        entries.append(operator(*entry))
    if isinstance(entries[0], torch.Tensor):
        return torch.stack(entries), 0
    found = tuple(torch.stack(tensors) for tensors in zip(*entries, strict=True))
    return found, (0,) * len(found)


def _fold_inputs(size, in_dims, args):
    """The arguments of a scan, without what follows its tensors."""
    folded = []
    for i, (tensor, dim) in enumerate(zip(args, in_dims, strict=True)):
        if i in (9, 10) or tensor is None:  # cu_seqlens and the flag
            folded.append(tensor)
        else:
            folded.append(_folded(tensor, dim, size, _channels_of(i, tensor, dim)))
    return folded


def _split(tensor, size, place):
    """A folded dimension as the mapped one, in its place, and each entry's own."""
    return tensor.unflatten(place, (size, tensor.shape[place] // max(size, 1)))


def _scan_forward(info, in_dims, *args):
    size, operator = info.batch_size, _ops.scan_forward.default
    if in_dims[9] is not None:
        return _one_by_one(operator, size, in_dims, args)
    *inputs, need_last_states = args
    out, last = operator(*_fold_inputs(size, in_dims[:INPUTS], inputs), need_last_states)
    if not need_last_states:
        return (_split(out, size, 1), last), (1, None)
    return (_split(out, size, 1), _split(last, size, 1)), (1, 1)


def _scan_backward(info, in_dims, *args):
    size, operator = info.batch_size, _ops.scan_backward.default
    if in_dims[9] is not None:
        return _one_by_one(operator, size, in_dims, args)
    *tensors, needed = args
    found = operator(*_fold_inputs(size, in_dims[:-1], tensors), needed)
    results, places = [], []
    for i, gradient in enumerate(found):
        place = None
        if is_needed(args[i], needed, i):
            place = _channels_of(i, args[i], in_dims[i])
            gradient = _split(gradient, size, place)
        results.append(gradient)
        places.append(place)
    return tuple(results), tuple(places)


def _state_update(info, in_dims, *args):
    size, operator = info.batch_size, _ops.state_update.default
    *tensors, indices, dt_softplus = args
    if in_dims[0] is None:
        raise RuntimeError(
            "selective_state_update: vmap must map state too, as it is changed in place"
        )
    if in_dims[9] is not None:
        return _one_by_one(operator, size, in_dims, args)
    folded = []
    for (dims, place), tensor, dim in zip(HEADS.values(), tensors, in_dims, strict=False):
        if tensor is not None and _dims(tensor, dim) == dims - 1:
            tensor = tensor.unsqueeze(place) if dim is None else tensor.movedim(dim, 0)
            if dim is not None:
                tensor, dim = tensor.unsqueeze(place + 1), 0
        folded.append(_folded(tensor, dim, size, place))
    out = _split(operator(*folded, indices, dt_softplus), size, 1)
    if not torch._C._is_alias_of(folded[0], tensors[0]):  # then it is a copy
        after = _split(folded[0], size, 1)
        state = tensors[0].movedim(in_dims[0], 1)
        state.copy_(after if state.dim() == 5 else after.squeeze(2))
    return out if _dims(tensors[1], in_dims[1]) == 3 else out.squeeze(2), 1


def _also_of_none(rule):
    """The rule, where there may be no entries: results of one entry of zeros, less that entry."""

    def run(info, in_dims, *args):
        if info.batch_size > 0:
            return rule(info, in_dims, *args)
        one = []
        for tensor, dim in zip(args, in_dims, strict=True):
            if dim is not None:
                shape = list(tensor.shape)
                shape[dim] = 1
                tensor = tensor.new_zeros(shape)
            one.append(tensor)
        found, dims = rule(SimpleNamespace(batch_size=1), in_dims, *one)
        if isinstance(found, torch.Tensor):
            return found.narrow(dims, 0, 0), dims
        kept = (
            result if dim is None else result.narrow(dim, 0, 0)
            for result, dim in zip(found, dims, strict=True)
        )
        return tuple(kept), dims

    return run


def register(loaded) -> None:
    rules = {
        "scan_forward": _also_of_none(_scan_forward),
        "scan_backward": _also_of_none(_scan_backward),
        "state_update": _also_of_none(_state_update),
    }
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, rule in rules.items():
        torch.library.register_vmap(add_op_namespace_prefix(name), rule, lib=library)
    loaded.registrations.append(library)
