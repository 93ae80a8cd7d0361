"""``update`` with a dilation: an operator in Python, over conv_forward with states."""

from __future__ import annotations

import torch

from . import _fake, _plain
from ._autograd import update_kernel
from ._ops import NAMESPACE, add_op_namespace_prefix
from ._ops import ops as _ops
from ._torch_ops import ANY_DEVICE

_SCHEMA = (
    "update_dilated(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? cache_seqlens, Tensor? conv_state_indices, int dilation) -> Tensor"
)


def _check(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, dilation):
    tensors = {"x": x, "conv_state": conv_state, "weight": weight, "bias": bias}
    tensors |= {"cache_seqlens": cache_seqlens, "conv_state_indices": conv_state_indices}
    _fake.check("update", tensors, dilation)


def _check_rows(indices, rows):
    """On the CPU; elsewhere the outputs of rows that there are not are NaN."""
    if indices.device.type != "cpu":
        return
    for i, row in enumerate(indices.tolist()):
        if row >= rows:
            text = f"conv_state_indices must be < {rows}, got {row} at {i}"
            raise RuntimeError(f"causal_conv1d_update: {text}")


def _update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, dilation):
    _check(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, dilation)
    if conv_state_indices is not None:
        _check_rows(conv_state_indices, conv_state.shape[0])

    def convolve(tokens, weight, bias, seq_idx, states, silu):
        around = (None, None, None)
        args = (tokens, weight, bias, seq_idx, None, states, *around, dilation, False, silu)
        return _ops.conv_forward.plain(*args)[0]

    rest = (silu, cache_seqlens, conv_state_indices)
    out, after = _plain.update(x, conv_state, weight, bias, *rest, convolve, dilation)
    conv_state.copy_(after)
    return out


def _fake_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, dilation):
    _check(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, dilation)
    return torch.empty_like(x)


def _mapped(info, in_dims, *args):
    raise RuntimeError("causal_conv1d_update: vmap cannot map it with a dilation")


def register(loaded) -> None:
    loaded.define([_SCHEMA])
    loaded.register({"update_dilated": _update}, ANY_DEVICE)
    loaded.register({"update_dilated": update_kernel(_ops.update_dilated.default)}, "Autograd")
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    full = add_op_namespace_prefix("update_dilated")
    torch.library.register_fake(full, _fake_update, lib=library)
    torch.library.register_vmap(full, _mapped, lib=library)
    loaded.registrations.append(library)
