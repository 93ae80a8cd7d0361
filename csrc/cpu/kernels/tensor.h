// Elements of the caller's tensors, as the kernels reach them.
#pragma once

#include <stdint.h>

#include "../../check.h"
#include "../simd/types.h"

namespace causal_conv1d {
namespace {

CAUSAL_CONV1D_INLINE bool is_given(const Tensor& t) { return t.ndim != 0; }

CAUSAL_CONV1D_INLINE int64_t element_size(int32_t dtype) {
  return dtype == CAUSAL_CONV1D_FLOAT64 ? 8 : dtype == CAUSAL_CONV1D_FLOAT32 ? 4 : 2;
}

CAUSAL_CONV1D_INLINE bool is_16_bit(int32_t dtype) {
  return dtype == CAUSAL_CONV1D_FLOAT16 || dtype == CAUSAL_CONV1D_BFLOAT16;
}

CAUSAL_CONV1D_INLINE char* address(const Tensor& t, int64_t i, int64_t j = 0, int64_t k = 0) {
  const int64_t offset = i * t.strides[0] + j * t.strides[1] + k * t.strides[2];
  return static_cast<char*>(t.data) + offset * element_size(t.dtype);
}

CAUSAL_CONV1D_INLINE int32_t read_int32(const Tensor& t, int64_t i, int64_t j = 0) {
  int32_t value;
  const int64_t offset = i * t.strides[0] + j * t.strides[1];
  __builtin_memcpy(&value, static_cast<const char*>(t.data) + offset * 4, sizeof(value));
  return value;
}

// Of an int32 or int64 tensor.
CAUSAL_CONV1D_INLINE int64_t read_index(const Tensor& t, int64_t i) {
  if (t.dtype == CAUSAL_CONV1D_INT32) return read_int32(t, i);
  int64_t value;
  __builtin_memcpy(&value, static_cast<const char*>(t.data) + i * t.strides[0] * 8, sizeof(value));
  return value;
}

}  // namespace
}  // namespace causal_conv1d
