// A dilated convolution is one without dilation of every d-th step, d times: the phases of a row.
// Host code, without CUDA.
#pragma once

#include <cstdint>

#include "../check.h"
#include "../element_size.h"
#include "schedule.h"

namespace causal_conv1d::gpu {

struct Phases {
  int64_t dilation, count;  // count: 0 if they do not pay as calls of their own

  // Not for few steps each. Channel-last they are read as fast as x itself, channel-first one
  // element at a time.
  Phases(const Tensor& x, int64_t dilation_) : dilation(dilation_), count(1) {
    if (dilation == 1) return;
    constexpr int64_t kMost = 16, kLeastSteps = 16;
    const bool pays = dilation <= kMost && x.sizes[2] >= kLeastSteps * dilation;
    count = pays ? dilation : 0;
  }

  // Steps i, i + d, ... of the last dimension; of a tensor that is not given none.
  Tensor of(Tensor t, int64_t i) const {
    if (dilation == 1 || !given(t)) return t;
    const int last = t.ndim - 1;
    t.data = static_cast<char*>(t.data) + i * t.strides[last] * element_size(t.dtype);
    t.sizes[last] = ceil_div(t.sizes[last] - i, dilation);
    t.strides[last] *= dilation;
    return t;
  }
};

}  // namespace causal_conv1d::gpu
