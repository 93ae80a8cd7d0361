"""``causal_conv1d_cp``: the convolution of a sequence whose steps lie on several ranks.

With H = (width - 1) * dilation, the outputs of a part need the H inputs before it, its halo, which
ranks before it send. A part shorter than H lets a halo come from several ranks.

The forward posts its messages, computes each part as if nothing came before it, and then once more
the first H outputs of each part, with the halo as initial states.

The backward gives the bits of the unsharded call. There, dx of a step is one sum over the outputs
that saw it, and a sum that two ranks share would be rounded twice. So no gradient of a halo
travels: each part asks for x and dout of the H steps after it and computes the dx of its own last
H steps as a whole. dweight and dbias are those of the rank's own outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo

from .. import _fake
from .._arguments import check_tensors, is_silu
from . import final_states, local
from .exchange import Halos, agree, dtype_number, find_group, sum_over_ranks
from .parts import Part, Parts, check_bounds, make_parts

CALLER = "causal_conv1d_cp"


@dataclass(frozen=True)
class Call:
    """What a call is about, besides its tensors."""

    parts: Parts
    group: Any
    silu: bool
    dilation: int
    halo: int
    final: bool  # whether the final states are returned


def _ids(seq_idx, where):
    return None if seq_idx is None else seq_idx[:, where]


def _states(call: Call, part: Part, x, seq_idx, initial_states, halo_x, halo_ids):
    """The halo of a part as its initial states, or None if nothing comes before it.

    The sequence itself is preceded by initial_states, which have the id of its first step. With ids
    inputs of another sequence than the part's first step are zero.
    """
    here = halo_x.shape[-1]
    if here == 0:
        return initial_states
    states = halo_x
    if here < call.halo:
        before = states.new_zeros(*states.shape[:-1], call.halo - here)
        if initial_states is not None:
            before = initial_states[..., here:]
        states = torch.cat([before, states], -1)
        if seq_idx is not None:
            first = halo_ids[:, :1].expand(-1, call.halo - here)
            halo_ids = torch.cat([first, halo_ids], -1)
    if seq_idx is None:
        return states
    return states.masked_fill((halo_ids != _ids(seq_idx, part.slice(0, 1)))[:, None], 0)


def _forward(call: Call, x, weight, bias, seq_idx, initial_states):
    """out, and each part's initial states."""
    out = torch.empty_like(x)
    halos = Halos(call.parts, call.parts.before(call.halo), (x, seq_idx), call.group)
    for part in call.parts.mine:
        if part.start == 0 or part.length > call.halo:
            where, states = part.slice(), initial_states if part.start == 0 else None
            args = (weight, bias, _ids(seq_idx, where), states, call.silu, call.dilation)
            local.forward(out[..., where], x[..., where], *args)
    before = {}
    for part, (halo_x, halo_ids) in halos.wait().items():
        states = _states(call, part, x, seq_idx, initial_states, halo_x, halo_ids)
        before[part] = states
        if part.start > 0 and call.halo > 0:
            where = part.slice(0, min(part.length, call.halo))
            args = (weight, bias, _ids(seq_idx, where), states, call.silu, call.dilation)
            local.forward(out[..., where], x[..., where], *args)
    return out, before


class _Gradients:
    """The backward of one call."""

    def __init__(self, call: Call, x, weight, bias, seq_idx, before, parameters):
        self.call, self.x, self.seq_idx, self.before = call, x, seq_idx, before
        self.weight, self.bias, self.parameters = weight, bias, parameters
        self.dx = torch.empty_like(x)
        self.dweight = self.dbias = self.dstates = None

    def run(self, dout, dfinal):
        """dfinal: the gradient of the final states of rows without ids, or None."""
        call = self.call
        needed = call.parts.after(call.halo)
        halos = Halos(call.parts, needed, (self.x, dout, self.seq_idx), call.group)
        for part in call.parts.mine:
            last = dfinal if part.end == call.parts.total else None
            self._part(part, dout[..., part.slice()], last)
        for part, after in halos.wait().items():
            count = after[0].shape[-1]
            if count > 0:
                last = dfinal if part.end + count == call.parts.total else None
                self._tail(part, dout, after, last)
        return self

    def _part(self, part, dout, dfinal):
        """All that needs nothing from ranks after this one."""
        where = part.slice()
        x, ids, states = self.x[..., where], _ids(self.seq_idx, where), self.before[part]
        args = (x, self.weight, self.bias, dout, ids, states, dfinal)
        args = (*args, self.call.silu, self.call.dilation, self.parameters)
        dweight, dbias, dstates = local.backward(self.dx[..., where], *args)
        if part.start == 0:
            self.dstates = dstates
        self.dweight = dweight if self.dweight is None else self.dweight + dweight
        self.dbias = dbias if self.dbias is None else self.dbias + dbias

    def _tail(self, part, dout, after, dfinal):
        """The dx of the last steps, from those after them as well."""
        begin = max(part.length - self.call.halo, 0)
        where = part.slice(begin)
        x_after, dout_after, ids_after = after
        x = torch.cat([self.x[..., where], x_after], -1)
        dout = torch.cat([dout[..., where], dout_after], -1)
        ids = _ids(self.seq_idx, where)
        if ids is not None:
            ids = torch.cat([ids, ids_after], -1)
        dx = torch.empty_like(x)
        args = (x, self.weight, self.bias, dout, ids, self._states_at(part, begin), dfinal)
        args = (*args, self.call.silu, self.call.dilation, False)
        dstates = local.backward(dx, *args)[2]
        self.dx[..., where] = dx[..., : part.length - begin]
        if part.start == 0 and begin == 0:
            self.dstates = dstates

    def _states_at(self, part, begin):
        """The inputs before step begin of a part, those of another sequence zero."""
        states, halo = self.before[part], self.call.halo
        if begin == 0:
            return states
        own = self.x[..., part.slice(max(begin - halo, 0), begin)]
        first = _ids(self.seq_idx, part.slice(begin, begin + 1))
        if first is not None:
            ids = _ids(self.seq_idx, part.slice(max(begin - halo, 0), begin))
            own = own.masked_fill((ids != first)[:, None], 0)
        if begin >= halo:
            return own
        if states is None:
            states = own.new_zeros(*own.shape[:-1], halo)
        older = states[..., begin:]
        if first is not None:
            other = _ids(self.seq_idx, part.slice(0, 1)) != first
            older = older.masked_fill(other[:, None], 0)
        return torch.cat([older, own], -1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, x, weight, bias, seq_idx, initial_states, cu_seqlens):
        out, before = _forward(call, x, weight, bias, seq_idx, initial_states)
        ctx.call, ctx.before = call, list(before)
        places = final = None
        if call.final:
            places = final_states.places(call, x, seq_idx, cu_seqlens)
            final = final_states.collect(call, places, x, seq_idx, initial_states)
        ctx.places = places
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_states, *before.values())
        return (out, final) if call.final else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dfinal=None):
        call = ctx.call
        x, weight, bias, seq_idx, initial_states, *before = ctx.saved_tensors
        before = dict(zip(ctx.before, before, strict=True))
        parameters = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        if dfinal is not None:
            dfinal = sum_over_ranks(dfinal, call.group)
        found = _Gradients(call, x, weight, bias, seq_idx, before, parameters)
        found.run(dout, dfinal if seq_idx is None else None)
        dx, dstates = found.dx, found.dstates
        if dstates is None and initial_states is not None:
            dstates = torch.zeros_like(initial_states)
        if dfinal is not None and initial_states is not None:
            owner = call.parts.first.rank == call.parts.rank
            if owner and (seq_idx is not None or call.parts.total == 0):
                final_states.add_to_states(call, ctx.places, seq_idx, dfinal, dstates)
        if dfinal is not None and seq_idx is not None:
            final_states.add_to_dx(call, ctx.places, seq_idx, dfinal, dx)
        dweight = dbias = None
        if ctx.needs_input_grad[2]:
            dweight = torch.zeros_like(weight) if found.dweight is None else found.dweight
            dweight = dweight.to(weight.dtype)
        if ctx.needs_input_grad[3]:
            dbias = torch.zeros_like(bias) if found.dbias is None else found.dbias
            dbias = dbias.to(bias.dtype)
        return None, dx, dweight, dbias, None, dstates, None


def _checked(x, weight, bias, seq_idx, cu_seqlens, initial_states, dilation):
    """Raises for arguments that do not fit this rank's x."""
    optional = {"bias": bias, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    optional["initial_states"] = initial_states
    check_tensors(CALLER, {"x": x, "weight": weight}, optional)
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"{CALLER}: dilation must be an int of at least 1, got {dilation!r}")
    given = {"x": x, "weight": weight, "bias": bias, "seq_idx": seq_idx, "initial_states": None}
    _fake.check("forward", given)
    if cu_seqlens is not None:
        text = None
        if seq_idx is not None:
            text = "must not be given together with seq_idx"
        elif initial_states is not None:
            text = "must not be given together with initial_states"
        elif x.shape[0] != 1:
            text = f"needs an x of batch 1, got {x.shape[0]}"
        elif cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            text = f"must be (sequences + 1,), got {tuple(cu_seqlens.shape)}"
        elif cu_seqlens.dtype not in (torch.int32, torch.int64):
            text = f"must be int32 or int64, got {cu_seqlens.dtype}"
        elif cu_seqlens.device != x.device:
            text = f"must be on x's device {x.device}, got {cu_seqlens.device}"
        if text is not None:
            raise RuntimeError(f"{CALLER}: cu_seqlens {text}")
    if initial_states is not None:
        wanted = (*x.shape[:2], (weight.shape[1] - 1) * dilation)
        got = initial_states
        if tuple(got.shape) != wanted:
            text = f"(batch, dim, (width - 1) * dilation) = {wanted}, got {tuple(got.shape)}"
        elif got.device != x.device:
            text = f"on x's device {x.device}, got {got.device}"
        elif not got.is_floating_point() or (got.dtype == torch.float64) != (
            x.dtype == torch.float64
        ):
            text = f"a float type, float64 if and only if x is, got {got.dtype}"
        else:
            return
        raise RuntimeError(f"{CALLER}: initial_states must be {text}")


def ids_of_packed(cu_seqlens, parts: Parts):
    """The ids of this rank's steps, (1, length) int32; -1 after the last sequence."""
    length = sum(part.length for part in parts.mine)
    ids = cu_seqlens.new_empty((1, length), dtype=torch.int32)
    for part in parts.mine:
        steps = torch.arange(part.start, part.end, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        found = torch.searchsorted(cu_seqlens, steps, right=True) - 1
        found = found.masked_fill(steps >= cu_seqlens[-1], -1)
        ids[0, part.slice()] = found.to(torch.int32)
    return ids


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
        initial_states: (batch, dim, (width - 1) * dilation) or None: the inputs before the whole,
            given on every rank. Their gradient is on the rank of the first step, else 0. Not with
            cu_seqlens.
        return_final_states: also return the last (width - 1) * dilation inputs of the whole, with
            cu_seqlens of each sequence (zeros before its first). Every rank gets all of them, and
            gradients that reach them on several ranks are added.
        layout: "contiguous": rank r of n holds part r of n. "zigzag": it holds parts r and
            2n - 1 - r of 2n, one after the other.
        lengths: the lengths of all parts in the order of the sequence, ints; any may be 0. None:
            all are equal. :func:`gather_lengths` asks the ranks for them.
        dilation: the distance of the taps.
        check: whether ranks compare their arguments first, so that a difference, or an error on one
            of them, is an error on each; it is a collective of a few integers for which the host
            waits. None: only where the group has a backend for CPU tensors, as Gloo and the default
            "cpu:gloo,cuda:nccl" have, so that no host waits for a GPU. The group's timeout holds
            for all else.

    Returns:
        out, (batch, dim, length); with ``return_final_states`` the tuple (out, final_states), the
        latter (batch or sequences, dim, (width - 1) * dilation) in x's dtype.

    Raises:
        RuntimeError, ValueError: an argument that does not fit, or differs between ranks; the
            message names it.
        TypeError: an argument that is no tensor.
        NotImplementedError: another activation.
    """
    group = find_group(CALLER, group)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def prepare():
        _checked(x, weight, bias, seq_idx, cu_seqlens, initial_states, dilation)
        silu, length = is_silu(activation), x.shape[2]
        parts = make_parts(CALLER, layout, length, lengths, rank, ranks)
        if cu_seqlens is not None:
            check_bounds(CALLER, cu_seqlens, parts.total, padding=True)
        halo = (weight.shape[1] - 1) * dilation
        call = Call(parts, group, silu, dilation, halo, bool(return_final_states))
        tensors = (x, weight, bias, initial_states)
        recorded = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
        numbers = [
            *x.shape[:2],
            weight.shape[1],
            dtype_number(x),
            dtype_number(weight),
            bias is not None,
            silu,
            dilation,
            length if lengths is None else -1,
            0 if lengths is None else hash(tuple(map(int, lengths))),
            layout == "zigzag",
            dtype_number(seq_idx),
            -1 if cu_seqlens is None else cu_seqlens.shape[0],
            dtype_number(initial_states),
            call.final,
            recorded,
        ]
        return call, numbers

    call = agree(CALLER, group, x, check, _AGREED, prepare)
    ids = seq_idx if cu_seqlens is None else ids_of_packed(cu_seqlens, call.parts)
    return _Convolution.apply(call, x, weight, bias, ids, initial_states, cu_seqlens)
