"""The forward of the selective scan in Triton.

One program a channel (batch, dim) walks over the tiles of its row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import arguments
from .triton_common import (
    device_of,
    load_dt,
    load_projection,
    load_row,
    projection_strides,
    row_at,
    strides,
    then,
    tile_sizes,
    vector_stride,
)


@triton.jit
def _forward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    out,
    out_z,
    x,
    dim,
    seqlen,
    dstate,
    per_group,
    chunks,
    u_b,
    u_d,
    u_t,
    delta_b,
    delta_d,
    delta_t,
    z_b,
    z_d,
    z_t,
    out_b,
    out_d,
    out_t,
    out_z_b,
    out_z_d,
    out_z_t,
    A_d,
    A_n,
    B_b,
    B_g,
    B_d,
    B_n,
    B_t,
    C_b,
    C_g,
    C_d,
    C_n,
    C_t,
    D_d,
    bias_d,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b, d = row // dim, row % dim
    g = d // per_group
    n = tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_T)
    rate = tl.load(A + d * A_d + n * A_n, mask=n < dstate, other=0.0).to(tl.float32)
    shift = tl.load(bias + d * bias_d).to(tl.float32) if HAS_BIAS else 0.0
    u_row, delta_row = row_at(u, u_b, u_d, b, d), row_at(delta, delta_b, delta_d, b, d)
    out_row = row_at(out, out_b, out_d, b, d)
    B_row = B + b * B_b + g * B_g + d * B_d
    C_row = C + b * C_b + g * C_g + d * C_d
    state = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, seqlen, BLOCK_T):
        t = start + steps
        mask = t < seqlen
        u_now = load_row(u_row, u_t, t, mask)
        dt = load_dt(delta_row, delta_t, t, mask, shift, SOFTPLUS)
        factor = tl.exp(dt[None, :] * rate[:, None])
        term = (dt * u_now)[None, :] * load_projection(B_row, B_n, B_t, n, t, dstate, mask)
        factor, term = tl.associative_scan((factor, term), 1, then)
        states = factor * state[:, None] + term
        y = tl.sum(states * load_projection(C_row, C_n, C_t, n, t, dstate, mask), 0)
        if HAS_D:
            y += tl.load(D + d * D_d).to(tl.float32) * u_now
        tl.store(out_row + t.to(tl.int64) * out_t, y, mask=mask)
        if HAS_Z:
            gate = load_row(row_at(z, z_b, z_d, b, d), z_t, t, mask)
            y *= gate * tl.sigmoid(gate)
            tl.store(row_at(out_z, out_z_b, out_z_d, b, d) + t.to(tl.int64) * out_z_t, y, mask=mask)
        last = steps == BLOCK_T - 1  # the last step of a short row too: masked ones change nothing
        state = tl.sum(tl.where(last[None, :], states, 0.0), 1)
        total += tl.sum(dt, 0)
        end = start + BLOCK_T
        if (end % CHUNK == 0) | (end >= seqlen):
            place = x + ((row * chunks + start // CHUNK) * dstate + n) * 2
            tl.store(place, tl.exp(total * rate), mask=n < dstate)
            tl.store(place + 1, state, mask=n < dstate)


def forward(inputs, out, out_z, x):
    """Writes out, out_z unless None, and x."""
    u, delta, A, B, C = inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C
    D, z, bias = inputs.D, inputs.z, inputs.delta_bias
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    block_n, block_t = tile_sizes(dstate)
    with device_of(u):
        _forward[(batch * dim,)](
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            bias,
            out,
            out_z,
            x,
            dim,
            seqlen,
            dstate,
            dim // inputs.groups,
            x.shape[2],
            *strides(u),
            *strides(delta),
            *strides(z),
            *strides(out),
            *strides(out_z),
            *A.stride(),
            *projection_strides(B),
            *projection_strides(C),
            vector_stride(D),
            vector_stride(bias),
            SOFTPLUS=inputs.delta_softplus,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=bias is not None,
            BLOCK_N=block_n,
            BLOCK_T=block_t,
            CHUNK=arguments.CHUNK,
        )
