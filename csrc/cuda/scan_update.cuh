// What the kernels of the update of a state by one token share.
#pragma once

#include "scan_math.cuh"
#include "scan_view.cuh"

namespace causal_conv1d::gpu::scan {

constexpr int kUpdateThreads = 128;

// The state's rows, and which of them belongs to a batch entry.
struct StateRows {
  const void* indices;
  int64_t stride, count;
  bool wide;

  // Negative: padding.
  __device__ __forceinline__ int64_t of(int64_t b) const {
    if (indices == nullptr) return b;
    return wide ? static_cast<const int64_t*>(indices)[b * stride]
                : static_cast<const int32_t*>(indices)[b * stride];
  }
};

}  // namespace causal_conv1d::gpu::scan
