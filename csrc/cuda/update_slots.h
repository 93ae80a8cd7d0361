// The pool's way to the kernels of update.cu. Host code.
#pragma once

#include "../check.h"
#include "gpu.h"

namespace causal_conv1d::gpu {

// The update by one token of checked parameters, whose conv_state_indices differ, if a kernel
// suits. What is no row, or pad_slot, gives 0. out may be x.
bool update_slots(const UpdateParams& params, int64_t pad_slot, cudaStream_t stream,
                  cudaError_t* e);

}  // namespace causal_conv1d::gpu
