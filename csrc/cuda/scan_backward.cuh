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

constexpr int kLanes = 8;  // a channel's, in time

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

// Gradient of y of a thread's steps: dout, through the gate.
template <typename F>
__device__ __forceinline__ void load_dy(const BackwardArgs& p, const Segment& s, int64_t d,
                                        int64_t t, int64_t end, F (&dy)[kItems<F>]) {
  load_times(p.dout, p.dout.at(s.batch, d), t, s.begin, end, dy);
  if (!p.z.given()) return;
  F z[kItems<F>];
  load_times(p.z, p.z.at(s.batch, d), t, s.begin, end, z);
#pragma unroll
  for (int i = 0; i < kItems<F>; ++i) dy[i] *= z[i] * sigmoid(z[i]);
}

// b's row of a tile, or, where B is constant in time, its number for the channel.
template <typename F, bool CONSTANTS>
__device__ __forceinline__ void read_projection(const View& v, bool constant, const F* row,
                                                const Place<kLanes>& at, int64_t n,
                                                F (&x)[kItems<F>]) {
  if (CONSTANTS && constant) {
    const F value = at.active ? load<F>(v.at(at.d, n), v.dtype) : F(0);
#pragma unroll
    for (int i = 0; i < kItems<F>; ++i) x[i] = value;
  } else {
    Tile<F, kLanes>::read(row, at.lane, x);
  }
}

}  // namespace causal_conv1d::gpu::scan
