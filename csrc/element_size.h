#pragma once

#include <cstdint>

namespace causal_conv1d {

// Of a causal_conv1d_dtype, in bytes; 0 for a type that the kernels do not take.
constexpr int64_t element_size(int32_t dtype) {
  constexpr char kSizes[] = {4, 2, 2, 8, 4, 8, 0, 1, 1};  // in the order of causal_conv1d_dtype
  return dtype >= 0 && dtype < static_cast<int32_t>(sizeof kSizes) ? kSizes[dtype] : 0;
}

}  // namespace causal_conv1d
