"""The selective scan in plain PyTorch, on any device.

It takes tiles of channels and blocks of 64 steps: at most 10 tensors of ``TILE_ELEMENTS`` at a
time, in float32 10 MiB on the CPU and 160 MiB elsewhere, twice that in float64 or complex64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Steps between two states that the backward keeps.
CHUNK = 2048
# Steps of a block, and how many elements (batch, channel, state, step) it may have. On the CPU the
# tensors of a block then stay in the caches.
BLOCK = 64
TILE_ELEMENTS = {"cpu": 1 << 18, "elsewhere": 1 << 22}


def forward(inputs, out, ungated, last_states):
    """Writes out, and what else is not None; steps of no sequence are 0."""
    if inputs.cu_seqlens is not None:
        out.zero_()
        if ungated is not None:
            ungated.zero_()
    for tile in _tiles(inputs):
        for start, stop, row in inputs.sequences():
            state = tile.first_state(row)
            for block in _slices(start, stop, BLOCK):
                _, _, states = tile.states(block, state)
                state = states[-1]
                y = tile.outputs(block, states)
                if ungated is not None:
                    tile.store(ungated, block, y)
                if inputs.z is not None:
                    y = y * F.silu(tile.load(inputs.z, block))
                tile.store(out, block, y)
            if last_states is not None:
                tile.states_part(last_states, row)[...] = state


def backward(inputs, dout, dlast_states, grads):
    """Fills grads. dlast_states may be None."""
    if inputs.cu_seqlens is not None:
        for tensor in (grads.du, grads.ddelta, grads.dz, grads.out):
            if tensor is not None:
                tensor.zero_()
    for tile in _tiles(inputs):
        for start, stop, row in inputs.sequences():
            carry = tile.zero_state()
            if dlast_states is not None:
                carry = tile.states_part(dlast_states, row).to(inputs.dtype)
            # The state before each chunk; of the last chunk before each block, and so on back.
            chunks, state = [], tile.first_state(row)
            for chunk in _slices(start, stop, CHUNK):
                chunks.append((chunk, state))
                if chunk.stop < stop:
                    state = _states_before(tile, chunk, state)[1]
            for chunk, state in reversed(chunks):
                for block, before in reversed(_states_before(tile, chunk, state)[0]):
                    carry = _backward_block(tile, block, before, carry, dout, grads)
            if grads.dinitial_states is not None:
                tile.states_part(grads.dinitial_states, row)[...] = carry


def _states_before(tile, chunk, state):
    """Each block of a chunk with the state before it, and the state after the chunk."""
    blocks = []
    for block in _slices(chunk.start, chunk.stop, BLOCK):
        blocks.append((block, state))
        state = tile.states(block, state)[2][-1].clone()
    return blocks, state


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
        if grads.out is not None:
            tile.store(grads.out, block, y * z * gate)
        dy = dy * z * gate
    elif grads.out is not None:
        tile.store(grads.out, block, tile.outputs(block, states))
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
    elements = TILE_ELEMENTS["cpu" if inputs.u.device.type == "cpu" else "elsewhere"]
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

    def states_part(self, tensor, row):
        """A view of a tensor of states: (batch, group, channel, state), of one row if given."""
        rows = self.b if row is None else slice(row, row + 1)
        return tensor.unflatten(1, (self.inputs.groups, -1))[rows, self.g, self.h]

    def first_state(self, row):
        if self.inputs.initial_states is None:
            return self.zero_state()
        return self.states_part(self.inputs.initial_states, row).to(self.inputs.dtype)

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
