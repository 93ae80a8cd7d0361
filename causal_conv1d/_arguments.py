"""Checks of the public functions, where torch's own error would not say what is wanted."""

from __future__ import annotations

import torch


def is_silu(activation) -> bool:
    if activation is None:
        return False
    if isinstance(activation, str) and activation in ("silu", "swish"):
        return True
    raise NotImplementedError(f"activation must be None, silu, or swish, got {activation!r}")


def check_tensors(caller: str, required: dict, optional: dict) -> None:
    """Raises TypeError for the first argument, by name, that is no tensor with strides."""
    for name, value in {**required, **optional}.items():
        if value is None and name in optional:
            continue
        if isinstance(value, torch.Tensor):
            if value.layout is torch.strided and not (value.is_nested or value.is_quantized):
                continue
            kind = (
                value.layout if value.layout is not torch.strided else "a nested or quantized one"
            )
            raise TypeError(f"{caller}: {name} must be a strided tensor, got {kind}") from None
        wanted = "a tensor" if name in required else "a tensor or None"
        kind = "None" if value is None else type(value).__name__
        raise TypeError(f"{caller}: {name} must be {wanted}, got {kind}") from None


def check_final_states_out(final_states_out, final_states, x) -> None:
    """Raises RuntimeError, as the operator that writes it does, for one that does not fit."""
    got, want = final_states_out, final_states
    if got.shape != want.shape:
        text = f"(batch, dim, width - 1) = {tuple(want.shape)}, got {tuple(got.shape)}"
    elif not got.is_floating_point():
        text = f"a float type, got {str(got.dtype).removeprefix('torch.')}"
    elif (got.dtype == torch.float64) != (x.dtype == torch.float64):
        text = f"float64 if and only if x is, got {str(got.dtype).removeprefix('torch.')}"
    elif _may_overlap_itself(got):
        text = "a tensor whose elements do not overlap"
    elif got.device != x.device:
        text = f"on x's device {x.device}, got {got.device}"
    else:
        return
    raise RuntimeError(f"causal_conv1d_fn: final_states_out must be {text}")


def _may_overlap_itself(tensor) -> bool:
    """Whether the stride of a dimension is within the span of those with smaller strides."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def refuse_to_write(caller: str, **tensors) -> None:
    """Raises RuntimeError for a tensor, by name, that requires grad and would be written."""
    check_tensors(caller, {}, tensors)
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{caller}: {name} requires grad and would be changed in place, which has no "
                f"derivative here: give {name}.detach(), or use torch.no_grad()"
            )
