// Index tensors, int32 or int64, as kernels read them.
#pragma once

#include <cstdint>

#include "../check.h"
#include "gpu.h"

namespace causal_conv1d::gpu {

struct Index {
  const int32_t* data;
  int64_t stride;  // in 32-bit words
  bool wide;       // 64 bits, the lower half first
  __device__ __forceinline__ int32_t low(int64_t b) const { return data[b * stride]; }
  __device__ __forceinline__ int64_t at(int64_t b) const {
    const int32_t* p = data + b * stride;
    const int32_t low = p[0], high = wide ? p[1] : low >> 31;
    return static_cast<int64_t>(high) << 32 | static_cast<uint32_t>(low);
  }
};

inline Index index_view(const Tensor& t) {
  if (!given(t)) return {nullptr, 0, false};
  const bool wide = t.dtype == CAUSAL_CONV1D_INT64;
  return {static_cast<const int32_t*>(t.data), t.strides[0] * (wide ? 2 : 1), wide};
}

}  // namespace causal_conv1d::gpu
