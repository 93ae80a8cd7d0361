"""What the Triton kernels of the selective scan share: real numbers, float32 arithmetic.

A tile is (state, step) of one channel, a power of two each. Within it the recurrence is an
associative scan along the steps over pairs (factor, term); between tiles a state of dstate numbers
is handed on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import arguments

# Elements (state, step) of a tile, for 128 threads; with twice as many the backward spills.
TILE = 1024


@triton.jit
def then(factor, term, next_factor, next_term):
    """The step (factor, term): h -> factor * h + term, followed by the next."""
    return factor * next_factor, next_factor * term + next_term


@triton.jit
def softplus(x):
    e = tl.exp(x)
    w = 1 + e
    # log(1 + e) without the loss of the digits of a small e in 1 + e.
    log1p = tl.where(w == 1, e, tl.log(w) * (e / (w - 1)))
    return tl.where(x > 20, x, log1p)


@triton.jit
def row_at(ptr, stride_b, stride_d, b, d):
    return ptr + b * stride_b + d * stride_d


@triton.jit
def load_row(row, stride, t, mask):
    """Steps t of a row; 0 where masked."""
    return tl.load(row + t.to(tl.int64) * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_dt(row, stride, t, mask, bias, SOFTPLUS: tl.constexpr):
    """dt, 0 where masked: such a step changes no state."""
    raw = load_row(row, stride, t, mask) + bias
    if SOFTPLUS:
        raw = softplus(raw)
    return tl.where(mask, raw, 0.0)


@triton.jit
def load_projection(row, stride_n, stride_t, n, t, dstate, mask):
    """B or C: (state, step), 0 where masked; stride_t is 0 where it is constant."""
    where = n[:, None] * stride_n + t.to(tl.int64)[None, :] * stride_t
    inside = (n < dstate)[:, None] & mask[None, :]
    return tl.load(row + where, mask=inside, other=0.0).to(tl.float32)


def tile_sizes(dstate):
    """States and steps of a tile."""
    block_n = triton.next_power_of_2(max(1, dstate))
    return block_n, min(256, max(16, TILE // block_n), arguments.CHUNK)


def strides(tensor):
    """Those of (batch, dim, seqlen)."""
    return tensor.stride() if tensor is not None else (0, 0, 0)


def projection_strides(tensor):
    """Over batch, group, channel, state and step."""
    if tensor.dim() == 2:
        return 0, 0, tensor.stride(0), tensor.stride(1), 0
    return tensor.stride(0), tensor.stride(1), 0, tensor.stride(2), tensor.stride(3)


def vector_stride(tensor):
    return 0 if tensor is None else tensor.stride(0)


def device_of(tensor):
    """Triton launches on the current device. (A CPU tensor is for Triton's interpreter.)"""
    return torch.cuda.device_of(tensor)
