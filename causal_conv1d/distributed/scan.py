"""``selective_scan_cp``: the selective scan of a sequence whose steps lie on several ranks.

A part of the sequence turns the state before it into ``decay * state + own``: own is what its scan
gives from a state of zero, decay is exp(A * sum of dt). Each part needs the composition of all maps
before it, which the ranks form in log steps, a pair (decay, own) to the part k further on for
k = 1, 2, 4 and so on; then it scans with the right state.

The backward is the same the other way round: the gradient of the state after a part is what the
parts after it made of theirs. own is the gradient of the state before a part, from its own outputs;
with the right gradient of its last state a second backward gives all gradients of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._compile import _disable_dynamo

from .._arguments import check_tensors
from .._dispatch import call_without_grad
from .._ops import ops
from ..selective_scan import fake
from ..selective_scan.interface import takes_plain
from ..selective_scan.operators import GRADIENTS, sequences, sum_dtype
from .exchange import send, sum_disjoint, sum_over_ranks
from .groups import agree, dtype_number, find_group
from .parts import Part, Parts, check_bounds, make_parts

CALLER = "selective_scan_cp"
NAMES = "u delta A B C D z delta_bias initial_states".split()
# Those that have time, which B and C need not have.
IN_TIME = ("u", "delta", "B", "C", "z")
CHUNK = 4096  # steps whose dt is in memory at a time


@dataclass(frozen=True)
class Call:
    """What a call is about, besides its tensors."""

    parts: Parts
    group: Any
    softplus: bool
    last: bool  # whether the last states are returned


def compose(parts: Parts, maps: dict[Part, torch.Tensor], like, group, backwards=False):
    """For each of this rank's parts what the maps of all parts before it make of a state of zero.

    maps has for each of them the stack of decay and own; like is one of them, or of their shape.
    """
    chain = parts.filled[::-1] if backwards else parts.filled
    own = [i for i, part in enumerate(chain) if part.rank == parts.rank]
    reach = {i: maps[chain[i]] for i in own}  # of part i and those before it that are known yet
    before = {i: torch.stack([torch.ones_like(like[0]), torch.zeros_like(like[0])]) for i in own}

    def after(first, second):
        return torch.stack([first[0] * second[0], second[0] * first[1] + second[1]])

    k = 1
    while k < len(chain):
        items = [(chain[i].rank, chain[i + k].rank, i) for i in range(len(chain) - k)]
        for i, earlier in send(items, reach.__getitem__, like, parts.rank, group).items():
            before[i + k] = after(earlier, before[i + k])
            reach[i + k] = after(earlier, reach[i + k])
        k *= 2
    return {chain[i]: before[i][1] for i in own}


class _Part:
    """The scan of one part."""

    def __init__(self, call: Call, part: Part, tensors, cu_seqlens):
        self.call, self.part = call, part
        self.tensors = {
            name: tensor[..., part.slice()]
            if tensor is not None and name in IN_TIME and tensor.dim() > 2
            else tensor
            for name, tensor in tensors.items()
        }
        self.states = self.tensors.pop("initial_states")
        self.cu = None if cu_seqlens is None else cu_seqlens.contiguous()
        if cu_seqlens is None:
            self.local = None
        else:
            self._find_sequences()

    def _find_sequences(self):
        """Which sequence the first and the last step are of, and where they begin and end.

        On a GPU the boundaries are not checked; wrong ones must not index beyond the sequences.
        """
        cu, part, most = self.cu, self.part, self.cu.shape[0] - 2
        self.local = (cu - part.start).clamp(0, part.length)
        first, last = (
            (torch.searchsorted(cu, cu.new_full((1,), step), right=True) - 1).clamp_(0, most)
            for step in (part.start, part.end - 1)
        )
        rows = torch.arange(cu.shape[0] - 1, device=cu.device)
        self.last = last
        self.last_begin = cu.index_select(0, last)
        # Rows of states: of the sequence that comes in, and of the one that goes on.
        self.comes_in = (rows == first) & (cu.index_select(0, first) < part.start)
        self.goes_on = (rows == last) & (cu.index_select(0, last + 1) > part.end)
        # Rows that this part answers for; the first one has those of empty sequences too.
        step, empty = cu[1:] - 1, cu[1:] == cu[:-1]
        self.ends_here = (step >= part.start) & (step < part.end) & ~empty
        if part == self.call.parts.first:
            self.ends_here |= empty

    def decay(self):
        """What is left of the state before the part, after it."""
        delta, A, bias = (self.tensors[name] for name in ("delta", "A", "delta_bias"))
        dtype, total = sum_dtype(self.tensors["u"]), 0
        for start in range(0, self.part.length, CHUNK):
            dt = delta[..., start : start + CHUNK].to(dtype)
            if bias is not None:
                dt = dt + bias.to(dtype)[:, None]
            if self.call.softplus:
                dt = F.softplus(dt)
            total = total + dt.sum(-1)
        decay = (total[..., None] * A.to(dtype)).exp()
        if self.cu is not None:  # nothing, unless one sequence fills the part and began before it
            decay = decay.where(self.last_begin < self.part.start, 0)
        return decay

    def with_carry(self, carry):
        """The initial states, given the state of whatever comes in from the part before."""
        if self.part.start == 0:
            return self.states
        if self.cu is None:
            return carry
        states = self.states
        if states is None:
            u, A = self.tensors["u"], self.tensors["A"]
            shape = sequences(u, self.cu), u.shape[1], A.shape[1]
            states = u.new_zeros(shape, dtype=sum_dtype(u))
        return states.where(~self.comes_in[:, None, None], 0 if carry is None else carry)

    def scan(self, states):
        args = (*self.tensors.values(), states, self.local, self.call.softplus, True)
        return call_without_grad(ops.scan_forward, *args)

    def after(self, last_states):
        """The state after the part."""
        return last_states if self.cu is None else last_states.index_select(0, self.last)

    def dlast(self, dlast_states, carry):
        """The gradient of the part's last states, from that of all and from the next part."""
        if self.cu is None:
            return dlast_states if self.part.end == self.call.parts.total else carry
        shape = (self.cu.shape[0] - 1, *self.tensors["A"].shape)
        u = self.tensors["u"]
        found = u.new_zeros(shape, dtype=sum_dtype(u))
        if dlast_states is not None:
            found = dlast_states.where(self.ends_here[:, None, None], 0)
        return found if carry is None else found + carry.where(self.goes_on[:, None, None], 0)

    def backward(self, dout, states, dlast_states, needed):
        args = (*self.tensors.values(), states, self.local, self.call.softplus)
        return call_without_grad(ops.scan_backward, *args, dout, dlast_states, needed)

    def before(self, dstates):
        """The gradient of the state that comes in."""
        if self.cu is None:
            return dstates
        return dstates.where(self.comes_in[:, None, None], 0).sum(0, keepdim=True)

    def own_states(self, dstates):
        """That of the states which the caller gave, or None."""
        if self.cu is None:
            return dstates if self.part.start == 0 else None
        return dstates.where(~self.comes_in[:, None, None], 0) if self.part.start else dstates


def _parts(call, tensors, cu_seqlens):
    return [_Part(call, part, tensors, cu_seqlens) for part in call.parts.mine]


def _like(tensors):
    """A pair of decay and own, of which the values do not matter."""
    u, A = tensors["u"], tensors["A"]
    return u.new_empty(1, dtype=sum_dtype(u)).expand(2, u.shape[0], *A.shape)


def _all_last_states(call, scans, last_states, tensors, cu_seqlens):
    """The last states of the whole, on every rank."""
    u, A = tensors["u"], tensors["A"]
    found = u.new_zeros((sequences(u, cu_seqlens), *A.shape), dtype=sum_dtype(u))
    for scan, last in zip(scans, last_states, strict=True):
        if cu_seqlens is not None:
            found = last.where(scan.ends_here[:, None, None], found)
        elif scan.part.end == call.parts.total:
            found = last
    states = tensors["initial_states"]
    if call.parts.total == 0 and states is not None and call.parts.first.rank == call.parts.rank:
        found = states.to(found.dtype, copy=True)
    return sum_disjoint(found, call.group)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, cu_seqlens, *args):
        tensors = dict(zip(NAMES, args, strict=True))
        scans = _parts(call, tensors, cu_seqlens)
        like, results, maps = _like(tensors), {}, {}
        for scan in scans:
            states = scan.with_carry(None)
            needs_last = scan.part.end < call.parts.total
            if scan.part.start == 0 or needs_last:
                out, last_states = scan.scan(states)
                maps[scan.part] = torch.stack(
                    [scan.decay(), scan.after(last_states).to(like.dtype)]
                )
                if scan.part.start == 0:
                    results[scan.part] = out, last_states, states
            else:
                maps[scan.part] = torch.stack([scan.decay(), torch.zeros_like(like[0])])
        carries = compose(call.parts, maps, like, call.group)
        for scan in scans:
            if scan.part.start > 0:
                states = scan.with_carry(carries[scan.part])
                results[scan.part] = *scan.scan(states), states
        found = [results[scan.part] for scan in scans]
        outs = [out for out, _, _ in found]
        out = _concatenated(outs) if outs else torch.empty_like(args[0])
        ctx.call = call
        states = [states for _, _, states in found]
        decays = [maps[scan.part][0] for scan in scans]
        ctx.save_for_backward(cu_seqlens, *args, *states, *decays)
        if not call.last:
            return out
        last_states = [last for _, last, _ in found]
        return out, _all_last_states(call, scans, last_states, tensors, cu_seqlens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlast_states=None):
        call = ctx.call
        cu_seqlens, *saved = ctx.saved_tensors
        tensors, saved = dict(zip(NAMES, saved, strict=False)), saved[len(NAMES) :]
        scans = _parts(call, tensors, cu_seqlens)
        states, decays = saved[: len(scans)], saved[len(scans) :]
        if dlast_states is not None:
            dlast_states = sum_over_ranks(dlast_states, call.group)
        like, maps = _like(tensors), {}
        dstates_alone = 1 << (GRADIENTS - 1)
        for scan, before, decay in zip(scans, states, decays, strict=True):
            own = torch.zeros_like(like[0])
            if scan.part.start > 0:
                args = (before, scan.dlast(dlast_states, None), dstates_alone)
                dstates = scan.backward(dout[..., scan.part.slice()], *args)[-1]
                own = scan.before(dstates).to(like.dtype)
            maps[scan.part] = torch.stack([decay, own])
        carries = compose(call.parts, maps, like, call.group, backwards=True)
        wanted = ctx.needs_input_grad[2:]
        needed = sum(1 << i for i, need in enumerate(wanted) if need)
        found = []
        for scan, before in zip(scans, states, strict=True):
            carry = carries[scan.part] if scan.part.end < call.parts.total else None
            args = (before, scan.dlast(dlast_states, carry), needed)
            gradients = list(scan.backward(dout[..., scan.part.slice()], *args))
            if wanted[-1] and before is not None:
                gradients[-1] = scan.own_states(gradients[-1])
            found.append(gradients)
        gradients = [
            _joined(name, tensors[name], [g[i] for g in found]) if wanted[i] else None
            for i, name in enumerate(NAMES)
        ]
        if wanted[-1] and call.parts.total == 0 and dlast_states is not None:
            if call.parts.first.rank == call.parts.rank:
                gradients[-1] = dlast_states.to(gradients[-1].dtype)
        return None, None, *gradients


def _concatenated(pieces):
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _joined(name, tensor, pieces):
    """The gradient of a tensor from those of its parts."""
    pieces = [piece for piece in pieces if piece is not None]
    if not pieces:
        return torch.zeros_like(tensor)
    if name in IN_TIME and tensor.dim() > 2:
        return _concatenated(pieces)
    return sum(pieces[1:], pieces[0])


# What must be the same on every rank, and whether it is a number to show.
_AGREED = {
    "the batch": True,
    "dim": True,
    "dstate": True,
    "the dtype of u": False,
    "the length of a shard, unless lengths is given,": True,
    "lengths": False,
    "layout": False,
    "the size of cu_seqlens": True,
    "whether initial_states is given": False,
    "return_last_state": False,
    "whether gradients are wanted": False,
}


def _checked(tensors, cu_seqlens):
    """Raises for arguments that do not fit this rank's u."""
    required = {name: tensors[name] for name in NAMES[:5]}
    optional = {name: tensors[name] for name in NAMES[5:]} | {"cu_seqlens": cu_seqlens}
    check_tensors(CALLER, required, optional)
    if takes_plain(tensors["A"]):
        raise RuntimeError(f"{CALLER}: A must be real, with at most 256 states")
    tensors = dict(tensors, cu_seqlens=cu_seqlens)
    for name in "BC":
        if tensors[name].dim() == 3:
            tensors[name] = tensors[name].unsqueeze(1)
    fake.check("scan_forward", tensors, caller=CALLER)


@_disable_dynamo
def selective_scan_cp(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    group: Any = None,
    initial_states: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    layout: str = "contiguous",
    lengths: Sequence[int] | None = None,
    check: bool | None = None,
) -> Any:
    """:func:`selective_scan_fn` of a sequence whose steps lie on several ranks; differentiable.

    Each rank calls it with its own shard of u, delta, z, and of B and C where they have time. The
    states travel in log steps over the ranks. The gradients of what has no time are this rank's
    share, and their sum over the ranks is the whole. Every rank must run the backward, too. Sums
    are in another order than in one process. A rank scans twice, forward and backward, except for
    the one that holds the first steps (forward).

    Args:
        u: the shard, as are delta, z, and B and C where they have time; this and the others
            as of ``selective_scan_fn``.
        delta: as there.
        A: as there; real, of at most 256 states.
        B: as there.
        C: as there.
        D: as there.
        z: as there.
        delta_bias: as there.
        delta_softplus: as there.
        return_last_state: also return the states after the last step of the whole, or of each
            sequence. Every rank gets all of them, and gradients that reach them on several ranks
            are added.
        group: as of :func:`causal_conv1d_cp`, as are layout, lengths and check.
        initial_states: (batch or sequences, dim, dstate) or None: the states before the first step
            of the whole, or of each sequence, given on every rank.
        cu_seqlens: (sequences + 1,) int32 or int64, or None: the boundaries of the sequences that
            all ranks together hold in a batch of 1, ascending from 0 to the whole length.

    Returns:
        out, (batch, dim, length); with ``return_last_state`` the tuple (out, last_state).

    Raises:
        RuntimeError, ValueError: an argument that does not fit, or differs between ranks; the
            message names it.
        TypeError: an argument of another type.
    """
    group = find_group(CALLER, group)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    given = (u, delta, A, B, C, D, z, delta_bias, initial_states)

    def prepare():
        _checked(dict(zip(NAMES, given, strict=True)), cu_seqlens)
        parts = make_parts(CALLER, layout, u.shape[2], lengths, rank, ranks)
        if cu_seqlens is not None:
            check_bounds(CALLER, cu_seqlens, parts.total, padding=False)
        call = Call(parts, group, bool(delta_softplus), bool(return_last_state))
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        numbers = [
            *u.shape[:2],
            A.shape[1],
            dtype_number(u),
            u.shape[2] if lengths is None else -1,
            0 if lengths is None else hash(tuple(map(int, lengths))),
            layout == "zigzag",
            -1 if cu_seqlens is None else cu_seqlens.shape[0],
            initial_states is not None,
            call.last,
            recorded,
        ]
        return call, numbers

    call = agree(CALLER, group, u, check, _AGREED, None, prepare)
    B, C = (t.unsqueeze(1) if t.dim() == 3 else t for t in (B, C))
    return _Scan.apply(call, cu_seqlens, u, delta, A, B, C, D, z, delta_bias, initial_states)
