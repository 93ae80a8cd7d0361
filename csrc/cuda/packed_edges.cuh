// The first and last steps of packed sequences, which the kernels of variants.cuh compute without
// states: a warp has those of a sequence's 32 channels, a lane those of one, in registers. Loads
// are started long before they are used.
#pragma once

#include "any_options.cuh"
#include "schedule.cuh"

namespace causal_conv1d::gpu {

// Threads per sequence: all lanes of a warp are to have the same one.
CAUSAL_CONV1D_DEVICE constexpr int64_t edge_channels(int64_t dim) { return ceil_div(dim, 32) * 32; }

template <typename T>
__device__ __forceinline__ bool along_time(const View<T>& v) {
  return abs(v.dim) > abs(v.time);
}

// Which of `count` things, and which channel, the calling thread has; returns what is left. Warps
// beside each other go along memory.
template <typename T>
__device__ __forceinline__ int64_t split_edges(const View<T>& x, int64_t dim, int64_t count,
                                               int64_t* i, int64_t* d) {
  const int64_t groups = ceil_div(dim, 32);
  int64_t rest = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (along_time(x)) {
    rest = split(split(rest, count, i), groups, d);
  } else {
    rest = split(split(rest, groups, d), count, i);
  }
  *d = *d * 32 + threadIdx.x % 32;
  return rest;
}

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
};

// Some steps from s0 on, of which the sequence has [lo, hi).
struct EdgeSpan {
  int64_t s0;
  int lo, hi;

  __device__ __forceinline__ EdgeSpan(const PackedRow& r, int64_t s0_)
      : s0(s0_),
        lo(static_cast<int>(max(r.begin - s0_, int64_t(-kFar)))),
        hi(static_cast<int>(min(r.end - s0_, int64_t(kFar)))) {}
  __device__ __forceinline__ bool has(int i) const { return i >= lo && i < hi; }
};

// N steps of a tensor. Along time, lanes load and store for each other: all must call it all.
template <int N, typename T>
class EdgeSteps {
  static constexpr int kLanes = N <= 4 ? 4 : (N <= 8 ? 8 : 16);  // for a channel
  static_assert(N <= kLanes, "a step per lane");

 public:
  __device__ __forceinline__ EdgeSteps(const View<T>& v, const PackedRow& r, int64_t s0)
      : along_time_(along_time(v)) {
    const int lane = threadIdx.x % 32;
    step_ = lane % kLanes;
    channels_ = static_cast<int>(min(r.dim - r.d0, int64_t(32)));
    own_ = r.own;
    data_ = along_time_ ? v.at(0, r.d0 + lane / kLanes, s0 + step_) : v.at(0, r.d, s0);
    stride_ = along_time_ ? 32 / kLanes * v.dim : v.time;
  }

  // Starts to load them; what the sequence has not is 0.
  __device__ __forceinline__ void load(const EdgeSpan& span) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      loaded_[i] = from_compute<T>(0.0f);
      const int step = along_time_ ? step_ : i;
      if (step < N && span.has(step) && (!along_time_ || row(i) < channels_)) {
        loaded_[i] = data_[i * stride_];
      }
    }
  }
  // Those of the lane's channel.
  __device__ __forceinline__ void get(T (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = loaded_[i];
    if (!along_time_) return;
    auto& rows = shared();
    __syncwarp();  // all have read what was there before
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if (step_ < N) rows[row(i)][step_] = loaded_[i];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = rows[threadIdx.x % 32][i];
  }
  // Stores those from lo to hi - 1.
  __device__ __forceinline__ void store(const T (&x)[N], int lo, int hi) const {
    auto& rows = shared();
    if (along_time_) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < N; ++i) rows[threadIdx.x % 32][i] = x[i];
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int step = along_time_ ? step_ : i;
      if (step >= N || step < lo || step >= hi) continue;
      if (along_time_) {
        if (row(i) < channels_) data_[i * stride_] = rows[row(i)][step];
      } else if (own_) {
        data_[i * stride_] = x[i < N ? i : 0];
      }
    }
  }

 private:
  using Shared = T[32][N + 1];
  static __device__ __forceinline__ Shared& shared() {
    __shared__ T of_warp[kWarps][32][N + 1];
    return of_warp[threadIdx.x / 32];
  }
  // Of the i-th access along time, the channel after the first lane's.
  static __device__ __forceinline__ int row(int i) { return (i * 32 + threadIdx.x % 32) / kLanes; }

  const bool along_time_;
  bool own_;
  int step_, channels_;
  T* data_;
  int64_t stride_;
  T loaded_[kLanes];
};

// The W - 1 states of the calling lane's channel, as the last of H: the constructor starts to load
// them.
template <int H>
class EdgeStates {
 public:
  __device__ __forceinline__ EdgeStates(const AnyView<float>& states, int width, const PackedRow& r)
      : dtype_(states.dtype) {
    const int skip = H + 1 - width;
#pragma unroll
    for (int i = 0; i < H; ++i) {
      bits_[i] = 0;
      if (states.given() && i >= skip) bits_[i] = states.bits(r.row, r.d, i - skip);
    }
  }
  __device__ __forceinline__ float get(int i) const {
    return AnyView<float>::convert(bits_[i], dtype_);
  }

 private:
  uint32_t bits_[H];
  const int32_t dtype_;
};

// x'~ of N steps of x that was loaded: of a short sequence, states may be among them. What is not
// there is 0.
template <int N, typename Args, typename T>
__device__ __forceinline__ void edge_inputs(const Args& p, const PackedRow& r, const EdgeSpan& span,
                                            const T (&raw)[N], float* x) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_compute(raw[i]);
  if (span.lo > 0 && p.initial_states.given()) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int j = i - span.lo + p.width - 1;
      if (i < span.lo && j >= 0) x[i] = p.initial_states.load(r.row, r.d, j);
    }
  }
  if (!p.pre_gate.given()) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (span.has(i)) x[i] = gated_input(p, 0, r.d, span.s0 + i);
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
