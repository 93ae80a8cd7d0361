"""The convolution with options, as ``causal_conv1d_fn`` and ``causal_conv1d_varlen_fn`` call it."""

from __future__ import annotations

import torch

from . import (
    _library,  # noqa: F401  registers the operators
    _onnx,
    _options_plain,
    _split,
)
from ._arguments import check_final_states_out, check_tensors
from ._dispatch import is_transformed
from ._ops import ops as _ops
from ._options_autograd import ConvForward

_conv_forward = _ops.conv_forward.plain._op  # without a Python function around it


def convolve(caller: str, tensors: dict, dilation, silu: bool, split_sizes, states_out, states):
    """out or, with split_sizes, its parts; with states the tuple of that and the final states.

    Args:
        caller: the public function, for errors.
        tensors: the tensors of conv_forward by name, in its order.
        states_out: a tensor to write the final states to, or None.
        states: whether final states are wanted.
    """
    values = list(tensors.values())
    x = values[0]
    states = bool(states)
    try:
        if states_out is not None and values[5] is not None:
            values[5] = _apart_from(values[5], states_out, x)
        args = (*values, dilation, states, silu)
        if split_sizes is not None:
            found = _split_outputs(args, [int(size) for size in split_sizes])
        elif is_transformed(x):
            _check(caller, tensors)
            if _onnx.is_exporting():
                if tensors["cu_seqlens"] is not None:
                    raise RuntimeError(f"{caller}: cu_seqlens must not be given to an ONNX export")
                found = _options_plain.conv_forward(*args)
            else:
                found = _ops.conv_forward.default(*args)
        elif _needs_grad(values):
            found = ConvForward.apply(_conv_forward, *args)  # type: ignore[attr-defined]
        else:
            found = _conv_forward(*args)
    except Exception:
        _check(caller, tensors)
        raise
    out, final_states = found
    if not states:
        return out
    if states_out is not None:
        check_final_states_out(states_out, final_states, x)
        final_states = states_out.copy_(final_states)
    return out, final_states


def _needs_grad(values) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(value is not None and value.requires_grad for value in values)


def _apart_from(initial_states, states_out, x):
    """initial_states, which the backward needs, although states_out is written."""
    if is_transformed(x):
        return _ops.keep.default(initial_states)
    memory = initial_states.untyped_storage().data_ptr()
    is_shared = states_out.untyped_storage().data_ptr() == memory
    return initial_states.clone() if is_shared else initial_states


def _split_outputs(args, sizes):
    """The parts of out, and the final states or None."""
    if is_transformed(args[0]):
        found = _ops.split_forward.default(*args, sizes)
    elif _needs_grad(args[:9]):
        found = _split.SplitForward.apply(_split.forward, *args, sizes)  # type: ignore[attr-defined]
    else:
        found = _split.forward(*args, sizes)
    return tuple(found[: len(sizes)]), found[-1]


def _check(caller, tensors):
    required = {name: tensors[name] for name in ("x", "weight")}
    optional = {name: value for name, value in tensors.items() if name not in required}
    check_tensors(caller, required, optional)
