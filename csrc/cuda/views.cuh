// Tensors as kernels see them.
#pragma once

#include <cstdint>

#include "../check.h"
#include "types.cuh"

namespace causal_conv1d::gpu {

// A pointer with element strides over (batch, dim, time).
template <typename T>
struct View {
  T* data;
  int64_t batch, dim, time;

  __host__ __device__ __forceinline__ bool given() const { return data != nullptr; }

  __device__ __forceinline__ T* at(int64_t b, int64_t d, int64_t t) const {
    return data + b * batch + d * dim + t * time;
  }
};

// A small tensor of any float type (weight, bias, states), converted to F (float, or double if the
// tensor is fp64) as it is read and written.
template <typename F>
struct AnyView {
  void* data;
  int32_t dtype;
  int64_t strides[3];

  __host__ __device__ __forceinline__ bool given() const { return data != nullptr; }

  // The bits of an element of up to 32, and their value.
  __device__ __forceinline__ uint32_t bits(int64_t i, int64_t j = 0, int64_t k = 0) const {
    const int64_t o = i * strides[0] + j * strides[1] + k * strides[2];
    return dtype == CAUSAL_CONV1D_FLOAT32 ? static_cast<const uint32_t*>(data)[o]
                                          : static_cast<const uint16_t*>(data)[o];
  }
  // Selects instead of branches: kernels load many of these in unrolled code.
  static __device__ __forceinline__ float convert(uint32_t bits, int32_t dtype) {
    const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    const float other = __uint_as_float(dtype == CAUSAL_CONV1D_BFLOAT16 ? bits << 16 : bits);
    return dtype == CAUSAL_CONV1D_FLOAT16 ? half : other;
  }

  __device__ __forceinline__ F load(int64_t i, int64_t j = 0, int64_t k = 0) const {
    if constexpr (sizeof(F) == 8) {
      return static_cast<const double*>(data)[i * strides[0] + j * strides[1] + k * strides[2]];
    } else {
      return convert(bits(i, j, k), dtype);
    }
  }

  __device__ __forceinline__ void store(F v, int64_t i, int64_t j = 0, int64_t k = 0) const {
    const int64_t o = i * strides[0] + j * strides[1] + k * strides[2];
    if constexpr (sizeof(F) == 8) {
      static_cast<double*>(data)[o] = v;
    } else if (dtype == CAUSAL_CONV1D_FLOAT32) {
      static_cast<float*>(data)[o] = v;
    } else if (dtype == CAUSAL_CONV1D_BFLOAT16) {
      static_cast<__nv_bfloat16*>(data)[o] = from_compute<__nv_bfloat16>(v);
    } else {
      static_cast<__half*>(data)[o] = from_compute<__half>(v);
    }
  }
};

template <typename T>
View<T> view(const Tensor& t) {
  // A dimension of size 1 may have any stride, but kernels for unit stride rely on it.
  const int64_t time = t.ndim < 3 ? 0 : (t.sizes[2] == 1 ? 1 : t.strides[2]);
  return {static_cast<T*>(t.data), t.strides[0], t.strides[1], time};
}

// A tensor without elements counts as not given: load_nearest() needs one.
template <typename F>
AnyView<F> any_view(const Tensor& t) {
  AnyView<F> v{t.data, t.dtype, {0, 0, 0}};
  if (!given(t)) v.data = nullptr;
  for (int i = 0; i < t.ndim; ++i) {
    v.strides[i] = t.strides[i];
    if (t.sizes[i] == 0) v.data = nullptr;
  }
  return v;
}

}  // namespace causal_conv1d::gpu
