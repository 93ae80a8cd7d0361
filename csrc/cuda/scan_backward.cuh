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

#ifndef ENDS_MINB
#define ENDS_MINB 3
#endif
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

// A thread's channel, and its steps of a chunk, of which part is there.
struct Row {
  int channel, lane;
  int64_t batch, d, t;
  Part part;
  bool active;
  __device__ __forceinline__ Row(const BlockChannels& channels, const Chunk& chunk, int items) {
    channel = threadIdx.x / kLanes;
    lane = threadIdx.x % kLanes;
    active = channel < channels.count;
    batch = chunk.segment.batch;
    d = channels.first + channel;
    t = chunk.t0 + lane * items;
    part = Part::of(t, chunk.segment.begin, chunk.segment.end);
    if (!active) part.last = 0;
  }
};

// A tensor's steps of a thread on their way.
template <typename F, bool FAST>
struct RowLoad {
  Raw<F, kItems<F>> raw;

  __device__ __forceinline__ void start(const View& v, const Row& at) {
    if (!v.given()) return;
    start_load<FAST>(raw, v, v.at(at.batch, at.d) + at.t * v.step, at.part);
  }
  __device__ __forceinline__ void end(const View& v, const Row& at, F (&x)[kItems<F>]) const {
    end_load<FAST>(raw, v, at.part, x);
  }
};

template <typename F>
__device__ __forceinline__ void store_row(const View& v, const Row& at, const F (&x)[kItems<F>]) {
  if (v.given()) store_part(v, v.at(at.batch, at.d) + at.t * v.step, at.part, x);
}

// dt, dt u and dy, the gradient of y: dout, through the gate.
template <typename F, bool FAST>
struct StepLoads {
  RowLoad<F, FAST> u, delta, dout, z;
  F bias;

  __device__ __forceinline__ void start(const BackwardArgs& p, const Row& at) {
    delta.start(p.delta, at);
    u.start(p.u, at);
    z.start(p.z, at);
    dout.start(p.dout, at);
    bias = at.active ? load_or(p.delta_bias, F(0), at.d) : F(0);
  }
  __device__ __forceinline__ void end(const BackwardArgs& p, const Row& at, F (&dt)[kItems<F>],
                                      F (&dtu)[kItems<F>], F (&dy)[kItems<F>]) const {
    delta.raw.get(p.delta.dtype, dt);
    to_dt(p, bias, at.part, dt);
    u.end(p.u, at, dtu);
#pragma unroll
    for (int i = 0; i < kItems<F>; ++i) dtu[i] *= dt[i];
    if (p.z.given()) {
      F gate[kItems<F>];
      z.end(p.z, at, gate);
#pragma unroll
      for (int i = 0; i < kItems<F>; ++i) gate[i] *= sigmoid(gate[i]);
      dout.end(p.dout, at, dy);
#pragma unroll
      for (int i = 0; i < kItems<F>; ++i) dy[i] *= gate[i];
    } else {
      dout.end(p.dout, at, dy);
    }
  }
};

// B or C of a lane's steps: from the tile, or the channel's number if constant in time.
template <typename F, bool FAST>
__device__ __forceinline__ void read_projection(const View& v, bool constant, const F* row,
                                                const Row& at, int64_t n, F (&x)[kItems<F>]) {
  if (!FAST && constant) {
    const F value = at.active ? load_number<F>(v.at(at.d, n), v.dtype) : F(0);
#pragma unroll
    for (int i = 0; i < kItems<F>; ++i) x[i] = value;
  } else {
    TileRow<F, kLanes, kItems<F>>::read(row, x);
  }
}

// B, C and A, the last times log2(e), of the states from n0 on.
template <typename F, int STATES, bool FAST>
struct TileLoads {
  Projections<F, kLanes, kItems<F>, STATES, FAST> projections;
  PendingChannels<F, STATES, kLaneChannels> A;

  __device__ __forceinline__ void start(const BackwardArgs& p, const BlockChannels& channels,
                                        const Chunk& chunk, int n0, int many) {
    projections.load(p, chunk.segment, channels.group, n0, many, chunk.t0);
    A.load(many, channels.count, [&](int channel, int n) {
      return load_number<F>(p.A.at(channels.first + channel, n0 + n), p.A.dtype);
    });
  }
  __device__ __forceinline__ void end(const BackwardArgs& p, const BlockChannels& channels,
                                      const Chunk& chunk, int n0, int many, F* to_B, F* to_C,
                                      F* to_A, int pitch) {
    projections.store(p, chunk.segment, channels.group, n0, many, chunk.t0, to_B, to_C, pitch);
#pragma unroll
    for (F& x : A.x) x *= F(kLog2e);
    A.store(many, to_A, pitch);
  }
};

}  // namespace causal_conv1d::gpu::scan
