"""The selective scan of Mamba in plain PyTorch and Triton, forward and backward.

``selective_scan_cuda`` and its relatives (``_core``, ``_oflex``, ``_ndstate``, ``_nrow``), which
mamba_ssm and VMamba's descendants import, are thin modules over :func:`selective_scan_fwd` and
:func:`selective_scan_bwd`. With u, delta and z (batch, dim, seqlen), A (dim, dstate), state h:

    dt[b,d,t] = delta[b,d,t] + delta_bias[d], through softplus with delta_softplus
    h[b,d,n,t] = exp(dt[b,d,t] A[d,n]) h[b,d,n,t-1] + dt[b,d,t] B[b,g,n,t] u[b,d,t]
    out[b,d,t] = sum over n of C[b,g,n,t] h[b,d,n,t] + D[d] u[b,d,t]
    out_z[b,d,t] = out[b,d,t] z[b,d,t] sigmoid(z[b,d,t])

g = d // (dim / groups). B and C may each be (dim, dstate) instead, constant in time. With a complex
A they are complex too (in time, as pairs of real numbers along their last axis), and the sum over n
is twice its real part. Arithmetic is in float32, in float64 where u is. The backward is
deterministic.

Memory beyond inputs and results is bounded in seqlen. Plain PyTorch takes tiles of channels and
64 steps: at most 10 tensors of ``TILE_ELEMENTS`` at a time, in float32 10 MiB on the CPU and 160
MiB on CUDA, twice that in float64 or complex64. Triton's backward takes ``CHUNK`` steps at a time:
see ``_selective_scan_triton.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["CHUNK", "selective_scan_bwd", "selective_scan_fwd"]

# Steps between two states that the forward returns in x for the backward; mamba_ssm's number.
CHUNK = 2048

# Plain PyTorch: steps of a block, and how many elements (batch, channel, state, step) it may have.
# On the CPU the tensors of a block then stay in the caches.
BLOCK = 64
TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}


@dataclass
class Inputs:
    """The inputs of a scan: see :func:`selective_scan_fwd`."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    delta_softplus: bool

    @property
    def groups(self):
        """Of B and C; 1 if both are constant."""
        return max(tensor.shape[1] if tensor.dim() == 4 else 1 for tensor in (self.B, self.C))

    @property
    def real_dtype(self):
        """Of the arithmetic."""
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32

    @property
    def dtype(self):
        """Of the states."""
        return self.real_dtype.to_complex() if self.A.is_complex() else self.real_dtype

    @property
    def x_shape(self):
        chunks = -(-self.u.shape[2] // CHUNK)
        return (*self.u.shape[:2], chunks, 2 * self.A.shape[1])


@dataclass
class Grads:
    """Where a backward puts its results; dA to ddelta_bias are sums that begin with 0."""

    du: torch.Tensor
    ddelta: torch.Tensor
    dA: torch.Tensor
    dB: torch.Tensor
    dC: torch.Tensor
    dD: torch.Tensor | None
    ddelta_bias: torch.Tensor | None
    dz: torch.Tensor | None
    out_z: torch.Tensor | None


@functools.cache
def _triton():
    """The kernels, or None where there is no Triton; imported when a CUDA tensor first asks."""
    try:
        from . import _selective_scan_triton
    except ImportError:
        return None
    return _selective_scan_triton


def _backend(inputs):
    if inputs.u.is_cuda and inputs.dtype == torch.float32 and inputs.A.shape[1] <= 256:
        kernels = _triton()
        if kernels is not None:
            return kernels.forward, kernels.backward
    return forward, backward


# --------------------------------------------------------------------------------------- interface


@torch.no_grad()
def selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype=None):
    """Returns (out, x, out_z); out_z is None without z.

    u, delta, z: (batch, dim, seqlen), any strides. A: (dim, dstate), real or complex. B, C:
    (dim, dstate), or (batch, groups, dstate, seqlen), twice seqlen with complex A. D, delta_bias:
    (dim,). D, z and delta_bias may be None. out has out_dtype (default: u's) and delta's layout. x
    is (batch, dim, ceil(seqlen / CHUNK), 2 * dstate): the product of exp(dt A) since the beginning
    (even places) and the state (odd places) at the end of each chunk, so that
    ``x[:, :, -1, 1::2]`` is the last state. Raises ValueError, naming the argument, for shapes
    that do not fit.
    """
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    _check("selective_scan fwd", inputs)
    out = torch.empty_like(delta, dtype=out_dtype or u.dtype)
    out_z = None if z is None else torch.empty_like(z)
    x = torch.empty(inputs.x_shape, dtype=inputs.dtype, device=u.device)
    if u.numel() > 0:
        _backend(inputs)[0](inputs, out, out_z, x)
    return out, x, out_z


@torch.no_grad()
def selective_scan_bwd(
    u, delta, A, B, C, D, z, delta_bias, dout, x, dz, delta_softplus, recompute_out_z
):
    """Returns (du, ddelta, dA, dB, dC, dD, ddelta_bias, dz, out_z), None where absent.

    dout is the gradient of out_z, of out without z. x is the forward's, or None: then its states
    are computed again. dz, if given, is written in place, whatever its strides. out_z is returned
    with ``recompute_out_z`` and z. Each gradient has the dtype of its tensor.
    """
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    _check("selective_scan bwd", inputs, dout, dz)
    if x is None and inputs.x_shape[2] > 1:
        x = selective_scan_fwd(u, delta, A, B, C, None, None, delta_bias, delta_softplus)[1]
    if x is not None and x.shape != inputs.x_shape:
        raise ValueError(f"selective_scan bwd: x must be {inputs.x_shape}, got {tuple(x.shape)}")

    def zeros(tensor):
        if tensor is None:
            return None
        dtype = inputs.real_dtype.to_complex() if tensor.is_complex() else inputs.real_dtype
        return torch.zeros_like(tensor, dtype=dtype)

    if z is None:
        dz = None
    elif dz is None:
        dz = torch.empty_like(z)
    params = (A, B, C, D, delta_bias)
    grads = Grads(
        torch.empty_like(u),
        torch.empty_like(delta),
        *map(zeros, params),
        dz,
        torch.empty_like(z) if z is not None and recompute_out_z else None,
    )
    if u.numel() > 0:
        _backend(inputs)[1](inputs, dout, x, grads)
    sums = (grads.dA, grads.dB, grads.dC, grads.dD, grads.ddelta_bias)
    sums = (
        None if tensor is None else total.to(tensor.dtype)
        for total, tensor in zip(sums, params, strict=True)
    )
    return (grads.du, grads.ddelta, *sums, grads.dz, grads.out_z)


def _check(name, inputs, dout=None, dz=None):
    u, A = inputs.u, inputs.A
    if u.dim() != 3:
        raise ValueError(f"{name}: u must be (batch, dim, seqlen), got {tuple(u.shape)}")
    if A.dim() != 2:
        raise ValueError(f"{name}: A must be (dim, dstate), got {tuple(A.shape)}")
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]

    def check(argument, tensor, text, *shape):
        if tensor is None:
            return
        if tensor.shape != shape:
            got = tuple(tensor.shape)
            raise ValueError(f"{name}: {argument} must be ({text}) = {shape}, got {got}")
        if tensor.device != u.device:
            where = f"{u.device}, got {tensor.device}"
            raise ValueError(f"{name}: {argument} must be on u's device {where}")

    check("A", A, "dim, dstate", dim, dstate)
    for argument, tensor in {"delta": inputs.delta, "z": inputs.z, "dout": dout, "dz": dz}.items():
        check(argument, tensor, "batch, dim, seqlen", batch, dim, seqlen)
    check("D", inputs.D, "dim,", dim)
    check("delta_bias", inputs.delta_bias, "dim,", dim)
    twice = "2 * " if A.is_complex() else ""
    length = 2 * seqlen if A.is_complex() else seqlen
    for argument, tensor in {"B": inputs.B, "C": inputs.C}.items():
        if tensor.dim() == 2:
            check(argument, tensor, "dim, dstate", dim, dstate)
        elif tensor.dim() == 4:
            text, groups = f"batch, groups, dstate, {twice}seqlen", tensor.shape[1]
            check(argument, tensor, text, batch, groups, dstate, length)
            if groups != inputs.groups or groups == 0 or dim % groups:
                wants = f"one number of groups for B and C that divides dim = {dim}"
                raise ValueError(f"{name}: {argument} must have {wants}, got {groups}")
        else:
            wants = f"(dim, dstate) or (batch, groups, dstate, {twice}seqlen)"
            raise ValueError(f"{name}: {argument} must be {wants}, got {tuple(tensor.shape)}")
        if tensor.is_complex() != (A.is_complex() and tensor.dim() == 2):
            wants = "complex if and only if A is and it is (dim, dstate)"
            raise ValueError(f"{name}: {argument} must be {wants}, got {tensor.dtype}")


# ------------------------------------------------------------------------------------ plain PyTorch


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
            if block.stop % CHUNK == 0 or block.stop == seqlen:
                end = tile.part(x)[..., (block.stop - 1) // CHUNK, :]
                end[..., 0::2] = torch.exp(total[..., None] * tile.A)
                end[..., 1::2] = state


def backward(inputs, dout, x, grads):
    """Fills grads. x may be None if there is one chunk."""
    for tile in _tiles(inputs):
        carry = tile.zero_state()
        for chunk in reversed(_slices(0, inputs.u.shape[2], CHUNK)):
            # The state before each block of the chunk; then the blocks, from the last one on.
            state = tile.zero_state()
            if chunk.start > 0:
                state = tile.part(x)[..., chunk.start // CHUNK - 1, 1::2]
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
    """Tiles of at most TILE_ELEMENTS a block, or one channel."""
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
