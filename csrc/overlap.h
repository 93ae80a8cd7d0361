// Whether two tensors share memory, or one tensor has two elements in one place. Exact, for any
// strides: halves of one buffer that interleave share nothing, however their ranges cross.
#pragma once

#include <cstdint>

#include "causal_conv1d.h"

namespace causal_conv1d {

enum class Overlap { kNone, kFound, kUndecided };

// In bytes; 0 for a type that the kernels do not take.
inline int64_t element_size(int32_t dtype) {
  constexpr char kSizes[] = {4, 2, 2, 8, 4, 8};  // in the order of causal_conv1d_dtype
  return dtype >= 0 && dtype < static_cast<int32_t>(sizeof kSizes) ? kSizes[dtype] : 0;
}

// Tensors here have elements, and a span for each dimension, (size - 1) * stride, below kMostSpan.
// Their data is aligned to the size of an element.
constexpr int64_t kMostSpan = int64_t{1} << 56;  // eight of them, of 8 bytes each, fit int64_t

// A tensor of any number of dimensions up to kMostDimensions.
struct Strided {
  const void* data;
  const int64_t *sizes, *strides;
  int32_t ndim, dtype;
};
constexpr int kMostDimensions = 4;

// Both take time that is bounded; what is not decided within it is kUndecided.
Overlap find_overlap(const Strided& a, const Strided& b);
Overlap find_overlap_within(const Strided& t);

template <class T>
Strided strided(const T& t) {
  return {t.data, t.sizes, t.strides, t.ndim, t.dtype};
}
template <class T>
Overlap find_overlap(const T& a, const T& b) {
  return find_overlap(strided(a), strided(b));
}
template <class T>
Overlap find_overlap_within(const T& t) {
  return find_overlap_within(strided(t));
}

}  // namespace causal_conv1d
