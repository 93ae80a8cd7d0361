"""The selective scan in plain PyTorch, on any device.

It takes tiles of channels and blocks of 64 steps: at most 10 tensors of ``TILE_ELEMENTS`` at a
time, in float32 10 MiB on the CPU and 160 MiB on CUDA, twice that in float64 or complex64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import arguments

# Steps of a block, and how many elements (batch, channel, state, step) it may have. On the CPU the
# tensors of a block then stay in the caches.
BLOCK = 64
TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}


def forward(inputs, out, out_z, x):
    """Writes out, out_z unless None, and x."""
    seqlen = inputs.u.shape[2]
    for tile in _tiles(inputs):
        state, total = tile.zero_state(), 0
        for block in _slices(0, seqlen, BLOCK):
            dt, _, states = tile.states(block, state)
            state, total = states[-1], total + dt.sum(0)
            y = tile.outputs(block, states)
            tile.store(out, block, y)
            if out_z is not None:
                tile.store(out_z, block, y * F.silu(tile.load(inputs.z, block)))
            if block.stop % arguments.CHUNK == 0 or block.stop == seqlen:
                end = tile.part(x)[..., (block.stop - 1) // arguments.CHUNK, :]
                end[..., 0::2] = torch.exp(total[..., None] * tile.A)
                end[..., 1::2] = state


def backward(inputs, dout, x, grads):
    """Fills grads. x may be None if there is one chunk."""
    for tile in _tiles(inputs):
        carry = tile.zero_state()
        for chunk in reversed(_slices(0, inputs.u.shape[2], arguments.CHUNK)):
            # The state before each block of the chunk; then the blocks, from the last one on.
            state = tile.zero_state()
            if chunk.start > 0:
                state = tile.part(x)[..., chunk.start // arguments.CHUNK - 1, 1::2]
            blocks = []
            for block in _slices(chunk.start, chunk.stop, BLOCK):
                blocks.append((block, state))
                if block.stop < chunk.stop:
                    state = tile.states(block, state)[2][-1].clone()
            for block, state in reversed(blocks):
                carry = _backward_block(tile, block, state, carry, dout, grads)


def _backward_block(tile, block, before, carry, dout, grads):
    """The block's part of all gradients, from the state before it and the gradient ``carry`` that
    its last state gets from the next step; returns that of the state before the block."""
    inputs, real = tile.inputs, tile.real
    u = tile.load(inputs.u, block)
    dt, decay, states = tile.states(block, before)
    dy = tile.load(dout, block)
    if inputs.z is not None:
        y, z = tile.outputs(block, states), tile.load(inputs.z, block)
        gate = torch.sigmoid(z)
        tile.store(grads.dz, block, dy * y * gate * (1 + z * (1 - gate)))
        if grads.out_z is not None:
            tile.store(grads.out_z, block, y * z * gate)
        dy = dy * z * gate
    dsum = dy[..., None] * (2 if inputs.A.is_complex() else 1)
    tile.add_projection(grads.dC, block, dsum * states.conj())

    decayed = torch.cat((before[None], states[:-1])).mul_(decay)  # exp(dt A) times the state before
    del states
    dstates = dsum * tile.load_projection(inputs.C, block).conj()
    factors = decay.conj().unbind(0)
    dstates[-1].add_(carry)
    for t in reversed(range(len(factors) - 1)):
        dstates[t].addcmul_(factors[t + 1], dstates[t + 1])
    carry = factors[0] * dstates[0]
    del decay, factors

    tile.add_projection(grads.dB, block, dstates * (dt * u)[..., None])
    dinput = real(dstates * tile.load_projection(inputs.B, block).conj()).sum(-1)
    drate = dstates.mul_(decayed.conj())  # the gradient of dt A
    tile.part(grads.dA).add_((drate * dt[..., None]).sum((0, 1)))
    ddt = real(drate * tile.A.conj()).sum(-1) + dinput * u
    du = dinput * dt
    if inputs.D is not None:
        du += tile.D * dy
        tile.part(grads.dD).add_((dy * u).sum((0, 1)))
    if inputs.delta_softplus:
        ddt *= torch.sigmoid(tile.raw_steps(block))
    if inputs.delta_bias is not None:
        tile.part(grads.ddelta_bias).add_(ddt.sum((0, 1)))
    tile.store(grads.du, block, du)
    tile.store(grads.ddelta, block, ddt)
    return carry


def _slices(start, stop, step):
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def _tiles(inputs):
    """Tiles with at most TILE_ELEMENTS per block, or of one channel."""
    batch, dim, _ = inputs.u.shape
    groups = inputs.groups
    per_group = dim // groups
    elements = TILE_ELEMENTS.get(inputs.u.device.type, TILE_ELEMENTS["cpu"])
    rows = max(1, elements // (BLOCK * max(1, inputs.A.shape[1])))
    whole_groups = max(1, rows // per_group)
    for b in _slices(0, batch, max(1, rows // dim)):
        for g in _slices(0, groups, min(groups, whole_groups)):
            for h in _slices(0, per_group, min(per_group, rows)):
                yield _Tile(inputs, b, g, h)


class _Tile:
    """A slice of the batch, of the groups and of the channels within a group.

    Tensors of it have the axes (step, batch, group, channel in the group, state), or begin or end
    of them.
    """

    def __init__(self, inputs, b, g, h):
        self.inputs, self.b, self.g, self.h = inputs, b, g, h
        self.A = self.part(inputs.A).to(inputs.dtype)
        self.D = None if inputs.D is None else self.part(inputs.D).to(inputs.real_dtype)
        bias = inputs.delta_bias
        self.bias = None if bias is None else self.part(bias).to(inputs.real_dtype)

    @staticmethod
    def real(tensor):
        return tensor.real if tensor.is_complex() else tensor

    def part(self, tensor):
        """A view of a tensor (dim, ...) or (batch, dim, ...) with three or more dimensions."""
        groups = self.inputs.groups
        if tensor.dim() <= 2:
            return tensor.unflatten(0, (groups, -1))[self.g, self.h]
        return tensor.unflatten(1, (groups, -1))[self.b, self.g, self.h]

    def load(self, tensor, block):
        """A block of a tensor (batch, dim, seqlen): (step, batch, group, channel)."""
        return self.part(tensor)[..., block].movedim(-1, 0).to(self.inputs.real_dtype)

    def store(self, tensor, block, values):
        self.part(tensor)[..., block] = values.movedim(0, -1)

    def load_projection(self, tensor, block):
        """B or C: (step, batch, group, 1, state); (group, channel, state) if constant."""
        if tensor.dim() == 2:
            return self.part(tensor).to(self.inputs.dtype)
        part = tensor[self.b, self.g]
        if self.inputs.A.is_complex():
            pairs = part[..., 2 * block.start : 2 * block.stop].to(self.inputs.real_dtype)
            part = torch.view_as_complex(pairs.contiguous().unflatten(-1, (-1, 2)))
        else:
            part = part[..., block].to(self.inputs.real_dtype)
        return part.movedim(-1, 0).unsqueeze(3)

    def add_projection(self, total, block, terms):
        """Adds terms (step, batch, group, channel, state) to the gradient of B or C."""
        if total.dim() == 2:
            self.part(total).add_(terms.sum((0, 1)))
            return
        terms = terms.sum(3).movedim(0, -1)
        if terms.is_complex():
            block = slice(2 * block.start, 2 * block.stop)
            terms = torch.view_as_real(terms).flatten(-2)
        total[self.b, self.g, :, block] += terms

    def zero_state(self):
        return self.A.new_zeros((self.b.stop - self.b.start, *self.A.shape))

    def raw_steps(self, block):
        """dt before softplus."""
        raw = self.load(self.inputs.delta, block)
        return raw if self.bias is None else raw + self.bias

    def states(self, block, state):
        """dt, exp(dt A) and the states after each step of the block, given the one before it."""
        dt = self.raw_steps(block)
        if self.inputs.delta_softplus:
            dt = F.softplus(dt)
        decay = torch.exp(dt[..., None] * self.A)
        weights = (dt * self.load(self.inputs.u, block))[..., None]
        states = weights * self.load_projection(self.inputs.B, block)
        for now, factor in zip(states.unbind(0), decay.unbind(0), strict=True):
            state = now.addcmul_(factor, state)
        return dt, decay, states

    def outputs(self, block, states):
        y = (states * self.load_projection(self.inputs.C, block)).sum(-1)
        if y.is_complex():
            y = 2 * y.real
        return y if self.D is None else y + self.D * self.load(self.inputs.u, block)
