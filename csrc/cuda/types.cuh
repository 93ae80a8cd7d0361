// Element types: the type their sums have, and conversions.
#pragma once

#include <cstdint>

#include "../causal_conv1d.h"
#include "gpu.h"

namespace causal_conv1d::gpu {

// Sums are fp32, fp64 for fp64 tensors.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

__device__ __forceinline__ float to_compute(float v) { return v; }
__device__ __forceinline__ double to_compute(double v) { return v; }
__device__ __forceinline__ float to_compute(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_compute(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_compute(Compute<T> v);
template <>
__device__ __forceinline__ float from_compute<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double from_compute<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_compute<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_compute<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Calls f with a zero of x's element type.
template <typename F>
void dispatch_dtype(int32_t dtype, F&& f) {
  switch (dtype) {
    case CAUSAL_CONV1D_FLOAT16: f(__half{}); break;
    case CAUSAL_CONV1D_BFLOAT16: f(__nv_bfloat16{}); break;
    case CAUSAL_CONV1D_FLOAT32: f(float{}); break;
    default: f(double{});
  }
}

}  // namespace causal_conv1d::gpu
