// seq_idx: an input counts for a step if both have one id; a step whose id is negative is padding.
#pragma once

#include <cstdint>

#include "../check.h"
#include "ptx.cuh"

namespace causal_conv1d::gpu {

// seq_idx, (batch, seqlen); without one every step has id 0. Of 64-bit ids the lower half is read:
// equal halves are equal ids of one sign, as ids fit int32.
struct SeqIdx {
  const int32_t* data;
  int64_t batch, time;

  __device__ __forceinline__ int at(int64_t b, int64_t t) const {
    return data == nullptr ? 0 : data[b * batch + t * time];
  }
  // Whether x~ at s, before the row the state, counts for a step with that id.
  __device__ __forceinline__ bool takes(int64_t b, int64_t s, int id) const {
    return at(b, max(s, int64_t(0))) == id;
  }
  // The same with its origin at (b, t).
  __device__ __forceinline__ SeqIdx from(int64_t b, int64_t t) const {
    return {data == nullptr ? nullptr : data + b * batch + t * time, 0, time};
  }

  // One past the last step of row b that is not padding, or 0. All lanes of a warp must call it:
  // together they look at 32 * kEach steps at a time, from the row's end on.
  __device__ __forceinline__ int64_t end(int64_t b, int64_t seqlen) const {
    if (data == nullptr) return seqlen;
    constexpr unsigned kEach = 8, kSteps = 32 * kEach;
    for (int64_t end = seqlen; end > 0; end -= kSteps) {
      unsigned after = kSteps;  // steps between the last that counts and end
#pragma unroll
      for (unsigned i = 0; i < kEach; ++i) {
        const unsigned back = i * 32 + threadIdx.x % 32;
        const int64_t t = end - 1 - back;
        if (at(b, max(t, int64_t(0))) >= 0 && t >= 0) after = min(after, back);
      }
      after = least_of_warp(after);
      if (after < kSteps) return end - after;
    }
    return 0;
  }
};

inline SeqIdx seq_idx_view(const Tensor& t) {
  if (!given(t)) return {nullptr, 0, 0};
  const int words = t.dtype == CAUSAL_CONV1D_INT64 ? 2 : 1;  // per id, the lower one first
  return {static_cast<const int32_t*>(t.data), t.strides[0] * words, t.strides[1] * words};
}

}  // namespace causal_conv1d::gpu
