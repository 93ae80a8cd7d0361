// The layout of x, which decides the kernel: one rule for both backends and for the self-test.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "check.h"

namespace causal_conv1d {

// Whether kernels run along channels rather than along time. An axis of one element is no axis to
// run along; else the one with unit stride is, or with the shorter one; time if they are alike.
inline bool is_channel_last(int64_t dim, int64_t seqlen, int64_t dim_stride, int64_t time_stride) {
  if (seqlen <= 1) return true;
  if (dim == 1) return false;
  if ((dim_stride == 1) != (time_stride == 1)) return dim_stride == 1;
  return std::abs(dim_stride) < std::abs(time_stride);
}

// Of (batch, dim, seqlen).
inline bool is_channel_last(const Tensor& x) {
  return is_channel_last(x.sizes[1], x.sizes[2], x.strides[1], x.strides[2]);
}

}  // namespace causal_conv1d
