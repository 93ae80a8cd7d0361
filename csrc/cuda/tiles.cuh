// How the fast kernels read x, dout and seq_idx: rows of adjacent channels (channel-last) or tiles
// of adjacent time steps (channel-first).
#pragma once

#include <cuda_pipeline.h>

#include "common.cuh"

namespace causal_conv1d::gpu {

constexpr int kThreads = 128;  // a block, in all fast kernels

// seq_idx, (batch, seqlen); without one every position has id 0.
struct SeqIdx {
  const int32_t* data;
  int64_t batch, time;

  __device__ __forceinline__ int at(int64_t b, int64_t t) const {
    return data == nullptr ? 0 : data[b * batch + t * time];
  }
};

inline SeqIdx seq_idx_view(const Tensor& t) {
  if (!given(t)) return {nullptr, 0, 0};
  return {static_cast<const int32_t*>(t.data), t.strides[0], t.strides[1]};
}

// Rows t = first, first + 1, ... of C adjacent channels, U at a time; rows >= end read as zero.
// ASYNC: by cp.async through a ring of STAGES rows in shared memory, STAGES - U of them in flight
// while U are used. A thread reads back only what it copied itself, so there is no barrier. The
// other form reads with any stride (C == 1).
template <typename T, int C, int U, int STAGES, bool ASYNC>
class Rows;

template <typename T, int C, int U, int STAGES>
class Rows<T, C, U, STAGES, true> {
 public:
  static_assert(STAGES % U == 0, "a ring holds whole groups");
  using Row = Pack<T, C>;
  static constexpr int kSharedRows = STAGES * kThreads;

  // Fills the ring but commits nothing: commit() after the same step of every reader of a loop.
  __device__ __forceinline__ Rows(Row* shared, const T* data, int64_t, int64_t stride, int64_t first,
                                  int64_t end)
      : ring_(shared + threadIdx.x), next_(data + first * stride), stride_(stride), left_(end - first) {}

  __device__ __forceinline__ void prefetch(int group) {
#pragma unroll
    for (int u = 0; u < U; ++u) copy((group * U + u) * kThreads);
  }

  __device__ __forceinline__ void fetch(Row (&rows)[U]) {
#pragma unroll
    for (int u = 0; u < U; ++u) rows[u] = ring_[slot_ + u * kThreads];
#pragma unroll
    for (int u = 0; u < U; ++u) copy(slot_ + u * kThreads);
    slot_ = slot_ + U * kThreads == kSharedRows ? 0 : slot_ + U * kThreads;
  }

 private:
  __device__ __forceinline__ void copy(int slot) {
    if (left_ > 0) {
      __pipeline_memcpy_async(ring_ + slot, next_, sizeof(Row));
    } else {
      ring_[slot] = Row{};
    }
    next_ += stride_;
    --left_;
  }

  Row* ring_;
  const T* next_;
  int64_t stride_, left_;
  int slot_ = 0;
};

template <typename T, int U, int STAGES>
class Rows<T, 1, U, STAGES, false> {
 public:
  using Row = Pack<T, 1>;
  static constexpr int kSharedRows = 1;

  __device__ __forceinline__ Rows(Row*, const T* data, int64_t, int64_t stride, int64_t first,
                                  int64_t end)
      : next_(data + first * stride), stride_(stride), left_(end - first) {}

  __device__ __forceinline__ void prefetch(int) {}

  __device__ __forceinline__ void fetch(Row (&rows)[U]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      rows[u] = left_ > u ? Row{*(next_ + u * stride_)} : Row{};
    }
    next_ += U * stride_;
    left_ -= U;
  }

 private:
  const T* next_;
  int64_t stride_, left_;
};

// The V elements from time t of one row; outside [0, seqlen) they read as zero.
template <typename T, int V, bool VECTOR>
__device__ __forceinline__ Pack<T, V> load_tile(const T* row, int64_t stride, int64_t t,
                                                int64_t seqlen) {
  if (VECTOR && t >= 0 && t + V <= seqlen) return *reinterpret_cast<const Pack<T, V>*>(row + t);
  Pack<T, V> r;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    r.v[i] = t + i >= 0 && t + i < seqlen ? row[(t + i) * stride] : from_compute<T>(0);
  }
  return r;
}

// Time t of the first element of a warp's tiles: at most 0 and such that tiles are aligned to 16
// bytes in row's memory.
template <typename T>
__device__ __forceinline__ int row_phase(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % (16 / sizeof(T)));
}

// The few values that all lanes of a warp on row (b, d) need: each lane fetches one of each kind,
// and shuffles hand them round. All lanes must call the members together.
template <typename T>
struct WarpValues {
  float lane_weight = 0, lane_state = 0, lane_before = 0, bias = 0;

  // p: weight, bias, initial_states, width, and input(b, d, s) for x~. from: where before() begins.
  template <typename Args>
  __device__ __forceinline__ WarpValues(const Args& p, int64_t b, int64_t d, int64_t from, int lane) {
    if (lane < p.width) lane_weight = p.weight.load(d, lane);
    if (lane < p.width - 1 && p.initial_states.given()) lane_state = p.initial_states.load(b, d, lane);
    if (lane < 8 && from + lane < p.seqlen) lane_before = p.input(b, d, from + lane);
    if (p.bias.given()) bias = p.bias.load(d);
  }
  // weight[d, k], or 0 for k < 0
  __device__ __forceinline__ float weight(int k) const { return pick(lane_weight, k); }
  // initial_states[b, d, j], or 0
  __device__ __forceinline__ float state(int j) const { return pick(lane_state, j); }
  // x~ at from + j, j < 8
  __device__ __forceinline__ float before(int j) const { return pick(lane_before, j); }

  // lane's v of lane from, or 0 if that is not one of the first 8
  static __device__ __forceinline__ float pick(float v, int from) {
    const float r = __shfl_sync(0xffffffff, v, from & 31);
    return from >= 0 && from < 8 ? r : 0.0f;
  }
};

// Whether one phase aligns the tiles of all tensors: unit stride over time and, row by row, the same
// misalignment.
inline bool same_phase(const Tensor& a, const Tensor& b, int size) {
  auto phase = [size](int64_t elements) { return elements * size % 16; };
  auto base = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16; };
  for (const Tensor* t : {&a, &b}) {
    if (t->sizes[2] > 1 && t->strides[2] != 1) return false;
    if (base(*t) % static_cast<uintptr_t>(size) != 0) return false;
  }
  if (base(a) != base(b)) return false;
  for (int i = 0; i < 2; ++i) {
    if (a.sizes[i] > 1 && phase(a.strides[i] - b.strides[i]) != 0) return false;
  }
  return true;
}

// Splits n = (outer * count + i) into its parts; 32-bit where it can.
__device__ __forceinline__ int64_t split(int64_t n, int64_t count, int64_t* i) {
  if (n >= 0 && n <= 0xffffffffll && count <= 0xffffffffll) {
    const uint32_t q = static_cast<uint32_t>(n) / static_cast<uint32_t>(count);
    *i = static_cast<uint32_t>(n) - q * static_cast<uint32_t>(count);
    return q;
  }
  *i = n % count;
  return n / count;
}

}  // namespace causal_conv1d::gpu
