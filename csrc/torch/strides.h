// The strides that torch.empty_like gives.
#pragma once

#include <cstdint>

namespace causal_conv1d::torch_abi {

// Of a tensor of up to three dimensions: its own if its elements fill their memory without gaps or
// overlap, else dense ones in the order of its own.
void like_strides(int ndim, const int64_t* sizes, const int64_t* strides, int64_t* result);

}  // namespace causal_conv1d::torch_abi
