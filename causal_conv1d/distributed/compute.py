"""The convolution of this rank's parts of the sequence, and its gradients.

With H = (width - 1) * dilation, the outputs of a part need the H inputs before it, its halo, which
ranks before it send. A part shorter than H lets a halo come from several ranks.

The forward computes each part as if nothing came before it, while the halos travel, and then once
more the first H outputs of each part, with the halo as initial states.

The backward gives the bits of the unsharded call. There, dx of a step is one sum over the outputs
that saw it, and a sum that two ranks share would be rounded twice. So no gradient of a halo
travels: each part asks for x and dout of the H steps after it and computes the dx of its own last
H steps as a whole. dweight and dbias are those of the rank's own outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import local
from .exchange import Halos
from .parts import Parts, Route
from .sequences import Rows


@dataclass(frozen=True)
class Call:
    """What a call is about, besides its tensors and its group."""

    parts: Parts
    silu: bool
    dilation: int
    halo: int
    final: bool  # whether the final states are returned
    recorded: bool  # whether gradients are wanted
    before: Route
    after: Route


def forward(call: Call, group, x, weight, bias, rows: Rows):
    """out, and what comes before each of the parts, or None."""
    out = torch.empty_like(x)
    halos = Halos(call.before, (x, rows.travels), group)

    def convolve(part, first, last, sequence):
        where = part.slice(first, last)
        local.forward(out[..., where], x[..., where], weight, bias, *sequence, call)

    for part in call.parts.mine:
        if part.start == 0 or part.length > call.halo:
            convolve(part, 0, part.length, rows.alone(part))
    before = []
    for part, (halo_x, halo_ids) in halos.wait().items():
        states = rows.before(part, halo_x, halo_ids)
        before.append(states)
        if part.start > 0 and call.halo > 0:
            last = min(part.length, call.halo)
            convolve(part, 0, last, rows.window(part, 0, last, states))
    return out, before


class Gradients:
    """The backward of one call; parameters: whether those of weight and bias are wanted."""

    def __init__(self, call: Call, x, weight, bias, rows: Rows, parameters: bool):
        self.call, self.x, self.rows = call, x, rows
        self.weight, self.bias, self.parameters = weight, bias, parameters
        self.dx = torch.empty_like(x)
        self.dweight = self.dbias = None

    def run(self, group, dout, before):
        """before: by part, what forward gave."""
        call = self.call
        halos = Halos(call.after, (self.x, dout, self.rows.travels), group)
        states = dict(zip(call.parts.mine, before, strict=True))
        for part in call.parts.mine:
            self._part(part, dout[..., part.slice()], states[part])
        for part, after in halos.wait().items():
            if after[0].shape[-1] > 0:
                self._tail(part, dout, after, states[part])
        return self

    def _backward(self, dx, x, dout, sequence, start, parameters):
        rows, stop = self.rows, start + x.shape[-1]
        args = (dx, x, self.weight, self.bias, dout, *sequence, rows.dfinal_of(start, stop))
        return local.backward(*args, self.call, parameters)

    def _part(self, part, dout, before):
        """All that needs nothing from ranks after this one."""
        where, rows = part.slice(), self.rows
        sequence = rows.window(part, 0, part.length, before)
        args = (self.dx[..., where], self.x[..., where], dout, sequence)
        dweight, dbias, dstates = self._backward(*args, part.start, self.parameters)
        rows.take_dstates(dstates, part.start, part.end)
        self.dweight = dweight if self.dweight is None else self.dweight + dweight
        self.dbias = dbias if self.dbias is None else self.dbias + dbias

    def _tail(self, part, dout, after, before):
        """The dx of the last steps, from those after them as well."""
        begin, rows = max(part.length - self.call.halo, 0), self.rows
        where = part.slice(begin)
        x_after, dout_after, ids_after = after
        x = torch.cat([self.x[..., where], x_after], -1)
        dout = torch.cat([dout[..., where], dout_after], -1)
        dx = torch.empty_like(x)
        states = rows.before_step(part, begin, self.x, before)
        args = (part, begin, part.length, states, ids_after, x_after.shape[-1])
        start = part.start + begin
        dstates = self._backward(dx, x, dout, rows.window(*args), start, False)[2]
        rows.take_dstates(dstates, start, part.end)
        self.dx[..., where] = dx[..., : part.length - begin]
