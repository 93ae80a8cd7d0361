// Floats to and from the order of groups, and elements of any stride to and from a stage.
#pragma once

#include <stdint.h>

#include "../simd/groups.h"

namespace causal_conv1d {
namespace {

// A NaN in fp32 may have any lowest bits; groups of bfloat16 ask for zeros.
inline void plain_nans(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, p + i, sizeof(bits));
    bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
    __builtin_memcpy(p + i, &bits, sizeof(bits));
  }
}

// n floats, n a multiple of kGroup, from consecutive elements to the order of groups, and back.
template <class T>
void to_groups(float* p, int64_t n) {
  plain_nans(p, n);
  if (!kEvenOdd<T>) return;
  for (int64_t i = 0; i < n; i += kGroup) {
    float group[kGroup];
    for (int j = 0; j < kGroup; ++j) group[lane_of<T>(j)] = p[i + j];
    __builtin_memcpy(p + i, group, sizeof(group));
  }
}

template <class T>
void from_groups(float* p, int64_t n) {
  if (!kEvenOdd<T>) return;
  for (int64_t i = 0; i < n; i += kGroup) {
    float group[kGroup];
    for (int j = 0; j < kGroup; ++j) group[j] = p[i + lane_of<T>(j)];
    __builtin_memcpy(p + i, group, sizeof(group));
  }
}

template <class T>
void gather(const char* src, int64_t stride, int64_t n, T* dst) {
  for (int64_t i = 0; i < n; ++i) {
    __builtin_memcpy(dst + i, src + i * stride * static_cast<int64_t>(sizeof(T)), sizeof(T));
  }
}

template <class T>
void scatter(const T* src, int64_t n, char* dst, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    __builtin_memcpy(dst + i * stride * static_cast<int64_t>(sizeof(T)), src + i, sizeof(T));
  }
}

CAUSAL_CONV1D_INLINE int64_t past_line(const void* p) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % 64);
}

}  // namespace
}  // namespace causal_conv1d
