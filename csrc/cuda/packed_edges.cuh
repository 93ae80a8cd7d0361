// The first and last steps of packed sequences, which the kernels of variants.cuh compute without
// states: a thread has all such steps of a channel, with their inputs in registers.
#pragma once

#include "any_options.cuh"

namespace causal_conv1d::gpu {

// Threads per sequence: all lanes of a warp are to have the same one.
CAUSAL_CONV1D_DEVICE constexpr int64_t edge_channels(int64_t dim) { return ceil_div(dim, 32) * 32; }

// A sequence, and the calling lane's channel of it.
struct PackedRow {
  int64_t row, begin, end;
  int64_t d0, d, dim;  // the first lane's channel; the lane's own, or the last
  bool own;            // whether that is its own

  __device__ __forceinline__ PackedRow(const AnyOptions& o, int64_t row_, int64_t d_, int64_t dim_)
      : row(row_),
        begin(o.bounds[row_]),
        end(o.bounds[row_ + 1]),
        d0(d_ - threadIdx.x % 32),
        d(min(d_, dim_ - 1)),
        dim(dim_),
        own(d_ < dim_) {}
  __device__ __forceinline__ bool has(int64_t t) const { return t >= begin && t < end; }
};

// The N steps from s0 on, 0 where there are none. All lanes must call it: along time they load for
// each other.
template <int N, typename T>
__device__ __forceinline__ void load_steps(const View<T>& v, const PackedRow& r, int64_t s0,
                                           T (&x)[N]) {
  const T zero = from_compute<T>(0.0f);
  if (abs(v.dim) <= abs(v.time)) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = zero;
      if (r.has(s0 + i)) x[i] = *v.at(0, r.d, s0 + i);
    }
    return;
  }
  constexpr int kSteps = N <= 8 ? 8 : (N <= 16 ? 16 : 32), kAtOnce = 8;
  __shared__ T of_channel[kWarps][32][N + 1];
  auto& rows = of_channel[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, step = lane % kSteps;
  const bool has = step < N && r.has(s0 + step);
  __syncwarp();  // all have read what was there before
#pragma unroll
  for (int i = 0; i < kSteps; i += kAtOnce) {
    T loaded[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t d = r.d0 + ((i + j) * 32 + lane) / kSteps;
      loaded[j] = zero;
      if (has && d < r.dim) loaded[j] = *v.at(0, d, s0 + step);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (step < N) rows[((i + j) * 32 + lane) / kSteps][step] = loaded[j];
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = rows[lane][i];
}

// x'~ of the N steps from s0 on; what is not there is 0. All lanes must call it.
template <int N, typename Args>
__device__ __forceinline__ void load_inputs(const Args& p, const PackedRow& r, int64_t s0,
                                            float (&x)[N]) {
  using T = typename Args::Element;
  const int64_t to_state = p.width - 1 - r.begin;
  T raw[N];
  uint32_t state[N];
  load_steps(p.x, r, s0, raw);
  const bool states = p.initial_states.given() && s0 < r.begin;
#pragma unroll
  for (int i = 0; i < N; ++i) {  // all are in flight before the first is converted
    const int64_t s = s0 + i;
    state[i] = 0;
    if (states && s < r.begin && s + to_state >= 0) {
      state[i] = p.initial_states.bits(r.row, r.d, s + to_state);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = to_compute(raw[i]);
    if (s0 + i < r.begin) x[i] = AnyView<float>::convert(state[i], p.initial_states.dtype);
  }
  if (!p.pre_gate.given()) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (r.has(s0 + i)) x[i] = gated_input(p, 0, r.d, s0 + i);
  }
}

template <int WMAX, typename Args>
__device__ __forceinline__ void load_weights(const Args& p, int64_t d, float (&w)[WMAX]) {
  const int first = WMAX - p.width;
#pragma unroll
  for (int k = 0; k < WMAX; ++k) {
    w[k] = has_tap<WMAX>(k, first) ? p.weight.load(d, k - first) * p.scale : 0.0f;
  }
}

}  // namespace causal_conv1d::gpu
