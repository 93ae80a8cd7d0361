"""The selective scan of ``selective_scan.py`` in Triton: real numbers, float32 arithmetic.

A tile is (state, step) of one channel, a power of two each. Within it the recurrence is an
associative scan along the steps over pairs (factor, term); between tiles a state of dstate numbers
is handed on.

forward: one program a channel (batch, dim) walks over the tiles of its row.
backward: chunks of ``CHUNK`` steps from the last one on, with two kernels each. ``_boundaries``,
one program a channel, finds the state before every tile of the chunk, forwards, and what the last
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

from . import selective_scan

# Elements (state, step) of a tile, for 128 threads; with twice as many the backward spills.
TILE = 1024
# Channels that one program of the backward adds up for dB and dC.
CHANNELS = 64


@triton.jit
def _then(factor, term, next_factor, next_term):
    """The step (factor, term): h -> factor * h + term, followed by the next."""
    return factor * next_factor, next_factor * term + next_term


@triton.jit
def _softplus(x):
    e = tl.exp(x)
    w = 1 + e
    # log(1 + e) without the loss of the digits of a small e in 1 + e.
    log1p = tl.where(w == 1, e, tl.log(w) * (e / (w - 1)))
    return tl.where(x > 20, x, log1p)


@triton.jit
def _row(ptr, stride_b, stride_d, b, d):
    return ptr + b * stride_b + d * stride_d


@triton.jit
def _load(row, stride, t, mask):
    """Steps t of a row; 0 where masked."""
    return tl.load(row + t.to(tl.int64) * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _steps(row, stride, t, mask, bias, SOFTPLUS: tl.constexpr):
    """dt, 0 where masked: such a step changes no state."""
    raw = _load(row, stride, t, mask) + bias
    if SOFTPLUS:
        raw = _softplus(raw)
    return tl.where(mask, raw, 0.0)


@triton.jit
def _projection(row, stride_n, stride_t, n, t, dstate, mask):
    """B or C: (state, step), 0 where masked; stride_t is 0 where it is constant."""
    where = n[:, None] * stride_n + t.to(tl.int64)[None, :] * stride_t
    inside = (n < dstate)[:, None] & mask[None, :]
    return tl.load(row + where, mask=inside, other=0.0).to(tl.float32)


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
    u_row, delta_row = _row(u, u_b, u_d, b, d), _row(delta, delta_b, delta_d, b, d)
    out_row = _row(out, out_b, out_d, b, d)
    B_row = B + b * B_b + g * B_g + d * B_d
    C_row = C + b * C_b + g * C_g + d * C_d
    state = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, seqlen, BLOCK_T):
        t = start + steps
        mask = t < seqlen
        u_now = _load(u_row, u_t, t, mask)
        dt = _steps(delta_row, delta_t, t, mask, shift, SOFTPLUS)
        factor = tl.exp(dt[None, :] * rate[:, None])
        term = (dt * u_now)[None, :] * _projection(B_row, B_n, B_t, n, t, dstate, mask)
        factor, term = tl.associative_scan((factor, term), 1, _then)
        states = factor * state[:, None] + term
        y = tl.sum(states * _projection(C_row, C_n, C_t, n, t, dstate, mask), 0)
        if HAS_D:
            y += tl.load(D + d * D_d).to(tl.float32) * u_now
        tl.store(out_row + t.to(tl.int64) * out_t, y, mask=mask)
        if HAS_Z:
            gate = _load(_row(z, z_b, z_d, b, d), z_t, t, mask)
            y *= gate * tl.sigmoid(gate)
            tl.store(_row(out_z, out_z_b, out_z_d, b, d) + t.to(tl.int64) * out_z_t, y, mask=mask)
        last = steps == BLOCK_T - 1  # the last step of a short row too: masked ones change nothing
        state = tl.sum(tl.where(last[None, :], states, 0.0), 1)
        total += tl.sum(dt, 0)
        end = start + BLOCK_T
        if (end % CHUNK == 0) | (end >= seqlen):
            place = x + ((row * chunks + start // CHUNK) * dstate + n) * 2
            tl.store(place, tl.exp(total * rate), mask=n < dstate)
            tl.store(place + 1, state, mask=n < dstate)


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
    u_row, delta_row = _row(u, u_b, u_d, b, d), _row(delta, delta_b, delta_d, b, d)
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
        dt = _steps(delta_row, delta_t, t, mask, shift, SOFTPLUS)
        factor = tl.exp(dt[None, :] * rate[:, None])
        weight = dt * _load(u_row, u_t, t, mask)
        term = weight[None, :] * _projection(B_row, B_n, B_t, n, t, dstate, mask)
        factor, term = tl.associative_scan((factor, term), 1, _then)
        last = steps == BLOCK_T - 1
        state = tl.sum(tl.where(last[None, :], factor * state[:, None] + term, 0.0), 1)

    # dstates[t] = dy[t] C[t] + exp(dt[t + 1] A) dstates[t + 1]
    dstate_next = tl.load(carry + row * dstate + n, mask=n < dstate, other=0.0)
    for j in range(0, tiles):
        i = tiles - 1 - j
        tl.store(after + (row * tiles + i) * dstate + n, dstate_next, mask=n < dstate)
        t = first + i * BLOCK_T + steps
        mask = t < seqlen
        dt_next = _steps(delta_row, delta_t, t + 1, t + 1 < seqlen, shift, SOFTPLUS)
        dy = _load(_row(dout, dout_b, dout_d, b, d), dout_t, t, mask)
        if HAS_Z:
            gate = _load(_row(z, z_b, z_d, b, d), z_t, t, mask)
            dy *= gate * tl.sigmoid(gate)
        factor = tl.exp(dt_next[None, :] * rate[:, None])
        term = dy[None, :] * _projection(C_row, C_n, C_t, n, t, dstate, mask)
        factor, term = tl.associative_scan((factor, term), 1, _then, reverse=True)
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
        u_row, delta_row = _row(u, u_b, u_d, b, d), _row(delta, delta_b, delta_d, b, d)
        rate = tl.load(A + d * A_d + n * A_n, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(bias + d * bias_d).to(tl.float32) if HAS_BIAS else 0.0
        boundary = ((b * dim + d) * tiles + tile) * dstate + n
        state = tl.load(before + boundary, mask=inside, other=0.0)
        dstate_next = tl.load(after + boundary, mask=inside, other=0.0)

        u_now = _load(u_row, u_t, t, mask)
        raw = _load(delta_row, delta_t, t, mask) + shift
        dt = tl.where(mask, _softplus(raw) if SOFTPLUS else raw, 0.0)
        B_now = _projection(B_row, B_n, B_t, n, t, dstate, mask)
        C_now = _projection(C_row, C_n, C_t, n, t, dstate, mask)
        # The state before each step, by the scan of the steps before; so that it need not be found
        # as a difference from the state after it, which loses digits.
        earlier = mask & (steps > 0)
        dt_before = _steps(delta_row, delta_t, t - 1, earlier, shift, SOFTPLUS)
        weight = dt_before * _load(u_row, u_t, t - 1, earlier)
        term = weight[None, :] * _projection(B_row, B_n, B_t, n, t - 1, dstate, earlier)
        factor = tl.exp(dt_before[None, :] * rate[:, None])
        factor, term = tl.associative_scan((factor, term), 1, _then)
        decayed = tl.exp(dt[None, :] * rate[:, None]) * (factor * state[:, None] + term)
        states = decayed + (dt * u_now)[None, :] * B_now

        dy = _load(_row(dout, dout_b, dout_d, b, d), dout_t, t, mask)
        if HAS_Z:
            y = tl.sum(states * C_now, 0)
            if HAS_D:
                y += tl.load(D + d * D_d).to(tl.float32) * u_now
            gate = _load(_row(z, z_b, z_d, b, d), z_t, t, mask)
            sigmoid = tl.sigmoid(gate)
            grad = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
            tl.store(_row(dz, dz_b, dz_d, b, d) + t * dz_t, grad, mask=mask)
            if HAS_OUT_Z:
                gated = y * gate * sigmoid
                tl.store(_row(out_z, out_z_b, out_z_d, b, d) + t * out_z_t, gated, mask=mask)
            dy *= gate * sigmoid

        dt_next = _steps(delta_row, delta_t, t + 1, t + 1 < seqlen, shift, SOFTPLUS)
        factor = tl.exp(dt_next[None, :] * rate[:, None])
        factor, term = tl.associative_scan((factor, dy[None, :] * C_now), 1, _then, reverse=True)
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
        tl.store(_row(du, du_b, du_d, b, d) + t * du_t, dinput, mask=mask)
        tl.store(_row(ddelta, ddelta_b, ddelta_d, b, d) + t * ddelta_t, ddt, mask=mask)
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


def _blocks(dstate):
    """States and steps of a tile."""
    block_n = triton.next_power_of_2(max(1, dstate))
    return block_n, min(256, max(16, TILE // block_n), selective_scan.CHUNK)


def _strides(tensor):
    """Of (batch, dim, seqlen)."""
    return tensor.stride() if tensor is not None else (0, 0, 0)


def _projection_strides(tensor):
    """Over batch, group, channel, state and step."""
    if tensor.dim() == 2:
        return 0, 0, tensor.stride(0), tensor.stride(1), 0
    return tensor.stride(0), tensor.stride(1), 0, tensor.stride(2), tensor.stride(3)


def _vector_stride(tensor):
    return 0 if tensor is None else tensor.stride(0)


def forward(inputs, out, out_z, x):
    """Writes out, out_z unless None, and x."""
    u, delta, A, B, C = inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C
    D, z, bias = inputs.D, inputs.z, inputs.delta_bias
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    block_n, block_t = _blocks(dstate)
    with _device_of(u):
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
            *_strides(u),
            *_strides(delta),
            *_strides(z),
            *_strides(out),
            *_strides(out_z),
            *A.stride(),
            *_projection_strides(B),
            *_projection_strides(C),
            _vector_stride(D),
            _vector_stride(bias),
            SOFTPLUS=inputs.delta_softplus,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=bias is not None,
            BLOCK_N=block_n,
            BLOCK_T=block_t,
            CHUNK=selective_scan.CHUNK,
        )


def backward(inputs, dout, x, grads):
    """Fills grads. x may be None if there is one chunk."""
    u, delta, A, B, C = inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C
    D, z, bias = inputs.D, inputs.z, inputs.delta_bias
    batch, dim, seqlen = u.shape
    dstate, groups, chunk_steps = A.shape[1], inputs.groups, selective_scan.CHUNK
    per_group = dim // groups
    parts = triton.cdiv(per_group, CHANNELS)
    block_n, block_t = _blocks(dstate)

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
        with _device_of(u):
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
                *_strides(u),
                *_strides(delta),
                *_strides(z),
                *_strides(dout),
                *A.stride(),
                *_projection_strides(B),
                *_projection_strides(C),
                _vector_stride(bias),
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
                *_strides(u),
                *_strides(delta),
                *_strides(z),
                *_strides(dout),
                *_strides(grads.du),
                *_strides(grads.ddelta),
                *_strides(grads.dz),
                *_strides(grads.out_z),
                *A.stride(),
                *_projection_strides(B),
                *_projection_strides(C),
                _vector_stride(D),
                _vector_stride(bias),
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


def _device_of(tensor):
    """Triton launches on the current device. (A CPU tensor is for Triton's interpreter.)"""
    return torch.cuda.device_of(tensor)
