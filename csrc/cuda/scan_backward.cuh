// What the kernels of the scan's backward share. Time is cut into chunks, each of one segment, and
// all chunks of a span (scan_backward_plan.h) are taken in parallel:
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
  int64_t all_chunks, chunks_a_row;
  int64_t* first_chunks;
  // Those of the span. Buffers of chunks begin with its first.
  int64_t begin, chunks;
  // (dim, dstate), of the sequence that a border of the span divides: h before the span and g
  // after it, both known; g before it; and in a sweep, which is for it alone, h after it.
  const void *h_before, *g_after;
  void *g_before, *h_after;
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

// The span's index-th chunk. All chunks have numbers of 32 bits.
template <int STEPS>
__device__ __forceinline__ Chunk find_chunk(const BackwardArgs& p, int64_t index) {
  index += p.begin;
  if (p.first_chunks == nullptr) {
    const uint32_t a_row = static_cast<uint32_t>(p.chunks_a_row), i = static_cast<uint32_t>(index);
    const uint32_t row = i / a_row;
    return {{row, 0, p.sequences.seqlen}, row, static_cast<int64_t>(i - row * a_row) * STEPS, true};
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

// A thread's channel, the channel-th of the block, and lane in time.
struct Place {
  int channel, lane;
  int64_t d;
  bool active;
  __device__ __forceinline__ explicit Place(const BlockChannels& channels) {
    channel = threadIdx.x / kLanes;
    lane = threadIdx.x % kLanes;
    d = channels.first + channel;
    active = channel < channels.count;
  }
};

// A thread's steps of a chunk, of which part is there.
struct Row : Place {
  int step;                  // the first, in the chunk
  int64_t batch, first, t0;  // first: the block's first channel
  Part part;
  __device__ __forceinline__ Row(const BlockChannels& channels, const Chunk& chunk, int items)
      : Place(channels) {
    step = lane * items;
    batch = chunk.segment.batch;
    first = channels.first;
    t0 = chunk.t0;
    const Part all = Part::of(t0, chunk.segment.begin, chunk.segment.end);
    part = {all.first - step, active ? all.last - step : 0};
  }
  // The first term is the block's.
  __device__ __forceinline__ char* in(const View& v) const {
    return v.data + (batch * v.strides[0] + first * v.strides[1] + t0 * v.step) +
           (channel * v.strides[1] + step * v.step);
  }
};

// A tensor's steps of a thread: start() starts the loads, end() ends them. Loads of any strides
// take so many registers that they start no sooner than they end.
template <typename F, bool FAST>
struct RowLoad {
  Raw<F, kItems<F>> raw;

  __device__ __forceinline__ void start(const View& v, const Row& at) {
    if (FAST && v.given()) start_load<FAST>(raw, v, at.in(v), at.part);
  }
  __device__ __forceinline__ void end(const View& v, const Row& at, F (&x)[kItems<F>]) const {
    if constexpr (FAST) {
      end_load<FAST>(raw, v, at.part, x);
    } else {
      load_part(v, at.in(v), at.part, x);
    }
  }
};

template <typename F>
__device__ __forceinline__ void store_row(const View& v, const Row& at, const F (&x)[kItems<F>]) {
  if (v.given()) store_part(v, at.in(v), at.part, x);
}

// dt, dt u and dy, the gradient of y: dout, through the gate.
template <typename F, bool FAST>
struct StepLoads {
  RowLoad<F, FAST> u, delta, dout, z;
  RawNumber<F> bias;

  __device__ __forceinline__ void start(const BackwardArgs& p, const Row& at) {
    bias.load(p.delta_bias, p.delta_bias.at(at.d), at.active && p.delta_bias.given());
    delta.start(p.delta, at);
    u.start(p.u, at);
    z.start(p.z, at);
    dout.start(p.dout, at);
  }
  __device__ __forceinline__ void end(const BackwardArgs& p, const Row& at, F (&dt)[kItems<F>],
                                      F (&dtu)[kItems<F>], F (&dy)[kItems<F>]) const {
    delta.end(p.delta, at, dt);
    to_dt(p, bias.get(p.delta_bias), at.part, dt);
    u.end(p.u, at, dtu);
#pragma unroll
    for (int i = 0; i < kItems<F>; ++i) dtu[i] *= dt[i];
    dout.end(p.dout, at, dy);
    if (!p.z.given()) return;
    F gate[kItems<F>];
    z.end(p.z, at, gate);
#pragma unroll
    for (int i = 0; i < kItems<F>; ++i) dy[i] *= gate[i] * sigmoid(gate[i]);
  }
};

// B or C of a lane's steps: from the tile, or the channel's number if constant in time.
template <typename F, bool FAST>
__device__ __forceinline__ void read_projection(const View& v, bool constant, const F* row,
                                                const Place& at, int64_t n, F (&x)[kItems<F>]) {
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
  PendingRates<F, STATES, kLaneChannels> A;

  __device__ __forceinline__ void start(const BackwardArgs& p, const BlockChannels& channels,
                                        const Chunk& chunk, int n0, int many) {
    projections.load(p, chunk.segment, channels.group, n0, many, chunk.t0);
    A.load(p, channels.first, n0, many, channels.count);
  }
  __device__ __forceinline__ void end(const BackwardArgs& p, const BlockChannels& channels,
                                      const Chunk& chunk, int n0, int many, F* to_B, F* to_C,
                                      F* to_A, int pitch) const {
    projections.store(p, chunk.segment, channels.group, n0, many, chunk.t0, to_B, to_C, pitch);
    A.store(p, many, to_A, pitch);
  }
};

}  // namespace causal_conv1d::gpu::scan
