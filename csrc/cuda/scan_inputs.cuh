// What forward and backward read, and how a block's threads share it.
//
// A warp is 32 / TL channels of TL lanes in time; a lane has kItems consecutive steps of a channel
// in registers, and the block's channels, of one group, share tiles of B and C in shared memory.
// States are taken one after another: with h = P h_before + H over a lane's steps, the lanes find
// what comes before each by a scan over P and H, and go over their steps again. So there is one
// exponential for a state and step, no sum over states between lanes, and time is in parallel.
#pragma once

#include "scan_math.cuh"
#include "scan_segments.cuh"

namespace causal_conv1d::gpu::scan {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

template <int TL>
constexpr int kChannels = kWarps * (32 / TL);  // a block
template <typename F, int TL>
constexpr int kSteps = TL * kItems<F>;  // a chunk: the steps that a block has at a time

struct Inputs {
  View u, delta, A, B, C, D, z, delta_bias, initial_states;
  Sequences sequences;
  int64_t dim, group_dim, groups, dstate;
  bool softplus, B_constant, C_constant;

  __host__ __device__ __forceinline__ int64_t blocks_a_group(int channels) const {
    return (group_dim + channels - 1) / channels;
  }
};

inline Inputs make_inputs(const ScanInputs& in) {
  Inputs p{};
  p.u = view(in.u);
  p.delta = view(in.delta);
  p.A = view(in.A);
  p.B = view(in.B);
  p.C = view(in.C);
  p.D = view(in.D);
  p.z = view(in.z);
  p.delta_bias = view(in.delta_bias);
  p.initial_states = view(in.initial_states);
  p.sequences = sequences(in);
  p.dim = in.u.sizes[1];
  p.groups = groups_of(in);
  p.group_dim = p.dim / p.groups;
  p.dstate = in.A.sizes[1];
  p.softplus = in.delta_softplus != 0;
  p.B_constant = is_constant(in.B);
  p.C_constant = is_constant(in.C);
  return p;
}

// A thread's place: its channel d, the i-th of the block, and its lane in time.
template <int TL>
struct Place {
  int lane, channel;
  int64_t group, first, d;
  bool active;  // the last block of a group may have less channels than kChannels

  // Of the block-th kChannels channels.
  __device__ __forceinline__ Place(const Inputs& p, int64_t block) {
    const int64_t a_group = p.blocks_a_group(kChannels<TL>);
    lane = threadIdx.x % TL;
    channel = threadIdx.x / TL;
    group = block / a_group;
    first = group * p.group_dim + block % a_group * kChannels<TL>;
    d = first + channel;
    active = d < (group + 1) * p.group_dim;
  }
  // Channels of the block that there are.
  __device__ __forceinline__ int count(const Inputs& p) const {
    const int64_t left = (group + 1) * p.group_dim - first;
    return left < kChannels<TL> ? static_cast<int>(left) : kChannels<TL>;
  }
};

// A tile's row holds a state's kSteps numbers so that lanes which read 16 bytes each meet no bank
// twice: first 16 bytes of every lane, then the next.
template <typename F, int TL>
struct Tile {
  static constexpr int kVector = 16 / sizeof(F), kRow = kSteps<F, TL>;

  // Rows n0 .. n0 + count - 1 of B or C; zero beyond dstate.
  static __device__ __forceinline__ void fill(const View& v, const Segment& s, int64_t group,
                                              int64_t n0, int count, int64_t dstate, int64_t t0,
                                              F* tile) {
    constexpr int vectors = kRow / kVector, per_lane = kItems<F> / kVector;
    const bool states_adjacent = v.strides[2] < v.step;
    for (int i = threadIdx.x; i < count * vectors; i += kThreads) {
      const int n = states_adjacent ? i % count : i / vectors;
      const int q = states_adjacent ? i / count : i % vectors;
      F x[kVector];
      const int64_t end = n0 + n < dstate ? s.end : s.begin;
      load_times(v, v.at(s.batch, group, n0 + n), t0 + q * kVector, s.begin, end, x);
      store_vector(tile + n * kRow + (q % per_lane * TL + q / per_lane) * kVector, x);
    }
  }

  static __device__ __forceinline__ void read(const F* row, int lane, F (&x)[kItems<F>]) {
#pragma unroll
    for (int i = 0; i < kItems<F>; i += kVector) {
      F v[kVector];
      load_vector(row + i * TL + lane * kVector, v);
#pragma unroll
      for (int j = 0; j < kVector; ++j) x[i + j] = v[j];
    }
  }
};

// Numbers (state, channel) of f(channel, state) to shared memory, 0 for channels that there are not.
template <int TL, typename F, typename Function>
__device__ __forceinline__ void fill_channels(int states, int count, F* to, Function&& f) {
  constexpr int channels = kChannels<TL>;
  for (int i = threadIdx.x; i < channels * states; i += kThreads) {
    const int n = i % states, channel = i / states;
    to[n * channels + channel] = channel < count ? f(channel, n) : F(0);
  }
}

// Delta of a thread's steps to dt; 0 outside the segment, where a step changes nothing.
template <typename F>
__device__ __forceinline__ void load_dt(const Inputs& p, const char* row, F bias, int64_t t,
                                        int64_t begin, int64_t end, F (&dt)[kItems<F>]) {
  load_times(p.delta, row, t, begin, end, dt);
#pragma unroll
  for (int i = 0; i < kItems<F>; ++i) {
    dt[i] += bias;
    if (p.softplus) dt[i] = softplus(dt[i]);
    if (t + i < begin || t + i >= end) dt[i] = 0;
  }
}

// The state before a lane's steps, of those lanes whose steps it follows. H and P: a lane's end
// from 0 and its decay; carry: the state before the first lane; last: after the last one.
template <int TL, typename F>
__device__ __forceinline__ F scan_forward(F P, F H, F carry, int lane, F* last) {
  if (lane == 0) H = fma(P, carry, H);
#pragma unroll
  for (int s = 1; s < TL; s *= 2) {
    const F other = __shfl_up_sync(~0u, H, s, TL);
    const F decay = 2 * s < TL ? __shfl_up_sync(~0u, P, s, TL) : F(0);
    if (lane >= s) {
      H = fma(P, other, H);
      P *= decay;
    }
  }
  *last = H;
  const F before = __shfl_up_sync(~0u, H, 1, TL);
  return lane == 0 ? carry : before;
}

// The same in reverse, for gradients.
template <int TL, typename F>
__device__ __forceinline__ F scan_backward(F P, F G, F carry, int lane) {
  if (lane == TL - 1) G = fma(P, carry, G);
#pragma unroll
  for (int s = 1; s < TL; s *= 2) {
    const F other = __shfl_down_sync(~0u, G, s, TL);
    const F decay = 2 * s < TL ? __shfl_down_sync(~0u, P, s, TL) : F(0);
    if (lane + s < TL) {
      G = fma(P, other, G);
      P *= decay;
    }
  }
  const F after = __shfl_down_sync(~0u, G, 1, TL);
  return lane == TL - 1 ? carry : after;
}

}  // namespace causal_conv1d::gpu::scan
