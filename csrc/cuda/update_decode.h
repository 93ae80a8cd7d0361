// The way to the kernels of update_decode.cu.
#pragma once

#include "update.cuh"

namespace causal_conv1d::gpu {

// The update by one token of checked parameters, if a variant of update_decode suits.
template <typename T>
bool launch_decode(const UpdateParams& params, const UpdateArgs<T>& p, cudaStream_t stream,
                   cudaError_t* e);

}  // namespace causal_conv1d::gpu
