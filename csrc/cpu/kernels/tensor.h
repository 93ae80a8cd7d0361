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

// (dim, time) of one sequence in a tensor; without data it is not given.
struct Plane {
  char* data;
  int64_t channel, time;  // strides in elements
  int32_t dtype;
};

CAUSAL_CONV1D_INLINE bool is_given(const Plane& p) { return p.data != nullptr; }

// From row i of a tensor, with every `step`-th of its times from `first` on.
CAUSAL_CONV1D_INLINE Plane plane_of(const Tensor& t, int64_t i, int64_t first = 0,
                                    int64_t step = 1) {
  if (!is_given(t) || t.data == nullptr) return {nullptr, 0, 0, 0};
  return {address(t, i, 0, first), t.strides[1], step * t.strides[2], t.dtype};
}

CAUSAL_CONV1D_INLINE char* address(const Plane& p, int64_t channel, int64_t time = 0) {
  return p.data + (channel * p.channel + time * p.time) * element_size(p.dtype);
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
