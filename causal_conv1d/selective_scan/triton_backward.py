"""The backward of the selective scan in Triton.

Chunks of ``CHUNK`` steps from the last one on, with two kernels each. ``_boundaries``,
one program per channel, finds the state before every tile of the chunk, forwards, and what the last
state of the tile gets from the steps after it, backwards. With both at hand all tiles are
independent: ``_backward``, one program a tile and up to ``CHANNELS`` channels of a group, computes
all gradients. Sums over channels, tiles and batch are first written apart, then added in a fixed
order; there are no atomics.

Memory of the backward beyond its results, in float32 elements, with T = steps of a tile: batch *
dim * dstate * CHUNK / T for each of the states before, the gradients after, and dA (and for B and C
where they are constant); and batch * CHUNK * dstate * groups * ceil(dim / groups / CHANNELS) for
each of B and C that varies. Nothing grows with seqlen.
"""

from __future__ import annotations

import torch
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
    softplus,
    strides,
    then,
    tile_sizes,
    vector_stride,
)

# Channels that one program adds up for dB and dC.
CHANNELS = 64


@triton.jit
def _boundaries(
    u,
    delta,
    A,
    B,
    C,
    z,
    bias,
    dout,
    x,
    before,
    after,
    carry,
    dim,
    seqlen,
    dstate,
    per_group,
    chunks,
    chunk,
    tiles,
    u_b,
    u_d,
    u_t,
    delta_b,
    delta_d,
    delta_t,
    z_b,
    z_d,
    z_t,
    dout_b,
    dout_d,
    dout_t,
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
    bias_d,
    SOFTPLUS: tl.constexpr,
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
    B_row = B + b * B_b + g * B_g + d * B_d
    C_row = C + b * C_b + g * C_g + d * C_d
    first = chunk * CHUNK

    state = tl.zeros([BLOCK_N], tl.float32)
    if chunk > 0:
        place = x + ((row * chunks + chunk - 1) * dstate + n) * 2 + 1
        state = tl.load(place, mask=n < dstate, other=0.0).to(tl.float32)
    for i in range(0, tiles):
        tl.store(before + (row * tiles + i) * dstate + n, state, mask=n < dstate)
        t = first + i * BLOCK_T + steps
        mask = t < seqlen
        dt = load_dt(delta_row, delta_t, t, mask, shift, SOFTPLUS)
        factor = tl.exp(dt[None, :] * rate[:, None])
        weight = dt * load_row(u_row, u_t, t, mask)
        term = weight[None, :] * load_projection(B_row, B_n, B_t, n, t, dstate, mask)
        factor, term = tl.associative_scan((factor, term), 1, then)
        last = steps == BLOCK_T - 1
        state = tl.sum(tl.where(last[None, :], factor * state[:, None] + term, 0.0), 1)

    # dstates[t] = dy[t] C[t] + exp(dt[t + 1] A) dstates[t + 1]
    dstate_next = tl.load(carry + row * dstate + n, mask=n < dstate, other=0.0)
    for j in range(0, tiles):
        i = tiles - 1 - j
        tl.store(after + (row * tiles + i) * dstate + n, dstate_next, mask=n < dstate)
        t = first + i * BLOCK_T + steps
        mask = t < seqlen
        dt_next = load_dt(delta_row, delta_t, t + 1, t + 1 < seqlen, shift, SOFTPLUS)
        dy = load_row(row_at(dout, dout_b, dout_d, b, d), dout_t, t, mask)
        if HAS_Z:
            gate = load_row(row_at(z, z_b, z_d, b, d), z_t, t, mask)
            dy *= gate * tl.sigmoid(gate)
        factor = tl.exp(dt_next[None, :] * rate[:, None])
        term = dy[None, :] * load_projection(C_row, C_n, C_t, n, t, dstate, mask)
        factor, term = tl.associative_scan((factor, term), 1, then, reverse=True)
        dstates = factor * dstate_next[:, None] + term
        dstate_next = tl.sum(tl.where((steps == 0)[None, :], dstates, 0.0), 1)
    tl.store(carry + row * dstate + n, dstate_next, mask=n < dstate)


@triton.jit
def _backward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    dout,
    before,
    after,
    du,
    ddelta,
    dz,
    out_z,
    dA,
    dB,
    dC,
    dD,
    dbias,
    batch,
    dim,
    seqlen,
    dstate,
    per_group,
    parts,
    chunk,
    tiles,
    u_b,
    u_d,
    u_t,
    delta_b,
    delta_d,
    delta_t,
    z_b,
    z_d,
    z_t,
    dout_b,
    dout_d,
    dout_t,
    du_b,
    du_d,
    du_t,
    ddelta_b,
    ddelta_d,
    ddelta_t,
    dz_b,
    dz_d,
    dz_t,
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
    HAS_OUT_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VARIABLE_B: tl.constexpr,
    VARIABLE_C: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The sums' parts: dA, constant dB and dC (batch, tile, dim, state); dD, dbias (batch, tile,
    dim); variable dB and dC (part, batch, group, state, step of the chunk)."""
    groups = dim // per_group
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    part = program // tiles % parts
    g = program // (tiles * parts) % groups
    b = program // (tiles * parts * groups)
    n = tl.arange(0, BLOCK_N)
    inside = n < dstate
    steps = tl.arange(0, BLOCK_T)
    t = (chunk * CHUNK + tile * BLOCK_T + steps).to(tl.int64)
    mask = t < seqlen
    sum_B = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    sum_C = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for channel in range(part * CHANNELS, tl.minimum((part + 1) * CHANNELS, per_group)):
        d = g * per_group + channel
        B_row = B + b * B_b + g * B_g + d * B_d
        C_row = C + b * C_b + g * C_g + d * C_d
        u_row, delta_row = row_at(u, u_b, u_d, b, d), row_at(delta, delta_b, delta_d, b, d)
        rate = tl.load(A + d * A_d + n * A_n, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(bias + d * bias_d).to(tl.float32) if HAS_BIAS else 0.0
        boundary = ((b * dim + d) * tiles + tile) * dstate + n
        state = tl.load(before + boundary, mask=inside, other=0.0)
        dstate_next = tl.load(after + boundary, mask=inside, other=0.0)

        u_now = load_row(u_row, u_t, t, mask)
        raw = load_row(delta_row, delta_t, t, mask) + shift
        dt = tl.where(mask, softplus(raw) if SOFTPLUS else raw, 0.0)
        B_now = load_projection(B_row, B_n, B_t, n, t, dstate, mask)
        C_now = load_projection(C_row, C_n, C_t, n, t, dstate, mask)
        # The state before each step, by the scan of the steps before; so that it need not be found
        # as a difference from the state after it, which loses digits.
        earlier = mask & (steps > 0)
        dt_before = load_dt(delta_row, delta_t, t - 1, earlier, shift, SOFTPLUS)
        weight = dt_before * load_row(u_row, u_t, t - 1, earlier)
        term = weight[None, :] * load_projection(B_row, B_n, B_t, n, t - 1, dstate, earlier)
        factor = tl.exp(dt_before[None, :] * rate[:, None])
        factor, term = tl.associative_scan((factor, term), 1, then)
        decayed = tl.exp(dt[None, :] * rate[:, None]) * (factor * state[:, None] + term)
        states = decayed + (dt * u_now)[None, :] * B_now

        dy = load_row(row_at(dout, dout_b, dout_d, b, d), dout_t, t, mask)
        if HAS_Z:
            y = tl.sum(states * C_now, 0)
            if HAS_D:
                y += tl.load(D + d * D_d).to(tl.float32) * u_now
            gate = load_row(row_at(z, z_b, z_d, b, d), z_t, t, mask)
            sigmoid = tl.sigmoid(gate)
            grad = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
            tl.store(row_at(dz, dz_b, dz_d, b, d) + t * dz_t, grad, mask=mask)
            if HAS_OUT_Z:
                gated = y * gate * sigmoid
                tl.store(row_at(out_z, out_z_b, out_z_d, b, d) + t * out_z_t, gated, mask=mask)
            dy *= gate * sigmoid

        dt_next = load_dt(delta_row, delta_t, t + 1, t + 1 < seqlen, shift, SOFTPLUS)
        factor = tl.exp(dt_next[None, :] * rate[:, None])
        factor, term = tl.associative_scan((factor, dy[None, :] * C_now), 1, then, reverse=True)
        dstates = factor * dstate_next[:, None] + term

        drate = dstates * decayed  # the gradient of dt A
        dinput = tl.sum(dstates * B_now, 0)
        ddt = tl.sum(drate * rate[:, None], 0) + dinput * u_now
        if SOFTPLUS:
            ddt *= tl.sigmoid(raw)
        ddt = tl.where(mask, ddt, 0.0)
        dinput *= dt
        sums = (b * tiles + tile) * dim + d
        if HAS_D:
            dinput += tl.load(D + d * D_d).to(tl.float32) * dy
            tl.store(dD + sums, tl.sum(dy * u_now, 0))
        if HAS_BIAS:
            tl.store(dbias + sums, tl.sum(ddt, 0))
        tl.store(row_at(du, du_b, du_d, b, d) + t * du_t, dinput, mask=mask)
        tl.store(row_at(ddelta, ddelta_b, ddelta_d, b, d) + t * ddelta_t, ddt, mask=mask)
        tl.store(dA + sums * dstate + n, tl.sum(drate * dt[None, :], 1), mask=inside)
        dB_now = dstates * (dt * u_now)[None, :]
        dC_now = dy[None, :] * states
        if VARIABLE_B:
            sum_B += dB_now
        else:
            tl.store(dB + sums * dstate + n, tl.sum(dB_now, 1), mask=inside)
        if VARIABLE_C:
            sum_C += dC_now
        else:
            tl.store(dC + sums * dstate + n, tl.sum(dC_now, 1), mask=inside)

    place = ((part * batch + b) * groups + g) * dstate + n.to(tl.int64)
    place = place[:, None] * CHUNK + (tile * BLOCK_T + steps)[None, :]
    if VARIABLE_B:
        tl.store(dB + place, sum_B, mask=inside[:, None] & mask[None, :])
    if VARIABLE_C:
        tl.store(dC + place, sum_C, mask=inside[:, None] & mask[None, :])


def backward(inputs, dout, x, grads):
    """Fills grads. x may be None if there is one chunk."""
    u, delta, A, B, C = inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C
    D, z, bias = inputs.D, inputs.z, inputs.delta_bias
    batch, dim, seqlen = u.shape
    dstate, groups, chunk_steps = A.shape[1], inputs.groups, arguments.CHUNK
    per_group = dim // groups
    parts = triton.cdiv(per_group, CHANNELS)
    block_n, block_t = tile_sizes(dstate)

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    # Sized for whole chunks, reused by all of them.
    tiles = triton.cdiv(min(seqlen, chunk_steps), block_t)
    before, after = empty(batch * dim * tiles * dstate), empty(batch * dim * tiles * dstate)
    carry = torch.zeros((batch, dim, dstate), dtype=torch.float32, device=u.device)
    by_tile, by_part = (batch, tiles, dim), (parts, batch, groups, dstate, chunk_steps)
    dA = empty(*by_tile, dstate)
    dB = empty(*by_part) if B.dim() == 4 else empty(*by_tile, dstate)
    dC = empty(*by_part) if C.dim() == 4 else empty(*by_tile, dstate)
    dD = None if D is None else empty(*by_tile)
    dbias = None if bias is None else empty(*by_tile)
    if x is None:
        x = carry  # not read

    for chunk in reversed(range(triton.cdiv(seqlen, chunk_steps))):
        steps = slice(chunk * chunk_steps, min(seqlen, (chunk + 1) * chunk_steps))
        tiles = triton.cdiv(steps.stop - steps.start, block_t)
        sizes = {"BLOCK_N": block_n, "BLOCK_T": block_t, "CHUNK": chunk_steps}
        flags = {
            "SOFTPLUS": inputs.delta_softplus,
            "HAS_Z": z is not None,
            "HAS_BIAS": bias is not None,
        }
        with device_of(u):
            _boundaries[(batch * dim,)](
                u,
                delta,
                A,
                B,
                C,
                z,
                bias,
                dout,
                x,
                before,
                after,
                carry,
                dim,
                seqlen,
                dstate,
                per_group,
                x.shape[2],
                chunk,
                tiles,
                *strides(u),
                *strides(delta),
                *strides(z),
                *strides(dout),
                *A.stride(),
                *projection_strides(B),
                *projection_strides(C),
                vector_stride(bias),
                **flags,
                **sizes,
            )
            _backward[(batch * groups * parts * tiles,)](
                u,
                delta,
                A,
                B,
                C,
                D,
                z,
                bias,
                dout,
                before,
                after,
                grads.du,
                grads.ddelta,
                grads.dz,
                grads.out_z,
                dA,
                dB,
                dC,
                dD,
                dbias,
                batch,
                dim,
                seqlen,
                dstate,
                per_group,
                parts,
                chunk,
                tiles,
                *strides(u),
                *strides(delta),
                *strides(z),
                *strides(dout),
                *strides(grads.du),
                *strides(grads.ddelta),
                *strides(grads.dz),
                *strides(grads.out_z),
                *A.stride(),
                *projection_strides(B),
                *projection_strides(C),
                vector_stride(D),
                vector_stride(bias),
                HAS_D=D is not None,
                HAS_OUT_Z=grads.out_z is not None,
                VARIABLE_B=B.dim() == 4,
                VARIABLE_C=C.dim() == 4,
                CHANNELS=CHANNELS,
                **flags,
                **sizes,
            )

        def add(total, terms, tiles=tiles, steps=steps):
            if total is None:
                return
            if total.dim() == 4:
                total[..., steps] = terms[..., : steps.stop - steps.start].sum(0)
            else:
                used = terms.flatten()[: batch * tiles * total.numel()]
                total += used.view(batch * tiles, *total.shape).sum(0)

        add(grads.dA, dA)
        add(grads.dB, dB)
        add(grads.dC, dC)
        add(grads.dD, dD)
        add(grads.ddelta_bias, dbias)
