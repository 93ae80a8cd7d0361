// How wide the accesses to a tensor may be, and where it ends. Host code, without CUDA.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../check.h"

namespace causal_conv1d::gpu {

// What a channel-first kernel may take for granted of its rows, from most to least.
enum class Access {
  kAligned,  // they begin and end at multiples of 16 bytes
  kDense,    // they lie one after the other, the first one aligned
  kUnit,     // time has unit stride
  kStrided   // nothing
};

// Adjacent steps per lane of channel-first kernels, and adjacent channels per thread of
// channel-last ones and of the channel-last forward, if all tensors allow it: more would spill
// registers. size: bytes of an element of x.
constexpr int steps_per_lane(int64_t width, int size) { return width > 4 || size == 2 ? 8 : 4; }
constexpr int forward_channels(int size) { return size == 4 ? 2 : 4; }
constexpr int channels_per_thread(int64_t width, int size) {
  return width > 4 || size == 4 ? 2 : 4;
}

// The largest n <= max, a power of two, such that every n-th element along axis (1: dim, 2: time)
// is aligned to n * size bytes and adjacent to the next; 0 if axis has a stride.
inline int vector_width(const Tensor& t, int axis, int max, int size) {
  if (t.sizes[axis] > 1 && t.strides[axis] != 1) return 0;
  for (int n = max; n > 1; n /= 2) {
    const int64_t bytes = static_cast<int64_t>(n) * size;
    bool aligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data)) % bytes == 0;
    for (int i = 0; i < 3; ++i) {
      if (i != axis && t.sizes[i] > 1) aligned = aligned && t.strides[i] * size % bytes == 0;
    }
    if (aligned) return n;
  }
  return 1;
}

// How many adjacent channels, at most max, all tensors can give in one access; 0 or 1: each alone.
inline int common_channels(int max, int size, int64_t dim,
                           std::initializer_list<const Tensor*> tensors) {
  int n = max;
  for (const Tensor* t : tensors) {
    const int width = vector_width(*t, 1, max, size);
    n = width < n ? width : n;
  }
  while (n > 1 && dim % n != 0) n /= 2;
  return n;
}

// What holds for the rows of all tensors.
inline Access common_access(std::initializer_list<const Tensor*> tensors, int size) {
  const int G = 16 / size;
  bool aligned = true, dense = true;
  for (const Tensor* t : tensors) {
    const int64_t dim = t->sizes[1], seqlen = t->sizes[2];
    const int width = vector_width(*t, 2, G, size);
    if (width == 0) return Access::kStrided;
    // What follows the row within its last 16 bytes may be another's.
    aligned = aligned && width == G && seqlen % G == 0;
    dense = dense && reinterpret_cast<uintptr_t>(t->data) % 16 == 0 &&
            (dim <= 1 || (t->strides[1] - seqlen) % G == 0) &&
            (t->sizes[0] <= 1 || (t->strides[0] - dim * seqlen) % G == 0);
  }
  return aligned ? Access::kAligned : (dense ? Access::kDense : Access::kUnit);
}

// Elements from t.data to one past the last in memory.
inline int64_t extent(const Tensor& t) {
  if (!has_elements(t)) return 0;
  int64_t n = 1;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.strides[i] > 0) n += (t.sizes[i] - 1) * t.strides[i];
  }
  return n;
}

}  // namespace causal_conv1d::gpu
