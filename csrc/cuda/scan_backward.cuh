// What the kernels of the scan's backward share. Time is cut into chunks, each of one segment, and
// all chunks are taken in parallel:
//   1. chunk_ends: the state after each chunk from 0 (of h), and before it from 0 (of g);
//   2. pass_states: hands states on from chunk to chunk, h forward and g in reverse;
//   3. gradients: every chunk once more, now with the right states before and after it;
//   4. sums over chunks and channels, in a fixed order.
// Here g[t] is the gradient of h[t]: g[t] = C[t] dy[t] + a[t+1] g[t+1] with a = exp(dt A).
#pragma once

#include "scan_inputs.cuh"

namespace causal_conv1d::gpu::scan {

constexpr int kLanes = 8, kLaneChannels = kWarps * 32 / kLanes;  // a channel's lanes, in time
using BlockChannels = Channels<kLaneChannels>;

struct BackwardArgs : Inputs {
  View dout, dlast_states, du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_states, out;
  // In chunks: all (with cu_seqlens there may be less), those of a row, and with cu_seqlens each
  // sequence's first one and their number.
  int64_t chunks, chunks_a_row;
  int64_t* first_chunks;
  // Blocks of channels that one block of `gradients` takes, one after another; parts a group.
  int64_t passes, parts;
  // Workspace. (chunks, dim, dstate): h before and a g after each chunk; later dA in place of h.
  void *h, *g;
  // (chunks, dim, dstate), of constant B and C.
  void *dB_constant, *dC_constant;
  // (chunks, dim): the sums of dt, of dy u, and of ddelta.
  void *sum_dt, *sum_D, *sum_bias;
  // (parts, chunks, groups, dstate, steps): dB and dC.
  void *part_B, *part_C;
};

struct Chunk {
  Segment segment;
  int64_t sequence, t0;
  bool exists;
};

// The index-th chunk.
template <int STEPS>
__device__ __forceinline__ Chunk find_chunk(const BackwardArgs& p, int64_t index) {
  if (p.first_chunks == nullptr) {
    const int64_t row = index / p.chunks_a_row;
    return {p.sequences.segment(row), row, index % p.chunks_a_row * STEPS, true};
  }
  const int64_t all = p.sequences.count;
  if (index >= p.first_chunks[all]) return {{0, 0, 0}, 0, 0, false};
  int64_t low = 0, high = all;  // first_chunks[low] <= index < first_chunks[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.first_chunks[middle] <= index ? low : high) = middle;
  }
  const Segment s = p.sequences.segment(low);
  return {s, low, s.first() + (index - p.first_chunks[low]) * STEPS, true};
}

// A thread's channel, and what it reads and writes of a chunk.
struct Row {
  int channel, lane;
  int64_t batch, d, t, begin, end;
  bool active;
  __device__ __forceinline__ Row(const BlockChannels& channels, const Chunk& chunk, int items) {
    channel = threadIdx.x / kLanes;
    lane = threadIdx.x % kLanes;
    active = channel < channels.count;
    batch = chunk.segment.batch;
    d = channels.first + channel;
    t = chunk.t0 + lane * items;
    begin = chunk.segment.begin;
    end = active ? chunk.segment.end : begin;
  }
};

template <typename F>
__device__ __forceinline__ void load_row(const View& v, const Row& at, F (&x)[kItems<F>]) {
  load_times(v, v.at(at.batch, at.d), at.t, at.begin, at.end, x);
}
template <typename F>
__device__ __forceinline__ void store_row(const View& v, const Row& at, const F (&x)[kItems<F>]) {
  if (v.given()) store_times(v, v.at(at.batch, at.d), at.t, at.begin, at.end, x);
}

// dt, dt u and dy, the gradient of y: dout, through the gate.
template <typename F>
__device__ __forceinline__ void load_steps(const BackwardArgs& p, const Row& at,
                                           F (&dt)[kItems<F>], F (&dtu)[kItems<F>],
                                           F (&dy)[kItems<F>]) {
  const F bias = at.active ? load_or(p.delta_bias, F(0), at.d) : F(0);
  load_row(p.u, at, dtu);
  load_row(p.dout, at, dy);
  load_dt(p, p.delta.at(at.batch, at.d), bias, at.t, at.begin, at.end, dt);
#pragma unroll
  for (int i = 0; i < kItems<F>; ++i) dtu[i] *= dt[i];
  if (!p.z.given()) return;
  F z[kItems<F>];
  load_row(p.z, at, z);
#pragma unroll
  for (int i = 0; i < kItems<F>; ++i) dy[i] *= z[i] * sigmoid(z[i]);
}

// B or C of a lane's steps: from the tile, or the channel's number if constant in time.
template <typename F, bool CONSTANTS>
__device__ __forceinline__ void read_projection(const View& v, bool constant, const F* row,
                                                const Row& at, int64_t n, F (&x)[kItems<F>]) {
  if (CONSTANTS && constant) {
    const F value = at.active ? load<F>(v.at(at.d, n), v.dtype) : F(0);
#pragma unroll
    for (int i = 0; i < kItems<F>; ++i) x[i] = value;
  } else {
    TileRow<F, kLanes>::read(row, x);
  }
}

// Tiles of B, C and A, the last times log2(e), of the states from n0 on.
template <int STATES, typename F>
__device__ __forceinline__ void fill_tiles(const BackwardArgs& p, const BlockChannels& channels,
                                           const Chunk& chunk, int n0, int many, F* B, F* C, F* A,
                                           int pitch) {
  using Tile = TileRow<F, kLanes>;
  const Segment& s = chunk.segment;
  if (!p.B_constant) {
    Tile::template fill<STATES>(p.B, s, channels.group, n0, many, chunk.t0, B, pitch);
  }
  if (!p.C_constant) {
    Tile::template fill<STATES>(p.C, s, channels.group, n0, many, chunk.t0, C, pitch);
  }
  fill_channels<STATES, kLaneChannels>(many, channels.count, A, pitch, [&](int channel, int n) {
    return load<F>(p.A.at(channels.first + channel, n0 + n), p.A.dtype) * F(kLog2e);
  });
}

}  // namespace causal_conv1d::gpu::scan
