"""``causal_conv1d_cp``: the convolution of a sequence whose steps lie on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo

from .. import _fake
from .._arguments import check_tensors, is_silu
from .compute import Call, Gradients, forward
from .exchange import sum_over_ranks
from .final_states import collect, ends_of_rows
from .groups import agree, dtype_number, find_group
from .parts import check_bounds, make_parts
from .sequences import Packed, Rows

CALLER = "causal_conv1d_cp"


def _results(call, group, x, weight, bias, seq_idx, cu_seqlens, initial_states):
    """out, the final states or None, and what the backward needs besides the arguments."""
    if cu_seqlens is None:
        rows = Rows(call, seq_idx, initial_states)
    else:
        rows = Packed(call, cu_seqlens, initial_states)
    out, before = forward(call, group, x, weight, bias, rows)
    final = ends = None
    if call.final:
        if seq_idx is not None:
            ends = ends_of_rows(call, group, seq_idx)
        args = (x, seq_idx, cu_seqlens, ends, initial_states)
        final = collect(call, group, *args)
    return out, final, (rows.ids, ends, *before)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, group, *tensors):
        out, final, kept = _results(call, group, *tensors)
        ctx.call, ctx.group = call, group
        ctx.save_for_backward(*tensors, *kept)
        return (out, final) if call.final else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dfinal=None):
        call, group = ctx.call, ctx.group
        x, weight, bias, seq_idx, cu_seqlens, states, ids, ends, *before = ctx.saved_tensors
        if dfinal is not None:
            dfinal = sum_over_ranks(dfinal, group)
        if cu_seqlens is None:
            rows = Rows(call, seq_idx, states, dfinal, ends)
        else:
            rows = Packed(call, cu_seqlens, states, dfinal, ids)
        parameters = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        found = Gradients(call, x, weight, bias, rows, parameters).run(group, dout, before)
        dweight = _share(found.dweight, weight) if ctx.needs_input_grad[3] else None
        dbias = _share(found.dbias, bias) if ctx.needs_input_grad[4] else None
        dstates = rows.dinitial_states() if ctx.needs_input_grad[7] else None
        return None, None, found.dx, dweight, dbias, None, None, dstates


def _share(gradient, tensor):
    return torch.zeros_like(tensor) if gradient is None else gradient.to(tensor.dtype)


def _checked(x, weight, bias, seq_idx, cu_seqlens, initial_states, dilation):
    """Raises for arguments that do not fit this rank's x."""
    optional = {"bias": bias, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    optional["initial_states"] = initial_states
    check_tensors(CALLER, {"x": x, "weight": weight}, optional)
    if not isinstance(dilation, int):
        raise TypeError(f"{CALLER}: dilation must be an int, got {dilation!r}")
    _fake.check("conv_forward", {"x": x, "weight": weight, **optional}, dilation, CALLER)


def _form(tensors, lengths, *others):
    """All that a call is checked for and divided by, or None where that needs values or fails."""
    forms = []
    for tensor in tensors:
        if tensor is None:
            forms.append(None)
        elif isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
            forms.append((tensor.shape, tensor.dtype, tensor.device))
        else:
            return None
    cu_seqlens = tensors[4]
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        return None
    try:
        form = (CALLER, *forms, None if lengths is None else tuple(lengths), *others)
        hash(form)
    except TypeError:
        return None
    return form


def _numbers(call: Call, tensors, lengths, layout):
    """By _AGREED."""
    x, weight, bias, seq_idx, cu_seqlens, initial_states = tensors
    return [
        *x.shape[:2],
        weight.shape[1],
        dtype_number(x),
        dtype_number(weight),
        int(bias is not None),
        int(call.silu),
        call.dilation,
        x.shape[2] if lengths is None else -1,
        0 if lengths is None else hash(tuple(map(int, lengths))),
        int(layout == "zigzag"),
        dtype_number(seq_idx),
        -1 if cu_seqlens is None else cu_seqlens.shape[0],
        dtype_number(initial_states),
        int(call.final),
        int(call.recorded),
    ]


# What must be the same on every rank, and whether it is a number to show.
_AGREED = {
    "the batch": True,
    "dim": True,
    "the width": True,
    "the dtype of x": False,
    "the dtype of weight": False,
    "whether bias is given": False,
    "activation": False,
    "dilation": True,
    "the length of a shard, unless lengths is given,": True,
    "lengths": False,
    "layout": False,
    "the dtype of seq_idx": False,
    "the size of cu_seqlens": True,
    "the dtype of initial_states": False,
    "return_final_states": False,
    "whether gradients are wanted": False,
}


@_disable_dynamo
def causal_conv1d_cp(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    group: Any = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    layout: str = "contiguous",
    *,
    lengths: Sequence[int] | None = None,
    dilation: int = 1,
    check: bool | None = None,
) -> Any:
    """:func:`causal_conv1d_fn` of a sequence whose steps lie on several ranks; differentiable.

    Each rank calls it with its own shard. The results are the shards of what one process would
    have, out and dx to the last bit; the gradients of weight, bias and initial_states are this
    rank's share, and their sum over the ranks is the whole: the caller reduces them, as FSDP and
    DDP do. Every rank must run the backward, too.

    Args:
        x: (batch, dim, length), this rank's shard, on the CPU or a CUDA device.
        weight: (dim, width), the same on every rank.
        bias: (dim,) or None.
        activation: None, "silu" or "swish".
        group: the process group, or a DeviceMesh of one dimension; None is the default group.
        seq_idx: (batch, length) int32 or int64, or None: this rank's shard of the ids. Those of one
            sequence are side by side, over all ranks.
        cu_seqlens: (sequences + 1,) int32 or int64, or None: the boundaries of the sequences that
            all ranks together hold in a batch of 1. Steps after the last boundary are padding:
            their outputs are 0.
        initial_states: (batch or sequences, dim, (width - 1) * dilation) or None: the inputs before
            the whole, or before each sequence of cu_seqlens, given on every rank. Their gradient is
            on the rank of the first step, else 0.
        return_final_states: also return the last (width - 1) * dilation inputs of the whole, with
            cu_seqlens of each sequence. Every rank gets all of them, and gradients that reach them
            on several ranks are added.
        layout: "contiguous": rank r of n holds part r of n. "zigzag": it holds parts r and
            2n - 1 - r of 2n, one after the other.
        lengths: the lengths of all parts in the order of the sequence, ints; any may be 0. None:
            all are equal. :func:`gather_lengths` asks the ranks for them.
        dilation: the distance of the taps.
        check: whether ranks compare their arguments first, so that a difference, or an error on one
            of them, is an error on each; hosts exchange a few integers for it, and wait for no
            GPU. None: of each call on CPU tensors, of the first call of a kind on others. The
            group's timeout holds for all else.

    Returns:
        out, (batch, dim, length); with ``return_final_states`` the tuple (out, final_states), the
        latter (batch or sequences, dim, (width - 1) * dilation) in x's dtype.

    Raises:
        RuntimeError, ValueError: an argument that does not fit, or differs between ranks; the
            message names it.
        TypeError: an argument of another type.
        NotImplementedError: another activation.
    """
    group = find_group(CALLER, group)
    tensors = (x, weight, bias, seq_idx, cu_seqlens, initial_states)
    final = bool(return_final_states)
    recorded = torch.is_grad_enabled() and any(
        isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors
    )

    def prepare():
        _checked(*tensors, dilation)
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        parts = make_parts(CALLER, layout, x.shape[2], lengths, rank, ranks)
        if cu_seqlens is not None:
            check_bounds(CALLER, cu_seqlens, parts.total, padding=True)
        halo = (weight.shape[1] - 1) * dilation
        ways = parts.before(halo), parts.after(halo)
        call = Call(parts, is_silu(activation), dilation, halo, final, recorded, *ways)
        return call, _numbers(call, tensors, lengths, layout)

    form = _form(tensors, lengths, activation, layout, dilation, final, recorded)
    call = agree(CALLER, group, x, check, _AGREED, form, prepare)
    if recorded:
        return _Convolution.apply(call, group, *tensors)
    out, final_states, _ = _results(call, group, *tensors)
    return (out, final_states) if call.final else out
